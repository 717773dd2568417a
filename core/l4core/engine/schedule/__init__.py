"""Which tokens the next step computes, and what becomes of those it drew. Torch-free."""
