"""What a step costs the host of a GPU, measured without one: the engine on the cuda backend with kernels that do
nothing.
"""
