"""The report of a run, and the figures and sheets that pages are made of."""
