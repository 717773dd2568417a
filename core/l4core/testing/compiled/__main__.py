"""`python -m l4core.testing.compiled`."""

import sys

from l4core.testing.compiled import main

if __name__ == "__main__":
    sys.exit(main())
