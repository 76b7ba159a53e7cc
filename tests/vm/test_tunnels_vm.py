"""IPIP and WireGuard, in the virtual machine whose kernel has them."""

import sys
from pathlib import Path

import pytest
from vmrun import ROOT, run_in_vm

pytestmark = pytest.mark.timeout(600)


def test_ipip_and_wireguard_carry_packets() -> None:
    guest = Path(__file__).with_name("guest_tunnels.py").relative_to(ROOT)
    contract = "tests/contract/test_kernel_tunnels.py"
    printed = run_in_vm(
        "env", "PYTHONDONTWRITEBYTECODE=1", sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "200",
        contract, str(guest), seconds=500,
    )  # fmt: skip
    assert "27 passed" in printed
