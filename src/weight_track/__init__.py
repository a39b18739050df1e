"""The weight track: the model's blocks, their cached inputs and the methods of rounding, joined."""
