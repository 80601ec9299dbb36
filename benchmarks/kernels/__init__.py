"""Each op of a backend, timed against the reference and against the least time that the hardware allows, and what
compilers make of the GPU kernels without a GPU.
"""
