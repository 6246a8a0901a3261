"""The batched engine: one UNet call for all that are due, each sample at its own step of its own sampler."""

from mii_serve.engine.native.engine import NativeEngine

__all__ = ["NativeEngine"]
