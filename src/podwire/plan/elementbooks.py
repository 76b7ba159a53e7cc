"""The elements of sets and maps, kept as they stand, and what changed since that was last asked for.

A pool's backends sit at indices 0 … N−1 under their frontend's key. When one leaves, the last takes its place; a new one goes
to the end: a change of one endpoint moves two or three elements, whatever the pool's size.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Final

from podwire.model.nft import Data, Element, NftSet, Ruleset, SetState, TableRef
from podwire.plan.nftdiff import ElementChanges

_ABSENT: Final = object()


class ElementBook:
    """One set's elements."""

    def __init__(self, of: NftSet) -> None:
        self.set = of
        self.elements: dict[bytes, Data] = {}
        self.comments: dict[bytes, str] = {}
        self._before: dict[bytes, object] | None = None
        """None: nothing has been taken, so all elements are new."""

    def put(self, key: bytes, data: Data = None) -> None:
        old = self.elements.get(key, _ABSENT)
        if old is data or old == data:
            return
        if self._before is not None:
            self._before.setdefault(key, old)
        self.elements[key] = data

    def drop(self, key: bytes) -> None:
        old = self.elements.pop(key, _ABSENT)
        if old is not _ABSENT and self._before is not None:
            self._before.setdefault(key, old)

    def take(self) -> ElementChanges:
        """What changed since the last call."""
        changes = ElementChanges(self.set, comments=self.comments)
        if self._before is None:
            changes.added = list(self.elements.items())
        for key, old in (self._before or {}).items():
            new = self.elements.get(key, _ABSENT)
            if new is _ABSENT:
                if old is not _ABSENT:
                    changes.gone.append((key, None))
            elif old is _ABSENT:
                changes.added.append((key, self.elements[key]))
            elif old != new:
                changes.replaced.append((key, self.elements[key]))
        self._before = {}
        return changes

    def state(self) -> SetState:
        return SetState(self.set, dict(self.elements), dict(self.comments))


class CountedBook(ElementBook):
    """Elements that several owners may want: each is there while anyone does."""

    def __init__(self, of: NftSet) -> None:
        super().__init__(of)
        self._wanted: dict[bytes, int] = {}

    def want(self, key: bytes) -> None:
        count = self._wanted.get(key, 0)
        self._wanted[key] = count + 1
        if not count:
            self.put(key)

    def release(self, key: bytes) -> None:
        self._wanted[key] -= 1
        if not self._wanted[key]:
            del self._wanted[key]
            self.drop(key)


class PoolBook:
    """A map from (frontend, index) to a backend. It holds each frontend's pool as a whole: the elements, of which there are
    five or a thousand for each, are made when they are asked for."""

    def __init__(self, of: NftSet) -> None:
        self.set = of
        self._pools: dict[bytes, Sequence[bytes]] = {}
        self._before: dict[bytes, Sequence[bytes]] | None = None
        """None: nothing has been taken, so all elements are new."""

    def put(self, key: bytes, backends: Sequence[bytes]) -> None:
        """Make these the pool of a frontend, in any order; none: it has no pool any more."""
        held = self._pools.get(key, ())
        self._set(key, held, arrange(held, backends) if held else backends)

    def _set(self, key: bytes, held: Sequence[bytes], order: Sequence[bytes]) -> None:
        if self._before is not None:
            self._before.setdefault(key, held)
        if order:
            self._pools[key] = order
        elif held:
            del self._pools[key]

    def take(self) -> ElementChanges:
        """What changed since the last call."""
        changes = ElementChanges(self.set)
        if self._before is None:
            changes.added = list(self._elements())
        for key, old in (self._before or {}).items():
            new = self._pools.get(key, ())
            for index, (indexed, data) in enumerate(_elements(key, new)):
                if index >= len(old):
                    changes.added.append((indexed, data))
                elif old[index] != data:
                    changes.replaced.append((indexed, data))
            changes.gone += ((key + index, None) for index in _indices(len(old))[len(new) :])
        self._before = {}
        return changes

    def adopt_order(self, observed: Ruleset, table: TableRef) -> None:
        """Give every pool the indices that its backends have in the kernel, so that nothing is moved for nothing."""
        held = observed.tables.get(table)
        state = held.sets.get(self.set.name) if held else None
        if state is None or state.set != self.set:
            return
        for key, order in self._pools.items():
            arranged = arrange(_observed_order(state.elements, key), order)
            if tuple(arranged) != tuple(order):
                self._set(key, order, arranged)

    def state(self) -> SetState:
        return SetState(self.set, dict(self._elements()))

    def _elements(self) -> Iterator[tuple[bytes, Data]]:
        return (element for key, order in self._pools.items() for element in _elements(key, order))


def _elements(key: bytes, order: Sequence[bytes]) -> Iterator[Element]:
    return ((key + index, data) for index, data in zip(_indices(len(order)), order, strict=True))


@lru_cache(maxsize=1 << 10)
def _indices(count: int) -> tuple[bytes, ...]:
    """0 … count−1, as they stand in keys."""
    return tuple(map(_pack_index, range(count)))


@lru_cache(maxsize=1 << 12)
def _pack_index(index: int) -> bytes:
    return index.to_bytes(4, sys.byteorder)


def _observed_order(elements: Mapping[bytes, Data], key: bytes) -> list[bytes]:
    order: list[bytes] = []
    while isinstance(data := elements.get(key + _pack_index(len(order))), bytes):
        order.append(data)
    return order


def arrange(order: Sequence[bytes], wanted: Sequence[bytes]) -> Sequence[bytes]:
    """`wanted` so that as few as possible are elsewhere than in `order`: holes are filled with new ones, then from the end."""
    if not order:
        return wanted
    keep = set(wanted)
    known = set(order)
    new = [w for w in wanted if w not in known]
    holes = [index for index, item in enumerate(order) if item not in keep]
    arranged = list(order)
    for index, item in zip(holes, new, strict=False):
        arranged[index] = item
    del new[: len(holes)]
    arranged += new
    index = 0
    while index < len(arranged):
        if arranged[index] in keep:
            index += 1
        elif index == len(arranged) - 1:
            arranged.pop()
        else:
            arranged[index] = arranged.pop()
    return arranged
