"""ONNX's own cases of single nodes: each is taken and right, or refused with a reason."""

import random
from collections import Counter

import pytest
import torch

from benchmarks import onnx_nodes

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")

LEAST_TAKEN = 1050  # of those with floats in and out, in onnx 1.23
# What no net computes with, or what cannot be told before it runs.
REFUSED = {
    *("Loop", "Scan", "NonZero", "Unique", "Compress", "NonMaxSuppression", "Bernoulli"),
    *("ImageDecoder", "StringConcat", "TfIdfVectorizer", "SequenceInsert", "TreeEnsemble"),
}


@pytest.fixture(scope="module")
def cases():
    return list(onnx_nodes.cases())


@pytest.fixture(scope="module")
def judged(cases):
    return [onnx_nodes.judge(case) for case in cases]


def test_none_is_wrong(judged):
    assert [each for each in judged if each.verdict == "wrong"] == []
    counts = Counter(each.verdict for each in judged if each.floats)
    assert counts["taken"] + counts["taken, shapes constant"] >= LEAST_TAKEN
    taken = {each.ops for each in judged if each.verdict != "refused"}
    assert not taken & REFUSED
    assert all(each.why for each in judged if each.verdict == "refused")


def test_some_are_captured(cases, judged):
    """As graphs, which compute the same."""
    pairs = zip(cases, judged, strict=True)
    chosen = [case for case, each in pairs if each.verdict.startswith("taken") and each.floats]
    for case in random.Random(0).sample(chosen, 12):
        again = onnx_nodes.judge(case, capture=True)
        assert again.verdict != "wrong", again


@pytest.mark.slow
def test_all_are_captured(cases):
    judged = [onnx_nodes.judge(case, capture=True) for case in cases]
    assert [each for each in judged if each.verdict == "wrong"] == []


def test_the_table_counts_each_case_once(judged):
    last = onnx_nodes.table(judged).splitlines()[-1]
    numbers = [int(cell) for cell in last.split("|")[2:-1]]
    assert numbers[0] == len(judged) == sum(numbers[1:])
