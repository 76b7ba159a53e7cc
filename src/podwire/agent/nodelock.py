"""One agent to a node: two would give the same addresses to different pods."""

import fcntl
import os
from pathlib import Path

from podwire.model.errors import PodwireError


class AnotherAgent(PodwireError):
    """This node has an agent already."""


class NodeLock:
    """Held from the making until `close`, or the end of the process, however it comes."""

    def __init__(self, state_dir: Path) -> None:
        """Raises AnotherAgent where another agent uses the directory, OSError where it cannot be written to."""
        path = state_dir / "agent.lock"
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            advice = "stop it first, or give this one a directory of its own"
            raise AnotherAgent(f"another agent works with {state_dir}: {advice}") from None

    def close(self) -> None:
        os.close(self._fd)
