"""The fault injection in its smallest form; `python benchmarks/faults.py --kills 50` is the real one."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[1] / "benchmarks" / "faults.py"


@pytest.mark.skipif(sys.platform == "win32", reason="runs are forks")
def test_nothing_is_lost():
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--kills", "2", "--pairs", "1"], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 kills resumed to bitwise the same result" in done.stdout
    assert "1 of 1 pairs: one went on to bitwise the same result" in done.stdout
