"""``python -m fused_copy``: as the console script ``fused-copy``, but only where the package's import works."""

import sys

from fused_copy_cli import main

if __name__ == "__main__":
    sys.exit(main())
