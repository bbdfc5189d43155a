"""`python -m striate.train …` is `striate train …`."""

import sys

from .cli import main

sys.exit(main(["train", *sys.argv[1:]]))
