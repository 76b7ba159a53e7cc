"""`Frontend`s → elements of the maps and the rules for the numbers in use: one family's half of the planner."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

from podwire.model.addr import Family
from podwire.model.nft import (
    AddChain,
    AddSet,
    AddTable,
    Afterwards,
    Batch,
    ChainState,
    Command,
    Prune,
    Rule,
    Ruleset,
    SetRules,
    SetState,
    Sweep,
    TableState,
)
from podwire.model.servicetable import Frontend, FrontendKind, NodeFacts
from podwire.plan.elementbooks import CountedBook, ElementBook, PoolBook
from podwire.plan.nftdiff import ElementChanges, RuleChanges, diff_ruleset, order_changes
from podwire.plan.services_affinity import AffinityBook, Numbers
from podwire.plan.services_rules import (
    NUMBERED,
    PICK,
    PICK_LOCAL,
    REMEMBER_FOR,
    USUAL,
    Number,
    Sets,
    fixed_chains,
    fixed_rules,
    numbered_rules,
    pool_number,
    pool_size,
    sets_of,
    table_ref,
)

_DEPARTED_MOST = 256
"""So many endpoints may have left before the kernel forgets what was counted of them. One that comes back by then counts on,
and the change that reaches the number costs some milliseconds instead of each a little more."""


@lru_cache(maxsize=1 << 16)
def _pack_port(port: int) -> bytes:
    return port.to_bytes(2, "big") + b"\0\0"


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


class NumberBook:
    """The numbers that need a rule beside the usual ones, and how many frontends need each."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._users: Counter[Number] = Counter()
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


def _numbers_of(frontend: Frontend) -> Iterator[Number]:
    """Those that need a rule which is not always there."""
    if (backends := len(frontend.inside.backends)) > USUAL:
        yield _number(PICK, pool_size(backends))
    if frontend.outside is not None and (backends := len(frontend.outside.backends)) > USUAL:
        yield _number(PICK_LOCAL, pool_size(backends))
    if frontend.affinity_s:
        yield _number(REMEMBER_FOR, frontend.affinity_s)


@lru_cache(maxsize=4096)
def _number(chain: str, value: int) -> Number:
    return Number(chain, value)


class FamilyMaps:
    """All elements and numbered rules of one family's table."""

    def __init__(self, family: Family, facts: NodeFacts, sets: Sets | None = None) -> None:
        self.family, self.table = family, table_ref(family)
        self._facts = facts
        self._sets: Sets = sets or sets_of(family)
        self.hairpin, self.cluster_ips = CountedBook(self._sets.hairpin), CountedBook(self._sets.cluster_ips)
        self._endpoints, self._local = PoolBook(self._sets.endpoints), PoolBook(self._sets.local_endpoints)
        self._pool_books = {book.set.name: book for book in (self._endpoints, self._local)}
        plain = [of for of in self._sets.all() if not of.dynamic and of.name not in self._pool_books]
        self._books = {of.name: ElementBook(of) for of in plain}
        self._books |= {b.set.name: b for b in (self.hairpin, self.cluster_ips)}
        self._services, self._outside = self._books["services"], self._books["outside"]
        self._pools, self._local_pools = self._books["pools"], self._books["local-pools"]
        self._affinity = AffinityBook(self._sets, self._books)
        self._numbers = NumberBook(family)
        self._frontends: dict[bytes, Frontend] = {}
        self._departed: dict[bytes, None] = {}
        """Keys of `connections` of which nothing is programmed any more."""
        self._built = False

    # --- programming ------------------------------------------------------------------------------------------

    def frontend(self, key: bytes) -> Frontend:
        """What is served under `key`."""
        return self._frontends[key]

    def memories(self, key: bytes) -> Numbers:
        """By which numbers the clients of the frontend under `key` are remembered."""
        self._affinity.settle()
        return self._affinity.numbers(key)

    def program(self, key: bytes, frontend: Frontend | None, owner: str = "") -> None:
        """Make the maps serve `frontend` under `key`; None: nothing any more. `owner` is shown to humans."""
        old = self._frontends.get(key)
        if frontend is None:
            if old is not None:
                self._clear(key, old)
            return
        self._services.comments[key] = owner
        if frontend.affinity_s or (old is not None and old.affinity_s):
            self._affinity.serve(key, frontend, owner)
        if old == frontend:
            return
        self._endpoints.put(key, frontend.inside.backends)
        for number in _numbers_of(frontend):
            self._numbers.use(number)
        self._lead(key, frontend, old)
        if old is not None:
            self._leave(key, old, frontend)
        if old is not None or frontend.kind is not FrontendKind.CLUSTER_IP:
            self._flags(key, old, frontend)
        self._frontends[key] = frontend
        if self._departed:
            for data in frontend.backends:
                self._departed.pop(key + data, None)

    def _leave(self, key: bytes, old: Frontend, new: Frontend) -> None:
        """What the frontend has no more as it is now."""
        self._release(old)
        self._depart(key, set(old.backends).difference(new.backends))

    def _depart(self, key: bytes, backends: Iterable[bytes]) -> None:
        for data in backends:
            self._departed[key + data] = None

    def _lead(self, key: bytes, new: Frontend, old: Frontend | None) -> None:
        """Where packets to this frontend go."""
        self._pools.put(key, pool_number(new.inside))
        self._services.put(key)
        if new.outside is not None:
            self._local.put(key, new.outside.backends)
            self._local_pools.put(key, pool_number(new.outside))
            self._outside.put(key)
        elif old is not None:
            self._outside.drop(key)
            self._local_pools.drop(key)
            self._local.put(key, ())

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

    def _clear(self, key: bytes, old: Frontend) -> None:
        del self._services.comments[key]
        for leads in (self._services, self._outside, self._pools, self._local_pools):
            leads.drop(key)
        for pools in (self._endpoints, self._local):
            pools.put(key, ())
        for name in _flags_of(old):
            self._books[name].drop(key)
        for first, last in old.source_ranges or ():
            self._books["source-ranges"].drop(key + first + key + last)
        if old.affinity_s:
            self._affinity.serve(key, None)
        self._depart(key, old.backends)
        self._release(old)
        del self._frontends[key]

    def _release(self, old: Frontend) -> None:
        for number in _numbers_of(old):
            self._numbers.release(number)

    def adopt_order(self, observed: Ruleset) -> None:
        """Give every pool the indices that its backends have in the kernel, so that nothing is moved for nothing; and find out
        what must not be remembered."""
        for pools in (self._endpoints, self._local):
            pools.adopt_order(observed, self.table)
        if self.table in observed.tables:
            self._affinity.settle()
            self._affinity.distrust(observed.tables[self.table].sets)

    # --- results ----------------------------------------------------------------------------------------------

    def take_changes(self) -> tuple[list[Command], RuleChanges, list[ElementChanges]]:
        """(what has to exist first, numbered rules, elements) changed since the last call; what packets left behind:
        `take_leavings`."""
        creates: list[Command] = []
        self._affinity.settle()
        rules = self._numbers.take()
        if not self._built:
            self._built = True
            creates, rules = self._commands(), RuleChanges()
        books = self._all_books()
        changes = [books[of.name].take() for of in self._sets.all() if of.name in books]
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
        prune = self._affinity.take_forgotten()
        departed = self._departed
        if everything or len(departed) >= _DEPARTED_MOST:
            self._departed = {}
        if everything:
            served = {key: frontend.backends for key, frontend in self._frontends.items()}
            remembered = self._affinity.all() | prune
            return [Prune(table, affinity, offset, remembered, others=True), Prune(table, connections, 0, served, others=True)]
        leavings: list[Afterwards] = [Prune(table, affinity, offset, prune)] if prune else []
        if len(departed) >= _DEPARTED_MOST:
            leavings.append(Sweep(table, connections, tuple(departed)))
        return leavings

    def state(self) -> TableState:
        self._affinity.settle()
        chains = {c.name: ChainState(c) for c in fixed_chains()}
        for name, rules in self._rules().items():
            chains[name] = ChainState(chains[name].chain, rules)
        states = {name: book.state() for name, book in self._all_books().items()}
        return TableState(chains, {of.name: states.get(of.name, SetState(of)) for of in self._sets.all()})

    def _all_books(self) -> dict[str, ElementBook | PoolBook]:
        return {**self._books, **self._pool_books}


def taken(families: Collection[FamilyMaps]) -> Batch:
    """The smallest transaction from what was last taken to what is desired now."""
    phases = [order_changes(maps.table, *maps.take_changes()) for maps in families]
    ordered = [command for phase in zip(*phases, strict=True) for commands in phase for command in commands]
    return Batch((*ordered, *(command for maps in families for command in maps.take_leavings())))


def resynced(families: Collection[FamilyMaps], observed: Ruleset, *, leavings: bool) -> Batch:
    """The smallest transaction from what the kernel holds to what is desired now, which then counts as taken. Where there is
    any, or `leavings` is set, all that packets left there is checked, too."""
    for maps in families:
        maps.adopt_order(observed)
        maps.take_changes()
    batch = diff_ruleset(Ruleset({maps.table: maps.state() for maps in families}), observed)
    if not (batch or leavings) or all(maps.table not in observed.tables for maps in families):
        return batch
    return Batch((*batch.commands, *(command for maps in families for command in maps.take_leavings(everything=True))))


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
