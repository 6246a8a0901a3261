"""The kernel set with DeepSpeed's transformer blocks; fp16 on CUDA."""

from mii_serve.engine.kernels.deepspeed.kernels import DeepSpeedKernels, FusedDeepSpeedKernels, install_kernels

__all__ = ["DeepSpeedKernels", "FusedDeepSpeedKernels", "install_kernels"]
