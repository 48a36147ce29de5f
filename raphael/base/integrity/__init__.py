"""Whether files are what was written: pieces of unfinished work, what stages published, a model's whole folder."""
