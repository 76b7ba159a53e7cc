"""The evaluator of IPVS: who sees a packet, which real server it gets, what is behind that."""

import ipaddress
from dataclasses import replace

from podwire.model.addr import Family
from podwire.model.ipvs import VirtualKey, VirtualServer
from podwire.model.nft import AddChain, AddTable, BaseHook, Batch, Chain, Hook, Rule, Ruleset, SetRules, TableRef
from podwire.model.nftexpr import DROP, Cmp, CmpOp, Ct, CtKey, Immediate, Masquerade
from podwire.model.servicetable import backend
from podwire.plan.nftexprs import destination_rewritten
from podwire.trace.ipvs import IpvsNode, follow
from podwire.trace.journey import Fate, Machine, Packet, Result

HERE, CLIENT, VIRTUAL = (ipaddress.ip_address(text) for text in ("198.18.0.11", "192.0.2.1", "10.96.0.10"))
PACKET = Packet(CLIENT, VIRTUAL, 6, 1000, 80)
MACHINE = Machine(frozenset((HERE,)))
A, B, OWN = (backend(ipaddress.ip_address(text).packed, 8080) for text in ("10.244.1.2", "10.244.1.3", str(HERE)))
KEY = VirtualKey(VIRTUAL.packed, 6, 80)
TABLE = TableRef(Family.IPV4, "t")
BOUND = frozenset((VIRTUAL.packed,))


def node(*servers: bytes, persistence_s: int = 0, **hooks: Rule) -> IpvsNode:
    """`hooks`: a rule in a nat chain there."""
    commands: list[AddTable | AddChain | SetRules] = [AddTable(TABLE)]
    for name, rule in hooks.items():
        commands += [AddChain(TABLE, Chain(name, BaseHook("nat", Hook[name], 0))), SetRules(TABLE, name, (rule,))]
    held = {KEY: VirtualServer("rr", persistence_s, dict.fromkeys(servers, 1))}
    return IpvsNode(Ruleset().apply(Batch(tuple(commands))), held, BOUND)


def arrived(result: Result) -> tuple[str, int, bool]:
    return str(result.packet.dst), result.packet.dport, result.rewritten


def test_one_of_the_real_servers_gets_it() -> None:
    found = [follow(node(B, A), PACKET, replace(MACHINE, choose=lambda n, i=i: i)) for i in range(2)]  # type: ignore[misc]  # bound now
    assert [arrived(result) for result in found] == [("10.244.1.2", 8080, True), ("10.244.1.3", 8080, True)]


def test_it_sees_what_comes_in_for_the_node_and_what_the_node_sends() -> None:
    unbound = replace(node(A), bound=frozenset())
    assert arrived(follow(unbound, PACKET, MACHINE)) == (str(VIRTUAL), 80, False), "on its way through"
    assert arrived(follow(unbound, PACKET, MACHINE, locally_made=True)) == ("10.244.1.2", 8080, True)
    assert arrived(follow(node(A), replace(PACKET, dport=81), MACHINE)) == (str(VIRTUAL), 81, False)
    assert arrived(follow(node(A), replace(PACKET, protocol=17), MACHINE)) == (str(VIRTUAL), 80, False)


def test_nobody_to_serve_it() -> None:
    drained = replace(node(A), servers={KEY: VirtualServer("rr", 0, {A: 0})})
    assert follow(drained, PACKET, MACHINE).fate is Fate.UNREACHABLE
    assert follow(node(), PACKET, MACHINE).fate is Fate.UNREACHABLE


def test_rules_before_it_come_first() -> None:
    drop = Rule((Immediate(DROP),))
    assert follow(node(A, PREROUTING=drop), PACKET, MACHINE).fate is Fate.DROP
    assert follow(node(A, OUTPUT=drop), PACKET, MACHINE).fate is Fate.PASS
    assert follow(node(A, OUTPUT=drop), PACKET, MACHINE, locally_made=True).fate is Fate.DROP
    assert follow(node(A, INPUT=drop), PACKET, MACHINE).fate is Fate.PASS, "it goes out from before INPUT's nat"
    assert follow(node(A, FORWARD=drop), PACKET, MACHINE).fate is Fate.PASS


def test_behind_it_conntrack_knows_where_it_was_sent_to_but_not_that_it_was_rewritten() -> None:
    sent_there = (Ct(CtKey.DST_IP, 0, original=True), Cmp(CmpOp.EQ, 0, VIRTUAL.packed))
    for locally_made in (False, True):
        rule = Rule((*sent_there, Masquerade()))
        assert follow(node(A, POSTROUTING=rule), PACKET, MACHINE, locally_made=locally_made).masquerade
        rule = Rule((*destination_rewritten(), Masquerade()))
        assert not follow(node(A, POSTROUTING=rule), PACKET, MACHINE, locally_made=locally_made).masquerade


def test_a_real_server_on_the_node_gets_it_by_input() -> None:
    result = follow(node(OWN, INPUT=Rule((), "seen"), POSTROUTING=Rule((Masquerade(),))), PACKET, MACHINE)
    assert arrived(result) == (str(HERE), 8080, True)
    assert not result.masquerade
    assert [step.rule for step in result.steps] == [f"{HERE}:8080", "seen"]


def test_a_persistent_client_stays_as_long_as_its_server_gets_new_connections() -> None:
    sticky = node(A, B, persistence_s=600)
    first = follow(sticky, PACKET, replace(MACHINE, choose=lambda n: 1))
    assert arrived(first)[0] == "10.244.1.3"
    knows = replace(MACHINE, learned=first.learned)
    assert arrived(follow(sticky, PACKET, knows))[0] == "10.244.1.3"
    assert arrived(follow(sticky, replace(PACKET, src=HERE), knows))[0] == "10.244.1.2"
    drained = replace(sticky, servers={KEY: VirtualServer("rr", 600, {A: 1, B: 0})})
    assert arrived(follow(drained, PACKET, knows))[0] == "10.244.1.2"
    assert not follow(node(A), PACKET, MACHINE).learned
