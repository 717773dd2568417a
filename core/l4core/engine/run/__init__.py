"""A scheduled batch becomes tensors, the model's step and draws."""
