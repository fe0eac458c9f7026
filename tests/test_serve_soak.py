"""The server under load, overload, random bytes and random kills.

Short here, at a tenth of the rate. With ``PAREDOWN_SOAK=N`` in the environment, on a quiet machine,
N times as long and with 50 seeds of each fault: ``PAREDOWN_SOAK=100 python -m pytest -m slow -s
tests/test_serve_soak.py`` prints the times that it saw. Load goes to this machine's server alone.
"""

import asyncio
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests.test_serve_http import BODIES, HEAD, INFER, LENGTH, RAW4, posted
from tests.test_serve_rollout import LARGE, at, good, rolled_back
from tests.test_serve_runs import Served, faulty, inputs, run_folder

pytestmark = pytest.mark.slow
SOAK = int(os.environ.get("PAREDOWN_SOAK", "0"))
SCALE = max(1, SOAK)
RATE = 1000.0 if SOAK else 100.0  # requests a second
GOOD = posted(INFER, HEAD + RAW4, f"{LENGTH}: {len(HEAD)}")
ORDER = [("begin", 0), ("validated", 0), ("advance", 2500), ("advance", 5000)]
ORDER += [("advance", 10000), ("promote", 10000)]


class Connection:
    """One kept connection; asks one request at a time."""

    def __init__(self, host):
        self.host, self.port = host.split(":")
        self.pair = None

    async def ask(self, sent):
        """The status of an answer."""
        if self.pair is None:
            self.pair = await asyncio.open_connection(self.host, int(self.port))
        reader, writer = self.pair
        writer.write(sent)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = next(x for x in head.split(b"\r\n") if x.startswith(b"content-length:"))
        await reader.readexactly(int(length.split(b":")[1]))
        return int(head.split(b" ")[1])

    def close(self):
        if self.pair is not None:
            self.pair[1].close()
            self.pair = None


async def poisson(host, rate, seconds):
    """Send at random times whatever comes back: latencies in ms from when a request was due, and
    what went wrong."""
    draws, free = random.Random(0), [Connection(host) for _ in range(64)]
    spent, wrong, tasks = [], [], set()
    begun = time.perf_counter()
    due = 0.0

    async def one(due):
        connection = free.pop() if free else Connection(host)
        try:
            status = await connection.ask(GOOD)
            if status != 200:
                wrong.append(status)
        except (OSError, asyncio.IncompleteReadError) as error:
            connection.close()
            wrong.append(repr(error))
        spent.append((time.perf_counter() - begun - due) * 1e3)
        free.append(connection)

    while due < seconds:
        due += draws.expovariate(rate)
        await asyncio.sleep(max(0.0, begun + due - time.perf_counter()))
        task = asyncio.create_task(one(due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    for connection in free:
        connection.close()
    return np.array(spent), wrong


def memory_bytes(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_load_is_answered_without_an_error(tmp_path):
    with Served(run_folder(tmp_path / "run", quick="dwell_s = 1e6")) as served:
        served.until(at("shadow"))
        spent, wrong = asyncio.run(poisson(served.host, RATE, 5 * SCALE))
        p50, p99 = np.percentile(spent, [50, 99])
        print(f"{len(spent)} requests at {RATE:g}/s: p50 {p50:.1f} ms, p99 {p99:.1f} ms")
        assert not wrong
        assert served.status()["models"]["original"]["starts"] == 1


def test_overload_is_shed_and_passes(tmp_path):
    folder = run_folder(tmp_path / "run", quick="dwell_s = 1e6")
    with Served(folder) as served:
        served.until(at("shadow"))
        before = memory_bytes(served.process.pid)
        seen, sheds = {}, []

        async def flood(seconds):
            end = time.monotonic() + seconds

            async def one():
                connection = Connection(served.host)
                while time.monotonic() < end:
                    began = time.perf_counter()
                    status = await connection.ask(GOOD)
                    seen[status] = seen.get(status, 0) + 1
                    if status == 503:
                        sheds.append(time.perf_counter() - began)
                connection.close()

            await asyncio.gather(*(one() for _ in range(1500)))

        asyncio.run(flood(3 * SCALE))
        assert set(seen) <= {200, 503} and seen[200]
        began = time.monotonic()
        served.until(lambda _: good(served, inputs(1)) == "1")
        assert time.monotonic() - began < 5
        assert memory_bytes(served.process.pid) - before < 2**28
        print(seen, f"sheds at {np.percentile(sheds or [0], 99) * 1e3:.0f} ms (p99)")


def test_random_bytes_are_never_a_servers_mistake(tmp_path):
    draws, whole = random.Random(1), [*BODIES.values(), GOOD] + [GOOD] * 50

    def mutated():
        sent = bytearray(draws.choice(whole)[: 2**14])
        for _ in range(draws.randrange(1, 6)):
            place = draws.randrange(len(sent) + 1)
            kind = draws.randrange(3)
            if kind == 0:
                sent[place:place] = bytes(draws.randrange(256) for _ in range(draws.randrange(9)))
            elif kind == 1:
                del sent[place : place + draws.randrange(9)]
            elif place < len(sent):
                sent[place] = draws.randrange(256)
        return bytes(sent)

    async def one(host, port, sent):
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(sent)
            writer.write_eof()
            found = await asyncio.wait_for(reader.read(2**16), 10)
        except OSError:
            found = b""
        finally:
            writer.close()
        status = found.split(b" ")[1] if found.startswith(b"HTTP/1") else b""
        assert not status.startswith(b"5") or status == b"501", (sent, found)
        assert b"Traceback" not in found

    async def all_of(count):
        gate = asyncio.Semaphore(16)

        async def held():
            async with gate:
                await one(*served.host.split(":"), mutated())

        await asyncio.gather(*(held() for _ in range(count)))

    with Served(run_folder(tmp_path / "run", quick="dwell_s = 1e6")) as served:
        for _ in range(SCALE):
            asyncio.run(all_of(2000))
        assert good(served, inputs(1)) == "1"
        assert "Traceback" not in served.log.read_text()


def test_a_rollout_survives_kills_under_load(tmp_path):
    folder = run_folder(tmp_path / "run")
    draws = random.Random(2)
    for _ in range(3 * SCALE):
        with Served(folder) as served:
            end = time.monotonic() + draws.uniform(0, 3)
            while time.monotonic() < end:
                good(served, inputs(1, draws.randrange(1000)))
            served.process.send_signal(signal.SIGKILL)
            served.process.wait()
        served.log.unlink()
    with Served(folder) as served:
        good(served, inputs(1))
        events = [(each["kind"], each["weight"]) for each in served.status()["events"]]
        assert events == ORDER[: len(events)] and events


@pytest.mark.parametrize("kind", ["nan", "infinite", "shape", "error", "slow", "class"])
def test_planted_faults_are_not_seen_by_clients(tmp_path, kind):
    for seed in range(max(1, SOAK and 50)):
        draws = random.Random(seed)
        folder = run_folder(tmp_path / f"run{seed}", lambda path: faulty(path, kind))
        with Served(folder, "--deadline-ms", 400) as served:
            served.until(at("shadow"))
            share = draws.uniform(0.1, 1)

            def ask(draws=draws, share=share, served=served):
                bad = draws.random() < share
                good(served, LARGE + draws.random() if bad else inputs(1, draws.randrange(99)))

            served.until(rolled_back, 120, ask)
            good(served, LARGE)
