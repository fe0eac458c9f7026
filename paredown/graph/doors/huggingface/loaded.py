"""The model of a Hugging Face folder, as transformers builds it: nothing from elsewhere."""

from __future__ import annotations

import contextlib
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
FLAGS = ("output_hidden_states", "output_attentions", "output_scores")  # more than the outputs
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

    logging = hf.utils.logging
    before = constants.HF_HUB_OFFLINE, logging.get_verbosity(), logging.is_progress_bar_enabled()
    given = os.environ.get("HF_HUB_OFFLINE")
    constants.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        constants.HF_HUB_OFFLINE = before[0]
        os.environ.pop("HF_HUB_OFFLINE")
        if given is not None:
            os.environ["HF_HUB_OFFLINE"] = given
        logging.set_verbosity(before[1])
        if before[2]:
            logging.enable_progress_bar()


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
    found: Any = getattr(hf, name, None) if name.isidentifier() and name[:1].isupper() else None
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
    model, info = _from_pretrained(kind, path, {})
    missing = sorted(info["missing_keys"])
    if missing and all("pooler" in name for name in missing) and _takes(kind, POOLER):
        model, info = _from_pretrained(kind, path, {POOLER: False})
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
    return _settled(model), notes


def _takes(kind: Any, argument: str) -> bool:
    import inspect

    return argument in inspect.signature(kind.__init__).parameters


def _from_pretrained(
    kind: Any, path: Path, more: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    how: dict[str, Any] = {"attn_implementation": "sdpa" if kind._supports_sdpa else "eager"}
    if kind._can_set_experts_implementation():
        how["experts_implementation"] = "batched_mm"  # the others are ops of transformers' own
    try:
        with offline():
            model, info = kind.from_pretrained(
                path.resolve(),
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told below, all of them
                **how,
                **more,
            )
    except Exception as error:
        said = str(error).strip().splitlines()
        reason = said[0] if said else type(error).__name__
        raise UserError(f"{path}: {kind.__name__} cannot be built of it: {reason}") from error
    return model, info


def _settled(model: Any) -> nn.Module:
    """Without what is for generating, or for looking inside."""
    for config in {id(each): each for each in _configs(model)}.values():
        config.return_dict = True
        if getattr(config, "use_cache", None):
            config.use_cache = False
        for flag in FLAGS:
            if getattr(config, flag, False):
                setattr(config, flag, False)
    settled: nn.Module = model.eval()
    return settled


def _configs(model: nn.Module) -> Iterator[Any]:
    """The config of each part; parts have copies of it, or parts of it."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "to_dict"):
            yield config
