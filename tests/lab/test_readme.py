"""README's examples, run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)

pytestmark = [pytest.mark.lab, pytest.mark.timeout(120)]


def test_the_readme_has_the_two_blocks_that_are_tested_here() -> None:
    assert [block.split()[0:2] for block in BLOCKS] == [["make", "demo"], ["podwire", "lab"]]


def test_the_two_commands_are_make_targets() -> None:
    for line in BLOCKS[0].strip().splitlines():
        command = line.partition("#")[0].split()
        subprocess.run([*command, "--dry-run"], cwd=ROOT, check=True, capture_output=True, timeout=30)


def test_a_cluster_of_your_own(tmp_path: Path) -> None:
    """The second block, line by line in one shell: every command must succeed, and the last leaves nothing."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "XDG_RUNTIME_DIR": str(tmp_path),  # a place of its own for the lab's state: nobody's lab is disturbed
    }
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", BLOCKS[1]],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'deployment "web" successfully rolled out' in done.stdout
    listed = subprocess.run(
        [sys.executable, "-m", "podwire.cli.main", "lab", "ls", "-o", "json"],
        env=environment, capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    assert listed.stdout.strip() == "[]"
