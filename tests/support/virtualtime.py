"""An event loop whose time jumps to the next timer when nobody has anything to do: days pass in milliseconds, always alike."""

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_PATIENCE_TURNS, _NUDGE_SECONDS = 1000, 1e-6
"""After so many turns of the loop at one moment, time goes on by so much: who waits for less than a float can tell apart from
nothing would wait for ever, where work takes no time."""


class _JumpingSelector(selectors.SelectSelector):
    def __init__(self, jump: Callable[[float], None]) -> None:
        super().__init__()
        self._jump = jump

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise RuntimeError("everybody waits for something that will never happen")
            self._jump(timeout)
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """`each_step` is called whenever all that was to be done at one moment has been done."""

    def __init__(self, each_step: Callable[[], None] = lambda: None) -> None:
        self._now = 1000.0
        self._turns = 0
        self._each_step = each_step
        super().__init__(_JumpingSelector(self._jump))

    def time(self) -> float:
        return self._now

    def _jump(self, timeout: float) -> None:
        self._each_step()
        self._turns = self._turns + 1 if timeout == 0 else 0
        self._now += timeout if self._turns < _PATIENCE_TURNS else _NUDGE_SECONDS


def run_virtual(main: Coroutine[Any, Any, T], each_step: Callable[[], None] = lambda: None) -> T:
    """Like asyncio.run, in virtual time."""
    with asyncio.Runner(loop_factory=lambda: VirtualTimeLoop(each_step)) as runner:
        return runner.run(main)
