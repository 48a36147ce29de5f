"""Low-rank adaptation of a network (LoRA, arXiv 2106.09685): what is trained beside its weights, and added to them."""
