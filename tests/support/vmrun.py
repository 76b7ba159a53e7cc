"""Running a test's commands on a kernel that has what this machine's lacks (IPVS, WireGuard, IPIP, netem)."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUNNER = Path(os.environ.get("PODWIRE_VM_RUN", ROOT.parent / "shared" / "vm" / "run"))
"""A program `run [-w DIR] [-t SECONDS] COMMAND…`: the command as root on a throw-away machine that sees our files read-only."""

_NEVER_BOOTED = "IO-APIC + timer doesn't work"
"""What the guest's kernel ends with, before anything has run, where its emulated clock got no processor time to tick."""
_BOOTS = 3


def run_in_vm(*command: str, writable: Path | None = None, seconds: int = 300) -> str:
    """What `command` printed there. Skips where there is no such machine; fails the test where the command does."""
    if not RUNNER.exists():
        pytest.skip("no virtual machine runner (PODWIRE_VM_RUN)")
    options = ["-t", str(seconds), *(["-w", str(writable)] if writable else [])]
    for _ in range(_BOOTS):
        done = subprocess.run(
            [str(RUNNER), *options, *command], capture_output=True, text=True, timeout=seconds + 120, check=False, cwd=ROOT
        )
        if _NEVER_BOOTED not in done.stderr:
            break
    if done.returncode:
        what = f"{shlex.join(command)} ended with status {done.returncode} in the virtual machine"
        pytest.fail(f"{what}:\n{done.stdout}{done.stderr}")
    return done.stdout
