"""What a path is that is no way in, and what can be done with it."""

from __future__ import annotations

from pathlib import Path

KNOWN = (
    "expected a Python file with model() and task(), or a model: .onnx, a Hugging Face folder, "
    ".keras or .h5, a .pt2 program or a saved .safetensors model"
)
NEEDS_SAMPLES = (
    "is a model without its task: check, baseline, plan and run need samples: --data samples.npz, "
    ".npy, .jsonl, or a folder of pictures; with a column of labels it is scored by these, without "
    "one by fidelity to the original. paredown inspect needs none."
)
CONVERT = "convert it by tf2onnx (python -m tf2onnx.convert), and bring the .onnx file"
EXPORTED = {".pte", ".xml", ".pare"}
WEIGHTS = {".pt", ".pth", ".ckpt", ".bin"}
TENSORFLOW = {".tflite", ".pb", ".hdf5"}
SAMPLES = {".npz", ".npy", ".jsonl", ".csv"}


def told(path: Path) -> str:
    """A sentence on why a path cannot be opened as a model.

    Example:
        >>> told(Path("nowhere.py"))
        'nowhere.py: no such file.'
    """
    if path.is_dir():
        return f"{path}: {_folder(path)}; {KNOWN}."
    if not path.is_file():
        return f"{path}: no such file."
    return f"{path}: {_file(path.suffix.lower())}{KNOWN}."


def _folder(path: Path) -> str:
    if (path / "run.json").is_file():
        return "is a run's folder, for paredown report, explain and replay"
    if (path / "saved_model.pb").is_file():
        return f"is a TensorFlow model; {CONVERT}"
    return "is a folder"


def _file(suffix: str) -> str:
    if suffix in EXPORTED:
        return (
            "is a file that a runtime runs: paredown.open runs it and paredown pack makes it "
            "smaller for delivery, but no step works on it; "
        )
    if suffix in WEIGHTS:
        return "holds weights without their module; load them in model() of a Python file; "
    if suffix in TENSORFLOW:
        return f"is a TensorFlow model; {CONVERT}; "
    if suffix in SAMPLES:
        return "is no model; samples are named by --data, beside the model; "
    return ""
