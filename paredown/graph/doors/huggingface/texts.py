"""Texts -> a model's inputs, by the tokenizer of its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paredown.core.errors import UserError
from paredown.graph.doors.huggingface.folder import settings
from paredown.graph.doors.huggingface.loaded import library, offline, reason

LENGTH = 128  # tokens, where the model takes more
COLUMNS = (  # of a text, or of two
    ("text",),
    ("sentence",),
    ("question", "context"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
)
VOCABULARY = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
FILES = ("tokenizer_config.json", *VOCABULARY)
MISSING = (
    "the folder has no tokenizer (tokenizer.json); samples with input_ids can be given, texts "
    "cannot: save the tokenizer into the folder with its save_pretrained"
)
SENTENCE = "The quick brown fox jumps over the lazy dog while the band plays on. "


@dataclass(frozen=True)
class Texts:
    """From a dict with the columns of a text, or of two, to the model's inputs.

    Attributes:
        names: the inputs that the model takes of the tokenizer's.
        length: tokens that a text is cut or padded to.
        prompt: what is put before each text.
        lower: whether texts are made lower case.
    """

    tokenizer: Any
    names: tuple[str, ...]
    length: int
    prompt: str = ""
    lower: bool = False

    def __call__(self, raw: dict[str, Any]) -> dict[str, Tensor]:
        columns = next((each for each in COLUMNS if all(name in raw for name in each)), None)
        if columns is None:
            raise UserError(
                f"samples: hold {', '.join(raw) or 'no column'}; expected a text under one of "
                f"{', '.join(' + '.join(each) for each in COLUMNS)}."
            )
        texts = [raw[name] for name in columns]
        for name, text in zip(columns, texts, strict=True):
            if not isinstance(text, str):
                raise UserError(
                    f"samples: {name}: expected a text, got {type(text).__name__} ({text!r:.40})."
                )
        cut = "only_second" if columns == ("question", "context") else True
        texts = [self.prompt + (text.lower() if self.lower else text) for text in texts]
        made = self.tokenizer(
            *texts,
            padding="max_length",
            truncation=cut,
            max_length=self.length,
            return_tensors="pt",
        )
        return {name: made[name][0] for name in self.names}


def usage(made: Texts, pads: bool) -> str:
    """The same in a few lines, for whoever has the folder and not this package.

    Args:
        pads: whether the tokenizer was given something to pad with.
    """
    text = f'{made.prompt!r} + "A text."' if made.prompt else '"A text."'
    text += ".lower()" if made.lower else ""
    padding = f"tokenizer.pad_token = {made.tokenizer.pad_token!r}\n" if pads else ""
    return f"""from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
{padding}length = dict(padding="max_length", truncation=True, max_length={made.length})
inputs = tokenizer([{text}], **length, return_tensors="np")
inputs = {{name: inputs[name].astype("int64") for name in {list(made.names)}}}"""


def tokenizer(path: Path) -> Any | None:
    """The folder's tokenizer; None where there is none.

    Raises:
        UserError: it is damaged, or needs what is not installed.
    """
    if not any((path / name).is_file() for name in FILES):
        return None
    try:
        with offline():
            return library().AutoTokenizer.from_pretrained(
                path.resolve(), local_files_only=True, trust_remote_code=False
            )
    except Exception as error:
        if not any((path / name).is_file() for name in VOCABULARY):
            return None
        raise UserError(f"{path}: its tokenizer cannot be read: {reason(error)}.") from error


def length_of(path: Path, found: Any, model: nn.Module) -> tuple[int, str]:
    """The tokens that texts are cut and padded to, and a sentence on that."""
    most = _most(path, found, model)
    length = LENGTH if most is None else min(most, LENGTH)
    told = "takes any number" if most is None else f"takes up to {most}"
    more = (
        "; for longer ones write task() in a Python file" if most is None or most > length else ""
    )
    return length, f"texts are cut and padded to {length} tokens; the model {told}{more}"


def _most(path: Path, found: Any, model: nn.Module) -> int | None:
    """The most tokens that model and tokenizer take, where they say so."""
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limits = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions")]
    for name, module in model.named_modules():
        offset = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # such as RoBERTa's, whose positions begin behind that of the padding
            limits.append(module.num_embeddings - (0 if offset is None else offset + 1))
    limits.append(getattr(found, "model_max_length", None))
    encoder = path / "sentence_bert_config.json"
    if encoder.is_file():
        limits.append(settings(encoder).get("max_seq_length"))
    known = [int(each) for each in limits if isinstance(each, (int, float)) and 0 < each < 1 << 24]
    return min(known, default=None)


def padded(found: Any, model: nn.Module) -> str | None:
    """Give a tokenizer that pads nothing something to pad with; a sentence where it was so.

    Raises:
        UserError: it has nothing that could be taken for it.
    """
    if found.pad_token is not None:
        return None
    found.pad_token = found.eos_token or found.unk_token
    if found.pad_token is None:
        raise UserError(
            "tokenizer: has no token to pad with, and no end of text to take for it; set "
            "tokenizer.pad_token and save it into the folder."
        )
    one_token = type(model).__name__.endswith("ForSequenceClassification")
    if one_token and found.pad_token_id in found("a")["input_ids"]:
        raise UserError(  # the last that is not padding decides, and would be another
            f"tokenizer: has no token to pad with, and {found.pad_token!r}, which it could take, "
            "is part of every text; set tokenizer.pad_token and save it into the folder."
        )
    config: Any = model.config
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = found.pad_token_id
    return f"its tokenizer has no token to pad with, so {found.pad_token!r} is taken for it"


def names(found: Any, takes: tuple[str, ...]) -> tuple[str, ...]:
    """The inputs that the tokenizer gives and the model takes, in the model's order."""
    given = found("a")
    return tuple(name for name in takes if name in given)


def example(length: int, vocabulary: int, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Inputs of one text as they are where there is no tokenizer to make them."""
    ids = torch.randint(0, vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
    fills = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {name: fills.get(name, torch.zeros_like(ids)) for name in names}
