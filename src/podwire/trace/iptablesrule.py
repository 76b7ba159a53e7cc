"""One rule as `iptables-save` spells it → what it asks of a packet, and what it does with it.

Strict: what is not known here is an error that names it, never a match that is passed over. Known is what `plan.iptables_rules`
writes; meanings by iptables(8) and iptables-extensions(8).
"""

import enum
import ipaddress
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from podwire.model.addr import IPAddress


class RuleError(ValueError):
    """The line is no rule, or holds something that is not known here."""


# --- what it asks -------------------------------------------------------------------------------------------------------


class Side(enum.Enum):
    SOURCE = "-s"
    DESTINATION = "-d"


@dataclass(frozen=True, slots=True)
class InNetwork:
    """`mask` may have holes."""

    side: Side
    value: int
    mask: int


@dataclass(frozen=True, slots=True)
class CameBy:
    """`name`: of a device; `prefix`: it is the beginning of names."""

    name: str
    prefix: bool


@dataclass(frozen=True, slots=True)
class IsProtocol:
    number: int


@dataclass(frozen=True, slots=True)
class ToPort:
    port: int


@dataclass(frozen=True, slots=True)
class InState:
    states: frozenset[str]


@dataclass(frozen=True, slots=True)
class HasMark:
    value: int
    mask: int


@dataclass(frozen=True, slots=True)
class FromThisMachine:
    pass


@dataclass(frozen=True, slots=True)
class FromRange:
    first: IPAddress
    last: IPAddress


@dataclass(frozen=True, slots=True)
class OnceIn:
    """By chance, once in so many times."""

    times: int


@dataclass(frozen=True, slots=True)
class Noted:
    """Whether the source is in a list of `recent`."""

    name: str


@dataclass(frozen=True, slots=True)
class Note:
    """Puts the source into a list of `recent`; is always true."""

    name: str


Match = (
    InNetwork | CameBy | IsProtocol | ToPort | InState | HasMark | FromThisMachine | FromRange | OnceIn | Noted | Note
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Not:
    match: Match


# --- what it does -------------------------------------------------------------------------------------------------------


class Ending(enum.Enum):
    ACCEPT = "ACCEPT"
    DROP = "DROP"
    RETURN = "RETURN"


@dataclass(frozen=True, slots=True)
class Enter:
    """`goto`: at its end follows what follows the calling chain, not the next rule."""

    chain: str
    goto: bool


@dataclass(frozen=True, slots=True)
class SetMark:
    """mark = (mark & ~mask) ^ value."""

    value: int
    mask: int


@dataclass(frozen=True, slots=True)
class LeadTo:
    address: IPAddress
    port: int


class Rewrite(enum.Enum):
    MASQUERADE = "MASQUERADE"


class Refuse(enum.Enum):
    RESET = "tcp-reset"
    UNREACHABLE = "icmp-port-unreachable"
    UNREACHABLE6 = "icmp6-port-unreachable"


Target = Ending | Enter | SetMark | LeadTo | Rewrite | Refuse


@dataclass(frozen=True, slots=True)
class ParsedRule:
    """`comment`: for humans; without one, the line."""

    matches: tuple[Match | Not, ...]
    target: Target
    comment: str


# --- reading ------------------------------------------------------------------------------------------------------------

_WORD = re.compile(r'"([^"\\]*)"|([^\s"\\]+)')
_PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132}
_STATES = frozenset(("NEW", "DNAT", "INVALID", "RELATED", "ESTABLISHED"))
_PROBABILITY_BITS = 31


@lru_cache(maxsize=1 << 16)
def parse_rule(line: str) -> ParsedRule:
    """`line`: without `-A <chain>`. Raises RuleError."""
    try:
        return _read(line)
    except RuleError:
        raise
    except ValueError as error:
        raise RuleError(f"{error}, in: {line}") from error


def _read(line: str) -> ParsedRule:
    words = _Words(line)
    matches: list[Match | Not] = []
    comment = ""
    while words:
        inverted = words.take_if("!")
        word = words.take()
        if word in ("-j", "-g") and not inverted:
            target = _target(words, goto=word == "-g")
            if words:
                raise RuleError(f"{words.take()!r} is not known behind a target, in: {line}")
            return ParsedRule(tuple(matches), target, comment or line)
        if word == "-m" and not inverted:
            module = words.take()
            if module == "comment":
                comment = words.value("--comment")
            else:
                if module in _PROTOCOLS and IsProtocol(_PROTOCOLS[module]) not in matches:
                    raise words.unknown(f"module {module} without -p {module} before it")
                matches += _module(words, module)
            continue
        match = _basic(words, word)
        matches.append(Not(match) if inverted else match)
    raise RuleError(f"no target in: {line}")


class _Words:
    """A line's words, taken one after the other."""

    def __init__(self, line: str) -> None:
        self._line, self._words, self._at = line, list(_split(line)), 0

    def __bool__(self) -> bool:
        return self._at < len(self._words)

    def take(self) -> str:
        if not self:
            raise RuleError(f"something is missing at the end of: {self._line}")
        self._at += 1
        return self._words[self._at - 1]

    def take_if(self, word: str) -> bool:
        there = bool(self) and self._words[self._at] == word
        self._at += there
        return there

    def value(self, option: str) -> str:
        """What follows `option`, which must come next."""
        found = self.take()
        if found != option:
            raise RuleError(f"{found!r} stands where only {option} is known, in: {self._line}")
        return self.take()

    def unknown(self, what: str) -> RuleError:
        return RuleError(f"{what} is not known, in: {self._line}")


def _split(line: str) -> Iterator[str]:
    at = 0
    while at < len(line):
        found = _WORD.match(line, at)
        if found is None:
            raise RuleError(f"cannot be read from {line[at:]!r} on: {line}")
        yield found[1] if found[1] is not None else found[2]
        at = found.end()
        if at < len(line) and line[at] != " ":
            raise RuleError(f"cannot be read from {line[at:]!r} on: {line}")
        at += 1


def _basic(words: _Words, word: str) -> Match:
    match word:
        case "-s" | "-d":
            return _network(Side(word), words.take())
        case "-i":
            name = words.take()
            return CameBy(name.removesuffix("+"), name.endswith("+"))
        case "-p":
            name = words.take()
            if name not in _PROTOCOLS:
                raise words.unknown(f"protocol {name}")
            return IsProtocol(_PROTOCOLS[name])
    raise words.unknown(word)


def _network(side: Side, text: str) -> InNetwork:
    address, _, mask = text.partition("/")
    value = ipaddress.ip_address(address)
    bits = value.max_prefixlen
    if mask.isdigit():
        return InNetwork(side, int(value), ((1 << int(mask)) - 1) << (bits - int(mask)))
    return InNetwork(side, int(value), int(ipaddress.ip_address(mask)) if mask else (1 << bits) - 1)


def _module(words: _Words, module: str) -> Iterator[Match]:
    if module not in _MODULES:
        raise words.unknown(f"module {module}")
    yield from _MODULES[module](words)


def _port(words: _Words) -> Iterator[Match]:
    yield ToPort(int(words.value("--dport")))


def _state(words: _Words) -> Iterator[Match]:
    states = frozenset(words.value("--ctstate").split(","))
    if not states <= _STATES:
        raise words.unknown(f"--ctstate {','.join(sorted(states - _STATES))}")
    yield InState(states)


def _mark(words: _Words) -> Iterator[Match]:
    yield HasMark(*_masked(words.value("--mark")))


def _masked(text: str) -> tuple[int, int]:
    value, _, mask = text.partition("/")
    return int(value, 0), int(mask, 0) if mask else 0xFFFFFFFF


def _source_type(words: _Words) -> Iterator[Match]:
    if (kind := words.value("--src-type")) != "LOCAL":
        raise words.unknown(f"--src-type {kind}")
    yield FromThisMachine()


def _range(words: _Words) -> Iterator[Match]:
    first, _, last = words.value("--src-range").partition("-")
    yield FromRange(ipaddress.ip_address(first), ipaddress.ip_address(last))


def _statistic(words: _Words) -> Iterator[Match]:
    if (mode := words.value("--mode")) != "random":
        raise words.unknown(f"--mode {mode}")
    probability = float(words.value("--probability"))
    times = round(1 / probability) if probability else 0
    # The kernel compares 31 random bits; the text has eleven digits of that.
    if not times or round(probability * (1 << _PROBABILITY_BITS)) != round((1 << _PROBABILITY_BITS) / times):
        raise words.unknown(f"--probability {probability}, which is not one in a whole number,")
    yield OnceIn(times)


def _recent(words: _Words) -> Iterator[Match]:
    """`--seconds` and `--reap` are about time, which stands still here."""
    make: Callable[[str], Match] = Note if words.take_if("--set") else Noted
    if make is Noted:
        if not words.take_if("--rcheck"):
            raise words.unknown(f"recent {words.take()}")
        words.value("--seconds")
        words.take_if("--reap")
    name, mask = words.value("--name"), words.value("--mask")
    if int(ipaddress.ip_address(mask)) + 1 not in (1 << 32, 1 << 128):
        raise words.unknown(f"--mask {mask}")
    if not words.take_if("--rsource"):
        raise words.unknown(f"recent {words.take()}")
    yield make(name)


_MODULES: dict[str, Callable[[_Words], Iterator[Match]]] = {
    **dict.fromkeys(_PROTOCOLS, _port),
    "conntrack": _state,
    "mark": _mark,
    "addrtype": _source_type,
    "iprange": _range,
    "statistic": _statistic,
    "recent": _recent,
}


def _target(words: _Words, *, goto: bool) -> Target:
    name = words.take()
    if goto:
        return Enter(name, goto=True)
    match name:
        case "ACCEPT" | "DROP" | "RETURN":
            return Ending(name)
        case "MARK":
            return SetMark(*_masked(words.value("--set-xmark")))
        case "DNAT":
            address, _, port = words.value("--to-destination").rpartition(":")
            return LeadTo(ipaddress.ip_address(address.strip("[]")), int(port))
        case "MASQUERADE":
            words.take_if("--random-fully")
            return Rewrite.MASQUERADE
        case "REJECT":
            return Refuse(words.value("--reject-with"))
    return Enter(name, goto=False)
