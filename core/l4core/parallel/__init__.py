"""Several processes, one engine: who the other ranks are, and what they add up together."""
