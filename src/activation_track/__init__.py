"""What analyze_activations composes: decisions from statistics, and what is told about them."""
