"""T5's tokenizer: unigram pieces (Kudo 2018, arXiv 1804.10959), learned from captions by the package tokenizers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from raphael.encoders.pretrained import PretrainedError, one_line

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
SENTINELS = tuple(f"<extra_id_{number}>" for number in range(16))  # T5's names; it has 100
FILES = ("tokenizer.json", "tokenizer_config.json")


def train_tokenizer(captions: Iterable[str], vocabulary: int, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, which transformers reads. vocabulary: pieces at most.

    Pieces are put in an order of their own, by score and then by text, and scores rounded: the trainer's sums over
    threads and hashes are not the same twice. Raises PretrainedError for a vocabulary that the letters do not fit into.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = [PAD, END, UNKNOWN, *SENTINELS]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocabulary, special_tokens=special, unk_token=UNKNOWN, show_progress=False
    )
    try:
        tokenizer.train_from_iterator(captions, trainer)
    except Exception as error:  # the package raises its own, of no common class
        raise PretrainedError(f"clip.t5.vocabulary: got {vocabulary}, too few for these captions ({error})") from None
    learned = json.loads(tokenizer.to_str())["model"]["vocab"]
    pieces = sorted(((piece, round(score, 3)) for piece, score in learned if piece not in special), key=_order)
    tokenizer.model = models.Unigram([*((name, 0.0) for name in special), *pieces], unk_id=special.index(UNKNOWN))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    folder.mkdir(parents=True, exist_ok=True)
    names = {"pad_token": PAD, "eos_token": END, "unk_token": UNKNOWN, "additional_special_tokens": list(SENTINELS)}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    tokenizer.save(str(folder / FILES[0]))
    (folder / FILES[1]).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _order(piece: tuple[str, float]) -> tuple[float, str]:
    text, score = piece
    return -score, text


def load_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer of a folder. Raises PretrainedError."""
    from transformers import AutoTokenizer

    with one_line("the tokenizer", str(folder), " and ".join(FILES)):
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
