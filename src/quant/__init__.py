"""Methods of quantization, one file each; they know arrays and linears, no models."""
