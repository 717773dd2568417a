"""Weights in fewer bits. `formats` says which parameter is kept how and in how many bytes (torch-free); a file a format says how a matrix gets
there and back, in plain torch: the definition its kernels are held to."""
