"""For tests of plugins and of the engine.

conformance: the kits that plugin authors subclass.  record, table: what a run of a kit proved, as a file, and the README's table of such files.
compiled: kernels compiled for devices that are not here.  contracts, doubles: vendors' libraries as data, and as plain torch on a CPU.
platforms, fake_device: machines and a device that nobody has.  models: small ones, as folders.  ranks: engines over several ranks.
simulation: a model of integers.  recorded_drafter: one that knows the answers.
"""
