"""Captions by real classes of transformers with small random weights; what stands there already stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from truth.own_images import bodies, sidecars

from data_pipeline.tools import captioning
from raphael.base.stage import StageError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *"a the red blue green dog cat on under".split()]


def tokenizer(folder: Path):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", bos_token="[DEC]",
    )  # fmt: skip


@pytest.fixture(scope="module")
def blip(tmp_path_factory) -> Path:
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    folder = tmp_path_factory.mktemp("blip")
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(WORDS), "encoder_hidden_size": 32, "projection_dim": 16}
    text |= {"pad_token_id": 0, "bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3}
    torch.manual_seed(0)
    config = BlipConfig(text_config=text, vision_config={**small, "image_size": 32, "patch_size": 16})
    BlipForConditionalGeneration(config).save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer(folder)).save_pretrained(folder)
    return folder


@pytest.fixture
def images(tmp_path) -> Path:
    root = sidecars(tmp_path / "in", 5)
    for number in (1, 2, 4):
        (root / f"image_0{number}.txt").unlink()
    return root


def test_blip_gives_every_image_without_a_caption_one(blip, images, capsys):
    kept = (images / "image_00.txt").read_text()
    (images / "broken.jpg").write_bytes(b"no image")
    told = [str(images), "--model", str(blip), "--max-tokens", "5", "--batch-size", "2", "--prefix", "sks, "]
    assert captioning.main(told) == 0
    assert "3 written, 2 had one, 1 could not be read" in capsys.readouterr().out
    captions = [(images / f"image_0{number}.txt").read_text() for number in range(5)]
    assert captions[0] == kept and not (images / "broken.txt").exists()
    for number in (1, 2, 4):
        words = captions[number].removeprefix("sks, ").split()
        assert captions[number].startswith("sks, ") and set(words) <= set(WORDS) and 0 < len(words) <= 5
    assert captioning.main(told) == 1  # nothing but the broken one is left


def test_a_batch_says_what_single_images_say_and_twice_is_the_same(blip, images):
    from PIL import Image

    captioner = captioning.Captioner.load(str(blip), "", 6, torch.device("cpu"))
    opened = [Image.open(images / f"{name}.png").convert("RGB") for name, _, _ in bodies(3)]
    whole = captioner(opened)
    assert whole == captioner(opened) == [captioner([image])[0] for image in opened]


def test_a_prompt_is_what_the_caption_begins_with(blip, images):
    from PIL import Image

    captioner = captioning.Captioner.load(str(blip), "the red", 4, torch.device("cpu"))
    (text,) = captioner([Image.open(images / "image_00.png").convert("RGB")])
    assert "the red" in text


def test_captions_that_are_there_are_replaced_only_where_that_is_said(blip, images):
    assert len(captioning.waiting(images, False)[0]) == 3 and len(captioning.waiting(images, True)[0]) == 5
    assert captioning.main([str(images), "--model", str(blip), "--max-tokens", "4", "--overwrite"]) == 0
    assert "number" not in (images / "image_00.txt").read_text()


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("absent", "no folder .*absent here, and as a hub id: "),
        ("in", "expected an image-to-text model of transformers"),
    ],
)
def test_what_is_no_captioner_is_one_line(images, tmp_path, place, said):
    with pytest.raises(StageError, match=said):
        captioning.Captioner.load(str(tmp_path / place), "", 5, torch.device("cpu"))


def test_a_folder_without_images_is_one_line(tmp_path):
    with pytest.raises(StageError, match="no image in it; expected .bmp, .gif, .jpeg"):
        captioning.waiting(tmp_path, False)
