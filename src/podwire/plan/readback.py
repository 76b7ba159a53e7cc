"""Does the kernel lead a frontend's packets to its backends? Asked of the few elements that a Service has, read back by key.

It does not ask the planner what it wrote: from the frontends alone follows what the maps must say.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from podwire.model.addr import Family
from podwire.model.nft import Data, NftSet, TableRef
from podwire.model.servicetable import Frontend, Pool
from podwire.plan.services_maps import frontend_key
from podwire.plan.services_rules import DROPPED, REFUSED, ChainKey, ChainKind, chain_verdict, sets_of, table_ref


class Question(NamedTuple):
    """The elements to read, and what their content has to be like."""

    table: TableRef
    set: NftSet
    keys: tuple[bytes, ...]
    holds: Callable[[Mapping[bytes, Data]], bool]


def questions(frontends: Iterable[Frontend]) -> Iterator[Question]:
    for frontend in frontends:
        family = Family.IPV4 if len(frontend.address) == 4 else Family.IPV6
        table, sets, key = table_ref(family), sets_of(family), frontend_key(frontend)
        sticky = frontend.affinity_s > 0
        kinds = (ChainKind.STICKY, ChainKind.STICKY_LOCAL) if sticky else (ChainKind.PICK, ChainKind.PICK_LOCAL)
        yield from _pool(table, sets.services, sets.endpoints, key, frontend.inside, kinds[0])
        if frontend.outside is not None:
            yield from _pool(table, sets.outside, sets.local_endpoints, key, frontend.outside, kinds[1])


def _pool(table: TableRef, leads: NftSet, endpoints: NftSet, key: bytes, pool: Pool, kind: ChainKind) -> Iterator[Question]:
    backends = pool.backends
    nobody = DROPPED if pool.drop else REFUSED
    verdict = chain_verdict(ChainKey(kind, len(backends))) if backends else nobody
    yield Question(table, leads, (key,), lambda found: found.get(key) == verdict)
    if backends:
        keys = tuple(key + index.to_bytes(4, sys.byteorder) for index in range(len(backends)))
        yield Question(table, endpoints, keys, lambda found: _same(found, keys, backends))


def _same(found: Mapping[bytes, Data], keys: Sequence[bytes], backends: Sequence[bytes]) -> bool:
    """The planner may give its backends any order."""
    held = [data for key in keys if isinstance(data := found.get(key), bytes)]
    return sorted(held) == sorted(backends)
