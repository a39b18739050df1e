"""The package's version; on its own so that the build can read it without MLX."""

VERSION = "0.1.0"
