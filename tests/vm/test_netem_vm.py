"""`podwire lab fault delay` on a kernel that has netem."""

import sys
from pathlib import Path

import pytest
from vmrun import run_in_vm

pytestmark = pytest.mark.timeout(300)

GUEST = Path(__file__).with_name("guest_netem.py")


def test_delays() -> None:
    out = run_in_vm(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "150", str(GUEST), seconds=200)
    assert "1 passed" in out
