"""The UNet and the VAE with operations fused, for half precision on CUDA: less memory traffic, fewer kernels, no layout change.

`operations.py` says what is fused and has it in torch; `kernels.py` and `matmul_kernels.py` have it in Triton; `forward.py` and
`vae.py` walk the model's modules with it; `choice.py` decides on the device which of the kernels are used. **None of it has run
on a GPU yet.**
"""
