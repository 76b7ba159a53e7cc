"""Kernel switches change without a notice: this looks, cheaply and often.

A file below /proc/sys/net belongs to the namespace in which it was opened, whoever reads it later. So each switch costs one
descriptor and, at every look, one `pread` (2 µs): no namespace is entered.
"""

import contextlib
import os
from collections.abc import Iterable, Mapping

from podwire.kernel.netns import run_in_netns
from podwire.kernel.sysctl import sysctl_path

_LOOKS_PER_TRY = 4
"""How seldom a switch that is not there is looked for: its device may come back, its module never."""


class SwitchWatch:
    """The switches of one namespace that podwire has set. `written` is what was set last, by key; it may grow and change."""

    def __init__(self, fd: int, written: Mapping[str, str]) -> None:
        self._fd, self._written = fd, written
        self._files: dict[str, int] = {}
        self._known: dict[str, tuple[str, str]] = {}
        """What was written when we looked, and what was there: the kernel may give a value back in other words."""
        self._looks = 0

    def look(self) -> list[tuple[str, str]]:
        """(key, value) of every switch that somebody else has set since the last look. Blocks, some microseconds."""
        written = dict(self._written)
        if len(self._files) < len(written) and self._looks % _LOOKS_PER_TRY == 0:
            self._open(written.keys() - self._files.keys())
        self._looks += 1
        changed = []
        for key, wanted in written.items():
            value = self._read(key)
            if value is None:
                continue
            before = self._known.get(key)
            self._known[key] = wanted, value
            seen = wanted if before is None or before[0] != wanted else before[1]
            if value not in (seen, wanted):
                changed.append((key, value))
        return changed

    def _open(self, keys: Iterable[str]) -> None:
        def work() -> dict[str, int]:
            opened: dict[str, int] = {}
            for key in keys:
                with contextlib.suppress(OSError):  # a device that has gone, a module that is missing: nothing to watch
                    opened[key] = os.open(sysctl_path(key), os.O_RDONLY | os.O_CLOEXEC)
            return opened

        self._files |= run_in_netns(self._fd, work)

    def _read(self, key: str) -> str | None:
        descriptor = self._files.get(key)
        if descriptor is None:
            return None
        try:
            return " ".join(os.pread(descriptor, 4096, 0).decode(errors="replace").split())
        except OSError:  # the device to which the switch belongs is gone; a new one has a new file
            os.close(self._files.pop(key))
            self._known.pop(key, None)
            return None

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()
