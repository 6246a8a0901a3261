"""Samplers: the diffusers schedulers a request can name."""
