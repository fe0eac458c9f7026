"""What every step promises, checked for each entry of STEPS; a new step needs no line here."""

import dataclasses
import itertools
import re
import tomllib
from pathlib import Path

import numpy as np
import onnx
import pytest
import tomli_w
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

from paredown import compress
from paredown.core.errors import UserError
from paredown.core.goals import Goals
from paredown.core.task import Target, Task
from paredown.data.scores import accuracy
from paredown.graph import store
from paredown.graph.capture import capture
from paredown.graph.model import Model
from paredown.graph.program import reexport
from paredown.graph.quantized.forms import WEIGHT_FORMS
from paredown.graph.quantized.saturation import ACROSS, WITHIN
from paredown.measure import timing
from paredown.run import preflight
from paredown.ship import open
from paredown.steps import STEPS, recipe, step_class
from paredown.steps.pruning.criteria import CRITERIA
from paredown.steps.quantization.cast import Cast
from paredown.steps.step import ALONE, Step
from paredown.targets import artifact, runtimes
from paredown.targets.runtimes import RUNTIMES, onnxruntime, runtime
from tests.architectures.blocks import EncoderBlock

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")

# Settings that keep a step quick here; others run with their defaults.
QUICK = {
    "low_rank": {"examples": 16},
    "fine_tune": {"epochs": 1, "batch_size": 16, "lr": 1e-3, "device": "cpu"},
    "distill": {"epochs": 1, "batch_size": 16, "lr": 1e-3, "device": "cpu"},
}
# Further settings under which a step must keep its promise.
VARIANTS = [
    *[("prune_channels", {"criterion": name}) for name in CRITERIA],
    *[("prune_channels", {"amount": amount, "ratio": 0.3}) for amount in ("parameters", "macs")],
    ("prune_channels", {"scope": "uniform", "reconstruct": False}),
    ("prune_channels", {"attention": "head_dim", "round_to": 1}),
    *[("prune_layers", {"criterion": name}) for name in ("output_change", "cosine")],
    *[("low_rank", {"method": name}) for name in ("channel", "spatial", "tucker")],
    ("low_rank", {"amount": "macs", "whiten": False}),
    ("low_rank", {"amount": "energy", "reconstruct": False, "round_to": 1}),
    *[("quantize_weights", {"bits": bits, "method": "rtn"}) for bits in (8, 4)],
    ("quantize_weights", {"bits": 8, "group": 16, "zero_point": True}),
    ("quantize_weights", {"group": 0, "zero_point": False, "order": False, "examples": 9}),
    ("quantize", {"smooth": 0.0, "correct_bias": False}),
    ("binarize", {"form": "ternary"}),
    ("binarize", {"first": True, "last": True}),
]
SHARING = {"share_weights": "ShareWeights", "hash_weights": "HashWeights"}
PARTING = {  # what shared weights do not outlive
    "prune_channels": "PruneChannels",
    "binarize": "Binarize",
    "quantize_weights": "QuantizeWeights",
}
# (earlier, later[, model]) -> what the later one says; every other pair must work.
ILLEGAL: dict[tuple[str, ...], str] = {
    ("prune_weights", "prune_weights"): "PruneWeights: changed nothing; all",
    ("quantize", "prune_channels"): "PruneChannels: the model is quantized; cut channels before",
    ("quantize", "prune_layers"): "PruneLayers: the model is quantized, with scales for",
    ("share_weights", "low_rank"): "are shared among a few values, which factors do not keep",
    ("hash_weights", "low_rank"): "are hashed to a few buckets, which factors do not keep",
    ("prune_weights", "low_rank"): "is pruned, and the product of factors has no zeros; factor",
    ("quantize", "low_rank"): "LowRank: the model is quantized, and factors would need scales",
    ("quantize_weights", "low_rank"): "LowRank: the model is quantized, and factors would need",
    ("binarize", "low_rank"): "LowRank: the model is quantized, and factors would need scales",
    ("prune_layers", "prune_layers", "cnn"): "PruneLayers: the model has no residual block",
    ("quantize", "quantize"): "quantize: the model is quantized already",
    ("quantize", "cast"): "Cast: the model is quantized, so its weights are 8 bits already",
    ("cast", "distill"): "is float16, in which training does not converge; train before Cast",
    ("cast", "fine_tune"): "is float16, in which training does not converge; train before Cast",
    ("cast", "quantize"): "quantize: ",
    ("prune_layers", "binarize", "cnn"): "Binarize: no convolution or linear layer is left besides",
    ("prune_weights", "binarize"): 'is pruned, and one bit has no zero; use Binarize("ternary")',
    ("quantize", "binarize"): "Binarize: the model is quantized already; binarize before",
    ("binarize", "binarize"): "Binarize: the model is quantized already; binarize before",
    ("binarize", "prune_weights"): "is binary, and one bit has no zero; exclude it, or use",
    ("binarize", "prune_channels"): "PruneChannels: the model is quantized; cut channels before",
    ("binarize", "prune_layers"): "PruneLayers: the model is quantized, with scales for",
    ("cast", "binarize"): "is float16, in which training does not converge; binarize and train",
    ("quantize", "quantize_weights"): "QuantizeWeights: the model is quantized already; no",
    ("prune_channels", "quantize_weights", "cnn"): "QuantizeWeights: no float32 weight is left",
    ("quantize_weights", "quantize_weights"): "QuantizeWeights: the model is quantized already; no",
    ("quantize_weights", "quantize"): "quantize: the model is quantized already",
    ("quantize_weights", "prune_channels"): "PruneChannels: the model is quantized; cut channels",
    ("quantize_weights", "prune_layers"): "PruneLayers: the model is quantized, with scales for",
    ("quantize_weights", "binarize"): "Binarize: the model is quantized already; binarize before",
    ("quantize_weights", "cast"): "Cast: the model is quantized, so its weights are",
    ("cast", "quantize_weights"): "QuantizeWeights: no float32 weight is left",
    ("cast", "cast"): "Cast: changed nothing; the model has no float32 weights",
    **{
        (first, second): f"{second_class}: the model is quantized already; share weights before"
        for first in ("quantize", "binarize", "quantize_weights")
        for second, second_class in SHARING.items()
    },
    **{
        (first, second): f"{second_class}: the weights of "
        for first in SHARING
        for second, second_class in {**SHARING, **PARTING}.items()
    },
}


class Cnn(nn.Module):
    """Convolutions with batch norm, a residual, dropout and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.body, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(8, 3)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = (x + self.norm2(self.body(x))).relu()
        return self.head(self.drop(x.mean((2, 3))))


class Encoder(nn.Module):
    """Token numbers through an embedding and a transformer block; two named outputs."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, 16)
        self.block = EncoderBlock(16, 2, dropout=0.1, drop_path=0.1)
        self.head = nn.Linear(16, 3)

    def forward(self, ids):
        x = self.block(self.embedding(ids))  # (B, L, 16)
        return {"logits": self.head(x.mean(1)), "pooled": x.mean(1)}


def logits(output):
    return output["logits"] if isinstance(output, dict) else output


def build(kind: str) -> tuple[Model, Task]:
    """The model with settled statistics, and a labelled task that it has not seen."""
    torch.manual_seed(0)
    labels = torch.randint(3, (48,))
    module, dynamic = (Cnn(), None) if kind == "cnn" else (Encoder(), ({1: "length"},))
    if kind == "cnn":
        inputs = torch.randn(48, 3, 8, 8) + labels[:, None, None, None]
        module.train()(inputs)
    else:
        inputs = (torch.randint(5, (48, 6)) + 5 * labels[:, None]) % 16
    data = TensorDataset(inputs, labels)
    task = Task(
        example=(inputs[:1],),
        score=lambda out, y: accuracy(logits(out), y),
        loss=lambda out, y: F.cross_entropy(logits(out), y),
        train=data,
        calibration=data,
        validation=data,
        test=data,
        dynamic=dynamic,
        batch_size=16,
    )
    return capture(module.eval(), task.example, dynamic), task


PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
KINDS = ("cnn", "encoder")
CASES = list(itertools.product(STEPS, KINDS))
PAIRS = [(a, b, kind) for a, b in itertools.product(STEPS, STEPS) for kind in KINDS]
each_case = pytest.mark.parametrize(("name", "kind"), CASES)


@pytest.fixture(scope="module")
def built() -> dict[str, tuple[Model, Task]]:
    return {kind: build(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def applied(built):
    """(step name, kind) -> the model after that step alone, made once."""
    made: dict[tuple[str, str], Model] = {}

    def get(name: str, kind: str) -> Model:
        if (name, kind) not in made:
            made[name, kind] = step(name).apply(*built[kind])
        return made[name, kind].copy()

    return get


def step(name: str) -> Step:
    return step_class(name)(**QUICK.get(name, {}))


def outputs(model: Model, task: Task, count: int = 5) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(model.graph(task.test[:count][0].clone()))


def test_the_tables_name_steps():
    named = {name for pair in ILLEGAL for name in pair[:2]} | {name for name, _ in VARIANTS}
    assert set(QUICK) | named <= set(STEPS)


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_a_frozen_dataclass_that_says_what_it_needs(name):
    kind = step_class(name)
    made = kind()  # every setting has a default
    assert isinstance(made, Step) and dataclasses.is_dataclass(kind)
    assert kind.__dataclass_params__.frozen and hash(made) == hash(kind()) and made == kind()
    assert kind.needs <= {field.name for field in dataclasses.fields(Task)}
    assert recipe.name(made) == name
    assert recipe.line(made) == f"{kind.__name__}()"
    assert kind.__doc__ and "Raises:" in kind.__doc__ and ">>>" in kind.__doc__


def test_an_unknown_step_suggests_the_nearest():
    with pytest.raises(UserError, match=r"step: 'quantise' is not one of .* mean 'quantize'"):
        step_class("quantise")


@pytest.mark.parametrize("name", RUNTIMES)
def test_every_runtime_says_what_it_is(name):
    chosen = runtime(name)
    assert set(WEIGHT_FORMS) >= chosen.FORMS and chosen.PACKAGES
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    assert name in extras or name in runtimes.CORE
    suffixes = [runtime(other).SUFFIX for other in RUNTIMES]
    assert chosen.SUFFIX.startswith(".") and suffixes.count(chosen.SUFFIX) == 1
    assert all(suffix.startswith(".") for suffix in chosen.COMPANIONS)
    assert chosen.INT8_BYTES is None or ("int8" in chosen.FORMS and len(chosen.INT8_BYTES) == 2)
    assert all(0 < bits <= 8 for bits in chosen.SYMMETRIC)
    assert chosen.PAIRS in (None, ACROSS, WITHIN)


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_missing_package_names_the_extra_before_any_work(name, built, monkeypatch, tmp_path):
    package, asked = runtime(name).PACKAGES[-1], runtimes.version
    target, (model, task) = Target(runtime=name), built["cnn"]
    Path(tmp_path / f"model{runtime(name).SUFFIX}").touch()

    def version(each):
        if each == package:
            raise runtimes.PackageNotFoundError(each)
        return asked(each)

    monkeypatch.setattr(runtimes, "version", version)
    monkeypatch.setattr(runtime(name), "lower", lambda *_: pytest.fail("work had begun"))
    said = f"runtime: {name} needs .*{package}.*, not installed here; run pip install "
    for work in (
        lambda: artifact.export(model, target, tmp_path / "model"),
        lambda: open.open(tmp_path / f"model{runtime(name).SUFFIX}"),
        lambda: preflight.baseline(model, task, target),
        lambda: compress(model, task, Goals(), target, out=tmp_path / "run"),
        lambda: timing.speedup(model, model, target),
    ):
        with pytest.raises(UserError, match=said):
            work()
    assert not (tmp_path / "run").exists()
    [problem] = preflight.check(model, task, target).problems
    assert re.match(said, problem) and (f"'paredown[{name}]'" in problem or name in runtimes.CORE)


def test_a_form_that_a_runtime_cannot_write_is_refused_before_any_work(built):
    _, task = built["cnn"]
    [text] = recipe.problems([Cast("bf16")], task, Target(runtime="onnxruntime"))
    assert text.startswith("Cast(dtype='bf16'): onnxruntime cannot run bf16; use ")
    assert 'Cast("fp16")' in text and "the runtime pytorch" in text
    assert recipe.problems([Cast("bf16")], task, Target(runtime="pytorch")) == []


@each_case
def test_the_original_is_untouched(name, kind, built):
    model, task = built[kind]
    before, code = store.encode(model), model.graph.code
    state = {key: t.clone() for key, t in model.state_dict().items()}
    masks = dict(model.masks)
    step(name).apply(model, task)
    assert store.encode(model) == before and model.graph.code == code and model.masks == masks
    assert all(torch.equal(t, state[key]) for key, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@each_case
def test_inputs_and_outputs_keep_their_structure(name, kind, built, applied):
    model, task = built[kind]
    made = applied(name, kind)
    assert made.arguments == model.arguments and made.outputs == model.outputs
    assert [(i.name, i.dynamic) for i in made.inputs] == [(i.name, i.dynamic) for i in model.inputs]
    for ours, theirs in zip(made.inputs, model.inputs, strict=True):
        assert torch.equal(ours.example, theirs.example)
    for count in (1, 5):
        for new, old in zip(outputs(made, task, count), outputs(model, task, count), strict=True):
            assert new.shape == old.shape and new.dtype == old.dtype
            assert torch.isfinite(new).all()
    whole = made(task.test[:4][0])
    assert isinstance(whole, dict) == (kind == "encoder")
    if kind == "encoder":
        assert made(torch.randint(16, (3, 9)))["logits"].shape == (3, 3)


@each_case
def test_something_changes_and_the_score_survives(name, kind, built, applied):
    model, task = built[kind]
    made = applied(name, kind)
    assert store.encode(made) != store.encode(model)
    assert made.graph.code != model.graph.code or any(
        not torch.equal(t, model.state_dict()[key]) for key, t in made.state_dict().items()
    )
    old, new = outputs(model, task, 48)[0], outputs(made, task, 48)[0]
    assert not torch.equal(old, new)
    assert float((old - new).norm() / old.norm()) < 1.0


@each_case
def test_the_result_is_in_evaluation_mode(name, kind, built, applied):
    made = applied(name, kind)
    code = made.graph.code
    before = store.encode(made)
    assert all(map(torch.equal, outputs(made, built[kind][1]), outputs(made, built[kind][1])))
    assert store.encode(made) == before  # nothing counts, nothing moves
    assert made.eval().graph.code == code


@each_case
def test_twice_gives_the_same_bytes(name, kind, built, applied):
    torch.manual_seed(12345)  # whatever the random state of the caller
    again = step(name).apply(*built[kind])
    assert store.encode(again) == store.encode(applied(name, kind))


@each_case
def test_it_saves_and_loads(name, kind, built, applied, tmp_path):
    made, task = applied(name, kind), built[kind][1]
    made.save(tmp_path / "model.safetensors")
    loaded = Model.load(tmp_path / "model.safetensors")
    assert all(map(torch.equal, outputs(made, task), outputs(loaded, task)))
    assert store.encode(loaded) == (tmp_path / "model.safetensors").read_bytes()
    assert set(loaded.state_dict()) == set(made.state_dict()) and loaded.notes == made.notes
    assert loaded.masks.keys() == made.masks.keys()
    for key, mask in made.masks.items():
        assert torch.equal(mask, loaded.masks[key])


@each_case
def test_it_captures_again(name, kind, built, applied):
    made, task = applied(name, kind), built[kind][1]
    program = reexport(made).module()
    inputs = task.test[:5][0]
    for ours, theirs in zip(outputs(made, task), program(inputs), strict=True):
        torch.testing.assert_close(theirs, ours)


@each_case
def test_it_exports(name, kind, built, applied, tmp_path):
    made, task = applied(name, kind), built[kind][1]
    path = onnxruntime.lower(made, tmp_path / "model.onnx")  # asserts parity on the example
    got = onnxruntime.open(path)(task.test[:5][0].numpy())
    for ours, theirs in zip(outputs(made, task), got, strict=True):
        assert ours.shape == theirs.shape and str(ours.dtype) == f"torch.{theirs.dtype}"
        assert float(np.linalg.norm(theirs - ours.numpy())) <= 0.1 * float(ours.norm())
    assert onnxruntime.census(path).unfused == ()
    other = onnxruntime.lower(made, tmp_path / "other.onnx")
    assert other.read_bytes() == path.read_bytes()


@each_case
def test_it_trains_on(name, kind, built, applied):
    made, task = applied(name, kind), built[kind][1]
    inputs, labels = task.train[:16]
    made.train()
    task.loss(made(inputs), labels).backward()
    grads = [p.grad for p in made.parameters() if p.grad is not None]
    assert grads and all(torch.isfinite(g).all() for g in grads) and any(g.any() for g in grads)


# --- what a step needs -----------------------------------------------------------------------


class Witness(Step):
    """A step that would show that work had begun."""

    needs = frozenset()
    ran = False

    def apply(self, model, task, setting=ALONE):
        Witness.ran = True
        return model


@dataclasses.dataclass(frozen=True)
class First(Witness):
    pass


def without(task: Task, need: str) -> Task:
    gone = {"calibration": None, "train": None} if need == "calibration" else {need: None}
    return dataclasses.replace(task, **gone)


@pytest.mark.parametrize("name", STEPS)
def test_a_missing_need_is_refused_before_any_work(name, built):
    model, task = built["cnn"]
    for need in step(name).needs:
        Witness.ran = False
        with pytest.raises(UserError, match=rf"{type(step(name)).__name__}\(.*: needs .*{need}"):
            recipe.apply(model, [First(), step(name)], without(task, need))
        assert not Witness.ran


@pytest.mark.parametrize("name", STEPS)
def test_a_step_without_its_needs_never_crashes(name, built):
    model, task = built["cnn"]
    for need in step(name).needs:
        with pytest.raises(UserError):
            step(name).apply(model, without(task, need))


def test_all_that_is_missing_is_told_at_once(built):
    model, task = built["cnn"]
    bare = Task(example=task.example, score=task.score)
    steps = [step(name) for name in STEPS]
    with pytest.raises(UserError) as caught:
        recipe.apply(model, steps, bare)
    lines = str(caught.value).splitlines()
    wanting = [s for s in steps if s.needs]
    assert len(lines) == len(wanting) >= 2
    for line, s in zip(lines, wanting, strict=True):
        assert line.startswith(recipe.line(s)) and all(need in line for need in s.needs)


# --- one step after another ------------------------------------------------------------------


LEGAL = [p for p in PAIRS if p[:2] not in ILLEGAL and p not in ILLEGAL]


@pytest.mark.parametrize(("first", "second", "kind"), PAIRS)
def test_steps_compose_or_say_why_not(first, second, kind, built, applied):
    task = built[kind][1]
    model = applied(first, kind)
    before = store.encode(model)
    refusal = ILLEGAL.get((first, second)) or ILLEGAL.get((first, second, kind))
    if refusal:
        with pytest.raises(UserError) as caught:
            recipe.apply_step(model, step(second), task)
        text = str(caught.value)
        assert refusal in text and "\n" not in text
        assert store.encode(model) == before
        return
    made = recipe.apply_step(model, step(second), task)
    assert store.encode(model) == before != store.encode(made)
    assert made.outputs == model.outputs
    assert made.masks.keys() >= model.masks.keys() & made.state_dict().keys()
    for new, old in zip(outputs(made, task), outputs(model, task), strict=True):
        assert new.shape == old.shape and torch.isfinite(new).all()


@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [
        pytest.param(*p, marks=() if p[1:] == ("quantize", "cnn") else pytest.mark.slow)
        for p in LEGAL
    ],
)
def test_steps_that_compose_export_and_save(first, second, kind, built, applied, tmp_path):
    task = built[kind][1]
    made = recipe.apply_step(applied(first, kind), step(second), task)
    onnxruntime.lower(made, tmp_path / "model.onnx")  # asserts parity
    made.save(tmp_path / "model.safetensors")
    loaded = Model.load(tmp_path / "model.safetensors")
    assert all(map(torch.equal, outputs(made, task), outputs(loaded, task)))


def most_alike(values: np.ndarray, filled: int) -> int:
    """How often the most frequent value stands there: zero, or the zero point of integers that have
    one. The zeros that fill up the last groups of a weight do not count."""
    found, counts = np.unique(values, return_counts=True)
    counts[found == 0] -= filled
    return int(counts.max())


def initializers(path) -> list[np.ndarray]:
    return [onnx.numpy_helper.to_array(t) for t in onnx.load(str(path)).graph.initializer]


@pytest.mark.parametrize(
    ("name", "kind"), [(n, k) for n, k in CASES if ("prune_weights", n) not in ILLEGAL]
)
def test_pruned_weights_stay_zero_into_the_file(name, kind, built, applied, tmp_path):
    pruned, task = applied("prune_weights", kind), built[kind][1]
    made = recipe.apply_step(pruned, step(name), task)
    assert pruned.masks
    path = onnxruntime.lower(made, tmp_path / "model.onnx")
    stored, seen = initializers(path), 0
    for key, mask in pruned.masks.items():
        if key not in made.state_dict():
            continue  # its layer is gone
        seen += 1
        weight = made.state_dict()[key]
        for dim, indices in made.kept.get(key, {}).items():
            mask = mask.index_select(dim, indices)
        assert torch.equal(made.masks[key], mask)
        assert not weight[~mask].any() and weight[mask].any()
        gone, size = int((~mask).sum()), mask.numel()
        alike = [a for a in stored if size <= a.size < 2 * size]
        zeros = [most_alike(a.astype(np.float32), a.size - size) for a in alike]
        assert max(zeros) >= gone > 0, f"{key}: the file holds {zeros} zeros for {gone}"
    assert seen


def each_variant():
    for name, settings_ in VARIANTS:
        alike = settings_.get("criterion") in ("l2", "random", "bn_scale", "weight_activation")
        yield pytest.param(name, settings_, marks=pytest.mark.slow if alike else ())


@pytest.mark.parametrize(("name", "settings_"), each_variant(), ids=str)
@pytest.mark.parametrize("kind", ["cnn", pytest.param("encoder", marks=pytest.mark.slow)])
def test_every_criterion_and_amount_keeps_the_promise(name, settings_, kind, built, tmp_path):
    model, task = built[kind]
    made_step = step_class(name)(**settings_)
    before = store.encode(model)
    assert recipe.from_toml(recipe.to_toml([made_step])) == [made_step]
    if kind == "encoder" and settings_.get("criterion") == "bn_scale":
        with pytest.raises(UserError, match="no group has what 'bn_scale' looks at"):
            recipe.apply_step(model, made_step, task)
        return  # its norms scale the width that it gives out, which is pinned
    made = recipe.apply_step(model, made_step, task)
    again = recipe.apply_step(model, made_step, task)
    assert store.encode(model) == before != store.encode(made) == store.encode(again)
    sizes = [sum(p.numel() for p in each.parameters()) for each in (made, model)]
    assert sizes[0] < sizes[1] or hasattr(made_step, "form")
    for count in (1, 5):
        for new, old in zip(outputs(made, task, count), outputs(model, task, count), strict=True):
            assert new.shape == old.shape and torch.isfinite(new).all()
    held, before = (
        sum(onnxruntime.census(onnxruntime.lower(each, tmp_path / name)).bytes_by_dtype.values())
        for each, name in ((made, "model.onnx"), (model, "whole.onnx"))
    )
    assert held < before  # of so small a model the file may grow, by the ops around its weights


def test_weights_that_come_back_are_told(built, applied):
    @dataclasses.dataclass(frozen=True)
    class Revive(Step):
        needs = frozenset()

        def apply(self, model, task, setting=ALONE):
            made = model.copy()
            with torch.no_grad():
                for parameter in made.parameters():
                    parameter.add_(0.1)
            return made

    @dataclasses.dataclass(frozen=True)
    class Spoil(Step):
        needs = frozenset()

        def apply(self, model, task, setting=ALONE):
            made = model.copy()
            with torch.no_grad():
                next(iter(made.parameters())).fill_(float("nan"))
            return made

    pruned, task = applied("prune_weights", "cnn"), built["cnn"][1]
    with pytest.raises(UserError, match=r"Revive\(\): weights of '.*' that were pruned came back"):
        recipe.apply_step(pruned, Revive(), task)
    with pytest.raises(UserError, match=r"Spoil\(\): '.*' became NaN or infinite"):
        recipe.apply_step(built["cnn"][0], Spoil(), task)


# --- recipes as text -------------------------------------------------------------------------

names = st.lists(st.text("abc.*0_", min_size=1, max_size=8), max_size=3).map(tuple)
unit = st.floats(0.01, 0.99)
positive = st.floats(1e-6, 10)
# Step -> how to draw each of its settings.
SETTINGS = {
    "prune_weights": st.one_of(
        st.fixed_dictionaries(
            {},
            optional={
                "sparsity": unit,
                "scope": st.sampled_from(["layer", "global"]),
                "exclude": names,
            },
        ),
        st.fixed_dictionaries({"pattern": st.sampled_from(["2:4", "1:4", "4:8"])}),
    ),
    "prune_channels": st.fixed_dictionaries(
        {},
        optional={
            "ratio": unit,
            "amount": st.sampled_from(["channels", "parameters", "macs", "latency"]),
            "criterion": st.sampled_from(list(CRITERIA)),
            "round_to": st.one_of(st.none(), st.integers(1, 64)),
            "exclude": names,
            "exact_only": st.booleans(),
            "reconstruct": st.booleans(),
        },
    ),
    "prune_layers": st.one_of(
        st.fixed_dictionaries({}, optional={"count": st.integers(1, 9), "exclude": names}),
        st.fixed_dictionaries({"ratio": unit}),
    ),
    "low_rank": st.fixed_dictionaries(
        {},
        optional={
            "ratio": unit,
            "amount": st.sampled_from(["parameters", "macs", "energy", "latency"]),
            "method": st.sampled_from(["auto", "channel", "spatial", "tucker"]),
            "include": names,
            "exclude": names,
            "round_to": st.one_of(st.none(), st.integers(1, 64)),
            "whiten": st.booleans(),
            "reconstruct": st.booleans(),
            "examples": st.integers(2, 4096),
        },
    ),
    "fine_tune": st.fixed_dictionaries(
        {},
        optional={
            "group_lasso": unit,
            "quantizers": st.sampled_from(["learned", "average", "frozen"]),
            "epochs": positive,
            "optimizer": st.sampled_from(["adamw", "sgd"]),
            "lr": positive,
            "momentum": unit,
            "weight_decay": unit,
            "warmup": unit,
            "clip_norm": st.none() | positive,
            "batch_size": st.none() | st.integers(1, 512),
            "patience": st.none() | st.integers(1, 9),
            "seed": st.integers(0, 2**31),
            "device": st.sampled_from(["cpu", "cuda", "auto"]),
        },
    ),
    "distill": st.fixed_dictionaries(
        {},
        optional={
            "student": st.sampled_from([None, "small.py", "small.safetensors"]),
            "cache": st.booleans(),
            "loss": st.sampled_from(["auto", "softened", "decoupled", "squared"]),
            "temperature": positive,
            "alpha": unit,
            "internal": st.lists(
                st.sampled_from(["hints", "attention_transfer", "similarity", "attention_maps"])
            ).map(tuple),
            "beta": positive,
            "match": st.sampled_from(["depth", "cka"]),
            "epochs": positive,
            "patience": st.none() | st.integers(1, 9),
        },
    ),
    "quantize": st.fixed_dictionaries(
        {},
        optional={
            "scheme": st.sampled_from(["int8", "int4"]),
            "edge_bits": st.sampled_from([8, 4]),
            "ranges": st.sampled_from(["lp", "minmax", "percentile", "entropy"]),
            "percentile": st.floats(51, 100),
            "first": st.booleans(),
            "last": st.booleans(),
            "exclude": names,
        },
    ),
    "quantize_weights": st.fixed_dictionaries(
        {},
        optional={
            "bits": st.sampled_from([8, 4]),
            "group": st.sampled_from([None, 0, 16, 32, 128]),
            "method": st.sampled_from(["gptq", "rtn"]),
            "zero_point": st.sampled_from([None, True, False]),
            "embedding_bits": st.sampled_from([8, 4, 0]),
            "first": st.booleans(),
            "last": st.booleans(),
            "exclude": names,
            "damping": unit,
            "order": st.booleans(),
            "examples": st.integers(1, 4096),
        },
    ),
    "binarize": st.fixed_dictionaries(
        {},
        optional={
            "form": st.sampled_from(["binary", "ternary"]),
            "first": st.booleans(),
            "last": st.booleans(),
            "depthwise": st.booleans(),
            "exclude": names,
        },
    ),
    "share_weights": st.fixed_dictionaries(
        {},
        optional={
            "k": st.integers(2, 4096),
            "scope": st.sampled_from(["layer", "channels", "global"]),
            "channels": st.integers(1, 99),
            "weighted": st.booleans(),
            "exclude": names,
        },
    ),
    "hash_weights": st.fixed_dictionaries(
        {}, optional={"ratio": unit, "seed": st.integers(0, 2**31), "exclude": names}
    ),
    "cast": st.fixed_dictionaries({}, optional={"dtype": st.sampled_from(["fp16", "bf16"])}),
}


@pytest.mark.parametrize("name", STEPS)
def test_defaults_round_trip_through_toml(name):
    steps = [step_class(name)(), step(name), step_class(name)()]
    text = recipe.to_toml(steps)
    assert recipe.from_toml(text) == steps
    assert text.count(f'name = "{name}"') == 3


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_settings_round_trip_through_toml(data):
    chosen = data.draw(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=4))
    drawn = [(name, data.draw(SETTINGS.get(name, st.just({})))) for name in chosen]
    steps = [step_class(name)(**values) for name, values in drawn]
    text = recipe.to_toml(steps)
    assert recipe.from_toml(text) == steps
    assert recipe.to_toml(recipe.from_toml(text)) == text


def test_an_empty_recipe_round_trips():
    assert recipe.from_toml(recipe.to_toml([])) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[step]", "r: not a recipe in TOML"),
        ("step = 3", r"r: expected \[\[step\]\] tables"),
        ("step = [1]", r"r: expected \[\[step\]\] tables"),
        ("[[step]]\nfoo = 1", r'r, step 1: has no name = "\.\.\."'),
        ("[[step]]\nname = 3", "r, step 1: has no name"),
        ('[[step]]\nname = "os.system"', "'os.system' is not one of"),
        ('[[step]]\nname = "paredown.steps.quantization.cast:Cast"', "is not one of"),
        (
            '[[step]]\nname = "cast"\n[[step]]\nname = "cast"\ndtyp = "fp16"',
            "r, step 2: cast has no setting 'dtyp'; it has dtype",
        ),
        ('[[step]]\nname = "cast"\ndtype = "fp8"', 'expected "fp16" or "bf16", got \'fp8\''),
        ('[[step]]\nname = "cast"\n__init__ = 1', "has no setting '__init__'"),
        ('[[step]]\nname = "cast"\nneeds = ["x"]', "has no setting 'needs'"),
        (
            '[[step]]\nname = "prune_weights"\nsparsity = "half"',
            "r, step 1: sparsity: expected a number, got 'half'",
        ),
        ("x = " + "[" * 5000, "r: not a recipe in TOML"),
    ],
)
def test_a_recipe_with_a_mistake(text, message):
    with pytest.raises(UserError, match=message):
        recipe.from_toml(text, "r")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_recipes_with_other_values_never_raise_anything_else(data):
    name = data.draw(st.sampled_from(sorted(STEPS)))
    fields = [field.name for field in dataclasses.fields(step_class(name))]
    values = ["none", "", "x", -1, 0, 10**12, 1.5, float("nan"), float("inf"), True, [], ["a"], [1]]
    table = {f: data.draw(st.sampled_from(values)) for f in fields if data.draw(st.booleans())}
    text = tomli_w.dumps({"step": [{"name": name, **table}]})
    try:
        (made,) = recipe.from_toml(text)
    except UserError:
        return
    assert isinstance(made, step_class(name))


def test_a_recipe_file(tmp_path):
    steps = [step(name) for name in STEPS]
    (tmp_path / "r.toml").write_text(recipe.to_toml(steps))
    assert recipe.load(tmp_path / "r.toml") == steps
    with pytest.raises(UserError, match=r"gone\.toml: cannot be read"):
        recipe.load(tmp_path / "gone.toml")
    (tmp_path / "r.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"r\.toml: "):
        recipe.load(tmp_path / "r.toml")


def test_a_whole_recipe_is_its_steps_in_order(built):
    model, task = built["cnn"]
    steps = [step("prune_weights"), step("fine_tune"), step("quantize")]
    whole = recipe.apply(model, steps, task)
    one = model
    for each in steps:
        one = each.apply(one, task)
    assert store.encode(whole) == store.encode(one)
    assert recipe.apply(model, [], task) is not None
