"""A node's bad days, all at once and for real: killed agents, an engine that repeats, reorders and drops DELs, no API server,
a clock that is set; and a disk that is full.

PODWIRE_STORM_ROUNDS=300 kills so many agents (about two seconds each); PODWIRE_STORM_SEED chooses another storm.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[1] / "support"
ROUNDS = int(os.environ.get("PODWIRE_STORM_ROUNDS", "3"))
SEED = os.environ.get("PODWIRE_STORM_SEED", "1")
SECONDS = 60 + 5 * ROUNDS

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.needs("VXLAN devices", "bridge devices", "IPv6", "nftables", "bandwidth limits (sch_tbf)"),
    pytest.mark.timeout(SECONDS + 30),
]


def play(scene: str, directory: Path, rounds: int) -> int:
    """Run the scene in processes of its own; what it counted."""
    command = [sys.executable, str(SUPPORT / "cnistorm.py"), scene, str(directory), str(rounds), SEED]
    environment = os.environ | {"PYTHONPATH": str(SUPPORT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_nothing_is_left_of_a_storm(tmp_path: Path) -> None:
    assert play("storm", tmp_path, ROUNDS) > 5 * ROUNDS


def test_a_full_disk(tmp_path: Path) -> None:
    """ADD says so and leaves nothing half made, DEL works; also by an agent that begins then. All is as before afterwards."""
    assert play("fulldisk", tmp_path, 2) == 8
