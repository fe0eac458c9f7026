"""The model of a Hugging Face folder, as transformers builds it: nothing from elsewhere."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paredown.core.errors import UserError
from paredown.graph.doors.huggingface import weights
from paredown.graph.doors.huggingface.folder import CONFIG

EXTRA = "install it with: pip install 'paredown[huggingface]'"
SMALL = 1 << 20  # weights that do not matter
LEFT_OUT = (
    "output_hidden_states",
    "output_attentions",
    "output_router_logits",
    "return_dict",
    "torchscript",
    "gradient_checkpointing",
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
)
POOLER = "add_pooling_layer"


def library() -> Any:
    """The package transformers.

    Raises:
        UserError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"a Hugging Face folder is read by transformers, which is not installed; {EXTRA}."
        ) from error
    return transformers


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Within it nothing is fetched, and transformers neither logs nor draws a bar."""
    hf = library()
    from huggingface_hub import constants

    own, said = hf.utils.logging, logging.root.manager.disable
    before = constants.HF_HUB_OFFLINE, own.get_verbosity(), own.is_progress_bar_enabled()
    given = os.environ.get("HF_HUB_OFFLINE")
    constants.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"
    own.set_verbosity(own.CRITICAL)
    logging.disable(max(said, logging.WARNING))  # also of what it imports
    own.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        constants.HF_HUB_OFFLINE = before[0]
        os.environ.pop("HF_HUB_OFFLINE")
        if given is not None:
            os.environ["HF_HUB_OFFLINE"] = given
        own.set_verbosity(before[1])
        logging.disable(said)
        if before[2]:
            own.enable_progress_bar()


def architecture(path: Path, config: dict[str, Any]) -> Any:
    """The class of transformers that a config names.

    Raises:
        UserError: it names none, or none that there is.
    """
    hf = library()
    named = config.get("architectures")
    if not isinstance(named, list) or not named or not all(isinstance(each, str) for each in named):
        raise UserError(
            f"{path / CONFIG}: architectures: expected the name of the model's class, such as "
            f'["BertForSequenceClassification"], got {named!r}; save_pretrained of a model with '
            "its head writes it."
        )
    name = named[0]
    with offline():
        is_class = name.isidentifier() and name[:1].isupper()
        found: Any = getattr(hf, name, None) if is_class else None
    if not isinstance(found, type) or not issubclass(found, hf.PreTrainedModel):
        raise UserError(
            f"{path / CONFIG}: architectures: transformers {hf.__version__} has no model class "
            f"{name!r}; a newer transformers may have it, else load it in model() of a Python file."
        )
    chosen: Any = found
    kind, expected = config.get("model_type"), getattr(chosen.config_class, "model_type", None)
    if kind != expected:
        raise UserError(
            f"{path / CONFIG}: model_type is {kind!r}, and {name} is of {expected!r}; one of the "
            "two is wrong."
        )
    return chosen


def load(path: Path, config: dict[str, Any]) -> tuple[nn.Module, list[str]]:
    """The model with all its weights in float32, and sentences on what was done.

    Raises:
        UserError: weights are missing, or of other shapes, or the class cannot be built.
    """
    kind = architecture(path, config)
    parts = weights.files(path)
    notes = [said] if (said := weights.note(weights.dtypes(parts))) else []
    model, info = _from_pretrained(kind, path, config, {})
    missing = sorted(info["missing_keys"])
    if missing and all("pooler" in name for name in missing) and _takes(kind, POOLER):
        model, info = _from_pretrained(kind, path, config, {POOLER: False})
        missing = sorted(info["missing_keys"])
        notes.append("the file holds no weights for its pooler, which is left out")
    if missing:
        count = f"{len(missing)} weights" if missing[1:] else "a weight"
        raise UserError(
            f"{path}: {count} of {kind.__name__} that the files do not hold, {missing[0]} first; a "
            "head of random numbers is no model: train it and save it with save_pretrained, or "
            f"name in {CONFIG} the architecture that the weights are of."
        )
    wrong = sorted(info["mismatched_keys"])
    if wrong:
        name, there, wanted = wrong[0]
        raise UserError(
            f"{path}: {name} is {tuple(there)} in the file and {tuple(wanted)} by {CONFIG}."
        )
    more = sorted(info["unexpected_keys"])
    if more:
        what = f"{len(more)} weights" if more[1:] else "the weight"
        notes.append(f"{what} of the file that {kind.__name__} has no place for, such as {more[0]}")
    return model.eval(), notes


def _takes(kind: Any, argument: str) -> bool:
    return argument in inspect.signature(kind.__init__).parameters


def _from_pretrained(
    kind: Any, path: Path, config: dict[str, Any], more: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    try:
        with offline():
            made = _config(kind, config)
            _refuse_larger(kind, made, path, more)
            model, info = kind.from_pretrained(
                path.resolve(),
                config=made,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told by the caller, all of them
                **more,
            )
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{path}: {kind.__name__} cannot be built of it: {reason(error)}."
        ) from error
    return model, info


def reason(error: Exception) -> str:
    """What an error of transformers says, in a line.

    Example:
        >>> reason(ValueError("Wrong:\\n  too large\\n  see there"))
        'Wrong: too large'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return said.rstrip(".")


def _config(kind: Any, config: dict[str, Any]) -> Any:
    """Of a model that is called once and gives its outputs alone, by ops that can be captured."""
    made = kind.config_class.from_dict(_once(config))
    made._attn_implementation = "sdpa" if kind._supports_sdpa else "eager"
    if kind._can_set_experts_implementation():
        made._experts_implementation = "batched_mm"  # the others are ops of transformers' own
    for part in (made, *(getattr(made, name, None) for name in made.sub_configs)):
        if getattr(part, "use_cache", None):
            part.use_cache = False
    return made


def _once(config: dict[str, Any]) -> dict[str, Any]:
    """Without what is for generating, for looking inside, or for other machines."""
    return {
        name: _once(value) if isinstance(value, dict) and name.endswith("_config") else value
        for name, value in config.items()
        if name not in LEFT_OUT
    }


def _refuse_larger(kind: Any, config: Any, path: Path, more: dict[str, Any]) -> None:
    """Refuse a config of a model that is much larger than its files, before it takes memory."""
    with torch.device("meta"):
        model = kind(copy.deepcopy(config), **more)
    asked = sum(each.numel() for each in model.parameters())
    there = sum(each.stat().st_size for each in weights.files(path))
    if asked > there + SMALL:  # a weight has at least one byte
        raise UserError(
            f"{path}: {CONFIG} is of a model with {asked:,} weights, and the files have {there:,} "
            "bytes; one of the two is of another model."
        )
