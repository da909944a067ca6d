"""`python -m sieve.train`, as torchrun needs it: the same as `sieve train`."""

import sys

from sieve.train.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
