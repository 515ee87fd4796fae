"""Trains this package: python train.py, or accelerate launch train.py [key=value ...]."""

import sys
from pathlib import Path

from dbconvert.cli.main import main

if __name__ == "__main__":
    main(["train", str(Path(__file__).parent), *sys.argv[1:]])
