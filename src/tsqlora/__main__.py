"""``python -m tsqlora``: the same program as the ``tsqlora`` command."""

from __future__ import annotations

import sys

from tsqlora.cli import main

if __name__ == "__main__":
    sys.exit(main())
