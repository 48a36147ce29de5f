"""Stage `clip`: the text encoder and scoring CLIP, trained here or loaded."""
