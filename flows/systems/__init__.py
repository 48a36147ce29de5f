"""The comparison of the systems: arms of different kinds, trained at equal counted FLOP and judged alike."""
