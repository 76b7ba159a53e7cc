"""What netfilter would do: a pure evaluator of a `Ruleset` for one connection's first packet, hook by hook.

It executes the same expressions over the same registers as the kernel. Where the kernel draws a number or asks its routing
table, the answer comes from `Machine`. Used by tests ("this packet goes to one of these endpoints, masqueraded"), by the fake
kernel, and by whoever wants to say why a packet does not arrive.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace

from podwire.model.addr import Family
from podwire.model.nft import ChainState, Data, Hook, Rule, Ruleset, SetState, TableRef, TableState
from podwire.model.nftexpr import (
    IFNAMSIZ,
    IPS_DST_NAT,
    REGISTERS,
    RTN_LOCAL,
    RTN_UNICAST,
    Bitwise,
    Cmp,
    CmpOp,
    Constant,
    Counter,
    Ct,
    CtKey,
    Dnat,
    Dynset,
    DynsetOp,
    Expression,
    FibSaddrType,
    Immediate,
    Lookup,
    Masquerade,
    Meta,
    MetaKey,
    Numgen,
    Payload,
    PayloadBase,
    Reject,
    SetMeta,
    Unknown,
    Verdict,
    VerdictCode,
)
from podwire.trace.journey import Fate, Learned, Machine, Packet, Result, Step, Stop, both, join, left_at

_MAX_JUMPS = 16
"""NFT_JUMP_STACK_SIZE: the kernel refuses rules that can jump deeper."""


def follow(ruleset: Ruleset, packet: Packet, machine: Machine, *, locally_made: bool = False) -> Result:
    """A connection's first packet through all hooks: PREROUTING (or OUTPUT if a process here sends it), then INPUT, or FORWARD
    and POSTROUTING."""
    result = run_hook(ruleset, Hook.OUTPUT if locally_made else Hook.PREROUTING, packet, machine)
    here = result.packet.dst in machine.addresses
    rest = (Hook.POSTROUTING,) if locally_made else (Hook.INPUT,) if here else (Hook.FORWARD, Hook.POSTROUTING)
    for hook in rest:
        if result.fate is not Fate.PASS:
            break
        if hook is Hook.FORWARD and packet.family is Family.IPV4:
            # ip_forward() sets it by the type of service, which is none here.
            result = replace(result, packet=replace(result.packet, priority=0))
        knows = replace(machine, learned=both(machine.learned, result.learned))
        after = run_hook(ruleset, hook, result.packet, knows, original=packet, rewritten=result.rewritten)
        result = join(result, after)
    return result


def run_hook(
    ruleset: Ruleset,
    hook: Hook,
    packet: Packet,
    machine: Machine,
    *,
    original: Packet | None = None,
    rewritten: bool = False,
) -> Result:
    """One hook's base chains in order of priority. `original`: the packet as it was sent, if it is no longer (default: it is);
    `rewritten`: its destination is."""
    run = _Run(machine, packet, original or packet, rewritten)
    for ref, table, base in _base_chains(ruleset, hook, packet.family):
        if base.chain.base is not None and base.chain.base.kind == "nat" and run.nat_done:
            continue
        run.table_ref, run.table = ref, table
        stop = run.chain(base)
        if stop in (Stop.NEXT_RULE, Stop.RETURN) and base.chain.base is not None and base.chain.base.drops:
            run.fate, stop = Fate.DROP, Stop.FINAL
        if stop is Stop.FINAL:
            break
    return Result(run.fate, run.packet, run.masquerade, run.rewritten, tuple(run.steps), run.learned)


def _base_chains(ruleset: Ruleset, hook: Hook, family: Family) -> Iterator[tuple[TableRef, TableState, ChainState]]:
    found = [
        (state.chain.base.priority, ref, table, state)
        for ref, table in ruleset.tables.items()
        if ref.family is family and not table.dormant
        for state in table.chains.values()
        if state.chain.base is not None and state.chain.base.hook is hook
    ]
    for _, ref, table, state in sorted(found, key=lambda f: f[0]):
        yield ref, table, state


class _Run:
    """One packet at one hook."""

    def __init__(self, machine: Machine, packet: Packet, original: Packet, rewritten: bool) -> None:
        self.machine, self.packet, self.original, self.rewritten = machine, packet, original, rewritten
        self.table_ref, self.table = TableRef(packet.family, ""), TableState()
        self.fate, self.masquerade, self.nat_done = Fate.PASS, False, False
        self.steps: list[Step] = []
        self.learned: Learned = {}
        self._registers = bytearray(4 * REGISTERS)
        self._depth = 0

    def chain(self, state: ChainState) -> Stop:
        """Walk a chain. NEXT_RULE: it ended without a verdict."""
        for rule in state.rules:
            stop = self._rule(state.chain.name, rule)
            if stop is not Stop.NEXT_RULE:
                return stop
        return Stop.NEXT_RULE

    def _rule(self, chain: str, rule: Rule) -> Stop:
        for expression in rule.expressions:
            answer = self._evaluate(expression)
            if answer is False:
                return Stop.NEXT_RULE
            if answer is not True:
                self.steps.append(Step(str(self.table_ref), chain, rule.comment or str(rule)))
                return self._verdict(answer) if isinstance(answer, Verdict) else answer
        self.steps.append(Step(str(self.table_ref), chain, rule.comment or str(rule)))
        return Stop.NEXT_RULE

    def _verdict(self, verdict: Verdict) -> Stop:
        match verdict.code:
            case VerdictCode.ACCEPT:
                return Stop.ACCEPT
            case VerdictCode.DROP:
                self.fate = Fate.DROP
                return Stop.FINAL
            case VerdictCode.RETURN:
                return Stop.RETURN
            case VerdictCode.CONTINUE:
                return Stop.NEXT_RULE
            case VerdictCode.JUMP | VerdictCode.GOTO:
                return self._enter(verdict)

    def _enter(self, verdict: Verdict) -> Stop:
        self._depth += 1
        if self._depth > _MAX_JUMPS:
            raise ValueError(f"rules jump deeper than {_MAX_JUMPS} chains, to {verdict.chain}")
        stop = self.chain(self.table.chains[verdict.chain])
        self._depth -= 1
        return stop.for_caller(goto=verdict.code is VerdictCode.GOTO)

    def _evaluate(self, e: Expression) -> bool | Verdict | Stop:
        """True: go on; False: the rule does not match; else its verdict, or how it ended."""
        match e:
            case Payload() | Meta() | Ct() | Numgen() | FibSaddrType():
                return self._store(e.dreg, self._load(e))
            case Constant(data, dreg):
                return self._store(dreg, data)
            case SetMeta(key, sreg):
                return self._set_meta(key, int.from_bytes(self._read(sreg, 4), sys.byteorder))
            case Cmp(op, sreg, data):
                return (self._read(sreg, len(data)) == data) is (op is CmpOp.EQ)
            case Bitwise(sreg, dreg, mask, xor):
                value = self._read(sreg, len(mask))
                return self._store(dreg, bytes((v & m) ^ x for v, m, x in zip(value, mask, xor, strict=True)))
            case Lookup():
                return self._lookup(e)
            case Dynset():
                return self._dynset(e)
            case Counter():
                return True
            case Immediate(verdict):
                return verdict
            case Dnat() | Masquerade() | Reject():
                return self._act(e)
            case Unknown(name):
                raise ValueError(f"an {name} expression cannot be evaluated")

    def _set_meta(self, key: MetaKey, value: int) -> bool:
        match key:
            case MetaKey.PRIORITY:
                self.packet = replace(self.packet, priority=value)
            case MetaKey.MARK:
                self.packet = replace(self.packet, mark=value)
            case MetaKey.IIFNAME | MetaKey.L4PROTO:
                raise ValueError(f"no rule can set meta {key.name.lower()}")
        return True

    def _act(self, e: Dnat | Masquerade | Reject) -> Stop:
        match e:
            case Dnat(_, address, port):
                length = self.packet.family.bits // 8
                dst = type(self.packet.dst)(self._read(address, length))
                self.packet = replace(self.packet, dst=dst, dport=int.from_bytes(self._read(port, 2), "big"))
                self.rewritten = self.nat_done = True
                return Stop.ACCEPT
            case Masquerade():
                self.masquerade = self.nat_done = True
                return Stop.ACCEPT
            case Reject(tcp_reset, _):
                self.fate = Fate.RESET if tcp_reset else Fate.UNREACHABLE
                return Stop.FINAL

    # --- registers ------------------------------------------------------------------------------------------------

    def _store(self, register: int, value: bytes | None) -> bool:
        if value is None:
            return False
        padded = value + bytes(-len(value) % 4)
        self._registers[4 * register : 4 * register + len(padded)] = padded
        return True

    def _read(self, register: int, length: int) -> bytes:
        return bytes(self._registers[4 * register : 4 * register + length])

    def _load(self, e: Payload | Meta | Ct | Numgen | FibSaddrType) -> bytes | None:
        match e:
            case Payload():
                return self._payload(e)
            case Meta(MetaKey.L4PROTO, _):
                return bytes((self.packet.protocol,))
            case Meta(MetaKey.IIFNAME, _):
                return self.packet.iif.encode().ljust(IFNAMSIZ, b"\0")
            case Meta(MetaKey.MARK, _):
                return self.packet.mark.to_bytes(4, sys.byteorder)
            case Meta(MetaKey.PRIORITY, _):
                return self.packet.priority.to_bytes(4, sys.byteorder)
            case Ct(key, _, _):
                return self._conntrack(key)
            case Numgen(_, modulus):
                return self.machine.choose(modulus).to_bytes(4, sys.byteorder)
            case FibSaddrType():
                kind = RTN_LOCAL if self.packet.src in self.machine.addresses else RTN_UNICAST
                return kind.to_bytes(4, sys.byteorder)
        raise ValueError(f"{e} cannot be evaluated")

    def _payload(self, e: Payload) -> bytes | None:
        if e.base is PayloadBase.NETWORK:
            header = _network_header(self.packet)
        elif e.base is PayloadBase.TRANSPORT:
            header = self.packet.sport.to_bytes(2, "big") + self.packet.dport.to_bytes(2, "big")
        else:
            return None
        part = header[e.offset : e.offset + e.length]
        return part if len(part) == e.length else None

    def _conntrack(self, key: CtKey) -> bytes:
        match key:
            case CtKey.STATUS:
                return (IPS_DST_NAT if self.rewritten else 0).to_bytes(4, sys.byteorder)
            case CtKey.PROTO_DST:
                return self.original.dport.to_bytes(2, "big")
            case CtKey.SRC_IP | CtKey.SRC_IP6:
                return self.original.src.packed
            case CtKey.DST_IP | CtKey.DST_IP6:
                return self.original.dst.packed

    # --- sets -----------------------------------------------------------------------------------------------------

    def _lookup(self, e: Lookup) -> bool | Verdict:
        state = self.table.sets[e.set]
        key = self._read(e.sreg, state.set.key_length)
        found, data = self._find(state, key)
        if found is e.inverted:
            return False
        if e.verdict:
            return data if isinstance(data, Verdict) else False
        if e.dreg is not None and isinstance(data, bytes):
            return self._store(e.dreg, data)
        return True

    def _find(self, state: SetState, key: bytes) -> tuple[bool, Data]:
        if state.set.interval:
            return any(_within(state, pair, key) for pair in state.elements), None
        elements: Mapping[bytes, Data] = state.elements
        if state.set.dynamic:
            place = (self.table_ref, state.set.name)
            elements = left_at(place, self.machine.learned, self.learned)
        return key in elements, elements.get(key)

    def _dynset(self, e: Dynset) -> bool:
        of = self.table.sets[e.set].set
        key = self._read(e.sreg_key, of.key_length)
        data = self._read(e.sreg_data, sum(f.padded for f in of.data)) if e.sreg_data is not None else None
        place = (self.table_ref, of.name)
        known = left_at(place, self.machine.learned, self.learned)
        if e.op is not DynsetOp.DELETE and key not in known:
            self.learned.setdefault(place, {})[key] = data
        return True


def _network_header(packet: Packet) -> bytes:
    """As far as rules read it: IPv4's addresses are at 12 and 16, IPv6's at 8 and 24."""
    if packet.family is Family.IPV4:
        return bytes(9) + bytes((packet.protocol,)) + bytes(2) + packet.src.packed + packet.dst.packed
    return bytes(6) + bytes((packet.protocol,)) + bytes(1) + packet.src.packed + packet.dst.packed


def _within(state: SetState, pair: bytes, key: bytes) -> bool:
    """Whether every field of `key` lies in its range."""
    at, length = 0, state.set.key_length
    for f in state.set.key:
        end = at + f.padded
        if not pair[at:end] <= key[at:end] <= pair[length + at : length + end]:
            return False
        at = end
    return True
