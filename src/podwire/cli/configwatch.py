"""The configuration file of what runs: once it says something else, that has to be started anew."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from podwire.model.errors import InvalidInput, PodwireError

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
"""How often the file is looked at. Asking the kernel to tell would be one mechanism more: a mounted ConfigMap is a link whose
target changes, editors put another file in the place, and people write into the one there is."""


class ConfigChanged(PodwireError):
    """The file says something else."""


async def until_changed(path: Path, load: Callable[[], object], used: object, every_seconds: float = LOOK_SECONDS) -> None:
    """Raises ConfigChanged once what `load` makes of the file is not what is `used`.

    A file that is away, or that `load` takes for InvalidInput (which is said once), changes nothing: what ended because of it
    could not be started again."""
    seen: tuple[int, ...] | None = None
    while True:
        held = _version(path)
        if held is not None and held != seen:
            seen = held
            try:
                changed = load() != used
            except InvalidInput as error:
                log.error("%s; going on with what it said before", error)
            else:
                if changed:
                    raise ConfigChanged(f"{path} has changed: this ends, to be started anew with what it says now")
        await asyncio.sleep(every_seconds)


def _version(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
