"""The mixture of experts below the router: which kernel computes it, and the kernels of the core."""
