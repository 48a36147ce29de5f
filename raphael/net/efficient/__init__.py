"""The Efficient U-Net of super-resolution (Imagen, arXiv 2205.11487, appendix B). Imagen's and GLIDE's upsamplers are
it, and any system's whose images another network shall enlarge."""
