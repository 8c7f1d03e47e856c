"""`python -m metatokens.cli` is `metatokens`, under torchrun for example."""

import sys

from metatokens.cli import main

if __name__ == "__main__":
    sys.exit(main())
