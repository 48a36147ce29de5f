"""Networks: they predict, nothing else."""
