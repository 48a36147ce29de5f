"""Images that come more often: each as often as it is said, in every epoch, with noise of its own each time."""

from collections import Counter

import numpy as np
from truth.toy_training import ToyData

from raphael.train.batches import Batches
from raphael.train.heldout import split
from raphael.train.repeats import repeated


class Buckets(ToyData):
    bucket_counts = (30, 20)


TIMES = {"key003": 10, "key031": 4, "key049": 2}


def test_an_epoch_has_each_image_as_often_as_it_is_said():
    data = repeated(Buckets(), {"repeats": TIMES})
    whole = Counter(data.keys[place] for place in range(len(data)))
    assert whole == {key: TIMES.get(key, 1) for key in Buckets().keys}
    assert data.bucket_counts == (39, 24) and len(data) == 63
    batches = Batches(7, len(data), 3, buckets=data.bucket_counts)
    seen = Counter(int(index) for step in range(21) for index in batches.everyone(step)[1])
    assert seen == Counter(range(63))  # 13 and 8 whole batches


def test_each_time_is_a_sample_of_its_own_with_the_record_it_stands_for():
    data = repeated(ToyData(), {"repeats": TIMES})
    places = [place for place in range(len(data)) if data.keys[place] == "key003"]
    assert len(set(places)) == 10  # the index that its noise is drawn by
    records = data.batch(np.array(places))["index"]
    assert (records == ToyData().batch(np.array([3]))["index"]).all()


def test_a_held_out_image_is_not_trained_on_however_often_it_comes():
    kept, out = split(ToyData(), 20)
    times = {key: 5 for key in out.keys}
    data = repeated(kept, {"repeats": times})
    assert len(data) == len(kept) and not set(data.keys) & set(out.keys)


def test_without_repeats_the_data_are_what_they_were():
    data = ToyData()
    assert repeated(data, {}) is data and repeated(data, {"repeats": {}}) is data
