"""``python -m lightning_peft.cli``: the ``lightning-peft`` program."""

import sys

from lightning_peft.cli.program import main

if __name__ == "__main__":
    sys.exit(main())
