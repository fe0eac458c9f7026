"""Small Hugging Face folders of random weights, as save_pretrained writes them."""

import json
from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = (
    "the quick brown fox jumps over the lazy dog while the band plays on .",
    "a good film , and a bad one : the first was well made , the second was not .",
    "paris is the capital of france , and people there say : what is that ?",
)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def tokenizer(**settings):
    """A WordPiece tokenizer, trained on the sentences above."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL, show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = ("input_ids", "token_type_ids", "attention_mask")
    tokens = {f"{each[1:-1].lower()}_token": each for each in SPECIAL}
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made,
        **tokens | {"model_max_length": 24, "model_input_names": list(names)} | settings,
    )


def bert(**settings):
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    return hf.BertConfig(vocab_size=120, max_position_embeddings=24, **sizes | settings)


def save(folder: Path, model, *more) -> Path:
    hf.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    for each in (model.eval(), *more):
        each.save_pretrained(folder)
    return folder


def sentiment(folder: Path) -> Path:
    labels = {0: "bad", 1: "good"}
    torch.manual_seed(0)
    model = hf.BertForSequenceClassification(bert(num_labels=2, id2label=labels))
    return save(folder, model, tokenizer())


def encoder(folder: Path) -> Path:
    """As sentence-transformers saves it: mean of the tokens, of length one."""
    torch.manual_seed(0)
    save(folder, hf.BertModel(bert(), add_pooling_layer=False), tokenizer())
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    listed = [
        {
            "idx": place,
            "name": str(place),
            "path": path,
            "type": f"sentence_transformers.models.{t}",
        }
        for place, (path, t) in enumerate(kinds.items())
    ]
    change(folder / "modules.json", lambda _: listed)
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True}
    change(folder / "1_Pooling" / "config.json", lambda _: pooling)
    change(folder / "sentence_bert_config.json", lambda _: {"max_seq_length": 16})
    return folder


def pictures(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    config = hf.ViTConfig(image_size=16, patch_size=8, num_labels=3, **sizes)
    size = {"height": 16, "width": 16}
    return save(folder, hf.ViTForImageClassification(config), hf.ViTImageProcessorPil(size=size))


def convolutions(folder: Path) -> Path:
    torch.manual_seed(0)
    config = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return save(folder, hf.ResNetForImageClassification(config))


def change(path: Path, how) -> None:
    """Rewrite a JSON file, or write it."""
    path.write_text(json.dumps(how(json.loads(path.read_text()) if path.exists() else None)))
