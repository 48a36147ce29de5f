"""The truth of drawn scenes, read back from pixels."""
