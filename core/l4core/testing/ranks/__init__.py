"""Several ranks of one engine in tests: as threads of one process, and the same requests through one rank and through several."""
