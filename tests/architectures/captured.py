"""Each architecture captured once for all tests that begin with its capture.

Capture itself is the business of test_architectures.py and test_capture.py; everywhere else it
would be most of a test's time.
"""

import os
import tempfile
from pathlib import Path

import torch

import paredown
from paredown.graph.model import Model

from . import ARCHITECTURES, Inputs, make

FOLDER = "PAREDOWN_TEST_CAPTURES"  # of this run of the tests, for all of its processes


def captured(name: str) -> tuple[Model, Inputs]:
    """The captured model of that name, a new one each time, and its example inputs."""
    folder = Path(os.environ.get(FOLDER) or tempfile.mkdtemp())
    model, inputs = folder / f"{name}.safetensors", folder / f"{name}.pt"
    if not model.is_file():
        module, example = make(name)
        made = paredown.capture(module, example, ARCHITECTURES[name].dynamic)
        own = Path(tempfile.mkdtemp(dir=folder))
        torch.save(example, own / inputs.name)
        made.save(own / model.name)
        for file in (inputs, model):  # whole, whoever makes it at the same time
            os.replace(own / file.name, file)
    return Model.load(model), torch.load(inputs, weights_only=True)
