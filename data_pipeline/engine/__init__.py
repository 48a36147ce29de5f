"""Where the tasks of a data stage run: in its own process, in several of this machine, on a Ray cluster."""
