"""The weights of a Hugging Face folder: safetensors, whole, and inside the folder."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from paredown.core.errors import UserError
from paredown.graph.doors.huggingface.folder import settings

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
OTHERS = (".h5", ".msgpack", ".onnx", ".gguf", ".ot")
FLOATS = {"F16": "float16", "BF16": "bfloat16", "F64": "float64"}
TAKEN = {"F32", *FLOATS, "I64", "I32", "U8", "BOOL"}


def files(folder: Path) -> tuple[Path, ...]:
    """The files that hold a folder's weights.

    Raises:
        UserError: there are none, or not all that the index names; says what there is instead.
    """
    if (folder / WHOLE).is_file():
        return (folder / WHOLE,)
    if not (folder / INDEX).is_file():
        raise UserError(f"{folder}: {_instead(folder)}.")
    index = settings(folder / INDEX)
    named = index.get("weight_map")
    if not isinstance(named, dict) or not named:
        raise UserError(f"{folder / INDEX}: expected a weight_map of the weights' files.")
    parts = []
    for name in sorted({str(each) for each in named.values()}):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(
                f"{folder / INDEX}: names {name!r}; expected a .safetensors file beside it."
            )
        if not (folder / name).is_file():
            raise UserError(
                f"{folder}: {name} is missing, which {INDEX} names; download or save it again."
            )
        parts.append(folder / name)
    return tuple(parts)


def _instead(folder: Path) -> str:
    """What is there in the place of safetensors, and what to do."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    pickled = [name for name in names if name.endswith(PICKLED)]
    if pickled:
        return (
            f"its weights are pickled ({pickled[0]}), and to read a pickle is to run whatever code "
            "it holds; where you trust it, load it with from_pretrained and save it with "
            "save_pretrained(folder), which writes model.safetensors"
        )
    others = [name for name in names if name.endswith(OTHERS)]
    if others:
        return (
            f"holds {others[0]} and no {WHOLE}; save it with save_pretrained(folder) of "
            "transformers, which writes one"
        )
    return (
        f"holds no weights; expected {WHOLE}, or {INDEX} with the files that it names, as "
        "save_pretrained(folder) of transformers writes them"
    )


def dtypes(files: tuple[Path, ...]) -> Counter[str]:
    """How many weights there are of each type, by its name in safetensors.

    Raises:
        UserError: a file is truncated or damaged, or a weight has a type that is not taken.
    """
    from safetensors import safe_open

    found: Counter[str] = Counter()
    for path in files:
        try:
            with safe_open(path, framework="pt") as opened:
                held: Any = opened
                kinds = {name: held.get_slice(name).get_dtype() for name in held.keys()}  # noqa: SIM118
        except Exception as error:
            raise UserError(
                f"{path}: is truncated or damaged ({str(error).strip() or type(error).__name__}); "
                "download or save it again."
            ) from error
        for name, kind in kinds.items():
            if kind not in TAKEN:
                raise UserError(
                    f"{path}: {name} is of type {kind}; expected weights of float32, float16 or "
                    "bfloat16: bring the float model that it was made of."
                )
        found.update(kinds.values())
    return found


def note(found: Counter[str]) -> str | None:
    """What was done to weights of another type, in a sentence.

    Example:
        >>> note(Counter({"F16": 3, "F32": 1}))
        '3 of its 4 weights are float16 in the file, and float32 here'
    """
    other = [(FLOATS[kind], count) for kind, count in found.items() if kind in FLOATS]
    if not other:
        return None
    kinds = " or ".join(sorted(kind for kind, _ in other))
    count = sum(count for _, count in other)
    return f"{count} of its {sum(found.values())} weights are {kinds} in the file, and float32 here"
