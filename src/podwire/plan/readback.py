"""Does the kernel lead a frontend's packets to its backends? Asked of the few elements that a Service has, read back by key.

It does not ask the planner what it wrote: what the maps must say follows from the frontends, and from their memories' numbers.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from operator import eq
from typing import NamedTuple

from podwire.model.addr import packed_family
from podwire.model.nft import Data, NftSet, TableRef
from podwire.model.servicetable import Frontend, Pool
from podwire.plan.services_affinity import Numbers
from podwire.plan.services_maps import frontend_key
from podwire.plan.services_rules import Sets, pack_number, pool_number, sets_of, table_ref


class Question(NamedTuple):
    """The elements to read, and what their content has to be like."""

    table: TableRef
    set: NftSet
    keys: tuple[bytes, ...]
    holds: Callable[[Mapping[bytes, Data]], bool]


def questions(frontends: Iterable[Frontend], memories: Callable[[Frontend], Numbers]) -> Iterator[Question]:
    """`memories`: the numbers that the planner gave to a frontend's memories."""
    for frontend in frontends:
        family = packed_family(frontend.address)
        table, sets, key = table_ref(family), sets_of(family), frontend_key(frontend)
        yield _element(table, sets.services, key)
        yield from _pool(table, sets.pools, sets.endpoints, key, frontend.inside)
        if frontend.outside is not None:
            yield _element(table, sets.outside, key)
            yield from _pool(table, sets.local_pools, sets.local_endpoints, key, frontend.outside)
        if frontend.affinity_s:
            yield from _remembered(table, sets, key, frontend, memories(frontend))


def _pool(table: TableRef, numbers: NftSet, endpoints: NftSet, key: bytes, pool: Pool) -> Iterator[Question]:
    backends = pool.backends
    yield _element(table, numbers, key, pool_number(pool))
    if backends:
        keys = tuple(key + index.to_bytes(4, sys.byteorder) for index in range(len(backends)))
        yield Question(table, endpoints, keys, lambda found: _same(found, keys, backends))


def _element(table: TableRef, of: NftSet, key: bytes, data: Data = None) -> Question:
    return Question(table, of, (key,), lambda found: key in found and found[key] == data)


def _remembered(table: TableRef, sets: Sets, key: bytes, frontend: Frontend, numbers: Numbers) -> Iterator[Question]:
    """Where the port's other pool is none of this frontend's, another one of the port has it."""
    other = frontend.outside if frontend.outside is not None and not frontend.inside_local else Pool()
    for of, number, pool in (
        (sets.memories, numbers.mine, frontend.inside),
        (sets.other_memories, numbers.other, other),
    ):
        if number is None:
            continue
        yield _element(table, of, key, number)
        yield _element(table, sets.sticky, number, pack_number(frontend.affinity_s))
        if pool.backends:
            keys = tuple(number + backend for backend in pool.backends)
            yield Question(table, sets.members, keys, partial(eq, dict.fromkeys(keys)))


def _same(found: Mapping[bytes, Data], keys: Sequence[bytes], backends: Sequence[bytes]) -> bool:
    """The planner may give its backends any order."""
    held = [data for key in keys if isinstance(data := found.get(key), bytes)]
    return sorted(held) == sorted(backends)
