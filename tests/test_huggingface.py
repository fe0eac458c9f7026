"""The door for a Hugging Face folder: what is read, how it runs, and what is refused."""

import copy
import json
import os
import shutil

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import save_file

import paredown
from paredown.core.errors import UserError
from paredown.graph.doors.files import open_file
from paredown.graph.doors.huggingface import loaded
from paredown.graph.doors.module import capture_module
from tests import folders
from tests.architectures import ARCHITECTURES, make

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def sentiment(tmp_path_factory):
    return folders.sentiment(tmp_path_factory.mktemp("hf") / "sentiment")


@pytest.fixture
def changed(sentiment, tmp_path):
    """A copy of the folder, to be changed."""
    return shutil.copytree(sentiment, tmp_path / "changed")


def captured(opened):
    return capture_module(opened.module, opened.example, opened.dynamic)


def as_transformers(folder, kind, **inputs):
    """What transformers gives by itself."""
    with torch.no_grad():
        return getattr(hf, kind).from_pretrained(folder).eval()(**inputs)


# --- texts -----------------------------------------------------------------------------------


def test_a_classifier_of_texts_runs_as_transformers_runs_it(sentiment):
    opened = open_file(sentiment)
    assert (opened.kind, opened.classes, opened.outputs) == (
        "classification",
        ("bad", "good"),
        ("logits",),
    )
    assert [item.name for item in opened.inputs if not item.optional] == ["input_ids"]
    assert opened.inputs[0].shape == (None, "length") and opened.inputs[0].dtype == "int64"
    assert "texts are cut and padded to 24 tokens; the model takes up to 24" in opened.notes
    texts = ["A good film.", "what is that? " * 20]
    rows = [opened.preprocess({"text": text}) for text in texts]
    inputs = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    theirs = hf.AutoTokenizer.from_pretrained(sentiment)(
        texts, padding="max_length", truncation=True, max_length=24, return_tensors="pt"
    )
    assert {name: value.tolist() for name, value in inputs.items()} == {
        name: theirs[name].tolist() for name in inputs
    }
    model = captured(opened)
    wanted = as_transformers(sentiment, "BertForSequenceClassification", **theirs).logits
    torch.testing.assert_close(model(**inputs), wanted)
    shorter = {name: value[:1, :7] for name, value in inputs.items()}
    torch.testing.assert_close(
        model(**shorter),
        as_transformers(sentiment, "BertForSequenceClassification", **shorter).logits,
    )
    assert set(model.state_dict()) == set(opened.module.state_dict())
    assert "bert.encoder.layer.0.attention.self.query.weight" in model.state_dict()
    assert not model.notes


@pytest.mark.slow
def test_it_prunes_and_quantizes_as_any_module(sentiment, tmp_path):
    opened = open_file(sentiment)
    inputs = [(opened.preprocess({"text": text}), 0) for text in folders.CORPUS]
    task = paredown.Task(opened.example, score=paredown.accuracy, calibration=inputs)
    model = captured(opened)
    smaller = paredown.apply(model, [paredown.PruneChannels(0.5), paredown.Quantize("int8")], task)
    count = sum(each.numel() for each in smaller.parameters())
    assert count < sum(each.numel() for each in model.parameters())
    made = paredown.export(smaller, paredown.Target(), tmp_path / "m.onnx")
    (logits,) = paredown.open(made.path)(*(v[None].numpy() for v in inputs[0][0].values()))
    assert logits.shape == (1, 2)


def test_two_texts_become_a_pair(sentiment):
    opened = open_file(sentiment)
    for first, second in (("sentence1", "sentence2"), ("premise", "hypothesis")):
        made = opened.preprocess({first: "a good film", second: "a bad one", "label": 1})
        assert int(made["token_type_ids"].sum()) > 2
    question = opened.preprocess({"question": "what ?", "context": "paris is " * 40})
    single = opened.preprocess({"sentence": "what ?"})
    assert question["input_ids"][:4].tolist() == single["input_ids"][:4].tolist()
    with pytest.raises(UserError, match=r"hold title; expected a text under one of text, sent"):
        opened.preprocess({"title": "a"})
    with pytest.raises(UserError, match=r"text: expected a text, got int"):
        opened.preprocess({"text": 3})


KINDS = {  # class of transformers, its settings -> kind, outputs
    "BertForTokenClassification": ({"num_labels": 3}, "tokens", ("logits",)),
    "BertForMaskedLM": ({}, "tokens", ("logits",)),
    "BertForQuestionAnswering": ({}, None, ("start_logits", "end_logits")),
    "BertForSequenceClassification": ({"num_labels": 1}, "regression", ("logits",)),
    "BertModel": ({}, "embedding", ("last_hidden_state", "pooler_output")),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_kind_is_told_by_the_architecture(name, tmp_path):
    settings, kind, outputs = KINDS[name]
    model = getattr(hf, name)(folders.bert(output_hidden_states=True, **settings))
    opened = open_file(folders.save(tmp_path, model))
    assert (opened.kind, opened.outputs, opened.classes) == (kind, outputs, ())
    with torch.no_grad():
        found = opened.module(**opened.example)
    assert isinstance(found, torch.Tensor) == (len(outputs) == 1)
    if len(outputs) > 1:
        assert tuple(found) == outputs


def test_classes_that_are_not_exclusive_are_no_classification(changed):
    folders.change(
        changed / "config.json", lambda c: c | {"problem_type": "multi_label_classification"}
    )
    opened = open_file(changed)
    assert opened.kind is None and any("--task regression" in note for note in opened.notes)


def test_a_sentence_encoder_gives_one_vector_a_text(tmp_path):
    folder = folders.encoder(tmp_path / "encoder")
    opened = open_file(folder)
    assert opened.kind == "embedding" and opened.outputs == ("sentence_embedding",)
    assert any("pooler" in note for note in opened.notes)
    assert any("16 tokens" in note for note in opened.notes)
    made = opened.preprocess({"text": "a good film"})
    batch = {name: value[None] for name, value in made.items()}
    count = int(made["attention_mask"].sum())
    short = {name: value[:, :count] for name, value in batch.items()}
    tokens = as_transformers(folder, "BertModel", **short).last_hidden_state
    wanted = torch.nn.functional.normalize(tokens.mean(dim=1), dim=1)
    torch.testing.assert_close(captured(opened)(**batch), wanted)


def test_a_causal_language_model_in_bfloat16_with_no_padding_token(tmp_path):
    config = hf.LlamaConfig(
        **dict(vocab_size=120, hidden_size=16, intermediate_size=32, num_hidden_layers=1),
        **dict(num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=4096),
    )
    model = hf.LlamaForCausalLM(config).to(torch.bfloat16)
    words = folders.tokenizer(pad_token=None, eos_token="[SEP]", model_max_length=4096)
    opened = open_file(folders.save(tmp_path, model, words))
    assert opened.kind == "tokens" and len(opened.notes) == 3
    assert "weights are bfloat16 in the file, and float32 here" in opened.notes[0]
    assert "cut and padded to 128 tokens; the model takes up to 4096" in opened.notes[1]
    assert "no token to pad with, so '[SEP]' is taken" in opened.notes[2]
    found = captured(opened)
    assert found.inputs[0].dynamic == {0: "batch", 1: "length"}
    assert {each.dtype for each in found.state_dict().values()} == {torch.float32}
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        wanted = model.float()(ids).logits
    torch.testing.assert_close(found(input_ids=ids, attention_mask=torch.ones_like(ids)), wanted)


@pytest.mark.parametrize("ends", [True, False])
def test_padding_does_not_move_the_token_that_decides(ends, tmp_path):
    sizes = dict(n_positions=24, n_embd=16, n_layer=1, n_head=2, num_labels=3)
    config = hf.GPT2Config(vocab_size=120, bos_token_id=2, eos_token_id=3, **sizes)
    words = folders.tokenizer(pad_token=None, eos_token="[SEP]" if ends else "[MASK]")
    folder = folders.save(tmp_path, hf.GPT2ForSequenceClassification(config), words)
    if ends:
        with pytest.raises(
            UserError, match=r"'\[SEP\]', which it could take, is part of every text"
        ):
            open_file(folder)
        return
    opened = open_file(folder)
    made = opened.preprocess({"text": "a good film"})
    plain = words("a good film", return_tensors="pt")
    wanted = as_transformers(folder, "GPT2ForSequenceClassification", **plain).logits
    with torch.no_grad():
        found = opened.module(**{name: value[None] for name, value in made.items()})
    torch.testing.assert_close(found, wanted)


def test_weights_in_several_files(sentiment, tmp_path):
    model = hf.AutoModelForSequenceClassification.from_pretrained(sentiment)
    model.save_pretrained(tmp_path, max_shard_size="6KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    parts = open_file(tmp_path).module.state_dict()
    whole = open_file(sentiment).module.state_dict()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(UserError, match=r"model-00002.* is missing, which model.safetensors.index"):
        open_file(tmp_path)
    folders.change(
        tmp_path / "model.safetensors.index.json",
        lambda index: index | {"weight_map": {"a": "../changed/model.safetensors"}},
    )
    with pytest.raises(
        UserError, match=r"names '\.\./changed.*expected a .safetensors file beside"
    ):
        open_file(tmp_path)


# --- pictures and sound ----------------------------------------------------------------------


def test_a_classifier_of_pictures_with_its_processor(tmp_path):
    folder = folders.pictures(tmp_path)
    opened = open_file(folder)
    assert opened.columns == ("image",) and opened.inputs[0].shape == (None, 3, 16, 16)
    picture = np.random.default_rng(0).integers(0, 256, (30, 20, 3)).astype(np.uint8)
    made = opened.preprocess({"image": picture})
    theirs = hf.AutoImageProcessor.from_pretrained(folder)(picture, return_tensors="pt")
    torch.testing.assert_close(made["pixel_values"], theirs["pixel_values"][0])
    model = captured(opened)
    torch.testing.assert_close(
        model(pixel_values=made["pixel_values"][None]),
        as_transformers(folder, "ViTForImageClassification", **theirs).logits,
    )
    grey = opened.preprocess({"image": picture[..., 0]})
    four = np.concatenate([picture, picture[..., :1]], axis=2)
    assert grey["pixel_values"].shape == (3, 16, 16)
    assert torch.equal(opened.preprocess({"image": four})["pixel_values"], made["pixel_values"])
    for wrong in (picture.astype(np.float32), np.zeros((4, 4, 5), np.uint8), np.zeros(4, np.uint8)):
        with pytest.raises(UserError, match=r"image: expected"):
            opened.preprocess({"image": wrong})


def test_convolutions_train_and_are_cut(tmp_path):
    opened = open_file(folders.convolutions(tmp_path))
    assert opened.preprocess is not None and opened.inputs[0].shape == (None, 3, 224, 224)
    assert any("no image processor" in note for note in opened.notes)
    assert any("224 x 224 is taken" in note for note in opened.notes)
    with pytest.raises(UserError, match=r"has no image processor .* save the processor"):
        opened.preprocess({"image": np.zeros((4, 4, 3), np.uint8)})
    example = {"pixel_values": torch.randn(1, 3, 32, 32)}
    model = capture_module(opened.module, example, None)
    assert not model.notes  # also that it trains as it did
    seen = [({"pixel_values": torch.randn(3, 32, 32)}, 0) for _ in range(4)]
    task = paredown.Task(example, score=paredown.accuracy, calibration=seen)
    halved = paredown.apply(model, [paredown.PruneChannels(0.5)], task)
    assert halved(pixel_values=torch.randn(2, 3, 32, 32)).shape == (2, 3)


def test_a_processor_that_keeps_proportions_gives_one_size(tmp_path):
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    config = hf.YolosConfig(image_size=[32, 32], patch_size=8, num_detection_tokens=4, **sizes)
    keeps = hf.YolosImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 64})
    opened = open_file(folders.save(tmp_path, hf.YolosForObjectDetection(config), keeps))
    assert opened.kind == "detection" and opened.outputs == ("logits", "pred_boxes")
    assert any("all are resized to 32 x 32" in note for note in opened.notes)
    wide = opened.preprocess({"image": np.zeros((20, 90, 3), np.uint8)})
    assert wide["pixel_values"].shape == (3, 32, 32)


def test_a_processor_that_cannot_be_used_leaves_the_pixels(tmp_path):
    folder = folders.pictures(tmp_path)
    for settings, said in (
        ({"image_processor_type": "GLPNImageProcessor"}, r"GLPN.* gives each picture a shape of"),
        ({"image_processor_type": "Sam2ImageProcessor"}, r"is written for torchvision, which pare"),
        ({"image_processor_type": "NoImageProcessor"}, r"its image processor cannot be read"),
    ):
        folders.change(folder / "preprocessor_config.json", lambda _, s=settings: s)
        opened = open_file(folder)
        assert opened.inputs[0].shape == (None, 3, 16, 16)
        with pytest.raises(UserError, match=said):
            opened.preprocess({"image": np.zeros((9, 9, 3), np.uint8)})


def test_a_model_of_pictures_with_texts(tmp_path):
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    text = dict(vocab_size=120, max_position_embeddings=16, eos_token_id=3, **sizes)
    config = hf.CLIPConfig(
        text_config=text, vision_config=dict(image_size=16, patch_size=8, **sizes)
    )
    size = {"height": 16, "width": 16}
    processor = hf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size)
    folder = folders.save(tmp_path, hf.CLIPModel(config), folders.tokenizer(), processor)
    opened = open_file(folder)
    assert opened.outputs == ("text_embeds", "image_embeds")
    made = opened.preprocess({"text": "a film", "image": np.zeros((9, 9, 3), np.uint8)})
    assert set(made) == set(opened.example) == {"input_ids", "attention_mask", "pixel_values"}


def test_sound_comes_as_numbers(tmp_path):
    config = hf.Wav2Vec2Config(
        **dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16),
        **dict(conv_dim=(8, 8), conv_stride=(5, 4), conv_kernel=(10, 8)),
        **dict(num_feat_extract_layers=2, num_conv_pos_embeddings=8),
        **dict(num_conv_pos_embedding_groups=2, classifier_proj_size=8, num_labels=3),
    )
    opened = open_file(folders.save(tmp_path, hf.Wav2Vec2ForSequenceClassification(config)))
    assert opened.inputs[0].name == "input_values" and opened.kind == "classification"
    with pytest.raises(UserError, match=r"sound is taken as input_values"):
        opened.preprocess({"audio": [0.0]})
    with torch.no_grad():
        assert opened.module(**opened.example).shape == (1, 3)


# --- many -------------------------------------------------------------------------------------


TURNS = ("t5", "bart")  # an encoder and a decoder that are called in turn
ALONE = ("whisper_encoder",)  # a part, which no config can name


def of_transformers(name):
    """The model of transformers among the architectures of that name; None where it is none."""
    module, _ = make(name)
    if isinstance(module, hf.PreTrainedModel):
        return module
    return next((each for each in module.children() if isinstance(each, hf.PreTrainedModel)), None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_model_of_transformers_computes_the_same(name, tmp_path):
    model = of_transformers(name)
    if model is None:
        pytest.skip("is not of transformers")
    folders.save(tmp_path, model)
    if name in TURNS + ALONE:
        with pytest.raises(UserError, match=r"called in turn|has no model class"):
            open_file(tmp_path)
        return
    opened = open_file(tmp_path)
    wide = {key: torch.cat([value, value.flip(-1)]) for key, value in opened.example.items()}
    found = captured(opened)(**wide)
    found = found if isinstance(found, dict) else {opened.outputs[0]: found}
    with torch.no_grad():
        wanted = model(**wide)
    for key, value in found.items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-4, atol=1e-4)


# --- what is refused -------------------------------------------------------------------------


def config(**entries):
    return lambda folder: folders.change(folder / "config.json", lambda c: c | entries)


def written(name, text):
    return lambda folder: (folder / name).write_text(text)


def renamed(name):
    return lambda folder: (folder / "model.safetensors").rename(folder / name)


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


REFUSED = {
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        r"holds no weights; expected model.safetensors, or",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"is a folder; expected"),
    "pickled": (
        renamed("pytorch_model.bin"),
        r"weights are pickled \(pytorch_model.bin\).* whatever code.*save_pretrained\(folder\)",
    ),
    "of TensorFlow": (renamed("tf_model.h5"), r"holds tf_model.h5 and no model.safetensors"),
    "code": (config(auto_map={"AutoModel": "own.Net"}), r"config.json: auto_map asks for code"),
    "code within": (
        config(text_config={"auto_map": {"AutoModel": "own.Net"}}),
        r"text_config.auto_map asks for code",
    ),
    "trust": (config(trust_remote_code=True), r"trust_remote_code asks for code of the folder"),
    "code of the tokenizer": (
        lambda folder: folders.change(
            folder / "tokenizer_config.json", lambda c: c | {"auto_map": {"A": ["own.T", None]}}
        ),
        r"tokenizer_config.json: auto_map asks for code",
    ),
    "broken JSON": (written("config.json", '{"a": '), r"config.json: is no JSON: Expecting value"),
    "a list": (written("config.json", "[1]"), r"config.json: expected a JSON object, got list"),
    "deep JSON": (written("config.json", "[" * 100_000), r"config.json: is no JSON"),
    "no class": (
        config(architectures=["BertForNothing"]),
        r"transformers .* has no model class 'BertForNothing'; a newer",
    ),
    "another thing": (config(architectures=["os"]), r"has no model class 'os'"),
    "not a model": (config(architectures=["AutoModel"]), r"has no model class 'AutoModel'"),
    "no architecture": (config(architectures=None), r"architectures: expected the name of"),
    "another type": (config(model_type="gpt2"), r"model_type is 'gpt2', and BertForSeq.*'bert'"),
    "another head": (
        config(architectures=["BertForMaskedLM"]),
        r"weights of BertForMaskedLM that the files do not hold, .*random numbers is no model",
    ),
    "cut": (cut, r"model.safetensors: is truncated or damaged"),
    "empty": (written("model.safetensors", ""), r"model.safetensors: is truncated or damaged"),
    "another size": (config(hidden_size=64), r"is \(16,\) in the file and \(64,\) by config.json"),
    "a wrong size": (config(hidden_size="16"), r"cannot be built of it: Validation error .*str"),
    "much larger": (
        config(vocab_size=10**9),
        r"config.json is of a model with 16,000,\d+,\d+ weights, and the files have",
    ),
    "quantized": (
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
        r"quantization_config: its weights are quantized already; bring the float model",
    ),
    "an adapter": (written("adapter_config.json", "{}"), r"holds an adapter; merge it"),
    "a broken tokenizer": (written("tokenizer.json", "{"), r"its tokenizer cannot be read"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_is_told(what, changed):
    how, said = REFUSED[what]
    how(changed)
    with pytest.raises(UserError, match=said) as told:
        open_file(changed)
    assert str(told.value).endswith(".") and "\n" not in str(told.value)


def test_code_in_the_folder_is_never_run(changed):
    """Also where the config does not ask for it."""
    (changed / "custom_generate").mkdir()
    for name in ("custom_generate/generate.py", "modeling_own.py", "configuration_own.py"):
        (changed / name).write_text(f"open({str(changed / 'ran')!r}, 'w')\n")
    config(custom_generate="generate", _attn_implementation="someone/kernel")(changed)
    assert open_file(changed).outputs == ("logits",)
    assert not (changed / "ran").exists()


def test_without_a_tokenizer_numbers_are_taken_and_texts_told(changed):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (changed / name).unlink()
    opened = open_file(changed)
    assert set(opened.example) == {"input_ids", "attention_mask"}
    with torch.no_grad():
        assert opened.module(input_ids=torch.tensor([[2, 5, 3]])).shape == (1, 2)
    with pytest.raises(UserError, match=r"has no tokenizer .* texts cannot: save the tokenizer"):
        opened.preprocess({"text": "a"})


def test_a_tokenizer_of_another_model_is_told(changed):
    other = folders.tokenizer()
    other.add_tokens(["one", "two", "three"])
    other.add_tokens(["quick"], special_tokens=True)
    other.save_pretrained(changed)
    with pytest.raises(UserError, match=r"tokenizer gives input_ids up to 1.* 120 embeddings"):
        open_file(changed)


def test_weights_that_nothing_takes_are_a_note(changed):
    config(architectures=["BertModel"])(changed)
    opened = open_file(changed)
    assert "2 weights of the file that BertModel has no place for, such as" in opened.notes[0]


def test_an_encoder_with_a_decoder_is_told(tmp_path):
    sizes = dict(d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2, vocab_size=120)
    folder = folders.save(tmp_path, hf.T5ForConditionalGeneration(hf.T5Config(**sizes)))
    with pytest.raises(UserError, match=r"has an encoder and a decoder that are called in turn"):
        open_file(folder)


def listed(place, path, kind):
    return {
        "idx": place,
        "name": str(place),
        "path": path,
        "type": f"sentence_transformers.m.{kind}",
    }


def test_layers_behind_the_pooling_are_read(tmp_path):
    folder = folders.encoder(tmp_path / "encoder")
    layer = torch.nn.Linear(16, 6)
    (folder / "2_Dense").mkdir()
    held = {"linear.weight": layer.weight.data, "linear.bias": layer.bias.data}
    save_file(held, folder / "2_Dense" / "model.safetensors")
    settings = {"activation_function": "torch.nn.modules.activation.Tanh"}
    folders.change(folder / "2_Dense" / "config.json", lambda _: settings)
    dense = listed(2, "2_Dense", "Dense")
    folders.change(folder / "modules.json", lambda modules: [*modules[:2], dense])
    prompts = {"prompts": {"query": "that is "}, "default_prompt_name": "query"}
    folders.change(folder / "config_sentence_transformers.json", lambda _: prompts)
    opened = open_file(folder)
    batch = {name: value[None] for name, value in opened.preprocess({"text": "a film"}).items()}
    plain = hf.AutoTokenizer.from_pretrained(folder)("that is a film", return_tensors="pt")
    assert batch["input_ids"][0, : plain.input_ids.shape[1]].tolist() == plain.input_ids[0].tolist()
    tokens = as_transformers(folder, "BertModel", **plain).last_hidden_state
    wanted = torch.tanh(layer(tokens.mean(dim=1))).detach()
    model = captured(opened)
    torch.testing.assert_close(model(**batch), wanted)
    assert "behind_pooling.0.weight" in model.state_dict()
    folders.change(
        folder / "1_Pooling" / "config.json", lambda config: config | {"include_prompt": False}
    )
    with pytest.raises(
        UserError, match=r"'that is ' before each text and its tokens are not to be"
    ):
        open_file(folder)


def test_what_sentence_transformers_has_more_is_told(tmp_path):
    folder = folders.encoder(tmp_path / "encoder")
    kept = (folder / "modules.json").read_text()
    folders.change(folder / "modules.json", lambda modules: [*modules, listed(3, "3_CNN", "CNN")])
    with pytest.raises(UserError, match=r"has a layer 'CNN'; expected Transformer, Pooling"):
        open_file(folder)
    for text in ("{}", kept.replace("1_Pooling", "../1_Pooling"), "[1]"):
        (folder / "modules.json").write_text(text)
        with pytest.raises(UserError, match=r"modules.json: (expected|names|has no Pooling)"):
            open_file(folder)


def test_nothing_is_fetched_and_the_settings_come_back(sentiment, monkeypatch):
    import socket

    from huggingface_hub import constants

    def refused(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    before = constants.HF_HUB_OFFLINE, hf.utils.logging.get_verbosity()
    open_file(sentiment)
    assert before == (constants.HF_HUB_OFFLINE, hf.utils.logging.get_verbosity())
    assert "HF_HUB_OFFLINE" not in os.environ
    with loaded.offline():
        assert constants.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == "1"


def test_the_origin_is_known_from_its_own_card(changed):
    assert open_file(changed).card["name"] == "changed"
    (changed / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage:\n- en\nmodel-index:\n- name: x\n---\n# Films\n"
    )
    opened = open_file(changed)
    assert opened.card == {
        "name": "changed",
        "license": "apache-2.0",
        "language": "en",
        "architecture": "BertForSequenceClassification",
    }
    assert {path.name for path in opened.files} == {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert json.loads((changed / "config.json").read_text()) and copy.deepcopy(opened.module)
