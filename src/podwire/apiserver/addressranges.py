"""The addresses of one family: which ranges they may come from, which are taken, which one is next. Pure bookkeeping."""

from collections.abc import Callable, Container, Iterator
from typing import NamedTuple

from podwire.model.addr import IPNetwork
from podwire.model.servicecidr import usable

Choose = Callable[[int], int]
"""n → a number in 0..n-1; random in production."""


def static_band(size: int, divisor: int, least: int, most: int) -> int:
    """How many of `size` from the start are left to fixed wishes: size/divisor within least..most; none if too few."""
    return 0 if size < least else min(max(least, size // divisor), most)


def free_number(taken: Container[int], low: int, high: int, choose: Choose) -> int | None:
    """A number of low..high-1 that is not taken, the first one from a random start; None when all are."""
    span = high - low
    start = choose(span) if span > 0 else 0
    for step in range(span):
        number = low + (start + step) % span
        if number not in taken:
            return number
    return None


class Source(NamedTuple):
    """A ServiceCIDR that addresses are given out of, as it was at `revision`. Ranges are asked in the order of `rank`."""

    name: str
    revision: int
    rank: tuple[bool, str, str] = (False, "", "")


class _Range:
    """`split`: from there on dynamic choice begins. `used`: how many are taken below it, and from it on."""

    def __init__(self, source: Source, network: IPNetwork, taken: set[int]) -> None:
        self.source, self.network = source, network
        self.addresses = usable(network)
        self.split = self.addresses.start + static_band(self.addresses.stop - self.addresses.start, 16, 16, 256)
        inside = [number for number in taken if number in self.addresses]
        self.used = [sum(number < self.split for number in inside), sum(number >= self.split for number in inside)]

    def bands(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """From..to of the static and of the dynamic band."""
        return (self.addresses.start, self.split), (self.split, self.addresses.stop)

    def count(self, number: int, change: int) -> None:
        if number in self.addresses:
            self.used[number >= self.split] += change


class FamilyAddresses:
    """Addresses as numbers. Ranges may overlap: one that is taken is taken in all of them."""

    def __init__(self) -> None:
        self._ranges: list[_Range] = []
        self.taken: set[int] = set()

    @property
    def networks(self) -> tuple[IPNetwork, ...]:
        return tuple(found.network for found in self._ranges)

    def set_range(self, source: Source, network: IPNetwork | None) -> None:
        """From now on the ServiceCIDR gives this range, and no other; None: no range at all."""
        known = next((found for found in self._ranges if found.source.name == source.name), None)
        if known is not None and known.network == network:
            known.source = source
            return
        self._ranges = [found for found in self._ranges if found is not known]
        if network is not None:
            self._ranges.append(_Range(source, network, self.taken))
            self._ranges.sort(key=lambda found: found.source.rank)

    def drop_ranges(self) -> None:
        self._ranges = []

    def mark(self, number: int, *, taken: bool) -> None:
        if taken == (number in self.taken):
            return
        (self.taken.add if taken else self.taken.discard)(number)
        for found in self._ranges:
            found.count(number, 1 if taken else -1)

    def clear(self) -> None:
        """Nothing is taken."""
        self.taken.clear()
        for found in self._ranges:
            found.used = [0, 0]

    def source_of(self, number: int) -> Source | None:
        """Of the first range that has the address."""
        return next((found.source for found in self._ranges if number in found.addresses), None)

    def pick(self, choose: Choose) -> tuple[int, Source] | None:
        """A free address and where it is from: the dynamic bands of all ranges come before any static one."""
        for found, band in self._bands():
            low, high = found.bands()[band]
            if found.used[band] < high - low:
                number = free_number(self.taken, low, high, choose)
                if number is not None:
                    return number, found.source
        return None

    def _bands(self) -> Iterator[tuple[_Range, int]]:
        for band in (1, 0):
            for found in self._ranges:
                yield found, band
