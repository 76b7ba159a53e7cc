"""What iptables would do: a pure evaluator of a family's chains for one connection's first packet, hook by hook, in the order
in which the kernel asks its tables. The same for both flavours: they differ in where rules are kept, not in what they mean.

Where the kernel draws a number, or asks for an address' type or a list of `recent`, the answer comes from `Machine`. What no
rule of ours decides passes: what else is in the kernel's own chains is not known.
"""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import replace

from podwire.model.addr import Family
from podwire.model.nft import Hook
from podwire.plan.iptables import Chains
from podwire.plan.iptables_rules import FILTER, NAT
from podwire.trace.iptablesrule import (
    CameBy,
    Ending,
    Enter,
    FromRange,
    FromThisMachine,
    HasMark,
    InNetwork,
    InState,
    IsProtocol,
    LeadTo,
    Match,
    Not,
    Note,
    Noted,
    OnceIn,
    Refuse,
    Rewrite,
    SetMark,
    Side,
    Target,
    ToPort,
    parse_rule,
)
from podwire.trace.journey import Fate, Learned, Machine, Packet, Result, Step, Stop, both, join, left_at

_SENT = ((NAT, Hook.OUTPUT), (FILTER, Hook.OUTPUT), (NAT, Hook.POSTROUTING))
_CAME = ((NAT, Hook.PREROUTING),)
_DELIVERED = ((FILTER, Hook.INPUT), (NAT, Hook.INPUT))
_FORWARDED = ((FILTER, Hook.FORWARD), (NAT, Hook.POSTROUTING))
_LOOPED = ((FILTER, Hook.INPUT),)
"""Tables and hooks in the kernel's order (NF_IP_PRI_NAT_DST, _FILTER, _NAT_SRC). A connection is translated once: a nat table
that it comes to after it went out is not asked."""

_LOOPBACK = "lo"


def follow(tables: Mapping[Family, Chains], packet: Packet, machine: Machine, *, locally_made: bool = False) -> Result:
    """A connection's first packet through all hooks: PREROUTING (or OUTPUT if a process here sends it), then INPUT, or FORWARD
    and POSTROUTING. What a process sends to this machine goes out and comes in by `lo`."""
    chains = tables.get(packet.family, Chains())
    result = _pass(chains, _SENT if locally_made else _CAME, machine, Result(Fate.PASS, packet))
    if result.packet.dst not in machine.addresses:
        return result if locally_made else _pass(chains, _FORWARDED, machine, result)
    if locally_made:
        return _pass(chains, _LOOPED, machine, replace(result, packet=replace(result.packet, iif=_LOOPBACK)))
    return _pass(chains, _DELIVERED, machine, result)


def _pass(chains: Chains, way: Iterable[tuple[str, Hook]], machine: Machine, before: Result) -> Result:
    for table, hook in way:
        if before.fate is not Fate.PASS:
            break
        run = _Run(chains, table, hook, replace(machine, learned=both(machine.learned, before.learned)), before)
        run.lines(hook.name, chains.jumps.get((table, hook.name), ()))
        before = join(before, Result(run.fate, run.packet, run.masquerade, run.rewritten, tuple(run.steps), run.learned))
    return before


class _Run:
    """One packet in one table at one hook."""

    def __init__(self, chains: Chains, table: str, hook: Hook, machine: Machine, before: Result) -> None:
        self._chains, self._table, self._hook, self._machine = chains, table, hook, machine
        self.packet, self.rewritten = before.packet, before.rewritten
        self.fate, self.masquerade = Fate.PASS, False
        self.steps: list[Step] = []
        self.learned: Learned = {}
        self._within: list[str] = []

    def lines(self, chain: str, lines: tuple[str, ...]) -> Stop:
        """Walk a chain. NEXT_RULE: it ended without a verdict."""
        for line in lines:
            rule = parse_rule(line)
            if all(self._matches(match) for match in rule.matches):
                self.steps.append(Step(self._table, chain, rule.comment))
                stop = self._carry_out(rule.target)
                if stop is not Stop.NEXT_RULE:
                    return stop
        return Stop.NEXT_RULE

    # --- matches ------------------------------------------------------------------------------------------------------

    def _matches(self, match: Match | Not) -> bool:
        packet, machine = self.packet, self._machine
        match match:
            case Not(inner):
                return not self._matches(inner)
            case InNetwork(side, value, mask):
                return int(packet.src if side is Side.SOURCE else packet.dst) & mask == value & mask
            case CameBy(name, prefix):
                return packet.iif.startswith(name) if prefix else packet.iif == name
            case IsProtocol(number):
                return packet.protocol == number
            case ToPort(port):
                return packet.dport == port
            case InState(states):
                return "NEW" in states or (self.rewritten and "DNAT" in states)
            case HasMark(value, mask):
                return packet.mark & mask == value
            case FromThisMachine():
                return packet.src in machine.addresses
            case FromRange(first, last):
                return int(first) <= int(packet.src) <= int(last)
            case OnceIn(times):
                return machine.chance(times)
            case Noted(name):
                place = _list(name)
                return packet.src.packed in left_at(place, machine.learned, self.learned)
            case Note(name):
                self.learned.setdefault(_list(name), {})[packet.src.packed] = b""
                return True

    # --- targets ------------------------------------------------------------------------------------------------------

    def _carry_out(self, target: Target) -> Stop:
        match target:
            case Ending.ACCEPT:
                return Stop.ACCEPT
            case Ending.RETURN:
                return Stop.RETURN
            case Enter():
                return self._enter(target)
            case SetMark(value, mask):
                self.packet = replace(self.packet, mark=(self.packet.mark & ~mask) ^ value)
                return Stop.NEXT_RULE
            case LeadTo() | Rewrite():
                return self._translate(target)
            case Ending.DROP | Refuse():
                return self._end(target)

    def _enter(self, target: Enter) -> Stop:
        lines = self._chains.rules.get((self._table, target.chain))
        if lines is None:
            raise ValueError(f"a rule leads to {target.chain}, which is not in table {self._table}")
        if target.chain in self._within:
            raise ValueError(f"rules lead in a circle: {' '.join((*self._within, target.chain))}")
        self._within.append(target.chain)
        stop = self.lines(target.chain, lines)
        self._within.pop()
        return stop.for_caller(goto=target.goto)

    def _translate(self, target: LeadTo | Rewrite) -> Stop:
        hooks = (Hook.PREROUTING, Hook.OUTPUT) if isinstance(target, LeadTo) else (Hook.POSTROUTING,)
        if self._table != NAT or self._hook not in hooks:
            raise ValueError(f"table {self._table} cannot do that at {self._hook.name}: {target}")
        if isinstance(target, LeadTo):
            self.packet = replace(self.packet, dst=target.address, dport=target.port)
            self.rewritten = True
        else:
            self.masquerade = True
        return Stop.ACCEPT

    def _end(self, target: Ending | Refuse) -> Stop:
        if self._table != FILTER:
            raise ValueError(f"table {self._table} is not for filtering: {target}")
        if target is Ending.DROP:
            self.fate = Fate.DROP
        else:
            self.fate = Fate.RESET if target is Refuse.RESET else Fate.UNREACHABLE
        return Stop.FINAL


def _list(name: str) -> tuple[str, str]:
    return "recent", name


def lists_of_clients(chains: Chains) -> frozenset[Hashable]:
    """The lists of `recent` that rules name, as the places where packets leave something."""
    rules = (parse_rule(line) for lines in chains.rules.values() for line in lines)
    return frozenset(_list(m.name) for rule in rules for m in rule.matches if isinstance(m, Note | Noted))
