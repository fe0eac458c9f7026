"""Post-training static quantization: 8-bit activations, weights of 8 or 4 bits."""

from __future__ import annotations

import difflib
import fnmatch
from dataclasses import dataclass
from typing import ClassVar

from paredown.calibrate import Statistics, observe
from paredown.graph.edit import fold_batch_norm
from paredown.graph.low_bits import LOW_BITS
from paredown.graph.model import Model
from paredown.graph.quantized import quantizers
from paredown.graph.regions import find_regions, prepare
from paredown.graph.scales import WEIGHT_GRIDS
from paredown.graph.sites import sites
from paredown.steps.correct import correct_biases
from paredown.steps.equalize import equalize
from paredown.steps.insert import insert_quantizers
from paredown.steps.ranges import RANGES, Range, percentile_range
from paredown.types import Task, UserError

SCHEMES = {"int8": 8, "int4": 4}  # bits of the weights


@dataclass(frozen=True)
class Quantize:
    """Weights to int8 or int4 per channel and activations to uint8 per tensor, after training.

    Good for convolutional networks and the linear layers of transformers: the file shrinks to
    about a quarter, and kernels with int8 dot products run about twice as fast. It does not pay
    in latency on tiny layers, where moving bytes costs as much as computing on them, nor on CPUs
    without int8 dot products; models of mostly embeddings or recurrent layers shrink little,
    since those stay in float.

    Args:
        scheme: "int8", or "int4" for weights of 4 bits.
        ranges: how activation ranges are chosen from the calibration data: "mse", "minmax",
            "percentile" or "entropy".
        percentile: for ``ranges="percentile"``, the share of values kept, in per cent.
        first, last: whether the first and the last layer are quantized too.
        edge_bits: for ``scheme="int4"``, bits of the first and the last layer's weights: 8 or 4.
        exclude: names of weights, or patterns such as ``"head.*"``, that stay in float.
        smooth: how much of the difference in size between channels moves from values into the
            weights that read them, 0 to 1, wherever that changes nothing in float; 0 is off.
        correct_bias: take back the mean shift of each layer's output by its bias.

    Raises:
        UserError: unknown settings; a model that is quantized already or has no layer that runs
            on integers; calibration data with NaN or infinite values.

    Example:
        >>> import torch, paredown
        >>> from torch.utils.data import TensorDataset
        >>> model = paredown.capture(torch.nn.Linear(4, 2), (torch.zeros(1, 4),))
        >>> data = TensorDataset(torch.randn(16, 4), torch.zeros(16))
        >>> task = paredown.Task(example=(torch.zeros(1, 4),), score=None, calibration=data)
        >>> quantized = Quantize("int8").apply(model, task)
        >>> sorted(quantized.state_dict())
        ['bias', 'weight', 'weight_scale']
    """

    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})

    scheme: str = "int8"
    ranges: str = "mse"
    percentile: float = 99.99
    first: bool = True
    last: bool = True
    edge_bits: int = 8
    exclude: tuple[str, ...] = ()
    smooth: float = 0.5
    correct_bias: bool = True

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            known = " or ".join(f'"{name}"' for name in SCHEMES)
            raise UserError(f"quantize: scheme {self.scheme!r} is not known; it can be {known}.")
        if self.ranges not in RANGES:
            raise UserError(f"quantize: ranges {self.ranges!r} is not one of {', '.join(RANGES)}.")
        if not 50 < self.percentile <= 100:
            raise UserError(f"quantize: percentile must be in (50, 100], got {self.percentile}.")
        if self.edge_bits not in WEIGHT_GRIDS:
            raise UserError(f"quantize: edge_bits must be 8 or 4, got {self.edge_bits!r}.")
        if not 0 <= self.smooth <= 1:
            raise UserError(f"quantize: smooth must be in [0, 1], got {self.smooth!r}.")
        object.__setattr__(self, "exclude", tuple(self.exclude))

    @property
    def form(self) -> str:
        return self.scheme

    def apply(self, model: Model, task: Task) -> Model:
        if any(node.target not in LOW_BITS for node in quantizers(model.graph)):
            raise UserError("quantize: the model is quantized already.")
        made = model.copy().eval()
        prepare(made)
        fold_batch_norm(made.graph)
        regions = find_regions(made, self._skipped(made))
        if not regions.sites:
            raise UserError("quantize: no convolution or linear layer is left to run on integers.")
        if self.smooth:
            equalize(made, task, [site.weight for site in regions.sites], self.smooth)
        exact = made.copy()
        statistics = observe(made, task, regions.own, histogram=self.ranges != "minmax")
        found = {name: self._range(each) for name, each in statistics.items()}
        insert_quantizers(made, regions, found, self._bits(made))
        if self.correct_bias:
            correct_biases(exact, made, task)
        return made

    def _range(self, statistics: Statistics) -> Range:
        if self.ranges == "percentile":
            return percentile_range(statistics, self.percentile)
        return RANGES[self.ranges](statistics)

    def _skipped(self, model: Model) -> set[str]:
        weights = [site.weight for site in sites(model.graph)]
        skipped = set()
        for pattern in self.exclude:
            matched = {name for name in weights if fnmatch.fnmatchcase(name, pattern)}
            if not matched:
                near = difflib.get_close_matches(pattern, weights, 1, 0.0)
                raise UserError(
                    f"quantize: exclude {pattern!r} is no layer; the nearest is {near}."
                )
            skipped |= matched
        layers = _layers(model)
        return (
            skipped
            | set(layers[:1] if not self.first else ())
            | set(layers[-1:] if not self.last else ())
        )

    def _bits(self, model: Model) -> dict[str, int]:
        """Bits of each layer's weight."""
        layers = _layers(model)
        edges = dict.fromkeys((layers[0], layers[-1]), self.edge_bits)
        return dict.fromkeys(layers, SCHEMES[self.scheme]) | (
            edges if self.scheme != "int8" else {}
        )


def _layers(model: Model) -> list[str]:
    """The weights of the layers with integer kernels, in the order they run."""
    return [s.weight for s in sites(model.graph) if s.kind in ("conv", "linear", "matmul")]
