"""The aesthetic heads give the scores that are known of them, and nothing in their files is run."""

import pickle

import numpy as np
import pytest
import torch

from raphael.base.stage import StageError
from raphael.encoders.aesthetic import load_head, similarity


@pytest.fixture
def weights(shared_data):
    return shared_data / "weights"


def embeddings(weights, model: str) -> torch.Tensor:
    """One image of each rating from 0 to 9."""
    files = [weights / "laion_aesthetic_v1" / f"{model}_embeddings" / f"rating{rating}.npy" for rating in range(10)]
    return torch.from_numpy(np.stack([np.load(file, allow_pickle=False).reshape(-1) for file in files])).float()


def test_v2_gives_the_golden_scores(weights):
    head = load_head(weights / "laion_aesthetic_v2" / "sac+logos+ava1-l14-linearMSE.pth")
    scores = head(embeddings(weights, "vit_l_14"))
    assert head.version == "v2" and scores.shape == (10,)
    golden = [1.655, 4.701, 5.747]
    assert [round(float(scores[rating]), 3) for rating in (0, 5, 9)] == pytest.approx(golden, abs=2e-3)


@pytest.mark.parametrize(("model", "file"), [("vit_l_14", "vit_l_14"), ("vit_b_32", "vit_b_32")])
def test_v1_rises_with_the_rating_and_is_another_scale(weights, model, file):
    head = load_head(weights / "laion_aesthetic_v1" / f"sa_0_4_{file}_linear.pth")
    scores = head(embeddings(weights, model))
    assert head.version == "v1" and np.corrcoef(scores.numpy(), np.arange(10))[0, 1] > 0.9
    with pytest.raises(ValueError, match="got embeddings of shape"):
        head(torch.zeros(2, 7))


class Bomb:
    def __reduce__(self):
        return (open, ("/dev/full", "w"))


def test_a_pickle_that_would_run_something_is_refused(tmp_path):
    (tmp_path / "bad.pth").write_bytes(pickle.dumps({"weight": Bomb()}))
    torch.save({"weight": torch.zeros(1, 4), "bias": Bomb()}, tmp_path / "worse.pth")
    for name in ("bad.pth", "worse.pth", "absent.pth"):
        with pytest.raises(StageError, match=f"{name}: not readable as tensors alone"):
            load_head(tmp_path / name)
    torch.save({"weight": torch.zeros(3, 4), "bias": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(StageError, match="other.pth: got tensors bias, weight, expected those"):
        load_head(tmp_path / "other.pth")


def test_similarity_is_the_cosine():
    image, text = torch.tensor([[3.0, 0.0], [1.0, 1.0]]), torch.tensor([[5.0, 0.0], [-2.0, 0.0]])
    assert similarity(image, text).tolist() == pytest.approx([1.0, -(0.5**0.5)])
    with pytest.raises(ValueError, match="expected two of the same"):
        similarity(image, text[:1])
