"""nftables as values: tables, chains, rules, sets and maps; a `Batch` of changes, and the `Ruleset` it makes.

Rules are kept as the kernel's own expressions over its sixteen 32-bit registers, so that what is planned, what is sent and
what is read back are one type. Set elements are the packed register contents themselves (`Element`): fields in order, each
padded with zeros to four bytes, numbers in network order unless the field says host order. Ten thousand Services are then
dictionaries of bytes, and the codec only joins them.

The names are those of `nft --debug=netlink` and of include/uapi/linux/netfilter/nf_tables.h.
"""

import enum
import ipaddress
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from podwire.model.addr import Family
from podwire.model.nftexpr import Expression, Verdict

Data = bytes | Verdict | None
"""What an element maps to: packed bytes, a verdict, or None in a set."""

Element = tuple[bytes, Data]
"""(key, data). In an interval set the key is `first ‖ last`, both inclusive and each of the set's key length."""


class NftConflict(ValueError):
    """A batch that the kernel would refuse: it names something that is not there, or is there already with other content."""


class NftMissing(NftConflict):
    """It is not there."""


class FieldType(enum.Enum):
    """One component of a set's key or data: its name in nft, its length in bytes, libnftables' type number."""

    IPV4 = ("ipv4_addr", 4, 7)
    IPV6 = ("ipv6_addr", 16, 8)
    PROTO = ("inet_proto", 1, 12)
    PORT = ("inet_service", 2, 13)
    INDEX = ("mark", 4, 19)
    """A host-order number, as `numgen` leaves it in a register; nft prints type `mark` as one."""
    NUMBER = ("integer", 4, 4)
    """A number in network order, which nft prints in decimal."""
    PRIORITY = ("classid", 4, 23)
    """`meta priority`: a host-order number, printed as its two halves, in hexadecimal."""

    def __init__(self, nft_name: str, length: int, type_id: int) -> None:
        self.nft_name, self.length, self.type_id = nft_name, length, type_id

    @property
    def padded(self) -> int:
        """The length in registers."""
        return (self.length + 3) & ~3

    def text(self, packed: bytes) -> str:
        match self:
            case FieldType.IPV4 | FieldType.IPV6:
                return str(ipaddress.ip_address(packed))
            case FieldType.PROTO:
                return PROTOCOL_NAMES.get(packed[0], str(packed[0]))
            case FieldType.PORT | FieldType.NUMBER:
                return str(int.from_bytes(packed, "big"))
            case FieldType.INDEX:
                return str(int.from_bytes(packed, sys.byteorder))
            case FieldType.PRIORITY:
                number = int.from_bytes(packed, sys.byteorder)
                return f"{number >> 16:x}:{number & 0xFFFF:x}"


PROTOCOL_NAMES = {1: "icmp", 6: "tcp", 17: "udp", 58: "ipv6-icmp", 132: "sctp"}


def ip_field(family: Family) -> FieldType:
    return FieldType.IPV4 if family is Family.IPV4 else FieldType.IPV6


def packed_length(fields: Iterable[FieldType]) -> int:
    return sum(f.padded for f in fields)


def fields_text(fields: Iterable[FieldType], packed: bytes) -> str:
    """`10.96.0.1 . tcp . 80`."""
    parts, at = [], 0
    for f in fields:
        parts.append(f.text(packed[at : at + f.length]))
        at += f.padded
    return " . ".join(parts)


class Hook(enum.IntEnum):
    """Netfilter's hooks of the IP families, by their number."""

    PREROUTING = 0
    INPUT = 1
    FORWARD = 2
    OUTPUT = 3
    POSTROUTING = 4


@dataclass(frozen=True, slots=True)
class BaseHook:
    """What makes a chain a base chain. `kind` is "nat", "filter" or "route"; `drops`: its policy, which ours never have."""

    kind: str
    hook: Hook
    priority: int
    drops: bool = False


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain without its rules; a base chain if `base` is set."""

    name: str
    base: BaseHook | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """Expressions in order; the first that does not match ends the rule. `comment` is shown by nft (up to 128 bytes)."""

    expressions: tuple[Expression, ...]
    comment: str = ""

    def __str__(self) -> str:
        words = " ".join(str(e) for e in self.expressions)
        return f'{words} comment "{self.comment}"' if self.comment else words


@dataclass(frozen=True, slots=True)
class NftSet:
    """A set, or a map if `data` or `verdicts` is set. Never holds its elements.

    `interval`: keys are ranges. `dynamic`: packets add the elements; with `timeout_s` they expire.
    A `key` of no fields: a set that somebody else made, with types that ours never have.
    `counters`: every element counts packets and bytes. `size`: most elements, 0 for the kernel's default."""

    name: str
    key: tuple[FieldType, ...]
    data: tuple[FieldType, ...] = ()
    verdicts: bool = False
    interval: bool = False
    timeout_s: int = 0
    counters: bool = False
    size: int = 0
    dynamic: bool = False

    @property
    def is_map(self) -> bool:
        return self.verdicts or bool(self.data)

    @property
    def key_length(self) -> int:
        return packed_length(self.key)

    def element_text(self, element: Element) -> str:
        key, data = element
        n = self.key_length
        text = fields_text(self.key, key[:n])
        if self.interval:
            text += f" - {fields_text(self.key, key[n:])}"
        if data is None:
            return text
        return f"{text} : {data if isinstance(data, Verdict) else fields_text(self.data, data)}"


# --- commands -----------------------------------------------------------------------------------------------------


class TableRef(NamedTuple):
    """A table: family and name. nft's `ip` and `ip6` tables; podwire has one of each, both called `podwire`."""

    family: Family
    name: str

    def __str__(self) -> str:
        return f"{'ip' if self.family is Family.IPV4 else 'ip6'} {self.name}"


@dataclass(frozen=True, slots=True)
class AddTable:
    """Make the table if it is not there, and switch it on, or (`dormant`) off: then no packet sees its chains."""

    table: TableRef
    dormant: bool = False

    def __str__(self) -> str:
        return f"add table {self.table}{' { flags dormant; }' if self.dormant else ''}"


@dataclass(frozen=True, slots=True)
class DelTable:
    """Remove a table with all it holds."""

    table: TableRef

    def __str__(self) -> str:
        return f"delete table {self.table}"


@dataclass(frozen=True, slots=True)
class AddChain:
    table: TableRef
    chain: Chain

    def __str__(self) -> str:
        base = self.chain.base
        hook = f" {{ type {base.kind} hook {base.hook.name.lower()} priority {base.priority}; }}" if base else ""
        return f"add chain {self.table} {self.chain.name}{hook}"


@dataclass(frozen=True, slots=True)
class SetRules:
    """Make `rules` the content of a chain, whatever it held."""

    table: TableRef
    chain: str
    rules: tuple[Rule, ...]

    def __str__(self) -> str:
        lines = [f"flush chain {self.table} {self.chain}", *(f"add rule {self.table} {self.chain} {r}" for r in self.rules)]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class DelChain:
    """Remove a chain with its rules; nothing may jump to it."""

    table: TableRef
    name: str

    def __str__(self) -> str:
        return f"delete chain {self.table} {self.name}"


@dataclass(frozen=True, slots=True)
class AddSet:
    table: TableRef
    set: NftSet

    def __str__(self) -> str:
        kind = "map" if self.set.is_map else "set"
        return f"add {kind} {self.table} {self.set.name}"


@dataclass(frozen=True, slots=True)
class DelSet:
    table: TableRef
    name: str

    def __str__(self) -> str:
        return f"delete set {self.table} {self.name}"


@dataclass(frozen=True, slots=True)
class AddElements:
    """Add elements. One that is there with the same data is left as it is; with other data it is a conflict.

    `comments`: what nft shows beside some of them, by key; for humans, no part of the value."""

    table: TableRef
    set: NftSet
    elements: tuple[Element, ...]
    comments: Mapping[bytes, str] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        return _elements_text("add", self.table, self.set, self.elements)


@dataclass(frozen=True, slots=True)
class DelElements:
    """Remove elements; each must be there."""

    table: TableRef
    set: NftSet
    elements: tuple[Element, ...]

    def __str__(self) -> str:
        return _elements_text("delete", self.table, self.set, self.elements)


@dataclass(frozen=True, slots=True)
class ReplaceElements:
    """Give keys that are there other data, within one transaction (their counters start anew). Pairs are never split."""

    table: TableRef
    set: NftSet
    elements: tuple[Element, ...]
    comments: Mapping[bytes, str] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        return _elements_text("replace", self.table, self.set, self.elements)


@dataclass(frozen=True, slots=True)
class Prune:
    """Delete from a dynamic set what packets left there and is no longer wanted.

    `keep`: part of the key, found at byte `offset` → the data that may stay under it; in a set, what follows in the key.
    Elements under any other part stay, unless `others` is set. Carried out after the transaction: what is added meanwhile is
    made by the new rules. It looks at every element."""

    table: TableRef
    set: NftSet
    offset: int
    keep: Mapping[bytes, Collection[bytes]]
    others: bool = False

    def unwanted(self, key: bytes, data: Data, length: int) -> bool:
        """Whether an element goes; `length` is that of the part."""
        end = self.offset + length
        kept = self.keep.get(key[self.offset : end])
        return self.others if kept is None else (key[end:] if data is None else data) not in kept

    @property
    def part_length(self) -> int:
        return len(next(iter(self.keep), b""))

    def __str__(self) -> str:
        kind = "map" if self.set.is_map else "set"
        return f"prune {kind} {self.table} {self.set.name} ({len(self.keep)} keys{' and all others' if self.others else ''})"


@dataclass(frozen=True, slots=True)
class Sweep:
    """Delete those of `keys` that packets left in a dynamic set. Carried out after the transaction; looks at no other."""

    table: TableRef
    set: NftSet
    keys: tuple[bytes, ...]

    def __str__(self) -> str:
        return f"sweep set {self.table} {self.set.name} ({len(self.keys)} keys)"


Afterwards = Prune | Sweep
"""What is carried out after the transaction."""

Command = (
    AddTable | DelTable | AddChain | SetRules | DelChain | AddSet | DelSet | AddElements | DelElements | ReplaceElements
    | Afterwards
)  # fmt: skip

_SHOWN = 5


def _elements_text(verb: str, table: TableRef, of: NftSet, elements: tuple[Element, ...]) -> str:
    shown = ", ".join(of.element_text(e) for e in elements[:_SHOWN])
    more = f", … ({len(elements)} in all)" if len(elements) > _SHOWN else ""
    return f"{verb} element {table} {of.name} {{ {shown}{more} }}"


@dataclass(frozen=True, slots=True)
class Batch:
    """One nftables transaction: commands in an order in which each cut is safe, should the kernel's buffer demand one."""

    commands: tuple[Command, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.commands)

    def __str__(self) -> str:
        return "\n".join(str(c) for c in self.commands)

    def __add__(self, other: "Batch") -> "Batch":
        return Batch(self.commands + other.commands)


# --- state --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ChainState:
    chain: Chain
    rules: tuple[Rule, ...] = ()


@dataclass(frozen=True, slots=True)
class SetState:
    """A set and its elements. Those of a dynamic set are what packets left there: no configuration, and not listed."""

    set: NftSet
    elements: Mapping[bytes, Data] = field(default_factory=dict)
    comments: Mapping[bytes, str] = field(default_factory=dict, compare=False)
    """As in `AddElements`; only of a planned set."""


@dataclass(frozen=True, slots=True)
class TableState:
    """`dormant`: no packet sees it."""

    chains: Mapping[str, ChainState] = field(default_factory=dict)
    sets: Mapping[str, SetState] = field(default_factory=dict)
    dormant: bool = False


@dataclass(frozen=True, slots=True)
class Ruleset:
    """Tables with all they hold, as planned or as read back."""

    tables: Mapping[TableRef, TableState] = field(default_factory=dict)

    def only(self, name: str) -> "Ruleset":
        """The tables of that name, of both families."""
        return Ruleset({ref: t for ref, t in self.tables.items() if ref.name == name})

    def apply(self, batch: Batch) -> "Ruleset":
        """The ruleset after `batch`. Raises NftConflict where the kernel would refuse; nothing is changed then."""
        tables = _Draft(self.tables)
        for command in batch.commands:
            tables.run(command)
        return Ruleset(tables.done())


class _Draft:
    """A ruleset being changed; what a command touches is copied once, the rest is shared with the original."""

    def __init__(self, tables: Mapping[TableRef, TableState]) -> None:
        self._tables = dict(tables)
        self._chains: dict[TableRef, dict[str, ChainState]] = {}
        self._sets: dict[TableRef, dict[str, SetState]] = {}
        self._elements: dict[tuple[TableRef, str], dict[bytes, Data]] = {}

    def done(self) -> dict[TableRef, TableState]:
        for (ref, name), elements in self._elements.items():
            if ref in self._tables and name in self._set_book(ref):
                self._set_book(ref)[name] = replace(self._set_book(ref)[name], elements=elements)
        for ref, table in list(self._tables.items()):
            chains, sets = self._chains.get(ref, table.chains), self._sets.get(ref, table.sets)
            self._tables[ref] = TableState(chains, sets, table.dormant)
        return self._tables

    def run(self, command: Command) -> None:
        ref = command.table
        if ref not in self._tables and not isinstance(command, AddTable):
            raise NftMissing(f"{command}: there is no table {ref}")
        match command:
            case AddTable():
                self._tables[ref] = replace(self._tables.get(ref, TableState()), dormant=command.dormant)
            case DelTable():
                self._del_table(ref)
            case AddChain(_, chain):
                if self._chain_book(ref).setdefault(chain.name, ChainState(chain)).chain != chain:
                    raise NftConflict(f"{command}: the chain is there with another hook")
            case SetRules(_, name, rules):
                self._chain_book(ref)[name] = ChainState(self._chain(ref, name).chain, rules)
            case DelChain(_, name):
                self._chain(ref, name)
                del self._chain_book(ref)[name]
            case Prune() | Sweep():
                self._set(ref, command.set.name)
            case AddSet(_, of):
                if self._set_book(ref).setdefault(of.name, SetState(of)).set != of:
                    raise NftConflict(f"{command}: the set is there with another type")
            case DelSet(_, name):
                self._set(ref, name)
                self._elements.pop((ref, name), None)
                del self._set_book(ref)[name]
            case AddElements() | DelElements() | ReplaceElements():
                self._run_elements(command)

    def _run_elements(self, command: AddElements | DelElements | ReplaceElements) -> None:
        ref = command.table
        state = self._set(ref, command.set.name)
        book = self._elements.get((ref, command.set.name))
        if book is None:
            book = self._elements[ref, command.set.name] = dict(state.elements)
        for key, data in command.elements:
            match command:
                case AddElements():
                    if isinstance(data, Verdict) and data.chain and data.chain not in self._chain_book(ref):
                        raise NftMissing(f"{command}: there is no chain {data.chain}")
                    if book.setdefault(key, data) != data:
                        raise NftConflict(
                            f"{state.set.element_text((key, data))} in {command.set.name}: is there with other data"
                        )
                case _ if key not in book:
                    raise NftMissing(f"{state.set.element_text((key, data))} in {command.set.name}: no such element")
                case DelElements():
                    del book[key]
                case ReplaceElements():
                    book[key] = data

    def _del_table(self, ref: TableRef) -> None:
        del self._tables[ref]
        self._chains.pop(ref, None)
        self._sets.pop(ref, None)
        for owner in [owner for owner in self._elements if owner[0] == ref]:
            del self._elements[owner]

    def _chain_book(self, ref: TableRef) -> dict[str, ChainState]:
        if ref not in self._chains:
            self._chains[ref] = dict(self._tables[ref].chains)
        return self._chains[ref]

    def _set_book(self, ref: TableRef) -> dict[str, SetState]:
        if ref not in self._sets:
            self._sets[ref] = dict(self._tables[ref].sets)
        return self._sets[ref]

    def _chain(self, ref: TableRef, name: str) -> ChainState:
        try:
            return self._chain_book(ref)[name]
        except KeyError:
            raise NftMissing(f"there is no chain {name} in table {ref}") from None

    def _set(self, ref: TableRef, name: str) -> SetState:
        try:
            return self._set_book(ref)[name]
        except KeyError:
            raise NftMissing(f"there is no set {name} in table {ref}") from None
