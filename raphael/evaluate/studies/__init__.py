"""Studies beside the report: compared runs, paths of words, preferences of people."""
