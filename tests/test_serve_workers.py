"""A model's process and queue, without HTTP."""

import asyncio
import json
import os
import signal
import time

import numpy as np
import pytest

from paredown.ship.serve.child import Opening
from paredown.ship.serve.kept import MOST_ANSWERS, Kept
from paredown.ship.serve.refused import Refused
from paredown.ship.serve.worker import SIZES, arrays_of, message
from paredown.ship.serve.workers import Fault, Limits, Worker
from paredown.targets.runtimes import source
from tests.test_serve_runs import faulty, inputs, model, weights

LARGE = np.full((1, 4), 200, np.float32)


def with_worker(file, limits, work):
    """What ``work`` gives of a ready worker."""

    async def run():
        worker = Worker("original", Opening(file, source("onnxruntime")), limits)
        worker.start()
        try:
            assert await worker.first_start(), worker.why
            return await work(worker)
        finally:
            await worker.stop()

    return asyncio.run(run())


def right(answer, x):
    return np.allclose(answer.outputs["y"], x @ weights(), atol=1e-4)


def test_requests_that_wait_go_together(tmp_path):
    async def work(worker):
        rows = [inputs(n % 3 + 1, n) for n in range(40)]
        answers = await asyncio.gather(*(worker.infer([x]) for x in rows))
        assert all(right(*each) for each in zip(answers, rows, strict=True))
        assert worker.counts.examples == sum(map(len, rows))
        return worker.counts.executions

    file = model(tmp_path / "m.onnx")
    assert with_worker(file, Limits(batch=16), work) <= 10
    assert with_worker(file, Limits(batch=1), work) == 40


def test_a_request_waits_for_others_where_that_is_asked(tmp_path):
    async def work(worker):
        async def later(x):
            await asyncio.sleep(0.02)
            return await worker.infer([x])

        x = inputs(1)
        await asyncio.gather(worker.infer([x]), later(x), later(x), later(x))
        return worker.counts.executions

    limits = Limits(batch=4, wait_s=5.0)  # four are a full batch, so it is not waited for that long
    assert with_worker(model(tmp_path / "m.onnx"), limits, work) == 1


def test_a_file_with_a_fixed_batch_runs_one_by_one(tmp_path):
    async def work(worker):
        assert not worker.signature.batched
        answers = await asyncio.gather(*(worker.infer([inputs(1, n)]) for n in range(6)))
        assert all(right(each, inputs(1, n)) for n, each in enumerate(answers))
        return worker.counts.executions

    assert with_worker(model(tmp_path / "m.onnx", batch=1), Limits(), work) == 6


def test_too_many_requests_are_refused_at_once(tmp_path):
    async def work(worker):
        first = asyncio.create_task(worker.infer([LARGE]))  # slow
        await asyncio.sleep(0.05)
        began = time.monotonic()
        waiting = [asyncio.create_task(worker.infer([inputs(1)])) for _ in range(20)]
        await asyncio.sleep(0)
        refused = [each for each in waiting if each.done() and each.exception()]
        assert time.monotonic() - began < 0.5
        assert all(isinstance(each.exception(), Refused) for each in refused)
        assert {each.exception().status for each in refused} == {503}
        beside = [asyncio.create_task(worker.infer([inputs(1)], background=True)) for _ in range(9)]
        await asyncio.gather(first, *waiting, *beside, return_exceptions=True)
        assert sum(each.exception() is None for each in beside) == 3
        return len(refused), worker.counts.shed

    limits = Limits(pending=5, background=3, deadline_s=60, hang_s=60)
    assert with_worker(faulty(tmp_path / "m.onnx", "slow"), limits, work) == (15, 21)


@pytest.mark.slow
def test_requests_that_would_come_too_late_are_refused_at_once(tmp_path):
    async def work(worker):
        began = time.monotonic()
        await worker.infer([LARGE])
        each = time.monotonic() - began
        worker.limits = Limits(batch=1, deadline_s=5 * each, hang_s=60)
        waiting = [asyncio.create_task(worker.infer([LARGE])) for _ in range(20)]
        found = await asyncio.gather(*waiting, return_exceptions=True)
        assert {type(each) for each in found if isinstance(each, Exception)} == {Refused}
        return sum(not isinstance(each, Exception) for each in found)

    limits = Limits(batch=1, deadline_s=60, hang_s=60)
    assert 2 <= with_worker(faulty(tmp_path / "m.onnx", "slow"), limits, work) <= 4


def test_a_model_that_hangs_is_killed_and_comes_back(tmp_path):
    async def work(worker):
        pid = worker.pid
        with pytest.raises(Fault) as told:
            await worker.infer([LARGE])
        assert told.value.kind == "deadline"
        while worker.pid in (pid, None) or not worker.ready:
            await asyncio.sleep(0.05)
        return right(await worker.infer([inputs(1)]), inputs(1)), worker.counts.starts

    limits = Limits(deadline_s=0.2, hang_s=0.3)
    found = with_worker(faulty(tmp_path / "m.onnx", "slow"), limits, work)
    assert found == (True, 2)


def test_one_bad_request_does_not_spoil_the_others_of_its_batch(tmp_path):
    async def work(worker):
        rows = [inputs(1, n) for n in range(6)] + [LARGE]
        found = await asyncio.gather(*(worker.infer([x]) for x in rows), return_exceptions=True)
        assert all(right(each, x) for each, x in zip(found[:-1], rows[:-1], strict=True))
        return found[-1].kind

    assert with_worker(faulty(tmp_path / "m.onnx", "error"), Limits(wait_s=0.1), work) == "error"


def test_requests_wait_for_the_original_to_come_back(tmp_path):
    async def work(worker):
        slow = asyncio.create_task(worker.infer([LARGE]))
        await asyncio.sleep(0.05)
        others = [asyncio.create_task(worker.infer([inputs(1, n)])) for n in range(3)]
        await asyncio.sleep(0)
        os.kill(worker.pid, signal.SIGKILL)
        answers = await asyncio.gather(*others, slow, return_exceptions=True)
        return [isinstance(each, Fault) for each in answers], worker.counts.starts

    limits = Limits(patient=True, deadline_s=60, hang_s=60)
    found = with_worker(faulty(tmp_path / "m.onnx", "slow"), limits, work)
    assert found == ([False] * 4, 2)


def test_a_file_that_cannot_be_opened_is_told(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"no model")

    async def work():
        worker = Worker("original", Opening(tmp_path / "m.onnx", source("onnxruntime")), Limits())
        worker.start()
        ready = await worker.first_start()
        why = worker.why
        with pytest.raises(Fault, match="cannot open it"):
            await worker.infer([inputs(1)])
        await worker.stop()
        return ready, why

    ready, why = asyncio.run(work())
    assert not ready and "cannot open it" in why and "Traceback" not in why


def test_a_process_may_take_so_much_memory_and_no_more(tmp_path):
    async def work():
        opening = Opening(model(tmp_path / "m.onnx"), source("onnxruntime"), memory_bytes=2**20)
        worker = Worker("original", opening, Limits())
        worker.start()
        ready = await worker.first_start()
        await worker.stop()
        return ready

    assert not asyncio.run(work())


def test_messages_carry_any_array():
    texts = np.empty((2, 1), object)
    texts[:, 0] = [b"", "ü".encode()]
    arrays = [np.float32(3), np.zeros((0, 4), np.int8), np.arange(6.0).reshape(2, 3), texts]
    arrays = [np.asarray(each) for each in arrays]
    parts = b"".join(bytes(part) for part in message({"command": "run"}, arrays))
    head, body = SIZES.unpack(parts[: SIZES.size])
    told = json.loads(parts[SIZES.size : SIZES.size + head])["arrays"]
    found = arrays_of(told, memoryview(parts)[SIZES.size + head :])
    assert body == len(parts) - SIZES.size - head
    for one, other in zip(arrays, found, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape and (one == other).all()


def test_what_is_kept_of_requests_is_bounded():
    now = [0.0]
    kept = Kept(lambda: now[0])
    for n in range(MOST_ANSWERS + 5):
        kept.answered(str(n), "original", {"y": np.zeros((1, 3))})
    assert not kept.entry("4") and kept.entry("5")
    kept.answered("big", "original", {"y": np.zeros(2**23)})
    assert not kept.entry("big") or not kept.entry("100")
    kept.answered("last", "original", {"y": np.zeros(3)})
    now[0] = 4000.0
    assert not kept.entry("last")
    for _ in range(100):
        now[0] += 1
        kept.fell_back("nan", "", [np.zeros((1, 3))], None, {"y": np.zeros((1, 3))})
    assert len(kept.examples()) == 24
