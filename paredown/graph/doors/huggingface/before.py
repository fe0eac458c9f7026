"""What comes before a model of transformers: its inputs, and what makes them of a sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paredown.core.errors import UserError
from paredown.graph.doors.huggingface import called, pictures, sentences, texts
from paredown.graph.doors.opened import Wanted

IDS, PIXELS, WAVE = "input_ids", "pixel_values", "input_values"
TEXT = (IDS, "attention_mask", "token_type_ids")
# Heads over encoder and decoder that one call is for; it makes the decoder's input of the text.
ONE_CALL = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
SECOND = 16_000  # numbers of a sound
SIDE = 224  # pixels, where nothing says how large pictures are

Made = dict[str, Tensor]


@dataclass(frozen=True)
class Before:
    """A model's inputs, and how they are made of raw samples.

    Attributes:
        example: of a batch of one.
        columns: the columns that ``preprocess`` reads, of which it takes those that are there.
        notes: sentences on what it does.
        usage: Python that does the same without this package, and makes ``inputs``.
    """

    example: Made
    preprocess: Callable[[dict[str, Any]], Made]
    columns: tuple[str, ...]
    notes: tuple[str, ...] = ()
    usage: str = ""


@dataclass(frozen=True)
class Lacking:
    """In the place of what would make inputs of a sample: says what is missing."""

    what: str

    def __call__(self, raw: dict[str, Any]) -> Made:
        raise UserError(self.what)


@dataclass(frozen=True)
class Both:
    """Of a model that takes pictures with texts."""

    parts: tuple[Callable[[dict[str, Any]], Made], ...]

    def __call__(self, raw: dict[str, Any]) -> Made:
        return {name: value for part in self.parts for name, value in part(raw).items()}


def before(path: Path, model: nn.Module) -> Before:
    """What a folder has before its model.

    Raises:
        UserError: the model takes something else than texts, pictures and sound.
    """
    takes = called.takes(model)
    one_call = type(model).__name__.endswith(ONE_CALL)
    if "decoder_input_ids" in takes and not one_call:
        raise UserError(
            f"{path}: {type(model).__name__} has an encoder and a decoder that are called in turn, "
            "and a file holds one call; load the half that you deploy in model() of a Python file."
        )
    parts = []
    if IDS in takes:
        parts.append(_text(path, model, takes))
    if PIXELS in takes:
        parts.append(_picture(path, model))
    if WAVE in takes:
        parts.append(_sound())
    if not parts:
        raise UserError(
            f"{path}: {type(model).__name__} takes {', '.join(takes[:3])}; expected a model of "
            f"texts ({IDS}), pictures ({PIXELS}) or sound ({WAVE}): load it in model() of a Python "
            "file, with an example of its inputs in task()."
        )
    return parts[0] if not parts[1:] else _joined(parts)


def _joined(parts: list[Before]) -> Before:
    return Before(
        {name: value for part in parts for name, value in part.example.items()},
        Both(tuple(part.preprocess for part in parts)),
        tuple(name for part in parts for name in part.columns),
        tuple(note for part in parts for note in part.notes),
    )


def _text(path: Path, model: nn.Module, takes: tuple[str, ...]) -> Before:
    columns = tuple(dict.fromkeys(name for each in texts.COLUMNS for name in each))
    found = texts.tokenizer(path)
    length, said = texts.length_of(path, found, model)
    if found is None:
        names = tuple(name for name in TEXT[:2] if name in takes)
        example = texts.example(length, _vocabulary(model), names)
        return Before(example, Lacking(f"{path}: {texts.MISSING}."), columns, (texts.MISSING,))
    pads = texts.padded(found, model)
    names = texts.names(found, takes)
    made = texts.Texts(found, names, length, *sentences.before_tokens(path))
    sample = made({"text": texts.SENTENCE * (length // 8 + 1)})
    example = {name: value.unsqueeze(0) for name, value in sample.items()}
    largest = int(example[IDS].max())
    if largest >= _vocabulary(model):
        raise UserError(
            f"{path}: its tokenizer gives {IDS} up to {largest} and the model has "
            f"{_vocabulary(model)} embeddings: they do not belong together."
        )
    notes = (said, *([pads] if pads else []))
    return Before(example, made, columns, notes, texts.usage(made, bool(pads)))


def _vocabulary(model: Any) -> int:
    """How many tokens the model knows."""
    try:
        return int(model.get_input_embeddings().num_embeddings)
    except (NotImplementedError, AttributeError):  # such as one of texts and pictures
        return int(getattr(model.config.get_text_config(), "vocab_size", 2))


def _picture(path: Path, model: nn.Module) -> Before:
    """Of pictures; where its processor cannot be used, samples may still have what it makes."""
    try:
        found = pictures.processor(path)
        if found is None:
            raise UserError(f"{pictures.MISSING}.")
        made, note = pictures.fixed(pictures.Pictures(found, (PIXELS,)))
    except UserError as error:
        example, said = _pixels(model)
        lacking = Lacking(f"{path}: {error}")
        return Before(example, lacking, (pictures.COLUMN,), (str(error).rstrip("."), *said))
    sample = made({pictures.COLUMN: pictures.grey()})
    example = {name: value.unsqueeze(0) for name, value in sample.items()}
    notes = (note,) if note else ()
    return Before(example, made, (pictures.COLUMN,), notes, pictures.usage(made))


def _pixels(model: nn.Module) -> tuple[Made, tuple[str, ...]]:
    """A picture as the config tells it."""
    config: Any = model.config
    vision = getattr(config, "vision_config", None) or config
    side = getattr(vision, "image_size", None)
    said = () if side else (f"nothing tells the size of its pictures; {SIDE} x {SIDE} is taken",)
    sides = side if isinstance(side, (list, tuple)) else (side or SIDE,) * 2
    channels = int(getattr(vision, "num_channels", None) or 3)
    noise = torch.rand(
        (1, channels, int(sides[0]), int(sides[1])), generator=torch.Generator().manual_seed(0)
    )
    return {PIXELS: noise}, said


def _sound() -> Before:
    wave = torch.randn((1, SECOND), generator=torch.Generator().manual_seed(0))
    lacking = Lacking(
        f"samples: sound is taken as {WAVE}, numbers as the model wants them (one channel at its "
        "sampling rate, normalised where it was trained so); no file of sound is read."
    )
    note = f"sound is taken as {WAVE}; its example has {SECOND} numbers"
    return Before({WAVE: wave}, lacking, ("audio",), (note,))


def wanted(name: str, value: Tensor) -> Wanted:
    """An input as its example tells of it."""
    sizes: list[int | str | None] = [None, *value.shape[1:]]
    for dim, called_ in (varying(name) or {}).items():
        sizes[dim] = called_
    optional = name in TEXT[1:]
    return Wanted(name, str(value.dtype).removeprefix("torch."), tuple(sizes), optional)


def varying(name: str) -> dict[int, str] | None:
    """The dimensions of an input that vary besides the batch."""
    return {1: "length"} if name in (*TEXT, WAVE) else None
