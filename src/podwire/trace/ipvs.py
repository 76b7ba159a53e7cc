"""What a node in the ipvs mode would do with a connection's first packet: the rules around IPVS, and IPVS where they leave the
packet to it.

IPVS sees what comes in for the node itself (hook LOCAL_IN, just before the nat chains there) and what its own processes send
(LOCAL_OUT, just behind them). What it leads elsewhere goes out by POSTROUTING: to conntrack, its destination was not rewritten,
but the original one is known (`net.ipv4.vs.conntrack`). Before POSTROUTING the kernel passes it through LOCAL_OUT as well
(ip_vs_nat_send_or_cont), where ours are nat chains only: those are asked about a destination once per connection, which has
been. A real server on the node itself gets the packet by INPUT.
(The kernel's net/netfilter/ipvs: ip_vs_core.c, ip_vs_xmit.c, ip_vs_nfct.c.)
"""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from podwire.model.ipvs import VirtualKey, VirtualServer
from podwire.model.nft import Hook, Ruleset
from podwire.model.servicetable import Backend, backend_address, backend_port
from podwire.trace.journey import Fate, Learned, Machine, Packet, Result, Step, both, join
from podwire.trace.netfilter import run_hook


@dataclass(frozen=True, slots=True)
class IpvsNode:
    """What the kernel holds. `bound`: packed addresses that are the node's own, beside those it has anyway."""

    rules: Ruleset = field(default_factory=Ruleset)
    servers: Mapping[VirtualKey, VirtualServer] = field(default_factory=dict)
    bound: frozenset[bytes] = frozenset()


def follow(node: IpvsNode, packet: Packet, machine: Machine, *, locally_made: bool = False) -> Result:
    """A connection's first packet through all hooks, and IPVS between them."""
    machine = replace(machine, addresses=machine.addresses.union(map(ipaddress.ip_address, node.bound)))
    result = run_hook(node.rules, Hook.OUTPUT if locally_made else Hook.PREROUTING, packet, machine)
    sent, rewritten = result.packet, result.rewritten
    if result.fate is Fate.PASS and (locally_made or sent.dst in machine.addresses):
        result = join(result, _serve(node, sent, machine))
    onward = (Hook.POSTROUTING,) if locally_made or result.packet != sent else (Hook.FORWARD, Hook.POSTROUTING)
    here = result.packet.dst in machine.addresses and not locally_made
    for hook in (Hook.INPUT,) if here else onward:
        if result.fate is not Fate.PASS:
            break
        knows = replace(machine, learned=both(machine.learned, result.learned))
        result = join(result, run_hook(node.rules, hook, result.packet, knows, original=packet, rewritten=rewritten))
    return result


def _serve(node: IpvsNode, packet: Packet, machine: Machine) -> Result:
    """What IPVS does with it."""
    key = VirtualKey(packet.dst.packed, packet.protocol, packet.dport)
    server = node.servers.get(key)
    if server is None:
        return Result(Fate.PASS, packet)
    able = sorted(real for real, weight in server.servers.items() if weight > 0)
    if not able:
        return Result(Fate.UNREACHABLE, packet, steps=(_step(packet, "no real server"),))
    chosen = _chosen(key, packet, able, machine)
    address = ipaddress.ip_address(backend_address(chosen))
    moved = replace(packet, dst=address, dport=backend_port(chosen))
    learned: Learned = {key: {packet.src.packed: chosen}} if server.persistence_s else {}
    return Result(Fate.PASS, moved, rewritten=True, steps=(_step(packet, f"{address}:{moved.dport}"),), learned=learned)


def _chosen(key: VirtualKey, packet: Packet, able: list[Backend], machine: Machine) -> Backend:
    """Where a persistent client went before, as long as that gets new connections (`expire_quiescent_template`); else any, as
    schedulers differ in how often each is taken."""
    before = machine.learned.get(key, {}).get(packet.src.packed)
    return before if isinstance(before, bytes) and before in able else able[machine.choose(len(able))]


def _step(packet: Packet, what: str) -> Step:
    return Step("ipvs", f"{packet.dst} {packet.dport}", what)
