"""The cores of this machine: how threads wait, and work dealt out to processes."""
