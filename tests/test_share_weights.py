"""Shared and hashed weights: k-means against brute force, and values that stay shared."""

import re
import time
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import paredown
from paredown import Cast, FineTune, HashWeights, PruneWeights, Quantize, ShareWeights, UserError
from paredown.core.goals import Goals
from paredown.core.task import Target, Task
from paredown.graph import store
from paredown.graph.capture import capture
from paredown.graph.computed import fold_computed_weights
from paredown.graph.holds import shared, sharing
from paredown.graph.holds.every import HOLDS
from paredown.graph.model import Model
from paredown.graph.quantized.quantizers import quantized_weights, rounded
from paredown.graph.sites import sites
from paredown.graph.state import tensor_of
from paredown.measure import stats
from paredown.run.compress import compress
from paredown.run.stages import _pays_packed
from paredown.search.decide import Decision
from paredown.ship.pack.container import packed_bytes
from paredown.steps.recipe import apply, apply_step, load
from paredown.steps.sharing.kmeans import cluster_blocks, cluster_line, nearest
from paredown.steps.sharing.share_weights import importances
from paredown.steps.sharing.shareable import shareable
from paredown.targets.devices import device
from paredown.targets.runtimes import onnxruntime, pytorch
from paredown.train.loop import fit
from paredown.train.settings import Training
from tests.architectures import ARCHITECTURES, with_batch
from tests.architectures.captured import captured
from tests.test_architectures import ROOT, call, run, tensors
from tests.test_run import BY_NAME

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")
QUICK = FineTune(epochs=2, lr=3e-3, batch_size=16, device="cpu")


class Net(nn.Module):
    """A convolution with a batch norm, a grouped one, and two linear layers."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, stride=2, groups=2)
        self.fc1, self.fc2 = nn.Linear(72, 24), nn.Linear(24, 4)

    def forward(self, x):
        x = F.relu(self.grouped(F.relu(self.norm(self.conv(x)))))
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


@pytest.fixture(scope="module")
def built() -> tuple[Model, Task]:
    torch.manual_seed(0)
    labels = torch.randint(4, (96,))
    corner = torch.zeros(96, 1, 8, 8)
    corner[torch.arange(96), 0, labels // 2 * 4, labels % 2 * 4] = 4.0
    images = 0.5 * torch.randn(96, 1, 8, 8) + corner
    data = TensorDataset(images, labels)
    net = Net()
    task = Task(
        example=(images[:1],),
        score=paredown.accuracy,
        loss=F.cross_entropy,
        train=data,
        validation=data,
        test=data,
        batch_size=16,
    )
    model = capture(net, task.example)
    return FineTune(epochs=6, lr=3e-3, device="cpu").apply(model, task), task


def values(model: Model, name: str) -> torch.Tensor:
    return model.state_dict()[name].unique()


def weights(model: Model) -> list[str]:
    return list(dict.fromkeys(site.weight for site in sites(model.graph)))


# --- k-means ---------------------------------------------------------------------------------


def test_a_million_weights_to_sixteen_values_take_less_than_two_seconds():
    x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    began = time.process_time()
    centroids = cluster_line(x, 16)
    codes = nearest(x, centroids)
    assert time.process_time() - began < 2
    error = float((x - centroids[codes]).square().mean())
    assert len(centroids) == 16 and error < 0.00952  # the least there is, Lloyd-Max: 0.00950


@settings(max_examples=60, deadline=None)
@given(data=st.data(), k=st.integers(2, 6))
def test_the_result_is_a_fixed_point_of_lloyds_algorithm(data, k):
    numbers = st.floats(-100, 100, width=32)
    x = torch.tensor(data.draw(st.lists(numbers, min_size=1, max_size=40)), dtype=torch.float64)
    counts = torch.tensor(
        data.draw(st.lists(st.floats(0.1, 9), min_size=len(x), max_size=len(x))),
        dtype=torch.float64,
    )
    centroids = cluster_line(x, k, counts)
    assert len(centroids) == min(k, len(x.unique()))  # none is left without members
    codes = nearest(x, centroids)
    far = (x[:, None] - centroids).abs()
    assert torch.allclose(far.gather(1, codes[:, None])[:, 0], far.amin(1), atol=1e-9)
    for number, centroid in enumerate(centroids):
        mine = codes == number
        mean = (counts * x)[mine].sum() / counts[mine].sum()
        assert torch.allclose(mean, centroid, atol=1e-7)


def test_linear_initialisation_keeps_the_rare_large_weights():
    x = torch.cat([0.01 * torch.randn(10_000), torch.tensor([1.0, -1.0])])
    centroids = cluster_line(x, 8)
    assert centroids[0] == -1 and centroids[-1] == 1 and len(centroids) == 8


def test_blocks_reach_their_own_means_and_leave_out_what_does_not_count():
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randn(600, 3, generator=generator)
    counts = torch.rand(600, 3, generator=generator) * (torch.rand(600, 3) > 0.3)
    words, codes = cluster_blocks(blocks, counts, 12)
    assert words.shape == (12, 3) and set(codes.tolist()) == set(range(12))
    before = (counts * blocks.square()).sum()
    assert (counts * (blocks - words[codes]).square()).sum() < 0.5 * before
    errors = (counts[:, None] * (blocks[:, None] - words) ** 2).sum(2)  # (N, k)
    assert (errors.gather(1, codes[:, None])[:, 0] <= errors.amin(1) + 1e-4).float().mean() > 0.99


# --- the step --------------------------------------------------------------------------------


def test_each_weight_has_its_few_values_and_its_zeros(built):
    model, task = built
    pruned = PruneWeights(0.5).apply(model, task)
    made = ShareWeights(k=4).apply(pruned, task)
    for name in weights(made):
        weight, before = made.state_dict()[name], pruned.state_dict()[name]
        assert torch.equal(weight == 0, before == 0)
        assert len(weight[weight != 0].unique()) == 4
        for value in weight[weight != 0].unique():
            assert torch.allclose(before[weight == value].mean(), value, atol=1e-6)
    assert set(made.shared) == set(weights(made)) == set(made.masks)


def test_zeros_that_no_mask_tells_of_are_pruned_weights_too(built):
    model = built[0].copy()
    with torch.no_grad():
        model.graph.fc1.weight[:, ::2] = 0.0
    made = ShareWeights(k=4).apply(model, None)
    assert not made.masks["fc1.weight"][:, ::2].any() and "fc2.weight" not in made.masks
    assert len(values(made, "fc1.weight")) == 5
    trained = apply_step(made, QUICK, built[1])
    assert not trained.state_dict()["fc1.weight"][:, ::2].any()
    with torch.no_grad():
        model.graph.fc1.weight.copy_(built[0].graph.fc1.weight)
        model.graph.fc1.weight[0, 0] = 0.0  # by chance
    made = ShareWeights(k=4).apply(model, None)
    assert not made.masks and len(values(made, "fc1.weight")) == 4


def test_a_layer_or_a_group_of_nothing_but_zeros(built):
    model = built[0].copy()
    with torch.no_grad():
        model.graph.fc1.weight[-8:] = 0.0
        model.graph.fc2.weight.zero_()
    for step in (ShareWeights(k=3, scope="channels", channels=8), ShareWeights(k=3, block=2)):
        made = step.apply(model, None)
        assert not made.state_dict()["fc1.weight"][-8:].any()
        assert "fc2.weight" not in made.shared and "fc2.weight" not in made.masks


def test_scopes(built):
    model, task = built
    one = ShareWeights(k=5, scope="global").apply(model, task)
    together = torch.cat([one.state_dict()[name].flatten() for name in weights(one)])
    assert len(together.unique()) == 5
    grouped = ShareWeights(k=3, scope="channels", channels=4).apply(model, task)
    found = grouped.state_dict()["fc1.weight"]
    assert [len(part.unique()) for part in found.split(4)] == [3] * 6
    assert len(found.unique()) > 12
    left = ShareWeights(k=4, exclude=("fc*",)).apply(model, task)
    assert set(left.shared) == {"conv.weight", "grouped.weight"}
    assert torch.equal(left.state_dict()["fc1.weight"], model.state_dict()["fc1.weight"])


def test_product_quantization_gives_blocks_of_a_row_one_codeword(built):
    model, task = built
    made = ShareWeights(k=8, block=4).apply(PruneWeights(0.3).apply(model, task), task)
    assert made.shared["fc1.weight"].block == 4 and made.shared["conv.weight"].block == 3
    for name, tied in made.shared.items():
        weight, mask = made.state_dict()[name], made.masks[name]
        book = torch.unique(weight.flatten(1).reshape(-1, tied.block).masked_fill(
            ~mask.flatten(1).reshape(-1, tied.block), 0.0), dim=0)  # fmt: skip
        assert len(book) >= 8  # a codeword, and that with what is pruned of it
        assert tied.codes.max() < 8 and tied.size == 8 * tied.block
    whole = ShareWeights(k=8, block=4).apply(model, task).state_dict()["fc1.weight"]
    assert len(torch.unique(whole.reshape(-1, 4), dim=0)) == 8


def test_importances_are_the_mean_squares_of_what_weights_are_multiplied_with(built):
    model, task = built
    found = {each.name: each for each in shareable(model, (), "ShareWeights")}
    counts = importances(model, task, list(found.values()))
    inside = {}
    for name in ("grouped", "fc1"):
        node = found[f"{name}.weight"].uses[0].input
        interpreter = torch.fx.Interpreter(model.graph, garbage_collect_values=False)
        interpreter.run(task.train.tensors[0].clone())
        inside[name] = interpreter.env[node].square()
    square = inside["fc1"].mean(0)
    got = counts["fc1.weight"]
    assert got.shape == (24, 72) and torch.allclose(
        got[3] - 0.01, square / square.mean(), rtol=1e-3
    )
    square = inside["grouped"].mean((0, 2, 3))  # (8,), four for each group
    got = counts["grouped.weight"].reshape(8, 4, 9) - 0.01
    assert torch.allclose(got[0, :, 0] * square.mean(), square[:4], rtol=1e-3)
    assert torch.allclose(got[7, :, 5] * square.mean(), square[4:], rtol=1e-3)
    weighted = ShareWeights(k=4, weighted=True).apply(model, task)
    plain = ShareWeights(k=4).apply(model, task)
    name = "fc1.weight"
    errors = [
        float((counts[name] * (m.state_dict()[name] - model.state_dict()[name]) ** 2).sum())
        for m in (weighted, plain)
    ]
    assert errors[0] < errors[1]


def test_hashed_weights_are_signed_means_of_their_buckets(built):
    model, task = built
    made = HashWeights(0.1, seed=3).apply(model, task)
    for name, tied in made.shared.items():
        weight, before = made.state_dict()[name].flatten(), model.state_dict()[name].flatten()
        assert tied.size == round(0.1 * len(weight))
        picked, signs = sharing.hashed(len(weight), tied.size, tied.seed)
        for bucket in range(tied.size):
            mine = picked == bucket
            if mine.any():
                mean = (before * signs)[mine].mean()
                assert torch.allclose(weight[mine], mean * signs[mine], atol=1e-6)
    other = HashWeights(0.1, seed=4).apply(model, task)
    assert not torch.equal(other.state_dict()["fc1.weight"], made.state_dict()["fc1.weight"])


def test_the_hash_is_even_and_its_signs_are_fair():
    picked, signs = sharing.hashed(200_000, 1000, 12345)
    counts = torch.bincount(picked, minlength=1000).double()
    assert (
        170 < float(((counts - 200) ** 2 / 200).sum() / 999) * 170 < 205
    )  # chi-square by its mean
    assert abs(float(signs.mean())) < 0.01 and set(signs.tolist()) == {1.0, -1.0}
    for lag in (1, 2, 28, 784):
        assert abs(float((signs[lag:] * signs[:-lag]).mean())) < 0.01
        same = float((picked[lag:] == picked[:-lag]).double().mean())
        assert same < 0.002
    other, _ = sharing.hashed(200_000, 1000, 12346)
    assert float((other == picked).double().mean()) < 0.002


# --- they stay shared ------------------------------------------------------------------------

STEPS = [
    ShareWeights(k=5),
    ShareWeights(k=5, scope="global"),
    ShareWeights(k=3, scope="channels", channels=3),
    ShareWeights(k=6, block=4),
    HashWeights(0.2),
]
each_step = pytest.mark.parametrize("step", STEPS, ids=str)


@each_step
def test_training_moves_values_and_keeps_them_shared(step, built):
    _, task = built
    made = apply(built[0], [PruneWeights(0.3), step], task)
    trained = apply_step(made, QUICK, task)
    assert list(shared.apart(trained)) == [] and trained.shared.keys() == made.shared.keys()
    for name in made.shared:
        before, after = made.state_dict()[name], trained.state_dict()[name]
        assert not torch.equal(before, after)
        assert len(after.unique()) <= most_values(made.shared[name])
        assert torch.equal(before == 0, after == 0) or step.__class__ is HashWeights


def test_a_step_of_sgd_is_along_the_sum_of_the_gradients(built):
    """Beside codebooks that are parameters of their own, with gradients that autograd adds up."""
    model, task = built
    made = ShareWeights(k=4, exclude=("conv", "grouped")).apply(model, task)
    trained = made.copy()
    fit(trained, task, Training(1, "sgd", 0.1, 0.9, 0.0, 0.0, 0.05, 96, device="cpu"))
    name = "fc1.weight"
    book, codes = torch.unique(made.state_dict()[name], return_inverse=True)
    book2, codes2 = torch.unique(made.state_dict()["fc2.weight"], return_inverse=True)
    state = {k: v.detach().clone().requires_grad_() for k, v in made.graph.named_parameters()}
    leaves = [book.requires_grad_(), book2.requires_grad_()]
    state |= {name: leaves[0][codes], "fc2.weight": leaves[1][codes2]}
    state |= dict(made.graph.named_buffers())
    training = made.copy().train()
    output = torch.func.functional_call(training.graph, state, (task.train.tensors[0],))[0]
    loss = F.cross_entropy(output, task.train.tensors[1])
    own = [p for k, p in state.items() if p.requires_grad and p.is_leaf]
    grads = torch.autograd.grad(loss, [*own, *leaves])
    norm = torch.stack([g.norm() for g in grads]).norm()
    moved = leaves[0] - 0.1 * grads[-2] * min(1.0, 0.05 / float(norm))
    assert float(norm) > 0.05
    torch.testing.assert_close(trained.state_dict()[name], moved[codes], rtol=1e-4, atol=1e-6)


def test_group_lasso_and_quantizers_leave_shared_weights_shared(built):
    model, task = built
    made = ShareWeights(k=5).apply(model, task)
    lasso = apply_step(made, replace(QUICK, group_lasso=0.05), task)
    assert lasso.shared and all(len(values(lasso, name)) <= 5 for name in lasso.shared)
    quantized = apply_step(made, Quantize(), task)
    for node in quantized_weights(quantized.graph).values():
        axis = int(node.args[2])
        for channel in rounded(quantized.graph, node).unbind(axis):
            assert len(channel.unique()) <= 5
    trained = apply_step(quantized, QUICK, task)
    assert trained.shared.keys() == made.shared.keys()
    for node in quantized_weights(trained.graph).values():
        for channel in rounded(trained.graph, node).unbind(int(node.args[2])):
            assert len(channel.unique()) <= 5
    for kind in ("average", "frozen"):
        apply_step(quantized, replace(QUICK, epochs=1, quantizers=kind), task)


def test_pruning_and_casting_shared_weights(built, tmp_path):
    model, task = built
    made = apply(model, [ShareWeights(k=5), PruneWeights(0.6)], task)
    trained = apply_step(made, QUICK, task)
    for name, mask in made.masks.items():
        assert not trained.state_dict()[name][~mask].any()
        assert len(values(trained, name)) <= 6
    half = apply_step(trained, Cast("fp16"), task)
    assert all(len(values(half, name)) <= 6 for name in half.shared)
    half.save(tmp_path / "half.safetensors")
    assert store.encode(Model.load(tmp_path / "half.safetensors")) == store.encode(half)


def test_a_killed_training_goes_on_to_the_same_bits(built, tmp_path):
    model, task = built
    made = HashWeights(0.3).apply(model, task)
    whole, part = made.copy(), made.copy()
    training = Training(2, lr=3e-3, device="cpu")
    fit(whole, task, training, tmp_path / "whole")
    stop = replace(training, patience=None)
    kept = {}

    def loss(output, target):
        if len(kept) == 7:
            raise KeyboardInterrupt
        kept[len(kept)] = 0
        return F.cross_entropy(output, target)

    with pytest.raises(KeyboardInterrupt):
        fit(part, replace(task, loss=loss), stop, tmp_path / "part")
    again = made.copy()
    fit(again, task, training, tmp_path / "part")
    assert store.encode(again) == store.encode(whole)


def test_a_step_that_parts_shared_weights_is_told(built):
    made = ShareWeights(k=4).apply(*built)

    class Nudge:
        def apply(self, model, task):
            changed = model.copy()
            with torch.no_grad():
                changed.graph.fc1.weight[0, 0] += 0.5
            return changed

    broken = Nudge().apply(made, None)
    assert list(shared.apart(broken)) == ["fc1.weight"]
    with pytest.raises(UserError, match=r"'fc1.weight' that share a value have come apart; train"):
        store.encode(broken)
    from paredown.steps.training.fine_tune import FineTune as Kind

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kind, "apply", lambda self, model, task, setting: broken)
        with pytest.raises(
            UserError, match=r"weights of 'fc1.weight' that shared a value came apart"
        ):
            apply_step(made, QUICK, built[1])


# --- files -----------------------------------------------------------------------------------


@each_step
def test_saved_and_loaded_bit_for_bit_with_each_value_once(step, built, tmp_path):
    model, task = built
    made = apply_step(apply_step(model, step, task), QUICK, task)
    path = tmp_path / "model.safetensors"
    made.save(path)
    loaded = Model.load(path)
    assert store.encode(loaded) == path.read_bytes()
    assert all(torch.equal(t, loaded.state_dict()[k]) for k, t in made.state_dict().items())
    assert loaded.shared.keys() == made.shared.keys()
    header = len(store.encode(made)) - sum(t.nbytes for t in _stored(path).values())
    if isinstance(step, HashWeights):
        kept = {k: t for k, t in _stored(path).items() if k.startswith(("book:", "codes:"))}
        assert {k.partition(":")[0] for k in kept} == {"book"}
        assert sum(t.numel() for t in kept.values()) == sum(s.size for s in made.shared.values())
    assert header < 60_000
    trained = [apply_step(each, QUICK, task) for each in (made, loaded)]
    assert store.encode(trained[0]) == store.encode(trained[1])


def _stored(path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def test_the_onnx_file_holds_the_few_values_and_the_pytorch_file_their_numbers(built, tmp_path):
    model, task = built
    made = ShareWeights(k=4).apply(model, task)
    path = onnxruntime.lower(made, tmp_path / "model.onnx")
    arrays = [onnx.numpy_helper.to_array(t) for t in onnx.load(str(path)).graph.initializer]
    large = [a for a in arrays if a.size >= 72 and a.dtype == np.float32]
    assert len(large) == 4 and all(len(np.unique(a)) <= 4 for a in large)
    whole = onnxruntime.lower(model, tmp_path / "whole.onnx")
    grown = path.stat().st_size - whole.stat().st_size
    assert 0 <= grown < 600  # by a batch norm that is not folded
    assert packed_bytes(path) < 0.6 * packed_bytes(whole)
    files = [pytorch.lower(m, tmp_path / f"{n}.safetensors") for n, m in enumerate((model, made))]
    assert files[1].stat().st_size < files[0].stat().st_size - 2 * 1728
    got = pytorch.open(files[1])(task.test[:5][0].numpy())[0]
    assert np.array_equal(got, made(task.test[:5][0]).detach().numpy())
    census = pytorch.census(files[1])
    assert census.bytes_by_dtype["uint8"] == sum(s.codes.nbytes for s in made.shared.values())


@pytest.mark.parametrize("damage", ["size", "axis", "block", "shape", "values", "codes"])
def test_a_damaged_sharing_is_refused(damage, built, tmp_path):
    import json

    from safetensors.torch import load_file, save_file

    path = tmp_path / "model.safetensors"
    ShareWeights(k=4).apply(*built).save(path)
    loaded = load_file(path)
    header = json.loads(_header(path)["paredown"])
    row = header["shared"]["fc1.weight"]
    changes = {"size": 3, "axis": 7, "block": 5, "shape": [24, 71], "values": "none"}
    if damage == "codes":
        loaded["codes:fc1.weight"][0, 0] = 200
    else:
        row[damage] = changes[damage]
    save_file(loaded, path, {"paredown": json.dumps(header)})
    with pytest.raises(UserError, match="not a paredown model, or a damaged one"):
        Model.load(path)


def _header(path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()


def test_a_tied_weight_is_shared_once(tmp_path):
    torch.manual_seed(0)

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(32, 16), nn.Linear(16, 32, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids):
            return self.head(self.embedding(ids).mean(1))

    ids = torch.randint(32, (64, 5))
    task = Task((ids[:1],), paredown.accuracy, F.cross_entropy, TensorDataset(ids, ids[:, 0]))
    model = capture(Tied(), task.example)
    for step in (ShareWeights(k=4), HashWeights(0.25)):
        made = apply(model, [step, QUICK], task)
        assert len(made.shared) == 1
        made.save(tmp_path / "m.safetensors")
        loaded = Model.load(tmp_path / "m.safetensors")
        assert loaded.graph.embedding.weight is loaded.graph.head.weight
        assert store.encode(loaded) == (tmp_path / "m.safetensors").read_bytes()


# --- mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make_step", "message"),
    [
        (lambda: ShareWeights(k=1), "k: expected a whole number from 2 up, got 1"),
        (lambda: ShareWeights(k=2.5), "k: expected a whole number, got 2.5"),
        (lambda: ShareWeights(scope="row"), 'scope: expected one of "layer", "channels", "global"'),
        (lambda: ShareWeights(channels=0), "channels: expected a whole number from 1 up, got 0"),
        (lambda: ShareWeights(block=0), "block: expected a whole number from 1 up"),
        (lambda: ShareWeights(block=4, scope="global"), "blocks have a codebook for each layer"),
        (lambda: ShareWeights(exclude="fc"), "exclude: expected a tuple of names"),
        (lambda: HashWeights(0), "ratio: expected above 0 and below 1, got 0"),
        (lambda: HashWeights(1.0), "ratio: expected above 0 and below 1, got 1.0"),
        (lambda: HashWeights(float("nan")), "ratio: expected above 0 and below 1, got nan"),
        (
            lambda: HashWeights(seed=-1),
            "seed: expected a whole number from 0 to",
        ),
        (lambda: HashWeights(exclude="fc"), "exclude: expected a tuple of names"),
    ],
)
def test_a_setting_out_of_range_is_told(make_step, message):
    with pytest.raises(UserError, match=message):
        make_step()


def test_nothing_to_share_is_told(built):
    model, task = built
    text = r"changed nothing; k is 5000, and no .* more than 1728 distinct values .*'fc1.weight'"
    with pytest.raises(UserError, match=text):
        ShareWeights(k=5000).apply(model, task)
    with pytest.raises(
        UserError, match="no codebook would stand for more than 432 distinct blocks"
    ):
        ShareWeights(k=5000, block=4).apply(model, task)
    with pytest.raises(UserError, match=r"than 2184 distinct values \(all weights\)"):
        ShareWeights(k=5000, scope="global").apply(model, task)
    for step in (ShareWeights(), HashWeights()):
        kind = type(step).__name__
        with pytest.raises(UserError, match="no layer or weight is called 'fc3'; did you mean"):
            replace(step, exclude=("fc3",)).apply(model, task)
        with pytest.raises(UserError, match=f"{kind}: the model has no weight to share besides"):
            replace(step, exclude=("*",)).apply(model, task)
        with pytest.raises(UserError, match=f"{kind}: the weights of 'grouped.weight' are hashed"):
            step.apply(HashWeights(0.5).apply(model, task), task)
        norm = capture(nn.BatchNorm1d(4), (torch.zeros(2, 4),))
        with pytest.raises(UserError, match=f"{kind}: the model has no weight to share"):
            step.apply(norm, None)
    tiny = capture(nn.Linear(1, 1), (torch.zeros(1, 1),))
    with pytest.raises(UserError, match="no weight is so large that buckets at a ratio of"):
        HashWeights(0.9).apply(tiny, None)


# --- a run -----------------------------------------------------------------------------------


def test_a_recipe_that_pays_only_packed_is_kept_and_says_so(built, tmp_path, monkeypatch):
    monkeypatch.setitem(device.DEVICES, "local", BY_NAME)
    model, task = built
    goals, steps = Goals(max_drop="90%"), [ShareWeights(k=4)]
    run = compress(model, task, goals, Target(), steps, tmp_path / "run")
    assert [trial.kept for trial in run.trials] == [True]
    assert all("packed for delivery" in trial.decision for trial in run.trials)
    packed = run.details["packed_bytes"]
    assert packed["compressed"] < 0.6 * packed["original"]
    assert packed["compressed"] == packed_bytes(tmp_path / "run" / run.artifact.path)
    from paredown.report.table import comparison

    [row] = [row for row in comparison(run) if row["name"] == "Packed for delivery"]
    assert "smaller" in row["change"]


def test_what_does_not_pay_packed_either_is_undone_with_both_figures(built, tmp_path):
    path = onnxruntime.lower(built[0], tmp_path / "model.onnx")
    found = _pays_packed(path, path, Decision(False, "it does not pay", False))
    assert not found.kept
    assert re.fullmatch(r"it does not pay; nor packed for delivery: .* KB \(1.00x\)", found.words)


@pytest.mark.slow
@pytest.mark.parametrize("net", ["300", "5"])
def test_deep_compression_of_digits_is_fifty_times_smaller_at_no_loss(net, tmp_path, monkeypatch):
    """What docs/sharing.md shows, by the recipes of the examples."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    import lenet_digits

    monkeypatch.setattr(lenet_digits, "FOLDER", tmp_path)
    task = lenet_digits.task()
    model = capture(lenet_digits.trained(getattr(lenet_digits, f"LeNet{net}")), task.example)
    steps = load(ROOT / "examples" / f"deep_compression_lenet_{net}.toml")
    made = apply(model, steps, task)
    files = [onnxruntime.lower(m, tmp_path / f"{n}.onnx") for n, m in enumerate((model, made))]
    assert files[0].stat().st_size >= 50 * packed_bytes(files[1])
    images, labels = task.test[:]
    scores = [
        (paredown.open(file)(images.numpy())[0].argmax(1) == labels.numpy()).astype(float)
        for file in files
    ]
    interval = stats.paired_difference(*scores)
    assert interval.low <= 0 <= interval.high


# --- every architecture ----------------------------------------------------------------------

FEW = ("resnet8", "tied_language_model")  # by default; the rest are slow


def case(name: str):
    return pytest.param(name, marks=() if name in FEW else pytest.mark.slow)


@pytest.mark.parametrize("name", [case(name) for name in ARCHITECTURES])
def test_every_architecture_shares_and_hashes(name, tmp_path):
    model, example = captured(name)
    fold_computed_weights(model)  # as both steps do: standardised weights can be shared then
    found = [each.name for each in shareable(model, (), "ShareWeights")]
    made = apply_step(model, ShareWeights(k=8, exclude=tuple(found[1::2])), None)
    if any(
        tensor_of(model.graph, name).numel() > 99 for name in found[1::2]
    ):  # half of them each, to see both in one file
        made = apply_step(made, HashWeights(0.3, exclude=tuple(found[::2])), None)
    assert set(found[:1]) <= set(made.shared) <= set(found)
    check_values(made)
    with torch.no_grad():
        ours, theirs = call(made, with_batch(example, 2)), call(model, with_batch(example, 2))
    for a, b in zip(tensors(ours), tensors(theirs), strict=True):
        assert a.shape == b.shape and (a.isfinite().all() or not b.isfinite().all())
    onnxruntime.lower(made, tmp_path / "model.onnx")  # asserts parity on the example
    trained = two_steps(made)
    check_values(trained)
    trained.save(tmp_path / "model.safetensors")
    loaded = Model.load(tmp_path / "model.safetensors")
    assert all(map(torch.equal, run(trained), run(loaded)))
    assert store.encode(loaded) == (tmp_path / "model.safetensors").read_bytes()


def most_values(tied: sharing.Sharing) -> int:
    """Those of its codebook, with a sign where it is hashed, and zero."""
    return (2 * tied.size if tied.codes is None else tied.size) + 1


def check_values(made: Model) -> None:
    for key, tied in made.shared.items():
        assert len(values(made, key)) <= most_values(tied)
        assert tied.codes is None or tied.size <= 8


def two_steps(made: Model) -> Model:
    """Trained on its own example towards zero, without a task."""
    inputs = [item.example for item in made.inputs]
    trained = made.copy()
    keepers = [each.keeper(trained) for each in HOLDS]
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-4)
    trained.train()
    for _ in range(2):
        optimizer.zero_grad()
        outputs = trained.graph(*[leaf.clone() for leaf in inputs])
        floats = [t for t in outputs if t.is_floating_point() and t.requires_grad]
        sum(t[t.isfinite()].square().mean() for t in floats).backward()
        free = parameters
        for keeper in keepers:
            free, _ = keeper.gradients(free)
        optimizer.step()
        for keeper in keepers:
            keeper.hold()
    trained.eval()
    assert list(shared.apart(trained)) == []
    both = [[tensor_of(m.graph, key) for key in made.shared] for m in (trained, made)]
    assert not all(map(torch.equal, *both))
    return trained
