import io
import tarfile

import numpy as np
import pytest
from PIL import Image
from truth.image_workspace import add_member, drawn, png, write_workspace

from data_pipeline.common import images
from data_pipeline.common.caption_rows import CaptionRows
from raphael.base.stage import Stage, StageError


@pytest.fixture
def workspace(tmp_path, project):
    return write_workspace(tmp_path, project)


def read(workspace):
    rows = CaptionRows(workspace / images.CAPTIONS)
    read = images.read_images(workspace / "data/shards", rows)
    return [(row.key, row.caption, image) for row, image in read]


def test_images_come_in_the_order_of_their_keys_whatever_the_order_in_the_tar(workspace):
    found = read(workspace)
    assert [key for key, _, _ in found] == [f"{number:09d}" for number in range(10)]
    for number, (_, caption, image) in enumerate(found):
        truth_caption, truth = drawn(number)
        assert caption == truth_caption and np.array_equal(np.asarray(image), np.asarray(truth))


def test_the_images_that_generated_ones_are_compared_with_are_those_that_training_saw(workspace):
    from raphael.evaluate.features.references import reference_images

    places = workspace / "data/shards", workspace / images.CAPTIONS
    compared = list(reference_images(*places, 10, 20, 36))
    trained_on = [images.fit(image, 20, 36) for _, _, image in read(workspace)]
    assert len(compared) == 10 and all(map(np.array_equal, compared, trained_on))


def replace_member(shard, key, body):
    with tarfile.open(shard, "w") as tar:
        for number in range(4):
            name = f"{number:09d}"
            content = body if name == key else png(drawn(number)[1])
            if content is not None:
                add_member(tar, f"{name}.png", content)


def gif(image):
    import io

    buffer = io.BytesIO()
    image.save(buffer, "GIF")
    return buffer.getvalue()


@pytest.mark.parametrize("body", [b"no picture", png(drawn(0)[1])[:60], gif(drawn(0)[1]), None])
def test_a_broken_or_missing_or_foreign_member_names_its_shard_and_key(workspace, body):
    replace_member(workspace / "data/shards/00000.tar", "000000002", body)
    with pytest.raises(StageError) as caught:
        read(workspace)
    message = str(caught.value)
    assert "00000.tar" in message and "000000002" in message and "\n" not in message


def test_a_missing_or_broken_shard_names_itself(workspace):
    shard = workspace / "data/shards/00001.tar"
    shard.write_bytes(b"not a tar" * 300)
    with pytest.raises(StageError, match="00001.tar: broken shard"):
        read(workspace)
    shard.unlink()
    with pytest.raises(StageError, match="00001.tar: no such shard"):
        read(workspace)


def test_absent_or_damaged_captions_name_the_stage_to_run(workspace):
    captions = workspace / images.CAPTIONS
    captions.write_bytes(b"PAR1 and nothing more")
    with pytest.raises(StageError, match="delete it and run the stage captions"):
        images.read_captions(captions)
    captions.unlink()
    with pytest.raises(StageError, match="run the stage captions first"):
        images.read_captions(captions)


def test_fit_covers_the_frame_and_keeps_the_middle():
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    assert (images.fit(Image.fromarray(wide), 20, 20)[:, 2:18] > 250).all()
    tall = np.zeros((40, 10, 3), np.uint8)
    tall[15:25] = 200
    fitted = images.fit(Image.fromarray(tall), 8, 8)
    assert fitted.shape == (8, 8, 3) and fitted.dtype == np.uint8 and (fitted[2:6] == 200).all()
    same = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    assert np.array_equal(images.fit(Image.fromarray(same), 8, 12), same)


def test_about_one_in_fifty_keys_is_held_out_by_its_hash_alone():
    keys = [f"{number:09d}" for number in range(1000)]
    held = images.heldout(keys)
    assert held.sum() == 20
    assert {key for key, is_held in zip(keys[::-1], images.heldout(keys[::-1]), strict=True) if is_held} == {
        key for key, is_held in zip(keys, held, strict=True) if is_held
    }
    assert images.heldout(keys[:5]).sum() == 2
    with pytest.raises(StageError, match="got 3 images, expected at least 4"):
        images.heldout(keys[:3])


def test_collecting_twice_reads_the_shards_once(workspace):
    stage = Stage("test", workspace)
    work = stage.workdir("x")
    first = images.collect(stage, work, 8, 12)
    assert first.images.shape == (10, 8, 12, 3)
    for shard in (workspace / "data/shards").glob("*.tar"):
        shard.unlink()
    again = images.collect(stage, work, 8, 12)
    assert np.array_equal(first.images, again.images) and first.keys == again.keys
    train, held = again.split()
    data = images.TrainingData(again, train, number=np.arange(10))
    assert len(data) == 8 and len(held) == 2
    batch = data.batch(np.array([3, 0]))
    assert batch["number"].tolist() == [train[3], train[0]]
    assert np.array_equal(batch["image"][1], again.images[train[0]])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_exif_says(workspace, orientation):
    """The truth: the camera's transpositions, one by one."""
    T = Image.Transpose
    turns = [
        None,
        T.FLIP_LEFT_RIGHT,
        T.ROTATE_180,
        T.FLIP_TOP_BOTTOM,
        T.TRANSPOSE,
        T.ROTATE_270,
        T.TRANSVERSE,
        T.ROTATE_90,
    ]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8))
    expected = image if turns[orientation - 1] is None else image.transpose(turns[orientation - 1])
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(buffer, "PNG", exif=exif)
    replace_member(workspace / "data/shards/00000.tar", "000000002", buffer.getvalue())
    assert np.array_equal(np.asarray(read(workspace)[2][2]), np.asarray(expected))
