"""Networks that read noised images and say what is on them: guides of sampling (raphael/diffusion/guidance.py)."""
