"""A connection's first packet, the machine it comes to, and what becomes of it there: what all evaluators of rules share."""

import enum
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

from podwire.model.addr import Family, IPAddress, family_of
from podwire.model.nft import Data

Learned = dict[Hashable, dict[bytes, Data]]
"""Where the kernel keeps it (its evaluator says how that is called) → what packets left there."""


@dataclass(frozen=True, slots=True)
class Packet:
    """What the rules look at. `protocol` is the IP protocol number; ports are 0 where it has none. `iif`: the device that it
    comes in by. `mark`, `priority`: numbers that the kernel keeps beside it."""

    src: IPAddress
    dst: IPAddress
    protocol: int
    sport: int = 0
    dport: int = 0
    mark: int = 0
    iif: str = ""
    priority: int = 0

    @property
    def family(self) -> Family:
        return family_of(self.dst)


class Fate(enum.Enum):
    PASS = "pass"
    DROP = "drop"
    RESET = "tcp reset"
    UNREACHABLE = "port unreachable"


@dataclass(frozen=True, slots=True)
class Machine:
    """What the rules ask the kernel around them.

    `addresses`: this machine's own. `choose(n)`: a number below n, each as likely as the others. `chance(n)`: whether that
    happens which happens once in n times. `learned`: what earlier packets left."""

    addresses: frozenset[IPAddress] = frozenset()
    choose: Callable[[int], int] = field(default=lambda n: 0)
    learned: Mapping[Hashable, Mapping[bytes, Data]] = field(default_factory=dict)
    chance: Callable[[int], bool] = field(default=lambda n: False)


class Stop(enum.Enum):
    """How a rule, or a chain, ended."""

    NEXT_RULE = "the rule did not match, or gave no verdict"
    RETURN = "back to the calling chain"
    ACCEPT = "this chain of the hook lets it pass"
    FINAL = "dropped or refused"

    def for_caller(self, *, goto: bool) -> "Stop":
        """How the rule ended that led to the chain. At the end of a chain that was jumped to, the caller's next rule follows;
        after goto, the caller's caller's."""
        if self in (Stop.ACCEPT, Stop.FINAL):
            return self
        return Stop.RETURN if goto else Stop.NEXT_RULE


@dataclass(frozen=True, slots=True)
class Step:
    """A rule that matched to its end, and where it stands. `rule`: its comment, or all of it where it has none."""

    table: str
    chain: str
    rule: str

    def __str__(self) -> str:
        return f"{self.table} {self.chain}: {self.rule}"


@dataclass(frozen=True, slots=True)
class Result:
    """What became of the packet. `packet` has its destination rewritten where a rule did that; `masquerade`: its source will
    be that of the device it leaves by. `steps`: the rules that matched, in order. `learned`: what it left for later ones."""

    fate: Fate
    packet: Packet
    masquerade: bool = False
    rewritten: bool = False
    steps: tuple[Step, ...] = ()
    learned: Learned = field(default_factory=dict)


Memories = Mapping[Hashable, Mapping[bytes, Data]]
"""As `Learned`, to be read."""


def both(older: Memories, newer: Memories) -> Learned:
    """What was learned earlier and what came to it."""
    return {place: left_at(place, older, newer) for place in {**older, **newer}}


def left_at(place: Hashable, older: Memories, newer: Memories) -> dict[bytes, Data]:
    """The same of one place."""
    return {**older.get(place, {}), **newer.get(place, {})}


def join(before: Result, after: Result) -> Result:
    """One result of a packet's way through two hooks, one after the other."""
    return Result(
        after.fate,
        after.packet,
        before.masquerade or after.masquerade,
        before.rewritten or after.rewritten,
        before.steps + after.steps,
        both(before.learned, after.learned),
    )
