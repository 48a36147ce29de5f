"""Stage `encode`: latents, token ids and edge maps of every image."""
