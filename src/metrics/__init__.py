"""How good a quantized model is: signals, pictures, fidelity to the 16-bit model."""
