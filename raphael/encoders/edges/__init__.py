"""Edge detectors: classical ones, and PiDiNet."""
