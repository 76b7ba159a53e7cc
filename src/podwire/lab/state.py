"""A lab's directory: who it is, whether it lives, and the files that others read. Light: the CLI imports it at once.

    <root>/<name>/lock         held (flock) by the lab process for its whole life: locked means alive
                  lab.json     pid, its start time, API address, what was asked for
                  nodes.json   the nodes that are there now
                  kubeconfig   0600
                  lab.log      the lab process' log
                  lab.db …     the API server's store

The lock, and not the pid, says whether a lab lives: a pid is used again, a lock goes with its holder whatever it dies of.
"""

import fcntl
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from podwire.lab.errors import LabError
from podwire.lab.spec import check_name

ROOT_VARIABLE = "PODWIRE_STATE_DIR"
_RECORD = "lab.json"
_LOCK = "lock"
_NODES = "nodes.json"


@dataclass(frozen=True, slots=True)
class LabRecord:
    """`lab.json`. `pid` and `start_time` (clock ticks since boot, field 22 of /proc/<pid>/stat) as seen on the machine."""

    name: str
    pid: int
    start_time: int
    port: int
    spec: dict[str, Any] = field(default_factory=dict)


def state_root(env: Mapping[str, str], uid: int) -> Path:
    """The directory that holds all labs of this user: $PODWIRE_STATE_DIR, else the runtime directory, else one below home,
    else one in /tmp. It is not created."""
    if env.get(ROOT_VARIABLE):
        return Path(env[ROOT_VARIABLE]).absolute()
    runtime = Path(env.get("XDG_RUNTIME_DIR") or f"/run/user/{uid}")
    if _owned(runtime, uid):
        return runtime / "podwire"
    home = env.get("HOME", "")
    if home and _owned(Path(home), uid):
        return Path(home) / ".local" / "state" / "podwire"
    return Path(f"/tmp/podwire-{uid}")


class LabDirectory:
    """The files of one lab, there or not."""

    def __init__(self, root: Path, name: str) -> None:
        self.name = check_name(name)
        self.path = root / name
        self.kubeconfig = self.path / "kubeconfig"
        self.log = self.path / "lab.log"
        self.database = self.path / "lab.db"

    def create(self) -> int:
        """Make the directory afresh and take its lock; returns the lock's descriptor, which is handed to the lab process.

        What a dead lab of this name left is deleted. Raises LabError when a live one has the name."""
        try:
            lock = self._lock()
        except OSError as error:
            raise LabError(
                f"cannot use {self.path}: {error.strerror}; set {ROOT_VARIABLE} to a directory of your own"
            ) from error
        if lock is None:
            raise LabError(f"a lab named {self.name!r} is up already: `podwire lab down {self.name}`, or choose another --name")
        for entry in self.path.iterdir():
            if entry.name != _LOCK:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        return lock

    def _lock(self) -> int | None:
        """Others hold the lock for moments, to look or to delete the directory, hence several tries. None: it is taken."""
        for _ in range(10):
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_private(self.path.parent)
            try:
                lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:
                continue
            if _try_lock(lock, fcntl.LOCK_EX) and self._is_current(lock):
                return lock
            os.close(lock)
            time.sleep(0.02)
        return None

    def _is_current(self, lock: int) -> bool:
        try:
            return os.fstat(lock).st_ino == (self.path / _LOCK).stat().st_ino
        except OSError:
            return False

    @property
    def alive(self) -> bool:
        """Whether some process holds the lock."""
        try:
            probe = os.open(self.path / _LOCK, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            return not _try_lock(probe, fcntl.LOCK_SH)
        finally:
            os.close(probe)

    def write_record(self, record: LabRecord) -> None:
        write_private(self.path / _RECORD, json.dumps(asdict(record)))

    def record(self) -> LabRecord | None:
        """What is known of the lab, dead or alive; None when nothing was written yet."""
        try:
            document = json.loads((self.path / _RECORD).read_text())
            return LabRecord(**document)
        except (OSError, ValueError, TypeError):
            return None

    def live_record(self) -> LabRecord:
        """The record of a lab that is up. Raises LabError."""
        record = self.record() if self.alive else None
        if record is None:
            raise LabError(
                f"no lab named {self.name!r} is up: `podwire lab ls` shows those that are, `podwire lab up` starts one"
            )
        return record

    def end(self, *, grace: float = 10.0) -> None:
        """End the lab process (SIGTERM, after `grace` seconds SIGKILL). Blocks until it is gone; the files stay.

        Raises LabError when no such lab is up."""
        record = self.live_record()
        with suppress(ProcessLookupError):
            descriptor = os.pidfd_open(record.pid)
            try:
                if start_time(record.pid) == record.start_time:
                    _end(descriptor, grace)
            finally:
                os.close(descriptor)

    def write_nodes(self, names: Sequence[str]) -> None:
        """Keep the list of nodes current for `podwire lab ls`."""
        write_private(self.path / _NODES, json.dumps(list(names)))

    def nodes(self) -> list[str]:
        """The names of the lab's nodes, in the order of their indexes."""
        try:
            return [str(name) for name in json.loads((self.path / _NODES).read_text())]
        except (OSError, ValueError):
            return []

    def remove(self) -> None:
        """Delete the directory of a lab that is not up (one that came up meanwhile keeps it)."""
        try:
            lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return
        try:
            if _try_lock(lock, fcntl.LOCK_EX) and self._is_current(lock):
                shutil.rmtree(self.path, ignore_errors=True)
        finally:
            os.close(lock)

    def keep_log(self) -> Path:
        """Move the log of a lab that did not come up to where it stays, and delete the rest; returns its new place."""
        kept = self.path.parent / f"{self.name}.failed.log"
        with suppress(OSError):
            self.log.replace(kept)
        self.remove()
        return kept

    def log_tail(self, lines: int = 5) -> str:
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return ""


def labs(root: Path) -> Iterator[tuple[LabDirectory, LabRecord]]:
    """The labs under `root` that are up, by name; directories of dead ones are deleted on the way."""
    try:
        names = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    except OSError:
        return
    for name in names:
        if not (root / name / _LOCK).exists():
            continue
        directory = LabDirectory(root, name)
        if not directory.alive:
            directory.remove()
            continue
        record = directory.record()
        if record is not None:
            yield directory, record


def write_private(path: Path, text: str) -> None:
    """Write `text` so that readers see the old file or the new one, and only their owner sees either (0600)."""
    fresh = path.with_name(f".{path.name}.new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    fresh.replace(path)


def start_time(pid: int) -> int:
    """Field 22 of /proc/<pid>/stat; 0 when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    # The second field, the command in parentheses, may hold blanks and parentheses itself.
    return int(text.rpartition(")")[2].split()[19])


def _end(pidfd: int, grace: float) -> None:
    signal.pidfd_send_signal(pidfd, signal.SIGTERM)
    if not _gone(pidfd, grace):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        _gone(pidfd, grace)


def _gone(pidfd: int, seconds: float) -> bool:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(seconds * 1000))


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _owned(path: Path, uid: int) -> bool:
    try:
        return path.is_dir() and path.stat().st_uid == uid
    except OSError:
        return False


def _check_private(path: Path) -> None:
    """Refuse a directory that someone else owns or can write to (one in /tmp may have been made by anyone)."""
    status = path.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise LabError(f"{path} belongs to another user or is open to others: set {ROOT_VARIABLE} to a directory of your own")
