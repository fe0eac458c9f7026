"""Weights as products of smaller ones: the mathematics, the ranks, every kind of layer."""

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from docs import make_architectures as page
from paredown import LowRank, PruneChannels, Quantize, Task, UserError, capture
from paredown.core.task import Target
from paredown.graph.coupling.coupling import analyze
from paredown.graph.model import Model
from paredown.graph.sites import sites
from paredown.measure.timing import speedup
from paredown.steps.low_rank import factors as math_of
from paredown.steps.low_rank.factor_options import Search, identity_rows, options, wants_inputs
from paredown.steps.low_rank.low_rank import Ground, replaced
from paredown.steps.low_rank.ranks import Option, Ranks, front, hull, penalty
from paredown.steps.low_rank.rejoin import rejoin
from paredown.steps.low_rank.sensitivity import sensitivities
from paredown.steps.step import Setting
from paredown.targets.runtimes import onnxruntime
from tests.architectures import ARCHITECTURES, make, with_batch
from tests.architectures.captured import captured
from tests.test_architectures import QUICK, run, tensors

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")

PLAIN = LowRank(0.05, whiten=False, reconstruct=False)


def size(model: Model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def lost(weight: Tensor, factors: Sequence[Tensor], x: Tensor) -> float:
    """What the outputs lose on inputs (N, P, C, *K)."""
    change = weight.double() - math_of.product([factor.double() for factor in factors])
    return float((x.double().flatten(2) @ change.flatten(2).mT).square().sum())


def relative(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest change of an output beside its norm; the shapes must be the same."""
    assert [t.shape for t in ours] == [t.shape for t in theirs]
    found = [0.0]
    for a, b in zip(ours, theirs, strict=True):
        known = b.isfinite()
        if b.is_floating_point():
            change = (a - b)[known].double().norm()
            found.append(float(change / b[known].double().norm().clamp(min=1e-6)))
    return max(found)


def at_full_rank(ground: Ground) -> Model:
    """Every layer in factors that lose nothing, by each method in turn."""
    choice = {}
    for place, layer in enumerate(ground.layers):
        methods = layer.methods("auto")
        method = methods[place % len(methods)]
        search = Search(method, None, layer.full(method))
        [choice[place]] = options(layer, identity_rows(layer, wants_inputs(layer, method)), search)
        assert choice[place].loss < 1e-6
    return replaced(ground, choice)


# --- architectures ---------------------------------------------------------------------------

# Where a twentieth of the parameters cannot go: weights that are standardised or normalised before
# they are used, recurrent layers.
OUT_OF_REACH = {"big_transfer", "gru_bidirectional", "gru_cell", "spectral_critic"}
FAST = ("resnet8", "dcgan")


def case(name: str):
    return pytest.param(name, marks=() if name in FAST else pytest.mark.slow)


@pytest.mark.parametrize("name", [case(name) for name in ARCHITECTURES])
def test_architecture(name, tmp_path):
    entry = ARCHITECTURES[name]
    model, example = captured(name)
    task = page.calibration_task(entry, example)
    assert relative(run(at_full_rank(Ground.of(PLAIN, model))), run(model)) < 2e-4
    if name in OUT_OF_REACH:
        with pytest.raises(UserError, match=r"at most 0\.0\d+ can be removed"):
            LowRank(0.05).apply(model, task)
        return
    made = LowRank(0.05).apply(model, task)
    assert size(made) <= 0.95 * size(model)
    path = onnxruntime.lower(made, tmp_path / "model.onnx")  # asserts parity on the example
    for batch in (1, 2, 3):
        leaves = tensors(with_batch(example, batch))
        with torch.no_grad():
            ours = list(made.graph(*[leaf.clone() for leaf in leaves]))
            theirs = list(model.graph(*[leaf.clone() for leaf in leaves]))
        assert relative(ours, theirs) > 0
    got = onnxruntime.open(path)(*[leaf.numpy() for leaf in leaves])
    assert relative([torch.from_numpy(each) for each in got], ours) < 2e-3
    made.save(tmp_path / "model.safetensors")
    loaded = Model.load(tmp_path / "model.safetensors")
    assert all(map(torch.equal, run(loaded), run(made)))


def test_the_fast_ones_are_quick_ones_too():
    assert set(FAST) <= set(QUICK) and set(ARCHITECTURES) >= OUT_OF_REACH


# --- mathematics -----------------------------------------------------------------------------


def test_plain_channel_svd_is_the_best_of_its_rank():
    torch.manual_seed(0)
    weight = torch.randn(1, 12, 20)
    y = weight.mT
    directions = math_of.output_directions(weight, y)
    tails = torch.linalg.svdvals(weight[0].double()).square().flip(0).cumsum(0).flip(0)
    losses = math_of.channel_losses(directions, y)
    torch.testing.assert_close(losses[:-1], tails, rtol=1e-6, atol=1e-6)
    for rank in (1, 5, 12):
        made = math_of.product(math_of.channel_factors(weight, directions, rank))
        assert float((made - weight).square().sum()) == pytest.approx(float(losses[rank]), abs=1e-5)


def test_whitening_loses_less_of_the_outputs():
    torch.manual_seed(0)
    weight, x = torch.randn(1, 16, 24), torch.randn(1, 500, 24) @ torch.randn(24, 24) ** 3
    y = x @ weight.mT
    best = math_of.channel_factors(weight, math_of.output_directions(weight, y), 6)
    plain = math_of.channel_factors(weight, math_of.output_directions(weight, weight.mT), 6)
    whole, inverse = math_of.root(x, 0.0)
    left, values, right = torch.linalg.svd(weight.double() @ whole)  # SVD-LLM's way to it
    truncated = (left[..., :6] * values[:, None, :6]) @ right[:, :6] @ inverse
    found = lost(weight, best, x)
    assert found < 0.9 * lost(weight, plain, x)
    assert found <= 1.02 * lost(weight, [truncated, torch.eye(16)[None]], x)


def test_spatial_factors_of_separable_filters_lose_nothing():
    torch.manual_seed(0)
    columns, rows = torch.randn(1, 3, 5, 3, 1), torch.randn(1, 8, 3, 1, 3)
    weight = math_of.product([columns, rows]).float()
    first, last = math_of.spatial_directions(weight, torch.eye(45).reshape(1, 45, 5, 3, 3))
    made = math_of.product(math_of.spatial_factors(first, last, 3))
    torch.testing.assert_close(made.float(), weight, rtol=1e-4, atol=1e-4)
    less = math_of.product(math_of.spatial_factors(first, last, 2))
    matrix = weight[0].permute(0, 3, 1, 2).reshape(24, 15)
    tail = torch.linalg.svdvals(matrix)[2:].square().sum()
    assert float((less - weight).square().sum()) == pytest.approx(float(tail), rel=1e-4)


def test_tucker_is_as_good_as_tensorly():
    tensorly = pytest.importorskip("tensorly")
    from tensorly.decomposition import partial_tucker

    torch.manual_seed(0)
    weight = torch.randn(1, 16, 12, 3, 3) @ torch.randn(3, 3)
    x = torch.eye(108).reshape(1, 108, 12, 3, 3)
    modes = math_of.Modes.of(weight, math_of.channel_root(x))
    made = math_of.product(math_of.tucker_factors(weight, modes, 6, 5))
    (core, (left, right)), _ = partial_tucker(weight[0].numpy(), [6, 5], modes=[0, 1], tol=1e-8)
    theirs = np.einsum("rihw,or,ci->ochw", core, left, right)
    ours = float((made[0] - weight[0]).norm())
    assert ours <= 1.005 * float(np.linalg.norm(theirs - weight[0].numpy()))
    assert tensorly.get_backend() == "numpy"


def test_the_last_factor_fits_the_inputs_that_there_are():
    torch.manual_seed(0)
    weight = torch.randn(1, 8, 6, 3, 3)
    x = torch.randn(1, 400, 6, 3, 3) * torch.rand(6, 3, 3)
    y = x.flatten(2) @ weight.flatten(2).mT
    first, last = math_of.spatial_directions(weight, x)
    made = math_of.spatial_factors(first, last, 4)
    seen = math_of.seen_by_last(made[:1], made[1], x)
    fitted = made[0].double(), math_of.fitted_last(made[1], seen, y, [2, 4])[1]
    assert math_of.missed(fitted[1], seen, y) == pytest.approx(lost(weight, fitted, x), rel=1e-4)
    assert lost(weight, fitted, x) < lost(weight, made, x)
    even = math_of.balanced(fitted)
    torch.testing.assert_close(math_of.product(even), math_of.product(fitted))
    norms = [even[0].transpose(0, 1).flatten(1).norm(dim=1), even[1][0].transpose(0, 1)]
    torch.testing.assert_close(norms[0], norms[1].flatten(1).norm(dim=1))


def test_noise_tells_what_the_outputs_mind():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16, bias=False))
    small = nn.Linear(16, 16)
    x = torch.randn(40, 16)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.much, self.little = net, small

        def forward(self, x):
            return self.much(x) + 0.1 * self.little(x)

    model = capture(Both().eval(), (x[:1],))
    task = Task((x[:1],), score=None, calibration=TensorDataset(x, x))
    layers = Ground.of(PLAIN, model).layers
    found = sensitivities(model, task, [[layer.uses[0].node] for layer in layers])
    by_name = dict(zip([layer.name for layer in layers], found, strict=True))
    assert by_name["much.1.weight"] == pytest.approx(0.1, rel=0.5)
    assert 0 < by_name["little.weight"] < 0.05 * by_name["much.1.weight"]


# --- which ranks -----------------------------------------------------------------------------


def some_options(seed: int) -> list[list[Option]]:
    """Three layers with options of random saving and loss."""
    draw = np.random.default_rng(seed)
    return [
        [
            Option("channel", (n,), int(saved), 0.0, float(loss), None)
            for n, (saved, loss) in enumerate(
                zip(draw.integers(1, 60, 5), draw.random(5), strict=True)
            )
        ]
        for _ in range(3)
    ]


def saved_of(option: Option | None) -> int:
    return 0 if option is None else option.parameters


@pytest.mark.parametrize("seed", range(20))
def test_a_choice_reaches_what_is_needed_and_is_the_best_where_the_hull_ends(seed):
    layers = some_options(seed)
    fronts = tuple(tuple(front(each, saved_of)) for each in layers)
    ranks = Ranks(fronts, saved_of, (1.0,) * 3)
    every = list(itertools.product(*[[None, *each] for each in layers]))

    def cost(chosen) -> float:
        return sum(penalty(option.loss) for option in chosen if option is not None)

    for needed in np.linspace(1, ranks.most, 7):
        choice = ranks.choice(float(needed))
        assert sum(map(saved_of, choice.values())) >= needed
        best = min(cost(each) for each in every if sum(map(saved_of, each)) >= needed)
        assert best - 1e-9 <= cost(choice.values()) <= 1.6 * best + 0.2
    ends = [sum(saved_of(each[-1]) for each in map(list, fronts) if each)]
    for total in ends:
        best = min(cost(each) for each in every if sum(map(saved_of, each)) >= total)
        assert cost(ranks.choice(total).values()) == pytest.approx(best)
    for each in fronts:
        points = [(0, 0.0)] + [(saved_of(o), penalty(o.loss)) for o in hull(each, saved_of)]
        slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(points)]
        assert slopes == sorted(slopes)


def test_costs_are_what_they_were_said_to_be():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(16, 32, 3, 2, 1),
        nn.Conv2d(32, 32, 5, padding="same", groups=2),
        nn.ConvTranspose2d(32, 16, 3, 2),
        nn.Flatten(2),
        nn.Linear(121, 64),
    )
    model = capture(net.eval(), (torch.randn(2, 16, 9, 9),))
    ground = Ground.of(PLAIN, model)
    for method in ("channel", "spatial", "tucker"):
        ranks = {}
        for place, layer in enumerate(ground.layers):
            search = Search(method, 1)
            found = options(layer, identity_rows(layer, wants_inputs(layer, method)), search)
            ranks |= {place: found[len(found) // 2]} if found else {}
        made = replaced(ground, ranks)
        old, new = ground.costs, analyze(made).costs()
        assert old.parameters - new.parameters == sum(o.parameters for o in ranks.values())
        assert old.macs - new.macs == pytest.approx(sum(o.macs for o in ranks.values()))
        assert {o.method for o in ranks.values()} >= {method, "channel"}


# --- every kind of layer ---------------------------------------------------------------------

LAYERS = {
    "linear": (nn.Linear(24, 20), (3, 24)),
    "sequence": (nn.Linear(24, 20, bias=False), (2, 5, 24)),
    "conv1d": (nn.Conv1d(8, 12, 5, 2, 3, 2), (2, 8, 21)),
    "conv2d": (nn.Conv2d(8, 12, (3, 5), (1, 2), (2, 1), (2, 1)), (2, 8, 11, 13)),
    "same": (nn.Conv2d(8, 12, (3, 4), padding="same", dilation=2), (2, 8, 9, 9)),
    "valid": (nn.Conv2d(8, 12, 3, padding="valid"), (2, 8, 9, 9)),
    "circular": (nn.Conv2d(8, 12, 3, padding=1, padding_mode="circular"), (2, 8, 9, 9)),
    "pointwise": (nn.Conv2d(8, 12, 1, 2), (2, 8, 9, 9)),
    "grouped": (nn.Conv2d(12, 24, 3, 2, 1, groups=3), (2, 12, 9, 9)),
    "conv3d": (nn.Conv3d(6, 8, 3, 1, 1), (2, 6, 5, 5, 5)),
    "transposed": (nn.ConvTranspose2d(8, 12, 3, 2, 1, 1, dilation=2), (2, 8, 7, 7)),
    "transposed, grouped": (nn.ConvTranspose1d(8, 12, 3, 2, 1, groups=2), (2, 8, 7)),
    "one image": (nn.Conv2d(8, 12, 3), (8, 9, 9)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("method", ["channel", "spatial", "tucker"])
def test_full_rank_is_the_layer_itself_and_comes_back(kind, method):
    torch.manual_seed(0)
    module, shape = LAYERS[kind]
    x = torch.randn(shape)
    model = capture(module.eval(), (x,))
    ground = Ground.of(PLAIN, model)
    [layer] = ground.layers
    [chosen] = layer.methods(method)
    search = Search(method, None, layer.full(chosen))
    [option] = options(layer, identity_rows(layer, wants_inputs(layer, method)), search)
    made = replaced(ground, {0: option})
    with torch.no_grad():
        assert relative([made(x)], [model(x)]) < 1e-5
        if model.fixed_batch is None:
            assert relative([made(x[:1])], [model(x[:1])]) < 1e-5
    names = sorted(name for name in made.state_dict() if name != "bias")
    suffixes = ("core", "down", "up") if chosen == "tucker" else ("down", "up")
    assert names == [f"weight_{suffix}" for suffix in suffixes]
    again = made.copy()
    [was] = rejoin(again, (), ()).values()
    assert was.method == chosen and was.ranks == option.ranks
    assert set(again.state_dict()) == set(model.state_dict())
    with torch.no_grad():
        assert relative([again(x)], [model(x)]) < 1e-5
    assert Counter(n.target for n in again.graph.graph.nodes if n.op == "call_function") == Counter(
        n.target for n in model.graph.graph.nodes if n.op == "call_function"
    )


class Several(nn.Module):
    """An embedding, a layer that runs twice, a product with a matrix, and tied weights."""

    def __init__(self):
        super().__init__()
        self.words, self.tied = nn.Embedding(64, 32), nn.Embedding(40, 32)
        self.twice = nn.Linear(32, 32)
        self.matrix, self.shift = (
            nn.Parameter(torch.randn(32, 48) / 6),
            nn.Parameter(torch.ones(48)),
        )
        self.back, self.head = nn.Linear(48, 32), nn.Linear(32, 40, bias=False)
        self.head.weight = self.tied.weight

    def forward(self, ids):
        x = self.words(ids) + self.tied(ids % 40)
        x = self.twice(self.twice(x).relu())
        x = torch.addmm(self.shift, x.flatten(0, 1), self.matrix).view(*ids.shape, 48)
        return self.head(self.back(x.relu()))


def several() -> tuple[Model, Task]:
    torch.manual_seed(0)
    ids = torch.randint(64, (40, 6))
    data = TensorDataset(ids, torch.zeros(40))
    task = Task((ids[:1],), score=None, calibration=data, dynamic=({1: "length"},), batch_size=4)
    return capture(Several().eval(), task.example, task.dynamic), task


def test_embeddings_products_and_layers_that_run_twice(tmp_path):
    model, task = several()
    made = LowRank(0.3).apply(model, task)
    state = made.state_dict()
    assert {n for n in state if n.endswith("_down")} <= {
        *("words.weight_down", "twice.weight_down", "matrix_down", "back.weight_down"),
    }
    assert "tied.weight" in state and made.graph.head.weight is made.graph.tied.weight
    assert size(made) <= 0.7 * size(model)
    for ids in (torch.randint(64, (3, 9)), torch.randint(64, (1, 2))):
        assert made(ids).shape == (*ids.shape, 40)
    only = LowRank(rank=8, include=("twice", "words", "matrix")).apply(model, task)
    assert only.state_dict()["twice.weight_up"].shape == (32, 8)
    assert only.state_dict()["words.weight_down"].shape == (64, 8)
    assert only.state_dict()["matrix_up"].shape == (8, 48)
    onnxruntime.lower(only, tmp_path / "model.onnx")


def test_rows_that_calibration_never_saw_stay_near():
    torch.manual_seed(0)
    table = torch.randn(200, 4) @ torch.randn(4, 32) + 0.01 * torch.randn(200, 32)
    net = nn.Sequential(nn.Embedding.from_pretrained(table, freeze=False))
    data = TensorDataset(torch.arange(40).view(10, 4), torch.zeros(10))
    task = Task((torch.zeros(1, 4, dtype=torch.long),), score=None, calibration=data)
    model = capture(net.eval(), task.example)
    made = LowRank(rank=4, include=("0",), reconstruct=False).apply(model, task)
    unseen = torch.arange(40, 200)[None].view(40, 4)
    assert relative([made(unseen)], [model(unseen)]) < 0.05


def test_a_smaller_part_may_be_taken_again_and_again():
    model, task = several()
    sizes = [size(model)]
    for _ in range(3):
        model = LowRank(0.15).apply(model, task)
        sizes.append(size(model))
    assert all(b <= 0.85 * a for a, b in itertools.pairwise(sizes))
    counts = Counter(name.rpartition("_")[2] for name in model.state_dict())
    assert counts["down"] == counts["up"]  # never factors of factors


@pytest.mark.slow
def test_the_exported_file_is_quicker_where_latency_was_asked():
    torch.manual_seed(0)
    layers = [nn.Linear(512, 512) for _ in range(4)]
    model = capture(nn.Sequential(*layers).eval(), (torch.randn(16, 512),))
    step = LowRank(0.4, "latency", whiten=False, reconstruct=False)
    settled = step.settle(model, None, Setting())
    assert settled.amount == "macs" and 0 < settled.ratio < 1
    assert settled.settle(model, None, Setting()) is settled
    assert speedup(model, settled.apply(model, None), Target(), rounds=2).estimate > 1.2


def test_integers_and_channels_after_it(tmp_path):
    module, example = make("resnet8")
    model = capture(module, example)
    task = page.calibration_task(ARCHITECTURES["resnet8"], example)
    made = LowRank(0.3, method="channel").apply(model, task)
    quantized = Quantize().apply(PruneChannels(0.2, reconstruct=False).apply(made, task), task)
    path = onnxruntime.lower(quantized, tmp_path / "model.onnx")
    assert onnxruntime.census(path).unfused == ()


# --- what a user may get wrong ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.0}, "ratio: expected a share above 0 and below 1, got 0.0"),
        ({"ratio": float("nan")}, "ratio: expected a share"),
        ({"amount": "flops"}, "amount: 'flops' is not one of parameters, macs, energy, latency"),
        ({"method": "cp"}, "method: 'cp' is not one of"),
        ({"rank": 0, "include": ("fc",)}, "rank: expected a whole number from 1 up, got 0"),
        ({"rank": 4}, r'rank: name the layers that it is for, as in include=\("fc",\)'),
        ({"include": "fc"}, "include: expected a tuple of names, got the text 'fc'"),
        ({"round_to": 0}, "round_to: expected a whole number from 1 up"),
        ({"examples": 1}, "examples: expected a whole number from 2 up"),
    ],
)
def test_a_setting_out_of_range(settings, message):
    with pytest.raises(UserError, match=message):
        LowRank(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 33, "include": ("twice",)}, "from 1 to 32, the full rank of 'twice.weight', got"),
        ({"rank": 16, "include": ("twice",)}, "16 makes 'twice.weight' no smaller .* at most 15"),
        ({"include": ("twise",)}, "include: no layer or weight is called 'twise'; did you mean"),
        ({"exclude": ("wirds",)}, "exclude: no layer or weight is called 'wirds'; did you mean"),
        ({"ratio": 0.99}, "0.99 of the parameters was asked; with these settings at most 0."),
        ({"include": ("head",)}, "no layer that can be factored: 1 shared by different ops"),
        ({"amount": "energy", "ratio": 1e-6}, "no layer is smaller within 1e-06 of its energy"),
    ],
)
def test_what_does_not_fit_the_model_is_told(settings, message):
    model, task = several()
    with pytest.raises(UserError, match=message):
        LowRank(**settings).apply(model, task)


def test_depthwise_layers_stay_whole_with_the_reason():
    net = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 16, 3, groups=8))
    model = capture(net.eval(), (torch.randn(1, 8, 9, 9),))
    with pytest.raises(UserError, match="no layer that can be factored: 2 depthwise"):
        PLAIN.apply(model, None)


def test_a_layer_that_came_sparse_stays_whole():
    model, task = several()
    name = next(site.weight for site in sites(model.graph) if site.kind == "linear")
    weight = model.state_dict()[name]
    weight[torch.rand(weight.shape) < 0.5] = 0
    made = LowRank(0.2).apply(model, task)
    assert torch.equal(made.state_dict()[name], weight)
    with pytest.raises(UserError, match="1 sparse as it came"):
        LowRank(0.2, include=(name,)).apply(model, task)


def test_rank_of_a_convolution_is_told_by_its_method():
    model = capture(nn.Conv2d(8, 16, 3).eval(), (torch.randn(1, 8, 9, 9),))
    for method, full in (("channel", 16), ("spatial", 24), ("tucker", 16)):
        step = LowRank(rank=99, include=("weight",), method=method, whiten=False, reconstruct=False)
        with pytest.raises(UserError, match=f"from 1 to {full}, the full rank of 'weight', got 99"):
            step.apply(model, None)


def test_calibration_data_that_is_not_a_number():
    model = capture(nn.Linear(32, 32), (torch.zeros(1, 32),))
    data = TensorDataset(torch.full((8, 32), float("nan")), torch.zeros(8))
    task = Task((torch.zeros(1, 32),), score=None, calibration=data)
    with pytest.raises(UserError, match="inputs of the layer of 'weight' are NaN or infinite"):
        LowRank(0.3).apply(model, task)
