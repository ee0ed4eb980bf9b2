"""Three runs killed at random moments and resumed; `make chaos` has more of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "chaos.py"


def test_runs_that_are_killed_and_resumed_end_with_the_same_bytes() -> None:
    command = [sys.executable, str(SCRIPT), "--kills", "3", "--configuration", "best"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "(seed 0): 3 killed; 0 ended otherwise" in done.stdout
