"""What a path is that is no way in, and what can be done with it."""

from __future__ import annotations

from pathlib import Path

KNOWN = (
    "expected a Python file with model() and task(), a .pt2 program or a saved .safetensors model"
)
PYTORCH_ALONE = "which cannot be compressed; bring it in PyTorch"
EXPORTED = {".onnx", ".tflite", ".pte", ".xml", ".pare"}
WEIGHTS = {".pt", ".pth", ".ckpt", ".bin", ".npz"}
WITHOUT_TASK = {".pt2", ".safetensors"}
KERAS = {".keras", ".h5", ".hdf5", ".pb"}


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
    if path.suffix in WITHOUT_TASK:
        return (
            f"{path}: is a model without its task, which paredown inspect takes; here give its "
            "paredown.capture back from model() of a Python file: expected a Python file with "
            "model() and task()."
        )
    return f"{path}: {_file(path.suffix.lower())}{KNOWN}."


def _folder(path: Path) -> str:
    if (path / "run.json").is_file():
        return "is a run's folder, for paredown report, explain and replay"
    if (path / "config.json").is_file():
        return (
            "is a folder as Hugging Face has them; load it with from_pretrained in model() of a "
            "Python file"
        )
    if (path / "saved_model.pb").is_file():
        return f"is a TensorFlow model, {PYTORCH_ALONE}"
    return "is a folder"


def _file(suffix: str) -> str:
    if suffix in EXPORTED:
        return (
            "is a file that a runtime runs: paredown.open runs it and paredown pack makes it "
            "smaller for delivery, but no step works on it; "
        )
    if suffix in WEIGHTS:
        return "holds weights without their module; load them in model() of a Python file; "
    if suffix in KERAS:
        return f"is a Keras or TensorFlow model, {PYTORCH_ALONE}; "
    return ""
