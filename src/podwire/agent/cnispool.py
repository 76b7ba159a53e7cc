"""DELs that came while no agent took them, as the executed plugin leaves them: an empty file `<container>@<interface>` each.

The name says all: a file with something in it would be half there for a moment, and an agent that starts in that moment could
tell neither whether its writer lives nor whether its engine was told of success."""

import logging
from pathlib import Path

from podwire.model.cni import AttachmentKey

log = logging.getLogger(__name__)


class Spool:
    """The directory beside the agent's socket. What is in it was answered with success: it has to be done."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def waiting(self) -> tuple[AttachmentKey, ...]:
        """What waits."""
        if not self._directory.is_dir():
            return ()
        found: list[AttachmentKey] = []
        for file in sorted(self._directory.iterdir()):
            container, at, ifname = file.name.partition("@")  # no container's id has one, an interface's name may
            if at:
                found.append(AttachmentKey(container, ifname))
            else:
                log.warning("%s is no DEL of podwire's plugin and is left alone", file)
        return tuple(found)

    def holds(self, key: AttachmentKey) -> bool:
        return self._file(key).exists()

    def keep(self, key: AttachmentKey) -> None:
        """For the next time. Raises OSError."""
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._file(key).touch(mode=0o600)

    def forget(self, key: AttachmentKey) -> None:
        """It is done, or a later ADD has overtaken it."""
        self._file(key).unlink(missing_ok=True)

    def _file(self, key: AttachmentKey) -> Path:
        return self._directory / f"{key.container}@{key.ifname}"
