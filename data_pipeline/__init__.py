"""From links to latents: one package a stage."""
