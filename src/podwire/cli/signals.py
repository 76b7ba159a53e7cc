"""Signals that end a command, as an exception, so that what it has to tidy up is tidied up."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise SystemExit in the block, with a shell's status for them: 130, 143, 129.

    One that is ignored (nohup, a shell's background job) stays so. For the main thread."""
    before = {number: signal.getsignal(number) for number in _ENDING}
    taken = [number for number in _ENDING if before[number] is not signal.SIG_IGN]
    for number in taken:
        signal.signal(number, _leave)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])


def _leave(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)
