"""`python -m bitdistiller_peft` is the `bitdistiller` command."""

import sys

from bitdistiller_peft.cli import main

if __name__ == "__main__":
    sys.exit(main())
