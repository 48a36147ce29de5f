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
