"""The `podwire` command run as a user runs it, and labs that are up."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SHOP = ROOT / "examples" / "shop"
PODWIRE = (sys.executable, "-m", "podwire.cli.main")


@dataclass(frozen=True, slots=True)
class Done:
    """How a command ended."""

    status: int
    out: str
    err: str


@dataclass(frozen=True, slots=True)
class Podwire:
    """The `podwire` command with a state directory; `prefix` is put before it, e.g. to run it as another user."""

    state: Path
    prefix: tuple[str, ...] = ()

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PODWIRE_STATE_DIR": str(self.state)}

    def __call__(self, *arguments: str, stdin: str = "", timeout: float = 90) -> Done:
        done = subprocess.run(
            [*self.prefix, *PODWIRE, *arguments],
            input=stdin, env=self.environment, capture_output=True, text=True, timeout=timeout, check=False, cwd=ROOT,
        )  # fmt: skip
        return Done(done.returncode, done.stdout, done.stderr)

    def ok(self, *arguments: str, stdin: str = "", timeout: float = 90) -> str:
        """What it prints, when it succeeds."""
        done = self(*arguments, stdin=stdin, timeout=timeout)
        assert done.status == 0, f"podwire {' '.join(arguments)}: status {done.status}\n{done.out}{done.err}"
        return done.out

    def labs(self) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = json.loads(self.ok("lab", "ls", "-o", "json"))
        return listed

    def pid(self, name: str) -> int:
        return next(int(lab["pid"]) for lab in self.labs() if lab["name"] == name)


@dataclass(frozen=True, slots=True)
class Lab:
    """A lab that is up."""

    podwire: Podwire
    name: str
    kubeconfig: str

    def exec(self, target: str, *command: str, stdin: str = "") -> Done:
        return self.podwire("lab", "exec", "--name", self.name, target, "--", *command, stdin=stdin)

    def kubectl(self, *arguments: str, stdin: str = "", timeout: float = 60) -> str:
        """The real kubectl on this lab."""
        kubectl = Path(sys.executable).parent / "kubectl"
        done = subprocess.run(
            [str(kubectl), "--kubeconfig", self.kubeconfig, *arguments],
            input=stdin, capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"kubectl {' '.join(arguments)}: status {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout


def until(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    """The first true value of `condition`, asked again and again for at most `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.05)
