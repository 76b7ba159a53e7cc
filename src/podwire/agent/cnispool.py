"""DELs that came while no agent took them, as the executed plugin leaves them: a file `<container>@<interface>` each."""

import logging
from pathlib import Path

from podwire.model.cni import AttachmentKey

log = logging.getLogger(__name__)


class Spool:
    """The directory beside the agent's socket. What is in it was answered with success: it has to be done."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def waiting(self) -> tuple[AttachmentKey, ...]:
        """What waits. Files that a plugin did not finish are removed: its engine was told that the DEL failed."""
        if not self._directory.is_dir():
            return ()
        found: list[AttachmentKey] = []
        for file in sorted(self._directory.iterdir()):
            container, at, ifname = file.name.rpartition("@")
            if file.name.startswith("."):
                file.unlink(missing_ok=True)
            elif at:
                found.append(AttachmentKey(container, ifname))
            else:
                log.warning("%s is no DEL of podwire's plugin and is left alone", file)
        return tuple(found)

    def holds(self, key: AttachmentKey) -> bool:
        return self._file(key).exists()

    def forget(self, key: AttachmentKey) -> None:
        """It is done, or a later ADD has overtaken it."""
        self._file(key).unlink(missing_ok=True)

    def _file(self, key: AttachmentKey) -> Path:
        return self._directory / f"{key.container}@{key.ifname}"
