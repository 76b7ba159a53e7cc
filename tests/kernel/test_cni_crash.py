"""An agent is killed between any two steps of an attachment's life, and at random under churn: nothing leaks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[1] / "support"

pytestmark = [pytest.mark.kernel, pytest.mark.needs("bridge devices", "IPv6"), pytest.mark.timeout(120)]


def crash(*arguments: str) -> int:
    """Run the program that kills agents; what it counted."""
    command = [sys.executable, str(SUPPORT / "cnicrash.py"), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=110, check=False, env=os.environ | {"PYTHONPATH": str(SUPPORT)}
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_killed_at_every_step(tmp_path: Path) -> None:
    assert crash("steps", str(tmp_path)) > 25


def test_no_del_is_lost_while_agents_are_killed(tmp_path: Path) -> None:
    assert crash("engine", str(tmp_path), "8", "5") > 5


def test_killed_at_random_under_churn(tmp_path: Path) -> None:
    """`python tests/support/cnicrash.py churn DIR 300` does it some hundred times."""
    assert crash("churn", str(tmp_path), "8", "1") == 8
