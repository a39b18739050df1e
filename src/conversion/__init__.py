"""16-bit checkpoints of any model turned into INT8 ones, a piece at a time."""
