"""Tensor operations of the model, each a plain torch function; faster twins for a device stand beside them."""
