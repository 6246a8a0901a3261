"""A model in one file, in the layout of the original Stable Diffusion code (`model.safetensors`, `model.ckpt`).

`contents` says what a file holds, `configs` reads the sizes of its parts off its tensors and adds what the family of the model
publishes (`families.py`), `names` maps its tensors to those of diffusers, `tokenizer` finds the vocabulary, which no such file
has, and `loading` fills the modules. Only `loading` and the reading of pickles import torch.
"""
