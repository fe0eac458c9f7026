"""Small, randomly weighted models of many architectures, for tests to run over."""

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import (
    conv_nets,
    dense,
    generative,
    language,
    light_nets,
    mixed,
    residual_nets,
    sequence,
    structure,
    vision_transformers,
)
from .entry import Architecture, Inputs
from .failures import FAILING, KNOWN_FAILURES

__all__ = [
    "ARCHITECTURES",
    "FAILING",
    "KNOWN_FAILURES",
    "Architecture",
    "call",
    "make",
    "randomise",
    "with_batch",
]

ARCHITECTURES: dict[str, Architecture] = {
    **residual_nets.ENTRIES,
    **conv_nets.ENTRIES,
    **light_nets.ENTRIES,
    **dense.ENTRIES,
    **generative.ENTRIES,
    **vision_transformers.ENTRIES,
    **language.ENTRIES,
    **sequence.ENTRIES,
    **mixed.ENTRIES,
    **structure.ENTRIES,
}


def make(name: str, seed: int = 0) -> tuple[nn.Module, Inputs]:
    """The model of that name in eval mode, with random weights, and its example inputs.

    The names are those of ARCHITECTURES and of FAILING.
    The same seed gives the same weights and inputs. The caller's random state stays as it was.
    """
    entry = ARCHITECTURES[name] if name in ARCHITECTURES else FAILING[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = entry.build()
        randomise(module, seed)
        _settle_batch_norm(module, [entry.example() for _ in range(16)])
        return module.eval(), entry.example()


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Replace constants and tiny weights in place, so that no parameter can be cut unnoticed.

    Ones become values about one, zeros and layer scales become clearly nonzero, and matrices
    initialised with a small deviation are scaled up until they carry their input's size.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(_randomised(name, parameter, noise))


def _randomised(name: str, parameter: Tensor, noise: Tensor) -> Tensor:
    """The new value of one parameter, given standard normal noise of its shape."""
    rows = parameter.ndim >= 2 and parameter[0].numel() > 1
    gain = math.sqrt(2) if parameter.ndim >= 3 else 1.0
    matrix = rows and parameter.shape[0] > 1
    size = gain / math.sqrt(parameter[0].numel()) if matrix else 0.2
    first = parameter.flatten()[0]
    if parameter.numel() == 1:
        return parameter + 0.1 * noise
    if (parameter == first).all():
        middle = 0.5 if 0 < first < 1e-2 else first
        return size * noise if first == 0 else middle * (1 + 0.2 * noise.clamp(-2, 2))
    if rows:
        return parameter * max(1.0, size / parameter.std().item())
    if name.endswith("weight") and parameter.ndim == 1 and parameter.abs().mean() < 0.5:
        return 1 + 0.2 * noise.clamp(-2, 2)  # a norm's scale, drawn about zero by some libraries
    return parameter


def _settle_batch_norm(module: nn.Module, examples: list[Inputs]) -> None:
    """Set the running statistics of batch norms to those of the examples together."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        call(module.train(), _concatenated(examples))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.running_var.clamp_(min=1e-4)


def call(module: nn.Module, inputs: Inputs):
    """What the module returns for positional (tuple) or keyword (dict) inputs."""
    return module(**inputs) if isinstance(inputs, dict) else module(*inputs)


def with_batch(inputs: Inputs, batch: int) -> Inputs:
    """The same inputs with another batch size, their examples repeated in turn."""

    def repeat(x: Tensor) -> Tensor:
        return x[torch.arange(batch) % x.shape[0]]

    if isinstance(inputs, dict):
        return {name: repeat(x) for name, x in inputs.items()}
    return tuple(repeat(x) for x in inputs)


def _concatenated(examples: list[Inputs]) -> Inputs:
    """Several examples' inputs as one batch."""
    if isinstance(examples[0], dict):
        return {name: torch.cat([e[name] for e in examples]) for name in examples[0]}
    return tuple(torch.cat(xs) for xs in zip(*examples, strict=True))
