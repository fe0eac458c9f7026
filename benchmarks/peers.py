"""The ways to an int8 ONNX file that are compared: paredown's, ONNX Runtime's own and NNCF's.

Each takes the same calibration images and its own recommended settings for an x86 CPU with int8
dot products, and writes one file.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

import paredown
from paredown.graph.model import Model
from paredown.runtimes import onnxruntime as onnx_runtime

os.environ.setdefault("TELEMETRY_OPT_OUT", "1")  # openvino and nncf


def paredown_task(images: Dataset, batch_size: int = 64) -> paredown.Task:
    example = images[0][0][None]
    return paredown.Task(example=(example,), score=None, calibration=images, batch_size=batch_size)


def paredown_float(module: nn.Module, images: Dataset, path: Path) -> Model:
    model = paredown.capture(module, (images[0][0][None],))
    onnx_runtime.lower(model, path)
    return model


def paredown_int8(
    model: Model, images: Dataset, path: Path, batch_size: int = 64, **settings: Any
) -> Path:
    """Defaults throughout, unless ``settings`` of `Quantize` are given."""
    quantized = paredown.Quantize("int8", **settings).apply(
        model, paredown_task(images, batch_size)
    )
    return onnx_runtime.lower(quantized, path)


def export_float(module: nn.Module, images: Dataset, path: Path) -> Path:
    """The float file that the peers start from, by PyTorch's exporter, any batch size."""
    example = torch.stack([images[0][0], images[1][0]])
    with quiet():
        program = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
        )
        assert program is not None
        program.save(str(path), external_data=False)
    return path


def onnxruntime_int8(float_file: Path, images: Dataset, path: Path) -> Path:
    """As its documentation recommends for x86 with VNNI: QDQ, uint8 x int8, per channel, MinMax."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = feeds(float_file, images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    prepared = path.with_suffix(".prepared.onnx")
    with quiet():
        quant_pre_process(str(float_file), str(prepared))
        quantization.quantize_static(
            prepared,
            path,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            per_channel=True,
            calibrate_method=quantization.CalibrationMethod.MinMax,
        )
    prepared.unlink()
    return path


def nncf_int8(
    float_file: Path,
    images: Dataset,
    path: Path,
    preset: str | None = None,
    transformer: bool = False,
) -> Path:
    """For the CPU; ``preset`` "mixed" takes asymmetric activations, "performance" symmetric ones.

    None is its default: mixed for a transformer, performance for any other model.
    """
    import nncf
    import onnx

    name, count = input_name(float_file), len(images)  # type: ignore[arg-type]
    nncf.set_log_level(logging.ERROR)
    with quiet():
        quantized = nncf.quantize(
            onnx.load(str(float_file)),
            nncf.Dataset(range(count), lambda index: {name: images[index][0][None].numpy()}),
            preset=nncf.QuantizationPreset(preset) if preset else None,
            target_device=nncf.TargetDevice.CPU,
            subset_size=count,
            model_type=nncf.ModelType.TRANSFORMER if transformer else None,
        )
        onnx.save(quantized, str(path))
    return path


def feeds(float_file: Path, images: Dataset) -> Iterator[dict[str, np.ndarray]]:
    """One image at a time, as an ONNX file takes it."""
    name = input_name(float_file)
    for index in range(len(images)):  # type: ignore[arg-type]
        yield {name: images[index][0][None].numpy()}


def input_name(file: Path) -> str:
    import onnx

    return str(onnx.load(str(file), load_external_data=False).graph.input[0].name)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Peers' progress bars and advice would stand between the rows."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
