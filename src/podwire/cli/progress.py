"""Steps with their times: live on a terminal, plain lines elsewhere. Goes to stderr, so that stdout stays for machines."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TextIO

from podwire.cli.terminal import has_colours, is_live


class Progress:
    """What a command does, step by step."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._live = is_live(self._stream, os.environ)
        self._colours = has_colours(self._stream, os.environ)
        self._status: Any = None

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Something that takes a moment: shown while it runs, with its time when it is done, with ✗ when it fails.

        Says nothing of a step that somebody ended: it did not fail."""
        started = time.monotonic()
        try:
            with self._spinner(text):
                yield
        except Exception:
            self.done(text, time.monotonic() - started, mark="✗")
            raise
        self.done(text, time.monotonic() - started)

    def note(self, text: str) -> None:
        """What a running step is waiting for; only a terminal shows it."""
        if self._status is not None:
            self._status.update(text)

    def done(self, text: str, seconds: float, mark: str = "✓") -> None:
        line = f"{mark} {text}  {_duration(seconds)}"
        if self._colours:
            colour = "32" if mark == "✓" else "31"
            line = f"\x1b[{colour}m{mark}\x1b[0m {text}  \x1b[2m{_duration(seconds)}\x1b[0m"
        self._stream.write(line + "\n")
        self._stream.flush()

    @contextmanager
    def _spinner(self, text: str) -> Iterator[None]:
        if not self._live:
            with nullcontext():
                yield
            return
        from rich.console import Console

        with Console(file=self._stream).status(text) as self._status:
            try:
                yield
            finally:
                self._status = None


def counted(number: int, noun: str) -> str:
    """1, "node" → "1 node"; 3, "node" → "3 nodes"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"
