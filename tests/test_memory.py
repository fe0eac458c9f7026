"""Models share the memory of what they were made of, and nothing that is done to one reaches the
other."""

import copy
import gc
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import nn

import paredown
from paredown.core.files import sha256
from paredown.graph import lazily, store
from paredown.graph.model import Model

EXAMPLE = (torch.zeros(2, 3, 8, 8),)


class Net(nn.Module):
    """With what training moves besides parameters: norms' statistics, and a buffer of its own."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.wide, self.out = nn.Linear(16 * 36, 64), nn.Linear(64, 4)
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x):
        x = self.norm(self.conv(x)).relu().flatten(1)
        return self.out(self.wide(x).relu()) + self.shift


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


def places(owner):
    """Name -> where its numbers lie."""
    return {name: torch._C._data_address(t) for name, t in owner.state_dict().items()}


def values(owner):
    return {name: t.detach().clone() for name, t in owner.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def trained(owner, forward):
    """Two steps of an optimiser, in training mode."""
    owner.train()
    optimizer = torch.optim.Adam(owner.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        forward(torch.randn(4, 3, 8, 8)).square().sum().backward()
        optimizer.step()


def by_view(net):
    for parameter in net.parameters():
        parameter.detach().view(-1)[:3].fill_(7.0)


def by_data(net):
    for parameter in net.parameters():
        parameter.data.mul_(2)


def by_array(net):
    for parameter in net.parameters():
        parameter.detach().numpy()[...] = 3.0


def by_state(net):
    net.load_state_dict({name: torch.zeros_like(t) for name, t in net.state_dict().items()})


CHANGES = {
    "training": lambda net: trained(net, net),
    "view": by_view,
    "data": by_data,
    "array": by_array,
    "state": by_state,
    "init": lambda net: nn.init.normal_(net.wide.weight),
}


def test_a_capture_and_all_that_is_made_of_it_hold_each_weight_once(net, tmp_path):
    """Also once the weights were rounded, exported, compared with the file, and saved."""
    weights = dict(net.named_parameters())
    model = paredown.capture(net, EXAMPLE)
    quantized = paredown.apply(
        model,
        [paredown.QuantizeWeights(4, method="rtn")],
        paredown.Task(EXAMPLE, paredown.accuracy),
    )
    paredown.export(quantized, paredown.Target(), tmp_path / "model.onnx")
    quantized.save(tmp_path / "model.safetensors")
    assert store.digest(model) and len(weights) == 8
    for name, place in places(net).items():
        if name in weights:
            assert places(model)[name] == places(quantized)[name] == place, name
    gc.collect()
    held = [each for each in gc.get_objects() if type(each).__name__ == "TorchTensor"]
    kept = {torch._C._data_address(each.raw) for each in held} & set(places(net).values())
    assert not kept, "what the exporter had read it keeps"


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_done_to_a_module_does_not_reach_its_capture(net, change):
    model = paredown.capture(net, EXAMPLE)
    x, before = torch.randn(2, 3, 8, 8), values(model)
    said = model(x)
    CHANGES[change](net)
    assert not same(values(net), before)
    assert same(values(model), before) and torch.equal(model(x), said)


def test_training_a_capture_does_not_reach_its_module(net):
    before = values(net)
    model = paredown.capture(net, EXAMPLE)
    trained(model, model)
    assert same(values(net), before)
    changed = [name for name, t in before.items() if not torch.equal(values(model)[name], t)]
    assert {"conv.weight", "out.bias", "norm.running_mean"} <= set(changed)


@pytest.mark.parametrize("kind", [Model.copy, Model.frozen])
@pytest.mark.parametrize("change", CHANGES)
def test_a_copy_and_its_model_know_nothing_of_each_other(net, kind, change):
    if kind is Model.frozen and change == "training":
        pytest.skip("it does not train")
    model = paredown.capture(net, EXAMPLE)
    made, before = kind(model), values(model)
    assert places(made) == places(model)
    for one, other in ((made, model), (model, kind(model))):
        CHANGES[change](one if change != "init" else one.graph)
        assert same(values(other), before)
        model.load_state_dict(before)


def test_tensors_of_any_memory_are_copied_and_keep_their_shape():
    whole = torch.randn(4, 6)
    for tensor in (
        *(whole, whole[1:3], whole.t(), whole[0].expand(5, 6), torch.zeros(0), torch.tensor(2.0)),
        torch.from_numpy(np.ones(3, np.float32)),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.zeros(3).share_memory_(),
    ):
        made, before = lazily.copied(tensor), tensor.clone()
        assert torch.equal(made, tensor)
        made += 1
        assert torch.equal(tensor, before)
    assert lazily.copied(whole.t()).stride() == whole.t().stride()


def test_buffers_that_share_memory_share_it_in_a_copy():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("whole", torch.zeros(4))
            self.register_buffer("part", self.whole[:2])
            self.weight = nn.Parameter(torch.ones(4))

    tied = Tied()
    made = copy.deepcopy(tied, lazily.copies([*tied.parameters(), *tied.buffers()]))
    made.whole += 1
    assert made.part.tolist() == [1, 1] and tied.whole.tolist() == [0] * 4
    assert places(made)["weight"] == places(tied)["weight"]


def test_a_file_is_laid_out_as_safetensors_lays_it_out():
    torch.manual_seed(0)
    kinds = [torch.bool, torch.uint8, torch.int8, torch.int64, torch.float16, torch.bfloat16]
    tensors = {
        f"{name}{shape}{kind}": (torch.randn(shape) * 3).to(kind)
        for kind in (*kinds, torch.int16, torch.int32, torch.float32, torch.float64)
        for name in ("z", 'a"\\', "é\n\x01")
        for shape in ((), (3, 5), (0, 4), (2, 3, 4))
    }
    tensors["turned"] = torch.randn(3, 4).t()
    told = {"paredown": json.dumps({"a": 'é\n"', "é": [1.5]})}
    made = store.laid_out(tensors, told)
    assert b"".join(made) == save({n: t.contiguous() for n, t in tensors.items()}, told)
    assert sha256(made) == sha256(b"".join(made))


def test_numbers_are_looked_at_as_they_lie():
    for bad in (torch.nan, torch.inf, -torch.inf):
        for kind in (torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2):
            tensor = torch.ones(3, 5).to(kind).t()
            assert lazily.finite(tensor)
            tensor[2, 1] = bad
            assert not lazily.finite(tensor)
    assert lazily.finite(torch.zeros(0)) and lazily.finite(torch.tensor([1]))


MEASURED = """
import sys
sys.path.insert(0, sys.argv[1])
import memory
made = memory.child(512, 6, sys.argv[2])
print(made["parameters"], made["peak"])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("step", "bound"), [("QuantizeWeights(4)", 2.0), ('Cast("fp16")', 2.7)])
def test_memory_of_a_large_model_is_bounded(step, bound):
    benchmarks = Path(__file__).parent.parent / "benchmarks"
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(benchmarks), step], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    parameters, peak = map(float, done.stdout.split())
    assert parameters > 30e6 and 1 < peak < bound
