"""`Frontend`s → elements of the maps, kept as they stand and as they changed: one family's half of the planner.

A pool's backends sit at indices 0 … N−1 under the frontend's key. When one leaves, the last takes its place; a new one goes
to the end: a change of one endpoint moves two or three elements, whatever the pool's size.
"""

import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Final, NamedTuple

import msgspec

from podwire.model.addr import Family
from podwire.model.nft import (
    AddChain,
    AddSet,
    AddTable,
    Afterwards,
    ChainState,
    Command,
    Data,
    NftSet,
    Prune,
    Rule,
    Ruleset,
    SetRules,
    SetState,
    Sweep,
    TableState,
)
from podwire.model.servicetable import Frontend, FrontendKind, NodeFacts
from podwire.plan.nftdiff import ElementChanges, RuleChanges
from podwire.plan.services_rules import (
    EXACT,
    NUMBERED,
    PICK,
    PICK_LOCAL,
    REMEMBER,
    Number,
    Sets,
    fixed_chains,
    fixed_rules,
    numbered_rules,
    pack_number,
    pool_number,
    pool_size,
    sets_of,
    table_ref,
)

_ABSENT: Final = object()

_DEPARTED_MOST = 512
"""So many endpoints may have left before the kernel forgets what was counted of them. One that comes back by then counts on,
and the change that reaches the number costs some milliseconds instead of each a little more."""


@lru_cache(maxsize=1 << 16)
def _pack_port(port: int) -> bytes:
    return port.to_bytes(2, "big") + b"\0\0"


@lru_cache(maxsize=1 << 12)
def _pack_index(index: int) -> bytes:
    return index.to_bytes(4, sys.byteorder)


_PROTOCOLS = tuple(bytes((number, 0, 0, 0)) for number in range(256))


def frontend_key(frontend: Frontend) -> bytes:
    """address . protocol . port, as the registers hold them."""
    return frontend.address + _PROTOCOLS[frontend.protocol] + _pack_port(frontend.port)


class Place(NamedTuple):
    """Where clients connect to: a packed address, an IP protocol's number, a port."""

    address: bytes
    protocol: int
    port: int


def place_key(address: bytes, protocol: int, port: int) -> bytes:
    return address + bytes((protocol, 0, 0, 0)) + _pack_port(port)


def place_of(key: bytes) -> Place:
    """What `place_key` made the key of."""
    return Place(key[:-8], key[-8], int.from_bytes(key[-4:-2], "big"))


class ElementBook:
    """One set's elements, and what they were when changes were last taken."""

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

    def put_pool(self, key: bytes, backends: Sequence[bytes]) -> None:
        """The indexed elements of a frontend that has none so far."""
        for index, data in enumerate(backends):
            indexed = key + _pack_index(index)
            if self._before is not None:
                self._before.setdefault(indexed, _ABSENT)
            self.elements[indexed] = data

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


class NumberBook:
    """The numbers that have a rule, and how many frontends need each."""

    def __init__(self, family: Family) -> None:
        self._family = family
        # A rule that comes makes the kernel look at all elements of its maps: the usual ones are always there.
        self._users = Counter(_number(chain, n) for chain in (PICK, PICK_LOCAL) for n in range(1, EXACT + 1))
        self._taken: frozenset[Number] = frozenset()

    def use(self, number: Number) -> None:
        self._users[number] += 1

    def release(self, number: Number) -> None:
        self._users[number] -= 1
        if not self._users[number]:
            del self._users[number]

    def rules(self) -> dict[str, tuple[Rule, ...]]:
        """All of the numbered chains."""
        return _numbered_rules(self._family, frozenset(self._users))

    def take(self) -> RuleChanges:
        """Rules that came and went since the last call."""
        now = frozenset(self._users)
        if now == self._taken:
            return RuleChanges()
        before, both, after = (_numbered_rules(self._family, n) for n in (self._taken, self._taken | now, now))
        self._taken = now
        return RuleChanges(
            {chain: rules for chain, rules in both.items() if rules != before[chain]},
            {chain: rules for chain, rules in after.items() if rules != both[chain]},
        )


@lru_cache(maxsize=32)
def _numbered_rules(family: Family, numbers: frozenset[Number]) -> dict[str, tuple[Rule, ...]]:
    in_use: dict[str, list[int]] = {chain: [] for chain in NUMBERED}
    for number in numbers:
        in_use[number.chain].append(number.value)
    return numbered_rules(family, in_use)


class Programmed(msgspec.Struct, gc=False):
    """A frontend as it stands in the maps: its backends' elements in index order."""

    frontend: Frontend
    cluster: Sequence[bytes]
    local: Sequence[bytes]

    def numbers(self) -> Iterator[Number]:
        """Those that need a rule."""
        if self.cluster:
            yield _number(PICK, pool_size(len(self.cluster)))
        if self.local:
            yield _number(PICK_LOCAL, pool_size(len(self.local)))
        if self.frontend.affinity_s:
            yield _number(REMEMBER, self.frontend.affinity_s)


@lru_cache(maxsize=4096)
def _number(chain: str, value: int) -> Number:
    return Number(chain, value)


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


class FamilyMaps:
    """All elements and numbered rules of one family's table."""

    def __init__(self, family: Family, facts: NodeFacts, sets: Sets | None = None) -> None:
        self.family, self.table = family, table_ref(family)
        self._facts = facts
        self._sets: Sets = sets or sets_of(family)
        self._books = {of.name: ElementBook(of) for of in self._sets.all() if not of.dynamic}
        self.hairpin, self.cluster_ips = CountedBook(self._sets.hairpin), CountedBook(self._sets.cluster_ips)
        self._books |= {b.set.name: b for b in (self.hairpin, self.cluster_ips)}
        self._services, self._outside = self._books["services"], self._books["outside"]
        self._endpoints, self._local = self._books["endpoints"], self._books["local-endpoints"]
        self._pools, self._local_pools = self._books["pools"], self._books["local-pools"]
        self._sticky = self._books["sticky"]
        self._numbers = NumberBook(family)
        self._programmed: dict[bytes, Programmed] = {}
        self._prune: dict[bytes, Collection[bytes]] = {}
        self._departed: dict[bytes, None] = {}
        """Keys of `connections` of which nothing is programmed any more."""
        self._built = False

    # --- programming ------------------------------------------------------------------------------------------

    def frontend(self, key: bytes) -> Frontend:
        """What is served under `key`."""
        return self._programmed[key].frontend

    def program(self, key: bytes, frontend: Frontend | None, owner: str = "") -> None:
        """Make the maps serve `frontend` under `key`; None: nothing any more. `owner` is shown to humans."""
        old = self._programmed.get(key)
        if frontend is None:
            if old is not None:
                self._clear(key, old)
            return
        self._services.comments[key] = owner
        outside = frontend.outside.backends if frontend.outside else ()
        if old is None:
            new = Programmed(frontend, frontend.inside.backends, outside)
            self._endpoints.put_pool(key, new.cluster)
            self._local.put_pool(key, new.local)
        elif old.frontend == frontend:
            return
        else:
            new = Programmed(frontend, arrange(old.cluster, frontend.inside.backends), arrange(old.local, outside))
            self._move(self._endpoints, key, old.cluster, new.cluster)
            self._move(self._local, key, old.local, new.local)
        for number in new.numbers():
            self._numbers.use(number)
        self._lead(key, new, old)
        self._flags(key, old.frontend if old else None, frontend)
        if old is not None:
            self._release(old)
            self._depart(key, {*old.cluster, *old.local}.difference(new.cluster, new.local))
            if old.frontend.affinity_s:
                self._forget(key, old, new)
        if self._departed:
            for data in (*new.cluster, *new.local):
                self._departed.pop(key + data, None)
        self._programmed[key] = new

    def _depart(self, key: bytes, backends: Iterable[bytes]) -> None:
        for data in backends:
            self._departed[key + data] = None

    def _move(self, book: ElementBook, key: bytes, old: Sequence[bytes], new: Sequence[bytes]) -> None:
        for index, data in enumerate(new):
            if index >= len(old) or old[index] != data:
                book.put(key + _pack_index(index), data)
        for index in range(len(new), len(old)):
            book.drop(key + _pack_index(index))

    def _lead(self, key: bytes, new: Programmed, old: Programmed | None) -> None:
        """Where packets to this frontend go."""
        frontend = new.frontend
        self._pools.put(key, pool_number(frontend.inside))
        self._services.put(key)
        if frontend.outside is not None:
            self._local_pools.put(key, pool_number(frontend.outside))
            self._outside.put(key)
        elif old is not None:
            self._outside.drop(key)
            self._local_pools.drop(key)
        if frontend.affinity_s:
            self._sticky.put(key, pack_number(frontend.affinity_s))
        elif old is not None:
            self._sticky.drop(key)

    def _forget(self, key: bytes, old: Programmed, new: Programmed) -> None:
        """Clients must not go on to backends that are gone, nor by an answer given under another traffic policy."""
        same_kind = new.frontend.affinity_s and (old.frontend.outside is None) == (new.frontend.outside is None)
        kept = frozenset((*new.cluster, *new.local)) if same_kind else frozenset()
        if not kept.issuperset((*old.cluster, *old.local)):
            self._prune[key] = kept

    def _flags(self, key: bytes, old: Frontend | None, new: Frontend) -> None:
        flags = _flags_of(new)
        for name in _flags_of(old) if old is not None else ():
            if name not in flags:
                self._books[name].drop(key)
        for name in flags:
            self._books[name].put(key)
        if old is not None and old.source_ranges == new.source_ranges:
            return
        book = self._books["source-ranges"]
        for first, last in old.source_ranges or () if old is not None else ():
            book.drop(key + first + key + last)
        for first, last in new.source_ranges or ():
            book.put(key + first + key + last)

    def _clear(self, key: bytes, old: Programmed) -> None:
        del self._services.comments[key]
        for leads in (self._services, self._outside, self._pools, self._local_pools, self._sticky):
            leads.drop(key)
        for book, order in ((self._endpoints, old.cluster), (self._local, old.local)):
            for index in range(len(order)):
                book.drop(key + _pack_index(index))
        for name in _flags_of(old.frontend):
            self._books[name].drop(key)
        for first, last in old.frontend.source_ranges or ():
            self._books["source-ranges"].drop(key + first + key + last)
        if old.frontend.affinity_s:
            self._prune[key] = frozenset()
        self._depart(key, (*old.cluster, *old.local))
        self._release(old)
        del self._programmed[key]

    def _release(self, old: Programmed) -> None:
        for number in old.numbers():
            self._numbers.release(number)

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
                arranged = arrange(_observed_order(state, key), held)
                if tuple(arranged) != tuple(held):
                    setattr(programmed, attribute, arranged)
                    for index, data in enumerate(arranged):
                        book.put(key + _pack_index(index), data)

    # --- results ----------------------------------------------------------------------------------------------

    def take_changes(self) -> tuple[list[Command], RuleChanges, list[ElementChanges]]:
        """(what has to exist first, numbered rules, elements) changed since the last call; what packets left behind:
        `take_leavings`."""
        creates: list[Command] = []
        rules = self._numbers.take()
        if not self._built:
            self._built = True
            creates, rules = self._commands(), RuleChanges()
        changes = [self._books[of.name].take() for of in self._sets.all() if not of.dynamic]
        return creates, rules, [c for c in changes if c]

    def _rules(self) -> dict[str, tuple[Rule, ...]]:
        """Those of every chain, chains that are jumped to first."""
        return self._numbers.rules() | fixed_rules(self.family, self._facts)

    def _commands(self) -> list[Command]:
        rules = self._rules()
        chains = {c.name: c for c in fixed_chains()}
        return [
            AddTable(self.table),
            *(AddSet(self.table, of) for of in self._sets.all()),
            *(AddChain(self.table, c) for c in chains.values()),
            *(SetRules(self.table, name, found) for name, found in rules.items()),
        ]

    def take_leavings(self, *, everything: bool = False) -> list[Afterwards]:
        """Which affinities and counts have to go. `everything`: those of all frontends are checked, and those of unknown ones
        go."""
        table, affinity, connections = self.table, self._sets.affinity, self._sets.connections
        offset = affinity.key[0].padded
        prune, self._prune = self._prune, {}
        departed = self._departed
        if everything or len(departed) >= _DEPARTED_MOST:
            self._departed = {}
        if everything:
            served = {key: (*p.cluster, *p.local) if p.local else p.cluster for key, p in self._programmed.items()}
            sticky = {key: served[key] for key, p in self._programmed.items() if p.frontend.affinity_s}
            return [Prune(table, affinity, offset, sticky, others=True), Prune(table, connections, 0, served, others=True)]
        leavings: list[Afterwards] = [Prune(table, affinity, offset, prune)] if prune else []
        if len(departed) >= _DEPARTED_MOST:
            leavings.append(Sweep(table, connections, tuple(departed)))
        return leavings

    def state(self) -> TableState:
        chains = {c.name: ChainState(c) for c in fixed_chains()}
        for name, rules in self._rules().items():
            chains[name] = ChainState(chains[name].chain, rules)
        books = {name: SetState(b.set, dict(b.elements), dict(b.comments)) for name, b in self._books.items()}
        return TableState(chains, {of.name: books.get(of.name, SetState(of)) for of in self._sets.all()})


def _flags_of(frontend: Frontend) -> tuple[str, ...]:
    """The sets that hold the frontend's key."""
    if frontend.kind is FrontendKind.CLUSTER_IP:
        return ()
    flags = (
        ("masquerade", frontend.masquerade),
        ("keep-source", frontend.outside is not None),
        ("restricted", frontend.source_ranges is not None),
    )
    return tuple(name for name, wanted in flags if wanted)


def _observed_order(state: SetState, key: bytes) -> list[bytes]:
    order: list[bytes] = []
    while isinstance(data := state.elements.get(key + _pack_index(len(order))), bytes):
        order.append(data)
    return order
