"""Services → iptables chains, incrementally: the text for `iptables-restore --noflush` holds the chains that changed, no other.

What is planned and what `iptables-save` shows are compared chain by chain, as text.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from podwire.model.addr import Family
from podwire.model.servicetable import Backend, Frontend, NodeFacts, Pool, ServiceTable
from podwire.plan import iptables_rules as rules
from podwire.plan.iptables_rules import FILTER, HOOKS, NAT, PREFIX, TABLES, Owned, Rules
from podwire.plan.serviceledger import ServiceLedger

ChainRef = tuple[str, str]
"""(table, chain)"""


@dataclass(frozen=True, slots=True)
class Chains:
    """What a family's tables hold of ours. `jumps`: the rules in the kernel's own chains that lead to ours."""

    rules: Mapping[ChainRef, Rules] = field(default_factory=dict)
    jumps: Mapping[ChainRef, Rules] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.rules) or any(self.jumps.values())


@dataclass(frozen=True, slots=True)
class TableChanges:
    """What changes in one table. `new`: chains that are not there yet; `changed`: chains with their rules, those that others
    lead to first; `hooks`: lines for the kernel's own chains; `gone`: chains that nothing leads to any more."""

    table: str
    new: tuple[str, ...]
    changed: Mapping[str, Rules]
    hooks: tuple[str, ...]
    gone: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.changed or self.hooks or self.gone)

    @property
    def rules(self) -> int:
        """How many it writes."""
        return sum(map(len, self.changed.values())) + len(self.hooks)

    def text(self) -> str:
        # Naming a chain makes it, or empties it. A chain that goes must be empty, so that it leads to no other.
        named = [f":{name} - [0:0]" for name in (*self.changed, *self.gone)]
        filled = [f"-A {name} {line}" for name, lines in self.changed.items() for line in lines]
        return _text(self.table, (*named, *filled, *self.hooks, *(f"-X {name}" for name in self.gone)))

    def parts(self, most_lines: int) -> Iterator[str]:
        """The same in several texts; after each of them the rules work."""
        yield _text(self.table, [f":{name} - [0:0]" for name in self.new])
        part: list[str] = []
        for name, lines in self.changed.items():
            part.append(f":{name} - [0:0]")
            for line in lines:
                part.append(f"-A {name} {line}")
                if len(part) >= most_lines:
                    yield _text(self.table, part)
                    part = []
        yield _text(self.table, (*part, *self.hooks))
        emptied = [f":{name} - [0:0]" for name in self.gone]
        yield _text(self.table, (*emptied, *(f"-X {name}" for name in self.gone)))


def _text(table: str, lines: Sequence[str]) -> str:
    return "\n".join((f"*{table}", *lines, "COMMIT", ""))


@dataclass(frozen=True, slots=True)
class Restore:
    """Input for `iptables-restore --noflush` or `ip6tables-restore`."""

    family: Family
    tables: tuple[TableChanges, ...]

    @property
    def chains(self) -> int:
        """How many chains it changes."""
        return sum(len(t.changed) + len(t.gone) + bool(t.hooks) for t in self.tables)

    @property
    def text(self) -> str:
        """All at once: what a table gets, it gets whole."""
        return "".join(t.text() for t in self.tables)

    def parts(self, most_lines: int) -> list[str]:
        """The same in texts of at most so many lines, for a kernel that takes no more at once."""
        return [text for t in self.tables for text in t.parts(most_lines)]


class IptablesPlanner(ServiceLedger["FamilyChains"]):
    """Holds one node's desired chains. Feed it objects, take the texts that bring the kernel up to date."""

    def __init__(self, facts: NodeFacts, *, masquerade_bit: int = rules.MASQUERADE_BIT, drop_invalid: bool = True) -> None:
        """`drop_invalid`: drop forwarded packets that the connection tracker cannot place."""
        mark = f"{1 << masquerade_bit:#x}"
        super().__init__(facts, lambda family, known: FamilyChains(family, known, mark, drop_invalid=drop_invalid))

    def _set_table(self, owner: str, new: ServiceTable) -> None:
        old = self._tables.get(owner)
        super()._set_table(owner, new)
        if new.health_check_port != (old.health_check_port if old else 0):
            for chains in self._maps.values():
                chains.set_health_check(owner, new.health_check_port)

    def take(self) -> list[Restore]:
        """From what was last taken to what is desired now; empty if that is the same."""
        return [text for chains in self._maps.values() if (text := chains.take()) is not None]

    def resync(self, observed: Mapping[Family, Chains]) -> list[Restore]:
        """From what the kernel holds to what is desired now, which then counts as taken."""
        found = []
        for chains in self._maps.values():
            chains.take()
            text = restore(chains.family, chains.desired(), observed.get(chains.family, Chains()))
            if text is not None:
                found.append(text)
        return found

    def desired(self) -> dict[Family, Chains]:
        """All that the kernel shall hold."""
        return {chains.family: chains.desired() for chains in self._maps.values()}

    def rule_counts(self) -> dict[tuple[Family, str], int]:
        """How many rules the kernel shall hold, by family and table."""
        found = {(family, table): 0 for family in Family for table in TABLES}
        for family, chains in self.desired().items():
            for held in (chains.rules, chains.jumps):
                for (table, _), lines in held.items():
                    found[family, table] += len(lines)
        return found

    def counted(
        self, texts: Mapping[Family, str], *, endpoints: bool
    ) -> tuple[dict[bytes, int], dict[tuple[bytes, Backend], int]]:
        """The nat tables as `iptables-save -c` shows them → packets by frontend's key, or by that and endpoint. To the nat
        table a connection is one packet."""
        frontends: dict[bytes, int] = {}
        chosen: dict[tuple[bytes, Backend], int] = {}
        for chains in self._maps.values():
            seen = _counters(texts.get(chains.family, ""))
            if endpoints:
                chosen |= chains.count_endpoints(seen)
            else:
                frontends |= chains.count_frontends(seen)
        return frontends, chosen


class _CountedAddresses:
    """Addresses (keys end with one) that several owners may want; `changed` is told of those that come and go."""

    def __init__(self, owner: "FamilyChains", kind: str) -> None:
        self._owner, self._kind = owner, kind
        self.addresses: dict[bytes, int] = {}

    def want(self, key: bytes) -> None:
        self.addresses[key] = self.addresses.get(key, 0) + 1
        if self.addresses[key] == 1:
            self._owner.counted(self._kind, key)

    def release(self, key: bytes) -> None:
        self.addresses[key] -= 1
        if not self.addresses[key]:
            del self.addresses[key]
            self._owner.counted(self._kind, key)


class FamilyChains:
    """All chains of one family."""

    def __init__(self, family: Family, facts: NodeFacts, mark: str, *, drop_invalid: bool = True) -> None:
        self.family, self._facts, self._mark = family, facts, mark
        self._frontends: dict[bytes, Owned] = {}
        self._buckets: dict[ChainRef, dict[bytes, Rules]] = {}
        self._chains: dict[ChainRef, Rules] = rules.fixed_chains(family, facts, mark, drop_invalid=drop_invalid)
        self._roots = {"I": (NAT, "INSIDE"), "O": (NAT, "OUTSIDE"), "FI": (FILTER, "F-IN"), "FO": (FILTER, "F-OUT")}
        for table, name in self._roots.values():
            self._chains[table, rules.chain(name)] = ()
        self._chains[NAT, rules.chain("HAIRPIN")] = ()
        self._chains[FILTER, rules.chain(rules.HEALTH)] = ()
        self._health_checks: dict[str, int] = {}
        self._before: dict[ChainRef, Rules | None] = dict.fromkeys(self._chains)
        self._taken = False
        self._stale: set[ChainRef] = set()
        self.hairpin, self.cluster_ips = _CountedAddresses(self, "hairpin"), _CountedAddresses(self, "cluster_ips")

    # --- programming ------------------------------------------------------------------------------------------------

    def frontend(self, key: bytes) -> Frontend:
        return self._frontends[key].frontend

    def program(self, key: bytes, frontend: Frontend | None, owner: str = "") -> None:
        old = self._frontends.get(key)
        new = Owned(key, frontend, owner) if frontend is not None else None
        if old == new:
            return
        self._enter(key, old, new)
        if new is not None:
            self._frontends[key] = new
        else:
            del self._frontends[key]

    def _enter(self, key: bytes, old: Owned | None, new: Owned | None) -> None:
        """Everything that stands for a frontend: its own chains, and its rules in the chains that lead to them."""
        address = (new or old or self._frontends[key]).frontend.address
        for outside in (False, True):
            pool = _pool(new, outside=outside)
            kinds = ("O", "FO") if outside else ("I", "FI")
            led = rules.nat_entry(new, pool, outside=outside) if new and pool else ()
            refused = rules.filter_entry(new, pool, self.family) if new and pool else ()
            for kind, entry in zip(kinds, (led, refused), strict=True):
                self._put_entry(kind, address, key, entry)
            wanted = self._service_chains(new, pool, outside=outside)
            present = self._service_chains(old, _pool(old, outside=outside), outside=outside)
            for ref in present.keys() | wanted.keys():
                self._put(ref, wanted.get(ref))

    def _service_chains(self, of: Owned | None, pool: Pool | None, *, outside: bool) -> dict[ChainRef, Rules]:
        if of is None or pool is None or not pool.backends:
            return {}
        main = rules.service_rules(of, pool, self._facts, self._mark, outside=outside)
        found = {(NAT, rules.service_chain(of.key, outside=outside)): main}
        if of.frontend.affinity_s:
            for packed in pool.backends:
                found[NAT, rules.endpoint_chain(of.key, packed, outside=outside)] = rules.endpoint_rules(of, packed)
        return found

    def count_frontends(self, seen: Mapping[tuple[str, str], int]) -> dict[bytes, int]:
        """`seen`: see `_counters`."""
        names = {key: [rules.service_chain(key, outside=outside) for outside in (False, True)] for key in self._frontends}
        return {key: sum(seen.get(("", name), 0) for name in pair) for key, pair in names.items()}

    def count_endpoints(self, seen: Mapping[tuple[str, str], int]) -> dict[tuple[bytes, Backend], int]:
        """`seen`: see `_counters`."""
        found: dict[tuple[bytes, Backend], int] = {}
        for key, of in self._frontends.items():
            for outside in (False, True):
                pool = _pool(of, outside=outside)
                main = rules.service_chain(key, outside=outside)
                for packed in pool.backends if pool else ():
                    name = rules.endpoint_chain(key, packed, outside=outside) if of.frontend.affinity_s else main
                    found[key, packed] = found.get((key, packed), 0) + seen.get((name, rules.destination(packed)), 0)
        return found

    def set_health_check(self, owner: str, port: int) -> None:
        """0: it has none."""
        self._health_checks[owner] = port
        if not port:
            del self._health_checks[owner]
        self._stale.add((FILTER, rules.chain(rules.HEALTH)))

    def counted(self, kind: str, key: bytes) -> None:
        """An address came or went in `hairpin` or `cluster_ips`."""
        if kind == "hairpin":
            self._stale.add((NAT, rules.chain("HAIRPIN")))
            return
        entry = (rules.refused_cluster_ip(key),) if key in self.cluster_ips.addresses else ()
        self._put_entry("FI", key, _LAST + key, entry)

    # --- chains -------------------------------------------------------------------------------------------------------

    def _put(self, ref: ChainRef, new: Rules | None) -> None:
        old = self._chains.get(ref)
        if old == new:
            return
        self._before.setdefault(ref, old)
        if new is None:
            del self._chains[ref]
        else:
            self._chains[ref] = new

    def _put_entry(self, kind: str, address: bytes, key: bytes, entry: Rules) -> None:
        table, root = self._roots[kind]
        ref = (table, rules.bucket_name(kind, address))
        bucket = self._buckets.get(ref)
        if bucket is None:
            if not entry:
                return
            bucket = self._buckets[ref] = {}
            self._stale.add((table, rules.chain(root)))
        if entry:
            if bucket.get(key) == entry:
                return
            bucket[key] = entry
        elif bucket.pop(key, None) is None:
            return
        if not bucket:
            del self._buckets[ref]
            self._stale.add((table, rules.chain(root)))
        self._stale.add(ref)

    def _settle(self) -> None:
        """Write the chains that gather the rules of many."""
        for ref in self._stale:
            table, name = ref
            if name == rules.chain("HAIRPIN"):
                self._put(ref, tuple(rules.hairpin(key[: len(key) // 2]) for key in sorted(self.hairpin.addresses)))
            elif name == rules.chain(rules.HEALTH):
                ports = sorted((port, owner) for owner, port in self._health_checks.items())
                self._put(ref, tuple(rules.health_check(port, owner) for port, owner in ports))
            elif ref in self._root_kinds():
                kind = self._root_kinds()[ref]
                held = [b for t, b in self._buckets if t == table and b.startswith(rules.chain(kind + "-"))]
                self._put(ref, rules.dispatch(self.family, held))
            else:
                bucket = self._buckets.get(ref)
                self._put(ref, rules.merged([bucket[k] for k in sorted(bucket)]) if bucket else None)
        self._stale.clear()

    def _root_kinds(self) -> dict[ChainRef, str]:
        return {(table, rules.chain(root)): kind for kind, (table, root) in self._roots.items()}

    # --- results ------------------------------------------------------------------------------------------------------

    def desired(self) -> Chains:
        self._settle()
        return Chains(dict(self._chains), _jumps())

    def take(self) -> Restore | None:
        """What changed since the last call."""
        self._settle()
        before, self._before = self._before, {}
        first, self._taken = not self._taken, True
        old = {ref: lines for ref, lines in before.items() if lines is not None}
        new = {ref: self._chains[ref] for ref in before if ref in self._chains}
        jumps = _jumps()
        return restore(self.family, Chains(new, jumps), Chains(old, {} if first else jumps))


_LAST = b"\xff" * 17
"""Sorts behind every frontend's key: a closed port is what no frontend of the address claimed."""


def _pool(of: Owned | None, *, outside: bool) -> Pool | None:
    if of is None:
        return None
    return of.frontend.outside if outside else of.frontend.inside


def _jumps() -> dict[ChainRef, Rules]:
    return {
        (table, hook): (f"{match}-m comment --comment podwire -j {rules.chain(target)}",)
        for table, hooks in HOOKS.items()
        for hook, match, target in hooks
    }


# --- the text -----------------------------------------------------------------------------------------------------


def restore(family: Family, desired: Chains, observed: Chains) -> Restore | None:
    """The way from `observed` to `desired`; None if they are the same. Chains in neither are left alone."""
    tables = tuple(filter(None, (_changes(table, desired, observed) for table in TABLES)))
    return Restore(family, tables) if tables else None


def _changes(table: str, desired: Chains, observed: Chains) -> TableChanges:
    new = {name: lines for (t, name), lines in desired.rules.items() if t == table}
    old = {name: lines for (t, name), lines in observed.rules.items() if t == table}
    changed = {name: new[name] for name in sorted(new, key=_depth) if old.get(name) != new[name]}
    hooks: list[str] = []
    for ref in {**observed.jumps, **desired.jumps}:
        present, wanted = observed.jumps.get(ref, ()), desired.jumps.get(ref, ())
        if ref[0] == table and present != wanted:
            hooks += [f"-D {ref[1]} {line}" for line in present]
            hooks += [f"-I {ref[1]} 1 {line}" for line in reversed(wanted)]
    return TableChanges(
        table,
        new=tuple(name for name in changed if name not in old),
        changed=changed,
        hooks=tuple(hooks),
        gone=tuple(name for name in old if name not in new),
    )


def _depth(name: str) -> int:
    """Smaller for chains that others lead to."""
    kind = name.removeprefix(PREFIX).split("-", 1)[0]
    return {"SEP": 0, "SVC": 1, "EXT": 1, "I": 2, "O": 2, "FI": 2, "FO": 2}.get(kind, 3)


def parse_save(text: str) -> Chains:
    """The output of `iptables-save` (any tables) → what is ours in it."""
    found: dict[ChainRef, list[str]] = {}
    jumps: dict[ChainRef, list[str]] = {}
    table = ""
    for line in text.splitlines():
        if line.startswith("*"):
            table = line[1:].strip()
        elif line.startswith(":" + PREFIX):
            found[table, line[1:].split(" ", 1)[0]] = []
        elif line.startswith("-A "):
            _, name, rule = line.split(" ", 2)
            if name.startswith(PREFIX):
                found.setdefault((table, name), []).append(rule)
            elif f"-j {PREFIX}" in rule or f"-g {PREFIX}" in rule:
                jumps.setdefault((table, name), []).append(rule)
    return Chains({ref: tuple(lines) for ref, lines in found.items()}, {ref: tuple(lines) for ref, lines in jumps.items()})


def invalid_dropped(text: str) -> int:
    """Packets that `rules.INVALID` dropped, of a filter table as `iptables-save -c` shows it."""
    end = f" -A {rules.chain('FORWARD')} {rules.INVALID}"
    return sum(int(line[1:].partition(":")[0]) for line in text.splitlines() if line.endswith(end))


def served(observed: Mapping[Family, Chains]) -> frozenset[bytes]:
    """The keys of all frontends that have rules there."""
    lines = (line for held in observed.values() for (table, _), rules in held.rules.items() if table == NAT for line in rules)
    return frozenset(key for line in lines if (key := rules.frontend_key_of(line)) is not None)


def _counters(text: str) -> dict[tuple[str, str], int]:
    """Packets by ("", chain of a frontend that a rule leads to) and by (chain, destination that it writes)."""
    found: dict[tuple[str, str], int] = {}
    for line in text.splitlines():
        if not line.startswith("["):
            continue
        counter, _, name, rule = line.split(" ", 3)
        if " --to-destination " in rule:
            ref = name, rule.rsplit(" ", 1)[1]
        elif " -g " in rule:
            ref = "", rule.rsplit(" ", 1)[1]
        else:
            continue
        found[ref] = found.get(ref, 0) + int(counter[1:].split(":", 1)[0])
    return found
