"""The batched engine with DeepSpeed's kernels in the UNet's transformer blocks; fp16 on CUDA."""

from mii_serve.engine.deepspeed.engine import DeepSpeedEngine

__all__ = ["DeepSpeedEngine"]
