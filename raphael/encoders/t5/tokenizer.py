"""T5's tokenizer: unigram pieces (Kudo 2018, arXiv 1804.10959), learned from captions; cut by the
package tokenizers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from raphael.encoders.pretrained import PretrainedError, one_line
from raphael.encoders.t5.unigram import learn_pieces

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
SENTINELS = tuple(f"<extra_id_{number}>" for number in range(16))  # T5's names; it has 100
FILES = ("tokenizer.json", "tokenizer_config.json")


def train_tokenizer(captions: Iterable[str], vocabulary: int, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, which transformers reads. vocabulary: tokens at most, those that
    open, close and stand for spans included. Raises PretrainedError for one that the letters do not fit into."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    special = [PAD, END, UNKNOWN, *SENTINELS]
    normalizer, cut = normalizers.NFKC(), pre_tokenizers.Metaspace()
    words: Counter[str] = Counter()
    for caption in captions:
        words.update(word for word, _ in cut.pre_tokenize_str(normalizer.normalize_str(caption)))
    try:
        pieces = learn_pieces(words, vocabulary - len(special))
    except ValueError as error:
        raise PretrainedError(
            f"clip.t5.vocabulary: got {vocabulary}, {len(special)} of them special: {error}"
        ) from None
    tokenizer = Tokenizer(models.Unigram([*((name, 0.0) for name in special), *pieces], special.index(UNKNOWN)))
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, cut, decoders.Metaspace()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    folder.mkdir(parents=True, exist_ok=True)
    names = {"pad_token": PAD, "eos_token": END, "unk_token": UNKNOWN, "additional_special_tokens": list(SENTINELS)}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    tokenizer.save(str(folder / FILES[0]))
    (folder / FILES[1]).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def load_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer of a folder. Raises PretrainedError."""
    from transformers import AutoTokenizer

    with one_line("the tokenizer", str(folder), " and ".join(FILES)):
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
