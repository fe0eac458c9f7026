"""What counts as evidence about a candidate, and what does not: two models in this process."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest

from paredown.core.errors import UserError
from paredown.ship.guard.bound import Bound
from paredown.ship.guard.policy import Policy
from paredown.ship.guard.rollout import Rollout
from paredown.ship.guard.stages import Stage
from paredown.ship.serve.compare import Agreement
from paredown.ship.serve.kept import Kept
from paredown.ship.serve.pair import Pair
from paredown.ship.serve.service import Service
from paredown.ship.serve.signature import Signature
from paredown.ship.serve.validation import validate
from paredown.ship.serve.workers import Answer, Fault

ITEM = {"name": "y", "dtype": "float32", "shape": [-1, 2]}
SIGNATURE = Signature(({**ITEM, "name": "x"},), (ITEM,), True)


class Model:
    """A function of the rows in a worker's place; what it raises is its fault."""

    def __init__(self, function):
        self.function, self.signature = function, SIGNATURE
        self.limits = SimpleNamespace(background=4)

    async def infer(self, arrays, background=False):
        return Answer({"y": self.function(arrays[0])}, 1.0, 0.0, 1.0)


def same(x):
    return x.copy()


def clipped(x):
    """Gives numbers where the original gives none."""
    return np.nan_to_num(x)


def refusing(x):
    if not np.isfinite(x).all():
        raise Fault("error", "no such row")
    return x.copy()


def wider(x):
    return np.hstack([x, x]) if not np.isfinite(x).all() else x.copy()


def paired(candidate, stage="shadow"):
    """A pair whose rollout shadows everything, at a stage."""
    rollout = Rollout(Policy(shadow_share=1.0, quiet_share=0.0), Bound(0.0, 0.01), None, "ab12")
    rollout.begin()
    rollout.validated(True, "by hand")
    if stage == "promoted":
        rollout.promote("to look", "me")
    return Pair(Model(same), Model(candidate), rollout, Agreement(), Kept())


async def sent(pair, x, times=1):
    for number in range(times):
        await pair.infer([np.asarray(x, np.float32)], str(number).encode())
        await asyncio.gather(*pair._shadows)


@pytest.mark.parametrize("stage", ["shadow", "promoted"])
@pytest.mark.parametrize("candidate", [same, clipped, refusing, wider])
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_where_the_original_gives_no_numbers_there_is_no_evidence(candidate, stage, number):
    pair = paired(candidate, stage)
    asyncio.run(sent(pair, [[number, 1.0]], 60))
    pair.judge.tick()
    told = {each["name"]: each for each in pair.judge.status()["guards"]}
    assert pair.judge.stage is Stage(stage), pair.judge.position.why
    assert told["disagreement"]["n"] == 0 and not pair.kept.examples()


def test_the_other_rows_of_such_a_request_count():
    pair = paired(lambda x: np.nan_to_num(x)[:, ::-1].copy())
    asyncio.run(sent(pair, [[np.nan, 1.0], [0.0, 1.0], [2.0, 1.0]]))
    pair.judge.tick()
    [told] = [each for each in pair.judge.status()["guards"] if each["name"] == "disagreement"]
    assert told["n"] == 2 and "100.00% of 2 pairs disagree" in told["says"]


def test_nan_in_a_row_where_the_original_gives_numbers_is_a_fault():
    pair = paired(lambda x: np.where(np.isfinite(x), np.float32(np.nan), x))
    asyncio.run(sent(pair, [[np.nan, 1.0], [0.0, 1.0]], 3))
    assert pair.judge.stage is Stage.ROLLED_BACK and "nan" in pair.judge.position.why


def test_validation_leaves_out_examples_for_which_the_original_gives_no_numbers():
    rows = [[np.array([[n % 2, 0.5]], np.float32)] for n in range(20)]
    broken = [[np.array([[np.nan, 1.0]], np.float32)]] * 3
    pair = paired(clipped)
    found, profile = asyncio.run(validate(pair, rows + broken, ("a", "b")))
    assert found.passed and (found.examples, found.disagreed) == (20, 0) and profile is not None
    assert "3 more are left out, as the original gives NaN" in found.why
    with pytest.raises(UserError, match="NaN or infinity for all"):
        asyncio.run(validate(pair, broken, ("a", "b")))


def test_a_label_counts_once():
    service = Service("tiny", paired(lambda x: -x))
    service.rollout = service.pair.judge

    async def run():
        await service.pair.infer([np.array([[0.0, 1.0]], np.float32)], b"7", "7")
        await asyncio.gather(*service.pair._shadows)
        said = {"id": "7", "target": 1}
        first = await asyncio.gather(*(service.feedback("tiny", said) for _ in range(3)))
        return [*first, *[await service.feedback("tiny", said) for _ in range(57)]]

    answers = asyncio.run(run())
    service.rollout.tick()
    assert [each["counted"] for each in answers] == [True] + [False] * 59
    assert all(each["scores"] == {"original": 1.0, "candidate": 0.0} for each in answers)
    [told] = [each for each in service.look()["guards"] if each["name"] == "score"]
    assert told["n"] == 1 and service.rollout.stage is Stage.SHADOW


@pytest.mark.parametrize("stage", ["shadow", "promoted"])
def test_a_label_that_comes_before_the_shadows_answer_scores_both(stage):
    service = Service("tiny", paired(lambda x: -x, stage))
    slow = service.pair.candidate if stage == "shadow" else service.pair.original
    answer = slow.infer

    async def later(arrays, background=False):
        await asyncio.sleep(0.05)
        return await answer(arrays)

    slow.infer = later

    async def run():
        await service.pair.infer([np.array([[0.0, 1.0]], np.float32)], b"7", "7")
        found = await service.feedback("tiny", {"id": "7", "target": 1})
        await asyncio.sleep(0)
        return found, service.pair._shadows

    found, waiting = asyncio.run(run())
    assert found["scores"] == {"original": 1.0, "candidate": 0.0} and not waiting


def test_a_name_that_is_used_again_is_a_new_request():
    service = Service("tiny", paired(same))

    async def run():
        for _ in range(2):
            await service.pair.infer([np.array([[0.0, 1.0]], np.float32)], b"7", "7")
            await asyncio.gather(*service.pair._shadows)
            yield await service.feedback("tiny", {"id": "7", "target": 1})

    async def all_of():
        return [each["counted"] async for each in run()]

    assert asyncio.run(all_of()) == [True, True]


def test_what_found_no_room_on_the_disk_is_written_when_there_is_room(tmp_path):
    """The file may not grow, by SQLite's own bound: it then says that the disk is full."""
    from paredown.ship.guard.journal import Journal

    def most(journal, pages):
        journal._base.execute(f"PRAGMA max_page_count = {pages}")

    long = "enough " * 2000
    for ticks in (0, 1):
        path = tmp_path / f"{ticks}.db"
        with Journal.open(path) as journal:
            rollout = Rollout(Policy(), Bound(0.0, 0.01), journal, "ab12")
            rollout.begin()
            most(journal, 1)
            rollout.abort(long, "me")
            rollout.tick()
            assert rollout.stage is Stage.ROLLED_BACK and "full" in rollout.status()["journal"]
            most(journal, 10**6)
            rollout.tick() if ticks else rollout.flush()
            assert rollout.status()["journal"] == ""
        with Journal.open(path) as journal:
            assert Rollout(Policy(), Bound(0.0, 0.01), journal, "ab12").stage is Stage.ROLLED_BACK
