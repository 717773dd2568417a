"""For tests of plugins and of the engine.

conformance: the kits that plugin authors subclass.  record, table: what a run of a kit proved, as a file, and the README's table of such files.
compiled: kernels compiled for devices that are not here.  contracts, doubles: vendors' libraries as data, and as plain torch on a CPU.
platforms, fake_device: machines and a device that nobody has.  models, ranks, simulation, drafts: small models, engines over ranks, a model of
integers, a drafter that knows the answers.
"""
