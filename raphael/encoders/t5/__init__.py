"""A small T5 of transformers' own class, and its unigram tokenizer, both made from captions alone."""
