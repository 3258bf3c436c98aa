"""``python -m fused_copy_cli``: the console script ``fused-copy``, for a tree that is not installed."""

import sys

from fused_copy_cli import main

if __name__ == "__main__":
    sys.exit(main())
