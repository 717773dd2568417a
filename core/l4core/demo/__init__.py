"""The demo checkpoint: how it is built from public base weights and a small delta, and the drive that `make demo` takes through it."""
