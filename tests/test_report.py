"""The report page: what it says, that it is safe, small, whole and well formed."""

from __future__ import annotations

import base64
import dataclasses
import itertools
import math
import random
import re
import struct
import tomllib
import zlib
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from paredown.core.errors import UserError
from paredown.core.goals import GoalCheck, Goals
from paredown.core.measurement import Comparison, Measurement
from paredown.core.results import Artifact, Run, Trial
from paredown.core.task import Task
from paredown.measure import speedups
from paredown.measure.stats import Interval
from paredown.report import charts
from paredown.report import page as pages
from paredown.report.page import render, report
from paredown.report.sections import Section, sections
from paredown.report.table import comparison
from paredown.run.details import _classes
from paredown.run.outcome import verdict

CLASSES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
WHERE = {
    "device": "local: Xeon Platinum 8481C, 2 cores, AVX-512 VNNI",
    "runtime": "onnxruntime 1.31.1, 1 thread",
    "system": "Linux 6.8",
}
ORIGINAL = Measurement(
    size_bytes=1_234_567,
    score=0.9124,
    score_low=0.9067,
    score_high=0.9178,
    examples=10_000,
    split="test",
    latency_ms_p50=0.902,
    latency_ms_p90=0.951,
    latency_ms_p99=1.204,
    latency_samples=2_000,
    throughput_per_s=1_108.6,
    memory_bytes=31_400_000,
    energy_mj=9.1,
    energy_source="estimated",
    where=WHERE,
)
COMPRESSED = dataclasses.replace(
    ORIGINAL,
    size_bytes=198_340,
    score=0.9087,
    score_low=0.9029,
    score_high=0.9142,
    latency_ms_p50=0.3421,
    latency_ms_p90=0.366,
    latency_ms_p99=0.471,
    throughput_per_s=2_923.1,
    memory_bytes=24_100_000,
    energy_mj=3.5,
)
GOALS = Goals(max_drop="1%", size="200 KB", latency="0.5x", memory="30 MB")
RECIPE = '[[steps]]\nstep = "PruneChannels"\namount = 0.25\n\n[[steps]]\nstep = "Quantize"\n'


def picture(seed: int) -> str:
    """A small PNG as a data URI."""
    colours = random.Random(seed)
    rows = b"".join(
        b"\0" + bytes((colours.randrange(256) + x * y) % 256 for x in range(32) for _ in range(3))
        for y in range(32)
    )

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 32, 32, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    encoded = base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()
    return f"data:image/png;base64,{encoded}"


def trial(
    title: str, line: str, kept: bool, size: int, ms: float, score: float, after: int = 0
) -> Trial:
    measurement = dataclasses.replace(
        ORIGINAL,
        size_bytes=size,
        latency_ms_p50=ms,
        score=score,
        split="validation",
        examples=5_000,
    )
    decision = (
        "Smaller and faster, and the score held within the goal."
        if kept
        else "It cost 2.92 points of score and saved 3% of the time; one point is allowed."
    )
    return Trial(
        steps=[line, 'step = "FineTune", epochs = 2'],
        title=title,
        reason="Channels of the last stage carry 4% of the score's sensitivity and 31% of bytes.",
        expected="0.75x the size, 0.8x the time, under 0.5 points",
        kept=kept,
        decision=decision,
        measurement=measurement,
        comparison=Comparison(score_difference=score - 0.914),
        seconds=184.0,
        stage="ab" * 32,
        recipe="cut, then int8",
        after=after,
        shipped=kept,
    )


def details() -> dict[str, Any]:
    chance = random.Random(7)
    layers = [
        {
            "name": f"stage{stage}.{block}.conv{conv}.weight",
            "op": "conv2d",
            "shape": [16 << stage, 16 << stage, 3, 3],
            "bytes_before": 4 * 9 * (16 << stage) ** 2,
            "bytes_after": int(5 * (16 << stage) ** 2 * (1 if stage else 1.6)),
            "dtype_before": "float32",
            "dtype_after": "int8",
        }
        for stage in range(3)
        for block in range(3)
        for conv in (1, 2)
    ]
    edges = [-0.4 + 0.8 * n / 48 for n in range(49)]
    bell = [1000 * math.exp(-(((e + 0.008) / 0.11) ** 2)) for e in edges[:-1]]
    pruned = [0.0 if 20 <= n < 28 else v for n, v in enumerate(bell)]
    pruned[24] = 5_200.0
    histograms = [
        {"name": layer["name"], "edges": edges, "before": bell, "after": after}
        for layer, after in zip(layers[:7], 4 * [[*bell[1:], 0.0], pruned], strict=False)
    ]
    flips = [
        {
            "index": chance.randrange(10_000),
            "target": CLASSES[n % 10],
            "before": CLASSES[n % 10] if n % 3 else CLASSES[(n + 2) % 10],
            "after": CLASSES[(n + 3) % 10] if n % 3 else CLASSES[n % 10],
            "picture": picture(n),
        }
        for n in range(21)
    ]
    return {
        "layers": layers,
        "histograms": histograms,
        "classes": [
            {"name": name, "examples": 1000, "before": b, "after": b + chance.gauss(-0.004, 0.008)}
            for name, b in zip(
                CLASSES, (0.93, 0.96, 0.88, 0.81, 0.91, 0.86, 0.94, 0.93, 0.95, 0.95), strict=True
            )
        ],
        "flips": flips,
        "flip_counts": {"now_wrong": 143, "now_right": 106, "examples": 10_000},
        "latency_samples_ms": {
            "original": [0.86 + chance.expovariate(18) for _ in range(2000)],
            "compressed": [0.32 + chance.expovariate(38) for _ in range(2000)],
        },
        "census": {
            "float_ops": {"Softmax": 1, "Gemm": 1},
            "integer_ops": {"QLinearConv": 20, "QLinearAdd": 8, "QLinearGlobalAveragePool": 1},
            "bytes_by_dtype": {"int8": 176_000, "int32": 9_200, "float32": 5_400},
        },
        "notes": [
            "The last linear layer stays in float32: quantized, it cost 0.6 points.",
            "Power could not be read here; energy is estimated from the processor's rating.",
        ],
        "reproduce": ["paredown replay runs/cifar-resnet8", "paredown validate runs/cifar-resnet8"],
    }


def met_run() -> Run:
    return Run(
        name="ResNet-8 on CIFAR-10",
        created="2025-03-14 09:26 UTC",
        command="paredown run resnet8.py --size 200KB --latency 0.5x --max-drop 1%",
        goals=dataclasses.asdict(GOALS),
        target={"runtime": "onnxruntime", "device": "local", "threads": 1},
        versions={"paredown": "0.1.0", "torch": "2.13.0", "onnxruntime": "1.31.1"},
        data={
            "train": {"examples": 40_000, "fingerprint": "5f" * 32},
            "validation": {"examples": 5_000, "fingerprint": "0a" * 32},
            "test": {"examples": 10_000, "fingerprint": "c3" * 32},
        },
        seed=0,
        plan=[],
        baseline=dataclasses.replace(ORIGINAL, split="validation", examples=5_000, score=0.914),
        trials=[
            trial(
                "Prune a quarter of the channels",
                'step = "PruneChannels", amount = 0.25',
                True,
                720_000,
                0.66,
                0.9132,
            ),
            trial(
                "Quantize to int8",
                'step = "Quantize", dtype = "int8"',
                True,
                204_300,
                0.371,
                0.9117,
                1,
            ),
            trial(
                "Prune a further quarter",
                'step = "PruneChannels", amount = 0.25',
                False,
                151_000,
                0.36,
                0.8848,
                2,
            ),
            trial(
                "Factor the linear layer",
                'step = "LowRank", rank = 4',
                True,
                198_340,
                0.342,
                0.9109,
                2,
            ),
            dataclasses.replace(
                trial("Remove whole blocks", 'step = "PruneLayers", amount = 1', False, 1, 1, 0),
                measurement=None,
                comparison=None,
                decision="Could not be applied: every block changes the shape.",
                stage="",
            ),
        ],
        artifact=Artifact("out/resnet8.onnx", "onnxruntime", "9e" * 32, 198_340, RECIPE),
        original=Artifact("out/original.onnx", "onnxruntime", "1b" * 32, 1_234_567, ""),
        on_device={"original": ORIGINAL, "compressed": COMPRESSED},
        comparison=Comparison(
            score_difference=-0.0037,
            score_difference_low=-0.0068,
            score_difference_high=-0.0006,
            speedup=2.637,
            speedup_low=2.61,
            speedup_high=2.66,
            verdict="With 95% confidence the score fell by no more than 0.68 points.",
            speed="With 95% confidence the median inference is 2.61 to 2.66 times as fast.",
        ),
        checks=GOALS.check(COMPRESSED, ORIGINAL),
        met=True,
        verdict="6.2 times smaller and 2.6 times faster, at a cost of 0.37 points of score.",
        details=details(),
    )


def missed_run() -> Run:
    slow = dataclasses.replace(
        COMPRESSED,
        latency_ms_p50=1.4,
        latency_ms_p99=None,
        latency_samples=120,
        energy_mj=None,
        energy_source="unavailable",
    )
    return dataclasses.replace(
        met_run(),
        on_device={"original": ORIGINAL, "compressed": slow},
        checks=GOALS.check(slow, ORIGINAL),
        comparison=None,
        met=False,
        verdict="The latency goal was missed.",
    )


def minimal_run() -> Run:
    return dataclasses.replace(
        met_run(),
        baseline=Measurement(size_bytes=900),
        trials=[],
        artifact=None,
        original=None,
        on_device={},
        comparison=None,
        checks=[],
        met=False,
        verdict="Stopped before anything was exported.",
        versions={},
        data={},
        details={},
    )


def hostile_run() -> Run:
    run, bad = met_run(), '<script>alert("http://evil.example")</script>'
    facts = details()
    facts["layers"] = [
        {**facts["layers"][0], "name": f"{bad}{n}", "bytes_before": n + 1} for n in range(2000)
    ]
    facts["histograms"] = [{**facts["histograms"][0], "name": f"{bad}{n}"} for n in range(2000)]
    facts["classes"] = [{**facts["classes"][0], "name": f"{bad}{n}"} for n in range(1000)]
    facts["flips"] = [
        {"index": n, "target": bad, "before": bad, "after": "x", "picture": picture(n)}
        for n in range(500)
    ] + [{"index": 1, "target": 1, "before": 0, "after": 1, "picture": "http://evil.example/a.png"}]
    facts["flips"][0]["picture"] = 'data:image/png;base64,AA" onerror="alert(1)'
    facts["latency_samples_ms"]["original"] += [math.nan, math.inf]
    facts["notes"] = [bad]
    return dataclasses.replace(run, name=bad, verdict=bad, command=bad, details=facts)


RUNS = {f.__name__: f for f in (met_run, missed_run, minimal_run, hostile_run)}
VOID = {"meta", "link", "img", "br", "col"}


class Balance(HTMLParser):
    """Collects tags and attributes; every element must be closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


def parsed(page: str) -> Balance:
    parser = Balance()
    parser.feed(page)
    parser.close()
    assert not parser.open
    return parser


def words(page: str) -> str:
    """What a reader sees, with single spaces."""
    body = re.sub(r"<style>.*?</style>", "", page, flags=re.S)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())


@pytest.mark.parametrize("name", RUNS)
def test_every_page_is_whole_small_and_closed_to_the_network(name: str) -> None:
    page = render(RUNS[name]())
    tags = parsed(page).seen
    assert len(page.encode()) < 1_000_000
    assert not {"script", "iframe", "object", "embed"} & {tag for tag, _ in tags}
    for tag, attributes in tags:
        assert not any(key.startswith("on") for key in attributes)
        for key in ("src", "href", "xlink:href", "srcset", "poster"):
            assert (attributes.get(key) or "data:").startswith("data:"), tag
    style = page.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style


@pytest.mark.parametrize("name", RUNS)
def test_no_coordinate_is_nan_or_infinite(name: str) -> None:
    for tag, attributes in parsed(render(RUNS[name]())).seen:
        if tag in {"rect", "line", "circle", "text", "path", "polyline", "svg"}:
            for key in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height", "d"):
                assert not re.search("nan|inf", attributes.get(key) or ""), (tag, attributes)


def test_a_met_run_says_so_with_its_figures() -> None:
    seen = words(render(met_run()))
    for expected in (
        "Goals met", "6.22× smaller", "1.23 MB → 198 KB", "2.64× faster", "0.902 ms",
        "−0.37 points", "91.24%", "90.87%", "paired, −0.68 to −0.06", "2.61× to 2.66× as fast",
        "≥ −1.00 points", "≤ 200 KB", "9.1 mJ", "estimated", "Xeon Platinum",
        "Score by class", "Now wrong 143", "Now right 106", "QLinearConv 20", "seed 0",
        "paredown replay runs/cifar-resnet8", 'step = "PruneChannels"', "5f5f5f5f5f5f",
    ):  # fmt: skip
        assert expected in seen, expected
    for check in met_run().checks:
        assert check.sentence in seen
    assert "99th percentile is left out" not in seen


def test_a_missed_run_marks_the_goal_and_says_why_the_99th_percentile_is_missing() -> None:
    page = render(missed_run())
    seen = words(page)
    assert "Goals missed" in seen and "Goals met" not in seen
    assert "1.55× slower" in seen
    assert "fewer than 459 samples (here 120)" in seen
    assert "unavailable" in seen
    goals = page.split('<ul class="goals">')[1].split("</ul>")[0]
    assert goals.count('aria-label="missed"') == 1 and goals.count('aria-label="met"') == 3


def test_undone_steps_are_hollow_listed_and_explained() -> None:
    page = render(met_run())
    undone = words(page.split('id="undone"')[1].split("</section>")[0])
    assert "3 Prune a further quarter. It cost 2.92 points" in undone
    assert "5 Remove whole blocks. Could not be applied" in undone
    chart = page.split('<div class="two">')[1].split("</svg>")[0]
    assert chart.count('class="undone"') == 1 and chart.count('class="shipped"') == 4
    assert [chart.count(f'class="mark">{n}<') for n in range(6)] == [1, 1, 1, 1, 1, 0]


def test_a_minimal_run_leaves_out_what_it_does_not_have() -> None:
    page = render(minimal_run())
    assert set(re.findall(r'<section id="(\w+)"', page)) == {"repeat"}
    assert "900 B" in page and "score: at most 1 points lower; size: 200 KB; latency: 0.5×" in page


def test_every_section_is_two_files_and_stands_in_its_place() -> None:
    folder = Path(pages.__file__).parent / "sections"
    names = [section.template.removesuffix(".html") for section in sections()]
    for suffix in (".py", ".html"):
        assert sorted(path.stem for path in folder.glob(f"[a-z]*{suffix}")) == sorted(names)
    shown = re.findall(r'<section id="(\w+)"', render(met_run()))
    assert shown == [
        name for name in names if name not in ("head", "mixed", "explained", "fidelity")
    ]


def test_every_template_comes_with_the_package() -> None:
    root = Path(pages.__file__).parent.parent
    settings = tomllib.loads((root.parent / "pyproject.toml").read_text())
    globs = settings["tool"]["setuptools"]["package-data"]["paredown"]
    assert {path for glob in globs for path in root.glob(glob)} >= set(root.rglob("*.html"))


def test_a_section_that_lacks_what_its_template_shows_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    empty = Section("census.html", lambda run: {"kinds": []})
    monkeypatch.setattr(pages, "sections", lambda: [empty])
    with pytest.raises(UserError, match=r"section 'census' shows: UndefinedError: .*columns"):
        render(met_run())


@pytest.mark.parametrize("missing", sorted(details()))
def test_each_detail_may_be_missing_or_empty(missing: str) -> None:
    for value in ({}, {missing: type(details()[missing])()}):
        run = dataclasses.replace(met_run(), details={**details(), missing: None, **value})
        parsed(render(run))


@pytest.mark.parametrize("side", ["original", "compressed"])
def test_either_measurement_may_be_missing(side: str) -> None:
    run = met_run()
    run = dataclasses.replace(run, on_device={side: run.on_device[side]}, comparison=None)
    assert "Score on 10,000 test examples" in words(render(run))


def test_hostile_names_stay_text_and_pictures_are_never_addresses() -> None:
    page = render(hostile_run())
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "evil.example/a.png" not in page and "onerror" not in page
    assert "1,960 more layers" in words(page)
    assert "24 of 2,000 tensors" in words(page)


def test_scores_outside_zero_to_one_are_plain_numbers() -> None:
    a = dataclasses.replace(
        ORIGINAL, score_in_points=False, score=-31.25, score_low=-31.5, score_high=-31.0
    )
    b = dataclasses.replace(a, score=-31.75)
    run = dataclasses.replace(
        met_run(), verdict="", baseline=a, on_device={"original": a, "compressed": b}, trials=[],
        comparison=None, checks=[GoalCheck("max_drop", 1.0, 0.5, True, "Fine.")],
        details={},
    )  # fmt: skip
    seen = words(render(run))
    assert "−31.25" in seen and "−0.5" in seen and "points" not in seen


def test_what_is_in_the_file_is_told_from_what_a_second_recipe_kept() -> None:
    run = met_run()
    factored = dataclasses.replace(run.trials[3], recipe="factors", after=0, shipped=False)
    page = render(dataclasses.replace(run, trials=[*run.trials[:3], factored]))
    chart = page.split('<div class="two">')[1].split("</svg>")[0]
    assert [chart.count(f'class="{kind}"') for kind in ("shipped", "kept", "undone")] == [3, 1, 1]
    dots = {
        kind: re.search(rf'<circle cx="([^"]*)" cy="([^"]*)" r="5" class="{kind}"', chart).groups()
        for kind in ("shipped", "kept")
    }
    number = '"([^"]*)"'
    line = rf"<line x1={number} y1={number} x2={number} y2={number} class=\"path left\""
    [left] = re.findall(line, chart)
    assert left == (*dots["shipped"], *dots["kept"])  # from the original, no other recipe's end
    assert chart.count('class="path"') == 2
    seen = words(page.split('id="trajectory"')[1].split("</section>")[0])
    assert seen.count("In the file") == 2 and seen.count("Kept, not in the file") == 1
    assert "Recipe: cut, then int8" in seen and "Recipe: factors" in seen
    left_out = words(page.split('id="undone"')[1].split("</section>")[0])
    assert "4 Factor the linear layer. Kept in its recipe, factors, and left" in left_out


@pytest.mark.parametrize(
    ("strict", "title"), [(False, "Met, not proven"), (True, "Goals not proven")]
)
def test_what_is_not_proven_is_on_the_first_screen(strict: bool, title: str) -> None:
    run = met_run()
    assert run.comparison is not None
    compared = dataclasses.replace(run.comparison, score_claim="not provable", speedup_low=1.9)
    checks = dataclasses.replace(GOALS, proof=strict).check(COMPRESSED, ORIGINAL, None, compared)
    told = verdict(checks, True, True, compared)
    unproven = dataclasses.replace(
        run, checks=checks, met=all(c.met for c in checks), verdict=told, comparison=compared
    )
    assert [check.goal for check in checks if check.unproven] == ["max_drop", "latency"]
    assert unproven.met is not strict and unproven.outcome == ("not proven" if strict else "open")
    head = render(unproven).split("</header>")[0]
    assert title in words(head) and "Goals met" not in words(head)
    assert head.count('aria-label="not proven"') == 2 and compared.verdict in words(head)


def test_labels_of_crowded_points_do_not_touch() -> None:
    points = [charts.Point(100 + n % 3, 90 + n % 2 / 50, str(n), "kept", "") for n in range(14)]
    drawn = charts.trajectory(points, charts.Axis("size, KB", 60, "goal"), charts.Axis("score, %"))
    at = [
        (float(x), float(y))
        for x, y in re.findall(r'<text x="([\d.]+)" y="([\d.]+)"[^>]*mark', drawn)
    ]
    assert len(at) == 14
    for i, (x, y) in enumerate(at):
        for other_x, other_y in at[:i]:
            assert abs(x - other_x) >= 8 or abs(y - other_y) >= 12


def test_the_page_is_written_whole_and_the_same_each_time(tmp_path: Path) -> None:
    path = report(met_run(), tmp_path / "deep" / "report.html")
    assert path.read_text("utf-8") == render(Run.from_json(met_run().to_json()))
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("ignore", "names"), [(None, ["cat", "dog", "255"]), (255, ["cat", "dog", "-1"])]
)
def test_labels_that_do_not_count_are_no_classes(ignore, names):
    task = Task(
        example=(torch.zeros(1),), score=lambda y, t: y, classes=("cat", "dog"), ignore=ignore
    )
    rows = _classes(task, [0, 1, 255, -1, 0], torch.ones(5), torch.zeros(5))
    assert sorted(row["name"] for row in rows) == sorted(names)
    assert next(row["examples"] for row in rows if row["name"] == "cat") == 2


def test_one_slow_inference_does_not_crush_the_latencies() -> None:
    run = met_run()
    samples = [0.34 + n / 10_000 for n in range(60)]
    run.details["latency_samples_ms"] = {"original": samples, "compressed": [*samples[:-1], 9.0]}
    page = render(run)
    assert "1 of 120, the slowest, lies beyond the right edge, at 9 ms." in page
    drawn = page.split('id="latency"')[1].split("</section>")[0]
    ticks = [
        float(each) for each in re.findall(r'text-anchor="middle" class="tick">([\d.]+)<', drawn)
    ]
    assert max(ticks) < 400  # microseconds, or milliseconds below one
    run.details["latency_samples_ms"] = {"original": samples, "compressed": samples}
    assert "All of them are shown." in render(run)


def test_what_did_not_change_and_what_was_not_measured() -> None:
    run = met_run()
    bare = {"energy_mj": None, "energy_source": "unavailable"}
    sides = {name: dataclasses.replace(m, **bare) for name, m in run.on_device.items()}
    sides["compressed"] = dataclasses.replace(
        sides["compressed"], memory_bytes=sides["original"].memory_bytes
    )
    page = words(render(dataclasses.replace(run, on_device=sides)))
    assert "1× the same" not in page and "the same" in page
    assert "Energy per inference" not in page


def test_a_change_of_speed_is_worded_alike_everywhere() -> None:
    run = met_run()
    a, b = run.on_device["original"], run.on_device["compressed"]
    fast, slower = dataclasses.replace(a, throughput_per_s=100.0), 1.01
    b = dataclasses.replace(
        b,
        **{f"latency_ms_p{q}": slower * getattr(fast, f"latency_ms_p{q}") for q in (50, 90, 99)},
        throughput_per_s=100 / slower,
    )
    sides = {"original": fast, "compressed": b}
    for interval, said in (((0.97, 1.01), "no measurable speed-up"), ((0.985, 0.995), "1.01")):
        sentence = speedups.speedup_sentence(Interval(*interval, 1 / slower))
        both = Comparison(
            speedup=1 / slower,
            speedup_low=interval[0],
            speedup_high=interval[1],
            speedup_p90_low=interval[0],
            speedup_p90_high=interval[1],
            speedup_p99_low=0.5,  # rare ones scatter more
            speedup_p99_high=1.5,
            speed=sentence,
        )
        told = dataclasses.replace(run, on_device=sides, comparison=both)
        rows = {row["name"]: row["change"] for row in comparison(told)}
        assert sentence.startswith(said)
        for name in ("Latency, median", "Latency, 90th percentile", "Throughput"):
            assert rows[name].startswith(said), rows
        assert rows["Latency, 99th percentile"] == "no measurable speed-up"
        page = words(render(told))
        assert ("1.01× slower" in page) is (said == "1.01")


def test_a_score_says_what_it_is() -> None:
    run = met_run()
    run.details["score"] = "minus the mean squared error"
    assert "Score, minus the mean squared error, on 10,000 test examples" in words(render(run))


def test_the_sizes_by_layer_add_to_the_files() -> None:
    run = met_run()
    page = words(render(run))
    section = page.split("Size by layer")[1].split("Weights")[0]
    assert "All else in the file" in section
    together = section.split("Together")[1]
    assert "1.23 MB" in together and "198 KB" in together


@pytest.mark.parametrize("low, high", [(-0.4, 0.4), (-0.00021, 0.00034), (-12345.6, 9876.5)])
def test_ticks_of_a_small_chart_do_not_touch(low: float, high: float) -> None:
    edges = [low + (high - low) * n / 8 for n in range(9)]
    drawn = charts.histogram("w", edges, [1.0] * 8, [2.0] * 8)
    found = re.findall(r'<text x="([\d.-]+)" y="107.0"[^>]*>([^<]+)<', drawn)
    spans = [(float(x) - 3.5 * len(w), float(x) + 3.5 * len(w)) for x, w in found]
    assert spans and spans[0][0] >= 0 and spans[-1][1] <= 200
    assert all(a[1] < b[0] for a, b in itertools.pairwise(spans))
