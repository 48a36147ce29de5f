"""A text transformer that is trained by the loss of the network that it tells, from token ids alone (GLIDE, arXiv
2112.10741, section 4.1). Apart from the others' text, whose encoders are frozen and stand in raphael/encoders."""
