"""Labs for tests, with a state directory of their own, so nobody's lab is disturbed."""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from labcommand import SHOP, Lab, Podwire


@pytest.fixture(scope="session")
def podwire(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podwire]:
    command = Podwire(tmp_path_factory.mktemp("labs") / "state")
    yield command
    command.ok("lab", "down", "--all")


@pytest.fixture(scope="session")
def lab(podwire: Podwire) -> Iterator[Lab]:
    """One lab of three nodes with the shop in it, for all tests that leave it as it is."""
    podwire.ok("lab", "up", "--name", "shared", "-f", str(SHOP), "--wait")
    kubeconfig = podwire.ok("lab", "kubeconfig", "shared", "--path").strip()
    yield Lab(podwire, "shared", kubeconfig)
    podwire.ok("lab", "down", "shared")


@pytest.fixture
def ordinary() -> Iterator[Podwire]:
    """The command as an ordinary user runs it: as ourselves, or, where we are root, as uid 12345.

    Root's Python may live where others cannot look (/root). In a mount namespace of its own the directories above it are
    made passable, which nobody else sees. The state is not below pytest's directory: pytest keeps that one from others."""
    with tempfile.TemporaryDirectory(prefix="podwire-test-") as directory:
        command = Podwire(Path(directory) / "state")
        if _may_be_another():
            os.chown(directory, _ORDINARY, _ORDINARY)
            command = Podwire(command.state, ("unshare", "--mount", "--propagation", "private", "sh", "-ec", _AS_USER, "sh"))
        yield command
        command.ok("lab", "down", "--all")


def _may_be_another() -> bool:
    """Whether we are root of more than ourselves: in a user namespace of one id there is nobody else to be."""
    ranges = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    return os.geteuid() == 0 and any(int(first) <= _ORDINARY < int(first) + int(count) for first, _, count in ranges)


_ORDINARY = 12345
_PREFIX = Path(sys.base_prefix)
_TOP = Path(*_PREFIX.parts[:2])
_AS_USER = f"""
if [ ! -x {_TOP} ] || [ "$(stat -c %a {_TOP})" = 700 ]; then
  mkdir -p /mnt && mount -t tmpfs tmpfs /mnt && mkdir /mnt/python && mount --bind {_PREFIX} /mnt/python
  mount -t tmpfs -o mode=755 tmpfs {_TOP} && mkdir -p {_PREFIX} && mount --move /mnt/python {_PREFIX}
fi
export HOME=/nonexistent; unset XDG_RUNTIME_DIR
exec setpriv --reuid {_ORDINARY} --regid {_ORDINARY} --clear-groups "$@"
"""
