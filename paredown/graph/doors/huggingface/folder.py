"""What lies in a Hugging Face folder: its settings, its weights by name, and where it is from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paredown.core.errors import UserError

CONFIG = "config.json"
SETTINGS = (  # of what stands before and behind the model
    CONFIG,
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
)
# They travel with the artifact, as far as they are there.
TRAVELLING = (
    "added_tokens.json",
    "chat_template.jinja",
    "config_sentence_transformers.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentence_bert_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "spm.model",
    "source.spm",
    "target.spm",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "bpe.codes",
    CONFIG,
)
CODE = ("auto_map", "trust_remote_code", "custom_pipelines")  # names of code in the folder
LARGEST = 64 << 20  # bytes of a file of settings; a large vocabulary's JSON is not read here
# What changes where weights come from, or what stands in the place of layers.
OTHERWISE = {
    "quantization_config": "its weights are quantized already; bring the float model that they "
    "were made of",
    "compression_config": "its weights are compressed already; bring the float model that they "
    "were made of",
    "transformers_weights": "names a file of weights of its own; call it model.safetensors and "
    "take the entry out",
    "fusion_config": "puts other layers in the place of the model's own; take the entry out",
}


def settings(path: Path) -> dict[str, Any]:
    """A file of settings.

    Raises:
        UserError: it is not there, or no JSON object; says where it breaks.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise UserError(f"{path}: has {path.stat().st_size:,} bytes; expected settings.")
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        again = "download or save the folder again"
        raise UserError(f"{path}: is no JSON: {error}; {again}.") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(found).__name__}.")
    return found


def config(folder: Path) -> dict[str, Any]:
    """The folder's config, nothing of the folder's own code being wanted anywhere.

    Raises:
        UserError: a file of settings is missing, damaged, or asks for what is not taken.
    """
    found = settings(folder / CONFIG)
    for name in SETTINGS:
        if (folder / name).is_file():
            _refuse_code(folder / name)
    for key, why in OTHERWISE.items():
        if found.get(key) is not None:
            raise UserError(f"{folder / CONFIG}: {key}: {why}.")
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder}: holds an adapter; merge it into its model (merge_and_unload of peft), and "
            "save that with save_pretrained."
        )
    return found


def _refuse_code(path: Path) -> None:
    for where, value in _entries(settings(path)):
        if where.rsplit(".", 1)[-1] in CODE and value not in (None, False, {}, []):
            raise UserError(
                f"{path}: {where} asks for code of the folder to be run, which no folder may; "
                "where transformers has this class itself, take the entry out and it is used, "
                "else load the model in model() of a Python file, which is code of yours."
            )


def _entries(value: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Each entry of nested settings, by its path."""
    if depth > 20:
        return
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        where = f"{prefix}{key}"
        yield where, inner
        if isinstance(inner, (dict, list)):
            yield from _entries(inner, f"{where}.", depth + 1)


def travelling(folder: Path) -> tuple[Path, ...]:
    """The files that whoever runs the artifact needs besides it."""
    return tuple(folder / name for name in sorted(TRAVELLING) if (folder / name).is_file())


def card(folder: Path, read: dict[str, Any]) -> dict[str, str]:
    """Name, licence and the like, from the folder's own model card where it has one.

    Only plain lines of its front matter are read: ``key: value``, and lists of plain values.
    """
    about = front_matter(folder / "README.md")
    name = about.get("model_name") or about.get("name") or read.get("_name_or_path") or ""
    named = str(name).strip()
    if not named or named.startswith(("/", ".", "~")) or "\\" in named:  # a path of some machine
        named = _named(folder.resolve())
    found = {"name": named}
    for key in ("license", "license_name", "license_link", "base_model", "language", "datasets"):
        if about.get(key):
            found[key] = about[key]
    return found


def _named(folder: Path) -> str:
    """What a folder is called; one in the hub's cache by its model.

    Example:
        >>> _named(Path("hub/models--someone--films/snapshots/0a1b")), _named(Path("x/films"))
        ('someone/films', 'films')
    """
    of_hub = folder.parent.parent.name
    if folder.parent.name == "snapshots" and of_hub.startswith("models--"):
        return of_hub.removeprefix("models--").replace("--", "/")
    return folder.name


def front_matter(path: Path) -> dict[str, str]:
    """The plain entries between the two ``---`` that a card begins with; lists joined by commas.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     card = Path(folder, "README.md")
        ...     _ = card.write_text("---\\nlicense: mit\\nlanguage:\\n- en\\n- de\\n---\\n")
        ...     front_matter(card)
        {'license': 'mit', 'language': 'en, de'}
    """
    try:
        text = path.read_bytes()[: 1 << 16].decode("utf-8", errors="replace")
    except OSError:
        return {}
    lines = text.splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    found: dict[str, list[str]] = {}
    key = ""
    for line in lines[1:]:
        if line.strip() == "---":
            return {name: ", ".join(values) for name, values in found.items() if values}
        if line.lstrip().startswith("- ") and key and ":" not in line:
            found[key].append(_plain(line.lstrip()[2:]))
        elif line[:1].isalpha() and ":" in line:
            key, _, value = line.partition(":")
            found[key] = [_plain(value)] if _plain(value) else []
        elif not line.startswith("- "):
            key = ""  # nested: nothing that is read here
    return {}


def _plain(value: str) -> str:
    value = value.strip()
    if value.startswith("[") and value.endswith("]"):
        return ", ".join(_plain(each) for each in value[1:-1].split(","))
    return value.strip("\"'") if not value.startswith(("{", "|", ">", "&", "*")) else ""
