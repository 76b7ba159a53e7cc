"""Labs for benchmarks, driven through the command line as a user would."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PODWIRE = [sys.executable, "-m", "podwire.cli.main"]


@dataclass(frozen=True)
class Lab:
    """A running lab: its name, process and kubeconfig file, and the environment in which `podwire` finds it."""

    name: str
    pid: int
    kubeconfig: str
    environment: dict[str, str]

    def exec(self, target: str, *command: str, timeout: float = 120) -> str:
        """What `command` prints, run in `target` (a pod, a node, `world`). Raises CalledProcessError."""
        return podwire(self.environment, "lab", "exec", "--name", self.name, target, "--", *command, timeout=timeout)

    def processes(self) -> list[int]:
        """The lab's process and all its descendants; whom the kernel made orphans is a child of it again."""
        children: dict[int, list[int]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    children.setdefault(_parent(entry), []).append(int(entry.name))
        found = [self.pid]
        for pid in found:
            found += children.get(pid, [])
        return found

    def memory_mb(self) -> float:
        """The lab's memory: proportional set size of all its processes, in MB (what is shared counts once)."""
        total = 0
        for pid in self.processes():
            with contextlib.suppress(OSError):
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
                total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
        return total / 1024


def _parent(process: Path) -> int:
    # /proc/<pid>/stat: pid (name) state ppid …; the name may hold anything, also parentheses.
    return int((process / "stat").read_text().rpartition(")")[2].split()[1])


def podwire(environment: dict[str, str], *arguments: str, timeout: float = 180) -> str:
    command = [*PODWIRE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"podwire {' '.join(arguments)}: status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


@contextlib.contextmanager
def lab(name: str, *options: str) -> Iterator[Lab]:
    """A lab that is up and ready, and gone afterwards. Its state is in a place of its own: no other's name is taken."""
    with tempfile.TemporaryDirectory(prefix="podwire-bench-") as state:
        environment = {**os.environ, "PODWIRE_STATE_DIR": state}
        try:
            podwire(environment, "lab", "up", "--name", name, "--wait", *options, timeout=600)
            labs: list[dict[str, Any]] = json.loads(podwire(environment, "lab", "ls", "-o", "json"))
            entry = next(item for item in labs if item["name"] == name)
            yield Lab(name, entry["pid"], entry["kubeconfig"], environment)
            podwire(environment, "lab", "down", "--name", name)
        except BaseException:
            with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):  # there may be none; the first error says why
                podwire(environment, "lab", "down", "--name", name)
            raise
