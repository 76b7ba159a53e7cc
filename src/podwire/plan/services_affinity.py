"""Session affinity: by which numbers the kernel remembers the clients of a Service's ports, and whom it has to forget.

Affinity is by port: a client goes to the same backend by every address of the Service. Where a port has two pools (a policy of
Local), it has a memory for each, so that none leads a client out of its pool; a backend that is in both is noted in both.
"""

from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import NamedTuple

from podwire.model.nft import Data, SetState
from podwire.model.servicetable import Backend, Frontend, Pool
from podwire.plan.elementbooks import ElementBook
from podwire.plan.nftexprs import host_u32
from podwire.plan.services_rules import Sets, pack_number


class Port(NamedTuple):
    """A port of a Service."""

    owner: str
    protocol: int
    name: str


class Memory(NamedTuple):
    """What is remembered of a port's clients for one of its pools; `local`: for that of this node's backends."""

    port: Port
    local: bool


class Numbers(NamedTuple):
    """Of the memories that a frontend's clients have: of its pool, and of its port's other one. None: there is no such pool."""

    mine: bytes | None
    other: bytes | None


class _Settled(NamedTuple):
    """What stands for a port: (set, key) → data; and each memory's number → the backends that it may hold."""

    elements: Mapping[tuple[str, bytes], Data]
    pools: Mapping[bytes, frozenset[Backend]]


_NOTHING = _Settled({}, {})


class AffinityBook:
    """The elements of one family that affinity is made of. `books`: by set, those of `sets` that are written here.

    Frontends come one by one, and a port's elements depend on all of its frontends: they are written by `settle`."""

    def __init__(self, sets: Sets, books: Mapping[str, ElementBook]) -> None:
        self._sets, self._books = sets, books
        self._frontends: dict[Port, dict[bytes, Frontend]] = {}
        self._port_of: dict[bytes, Port] = {}
        self._dirty: dict[Port, None] = {}
        self._settled: dict[Port, _Settled] = {}
        self._numbers: dict[Memory, bytes] = {}
        self._memories: dict[bytes, Memory] = {}
        self._forget: dict[bytes, frozenset[Backend]] = {}

    def serve(self, key: bytes, frontend: Frontend | None, owner: str = "") -> None:
        """The frontend at `key` as it is now; None, or one without affinity: none has any there."""
        before = self._port_of.pop(key, None)
        if before is not None:
            del self._frontends[before][key]
            self._dirty[before] = None
        if frontend is not None and frontend.affinity_s:
            port = self._port_of[key] = Port(owner, frontend.protocol, frontend.port_name)
            self._frontends.setdefault(port, {})[key] = frontend
            self._dirty[port] = None

    def settle(self) -> None:
        """Write what follows from the frontends that changed."""
        dirty, self._dirty = self._dirty, {}
        changes = [(port, self._settled.pop(port, _NOTHING), self._wanted(port)) for port in dirty]
        # An address may have gone from one Service to another: first all that goes, then what comes.
        for _, old, new in changes:
            for name, key in old.elements.keys() - new.elements.keys():
                self._books[name].drop(key)
        for port, old, new in changes:
            for (name, key), data in new.elements.items():
                self._books[name].put(key, data)
            for number, backends in old.pools.items():
                if not backends.issubset(new.pools.get(number, ())):
                    self._forget[number] = new.pools.get(number, frozenset())
                if number not in new.pools:
                    del self._numbers[self._memories.pop(number)]
            if self._frontends[port]:
                self._settled[port] = new
            else:
                del self._frontends[port]

    def numbers(self, key: bytes) -> Numbers:
        """Of the frontend at `key`, as it was settled."""
        port = self._port_of.get(key)
        elements = self._settled[port].elements if port is not None else {}
        found = (elements.get((of.name, key)) for of in (self._sets.memories, self._sets.other_memories))
        return Numbers(*(number if isinstance(number, bytes) else None for number in found))

    def take_forgotten(self) -> dict[bytes, frozenset[Backend]]:
        """Numbers of memories that lost backends since the last call, or are not to be trusted → those that are left."""
        forget, self._forget = self._forget, {}
        return forget

    def all(self) -> dict[bytes, frozenset[Backend]]:
        """All memories' numbers → the backends that they may hold."""
        return {number: pool for settled in self._settled.values() for number, pool in settled.pools.items()}

    def distrust(self, observed: Mapping[str, SetState]) -> None:
        """What the kernel remembers under a number was remembered for whoever had that number. Where this is not known to have
        been the same port, it has to be forgotten."""
        had: dict[bytes, set[bytes]] = {}
        for name in (self._sets.memories.name, self._sets.other_memories.name):
            for key, number in observed[name].elements.items() if name in observed else ():
                if isinstance(number, bytes):
                    had.setdefault(number, set()).add(key)
        for number in had.keys() & self._memories.keys():
            if had[number].isdisjoint(self._frontends[self._memories[number].port]):
                self._forget[number] = frozenset()

    def _wanted(self, port: Port) -> _Settled:
        frontends = self._frontends[port]
        pools = _pools(frontends)
        numbers = {local: self._number(Memory(port, local)) for local in pools}
        elements: dict[tuple[str, bytes], Data] = {}
        for key, frontend in frontends.items():
            for name, local in (
                (self._sets.memories.name, frontend.inside_local),
                (self._sets.other_memories.name, not frontend.inside_local),
            ):
                if local in numbers:
                    elements[name, key] = numbers[local]
        for local, number in numbers.items():
            elements[self._sets.sticky.name, number] = pack_number(next(iter(frontends.values())).affinity_s)
            for backend in pools[local]:
                elements[self._sets.members.name, number + backend] = None
        return _Settled(elements, {numbers[local]: backends for local, backends in pools.items()})

    def _number(self, memory: Memory) -> bytes:
        """The same for a port whenever and wherever its rules are made, unless another has it already."""
        if memory not in self._numbers:
            value = _digest(memory)
            while not value or host_u32(value) in self._memories:
                value = (value + 1) & 0xFFFFFFFF
            self._numbers[memory] = host_u32(value)
            self._memories[host_u32(value)] = memory
        return self._numbers[memory]


def _pools(frontends: Mapping[bytes, Frontend]) -> dict[bool, frozenset[Backend]]:
    """A port's pools that have backends, by whether they are this node's."""

    def found() -> Iterator[tuple[bool, Pool]]:
        for frontend in frontends.values():
            yield frontend.inside_local, frontend.inside
            if frontend.outside is not None:
                yield True, frontend.outside

    return {local: frozenset(pool.backends) for local, pool in found() if pool.backends}


def _digest(memory: Memory) -> int:
    text = f"{memory.port.owner} {memory.port.protocol} {memory.port.name} {memory.local}"
    return int.from_bytes(blake2b(text.encode(), digest_size=4).digest(), "big")
