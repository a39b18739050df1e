"""Inference with both tracks' results: opened, compared with the 16-bit model, saved."""
