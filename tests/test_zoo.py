"""The zoo: nets as their papers have them, in any width, depth, size and for any model's shapes."""

import pytest
import torch
from torch import nn

import paredown
from paredown import zoo
from paredown.core.errors import UserError
from paredown.graph import layout
from paredown.zoo.like import Shape, fitting, like
from paredown.zoo.transformers import Transformer

# parameters as published (torchvision's for the nets that it has), multiply-adds in millions
PAPERS = {
    "mobilenet_v1": (4_231_976, 224, 568.7),
    "mobilenet_v2": (3_504_872, 224, 300.8),
    "mobilenet_v3_large": (5_483_032, 224, 216.6),
    "mobilenet_v3_small": (2_542_856, 224, 56.5),
    "mobilenet_v4_small": (3_774_024, 224, 186.0),
    "efficientnet_v2_s": (21_458_488, 384, 8365.6),
    "efficientnet_b0": (5_288_548, 224, 385.8),
    "efficientnet_b1": (7_794_184, 240, 686.8),
    "efficientnet_b2": (9_109_994, 260, 993.6),
    "efficientnet_b3": (12_233_232, 300, 1827.1),
    "efficientnet_b4": (19_341_616, 380, 4393.8),
    "efficientnet_b5": (30_389_784, 456, None),
    "efficientnet_b6": (43_040_704, 528, None),
    "efficientnet_b7": (66_347_960, 600, None),
}


def count(net):
    return sum(p.numel() for p in net.parameters())


def with_statistics(net):
    """As Keras counts: the running means and variances too."""
    return count(net) + sum(b.numel() for b in net.buffers() if b.dim())


def millions(net, x):
    """Multiply-adds of convolutions and linear layers, from shapes alone."""
    total = 0

    def add(layer, _, out):
        nonlocal total
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            total += out.numel() * layer.weight[0].numel()

    for layer in net.modules():
        layer.register_forward_hook(add)
    net.eval()(x)
    return total / 1e6


@pytest.mark.parametrize("name", PAPERS)
def test_parameters_and_multiply_adds_are_those_published(name):
    parameters, size, expected = PAPERS[name]
    with torch.device("meta"):
        net = zoo.make(name, classes=1000, size=size)
        assert count(net) == parameters
        if expected is not None:
            found = millions(net, torch.zeros(1, 3, size, size))
            assert found == pytest.approx(expected, abs=0.06)


def test_mlperf_tiny_and_miniature_transformers_are_those_published():
    vww = zoo.make("mobilenet_v1", classes=2, size=96, width=0.25)
    assert with_statistics(vww) + 2736 == 221_794  # Keras has biases before its norms
    assert millions(vww, torch.zeros(1, 3, 96, 96)) == pytest.approx(7.49, abs=0.01)
    keywords = zoo.make("ds_cnn", classes=12, channels=1)
    assert with_statistics(keywords) == 24_908
    assert millions(keywords, torch.zeros(1, 1, 49, 10)) == pytest.approx(2.66, abs=0.01)
    pictures = zoo.make("resnet_8", classes=10)
    assert with_statistics(pictures) == 78_666
    assert millions(pictures, torch.zeros(1, 3, 32, 32)) == pytest.approx(12.5, abs=0.01)
    machines = zoo.make("autoencoder", features=640, out=640)
    assert with_statistics(machines) == 269_992
    for size, parameters in {"tiny": 4_385_920, "mini": 11_170_560, "medium": 41_373_184}.items():
        net = zoo.make(f"encoder_{size}", vocabulary=30522, classes=2)
        width = net.norm.weight.numel()
        assert count(net) - count(net.head) + 2 * width == parameters  # BERT's two kinds of text
    gpt2 = Transformer(50257, 50257, 768, 12, 1024, causal=True, pooled=False)
    assert count(gpt2) == 124_439_808


NAMED = {  # keys of torchvision's state_dicts, with shapes
    "mobilenet_v2": {
        "features.0.0.weight": (32, 3, 3, 3),
        "features.1.conv.0.0.weight": (32, 1, 3, 3),
        "features.1.conv.1.weight": (16, 32, 1, 1),
        "features.2.conv.3.running_var": (24,),
        "features.18.1.bias": (1280,),
        "classifier.1.weight": (1000, 1280),
    },
    "mobilenet_v3_large": {
        "features.1.block.1.0.weight": (16, 16, 1, 1),
        "features.4.block.2.fc1.weight": (24, 72, 1, 1),
        "features.4.block.3.1.running_mean": (40,),
        "features.16.0.weight": (960, 160, 1, 1),
        "classifier.0.weight": (1280, 960),
        "classifier.3.bias": (1000,),
    },
    "efficientnet_b0": {
        "features.1.0.block.1.fc2.bias": (32,),
        "features.2.1.block.2.fc1.weight": (6, 144, 1, 1),
        "features.7.0.block.3.1.weight": (320,),
        "features.8.0.weight": (1280, 320, 1, 1),
        "classifier.1.weight": (1000, 1280),
    },
    "efficientnet_v2_s": {
        "features.1.1.block.0.0.weight": (24, 24, 3, 3),
        "features.2.0.block.1.0.weight": (48, 96, 1, 1),
        "features.6.14.block.3.0.weight": (256, 1536, 1, 1),
    },
}


@pytest.mark.parametrize("name", NAMED)
def test_parameters_are_called_as_in_torchvision(name):
    with torch.device("meta"):
        state = zoo.make(name, classes=1000).state_dict()
    assert {key: tuple(state[key].shape) for key in NAMED[name]} == NAMED[name]


IMAGES = [name for name, found in zoo.ZOO.items() if found.takes == "images"]


@pytest.mark.parametrize("name", IMAGES)
def test_any_size_channels_classes_width_depth_and_resolution(name):
    with torch.device("meta"):
        whole = zoo.make(name, classes=10)
        for size, width, depth, resolution in ((8, 0.25, 0.5, 1.0), ((33, 20), 0.5, 1.0, 0.6)):
            net = zoo.make(
                name,
                classes=4,
                channels=1,
                size=size,
                width=width,
                depth=depth,
                resolution=resolution,
            )
            assert count(net) < count(whole)
            rows, columns = (size, size) if isinstance(size, int) else size
            made = net(torch.zeros(2, 1, rows, columns))
            assert made.shape == ((2, 4, rows, columns) if name == "unet" else (2, 4))


def test_small_images_are_halved_less_often():
    net = zoo.make("mobilenet_v2", classes=10, channels=1, size=28, width=0.35).eval()
    assert net.features(torch.zeros(1, 1, 28, 28)).shape[2:] == (4, 4)
    whole = zoo.make("mobilenet_v2", classes=10, width=0.35).eval()
    assert whole.features(torch.zeros(1, 3, 96, 96)).shape[2:] == (3, 3)
    assert count(net) - count(whole) == -2 * 9 * 16, "of the stem's channels alone"


EXAMPLES = {  # one of each kind: settings, an input
    "mobilenet_v3_small": ({"classes": 5, "size": 32, "width": 0.25}, torch.randn(1, 3, 32, 32)),
    "mobilenet_v4_small": ({"classes": 5, "size": 32, "width": 0.25}, torch.randn(1, 3, 32, 32)),
    "efficientnet_b1": (
        {"classes": 5, "size": 16, "width": 0.25, "depth": 0.5},
        torch.randn(1, 3, 16, 16),
    ),
    "efficientnet_v2_s": (
        {"classes": 5, "size": 16, "width": 0.25, "depth": 0.2},
        torch.randn(1, 3, 16, 16),
    ),
    "resnet_8": ({"classes": 5, "resolution": 0.5}, torch.randn(1, 3, 32, 32)),
    "ds_cnn": ({"classes": 5, "channels": 1, "width": 0.5}, torch.randn(1, 1, 49, 10)),
    "unet": ({"classes": 2, "size": 16, "width": 0.5}, torch.randn(1, 3, 16, 16)),
    "autoencoder": ({"features": 40, "out": 40, "width": 0.5}, torch.randn(1, 40)),
    "encoder_tiny": ({"vocabulary": 50, "classes": 3, "width": 0.5}, torch.randint(50, (1, 9))),
    "decoder_tiny": ({"vocabulary": 50, "classes": 50, "width": 0.5}, torch.randint(50, (1, 9))),
}


QUICK = ("ds_cnn", "decoder_tiny", "mobilenet_v4_small")


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in EXAMPLES],
)
def test_every_kind_trains_is_cut_quantized_and_written(name, tmp_path):
    settings, x = EXAMPLES[name]
    torch.manual_seed(0)
    net = zoo.make(name, **({"size": 32} if name == "resnet_8" else {}) | settings)
    model = paredown.capture(net, (x,))
    assert not any("evaluation" in note for note in model.notes), "it trains as it should"
    data = torch.utils.data.TensorDataset(x.expand(8, *x.shape[1:]), torch.zeros(8))
    task = paredown.Task(
        example=(x,), score=lambda out, y: -out.flatten(1).abs().mean(1), calibration=data
    )
    made = paredown.apply(model, [paredown.PruneChannels(0.2, criterion="l1")], task)
    assert count(made.graph) < count(net)
    steps = [paredown.Quantize("int8")]
    files = [
        paredown.export(each, paredown.Target(), tmp_path / f"{n}.onnx")  # compared there
        for n, each in enumerate((model, paredown.apply(made, steps, task)))
    ]
    assert files[1].size_bytes < 0.75 * files[0].size_bytes


def test_a_net_is_made_for_what_another_takes_and_gives():
    tokens = torch.zeros(2, 7, dtype=torch.long)
    cases = {
        "unet": Shape([torch.zeros(1, 3, 16, 16)], [torch.zeros(1, 4, 16, 16)]),
        "mlp": Shape([torch.zeros(1, 30)], [torch.zeros(1, 3)]),
        "encoder_tiny": Shape([tokens, tokens], [torch.zeros(2, 3)], 100),
        "encoder_mini": Shape([tokens], [torch.zeros(2, 7, 3)], 100, 9),
        "decoder_tiny": Shape([tokens, tokens], [torch.zeros(2, 7, 100)], 100),
    }
    for name, shape in cases.items():
        net = like(name, shape, width=0.5).eval()
        inputs = [torch.ones_like(each) for each in shape.inputs]
        assert net(*inputs).shape == shape.outputs[0].shape and name in fitting(shape)
    with pytest.raises(UserError, match=r"zoo:unet takes images .*would do: mlp, autoencoder"):
        like("unet", cases["mlp"])
    assert fitting(Shape([torch.zeros(1, 3, 8, 8)], [torch.zeros(1, 2), torch.zeros(1, 4)])) == []


def test_padding_and_later_tokens_are_not_seen():
    ids = torch.randint(20, (1, 6))
    net = zoo.make("encoder_tiny", vocabulary=20, classes=3).eval()
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    other = ids.clone()
    other[:, 4:] = 1
    torch.testing.assert_close(net(ids, mask), net(other, mask))
    net = zoo.make("decoder_tiny", vocabulary=20, classes=20).eval()
    torch.testing.assert_close(net(ids)[:, :4], net(other)[:, :4])
    torch.testing.assert_close(net(ids, torch.ones_like(ids)), net(ids))


# --- students --------------------------------------------------------------------------------


class Tagger(nn.Module):
    """Tokens and their mask by name, named outputs."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(30, 16), nn.Linear(16, 30)

    def forward(self, input_ids, attention_mask):
        x = self.table(input_ids) * attention_mask.unsqueeze(-1)
        return {"logits": self.head(x)}


def tokens_task():
    ids = torch.randint(30, (16, 7))
    data = [({"input_ids": one, "attention_mask": torch.ones(7)}, one) for one in ids]
    example = {"input_ids": ids[:1], "attention_mask": torch.ones(1, 7)}

    def score(out, y):
        return (out["logits"].argmax(-1) == y).float().mean(1)

    return paredown.Task(
        example=example,
        score=score,
        train=data,
        validation=data,
        test=data,
        dynamic={"input_ids": {1: "length"}, "attention_mask": {1: "length"}},
    )


def test_a_net_of_the_zoo_takes_a_models_place_with_its_names():
    task = tokens_task()
    step = paredown.Distill(student="zoo:encoder_tiny", width=0.25, alpha=0, epochs=1)
    made = paredown.apply(Tagger(), [step, paredown.Quantize("int8-dynamic")], task)
    assert [item.name for item in made.inputs] == ["input_ids", "attention_mask"]
    assert made.inputs[0].dynamic == {0: "batch", 1: "length"}
    found = made(input_ids=torch.zeros(2, 11, dtype=torch.long), attention_mask=torch.ones(2, 11))
    assert found["logits"].shape == (2, 11, 30)
    again = paredown.apply(Tagger(), [step], task)
    assert torch.equal(*(m.state_dict()["net.head.bias"] for m in (again, again.copy())))
    wide = paredown.Distill(student="zoo:encoder_tiny", alpha=0)
    assert step.contents(task) != wide.contents(task), "a run knows them apart"


MOVES = {
    "permute": (lambda x: x.permute(0, 3, 1, 2), lambda x: x.permute(0, 2, 3, 1)),
    "movedim": (lambda x: x.movedim(-1, 1), lambda x: x.movedim(1, -1)),
    "transposes": (
        lambda x: x.transpose(1, 3).transpose(2, 3),
        lambda x: x.transpose(2, 3).transpose(1, 3),
    ),
    "one channel": (
        lambda x: x.reshape(-1, 1, *x.shape[1:3]),
        lambda x: x.reshape(-1, *x.shape[2:], 1),
    ),
}


class Last(nn.Module):
    """Pictures with their channels last, as Keras and TensorFlow have them."""

    def __init__(self, moved, maps):
        super().__init__()
        self.there, self.back = MOVES[moved]
        self.channels = 1 if moved == "one channel" else 3
        self.conv = nn.Conv2d(self.channels, self.channels, 3, padding=1)
        self.head = None if maps else nn.Linear(self.channels, 5)

    def forward(self, x):
        x = self.conv(self.there(x / 255)).relu()
        return self.back(x).sigmoid() if self.head is None else self.head(x.mean((2, 3)))


@pytest.mark.parametrize("moved", MOVES)
@pytest.mark.parametrize(("student", "maps"), [("zoo:resnet_8", False), ("zoo:unet", True)])
def test_a_student_of_channels_last_sees_them_as_channels(moved, student, maps):
    net = Last(moved, maps)
    image = torch.rand(1, 16, 24, net.channels)
    task = paredown.Task(example=(image,), score=None)
    made = paredown.Distill(student=student, width=0.25, alpha=0)._placed(
        paredown.capture(net, (image,)), task
    )
    stem = next(each for each in made.state_dict().values() if each.dim() == 4)
    assert stem.shape[1] == net.channels
    assert made(image.expand(2, -1, -1, -1)).shape == net(image.expand(2, -1, -1, -1)).shape
    first = paredown.capture(nn.Conv2d(24, 5, 3, padding=1), (torch.rand(1, 24, 16, 3),))
    assert not layout.takes_channels_last(first.graph), "three columns are no three channels"


@pytest.mark.parametrize("own", [False, True])
def test_a_student_keeps_the_name_of_an_output_that_a_file_gave_it(own, tmp_path):
    x = torch.rand(1, 3, 16, 16)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.Flatten(), nn.Linear(196, 5))
    paredown.export(paredown.capture(net, (x,)), paredown.Target(), tmp_path / "net.onnx")
    original = paredown.capture(tmp_path / "net.onnx")
    name = original.inputs[0].name
    task = paredown.Task(example={name: x}, score=paredown.accuracy, train=[({name: x[0]}, 0)] * 8)
    small = nn.Sequential(nn.Conv2d(3, 2, 3, 4), nn.Flatten(), nn.Linear(32, 5))
    how = {"student": small} if own else {"student": "zoo:resnet_8", "width": 0.25}
    step = paredown.Distill(**how, alpha=0, epochs=1)
    made = paredown.apply(original, [step], task)
    assert made.outputs == original.outputs and made(**{name: x}).shape == (1, 5)


def test_students_of_the_zoo_that_cannot_be_are_told_before_any_work():
    image = torch.zeros(1, 3, 16, 16)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.Flatten(), nn.Linear(196, 5))
    model = paredown.capture(net, (image,))
    task = paredown.Task(example=(image,), score=None)
    said = paredown.Distill(student="zoo:unet", alpha=0).unfit(model, task)[0]
    assert "zoo:unet takes images and gives maps; the original takes (1, 3, 16, 16)" in said
    assert "would do: mobilenet_v1, mobilenet_v2" in said
    assert "did you mean 'unet'" in paredown.Distill(student="zoo:unett").problems()[0]
    for step in (paredown.Distill(width=0.5), paredown.Distill(student=net, depth=2)):
        assert "width, depth and resolution are those of a" in step.problems()[0]
    with pytest.raises(UserError, match="resolution: expected a number above 0, got nan"):
        paredown.Distill(student="zoo:resnet_8", resolution=float("nan"))


def test_the_plan_offers_another_architecture_where_goals_are_far():
    image = torch.randn(16, 3, 32, 32)
    data = torch.utils.data.TensorDataset(image, torch.zeros(16, dtype=torch.long))
    task = paredown.Task(
        example=(image[:1],),
        score=lambda out, y: (out.argmax(1) == y).float(),
        loss=nn.functional.cross_entropy,
        train=data,
        validation=data,
        test=data,
    )
    net = zoo.make("resnet_8", classes=10, width=2)
    model = paredown.capture(net, task.example)
    taught = {}
    for size in ("0.5x", "0.03x", "0.0001x"):
        whole = paredown.Measurement(4 * count(net), score=0.5, latency_ms_p50=1.0)
        found = paredown.plan(model, task, paredown.Goals(size=size), whole)
        steps = [
            step for proposal in found for attempt in proposal.attempts for step in attempt.steps
        ]
        taught[size] = [s for s in steps if isinstance(s, paredown.Distill) and s.student]
    assert taught["0.5x"] == [] == taught["0.0001x"], "not needed, and not possible"
    [step] = taught["0.03x"]
    assert step.student == "zoo:resnet_8" and 0 < step.width < 2
    made = paredown.Distill(student="zoo:resnet_8", width=step.width)
    share = count(made._placed(model, task).graph) / count(net)
    assert share < 0.03 * 4, "int8 takes the rest"


WRONG = {
    "there is no 'mobilnet_v2'; did you mean 'mobilenet_v2'": ("mobilnet_v2", {"classes": 2}),
    "mlp needs out; it takes features, out, width, depth": ("mlp", {"features": 3}),
    "has no vocabulary; it takes classes, channels": (
        "mobilenet_v2",
        {"classes": 2, "vocabulary": 3},
    ),
    "classes: expected a whole number from 1 up, got -1": ("resnet_8", {"classes": -1}),
    "width: expected a number above 0, got 0": ("resnet_8", {"classes": 2, "width": 0}),
    "resolution: expected a number above 0": ("resnet_8", {"classes": 2, "resolution": -1}),
    "mlp takes rows; resolution is of images": ("mlp", {"features": 3, "out": 2, "resolution": 2}),
    "images of 3 pixels cannot be halved 2 times": ("unet", {"classes": 2, "size": (9, 3)}),
}


@pytest.mark.parametrize("said", WRONG)
def test_wrong_names_and_settings_are_told(said):
    name, settings = WRONG[said]
    with pytest.raises(UserError) as caught:
        zoo.make(name, **settings)
    assert said in str(caught.value)
