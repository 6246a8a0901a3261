"""mii_serve: high-throughput serving of Stable Diffusion v1.x. Importing this loads nothing heavy."""

__version__ = "0.1.0"
