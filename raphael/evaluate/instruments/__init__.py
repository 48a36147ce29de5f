"""What tells why a model draws as it does: the probe, knock-outs, the swap of texts, asked against read."""
