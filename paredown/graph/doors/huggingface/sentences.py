"""What sentence-transformers puts behind an encoder: one vector of a text's tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paredown.core.errors import UserError
from paredown.graph.doors.huggingface.folder import settings

MODULES = "modules.json"
POOLINGS = ("cls", "mean", "max", "mean_sqrt_len_tokens")


@dataclass(frozen=True)
class Pool:
    """Tokens (B, length, features) and their mask (B, length) -> one vector (B, features).

    Example:
        >>> tokens = torch.tensor([[[3.0, 0.0], [1.0, 8.0], [9.0, 9.0]]])
        >>> Pool(("mean",), normalized=False)(tokens, torch.tensor([[1, 1, 0]]))
        tensor([[2., 4.]])
    """

    ways: tuple[str, ...]
    normalized: bool

    def __call__(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            mask = torch.ones_like(tokens[..., 0])
        kept = mask.to(tokens.dtype).unsqueeze(-1)  # (B, length, 1)
        made = torch.cat([_pooled(way, tokens, kept) for way in self.ways], dim=1)
        return torch.nn.functional.normalize(made, dim=1) if self.normalized else made


def _pooled(way: str, tokens: Tensor, kept: Tensor) -> Tensor:
    if way == "cls":
        return tokens[:, 0]
    if way == "max":
        return tokens.masked_fill(kept == 0, -1e9).amax(dim=1)
    count = kept.sum(dim=1).clamp(min=1e-9)
    return (tokens * kept).sum(dim=1) / (count if way == "mean" else count.sqrt())


def pool_of(path: Path) -> Pool | None:
    """What a folder of sentence-transformers asks for behind its encoder; None where it is none.

    Raises:
        UserError: it has layers there that are not read.
    """
    file = path / MODULES
    if not file.is_file():
        return None
    ways: tuple[str, ...] = ()
    normalized = False
    for name, where in _modules(file):
        if name == "Pooling":
            ways = _ways(path / where / "config.json")
        elif name == "Normalize":
            normalized = True
        elif name != "Transformer":
            raise UserError(
                f"{file}: has a layer {name!r}; expected Transformer, Pooling and Normalize alone: "
                "put it behind the model in model() of a Python file."
            )
    if not ways:
        raise UserError(f"{file}: has no Pooling, which makes one vector of a text's tokens.")
    return Pool(ways, normalized)


def _modules(file: Path) -> list[tuple[str, str]]:
    """The kind of each module, and its folder."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        listed = [(str(each["type"]).rpartition(".")[2], str(each["path"])) for each in found]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(
            f"{file}: expected a list of modules with type and path, as sentence-transformers "
            "writes it."
        ) from error
    for _, where in listed:
        if Path(where).is_absolute() or ".." in Path(where).parts:
            raise UserError(f"{file}: names {where!r}; expected a folder within its own.")
    return listed


def _ways(file: Path) -> tuple[str, ...]:
    read: dict[str, Any] = settings(file)
    named = read.get("pooling_mode")
    if isinstance(named, str):
        asked = {named}
    else:
        asked = {k.removeprefix("pooling_mode_") for k, v in read.items() if v is True}
        asked -= {"include_prompt"}
    plain = {way.removesuffix("_tokens").removesuffix("_token") for way in asked}
    ways = {"mean_sqrt_len_tokens" if way == "mean_sqrt_len" else way for way in plain}
    unknown = sorted(ways - set(POOLINGS))
    if unknown or not ways:
        said = ", ".join(unknown) or "none"
        raise UserError(f"{file}: pools by {said}; expected {', '.join(POOLINGS)}.")
    return tuple(way for way in POOLINGS if way in ways)
