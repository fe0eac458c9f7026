"""Arguments of a wrong type, at every position of everything public, are told in a sentence."""

import inspect
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import paredown
from paredown.core.errors import UserError
from paredown.core.results import Artifact, Run
from tests.test_predictor import run_with

WRONG = {"None": None, "number": 3, "text": "text", "object": object()}
EXAMPLE = (torch.zeros(1, 4),)
DATA = TensorDataset(torch.zeros(4, 4), torch.zeros(4, dtype=torch.long))
TASK = paredown.Task(EXAMPLE, paredown.accuracy, validation=DATA, test=DATA, calibration=DATA)
GOALS, TARGET, STEPS = paredown.Goals(), paredown.Target(), [paredown.Cast()]
BASELINE = paredown.Measurement(1, score=1.0)
NET = nn.Linear(4, 2)
MODEL = paredown.capture(NET, EXAMPLE)
RUN = run_with(Artifact("model.onnx", "onnxruntime", "0" * 64, 1, ""))
BOTH = torch.eye(2), torch.tensor([0, 1])
CALLS = {  # what is right at each position
    "accuracy": BOTH,
    "apply": (NET, STEPS, TASK, TARGET),
    "capture": (NET, EXAMPLE, None),
    "compress": (NET, TASK, GOALS, TARGET, STEPS, "run", 0, "", None),
    "export": (MODEL, TARGET, "model.onnx", ()),
    "load": ("net.safetensors", "samples.npz", "classification", 0),
    "measure": ({"a": Path("a.onnx")}, MODEL, TASK, TARGET, "validation", 600.0, None),
    "multilabel_accuracy": BOTH,
    "open": ("model.onnx", 1, TASK),
    "pack": ("model.onnx", "model.pare"),
    "plan": (MODEL, TASK, GOALS, BASELINE, 0, TARGET),
    "progress": (None,),
    "replay": ("run", NET, TASK),
    "report": (RUN, "report.html"),
    "squared_error": (BOTH[0], BOTH[0]),
    "token_accuracy": (torch.zeros(2, 3, 4), torch.zeros(2, 3), -100),
    "unpack": ("model.pare", "folder"),
    "verify": (NET, MODEL, EXAMPLE),
}
LEGAL = {  # and what of the wrong ones is not
    ("apply", 3, "None"),
    ("capture", 2, "None"),
    *(("compress", place, "None") for place in (3, 4, 5, 8)),
    *(("compress", place, "text") for place in (5, 7)),
    ("compress", 6, "number"),
    ("compress", 8, "None"),
    ("export", 2, "text"),
    *(("load", place, what) for place in (0, 1) for what in ("None", "text")),
    ("load", 2, "None"),
    ("load", 3, "number"),
    *(("load", place, "None") for place in (1, 2)),
    ("measure", 5, "number"),
    ("measure", 6, "None"),
    ("open", 1, "number"),
    ("open", 2, "None"),
    *(("pack", 1, what) for what in ("None", "text")),
    ("plan", 4, "number"),
    ("plan", 5, "None"),
    ("progress", 0, "None"),
    ("report", 1, "text"),
    ("token_accuracy", 2, "number"),
    *(("unpack", 1, what) for what in ("None", "text")),
    ("verify", 2, "None"),
}
RECORDS = {  # what is right where there is no default
    "Artifact": ("model.onnx", "onnxruntime", "0" * 64, 1, ""),
    "Bound": (0.0, 0.1),
    "Exactness": (0.0, 0.0),
    "Guard": (paredown.Bound(0.0, 0.1),),
    "Limit": (1.0,),
    "Measurement": (1,),
    "Observation": ("candidate",),
    "Model": (MODEL.graph, MODEL.inputs, MODEL.arguments, MODEL.outputs),
    "Run": tuple(vars(RUN).values()),
    "Task": (EXAMPLE, paredown.accuracy),
}
NONE_MADE = {"UserError", "Step"}  # an error takes what it is given, and a protocol makes nothing


def public(kind):
    found = {name: getattr(paredown, name) for name in paredown.__all__}
    return {name for name, each in found.items() if isinstance(each, type) is kind} - NONE_MADE


def test_every_public_function_is_here():
    assert public(False) == set(CALLS)
    assert set(RECORDS) <= public(True)
    for name, given in CALLS.items():
        assert len(inspect.signature(getattr(paredown, name)).parameters) == len(given)


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_argument_of_a_function_is_told(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parameters = list(inspect.signature(getattr(paredown, name)).parameters)
    parameters = ["model" if each == "module" else each for each in parameters]
    for place, parameter in enumerate(parameters):
        for what, wrong in WRONG.items():
            if (name, place, what) in LEGAL:
                continue
            given = list(CALLS[name])
            given[place] = wrong
            with pytest.raises(UserError) as caught:
                made = getattr(paredown, name)(*given)
                if name == "progress":
                    made.__enter__()
            said = str(caught.value)
            named = parameter in said or name == "replay"  # its folder, before the model
            assert named or str(wrong) in said, (parameter, what, said)
            assert "\n" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", sorted(public(True)))
def test_a_wrong_setting_is_told_or_taken(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kind = getattr(paredown, name)
    right = RECORDS.get(name, ())
    for place, parameter in enumerate(inspect.signature(kind).parameters):
        for wrong in WRONG.values():
            given = [*right[:place], wrong, *right[place + 1 :]] if place < len(right) else right
            named = {} if place < len(right) else {parameter: wrong}
            try:
                kind(*given, **named)
            except UserError as error:
                assert parameter in str(error), (parameter, wrong, str(error))


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("load", [Run.load, paredown.Model.load])
def test_a_wrong_path_is_told(load, wrong):
    with pytest.raises(UserError, match=r"path, got|no finished|no such"):
        load(wrong)
