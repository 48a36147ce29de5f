"""Stage `filter`: aesthetic score, watermark, size, unsafe, duplicates."""
