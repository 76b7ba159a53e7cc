"""`Frontend`s → elements of the maps, kept as they stand and as they changed: one family's half of the planner.

A pool's backends sit at indices 0 … N−1 under the frontend's key. When one leaves, the last takes its place; a new one goes
to the end: a change of one endpoint moves two or three elements, whatever the pool's size.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from podwire.model.addr import Family
from podwire.model.nft import (
    AddChain,
    AddSet,
    AddTable,
    Chain,
    ChainState,
    Command,
    Data,
    NftSet,
    Prune,
    Rule,
    Ruleset,
    SetRules,
    SetState,
    TableState,
)
from podwire.model.nftexpr import Verdict
from podwire.model.servicetable import Frontend, NodeFacts, Pool
from podwire.plan.nftdiff import ChainChanges, ElementChanges
from podwire.plan.services_rules import (
    DROPPED,
    REFUSED,
    ChainKey,
    ChainKind,
    Sets,
    chain_verdict,
    fixed_chains,
    fixed_rules,
    needed_by,
    numbered_chain_rules,
    sets_of,
    table_ref,
)

_ABSENT: Final = object()


@lru_cache(maxsize=1 << 16)
def _pack_port(port: int) -> bytes:
    return port.to_bytes(2, "big") + b"\0\0"


@lru_cache(maxsize=1 << 12)
def _pack_index(index: int) -> bytes:
    return index.to_bytes(4, sys.byteorder)


def frontend_key(frontend: Frontend) -> bytes:
    """address . protocol . port, as the registers hold them."""
    return frontend.address + bytes((frontend.protocol, 0, 0, 0)) + _pack_port(frontend.port)


class ElementBook:
    """One set's elements, and what they were when changes were last taken."""

    def __init__(self, of: NftSet) -> None:
        self.set = of
        self.elements: dict[bytes, Data] = {}
        self._before: dict[bytes, object] = {}

    def put(self, key: bytes, data: Data = None) -> None:
        old = self.elements.get(key, _ABSENT)
        if old is data or old == data:
            return
        self._before.setdefault(key, old)
        self.elements[key] = data

    def drop(self, key: bytes) -> None:
        old = self.elements.pop(key, _ABSENT)
        if old is not _ABSENT:
            self._before.setdefault(key, old)

    def take(self) -> ElementChanges:
        """What changed since the last call."""
        changes = ElementChanges(self.set)
        for key, old in self._before.items():
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


class CountedBook(ElementBook):
    """Elements that several owners may want: each is there while anyone does."""

    def __init__(self, of: NftSet) -> None:
        super().__init__(of)
        self._wanted: Counter[bytes] = Counter()

    def want(self, key: bytes) -> None:
        self._wanted[key] += 1
        self.put(key)

    def release(self, key: bytes) -> None:
        self._wanted[key] -= 1
        if not self._wanted[key]:
            del self._wanted[key]
            self.drop(key)


class ChainBook:
    """The chains that exist once for each number in use."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._users: Counter[ChainKey] = Counter()
        self._taken: set[ChainKey] = set()

    @property
    def in_use(self) -> Iterable[ChainKey]:
        return self._users.keys()

    def use(self, key: ChainKey) -> Verdict:
        needed = needed_by(key)
        if needed is not None:
            self._users[needed] += 1
        self._users[key] += 1
        return chain_verdict(key)

    def release(self, key: ChainKey) -> None:
        for k in filter(None, (key, needed_by(key))):
            self._users[k] -= 1
            if not self._users[k]:
                del self._users[k]

    def rules(self, key: ChainKey) -> tuple[Rule, ...]:
        return numbered_chain_rules(self._family, key)

    def take(self) -> ChainChanges:
        """Chains that came and went since the last call."""
        now = set(self._users)
        # A sticky chain leads to its pick chain, which must be there first.
        added = sorted(now - self._taken, key=lambda k: (needed_by(k) is not None, k.name))
        gone = sorted(self._taken - now, key=lambda k: (needed_by(k) is None, k.name))
        self._taken = now
        return ChainChanges(
            tuple(ChainState(Chain(k.name), self.rules(k)) for k in added),
            tuple(k.name for k in gone),
        )


@dataclass(slots=True)
class _Programmed:
    """A frontend as it stands in the maps: its backends' elements in index order."""

    frontend: Frontend
    cluster: Sequence[bytes] = ()
    local: Sequence[bytes] = ()
    chains: list[ChainKey] = field(default_factory=list)


def arrange(order: Sequence[bytes], wanted: Sequence[bytes]) -> Sequence[bytes]:
    """`wanted` so that as few as possible are elsewhere than in `order`: holes are filled with new ones, then from the end."""
    if not order:
        return wanted
    keep = set(wanted)
    known = set(order)
    new = [w for w in wanted if w not in known]
    arranged = list(order)
    for index, item in enumerate(order):
        if item not in keep and new:
            arranged[index] = new.pop(0)
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


class FamilyMaps:
    """All elements and numbered chains of one family's table."""

    def __init__(self, family: Family, facts: NodeFacts) -> None:
        self.family, self.table = family, table_ref(family)
        self._facts = facts
        self._sets: Sets = sets_of(family)
        self._books = {of.name: ElementBook(of) for of in self._sets.all() if not of.dynamic}
        self.hairpin, self.cluster_ips = CountedBook(self._sets.hairpin), CountedBook(self._sets.cluster_ips)
        self._books |= {b.set.name: b for b in (self.hairpin, self.cluster_ips)}
        self._services, self._outside = self._books["services"], self._books["outside"]
        self._endpoints, self._local = self._books["endpoints"], self._books["local-endpoints"]
        self._sticky = self._books["sticky"]
        self._chains = ChainBook(family)
        self._programmed: dict[bytes, _Programmed] = {}
        self._prune: dict[bytes, frozenset[bytes]] = {}
        self._built = False

    # --- programming ------------------------------------------------------------------------------------------

    def program(self, key: bytes, frontend: Frontend | None) -> None:
        """Make the maps serve `frontend` under `key`; None: nothing any more."""
        old = self._programmed.get(key)
        if frontend is None:
            if old is not None:
                self._clear(key, old)
            return
        new = _Programmed(frontend)
        new.cluster = self._place(self._endpoints, key, old.cluster if old else (), frontend.inside)
        outside = frontend.outside
        new.local = self._place(self._local, key, old.local if old else (), outside or Pool())
        sticky = frontend.affinity_s > 0
        cluster_kind, local_kind = (
            (ChainKind.STICKY, ChainKind.STICKY_LOCAL) if sticky else (ChainKind.PICK, ChainKind.PICK_LOCAL)
        )
        self._services.put(key, self._verdict(new, frontend.inside, len(new.cluster), cluster_kind))
        if outside is None:
            self._outside.drop(key)
        else:
            self._outside.put(key, self._verdict(new, outside, len(new.local), local_kind))
        self._note_affinity(key, old, new)
        self._flags(key, old.frontend if old else None, frontend)
        if old is not None:
            self._release(old)
        self._programmed[key] = new

    def _place(self, book: ElementBook, key: bytes, order: Sequence[bytes], pool: Pool) -> Sequence[bytes]:
        new = arrange(order, pool.backends)
        for index, data in enumerate(new):
            book.put(key + _pack_index(index), data)
        for index in range(len(new), len(order)):
            book.drop(key + _pack_index(index))
        return new

    def _verdict(self, new: _Programmed, pool: Pool, count: int, kind: ChainKind) -> Verdict:
        if not count:
            return DROPPED if pool.drop else REFUSED
        chain = ChainKey(kind, count)
        new.chains.append(chain)
        return self._chains.use(chain)

    def _note_affinity(self, key: bytes, old: _Programmed | None, new: _Programmed) -> None:
        seconds = new.frontend.affinity_s
        if seconds:
            chain = ChainKey(ChainKind.REMEMBER, seconds)
            new.chains.append(chain)
            self._sticky.put(key, self._chains.use(chain))
        else:
            self._sticky.drop(key)
        if old is not None and old.frontend.affinity_s:
            self._forget(key, old, new)

    def _forget(self, key: bytes, old: _Programmed, new: _Programmed) -> None:
        """Clients must not go on to backends that are gone, nor by an answer given under another traffic policy."""
        same_kind = new.frontend.affinity_s and (old.frontend.outside is None) == (new.frontend.outside is None)
        kept = frozenset((*new.cluster, *new.local)) if same_kind else frozenset()
        if not kept.issuperset((*old.cluster, *old.local)):
            self._prune[key] = kept

    def _flags(self, key: bytes, old: Frontend | None, new: Frontend) -> None:
        self._set_flag("masquerade", key, new.masquerade)
        self._set_flag("keep-source", key, new.outside is not None)
        self._set_flag("restricted", key, new.source_ranges is not None)
        if old is not None and old.source_ranges == new.source_ranges:
            return
        book = self._books["source-ranges"]
        for first, last in old.source_ranges or () if old else ():
            book.drop(key + first + key + last)
        for first, last in new.source_ranges or ():
            book.put(key + first + key + last)

    def _set_flag(self, name: str, key: bytes, wanted: bool) -> None:
        if wanted:
            self._books[name].put(key)
        else:
            self._books[name].drop(key)

    def _clear(self, key: bytes, old: _Programmed) -> None:
        self._services.drop(key)
        self._outside.drop(key)
        for book, order in ((self._endpoints, old.cluster), (self._local, old.local)):
            for index in range(len(order)):
                book.drop(key + _pack_index(index))
        self._sticky.drop(key)
        for name in ("masquerade", "keep-source", "restricted"):
            self._books[name].drop(key)
        for first, last in old.frontend.source_ranges or ():
            self._books["source-ranges"].drop(key + first + key + last)
        if old.frontend.affinity_s:
            self._prune[key] = frozenset()
        self._release(old)
        del self._programmed[key]

    def _release(self, old: _Programmed) -> None:
        for chain in old.chains:
            self._chains.release(chain)

    def adopt_order(self, observed: Ruleset) -> None:
        """Give every pool the indices that its backends have in the kernel, so that nothing is moved for nothing."""
        table = observed.tables.get(self.table)
        if table is None:
            return
        for book, attribute in ((self._endpoints, "cluster"), (self._local, "local")):
            state = table.sets.get(book.set.name)
            if state is None or state.set != book.set:
                continue
            for key, programmed in self._programmed.items():
                held: Sequence[bytes] = getattr(programmed, attribute)
                order = _observed_order(state, key)
                arranged = arrange(order, held)
                if arranged != held:
                    setattr(programmed, attribute, arranged)
                    for index, data in enumerate(arranged):
                        book.put(key + _pack_index(index), data)

    # --- results ----------------------------------------------------------------------------------------------

    def take_changes(self) -> tuple[list[Command], ChainChanges, list[ElementChanges]]:
        """(what has to exist first, numbered chains, elements) changed since the last call; affinities: `take_prune`."""
        creates: list[Command] = []
        if not self._built:
            self._built = True
            creates = self._fixed_commands()
        changes = [self._books[of.name].take() for of in self._sets.all() if not of.dynamic]
        return creates, self._chains.take(), [c for c in changes if c]

    def _fixed_commands(self) -> list[Command]:
        rules = fixed_rules(self.family, self._facts)
        chains = {c.name: c for c in fixed_chains()}
        return [
            AddTable(self.table),
            *(AddSet(self.table, of) for of in self._sets.all()),
            *(AddChain(self.table, c) for c in chains.values()),
            *(SetRules(self.table, name, found) for name, found in rules.items()),
        ]

    def take_prune(self, *, everything: bool = False) -> Prune | None:
        """Which affinities have to go. `everything`: those of all frontends are checked, and those of unknown ones go."""
        offset = self._sets.affinity.key[0].padded
        if everything:
            sticky = {k: p for k, p in self._programmed.items() if p.frontend.affinity_s}
            self._prune = {k: frozenset((*p.cluster, *p.local)) for k, p in sticky.items()}
        prune, self._prune = self._prune, {}
        if not prune and not everything:
            return None
        return Prune(self.table, self._sets.affinity, offset, prune, others=everything)

    def state(self) -> TableState:
        chains = {c.name: ChainState(c) for c in fixed_chains()}
        for name, rules in fixed_rules(self.family, self._facts).items():
            chains[name] = ChainState(chains[name].chain, rules)
        for key in self._chains.in_use:
            chains[key.name] = ChainState(Chain(key.name), self._chains.rules(key))
        sets = {of.name: SetState(of, dict(self._books[of.name].elements) if not of.dynamic else {}) for of in self._sets.all()}
        return TableState(chains, sets)


def _observed_order(state: SetState, key: bytes) -> list[bytes]:
    order: list[bytes] = []
    while isinstance(data := state.elements.get(key + _pack_index(len(order))), bytes):
        order.append(data)
    return order
