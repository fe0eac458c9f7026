"""Labels: the same partition as a plain reference, in whatever order pairs are merged."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from paredown.graph.coupling.labels import PINNED, Labels

SIZE = 24
labels_of = st.integers(0, SIZE)  # 0 is the pinned label
pairs = st.lists(st.tuples(labels_of, labels_of), max_size=40)
batches = st.lists(pairs, max_size=4)


def reference(merged: list[tuple[int, int]]) -> list[int]:
    """The least label that each label can be reached from, found by going on until it stays."""
    least = list(range(SIZE + 1))
    changed = True
    while changed:
        changed = False
        for a, b in merged:
            low = min(least[a], least[b])
            changed |= (least[a], least[b]) != (low, low)
            least[a] = least[b] = low
        for each in range(SIZE + 1):
            least[each] = least[least[each]]
    return least


def merged(labels: Labels, given: list[tuple[int, int]]) -> None:
    if given:
        first, second = np.array(given).T
        labels.union(first, second)


@given(batches)
def test_sets_are_those_of_a_plain_reference(given_batches):
    labels = Labels()
    assert labels.fresh(SIZE).tolist() == list(range(1, SIZE + 1))
    for batch in given_batches:
        merged(labels, batch)
    everything = [pair for batch in given_batches for pair in batch]
    assert labels.find(np.arange(SIZE + 1)).tolist() == reference(everything)


@given(pairs, st.randoms(use_true_random=False))
def test_the_order_of_merges_and_of_the_two_sides_says_nothing(given_pairs, random):
    shuffled = [pair if random.random() < 0.5 else pair[::-1] for pair in given_pairs]
    random.shuffle(shuffled)
    found = []
    for order in ([given_pairs], [[pair] for pair in shuffled]):
        labels = Labels()
        labels.fresh(SIZE)
        for batch in order:
            merged(labels, batch)
        found.append(labels.find(np.arange(SIZE + 1)).tolist())
    assert found[0] == found[1]


@given(pairs, labels_of)
def test_what_meets_a_pinned_label_is_pinned(given_pairs, chosen):
    labels = Labels()
    labels.fresh(SIZE)
    merged(labels, given_pairs)
    before = labels.find(np.arange(SIZE + 1))
    labels.union(np.array([chosen]), np.array([PINNED]))
    after = labels.find(np.arange(SIZE + 1))
    absorbed = (before == before[chosen]) | (before == PINNED)
    assert (after[absorbed] == PINNED).all()
    assert (after[~absorbed] == before[~absorbed]).all()


def test_fresh_labels_are_apart_and_keep_their_shape():
    labels = Labels()
    seen = [labels.fresh(3, 4), labels.fresh(5000), labels.fresh(0), labels.fresh()]
    assert [each.shape for each in seen] == [(3, 4), (5000,), (0,), ()]
    flat = np.concatenate([each.ravel() for each in seen])
    assert len(np.unique(flat)) == len(flat) == 5013 and PINNED not in flat
    assert (labels.find(flat) == flat).all()


def test_pairs_broadcast():
    labels = Labels()
    table = labels.fresh(3, 4)
    labels.union(table, table[:, :1])
    assert (labels.find(table) == table[:, :1]).all()
    labels.union(table[1], np.int64(PINNED))
    assert labels.find(table)[:, 2].tolist() == [table[0, 0], PINNED, table[2, 0]]


def test_a_long_chain_in_one_call():
    labels = Labels()
    chain = labels.fresh(3000)
    labels.union(chain[1:], chain[:-1])
    assert (labels.find(chain) == chain[0]).all()
