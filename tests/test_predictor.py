"""What `paredown.open` gives: inputs in any form, named outputs, one wording in every runtime."""

import dataclasses
import functools
import os
import tempfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import paredown
from paredown.core.errors import UserError
from paredown.core.results import Run
from paredown.targets.runtimes import runtime

IDS, WEIGHTS = torch.arange(10).reshape(2, 5), torch.tensor([0.5, 2.0])


class Weighted(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(10, 4), nn.Linear(4, 3)

    def forward(self, ids, weights):
        logits = self.head(self.table(ids).mean(1) * weights[:, None])
        return {"logits": logits, "best": logits.argmax(1)}


@functools.cache
def exported(name):
    """The model, and a file of it for a runtime."""
    torch.manual_seed(0)
    model = paredown.capture(Weighted().eval(), (IDS, WEIGHTS))
    folder = tempfile.TemporaryDirectory(prefix="paredown-test-")
    path = Path(folder.name) / f"model{runtime(name).SUFFIX}"
    artifact = paredown.export(model, paredown.Target(name), path)
    return model, artifact, folder


def test_a_predictor_is_the_same_in_every_runtime(runtime_name):
    """One test for each runtime: it takes a while to write a file."""
    predict = paredown.open(exported(runtime_name)[1].path)
    inputs_come_by_place_by_name_or_in_a_dict_as_arrays_tensors_or_lists(predict)
    outputs_have_places_and_names(predict, runtime_name)
    wrong_inputs_are_told_alike(predict)
    its_repr_tells_inputs_outputs_and_runtime(predict, runtime_name)
    if runtime_name != "openvino":  # which takes an index beyond a table
        what_a_runtime_refuses_is_a_sentence(predict)


def inputs_come_by_place_by_name_or_in_a_dict_as_arrays_tensors_or_lists(predict):
    expected = predict(IDS.numpy(), WEIGHTS.numpy())
    calls = [
        ((IDS, WEIGHTS.clone().requires_grad_()), {}),
        ((IDS,), {"weights": WEIGHTS}),
        ((), {"weights": WEIGHTS, "ids": IDS}),
        ((OrderedDict(weights=WEIGHTS, ids=IDS),), {}),
        ((IDS.tolist(), [0.5, 2]), {}),
        (([[0, 1, 2, 3, 4], tuple(range(5, 10))], [np.float32(0.5), 2.0]), {}),
        ((IDS.numpy()[::-1][::-1], WEIGHTS.numpy()), {}),
        ((IDS.numpy().astype(">i8"), WEIGHTS), {}),
    ]
    for args, kwargs in calls:
        for ours, theirs in zip(predict(*args, **kwargs), expected, strict=True):
            assert np.array_equal(ours, theirs)


def outputs_have_places_and_names(predict, runtime_name):
    found = predict(IDS, WEIGHTS)
    logits, best = found
    assert isinstance(found, tuple) and predict.output_names == ["logits", "best"]
    assert found["logits"] is logits and found["best"] is best is found[-1]
    assert dict(found).keys() == {"logits", "best"} and logits.shape == (2, 3)
    with torch.no_grad():
        whole = exported(runtime_name)[0](IDS, WEIGHTS)
    assert np.allclose(logits, whole["logits"], atol=1e-5)
    with pytest.raises(KeyError, match="'x' is not one of the outputs logits, best"):
        found["x"]
    assert repr(found) == "Outputs(logits float32 (2, 3), best int64 (2,))"


WRONG = [
    ((IDS,), {}, "inputs: expected 2 inputs (ids, weights), got ids alone."),
    ((), {}, "inputs: expected 2 inputs (ids, weights), got none."),
    ((IDS, WEIGHTS, WEIGHTS), {}, "inputs: expected 2 inputs (ids, weights), got 3."),
    (
        (IDS,),
        {"weight": WEIGHTS},
        "inputs: expected 2 inputs (ids, weights), got 'weight'; did you mean 'weights'?",
    ),
    ((IDS, WEIGHTS), {"ids": IDS}, "inputs: 'ids' is given twice, by its place and by its name."),
    ((IDS.int(), WEIGHTS), {}, "input 'ids': expected int64, got int32; convert it first."),
    ((IDS.byte(), WEIGHTS), {}, "input 'ids': expected int64, got uint8; convert it first."),
    (
        (IDS, WEIGHTS.double()),
        {},
        "input 'weights': expected float32, got float64; convert it first.",
    ),
    (
        (IDS, WEIGHTS.bfloat16()),
        {},
        "input 'weights': expected float32, got bfloat16, which NumPy does not have; convert it "
        "first.",
    ),
    ((IDS[:, 1:], WEIGHTS), {}, "input 'ids': expected shape (batch, 5), got (2, 4)."),
    ((IDS[0], WEIGHTS), {}, "input 'ids': expected shape (batch, 5), got (5,)."),
    (
        (IDS[:0], WEIGHTS[:0]),
        {},
        "input 'ids': expected shape (batch, 5), got (0, 5); batch is at least 1.",
    ),
    (
        (IDS, torch.ones(3)),
        {},
        "input 'weights': expected batch to be 2, as in the inputs before it, got 3 in shape (3,).",
    ),
    (
        ([[1, 2], [3]], WEIGHTS),
        {},
        "input 'ids': expected an array, a tensor or numbers in lists, got lists of several "
        "lengths.",
    ),
    (
        ([[0.5] * 5] * 2, WEIGHTS),
        {},
        "input 'ids': expected int64, got numbers that int64 does not have.",
    ),
    (
        (IDS, [1e300, 0.0]),
        {},
        "input 'weights': expected float32, got numbers that float32 does not have.",
    ),
    *(
        (
            (IDS, value),
            {},
            f"input 'weights': expected an array, a tensor or numbers in lists, got {got}.",
        )
        for value, got in (
            ("cat", "a str"),
            (None, "None"),
            (["a", "b"], "a list that holds something else"),
            ([None, 1.0], "a list that holds something else"),
            (np.array(["a"]), "an array of str32"),
        )
    ),
]


def wrong_inputs_are_told_alike(predict):
    for args, kwargs, said in WRONG:
        with pytest.raises(UserError) as caught:
            predict(*args, **kwargs)
        assert str(caught.value) == said


def its_repr_tells_inputs_outputs_and_runtime(predict, runtime_name):
    version, path = runtime(runtime_name).version(), exported(runtime_name)[1].path
    assert repr(predict).split("\n  ") == [
        f"<paredown.Predictor {path}",
        f"runtime: {version}, 1 thread",
        "input:   ids int64 (batch, 5)",
        "input:   weights float32 (batch,)",
        "output:  logits",
        "output:  best>",
    ]


def what_a_runtime_refuses_is_a_sentence(predict):
    with pytest.raises(
        UserError, match=r"model\.\w+: running it in \S+ \S+ failed: .*[iI]nd(ex|ices)"
    ) as why:
        predict(IDS + 90, WEIGHTS)
    assert "\n" not in str(why.value)


def test_a_file_that_is_none_is_a_sentence(runtime_name, tmp_path):
    bad = tmp_path / f"bad{runtime(runtime_name).SUFFIX}"
    bad.write_bytes(b"no such thing")
    with pytest.raises(UserError, match="bad"):
        paredown.open(bad)
    with pytest.raises(UserError, match="threads: expected a whole number from 1 to 1024, got 0"):
        paredown.open(bad, threads=0)


class Filled(nn.Module):
    """A model to which NaN means that a value is missing."""

    def forward(self, x):
        return torch.where(torch.isnan(x), torch.ones_like(x), x) * 2


@pytest.mark.parametrize("runtime_name", ["pytorch", "openvino"], indirect=True)
def test_nan_reaches_a_model_that_takes_it(runtime_name, tmp_path):
    model = paredown.capture(Filled(), (torch.zeros(1, 4),))
    path = tmp_path / f"filled{runtime(runtime_name).SUFFIX}"
    predict = paredown.open(paredown.export(model, paredown.Target(runtime_name), path).path)
    for given in (np.float32([[3, np.nan, 0, 5]]), [[3, float("nan"), 0, 5]]):
        assert predict(given)[0].tolist() == [[6, 2, 0, 10]]


def run_with(artifact):
    """A finished run whose artifact is that."""
    baseline = paredown.Measurement(1)
    empty = {"goals": {}, "target": {}, "versions": {}, "data": {}, "details": {}, "on_device": {}}
    return Run(
        name="r",
        created="",
        command="",
        seed=0,
        plan=[],
        baseline=baseline,
        trials=[],
        artifact=artifact,
        original=None,
        comparison=None,
        checks=[],
        met=True,
        verdict="",
        **empty,
    )


def test_a_run_opens_from_anywhere(tmp_path, monkeypatch):
    artifact = exported("onnxruntime")[1]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.onnx").write_bytes(Path(artifact.path).read_bytes())
    run = run_with(dataclasses.replace(artifact, path="model.onnx"))
    monkeypatch.chdir(tmp_path)
    Path("run/run.json").write_text(run.to_json())
    loaded, predict = Run.load("run"), paredown.open("run")
    (tmp_path / "elsewhere").mkdir()
    os.chdir("elsewhere")
    for each in (predict, paredown.open(loaded.artifact.path), paredown.open(tmp_path / "run")):
        assert each(IDS, WEIGHTS)["best"].shape == (2,)
    assert Run.from_json(loaded.to_json()).artifact.path == "model.onnx"  # the folder may move
    with pytest.raises(UserError, match=r"elsewhere: holds no finished run \(no run.json\)"):
        paredown.open(tmp_path / "elsewhere")
    changed = bytearray((tmp_path / "run" / "model.onnx").read_bytes())
    changed[-20] ^= 1
    (tmp_path / "run" / "model.onnx").write_bytes(changed)
    with pytest.raises(UserError, match=r"model\.onnx: is damaged, or not the file of the run"):
        paredown.open(tmp_path / "run")
