"""A tokenizer of whole words, for the smallest text towers of transformers."""

import json


def word_tokenizer_files(folder, words, special, **tokenizer_config):
    """A tokenizer of whole words in the form that transformers reads without a network."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: index for index, word in enumerate([*special, *dict.fromkeys(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    opening = "<s> " if "<s>" in special else ""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{opening}$A </s>",
        special_tokens=[(name, vocabulary[name]) for name in ("<s>", "</s>") if name in special],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, **tokenizer_config}))
    return vocabulary
