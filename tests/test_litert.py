"""LiteRT: what a .tflite file holds, computes and refuses."""

import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import paredown
from docs import make_architectures as page
from paredown import parity
from paredown.graph import structure
from paredown.runtimes import litert, litert_passes, litert_worker
from paredown.runtimes.litert_file import File, operations
from paredown.steps.cast import Cast
from paredown.steps.quantize import Quantize
from paredown.types import Target, Task, UserError
from tests.architectures import ARCHITECTURES, make, with_batch

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = {"fp16": Cast("fp16"), "int8": Quantize("int8"), "int4": Quantize("int4")}


@pytest.fixture(scope="module")
def lowered(tmp_path_factory):
    """(architecture, form) -> the model and its file, made once."""
    made = {}

    def get(name: str, form: str):
        if (name, form) not in made:
            model = captured(name)
            task = page.calibration_task(ARCHITECTURES[name], make(name)[1])
            step = STEPS.get(form)
            model = step.apply(model, task) if step else model
            path = tmp_path_factory.mktemp(name) / f"{form}.tflite"
            made[name, form] = model, litert.lower(model, path)
        return made[name, form]

    return get


def captured(name: str):
    module, example = make(name)
    return paredown.capture(module, example, ARCHITECTURES[name].dynamic)


def leaves(name: str, batch: int) -> list[torch.Tensor]:
    return structure.flatten(with_batch(make(name)[1], batch))[0]


def agreement(model, path, inputs: list[torch.Tensor]) -> float:
    """The least agreement in dB of an output."""
    got = litert.open(path)(*[leaf.numpy() for leaf in inputs])
    with torch.no_grad():
        expected = model.graph(*[leaf.clone() for leaf in inputs])
    assert [str(t.dtype).removeprefix("torch.") for t in expected] == [a.dtype.name for a in got]
    return min(
        parity.agreement_db(a.numpy(), b) for a, b in zip(expected, got, strict=True)
    )


# --- what runs on integers -------------------------------------------------------------------

# Architecture -> exactly the integer ops of its file.
FUSED = {
    "mlp": {"FULLY_CONNECTED": 3, "TANH": 1},
    "mobilenet_v2": {
        "CONV_2D": 11,
        "DEPTHWISE_CONV_2D": 5,
        "ADD": 2,
        "MEAN": 1,
        "FULLY_CONNECTED": 1,
    },
    "transformer_encoder": {"FULLY_CONNECTED": 9},
    "resnet_basic": {"CONV_2D": 20, "ADD": 8, "MEAN": 1, "FULLY_CONNECTED": 1},
}
SLOW = {"resnet_basic", "transformer_encoder"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in FUSED]
)
def test_every_op_that_can_runs_on_integers(name, lowered):
    model, path = lowered(name, "int8")
    census = litert.census(path)
    assert census.integer_ops == FUSED[name] and census.unfused == ()
    weights = [node.args[0].target for node in page.quantized(model)]
    assert census.bytes_by_dtype["int8"] >= sum(model.state_dict()[w].numel() for w in weights)
    assert agreement(model, path, leaves(name, 2)) > parity.QUANTIZED_DB
