"""`python -m sieve.train`, as torchrun needs it: the same as `sieve train`."""

import sys

from sieve.train.run import main

if __name__ == "__main__":
    sys.exit(main())
