"""How smol-l4 and its EAGLE3 draft were trained. Run `python -m training --help` in checkpoints/smol-l4; the figures are in its README.md.

The model's definition and the merging of base and delta are those of the build (`l4core.demo`): the trained network is the stored one.
"""
