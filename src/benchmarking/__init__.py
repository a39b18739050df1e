"""What a step and a picture cost, in seconds and bytes: 16 bits beside every way to quantize."""
