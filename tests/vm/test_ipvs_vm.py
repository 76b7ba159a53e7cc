"""IPVS, in the virtual machine whose kernel has it: every case of Services with real packets, what is promised to random
clusters' clients, draining, change of mode."""

import sys
from pathlib import Path

import pytest
from vmrun import ROOT, run_in_vm

pytestmark = pytest.mark.timeout(1100)

_MODULES = "ip_vs ip_vs_rr dummy br_netfilter nf_conntrack nft_chain_nat nft_ct nft_numgen nft_masq nft_reject_inet"


def test_ipvs_gives_the_verdicts_of_the_other_modes() -> None:
    guest = Path(__file__).with_name("guest_ipvs.py").relative_to(ROOT)
    run = f"{sys.executable} -m pytest -q -p no:cacheprovider {guest}"
    printed = run_in_vm(
        "env", "PYTHONDONTWRITEBYTECODE=1", "bash", "-c", f"modprobe -a {_MODULES}; exec {run}", seconds=900
    )  # fmt: skip
    assert "9 passed" in printed
