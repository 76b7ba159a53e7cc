"""The random numbers of a machine under test: those that a test tells it, or all of them in turn."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction

from podwire.trace.journey import Machine, Result


def told(machine: Machine, draw: int) -> Machine:
    """It takes the one of index `draw % n` of n, whether it draws a number among n, or asks for each of them in turn if it
    shall be this one (one in n, one in n - 1, …)."""
    asked: list[int] = []

    def chance(n: int) -> bool:
        asked.append(n)
        return len(asked) - 1 == draw % asked[0]

    return replace(machine, choose=lambda n: draw % n, chance=chance)


def every_way(machine: Machine, walk: Callable[[Machine], Result]) -> Iterator[tuple[Fraction, Result]]:
    """What becomes of a packet for all that could be drawn, and how likely each is. Of several numbers among n, all are taken
    to be like the first (those after it are drawn where the first was nobody's)."""
    pending: list[tuple[int, ...]] = [()]
    while pending:
        draws = _Draws(pending.pop())
        result = walk(replace(machine, choose=draws.choose, chance=draws.chance))
        yield draws.likelihood, result
        pending += draws.others


class _Draws:
    """One way: the numbers of `script`, then zeros. `others`: the ways that could have been taken instead of those."""

    def __init__(self, script: tuple[int, ...]) -> None:
        self._script = script
        self._taken: tuple[int, ...] = ()
        self._first: int | None = None
        self.likelihood = Fraction(1)
        self.others: list[tuple[int, ...]] = []

    def choose(self, n: int) -> int:
        if self._first is None:
            self._first = self._next(n)
            self.likelihood /= n
        return self._first % n

    def chance(self, n: int) -> bool:
        happens = bool(self._next(2))
        self.likelihood *= Fraction(1, n) if happens else 1 - Fraction(1, n)
        return happens

    def _next(self, n: int) -> int:
        taken = self._taken
        if len(taken) < len(self._script):
            number = self._script[len(taken)]
        else:
            number = 0
            self.others += [(*taken, other) for other in range(1, n)]
        self._taken = (*taken, number)
        return number
