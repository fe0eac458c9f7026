"""Fidelity to the original: guessed kinds, scores, losses, and the bound before deployment."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats
from torch import nn

import paredown
from paredown.core.errors import UserError
from paredown.data import splits
from paredown.data.answer import Answer, Fidelity, FidelityLoss, LabelLoss, LabelScore, by_labels
from paredown.data.evaluate import evaluate
from paredown.data.fidelity import largest_change, margins
from paredown.data.kinds import Seen, answer_of, guessed
from paredown.measure.bounds import proportion_bound
from paredown.run.fidelity import sentence


def seen(outputs, inputs=None, labels=None):
    names = tuple(outputs)
    return Seen(names, tuple(outputs.values()), inputs or {}, labels)


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


TOKENS = {"ids": torch.zeros(4, 7, dtype=torch.long)}
PICTURES = {"x": torch.zeros(4, 3, 8, 8)}
KINDS = {
    "classification": [
        seen({"": drawn(4, 10)}),
        seen({"probs": drawn(4, 512).softmax(1)}),
        seen({"logits": drawn(4, 768)}),
        seen({"": drawn(4, 10)}, labels=np.arange(4)),
        seen({"": drawn(4, 1)}, labels=np.array([0, 1, 1, 0])),
    ],
    "embedding": [
        seen({"": drawn(4, 384)}),
        seen({"": nn.functional.normalize(drawn(4, 10), dim=1)}),
        seen({"last_hidden_state": drawn(4, 7, 16), "pooler_output": drawn(4, 16)}, TOKENS),
        seen({"": drawn(4, 7, 768)}, TOKENS),
    ],
    "tokens": [
        seen({"logits": drawn(4, 7, 768)}, TOKENS),
        seen({"": drawn(4, 7, 50)}, TOKENS),
        seen({"": drawn(4, 7, 5)}, labels=np.zeros((4, 7), int)),
    ],
    "segmentation": [
        seen({"": drawn(4, 5, 8, 8)}, PICTURES),
        seen({"": drawn(4, 8, 8, 5)}, labels=np.zeros((4, 8, 8), int)),
    ],
    "regression": [
        seen({"": drawn(4, 1)}),
        seen({"": drawn(4)}),
        seen({"": drawn(4, 3, 8, 8)}, PICTURES),
        seen({"": drawn(4, 10)}, labels=np.zeros((4, 10), np.float32)),
    ],
    "detection": [
        seen({"boxes": drawn(4, 9, 4), "scores": drawn(4, 9), "labels": torch.ones(4, 9).long()}),
        seen({"logits": drawn(4, 9, 6), "pred_boxes": drawn(4, 9, 4)}),
        seen({"logits": drawn(4, 9, 4), "pred_boxes": drawn(4, 9, 4)}),
    ],
}


@pytest.mark.parametrize(
    ("kind", "given"), [(kind, each) for kind, several in KINDS.items() for each in several]
)
def test_the_kind_is_guessed_from_outputs_and_labels(kind, given):
    assert guessed(given)[0] == kind


def test_what_was_guessed_is_said_and_what_does_not_count():
    given = seen({"features": drawn(4, 9, 3), "logits": drawn(4, 10)})
    answer, note = answer_of(given, "classification", "as asked")
    assert answer.places == (1,)
    assert note == (
        "the task is taken for classification (as asked); 'logits' is the answer and the other "
        "outputs do not count"
    )


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        (seen({"": torch.ones(4, 3).long()}), None, "do not tell of which kind it is; say with"),
        (seen({"": drawn(4, 10)}), "segmentation", "segmentation has no output to go by"),
        (seen({"": drawn(4, 10)}), "detection", "detection is read from boxes"),
        (seen({"": drawn(4, 10)}, labels=np.array([9, 10])), None, "labels go from 9 to 10"),
        (seen({"": drawn(4, 10)}, labels=np.zeros((4, 3), int)), None, "do not go with outputs"),
        (seen({"": drawn(4, 10)}, labels=np.zeros(4)), "classification", "expected class numbers"),
        (
            seen({"b": drawn(4, 9, 4), "s": torch.zeros(4, 9)}),
            "detection",
            "finds no box with a score of 0.5",
        ),
    ],
    ids=range(7),
)
def test_what_cannot_be_scored_is_told(given, kind, said):
    with pytest.raises(UserError, match=said):
        answer_of(given, kind)


def test_four_classes_are_no_boxes():
    logits, boxes = 4 * drawn(4, 9, 4), drawn(4, 9, 4).sigmoid()
    answer, _ = answer_of(seen({"logits": logits, "pred_boxes": boxes}), None)
    assert (answer.places, answer.corners, answer.probabilities) == ((1, 0), False, False)
    corners = torch.cat([boxes[..., :2], boxes[..., :2] + 1], -1)
    answer, _ = answer_of(seen({"a": logits, "b": corners}), None)
    assert (answer.places, answer.corners) == ((1, 0), True)


# --- scores --------------------------------------------------------------------------------------


def test_a_mask_leaves_padding_out():
    answer = Answer("tokens", (0,), dim=2, mask="mask")
    one = nn.functional.one_hot(torch.tensor([[0, 1, 2, 0]]), 3).float()
    other = nn.functional.one_hot(torch.tensor([[0, 2, 2, 1]]), 3).float()
    mask = torch.tensor([[1, 1, 1, 0]])
    target = answer.target([one], mask)
    assert Fidelity(answer)(other, target).tolist() == [pytest.approx(2 / 3)]
    assert Fidelity(answer)(one, target).tolist() == [1.0]
    only = FidelityLoss(answer)(torch.cat([one[:, :3], 9 * other[:, 3:]], 1), target)
    assert float(only) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("kind", ["classification", "segmentation", "regression", "embedding"])
def test_the_same_output_scores_one_and_a_loss_pulls_towards_it(kind):
    shape = {"segmentation": (4, 5, 3, 3)}.get(kind, (4, 6))
    wanted, start = drawn(*shape), drawn(*shape).flip(0).requires_grad_()
    answer = Answer(kind, (0,), scales=(1.0,))
    score, loss = Fidelity(answer), FidelityLoss(answer)
    assert score(wanted, wanted).tolist() == pytest.approx([1.0] * 4, abs=1e-6)
    before = score(start.detach(), wanted).mean()
    optimizer = torch.optim.Adam([start], 0.3)
    for _ in range(60):
        optimizer.zero_grad()
        loss(start, wanted).backward()
        optimizer.step()
    assert score(start.detach(), wanted).mean() > max(float(before), 0.8)


def test_probabilities_are_no_logits():
    probabilities = torch.tensor([[0.7, 0.3]])
    plain = FidelityLoss(Answer("classification", (0,), probabilities=True))
    assert float(plain(probabilities, probabilities)) == pytest.approx(0.0, abs=1e-6)
    wanted = (0.7 * np.log(0.7 / 0.4) + 0.3 * np.log(0.3 / 0.6)).item()
    assert float(plain(torch.tensor([[0.4, 0.6]]), probabilities)) == pytest.approx(wanted, 1e-4)
    one = Fidelity(Answer("classification", (0,), probabilities=True))
    assert one(torch.tensor([[0.4]]), torch.tensor([[0.6]])).tolist() == [0.0]
    assert one(torch.tensor([[0.9]]), torch.tensor([[0.6]])).tolist() == [1.0]


def test_boxes_of_every_form():
    corners = torch.tensor([[[0.0, 0, 2, 2], [5, 5, 6, 6]]])
    centres = torch.tensor([[[1.0, 1, 2, 2], [5.5, 5.5, 1, 1]]])
    scores, classes = torch.tensor([[0.9, 0.2]]), torch.tensor([[1, 0]])
    by_corners, by_centres = (
        Answer("detection", (0, 1, 2)),
        Answer("detection", (0, 1, 2), corners=False),
    )
    for answer, boxes in ((by_corners, corners), (by_centres, centres)):
        target = answer.target([boxes, scores, classes], None)
        score = Fidelity(answer)
        assert score([boxes, scores, classes], target).tolist() == [1.0]
        assert score([boxes, scores, 1 - classes], target).tolist() == [0.0]
        assert score([boxes, torch.tensor([[0.9, 0.9]]), classes], target).tolist() == [
            pytest.approx(2 / 3)
        ]
    raw = torch.tensor([[[0.0, 9.0, 0.0], [0.0, 0.0, 9.0]]])  # the last class: nothing is there
    detr = Answer("detection", (0, 1), corners=False)
    [(_, rated, named)] = detr.boxes([centres, raw])
    assert (rated >= 0.5).tolist() == [True, False] and named[0] == 1


def test_labels_score_what_they_are_of():
    logits = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    tokens = LabelScore(Answer("tokens", (0,), dim=2))
    assert tokens(logits, torch.tensor([[1, -100]])).tolist() == [1.0]
    assert tokens(logits, torch.tensor([[-100, 1]])).tolist() == [0.0]
    loss = LabelLoss(Answer("tokens", (0,), dim=2))
    assert float(loss(logits, torch.tensor([[1, -100]]))) == pytest.approx(0.3133, abs=1e-3)
    late = by_labels(paredown.Task((logits,), score=Fidelity(Answer("classification", (0,)))))
    assert late.score(torch.eye(2), torch.tensor([0, 0])).tolist() == [1.0, 0.0]
    with pytest.raises(UserError, match="embedding are not scored by labels"):
        by_labels(paredown.Task((logits,), score=Fidelity(Answer("embedding", (0,)))))


def test_a_change_below_the_margin_never_flips():
    before = drawn(500, 10)
    after = before + 0.3 * drawn(10, 500).T
    change = largest_change(before, after)
    flipped = before.argmax(1) != after.argmax(1)
    assert flipped.any() and float(margins(before)[flipped].max()) <= change


# --- the bound -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "n"), [(0, 80), (1, 200), (7, 50), (49, 50)])
def test_the_bound_is_exact(count, n):
    bound = proportion_bound(count, n)
    assert scipy_stats.binom.cdf(count, n, bound) == pytest.approx(0.05)
    assert proportion_bound(n, n) == 1.0
    with pytest.raises(ValueError, match="count: expected"):
        proportion_bound(3, 2)


def test_the_bound_covers_the_truth_as_often_as_it_says():
    truth, n = 0.03, 80
    counts = np.random.default_rng(0).binomial(n, truth, 4000)
    covered = np.mean([proportion_bound(int(count), n) >= truth for count in counts])
    assert covered >= 0.95


def test_the_sentence_says_what_is_bounded():
    told = {"examples": 80, "disagreement": 0.01, "bound": 0.05, "confidence": 0.95}
    assert "accuracy drops by no more" in sentence({**told, "kind": "classification"})
    assert "right ones drops" in sentence({**told, "kind": "segmentation"})
    embedded = {**told, "kind": "embedding", "neighbours": 10, "neighbour_overlap": 0.98}
    assert sentence(embedded).endswith("can tell. Of the 10 nearest neighbours 98 % stay.")
    assert sentence(None) == ""


# --- paredown.load -------------------------------------------------------------------------------


def net(inputs=4, outputs=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, outputs)).eval()


def saved(tmp_path, module, example, **columns):
    paredown.capture(module, example).save(tmp_path / "net.safetensors")
    np.savez(tmp_path / "x.npz", **columns)
    return tmp_path / "net.safetensors", tmp_path / "x.npz"


def test_without_labels_the_target_is_the_original(tmp_path):
    x = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    model, task = paredown.load(*saved(tmp_path, net(), (torch.zeros(1, 4),), x=x))
    assert isinstance(task.score, Fidelity)
    assert [len(getattr(task, name)) for name in ("train", "validation", "test")] == [15, 15, 20]
    inputs, target = task.test[3]
    assert torch.allclose(model(inputs[None])[0], target, atol=1e-6)
    assert evaluate(model, task.test, task).tolist() == [1.0] * 20
    other = paredown.capture(net(outputs=3), (torch.zeros(1, 4),))
    with torch.no_grad():
        other.graph.get_parameter("2.bias")[0] += 9
    assert evaluate(other, task.test, task).mean() < 0.9
    tuned = paredown.apply(other, [paredown.FineTune(epochs=30, lr=0.05)], task)
    assert evaluate(tuned, task.test, task).mean() > evaluate(other, task.test, task).mean()


def test_the_originals_outputs_are_no_part_of_the_fingerprint(tmp_path):
    x = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    _, task = paredown.load(*saved(tmp_path, net(), (torch.zeros(1, 4),), x=x))
    before = splits.fingerprint(task.test)
    task.test.outputs[0] += 1e-7
    assert splits.fingerprint(splits.prepared(task).test) == before
    other = paredown.load(tmp_path / "net.safetensors", tmp_path / "x.npz", seed=1)[1]
    assert splits.fingerprint(other.test) != before


def test_with_labels_they_are_the_target(tmp_path):
    x = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    y = x[:, :3].argmax(1)
    _, task = paredown.load(*saved(tmp_path, net(), (torch.zeros(1, 4),), x=x, y=y))
    assert isinstance(task.score, LabelScore) and task.score.meaning == "accuracy"
    inputs, target = task.train[0]
    assert int(inputs[:3].argmax()) == int(target)
    assert "labels are classes" in task.score.notes[0]
    path = tmp_path / "net.safetensors"
    _, task = paredown.load(path, tmp_path / "x.npz", "embedding")
    assert isinstance(task.score, Fidelity) and "the labels are not read" in task.score.notes[1]


def test_a_model_of_several_inputs_by_name(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net(6)

        def forward(self, left, right):
            return {"logits": self.net(torch.cat([left, right], 1)), "extra": left.sum(1)}

    rng = np.random.default_rng(0)
    columns = {"right": rng.normal(size=(30, 2)), "left": rng.normal(size=(30, 4))}
    columns = {name: each.astype(np.float32) for name, each in columns.items()}
    example = {"left": torch.zeros(1, 4), "right": torch.zeros(1, 2)}
    model, task = paredown.load(*saved(tmp_path, Two().eval(), example, **columns))
    inputs, target = task.train[0]
    assert sorted(inputs) == ["left", "right"] and target.shape == (3,)
    assert evaluate(model, task.validation, task).mean() == 1.0
    assert "'logits' is the answer and the other outputs do not count" in task.score.notes[0]


def test_what_cannot_be_loaded_is_told(tmp_path):
    x = np.zeros((30, 4), np.float32)
    model, data = saved(tmp_path, net(), (torch.zeros(1, 4),), x=x)
    with pytest.raises(UserError, match="is a model without its task: check, baseline, plan"):
        paredown.load(model)
    with pytest.raises(UserError, match="did you mean 'classification'"):
        paredown.load(model, data, "clasification")
    (tmp_path / "net.py").touch()
    with pytest.raises(UserError, match=r"a Python file brings samples and score in its task\(\)"):
        paredown.load(tmp_path / "net.py", data)
    np.savez(tmp_path / "few.npz", x=x[:1])
    with pytest.raises(UserError, match="holds 1 sample; at least 10 are needed"):
        paredown.load(model, tmp_path / "few.npz")
    x[3, 1] = np.nan
    np.savez(tmp_path / "nan.npz", x=x)
    with pytest.raises(UserError, match=r"example \d+: input 'input' holds NaN"):
        paredown.load(model, tmp_path / "nan.npz")
    with pytest.raises(UserError, match="no such file"):
        paredown.load(tmp_path / "gone.onnx", data)


def test_a_task_of_samples_is_as_any_other(tmp_path):
    x = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    model, task = paredown.load(*saved(tmp_path, net(), (torch.zeros(1, 4),), x=x))
    assert dataclasses.replace(task, batch_size=8).batch_size == 8
    small = paredown.apply(model, [paredown.Quantize("int8")], task)
    assert evaluate(small, task.test, task).mean() > 0.7
    taught = paredown.apply(model, [paredown.PruneChannels(0.5), paredown.Distill(epochs=2)], task)
    assert taught.size_bytes < model.size_bytes


def test_what_no_gradient_reaches_is_not_trained(tmp_path):
    class Rounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x):
            return (16 * self.net(x)).to(torch.int32).float()

    x = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    _, task = paredown.load(*saved(tmp_path, Rounded().eval(), (torch.zeros(1, 4),), x=x))
    assert task.loss is None and task.train is None and len(task.calibration) == 15
    assert "lets no gradient reach its weights" in task.score.notes[-1]
