"""The ways from a module to a file that are compared, by the runtime that opens the file.

Each tool takes the same module and the same calibration examples, its own recommended settings for
an x86 CPU with int8 dot products, and writes one file.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

import paredown
from paredown.targets.runtimes import runtime

os.environ.setdefault("TELEMETRY_OPT_OUT", "1")  # openvino and nncf
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # litert's converter

Tool = Callable[[nn.Module, Dataset, Path, bool], Path]  # module, examples, file, transformer


# --- ours ------------------------------------------------------------------------------------


def paredown_task(examples: Dataset, batch_size: int = 64) -> paredown.Task:
    example = examples[0][0][None]
    return paredown.Task(
        example=(example,), score=None, calibration=examples, batch_size=batch_size
    )


def paredown_file(
    module: nn.Module, examples: Dataset, path: Path, runtime_name: str, steps: list
) -> Path:
    """With the defaults of the steps; float where there are none."""
    task = paredown_task(examples)
    model = paredown.apply(module, steps, task)
    made: Path = runtime(runtime_name).lower(model, path)
    return made


def _ours(runtime_name: str, *steps: Any) -> Tool:
    def make(module: nn.Module, examples: Dataset, path: Path, transformer: bool) -> Path:
        return paredown_file(module, examples, path, runtime_name, list(steps))

    return make


# --- ONNX Runtime ----------------------------------------------------------------------------


def export_float(module: nn.Module, examples: Dataset, path: Path) -> Path:
    """The float file that the peers start from, by PyTorch's exporter, any batch size."""
    example = torch.stack([examples[0][0], examples[1][0]])
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


def onnxruntime_int8(
    module: nn.Module, examples: Dataset, path: Path, transformer: bool = False
) -> Path:
    """As its documentation recommends for x86 with VNNI: QDQ, uint8 x int8, per channel, MinMax."""
    float_file = export_float(module, examples, path.with_suffix(".float.onnx"))
    with quiet():
        quantized_static(float_file, _feeds(float_file, examples), path)
    float_file.unlink()
    return path


def quantized_static(float_file: Path, feeds: Iterator[dict[str, np.ndarray]], path: Path) -> Path:
    """The same of any ONNX file, calibrated on what it is fed."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(feeds, None)

    prepared = path.with_suffix(".prepared.onnx")
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
    module: nn.Module,
    examples: Dataset,
    path: Path,
    transformer: bool = False,
    preset: str | None = None,
) -> Path:
    """For the CPU; ``preset`` "mixed" takes asymmetric activations, "performance" symmetric ones.

    None is its default: mixed for a transformer, performance for any other model.
    """
    import onnx

    float_file = export_float(module, examples, path.with_suffix(".float.onnx"))
    name = _input_name(float_file)
    with quiet():
        quantized = _nncf_quantize(
            onnx.load(str(float_file)),
            lambda index: {name: examples[index][0][None].numpy()},
            len(examples),  # type: ignore[arg-type]
            preset,
            transformer,
        )
        onnx.save(quantized, str(path))
    float_file.unlink()
    return path


def nncf_int8_mixed(
    module: nn.Module, examples: Dataset, path: Path, transformer: bool = False
) -> Path:
    """The preset that is not the default."""
    preset = "performance" if transformer else "mixed"
    return nncf_int8(module, examples, path, transformer, preset)


def _nncf_quantize(
    model: Any,
    feed: Callable[[int], Any],
    count: int,
    preset: str | None,
    transformer: bool,
) -> Any:
    import nncf

    nncf.set_log_level(logging.ERROR)
    return nncf.quantize(
        model,
        nncf.Dataset(range(count), feed),
        preset=nncf.QuantizationPreset(preset) if preset else None,
        target_device=nncf.TargetDevice.CPU,
        subset_size=count,
        model_type=nncf.ModelType.TRANSFORMER if transformer else None,
    )


def torchao_onnx(
    module: nn.Module, examples: Dataset, path: Path, transformer: bool = False
) -> Path:
    """torchao's stock path: ExecuTorch's quantizer, then PyTorch's ONNX exporter."""
    with quiet():
        converted = _torchao_converted(module, examples)
        program = torch.onnx.export(
            converted, (examples[0][0][None],), dynamo=True, external_data=False, verbose=False
        )
        assert program is not None
        program.save(str(path), external_data=False)
    return path


def _torchao_converted(module: nn.Module, examples: Dataset) -> nn.Module:
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    graph = torch.export.export(module, (examples[0][0][None],)).module()
    quantizer = XNNPACKQuantizer().set_global(
        get_symmetric_quantization_config(is_per_channel=True)
    )
    prepared = prepare_pt2e(graph, quantizer)
    with torch.no_grad():
        for index in range(len(examples)):  # type: ignore[arg-type]
            prepared(examples[index][0][None])
    return convert_pt2e(prepared)  # type: ignore[no-any-return]


def _feeds(float_file: Path, examples: Dataset) -> Iterator[dict[str, np.ndarray]]:
    """One example at a time, as an ONNX file takes it."""
    name = _input_name(float_file)
    for index in range(len(examples)):  # type: ignore[arg-type]
        yield {name: examples[index][0][None].numpy()}


def _input_name(file: Path) -> str:
    import onnx

    return str(onnx.load(str(file), load_external_data=False).graph.input[0].name)


# --- OpenVINO --------------------------------------------------------------------------------


def openvino_nncf_int8(
    module: nn.Module, examples: Dataset, path: Path, transformer: bool = False
) -> Path:
    """NNCF on OpenVINO's own form of the model, fixed at one example."""
    import openvino

    float_file = export_float(module, examples, path.with_suffix(".float.onnx"))
    with quiet():
        model = openvino.convert_model(str(float_file))
        model.reshape([1, *examples[0][0].shape])
        quantized = _nncf_quantize(
            model,
            lambda index: examples[index][0][None].numpy(),
            len(examples),  # type: ignore[arg-type]
            None,
            transformer,
        )
        openvino.save_model(quantized, str(path))
    float_file.unlink()
    return path


def openvino_onnxruntime_int8(
    module: nn.Module, examples: Dataset, path: Path, transformer: bool = False
) -> Path:
    """ONNX Runtime's int8 file, converted."""
    import openvino

    made = onnxruntime_int8(module, examples, path.with_suffix(".onnx"), transformer)
    with quiet():
        model = openvino.convert_model(str(made))
        model.reshape([1, *examples[0][0].shape])
        openvino.save_model(model, str(path))
    made.unlink()
    return path


# --- ExecuTorch ------------------------------------------------------------------------------


def executorch_torchao_int8(
    module: nn.Module, examples: Dataset, path: Path, transformer: bool = False
) -> Path:
    """As its documentation shows: XNNPACK's quantizer, then XNNPACK's partitioner."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    with quiet():
        converted = _torchao_converted(module, examples)
        program = torch.export.export(converted, (examples[0][0][None],))
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        path.write_bytes(lowered.to_executorch().buffer)
    return path


# --- LiteRT ----------------------------------------------------------------------------------


def litert_aieq_int8(
    module: nn.Module, examples: Dataset, path: Path, transformer: bool = False
) -> Path:
    """ai-edge-quantizer's static recipe on the converted float file."""
    import litert_torch
    from ai_edge_quantizer import quantizer, recipe

    float_file = path.with_suffix(".float.tflite")
    with quiet():
        litert_torch.convert(module, (examples[0][0][None],)).export(str(float_file))
        made = quantizer.Quantizer(str(float_file), recipe.static_wi8_ai8())
        signature, name = _signature(float_file)
        feeds = [
            {name: examples[index][0][None].numpy()}
            for index in range(len(examples))  # type: ignore[arg-type]
        ]
        made.quantize(made.calibrate({signature: feeds})).export_model(str(path), overwrite=True)
    float_file.unlink()
    return path


def litert_pt2e_int8(
    module: nn.Module, examples: Dataset, path: Path, transformer: bool = False
) -> Path:
    """litert-torch's own quantizer on the exported graph."""
    import litert_torch
    from litert_torch.quantize import pt2e_quantizer
    from litert_torch.quantize.quant_config import QuantConfig
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    with quiet():
        settings = pt2e_quantizer.get_symmetric_quantization_config(is_per_channel=True)
        quantizer = pt2e_quantizer.PT2EQuantizer().set_global(settings)
        graph = torch.export.export(module, (examples[0][0][None],)).module()
        prepared = prepare_pt2e(graph, quantizer)
        with torch.no_grad():
            for index in range(len(examples)):  # type: ignore[arg-type]
                prepared(examples[index][0][None])
        converted = convert_pt2e(prepared, fold_quantize=False)
        litert_torch.convert(
            converted,
            (examples[0][0][None],),
            quant_config=QuantConfig(pt2e_quantizer=quantizer),
        ).export(str(path))
    return path


def _scaled(file: Path, predict: Callable[..., Any]) -> Callable[..., Any]:
    """A .tflite file whose inputs or outputs are integers, called with and giving real numbers."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(file))
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()

    def run(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        given = []
        for item, array in zip(inputs, arrays, strict=True):
            scale, zero_point = item["quantization"]
            if scale and array.dtype == np.float32:
                steps = np.round(array / scale) + zero_point
                array = steps.clip(*_limits(item["dtype"])).astype(item["dtype"])
            given.append(array)
        made = predict(*given)
        return tuple(
            (value.astype(np.float32) - zero_point) * scale if scale else value
            for value, item in zip(made, outputs, strict=True)
            for scale, zero_point in [item["quantization"]]
        )

    return run


def _limits(kind: Any) -> tuple[int, int]:
    limits = np.iinfo(kind)
    return limits.min, limits.max


def _signature(file: Path) -> tuple[str, str]:
    """The key of a file's only signature, and the name of its only input."""
    from ai_edge_litert.interpreter import Interpreter

    [(key, names)] = Interpreter(str(file)).get_signature_list().items()
    return key, names["inputs"][0]


# --- all -------------------------------------------------------------------------------------

OURS, FLOAT = "paredown", "float"
_INT8 = paredown.Quantize("int8")
# runtime -> tool -> how it makes its file; the tool's name begins with its package
TOOLS: dict[str, dict[str, Tool]] = {
    "onnxruntime": {
        FLOAT: _ours("onnxruntime"),
        OURS: _ours("onnxruntime", _INT8),
        "onnxruntime": onnxruntime_int8,
        "nncf": nncf_int8,
        "nncf, other preset": nncf_int8_mixed,
        "torchao": torchao_onnx,
    },
    "openvino": {
        FLOAT: _ours("openvino"),
        OURS: _ours("openvino", _INT8),
        "nncf": openvino_nncf_int8,
        "onnxruntime": openvino_onnxruntime_int8,
    },
    "executorch": {
        FLOAT: _ours("executorch"),
        OURS: _ours("executorch", _INT8),
        "torchao": executorch_torchao_int8,
    },
    "litert": {
        FLOAT: _ours("litert"),
        OURS: _ours("litert", _INT8),
        "ai-edge-quantizer": litert_aieq_int8,
        "litert-torch": litert_pt2e_int8,
    },
}


def opened(runtime_name: str, file: Path, threads: int) -> Callable[..., Any]:
    """A predictor of real numbers."""
    predict = runtime(runtime_name).open(file, threads)
    return _scaled(file, predict) if runtime_name == "litert" else predict  # type: ignore[no-any-return]


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
