"""`python -m mmfuse` is the `mmfuse` command."""

from __future__ import annotations

import sys

from mmfuse.cli import main

if __name__ == "__main__":
    sys.exit(main())
