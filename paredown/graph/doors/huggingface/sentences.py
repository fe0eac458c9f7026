"""What sentence-transformers puts behind an encoder: one vector of a text's tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from paredown.core.errors import UserError
from paredown.graph.doors.huggingface import weights
from paredown.graph.doors.huggingface.folder import settings

MODULES = "modules.json"
ENCODER, PROMPTS = "sentence_bert_config.json", "config_sentence_transformers.json"
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "Identity": nn.Identity,
    "Tanh": nn.Tanh,
    "ReLU": nn.ReLU,
    "GELU": nn.GELU,
}
POOLINGS = ("cls", "mean", "max", "mean_sqrt_len_tokens")


@dataclass(frozen=True)
class Pool:
    """Tokens (B, length, features) and their mask (B, length) -> one vector (B, features).

    Attributes:
        layers: what the vector goes through behind that.

    Example:
        >>> tokens = torch.tensor([[[3.0, 0.0], [1.0, 8.0], [9.0, 9.0]]])
        >>> Pool(("mean",), nn.Sequential()).of(tokens, torch.tensor([[1, 1, 0]]))
        tensor([[2., 4.]])
    """

    ways: tuple[str, ...]
    layers: nn.Sequential

    def of(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            mask = torch.ones_like(tokens[..., 0])
        kept = mask.to(tokens.dtype).unsqueeze(-1)  # (B, length, 1)
        return torch.cat([_pooled(way, tokens, kept) for way in self.ways], dim=1)


class Normalize(nn.Module):
    """Vectors (B, features) of length one."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=1)


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
    layers: list[nn.Module] = []
    for name, where in _modules(file):
        if name == "Pooling" and not layers:
            ways = _ways(path / where / "config.json")
        elif name == "Normalize":
            layers.append(Normalize())
        elif name == "Dense":
            layers += _dense(path / where)
        elif name != "Transformer":
            raise UserError(
                f"{file}: has a layer {name!r}; expected Transformer, Pooling, Dense and "
                "Normalize: put it behind the model in model() of a Python file."
            )
    if not ways:
        raise UserError(f"{file}: has no Pooling, which makes one vector of a text's tokens.")
    return Pool(ways, nn.Sequential(*layers))


def _dense(folder: Path) -> list[nn.Module]:
    """A linear layer with its weights, and its activation."""
    read = settings(folder / "config.json")
    name = str(read.get("activation_function", "Identity")).rpartition(".")[2]
    if name not in ACTIVATIONS or not (folder / weights.WHOLE).is_file():
        what = f"activation {name}" if name not in ACTIVATIONS else f"no {weights.WHOLE}"
        raise UserError(
            f"{folder}: has {what}; expected {', '.join(ACTIVATIONS)} and weights in "
            f"{weights.WHOLE}."
        )
    weights.dtypes((folder / weights.WHOLE,))
    held = load_file(folder / weights.WHOLE)
    weight, bias = held.get("linear.weight"), held.get("linear.bias")
    if weight is None or weight.dim() != 2:
        raise UserError(f"{folder / weights.WHOLE}: holds no linear.weight of a layer.")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return [layer, ACTIVATIONS[name]()]


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


def before_tokens(path: Path) -> tuple[str, bool]:
    """What is put before each text, and whether it is made lower case.

    Raises:
        UserError: the pooling leaves out the tokens of what is put before, which is not read.
    """
    lower = settings(path / ENCODER).get("do_lower_case") if (path / ENCODER).is_file() else False
    prompts = settings(path / PROMPTS) if (path / PROMPTS).is_file() else {}
    named, texts = prompts.get("default_prompt_name"), prompts.get("prompts") or {}
    prompt = str(texts.get(named) or "") if named and isinstance(texts, dict) else ""
    pooling = next((w for name, w in _listed(path) if name == "Pooling"), None)
    if prompt and pooling is not None:
        if settings(path / pooling / "config.json").get("include_prompt") is False:
            raise UserError(
                f"{path / PROMPTS}: puts {prompt!r} before each text and its tokens are not to be "
                "pooled, which is not read; put the pooling into model() of a Python file."
            )
    return prompt, bool(lower)


def _listed(path: Path) -> list[tuple[str, str]]:
    return _modules(path / MODULES) if (path / MODULES).is_file() else []
