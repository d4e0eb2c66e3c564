"""The order of samples is a pure function: balanced, without gaps, the same however it is shared out."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from lit_datamodules.order import INSTANCE, PRIOR, Bucket, Order, Slot, counter_rng, epoch_order, stream

POOLS = ((0, 1, 2), (3, 4, 5, 6, 7))


def squares(*pools: tuple[int, ...]) -> tuple[Bucket, ...]:
    return (Bucket((64, 64), pools),)


TWO = Order(5, squares(*POOLS), (tuple(range(10, 30)),), batch_size=4, per_batch=4)


def test_streams_do_not_touch_global_generators() -> None:
    np.random.seed(3)
    before = np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    TWO.batch(7)
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index, union-attr]
    assert counter_rng(1, "a", 2).random() == counter_rng(1, "a", 2).random() != counter_rng(1, "a", 3).random()


@pytest.mark.parametrize("mixing", ["interleaved", "joint"])
def test_every_epoch_shows_every_sample_once(mixing: str) -> None:
    pool = tuple(range(7))
    seen = [stream(0, "instance", (pool,), mixing, visit) for visit in range(21)]  # type: ignore[arg-type]
    epochs = [seen[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(epoch) == list(pool) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3, "each epoch has its own order"
    ours, theirs = (epoch_order(seed, "x", 4, 9).tolist() for seed in (0, 1))
    assert sorted(ours) == list(range(9)) and ours != theirs


def test_batch_k_walks_on_where_batch_k_minus_1_ended() -> None:
    order = Order(2, squares(tuple(range(5))), (), batch_size=3)
    seen = [slot.sample for step in range(5) for slot in order.batch(step)]
    assert [sorted(seen[i : i + 5]) for i in (0, 5, 10)] == [list(range(5))] * 3


def test_positions_and_roles() -> None:
    batch = TWO.batch(3)
    assert [slot.position for slot in batch] == list(range(8))
    assert [slot.role for slot in batch] == [INSTANCE] * 4 + [PRIOR] * 4
    assert {slot.step for slot in batch} == {3}
    assert all((slot.sample >= 10) == (slot.role == PRIOR) for slot in batch)


def test_concepts_take_turns_or_count_by_their_pictures() -> None:
    for step in range(10):
        concepts = [slot.sample >= 3 for slot in TWO.batch(step) if slot.role == INSTANCE]
        assert concepts == [False, True, False, True]
    joint = Order(5, TWO.buckets, (), batch_size=4, mixing="joint")
    counts = Counter(slot.sample for step in range(20) for slot in joint.batch(step))
    assert counts == dict.fromkeys(range(8), 10)


def test_as_many_sets_as_concepts_are_paired() -> None:
    order = Order(0, squares((0,), (1,)), ((10, 11), (20, 21)), batch_size=2, per_batch=2)
    for step in range(6):
        assert [slot.sample // 10 for slot in order.batch(step)] == [0, 0, 1, 2]


def test_repeats_weigh() -> None:
    order = Order(0, squares((0, 0, 0, 1)), (), batch_size=4)
    assert Counter(slot.sample for step in range(5) for slot in order.batch(step)) == {0: 15, 1: 5}


def test_ranks_share_the_batch_of_one_process() -> None:
    """Two ranks with two instances each see what one process sees with four."""
    whole = Order(1, TWO.buckets, TWO.priors, batch_size=4, per_batch=2)
    half = Order(1, TWO.buckets, TWO.priors, batch_size=2, per_batch=1)

    def key(slot: Slot) -> int:
        return slot.position

    for step in range(6):
        shared = [slot for rank in range(2) for slot in half.batch(step, rank, 2)]
        assert sorted(shared, key=key) == whole.batch(step)
        assert [len(half.batch(step, rank, 2)) for rank in range(2)] == [3, 3]
