"""Commands over the data beside the stages: the data card, forgetting, the watermark detector."""
