"""The device code. Importing it imports Triton, so `create` does that and nothing before."""
