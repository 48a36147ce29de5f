import numpy as np
import pytest

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
    from raphael.randomness import permutation

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


def test_counts_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match="expected 132 in all"):
        bucketed(buckets=(37, 5))
