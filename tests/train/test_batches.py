from collections import Counter

import numpy as np
import pytest

from raphael.base.randomness import Shuffled
from raphael.train import batches as batches_module
from raphael.train.batches import Batches


def sequence(batches, steps):
    return [
        pair for step in range(steps) for pair in zip(*(part.tolist() for part in batches.everyone(step)), strict=True)
    ]


def test_every_sample_comes_once_per_epoch_and_none_is_dropped():
    seen = sequence(Batches(seed=0, num_samples=10, batch_size=4), 10)
    for epoch in range(4):
        assert sorted(index for e, index in seen if e == epoch) == list(range(10))
        assert [e for e, _ in seen[epoch * 10 : epoch * 10 + 10]] == [epoch] * 10


def test_a_step_does_not_depend_on_the_steps_before():
    fresh, used = Batches(3, 10, 4), Batches(3, 10, 4)
    sequence(used, 9)
    np.testing.assert_array_equal(fresh.everyone(5), used.everyone(5))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_side_by_side_are_the_batch_of_one_worker(world_size):
    whole = Batches(0, 10, 8)
    ranks = [Batches(0, 10, 8, rank, world_size) for rank in range(world_size)]
    for step in range(5):
        np.testing.assert_array_equal(np.concatenate([rank.own(step) for rank in ranks], axis=1), whole.everyone(step))


def test_the_batch_size_changes_the_cut_not_the_order():
    assert sequence(Batches(0, 10, 4), 5) == sequence(Batches(0, 10, 10), 2)


def test_a_batch_may_be_larger_than_the_data():
    seen = sequence(Batches(0, 3, 8), 3)
    assert [epoch for epoch, _ in seen[:8]] == [0, 0, 0, 1, 1, 1, 2, 2]


def test_what_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match="got batch_size 9 for 2 workers"):
        Batches(0, 10, 9, 0, 2)
    with pytest.raises(ValueError, match="without samples"):
        Batches(0, 0, 4)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 16, 17, 1000, 4097])
def test_an_order_of_which_nothing_is_held_is_a_permutation_another_for_each_epoch_and_seed(count):
    everyone = np.arange(count)
    orders = [Shuffled(seed, epoch, count)[everyone].tolist() for seed in (0, 1) for epoch in range(3)]
    for order in orders:
        assert sorted(order) == everyone.tolist()
    if count >= 10:
        assert len(set(map(tuple, orders))) == 6
    # any place by itself
    assert Shuffled(0, 2, count)[everyone[::-1]].tolist() == orders[2][::-1]


def test_the_orders_of_small_sets_come_equally_often():
    """All 24 orders of four samples over 4,800 epochs: chi-squared with 23 degrees stays below its 99.9 % point."""
    counts = Counter(tuple(Shuffled(0, epoch, 4)[np.arange(4)].tolist()) for epoch in range(4800))
    assert len(counts) == 24
    assert sum((seen - 200) ** 2 / 200 for seen in counts.values()) < 49.7


def test_neighbours_in_the_order_are_no_neighbours_in_the_data():
    order = Shuffled(0, 0, 100_000)[np.arange(100_000)]
    for one, other in ((order[:-1], order[1:]), (order, np.arange(100_000))):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.02
    assert np.median(np.abs(np.diff(order))) > 20_000


def test_large_data_sets_keep_every_promise_of_small_ones(monkeypatch):
    monkeypatch.setattr(batches_module, "HELD", 9)
    test_every_sample_comes_once_per_epoch_and_none_is_dropped()
    test_a_step_does_not_depend_on_the_steps_before()
    for world_size in (1, 2, 4):
        test_ranks_side_by_side_are_the_batch_of_one_worker(world_size)
    test_the_batch_size_changes_the_cut_not_the_order()


def test_a_thousand_million_samples_begin_anywhere_at_once():
    batches = Batches(0, 10**9, 256)
    for step in (0, 10**6, 10**8):
        epochs, indices = batches.everyone(step)
        assert len(set(indices.tolist())) == 256 and 0 <= indices.min() and indices.max() < 10**9
        assert set(epochs.tolist()) == {256 * step // 10**9}


BUCKETS = (37, 5, 0, 90)  # the second is smaller than a batch
STEPS = 65  # of four rounds: 18 + 2 + 0 + 45 whole batches


def bucketed(**changes):
    return Batches(**{"seed": 0, "num_samples": 132, "batch_size": 8, "buckets": BUCKETS} | changes)


def bucket_of(index):
    """By walking along the data set."""
    for bucket, count in enumerate(BUCKETS):
        if index < count:
            return bucket
        index -= count


def test_one_named_bucket_changes_nothing():
    for step in range(20):
        np.testing.assert_array_equal(Batches(5, 10, 4, buckets=(10,)).everyone(step), Batches(5, 10, 4).everyone(step))


def test_the_order_of_one_bucket_is_the_permutations_one_after_the_other():
    from raphael.base.randomness import permutation

    row = [(epoch, index) for epoch in range(4) for index in permutation(5, epoch, 10).tolist()]
    assert sequence(Batches(5, 10, 4), 10) == row


def test_every_batch_is_of_one_bucket_and_buckets_come_in_proportion_to_their_samples():
    batches, seen = bucketed(), [0] * len(BUCKETS)
    for step in range(STEPS):
        (bucket,) = {bucket_of(index) for index in batches.everyone(step)[1].tolist()}
        seen[bucket] += 1
        assert batches.turn(step) == (bucket, seen[bucket] - 1)
    assert seen == [18, 2, 0, 45]  # 18.5, 2.5, 0, 45: what is left of a batch is owed to the next round


def test_every_sample_of_every_bucket_comes_once_an_epoch_and_tails_are_carried_over():
    streams = {bucket: [] for bucket in range(len(BUCKETS))}
    batches = bucketed()
    for step in range(4 * STEPS):
        epochs, indices = batches.everyone(step)
        streams[bucket_of(indices[0])].extend(zip(epochs.tolist(), indices.tolist(), strict=True))
    start = 0
    for bucket, count in enumerate(BUCKETS):
        members = list(range(start, start + count))
        start += count
        for epoch in range(len(streams[bucket]) // count if count else 0):
            part = streams[bucket][epoch * count : (epoch + 1) * count]
            assert [e for e, _ in part] == [epoch] * count
            assert sorted(index for _, index in part) == members
        if count:
            assert len(streams[bucket]) // count >= 14  # of sixteen rounds
    assert streams[2] == []


def test_buckets_are_mixed_within_a_round_and_differently_in_each():
    batches = bucketed()
    rounds = [[batches.turn(step)[0] for step in range(start, start + 15)] for start in (0, 16, 33)]
    assert all(turns != sorted(turns) for turns in rounds) and rounds[0] != rounds[1]


def test_with_buckets_a_step_does_not_depend_on_the_steps_before_nor_on_the_workers():
    used, fresh = bucketed(), bucketed()
    for step in range(40):
        used.everyone(step)
    np.testing.assert_array_equal(fresh.everyone(29), used.everyone(29))
    ranks = [bucketed(rank=rank, world_size=4) for rank in range(4)]
    for step in range(40):
        np.testing.assert_array_equal(np.concatenate([rank.own(step) for rank in ranks], axis=1), used.everyone(step))


def test_buckets_of_equal_size_have_orders_of_their_own():
    batches, orders = Batches(0, 64, 8, buckets=(32, 32)), {0: [], 1: []}
    for step in range(8):
        indices = batches.everyone(step)[1].tolist()
        orders[indices[0] // 32].extend(index % 32 for index in indices)
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(32)) and orders[0] != orders[1]


def test_counts_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match="expected 132 in all"):
        bucketed(buckets=(37, 5))
