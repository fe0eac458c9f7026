"""The language-model example: no file in two splits, names kept, and a tiny one that learns."""

import importlib.util
import math
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import paredown
from paredown.targets.runtimes import onnxruntime
from paredown.train.loop import fit
from paredown.train.settings import Training

torch.set_num_threads(1)
FILE = Path(__file__).parent.parent / "examples" / "code_lm.py"


def load():
    """A fresh copy of the example's module."""
    spec = importlib.util.spec_from_file_location("code_lm_under_test", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def example():
    return load()


@pytest.fixture(scope="module")
def task(example):
    return example.task()


def small(example):
    torch.manual_seed(0)
    return example.CodeLM(width=32, blocks=1, heads=2)


# --- the data --------------------------------------------------------------------------------


def test_the_sources_are_the_library_without_its_tests(example):
    names = [name for name, _ in example.sources()]
    assert names == [name for name, _ in example.sources()] and len(names) == len(set(names)) > 300
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    foreign = ("site-packages", "/test/", "/tests/", "__pycache__")
    assert not [name for name in names if any(part in f"/{name}" for part in foreign)]


def test_every_byte_of_a_file_is_in_the_split_of_its_name(example):
    sizes = Counter()
    for name, path in example.sources():
        sizes[example.split_of(name)] += len(path.read_bytes())
    assert sizes == {name: len(text) for name, text in example.texts().items()}
    assert set(sizes) == {"train", "calibration", "validation", "test"}
    first = next(path for name, path in example.sources() if example.split_of(name) == "test")
    raw = first.read_bytes()
    assert bytes(example.texts()["test"][: len(raw)].tolist()) == raw


def test_the_split_of_a_name_is_fixed(example):
    names = ("argparse.py", "json/decoder.py", "dataclasses.py", "socket.py", "typing.py")
    expected = ["train", "train", "test", "validation", "calibration"]
    assert [example.split_of(name) for name in names] == expected


def test_the_splits_are_large_enough_and_the_same_each_time(example, task):
    again = load().task()
    bytes_scored = {}
    for name in ("train", "calibration", "validation", "test"):
        ours, theirs = getattr(task, name), getattr(again, name)
        assert len(ours) == len(theirs) == example.WINDOWS[name]
        assert ours.starts == theirs.starts and torch.equal(ours.text, theirs.text)
        bytes_scored[name] = len(ours) * example.CONTEXT
    assert bytes_scored["test"] >= 200_000 and bytes_scored["train"] >= 1_000_000
    assert bytes_scored["test"] / 5 <= bytes_scored["validation"] <= bytes_scored["test"] / 3


@pytest.mark.parametrize(("length", "count", "found"), [(1000, 4, 4), (1000, 99, 7), (129, 5, 1)])
def test_windows_lie_apart_and_their_target_is_the_next_byte(example, length, count, found):
    text = (torch.arange(length) % 251).to(torch.uint8)
    windows = example.Windows(text, count)
    assert len(windows) == found
    assert all(b - a >= 128 for a, b in zip(windows.starts, windows.starts[1:], strict=False))
    for index, start in enumerate(windows.starts):
        inputs, target = windows[index]
        assert inputs.dtype == target.dtype == torch.long and inputs.shape == target.shape == (128,)
        assert torch.equal(inputs, text[start : start + 128].long())
        assert torch.equal(target, text[start + 1 : start + 129].long())
    with pytest.raises(IndexError):
        windows[found]


def test_a_library_without_sources_is_told(tmp_path, monkeypatch):
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "decoder.py").write_text("x = 1\n")
    fresh = load()
    monkeypatch.setattr(fresh.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(paredown.UserError, match=r"expected the standard library's .py files"):
        fresh.task()


# --- the model -------------------------------------------------------------------------------


def test_it_has_about_two_million_parameters_and_keeps_its_names(example, task):
    net = example.CodeLM()
    assert 1.7e6 < sum(p.numel() for p in net.parameters()) < 2.1e6
    captured = paredown.capture(net, task.example, task.dynamic)
    state, kept = net.state_dict(), captured.state_dict()
    assert list(state) == list(kept)
    assert all(torch.equal(state[name], kept[name]) for name in state)


def test_it_sees_no_byte_that_is_still_to_come(example, task):
    net = small(example).eval()
    text = task.test[0][0][None]
    changed = text.clone()
    changed[0, 64:] = (changed[0, 64:] + 1) % 256
    with torch.no_grad():
        before, after = net(text), net(changed)
    assert before.shape == (1, 128, 256)
    assert torch.equal(before[:, :64], after[:, :64])
    assert not torch.equal(before[:, 64:], after[:, 64:])


def test_every_batch_and_length_runs_captured_and_exported(example, task, tmp_path):
    net = small(example).eval()
    captured = paredown.capture(net, task.example, task.dynamic)
    file = onnxruntime.lower(captured, tmp_path / "model.onnx")
    predict = paredown.open(file)
    for batch, length in ((1, 128), (3, 128), (2, 17), (1, 1)):
        text = torch.stack([task.test[i][0][:length] for i in range(batch)])
        with torch.no_grad():
            expected = net(text)
        torch.testing.assert_close(captured(text), expected)
        [got] = predict(text.numpy())
        np.testing.assert_allclose(got, expected.numpy(), atol=1e-4)


def test_a_tiny_one_learns(example, task):
    captured = paredown.capture(small(example), task.example, task.dynamic)
    few = replace(
        task,
        train=example.Windows(example.texts()["train"], 256),
        validation=example.Windows(example.texts()["validation"], 32),
        batch_size=16,
    )
    history = fit(captured, few, Training(epochs=4, lr=1e-2, device="cpu"))
    losses = [row["loss"] for row in history]
    assert losses[0] < math.log(256)  # the mean of the first epoch is already below knowing nothing
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.75 * losses[0]
    assert history[-1]["score"] > 0.2


def test_the_weights_are_trained_once_and_kept(tmp_path, monkeypatch):
    fresh = load()
    monkeypatch.setattr(fresh, "WEIGHTS", tmp_path / "code_lm.safetensors")
    monkeypatch.setattr(fresh, "WINDOWS", dict.fromkeys(fresh.WINDOWS, 4))
    monkeypatch.setattr(fresh, "FIRST_TRAINING", 8)
    torch.manual_seed(0)
    start = fresh.CodeLM().state_dict()
    first = fresh.model()
    assert not first.training
    stamp = fresh.WEIGHTS.stat().st_mtime_ns
    second = fresh.model()
    assert fresh.WEIGHTS.stat().st_mtime_ns == stamp
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
        assert not torch.equal(tensor, start[name])


# --- what it is judged by --------------------------------------------------------------------


def test_bits_per_byte_of_a_uniform_output_is_8(example):
    target = torch.randint(256, (3, 128), generator=torch.Generator().manual_seed(0))
    for level in (0.0, -5.0):
        bits = example.bits_per_byte(torch.full((3, 128, 256), level), target)
        torch.testing.assert_close(bits, torch.full((3,), 8.0))


def test_bits_per_byte_counts_each_window_by_itself(example):
    target = torch.tensor([[1, 2], [3, 4]])
    output = torch.zeros(2, 2, 256)
    output[0, [0, 1], [1, 2]] = 50.0  # sure, and right
    output[1, :, :2] = 50.0  # two bytes for sure, and neither is right
    bits = example.bits_per_byte(output, target)
    assert bits[0] < 1e-3 and abs(float(bits[1]) - (50 / math.log(2) + 1)) < 1e-3


def test_the_loss_is_the_bits_in_nats(example):
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(4, 128, 256, generator=generator)
    target = torch.randint(256, (4, 128), generator=generator)
    nats = example.bits_per_byte(output, target).mean() * math.log(2)
    torch.testing.assert_close(example.loss(output, target), nats)


def test_an_artifact_is_judged_on_the_test_files(example, task, tmp_path, monkeypatch, capsys):
    net = small(example).eval()
    captured = paredown.capture(net, task.example, task.dynamic)
    file = onnxruntime.lower(captured, tmp_path / "model.onnx")
    monkeypatch.setattr(example, "WINDOWS", {**example.WINDOWS, "test": 40})
    accuracy, bits = example.evaluate(net)
    example.main(str(file))
    printed = capsys.readouterr().out
    assert printed == f"next-byte accuracy {accuracy:.2%}, {bits:.3f} bits per byte\n"
    assert 7 < bits < 9 and 0 <= accuracy < 0.2  # untrained
    assert "code_lm_under_test" not in sys.modules
