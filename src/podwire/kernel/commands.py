"""Other programs run in a network namespace, such as iptables: argument vectors only, never through a shell."""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from podwire.kernel.netns import in_netns

_LONGEST_SECONDS = 30.0
_ADMINISTRATORS = ("/usr/local/sbin", "/usr/sbin", "/sbin")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended, and what it wrote."""

    status: int
    out: str
    err: str


def administrators_path(environ: Mapping[str, str]) -> str:
    """PATH with the administrators' directories, where iptables, nft and others are: not every account has them in it."""
    path = environ.get("PATH", os.defpath).split(os.pathsep)
    return os.pathsep.join((*path, *(directory for directory in _ADMINISTRATORS if directory not in path)))


def find_program(name: str) -> str:
    """The program's whole path; "" where the machine has none of that name."""
    return shutil.which(name, path=administrators_path(os.environ)) or ""


async def run_command(netns_fd: int, argv: Sequence[str], stdin: str = "") -> Outcome:
    """Run the program in the namespace and wait, off the loop. Raises OSError where it cannot be run or takes too long."""

    def run() -> Outcome:
        # The child is forked from this thread, which has entered the namespace.
        try:
            done = subprocess.run(
                argv,
                input=stdin,
                capture_output=True,
                text=True,
                timeout=_LONGEST_SECONDS,
                check=False,
                env=os.environ | {"LC_ALL": "C", "PATH": administrators_path(os.environ)},
            )
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"{argv[0]} did not end within {_LONGEST_SECONDS:.0f} s") from error
        return Outcome(done.returncode, done.stdout, done.stderr)

    return await in_netns(netns_fd, run)
