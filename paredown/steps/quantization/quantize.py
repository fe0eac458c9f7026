"""Post-training quantization: 8-bit activations, static or dynamic, weights of 8 or 4 bits."""

from __future__ import annotations

import difflib
import fnmatch
import glob
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch

from paredown.core.errors import UserError
from paredown.core.progress import say
from paredown.core.settings import check_fields, names_of
from paredown.core.task import Task
from paredown.core.units import parse_drop
from paredown.data.observe import channels_last, observe
from paredown.graph.computed import fold_computed_weights
from paredown.graph.fold import fold_batch_norm
from paredown.graph.holds.shared import regroup
from paredown.graph.model import Model
from paredown.graph.quantized.forms import WEIGHT_FORMS, form_of
from paredown.graph.quantized.quantizers import quantizers
from paredown.graph.quantized.regions import INTEGER_KINDS, Regions, find_regions, prepare
from paredown.graph.sites import Site, sites
from paredown.steps.quantization import mixed, saturation
from paredown.steps.quantization.correct import correct_biases
from paredown.steps.quantization.equalize import equalize
from paredown.steps.quantization.insert import insert_dynamic, insert_quantizers, insert_tables
from paredown.steps.quantization.range_methods import Range
from paredown.steps.quantization.ranges import RANGES, range_method
from paredown.steps.step import ALONE, Entry, Setting, Step, forget
from paredown.targets.runtimes import runtime

SCHEMES = ("int8", "int4", "int8-dynamic")
SATURATION = ("safe", "vnni")
SMOOTH = 0.5  # the half-way point between values and weights
BLIND = (
    "Without calibration data channels are not evened out (smooth=0) nor biases corrected "
    "(correct_bias=False); Task(calibration=) opens both."
)
BITS = (8, 4)  # of the first and the last layer, and of tables


@dataclass(frozen=True)
class Quantize(Step):
    """Weights to int8 or int4 per channel and activations to uint8 per tensor, after training.

    Good for convolutional networks and the linear layers of transformers: the file shrinks to
    about a quarter, and kernels with int8 dot products run about twice as fast. It does not pay
    in latency on tiny layers, where moving bytes costs as much as computing on them, nor on CPUs
    without int8 dot products. Tables that are looked up are kept as integers and read as floats.
    Recurrent layers get 8-bit weights with either scheme; what comes to them, and their state, is
    rounded by the runtime's kernel where it has one for integers.

    ``"int8-dynamic"`` finds the range of a layer's input anew at each inference, and quantizes
    linear and recurrent layers alone: for transformers and models of linear layers whose ranges
    differ from input to input. It does not pay for convolutions, whose dynamic kernels are slow and
    which stay in float; and all examples of a batch share a range.

    Args:
        scheme: "int8", "int4" for weights of 4 bits, or "int8-dynamic", which needs no calibration
            data.
        ranges: how activation ranges are chosen from the calibration data: "lp", "minmax",
            "percentile" or "entropy".
        percentile: for ``ranges="percentile"``, the share of values kept, in per cent.
        first, last: whether the first and the last layer are quantized too.
        edge_bits: for ``scheme="int4"``, bits of the first and the last layer's weights: 8 or 4.
        embedding_bits: of tables that are looked up: 8, 4, or 0 for float.
        exclude: names of weights, or patterns such as ``"head.*"``, that stay in float.
        smooth: how much of the difference in size between channels moves from values into the
            weights that read them, 0 to 1, wherever that changes nothing in float; 0 is off. Of a
            model with shared weights, whose values it would part, nothing moves. None is 0.5 where
            there is calibration data to see sizes on, else 0.
        correct_bias: take back the mean shift of each layer's output by its bias; None is where
            there is calibration data.
        saturation: x86 processors without VNNI add two products in 16 bits, in ONNX Runtime and
            OpenVINO. "safe" holds the weights of each layer whose products leave them on the
            calibration data within 7 bits; "vnni" keeps 8, and the file is right with VNNI and on
            ARM alone. Other runtimes add in 32 bits, and keep 8 either way.
        max_drop: mixed precision: the most that the score on the validation data may fall, such as
            "0.5%"; as few layers as that needs stay in float. See `settle`.

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

    # What is needed depends on the scheme, and stands on the instance; see `PruneChannels`.
    needs: ClassVar[frozenset[str]] = frozenset()
    table: ClassVar[tuple[Entry, ...]] = (
        Entry(
            call='Quantize("int8")',
            does="post-training static quantization, int8 weights per channel, uint8 "
            "activations, int8 tables",
            pays="convolutions, linear, recurrent layers and embeddings: about a quarter of the "
            "size, 2x and more faster",
            does_not="tiny layers; GRU in ONNX Runtime and OpenVINO gets smaller, not faster",
        ),
        Entry(
            call='Quantize("int8-dynamic")',
            does="int8 weights, activations rounded by the range that each inference has; "
            "linear and recurrent layers alone",
            pays="LSTM; transformers whose ranges differ from input to input; without any data",
            does_not="convolutions, which stay in float",
        ),
        Entry(
            call='Quantize("int8", max_drop="0.5%")',
            does="mixed precision: as few layers as possible stay in float, found on the score",
            pays="models of which a few layers cannot be rounded",
            does_not="where int8 alone does: then nothing stays in float",
        ),
        Entry(
            call='Quantize("int4")',
            does="the same with weights of 4 bits",
            pays="about half of int8's file on the same kernels; with fine-tuning behind it",
            does_not="speed: kernels compute on bytes all the same",
        ),
    )

    scheme: str = "int8"
    ranges: str = "lp"
    percentile: float = 99.99
    first: bool = True
    last: bool = True
    edge_bits: int = 8
    embedding_bits: int = 8
    exclude: tuple[str, ...] = ()
    smooth: float | None = None
    correct_bias: bool | None = None
    saturation: str = "safe"
    max_drop: float | str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.scheme not in SCHEMES:
            known = " or ".join(f'"{name}"' for name in SCHEMES)
            raise UserError(f"quantize: scheme {self.scheme!r} is not known; it can be {known}.")
        if self.ranges not in RANGES:
            raise UserError(f"quantize: ranges {self.ranges!r} is not one of {', '.join(RANGES)}.")
        if not 50 < self.percentile <= 100:
            raise UserError(f"quantize: percentile must be in (50, 100], got {self.percentile}.")
        if self.edge_bits not in BITS:
            raise UserError(f"quantize: edge_bits must be 8 or 4, got {self.edge_bits!r}.")
        if self.embedding_bits not in (*BITS, 0):
            raise UserError(
                f"quantize: embedding_bits must be 8, 4, or 0 for float, got "
                f"{self.embedding_bits!r}."
            )
        if self.saturation not in SATURATION:
            known = " or ".join(f'"{name}"' for name in SATURATION)
            raise UserError(f"quantize: saturation must be {known}, got {self.saturation!r}.")
        if self.smooth is not None and not 0 <= self.smooth <= 1:
            raise UserError(f"quantize: smooth must be in [0, 1], got {self.smooth!r}.")
        object.__setattr__(self, "exclude", names_of("exclude", self.exclude))
        seeing = not self._dynamic or self.smooth or self.correct_bias
        needs = {"calibration"} if seeing else set()
        if self.max_drop is not None:
            parse_drop(self.max_drop)
            needs |= {"score", "validation"}
        object.__setattr__(self, "needs", frozenset(needs))

    @property
    def form(self) -> str:
        return self.scheme

    @property
    def _dynamic(self) -> bool:
        return self.scheme == "int8-dynamic"

    def apply(self, model: Model, task: Task, setting: Setting = ALONE) -> Model:
        forms = [form_of(node) for node in quantizers(model.graph)]
        if any(form is None or not form.follows for form in forms):
            raise UserError("quantize: the model is quantized already.")
        settled = self.settle(model, task, setting)
        if settled != self:
            return settled.apply(model, task, setting)
        made = model.copy().eval()
        fold_computed_weights(made)
        prepare(made)
        fold_batch_norm(made.graph)
        regroup(made)
        skipped = self._skipped(made)
        regions, recurrent = find_regions(made, skipped), _recurrent(made, skipped)
        if not regions.sites and not recurrent:
            kinds = "linear" if self._dynamic else "convolution, linear"
            raise UserError(f"quantize: no {kinds} or recurrent layer is left to run on integers.")
        with torch.no_grad(), channels_last(made):
            smooth = SMOOTH if self.smooth is None else self.smooth
            if smooth and not made.shared:
                equalize(made, task, [site.weight for site in regions.sites], smooth)
            found = {} if self._dynamic else self._ranges(made, task, regions)
            exact = made.copy()
            if not self._dynamic:
                insert_quantizers(made, regions, found, self._bits(made))
            insert_dynamic(made, [*(regions.sites if self._dynamic else ()), *recurrent])
            if self.embedding_bits:
                insert_tables(made, self.embedding_bits, {*skipped, *made.shared})
            return self._fitted(made, exact, task, setting)

    def _fitted(self, made: Model, exact: Model, task: Task, setting: Setting) -> Model:
        """With biases corrected, and sums of products that fit the target's kernels."""
        if _is_blind(task):
            say(f"  {BLIND}")
            made = replace(made, notes=(*made.notes, BLIND))
        correct = None if self.correct_bias is False else partial(correct_biases, exact, made, task)
        name, safe = setting.target.runtime, self.saturation == "safe"
        pairs = runtime(name).PAIRS is not None
        if pairs and safe:
            found = saturation.keep_within(made, task, correct)
        else:
            if correct is not None:
                correct()
            found = saturation.saturating(made, task) if pairs else []
        if not found:
            return made
        told = saturation.note(found, name, safe)
        say(f"  {told}")
        setting.note({"kind": "saturation", "runtime": name, "safe": safe, "layers": found})
        return replace(made, notes=(*made.notes, told))

    def settle(self, model: Model, task: Task, setting: Setting) -> Quantize:
        """The same step with the layers named that stay in float, so that it repeats; without
        calibration data, with nothing that looks at it.

        Raises:
            UserError: the score falls by more than ``max_drop`` with one layer quantized.
        """
        if self._dynamic and _is_blind(task):
            smooth, correct = self.smooth or 0.0, bool(self.correct_bias)
            if (smooth, correct) != (self.smooth, self.correct_bias):
                blind = replace(self, smooth=smooth, correct_bias=correct)
                return blind.settle(model, task, setting)
        if self.max_drop is None:
            return self
        plain = replace(self, max_drop=None)

        def without(floats: Sequence[str]) -> Quantize:
            return replace(plain, exclude=(*self.exclude, *map(glob.escape, floats)))

        def quantize(floats: Sequence[str]) -> Model:
            return without(floats).apply(model, task, replace(setting, note=forget))

        floats = mixed.choose(model, task, self.max_drop, quantize, setting.note)
        say(f"  {len(floats)} layers stay in float" + (f": {', '.join(floats)}" if floats else ""))
        return without(floats)

    def _ranges(self, model: Model, task: Task, regions: Regions) -> dict[str, Range]:
        method = range_method(self.ranges)
        statistics = observe(model, task, regions.own, histogram=method.histogram)
        return {name: method.choose(seen, self.percentile) for name, seen in statistics.items()}

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
        skipped |= set(layers[:1] if not self.first else ())
        skipped |= set(layers[-1:] if not self.last else ())
        if self._dynamic:
            skipped |= {site.weight for site in sites(model.graph) if site.kind == "conv"}
        return skipped

    def _bits(self, model: Model) -> dict[str, int]:
        """Bits of each layer's weight."""
        layers = _layers(model)
        edges = dict.fromkeys((layers[0], layers[-1]), self.edge_bits)
        return dict.fromkeys(layers, WEIGHT_FORMS[self.scheme].bits) | (
            edges if self.scheme == "int4" else {}
        )


def _is_blind(task: Task | None) -> bool:
    """Whether there is no calibration data."""
    return task is None or bool(task.missing({"calibration"}))


def _recurrent(model: Model, skipped: set[str]) -> list[Site]:
    """The weights of recurrent layers, of which lookups have none."""
    found = [site for site in sites(model.graph) if site.kind == "recurrent"]
    return [site for site in found if site.weight not in skipped]


def _layers(model: Model) -> list[str]:
    """The weights of the layers with integer kernels, in the order they run."""
    return [s.weight for s in sites(model.graph) if s.kind in INTEGER_KINDS]
