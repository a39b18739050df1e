"""What the stages learn from the 16-bit model's own trajectories."""
