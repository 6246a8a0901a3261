"""Batch jobs: many rows of parameters become pictures in a folder, durably.

A job belongs to its output folder. `readers` turn input files into rows, `check` reads a whole input before any work is done,
`journal` keeps what has become of each row, `output` writes the folder, `runner` asks a server for the images. A job that ends
early, however it ends, goes on where it stopped. Nothing here imports torch.
"""
