"""The evaluator: chains, verdicts, several tables, sets that packets write to."""

import ipaddress
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from podwire.model.addr import Family
from podwire.model.ids import ObjectKey
from podwire.model.nft import (
    AddChain,
    AddElements,
    AddSet,
    AddTable,
    BaseHook,
    Batch,
    Chain,
    Command,
    FieldType,
    Hook,
    NftSet,
    Rule,
    Ruleset,
    SetRules,
    TableRef,
)
from podwire.model.nftexpr import (
    ACCEPT,
    DROP,
    REGISTERS,
    RETURN,
    Cmp,
    CmpOp,
    Constant,
    Dnat,
    Immediate,
    Lookup,
    Meta,
    MetaKey,
    Payload,
    PayloadBase,
    Reject,
    SetMeta,
    Unknown,
    goto,
    jump,
)
from podwire.model.objects import EndpointSlice, Service
from podwire.model.servicetable import NodeFacts
from podwire.plan.services import ServicePlanner
from podwire.trace.journey import Fate, Machine, Packet
from podwire.trace.netfilter import follow, run_hook

TABLE = TableRef(Family.IPV4, "t")
PACKET = Packet(ipaddress.ip_address("192.0.2.1"), ipaddress.ip_address("192.0.2.2"), 6, 1000, 80)
PRE = BaseHook("filter", Hook.PREROUTING, 0)


def rules(**chains: tuple[Rule, ...]) -> Ruleset:
    """A table with a base chain `base` at PREROUTING and regular ones."""
    commands: list[Command] = [AddTable(TABLE)]
    commands += [AddChain(TABLE, Chain(name, PRE if name == "base" else None)) for name in chains]
    commands += [SetRules(TABLE, name, found) for name, found in chains.items()]
    return Ruleset().apply(Batch(tuple(commands)))


def verdict(v: Any, comment: str = "") -> Rule:
    return Rule((Immediate(v),), comment)


def is_tcp() -> tuple[Meta, Cmp]:
    return Meta(MetaKey.L4PROTO, 0), Cmp(CmpOp.EQ, 0, b"\6")


def walked(ruleset: Ruleset, packet: Packet = PACKET) -> tuple[Fate, list[str]]:
    result = run_hook(ruleset, Hook.PREROUTING, packet, Machine())
    return result.fate, [step.rule for step in result.steps]


def test_jump_comes_back_and_goto_does_not() -> None:
    jumped = rules(base=(verdict(jump("x"), "a"), verdict(DROP, "b")), x=(Rule((), "c"),))
    assert walked(jumped) == (Fate.DROP, ["a", "c", "b"])
    gone = rules(base=(verdict(goto("x"), "a"), verdict(DROP, "b")), x=(Rule((), "c"),))
    assert walked(gone) == (Fate.PASS, ["a", "c"])


def test_return_ends_a_chain_and_accept_a_base_chain() -> None:
    returned = rules(base=(verdict(jump("x"), "a"), verdict(DROP, "b")), x=(verdict(RETURN, "c"), verdict(ACCEPT, "d")))
    assert walked(returned) == (Fate.DROP, ["a", "c", "b"])
    accepted = rules(base=(verdict(jump("x"), "a"), verdict(DROP, "b")), x=(verdict(ACCEPT, "c"),))
    assert walked(accepted) == (Fate.PASS, ["a", "c"])


def test_return_from_a_chain_gone_to_goes_to_the_callers_caller() -> None:
    ruleset = rules(
        base=(verdict(jump("x"), "a"), verdict(DROP, "end")),
        x=(verdict(goto("y"), "b"), verdict(ACCEPT, "never")),
        y=(verdict(RETURN, "c"),),
    )
    assert walked(ruleset) == (Fate.DROP, ["a", "b", "c", "end"])


def test_a_rule_that_does_not_match_ends_there() -> None:
    ruleset = rules(base=(Rule((*is_tcp(), Immediate(DROP)), "tcp"),))
    assert walked(ruleset)[0] is Fate.DROP
    udp = Packet(PACKET.src, PACKET.dst, 17, 1, 2)
    assert walked(ruleset, udp) == (Fate.PASS, [])


def test_one_tables_accept_does_not_undo_anothers_drop() -> None:
    other = TableRef(Family.IPV4, "other")
    ruleset = rules(base=(verdict(ACCEPT),)).apply(
        Batch(
            (
                AddTable(other),
                AddChain(other, Chain("late", BaseHook("filter", Hook.PREROUTING, 10))),
                SetRules(other, "late", (verdict(DROP),)),
            )
        )
    )
    assert walked(ruleset)[0] is Fate.DROP


def test_a_base_chains_policy_is_for_those_without_a_verdict() -> None:
    drops = Chain("base", BaseHook("filter", Hook.PREROUTING, 0, drops=True))
    empty = Ruleset().apply(Batch((AddTable(TABLE), AddChain(TABLE, drops))))
    assert walked(empty)[0] is Fate.DROP
    assert walked(empty.apply(Batch((SetRules(TABLE, "base", (verdict(RETURN),)),))))[0] is Fate.DROP
    assert walked(empty.apply(Batch((SetRules(TABLE, "base", (verdict(ACCEPT),)),))))[0] is Fate.PASS


def test_a_table_that_is_switched_off_is_not_run() -> None:
    ruleset = rules(base=(verdict(DROP),)).apply(Batch((AddTable(TABLE, dormant=True),)))
    assert walked(ruleset)[0] is Fate.PASS


def test_rules_of_the_other_family_are_not_run() -> None:
    packet = Packet(ipaddress.ip_address("2001:db8::1"), ipaddress.ip_address("2001:db8::2"), 6, 1, 2)
    assert walked(rules(base=(verdict(DROP),)), packet)[0] is Fate.PASS


def test_the_first_table_that_rewrites_wins() -> None:
    to = NftSet("to", (FieldType.PORT,), data=(FieldType.IPV4, FieldType.PORT))
    rewrite = Rule((Payload(PayloadBase.TRANSPORT, 2, 2, 0), Lookup("to", 0, dreg=0), Dnat(False, 0, 1)))
    ruleset = Ruleset()
    for name, priority, last in (("first", -100, 7), ("second", -99, 8)):
        table = TableRef(Family.IPV4, name)
        target = bytes((10, 0, 0, last, 31, 144, 0, 0))
        commands = (
            AddTable(table),
            AddSet(table, to),
            AddChain(table, Chain("nat", BaseHook("nat", Hook.PREROUTING, priority))),
            SetRules(table, "nat", (rewrite,)),
            AddElements(table, to, ((b"\0\x50\0\0", target),)),
        )
        ruleset = ruleset.apply(Batch(commands))
    result = run_hook(ruleset, Hook.PREROUTING, PACKET, Machine())
    assert (str(result.packet.dst), result.packet.dport, result.rewritten) == ("10.0.0.7", 8080, True)


def test_a_packet_passes_the_hooks_of_its_way() -> None:
    ruleset = Ruleset().apply(Batch((AddTable(TABLE),)))
    for hook in Hook:
        chain = Chain(hook.name.lower(), BaseHook("filter", hook, 0))
        ruleset = ruleset.apply(Batch((AddChain(TABLE, chain), SetRules(TABLE, chain.name, (Rule((), "seen"),)))))

    def way(machine: Machine, *, locally_made: bool) -> list[str]:
        return [step.chain for step in follow(ruleset, PACKET, machine, locally_made=locally_made).steps]

    assert way(Machine(), locally_made=False) == ["prerouting", "forward", "postrouting"]
    assert way(Machine(frozenset({PACKET.dst})), locally_made=False) == ["prerouting", "input"]
    assert way(Machine(), locally_made=True) == ["output", "postrouting"]


def test_the_first_refusal_is_final() -> None:
    late = Chain("late", BaseHook("filter", Hook.PREROUTING, 10))
    ruleset = rules(base=(Rule((Reject(True, False),), "a"),)).apply(
        Batch((AddChain(TABLE, late), SetRules(TABLE, "late", (verdict(DROP, "b"),))))
    )
    assert walked(ruleset) == (Fate.RESET, ["a"])
    inside = rules(base=(verdict(jump("x"), "a"), verdict(ACCEPT, "b")), x=(verdict(DROP, "c"),))
    assert walked(inside) == (Fate.DROP, ["a", "c"])


def test_a_filter_sees_what_was_rewritten_at_the_same_hook() -> None:
    rewrite = Rule((Constant(bytes((10, 0, 0, 7)), 0), Constant(b"\x1f\x90\0\0", 1), Dnat(False, 0, 1)))
    ruleset = rules(base=(Rule((Payload(PayloadBase.TRANSPORT, 2, 2, 0), Cmp(CmpOp.EQ, 0, b"\x1f\x90"), Immediate(DROP))),))
    nat = Chain("nat", BaseHook("nat", Hook.PREROUTING, -100))
    ruleset = ruleset.apply(Batch((AddChain(TABLE, nat), SetRules(TABLE, "nat", (rewrite,)))))
    assert walked(ruleset)[0] is Fate.DROP


def test_rules_may_jump_sixteen_deep_any_number_of_times() -> None:
    def deep(count: int) -> Ruleset:
        chains = {f"c{n}": (verdict(jump(f"c{n + 1}")),) if n < count else () for n in range(1, count + 1)}
        return rules(base=(verdict(jump("c1")),) * 3, **chains)

    assert walked(deep(16))[0] is Fate.PASS
    with pytest.raises(ValueError, match="deeper than 16 chains, to c17"):
        walked(deep(17))


def test_what_a_packet_does_not_have_matches_nothing() -> None:
    for missing in (Payload(PayloadBase.TRANSPORT, 13, 1, 0), Payload(PayloadBase.LINK, 0, 6, 0)):
        assert walked(rules(base=(Rule((missing, Immediate(DROP))),))) == (Fate.PASS, [])


def test_every_register_holds_what_is_put_there() -> None:
    last = REGISTERS - 1
    rule = Rule((Meta(MetaKey.L4PROTO, last), Constant(b"\1\2\3\4", 0), Cmp(CmpOp.EQ, last, b"\6"), Immediate(DROP)))
    assert walked(rules(base=(rule,)))[0] is Fate.DROP


def test_maps_of_verdicts_and_maps_that_are_only_asked_whether_they_know() -> None:
    port = Payload(PayloadBase.TRANSPORT, 2, 2, 0)
    leads, names = NftSet("leads", (FieldType.PORT,), verdicts=True), NftSet("names", (FieldType.PORT,), data=(FieldType.IPV4,))
    key = b"\0\x50\0\0"
    made = rules(base=(), x=(verdict(DROP, "x"),)).apply(
        Batch(
            (
                AddSet(TABLE, leads),
                AddSet(TABLE, names),
                AddElements(TABLE, leads, ((key, goto("x")),)),
                AddElements(TABLE, names, ((key, bytes((10, 0, 0, 7))),)),
            )
        )
    )

    def with_rule(*expressions: Any) -> Ruleset:
        return made.apply(Batch((SetRules(TABLE, "base", (Rule(expressions, "a"),)),)))

    other = replace(PACKET, dport=81)
    by_verdict = with_rule(port, Lookup("leads", 0, verdict=True))
    assert walked(by_verdict) == (Fate.DROP, ["a", "x"])
    assert walked(by_verdict, other) == (Fate.PASS, [])
    known = with_rule(port, Lookup("names", 0), Immediate(DROP))
    assert walked(known)[0] is Fate.DROP
    assert walked(known, other)[0] is Fate.PASS


@pytest.mark.parametrize("key", [MetaKey.PRIORITY, MetaKey.MARK])
def test_what_a_rule_sets_later_rules_and_hooks_see(key: MetaKey) -> None:
    number = b"\1\2\3\4"
    note = Rule((Constant(number, 0), SetMeta(key, 0)), "set")
    seen = Rule((Meta(key, 3), Cmp(CmpOp.EQ, 3, number), Immediate(DROP)), "seen")
    assert walked(rules(base=(seen, note, seen))) == (Fate.DROP, ["set", "seen"])
    late = (AddChain(TABLE, Chain("late", BaseHook("filter", Hook.POSTROUTING, 0))), SetRules(TABLE, "late", (seen,)))
    ruleset = rules(base=(note,)).apply(Batch(late))
    # On its way through an IPv4 router, the priority becomes that of the packet's type of service.
    passed = Fate.PASS if key is MetaKey.PRIORITY else Fate.DROP
    assert follow(ruleset, PACKET, Machine()).fate is passed


def test_a_device_cannot_be_set() -> None:
    with pytest.raises(ValueError, match="meta iifname"):
        walked(rules(base=(Rule((Constant(bytes(4), 0), SetMeta(MetaKey.IIFNAME, 0))),)))


def test_what_it_does_not_know_it_does_not_guess() -> None:
    with pytest.raises(ValueError, match="quota"):
        walked(rules(base=(Rule((Unknown("quota"),)),)))


# --- affinity -------------------------------------------------------------------------------------------------------


def sticky_planner() -> ServicePlanner:
    facts = NodeFacts("n1", (ipaddress.ip_address("198.18.0.11"),), (ipaddress.ip_network("10.244.1.0/24"),))
    planner = ServicePlanner(facts)
    service = {
        "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"clusterIP": "10.96.0.10", "ipFamilies": ["IPv4"], "ports": [{"port": 80}], "sessionAffinity": "ClientIP"},
    }
    endpoints = {
        "metadata": {"name": "web-1", "namespace": "shop"},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [f"10.244.2.{n}"]} for n in (2, 3, 4)],
        "ports": [{"port": 8080}],
    }
    slices = (msgspec.convert(endpoints, EndpointSlice),)
    planner.set_service(ObjectKey("shop", "web"), msgspec.convert(service, Service), slices)
    return planner


def test_a_client_goes_where_it_went_before() -> None:
    ruleset = sticky_planner().desired()

    def packet(client: int) -> Packet:
        return Packet(ipaddress.ip_address(f"10.244.1.{client}"), ipaddress.ip_address("10.96.0.10"), 6, 5000, 80)

    first = follow(ruleset, packet(5), Machine(choose=lambda n: 1))
    assert str(first.packet.dst) == "10.244.2.3"
    remembering = Machine(choose=lambda n: 2, learned=first.learned)
    assert str(follow(ruleset, packet(5), remembering).packet.dst) == "10.244.2.3"
    assert follow(ruleset, packet(5), remembering).learned == {}
    assert str(follow(ruleset, packet(6), remembering).packet.dst) == "10.244.2.4"
