"""Structured pruning: whole channels, neurons and heads go, and the model becomes smaller."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from paredown.core import progress
from paredown.core.errors import UserError
from paredown.core.settings import check_choice, check_count, check_fields, check_seed, names_of
from paredown.core.task import Task
from paredown.core.units import human
from paredown.graph.coupling.coupling import Choice, Coupling, analyze
from paredown.graph.coupling.cut import cut
from paredown.graph.coupling.groups import Group
from paredown.graph.holds import own_zeros
from paredown.graph.holds.shared import refuse_shared
from paredown.graph.model import Model
from paredown.graph.names import check_exclude, fits, with_layer
from paredown.graph.quantized.quantizers import quantizers
from paredown.measure.timing import speedup
from paredown.steps.latency import search
from paredown.steps.pruning import criteria
from paredown.steps.pruning.ladder import CHANNELS, WIDE, Ladder, ladder, widths
from paredown.steps.step import ALONE, Entry, Setting, Step
from paredown.train.reconstruct import reconstruct

AMOUNTS = ("channels", "parameters", "macs", "latency")
LOOSER = "min_width, max_ratio, round_to, exclude or exact_only"  # what allows deeper cuts


@dataclass(frozen=True)
class PruneChannels(Step):
    """Cut whole channels, neurons and attention heads out of the model (structured).

    It pays on every runtime and device, in size, latency and memory alike, since what is left
    is a smaller dense model. It costs accuracy: fine-tune after it, or between several small cuts.

    Args:
        ratio: share of ``amount`` to remove, above 0 and below 1.
        amount: "channels": of the units of the groups that may be cut, or a little less, as far
            as ``round_to`` and ``min_width`` allow. "parameters" or "macs" (multiply-adds): of
            the whole model's, at least. "latency": of the exported file's, measured; see `settle`.
        criterion: what tells the units that matter least: "l1" or "l2" (the weights that make a
            unit and those that read it), "geometric_median", "bn_scale", "taylor" (needs a loss
            and labelled data), "weight_activation" (needs calibration data), or "random", the
            control. Groups that the criterion cannot judge stay whole.
        scope: "global" compares the units of all groups, each score over its group's mean;
            "uniform" takes the same share from every group.
        round_to: the widths that remain are a multiple of so many channels in groups that have
            two of them or more; a head of 64 channels is such a multiple by itself. None takes
            16 in groups of 64 channels and more, 8 in smaller ones; 1 allows every width.
        min_width: units that every group keeps.
        max_ratio: share of any one group that "global" may remove, so that no layer collapses
            (arXiv 2006.05467).
        exclude: names or globs of layers or parameters: the groups that they belong to stay whole.
        exact_only: leave the groups whole in which an op (a layer norm, a softmax) sees how many
            units there are; elsewhere, removing a unit is the same as setting it to zero.
        attention: "heads" removes whole heads, "head_dim" the same dimensions of all heads.
        group_norm: "groups" removes whole groups of a group norm, "within" channels within them.
        reconstruct: fit what reads the cut channels to the original's outputs by least squares
            on calibration data, without labels, so that a cut loses far less even where no
            training follows. False needs no data.
        seed: of "random", and of the batches that "taylor" draws.

    Raises:
        UserError: a setting is out of its range; a name in ``exclude`` fits nothing; nothing can
            be cut; or the amount cannot be reached, with the most that can be.

    Example:
        >>> import paredown, torch
        >>> layers = [torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4)]
        >>> model = paredown.capture(torch.nn.Sequential(*layers), (torch.zeros(1, 8),))
        >>> pruned = PruneChannels(0.5, reconstruct=False).apply(model, None)
        >>> pruned.state_dict()["0.weight"].shape
        torch.Size([16, 8])
    """

    # What a step needs depends on its criterion. `Step` reads it off an instance, which shadows
    # this with its own; the class itself promises only what every instance needs.
    needs: ClassVar[frozenset[str]] = frozenset()
    table: ClassVar[tuple[Entry, ...]] = (
        Entry(
            call="PruneChannels(0.5)",
            does="cuts whole channels, neurons and heads by seven criteria, to a share of "
            "units, parameters, multiply-adds or measured latency; refits what reads them",
            pays="a smaller dense model: size, latency and memory on every runtime, and int8 "
            "multiplies with it",
            does_not="models without slack; layers that are tiny already",
        ),
    )

    ratio: float = 0.5
    amount: str = "channels"
    criterion: str = "l2"
    scope: str = "global"
    round_to: int | None = None
    min_width: int = 1
    max_ratio: float = 0.9
    exclude: tuple[str, ...] = ()
    exact_only: bool = False
    attention: str = "heads"
    group_norm: str = "groups"
    reconstruct: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        _check_share("ratio", self.ratio, self.ratio < 1, "above 0 and below 1")
        _check_share("max_ratio", self.max_ratio, self.max_ratio <= 1, "above 0 and at most 1")
        check_choice("amount", self.amount, AMOUNTS)
        check_choice("scope", self.scope, ("global", "uniform"))
        check_choice("attention", self.attention, ("heads", "head_dim"))
        check_choice("group_norm", self.group_norm, ("groups", "within"))
        check_count("min_width", self.min_width)
        check_seed("seed", self.seed)
        if self.round_to is not None:
            check_count("round_to", self.round_to)
        object.__setattr__(self, "exclude", names_of("exclude", self.exclude))
        needs = criteria.criterion(self.criterion).needs
        needs |= {"calibration"} if self.reconstruct else set()
        object.__setattr__(self, "needs", needs)

    def apply(self, model: Model, task: Task, setting: Setting = ALONE) -> Model:
        """A smaller copy; ``kept`` says what it still has of the original."""
        if self.amount == "latency":
            return self.settle(model, task, setting).apply(model, task, setting)
        coupling = analyze(model, self.attention, self.group_norm)
        choice = self.choose(model, task, coupling)
        made = cut(model, coupling, choice)
        told = own_zeros.adopt(made, setting.original or model)
        if self.reconstruct:
            reconstruct(model, made, task)
        progress.say(_told(coupling, choice))
        if told:
            progress.say(f"  note: {told}")
        return made

    def choose(self, model: Model, task: Task, coupling: Coupling) -> Choice:
        """The units of each group that stay; groups that are not named stay whole.

        Raises:
            UserError: nothing can be cut, or the amount cannot be reached.
        """
        cuts = self.cuts(model, task, coupling)
        if self.amount == "channels":
            return self._by_channels(cuts)
        return self._by_cost(cuts, coupling)

    def cuts(self, model: Model, task: Task, coupling: Coupling) -> Ladder:
        """All cuts that the settings allow, in the order in which they are made."""
        groups = _eligible(self, model, coupling)
        scores = criteria.score(self.criterion, model, task, groups, self.seed)
        groups = [group for group in groups if group.name in scores]
        made = ladder(
            groups,
            [scores[group.name] for group in groups],
            [widths(g.size, self._least(g), self._multiple(g)) for g in groups],
            self.scope,
        )
        if not made.rungs:
            raise UserError(
                f"PruneChannels: changed nothing; all {len(groups)} groups are as narrow as "
                f"min_width={self.min_width} and round_to={self.round_to} allow already."
            )
        return made

    def _least(self, group: Group) -> int:
        if self.scope == "uniform":
            return self.min_width
        # 10 * (1 - 0.9) is 0.99999...: a hair must not cost or save a unit
        return max(self.min_width, math.ceil(group.size * (1 - self.max_ratio) - 1e-9))

    def _multiple(self, group: Group) -> int:
        """How many units make a multiple of ``round_to`` channels."""
        made = [m.indices.shape[1] for m in group.members if m.role == "out"]
        usual = WIDE if group.size * max(made, default=1) >= 4 * WIDE else CHANNELS
        wanted = usual if self.round_to is None else self.round_to
        return wanted // math.gcd(wanted, *made) if made else wanted

    def _by_channels(self, cuts: Ladder) -> Choice:
        units = sum(group.size for group in cuts.groups)
        most = sum(g.size - min(g.size, self._least(g)) for g in cuts.groups)
        if most < math.floor(self.ratio * units + 1e-9):
            raise self._unreachable(most / units, "channels")
        if self.scope == "uniform":
            count = sum(rung.price <= self.ratio + 1e-9 for rung in cuts.rungs)
        else:
            gone, count = 0, 0
            while count < len(cuts) and gone + cuts.rungs[count].units <= self.ratio * units + 1e-9:
                gone, count = gone + cuts.rungs[count].units, count + 1
        if count == 0:
            raise UserError(
                f"PruneChannels: changed nothing; the first cut takes {cuts.rungs[0].units} units, "
                f"more than the share asked, {self.ratio:.4g} of {units}. Ask for a higher ratio, "
                "or set round_to=1."
            )
        return cuts.choice(count)

    def _by_cost(self, cuts: Ladder, coupling: Coupling) -> Choice:
        count = cuts.first(lambda choice: _saved(coupling, choice, self.amount) >= self.ratio)
        if count > len(cuts):
            most = _saved(coupling, cuts.choice(len(cuts)), self.amount)
            raise self._unreachable(most, self.amount)
        return cuts.choice(count)

    def _unreachable(self, most: float, what: str) -> UserError:
        return UserError(
            f"ratio: a share of {self.ratio:.4g} of the {what} was asked; with these settings at "
            f"most {math.floor(most * 1e4) / 1e4:.4g} can be removed. Lower the ratio, or allow "
            f"more by {LOOSER}."
        )

    def settle(self, model: Model, task: Task, setting: Setting) -> PruneChannels:
        """The same step with the share of multiply-adds that removes ``ratio`` of the latency.

        Measured latencies differ from run to run, so the share that they lead to is found once
        and kept: the settled step gives the same bytes again. It exports and times the files of
        at most six cuts; any other amount is settled as it is.

        Raises:
            UserError: the smallest model is not quick enough; says what it reaches.
        """
        if self.amount != "latency":
            return self
        coupling = analyze(model, self.attention, self.group_norm)
        cuts = self.cuts(model, task, coupling)

        def removed(choice: Choice) -> float:
            return 1 - 1 / speedup(model, cut(model, coupling, choice), setting.target).estimate

        def by_macs(share: float) -> Choice:
            return cuts.choice(cuts.first(lambda c: _saved(coupling, c, "macs") >= share))

        most = math.floor(_saved(coupling, cuts.choice(len(cuts)), "macs") * 1000) / 1000
        share = search(lambda share: removed(by_macs(share)), self.ratio, most, LOOSER)
        return replace(self, amount="macs", ratio=share)


def _check_share(name: str, value: float, holds: bool, expected: str) -> None:
    if not (holds and value > 0):  # NaN holds nothing
        raise UserError(f"{name}: expected a share {expected}, got {value!r}.")


def _eligible(step: PruneChannels, model: Model, coupling: Coupling) -> list[Group]:
    """The groups that the settings let it cut; one of buffers alone (positions) holds no weight."""
    if quantizers(model.graph):
        raise UserError("PruneChannels: the model is quantized; cut channels before Quantize.")
    refuse_shared(
        model, list(model.shared), "PruneChannels: {}, which a cut does not keep; cut before."
    )
    named = dict(model.graph.named_parameters(remove_duplicate=False))
    known = (name for weight in named for name in with_layer(weight))
    check_exclude(step.exclude, known, "layer or weight")
    found = [
        group
        for group in coupling.groups
        if any(member.name in named for member in group.members)
        and not any(fits(with_layer(member.name), step.exclude) for member in group.members)
    ]
    if not found:
        raise UserError(
            "PruneChannels: the model has no channels that can be cut"
            + (" besides those excluded." if step.exclude else ".")
        )
    exact = [group for group in found if group.exact]
    if step.exact_only and not exact:
        raise UserError(
            f"exact_only: none of the {len(found)} groups can be cut exactly; an op "
            f"({', '.join(sorted({g.reduced_by for g in found}))}) sees how many units there are. "
            "Set exact_only=False, and fine-tune after the cut."
        )
    return exact if step.exact_only else found


def _saved(coupling: Coupling, choice: Choice, amount: str) -> float:
    """The share of the whole model's parameters or multiply-adds that a choice removes."""
    before = int(getattr(coupling.costs(), amount))
    return 1 - int(getattr(coupling.costs(choice), amount)) / before if before else 0.0


def _told(coupling: Coupling, choice: Choice) -> str:
    before, after = coupling.costs(), coupling.costs(choice)
    gone = sum(int((~keep).sum()) for keep in choice.values())
    units = sum(group.size for group in coupling.groups)
    return (
        f"  {len(choice)} of {len(coupling.groups)} groups cut, {gone} of {units} units gone; "
        f"{human('count', before.parameters)} to {human('count', after.parameters)} parameters, "
        f"{human('count', before.macs)} to {human('count', after.macs)} multiply-adds"
    )
