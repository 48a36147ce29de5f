"""Stage `score`: scores that the list lacks, computed from the images."""
