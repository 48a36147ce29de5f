"""Schedules, denoisers, samplers, guidance: functions over one seam, D(x, sigma, condition)."""
