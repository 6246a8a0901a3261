"""The loop that all kernel sets share: one UNet call for all samples that are due, each at its own step of its own sampler."""

from mii_serve.engine.batched.engine import BatchedEngine

__all__ = ["BatchedEngine"]
