"""The evaluator of iptables: matches, chains, tables in the kernel's order."""

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import replace

import pytest

from podwire.model.addr import Family
from podwire.plan.iptables import Chains
from podwire.trace.iptables import follow, lists_of_clients
from podwire.trace.iptablesrule import RuleError, parse_rule
from podwire.trace.journey import Fate, Machine, Packet, Result

HERE, CLIENT, POD = (ipaddress.ip_address(text) for text in ("198.18.0.11", "192.0.2.1", "10.244.1.2"))
PACKET = Packet(CLIENT, ipaddress.ip_address("10.96.0.10"), 6, 1000, 80, iif="eth0")
MACHINE = Machine(frozenset((HERE,)))

Lines = tuple[str, ...]


def walk(
    packet: Packet = PACKET,
    machine: Machine = MACHINE,
    *,
    made_here: bool = False,
    chains: Mapping[tuple[str, str], Lines] | None = None,
    hooks: Mapping[str, Lines] | None = None,
    **more: Lines,
) -> Result:
    """`hooks` and `more`: nat_PREROUTING=("-j ACCEPT",) and so on."""
    jumps = {(name.partition("_")[0], name.partition("_")[2]): lines for name, lines in {**(hooks or {}), **more}.items()}
    return follow({packet.family: Chains(chains or {}, jumps)}, packet, machine, locally_made=made_here)


def dropped(match: str, packet: Packet = PACKET, machine: Machine = MACHINE) -> bool:
    return walk(packet, machine, filter_FORWARD=(f"{match} -j DROP",)).fate is Fate.DROP


@pytest.mark.parametrize(
    ("match", "matches"),
    [
        ("-s 192.0.2.0/24", True),
        ("-s 192.0.3.0/24", False),
        ("! -s 192.0.2.0/24", False),
        ("-s 192.0.2.1/32", True),
        ("-d 0.0.0.10/0.0.0.255", True),
        ("-d 0.0.0.11/0.0.0.255", False),
        ("-i eth0", True),
        ("-i eth", False),
        ("-i eth+", True),
        ("! -i lo", True),
        ("-p tcp", True),
        ("-p udp", False),
        ("-p tcp -m tcp --dport 80", True),
        ("-p tcp -m tcp --dport 81", False),
        ("-m conntrack --ctstate NEW", True),
        ("-m conntrack --ctstate RELATED,ESTABLISHED", False),
        ("-m conntrack --ctstate INVALID", False),
        ("-m conntrack --ctstate DNAT", False),
        ("-m mark --mark 0x4000/0x4000", False),
        ("-m mark --mark 0x0/0x4000", True),
        ("-m addrtype --src-type LOCAL", False),
        ("-m iprange --src-range 192.0.2.1-192.0.2.9", True),
        ("-m iprange --src-range 192.0.2.2-192.0.2.9", False),
        ('-m comment --comment "what it is for"', True),
        ("-s 192.0.2.0/24 -p udp", False),
    ],
)
def test_a_match(match: str, matches: bool) -> None:
    assert dropped(match) is matches


def test_an_ipv6_mask_with_holes() -> None:
    packet = replace(PACKET, src=ipaddress.ip_address("2001:db8::1"), dst=ipaddress.ip_address("fd00:10:96::a"))
    assert dropped("-d ::a/::ff", packet)
    assert not dropped("-d ::b/::ff", packet)


def test_what_the_machine_says() -> None:
    assert dropped("-m addrtype --src-type LOCAL", machine=Machine(frozenset((HERE, CLIENT))))
    asked: list[int] = []

    def chance(n: int) -> bool:
        asked.append(n)
        return True

    assert dropped("-m statistic --mode random --probability 0.33333333349", machine=replace(MACHINE, chance=chance))
    assert asked == [3]
    assert not dropped("-m statistic --mode random --probability 0.50000000000")


def test_a_list_of_clients_is_filled_and_asked() -> None:
    known = "-m recent --rcheck --seconds 600 --reap --name A --mask 255.255.255.255 --rsource"
    assert not dropped(known)
    note = "-p tcp -m recent --set --name A --mask 255.255.255.255 --rsource -j DNAT --to-destination 10.244.1.2:8080"
    first = walk(nat_PREROUTING=(note,))
    assert dropped(known, machine=replace(MACHINE, learned=first.learned))
    assert not dropped(known, replace(PACKET, src=HERE), replace(MACHINE, learned=first.learned))
    assert not dropped(known.replace("--name A", "--name B"), machine=replace(MACHINE, learned=first.learned))
    assert lists_of_clients(Chains({("nat", "A"): (note,), ("nat", "B"): (f"{known} -j A",)})) == first.learned.keys()


def test_it_returns_from_a_chain_to_the_next_rule_and_after_goto_to_what_follows_the_caller() -> None:
    chains = {
        ("filter", "A"): ("-j B", "-j DROP"),
        ("filter", "B"): ("-p tcp -j RETURN", "-j DROP"),
        ("filter", "C"): ("-g B", "-j DROP"),
        ("filter", "D"): ("-j C", "-j ACCEPT"),
    }
    assert walk(chains=chains, filter_FORWARD=("-j A",)).fate is Fate.DROP
    assert walk(chains=chains, filter_FORWARD=("-j D", "-j DROP")).fate is Fate.PASS
    assert walk(chains=chains, filter_FORWARD=("-g B", "-j DROP")).fate is Fate.PASS


def test_a_destination_is_rewritten_once_and_seen_so_behind_that() -> None:
    lead = "-j DNAT --to-destination 10.244.1.2:8080"
    result = walk(
        nat_PREROUTING=(lead, "-j DNAT --to-destination 10.244.1.3:8080"),
        filter_FORWARD=("-d 10.96.0.10/32 -j DROP", "-m conntrack --ctstate DNAT -d 10.244.1.2/32 -j ACCEPT", "-j DROP"),
        nat_POSTROUTING=("-m conntrack --ctstate DNAT -j MASQUERADE --random-fully",),
    )
    assert (result.packet.dst, result.packet.dport, result.rewritten, result.masquerade) == (POD, 8080, True, True)
    packet = replace(PACKET, src=ipaddress.ip_address("2001:db8::1"), dst=ipaddress.ip_address("fd00::1"))
    led = walk(packet, nat_PREROUTING=("-j DNAT --to-destination [fd00::2]:8080",)).packet
    assert (str(led.dst), led.dport) == ("fd00::2", 8080)


def test_a_mark_goes_along() -> None:
    mark, is_marked = "-j MARK --set-xmark 0x4000/0x4000", "-m mark --mark 0x4000/0x4000"
    result = walk(
        replace(PACKET, mark=1),
        nat_PREROUTING=(mark,),
        nat_POSTROUTING=(f"{is_marked} -j MARK --set-xmark 0x4000/0x0", f"{is_marked} -j MASQUERADE"),
    )
    assert (result.packet.mark, result.masquerade) == (1, False)


@pytest.mark.parametrize(
    ("target", "fate"),
    [
        ("REJECT --reject-with tcp-reset", Fate.RESET),
        ("REJECT --reject-with icmp-port-unreachable", Fate.UNREACHABLE),
        ("REJECT --reject-with icmp6-port-unreachable", Fate.UNREACHABLE),
        ("DROP", Fate.DROP),
        ("ACCEPT", Fate.PASS),
    ],
)
def test_how_it_ends(target: str, fate: Fate) -> None:
    result = walk(filter_FORWARD=(f'-m comment --comment "that is why" -j {target}', "-j DROP"), nat_POSTROUTING=())
    assert result.fate is fate
    assert [str(step) for step in result.steps] == ["filter FORWARD: that is why"]


def test_which_hooks_a_packet_passes() -> None:
    rules: dict[str, Lines] = {
        f"{table}_{hook}": (f"-m comment --comment {hook} -j RETURN",)
        for table, hooks in {"nat": "PREROUTING INPUT OUTPUT POSTROUTING", "filter": "INPUT FORWARD OUTPUT"}.items()
        for hook in hooks.split()
    }

    def passed(packet: Packet, *, made_here: bool = False) -> list[str]:
        return [f"{step.table} {step.rule}" for step in walk(packet, made_here=made_here, hooks=rules).steps]

    here = replace(PACKET, dst=HERE)
    assert passed(PACKET) == ["nat PREROUTING", "filter FORWARD", "nat POSTROUTING"]
    assert passed(here) == ["nat PREROUTING", "filter INPUT", "nat INPUT"]
    assert passed(PACKET, made_here=True) == ["nat OUTPUT", "filter OUTPUT", "nat POSTROUTING"]
    assert passed(here, made_here=True) == ["nat OUTPUT", "filter OUTPUT", "nat POSTROUTING", "filter INPUT"]
    guard = walk(here, made_here=True, filter_INPUT=("! -i lo -j DROP",))
    assert guard.fate is Fate.PASS, "what a process sends to its own machine comes in by lo"
    assert walk(PACKET, made_here=True, filter_OUTPUT=("-j DROP",), nat_POSTROUTING=("-j NOWHERE",)).fate is Fate.DROP


@pytest.mark.parametrize(
    "line",
    [
        "-p tcp",
        "-p icmp -j DROP",
        "-s nowhere/8 -j DROP",
        "-p tcp -m tcp --dport http -j DROP",
        "-m tcp --dport 80 -j DROP",
        "-p udp -m tcp --dport 80 -j DROP",
        "! -p tcp -m tcp --dport 80 -j DROP",
        "-o eth0 -j DROP",
        "-m set --match-set x src -j DROP",
        "-p tcp -m tcp --sport 80 -j DROP",
        "-m conntrack --ctstate UNTRACKED -j DROP",
        "-m conntrack ! --ctstate NEW -j DROP",
        "-m addrtype --dst-type LOCAL -j DROP",
        "-m statistic --mode nth --every 2 -j DROP",
        "-m statistic --mode random --probability 0.40000000000 -j DROP",
        "-m statistic --mode random --probability 0.00000000000 -j DROP",
        "-m recent --update --seconds 3 --name A --mask 255.255.255.255 --rsource -j DROP",
        "-m recent --set --name A --mask 255.255.255.0 --rsource -j DROP",
        "-m recent --set --name A --mask 255.255.255.255 --rdest -j DROP",
        "-j DROP -p tcp",
        "! -j DROP",
        "-j MARK --or-mark 0x1",
        "-j MASQUERADE --to-ports 1000",
        "-j REJECT --reject-with icmp-host-prohibited",
        "-j DNAT --to-destination",
        '-m comment --comment "no end -j DROP',
        "-m comment",
    ],
)
def test_what_is_not_known_is_an_error_that_shows_the_line(line: str) -> None:
    with pytest.raises(RuleError, match=re.escape(line)):
        parse_rule(line)


@pytest.mark.parametrize(
    "hooks",
    [
        {"nat_PREROUTING": ("-j DROP",)},
        {"filter_FORWARD": ("-j DNAT --to-destination 10.0.0.1:80",)},
        {"nat_POSTROUTING": ("-j DNAT --to-destination 10.0.0.1:80",)},
        {"nat_PREROUTING": ("-j MASQUERADE",)},
        {"nat_PREROUTING": ("-j NOWHERE",)},
        {"nat_PREROUTING": ("-j CIRCLE",)},
    ],
)
def test_what_the_kernel_would_refuse_is_an_error(hooks: dict[str, Lines]) -> None:
    with pytest.raises(ValueError, match=r"table|circle"):
        walk(chains={("nat", "CIRCLE"): ("-j CIRCLE",)}, hooks=hooks)


def test_a_family_without_rules_lets_pass() -> None:
    assert follow({Family.IPV6: Chains()}, PACKET, MACHINE).fate is Fate.PASS
