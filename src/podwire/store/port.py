"""What the API server asks of a store: etcd's model (one global revision, compare-and-set, watch with history), nothing more.

Every commit that changes something makes exactly one new revision, shared by all its writes, so an etcd `Txn` fits behind
this port as it is. Keys are text such as `/registry/pods/shop/web-1`; values are opaque bytes.

StoreError
├── Conflict        a write's expectation did not hold: nothing of the commit was done
├── Compacted       the wanted revision is no longer there; list again
├── FutureRevision  the wanted revision is not there yet
└── StoreClosed     the store was closed, or its file can no longer be written
"""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from podwire.model.errors import PodwireError

ABSENT: Final = 0
"""`expected_revision` of a key that must not exist (etcd: mod_revision 0)."""


class StoreError(PodwireError):
    """Base of the store's errors."""


class Conflict(StoreError):
    """`key` is at revision `actual` (ABSENT: not there) and not at `expected`."""

    def __init__(self, key: str, expected: int, actual: int) -> None:
        self.key, self.expected, self.actual = key, expected, actual
        super().__init__(f"store key {key} is at revision {actual}, expected {expected}")


class Compacted(StoreError):
    """Revision `wanted` was compacted away; the oldest that can be had is `oldest`."""

    def __init__(self, wanted: int, oldest: int) -> None:
        self.wanted, self.oldest = wanted, oldest
        super().__init__(f"store revision {wanted} has been compacted; the oldest one kept is {oldest}")


class FutureRevision(StoreError):
    """Revision `wanted` is above the current one."""

    def __init__(self, wanted: int, current: int) -> None:
        self.wanted, self.current = wanted, current
        super().__init__(f"store revision {wanted} is in the future; the current one is {current}")


class StoreClosed(StoreError):
    """No more reads or writes: the store is closed, or failed for good (its cause is chained)."""


class KeyValue(NamedTuple):
    """A key's state: `mod_revision` is that of its last write, `create_revision` that of the write that made it."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int


class Page(NamedTuple):
    """A range read: items in key order as they were at `revision`; `more` when the limit cut it short."""

    items: tuple[KeyValue, ...]
    revision: int
    more: bool = False


@dataclass(frozen=True, slots=True)
class Put:
    """Set `key`. `expected_revision`: None → whatever it is; ABSENT → only if not there; else only if last written there."""

    key: str
    value: bytes
    expected_revision: int | None = None


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove `key`; where it is not there (and None was expected) nothing happens."""

    key: str
    expected_revision: int | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """No write: the commit is done only if `key` was last written at `expected_revision` (ABSENT: if it is not there)."""

    key: str
    expected_revision: int


Write = Put | Delete | Check


class Event(NamedTuple):
    """One key's change at `revision`. `value` is None for a deletion; `previous` is the key's state before, if it had one."""

    key: str
    revision: int
    value: bytes | None
    previous: KeyValue | None
    create_revision: int


class Store(Protocol):
    """A driver. All methods may be called concurrently from one event loop."""

    async def revision(self) -> int:
        """The revision of the last commit (a fresh store starts at 1, as etcd does)."""
        ...

    async def get(self, key: str) -> KeyValue | None: ...

    async def list(self, prefix: str, *, limit: int = 0, start_after: str = "", revision: int = 0) -> Page:
        """Keys that start with `prefix`, in order, after `start_after`; `revision` 0 is the current one.

        Raises Compacted or FutureRevision where `revision` cannot be had."""
        ...

    async def commit(self, writes: Sequence[Write]) -> int:
        """All of `writes` (each key at most once) or nothing; returns the revision after it.

        When it returns, the writes survive the death of the process. Raises Conflict."""
        ...

    def watch(self, prefix: str, from_revision: int) -> AsyncGenerator[Sequence[Event], None]:
        """The changes under `prefix` at `from_revision` and later: first those that happened already, then as they come.

        Each item holds all the changes of one or several whole commits, in order. Ends when the store is closed.
        Raises Compacted. Close the iterator (`aclosing`) to stop watching."""
        ...

    async def compact(self, revision: int) -> None:
        """Forget the history before `revision`; the state at `revision` and after stays readable. Raises FutureRevision."""
        ...

    async def close(self) -> None: ...
