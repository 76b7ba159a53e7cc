"""Promises put to the test with real packets, whatever back end serves: all connections of random clusters, in `servicerig`."""

import asyncio
import ipaddress
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from service_cases import to_ipv6
from service_worlds import change_to, connections
from servicerig import ServiceRig

from podwire.agent.proxymodes.port import ServiceRules
from podwire.model.addr import Family
from podwire.model.ids import HOST
from podwire.model.ops import SetSysctl
from podwire.model.proxymode import ProxyMode
from podwire.trace.oracle import Cluster, Connection, Outcome, Promise, Target, promise

SOURCES = {"p2": "10.244.1.2", "p4": "10.244.1.4", "far": "10.244.2.2", "node": "198.18.0.11", "world": "198.18.1.1"}
INTERFACES = {"p2": "cni0", "p4": "cni0", "far": "far0", "world": "eth0"}
PLACES = {ipaddress.ip_address(turn(ip)): name for name, ip in SOURCES.items() for turn in (str, to_ipv6)}
_SWITCHES = {
    "net/ipv4/conf/all/route_localnet": "1",
    # Every refusal is sent.
    "net/ipv4/icmp_ratelimit": "0",
    "net/ipv6/icmp/ratelimit": "0",
}


async def prepare(rig: ServiceRig) -> None:
    """Nothing that the kernel limits or refuses by itself; a server on the node, too, as a pod with hostNetwork would be."""
    await rig.kernel.apply(tuple(SetSysctl(name, value, HOST) for name, value in _SWITCHES.items()))
    await rig.serve("node", Family.IPV4, 8080, ADDRESSES["node"])
    await rig.serve("node", Family.IPV6, 8080, to_ipv6(ADDRESSES["node"]))


async def become_of(
    rig: ServiceRig, where: str, connection: Connection, patience_s: float | None = None
) -> tuple[Outcome, str, str]:
    """(what became of it, who answered, whom they saw)"""
    udp = connection.protocol == "UDP"
    try:
        who, seen = await rig.ask(where, str(connection.dst), connection.port, udp=udp, patience_s=patience_s)
    except TimeoutError:
        return Outcome.DROPPED, "", ""
    except ConnectionRefusedError:
        return Outcome.REFUSED, "", ""
    return Outcome.SERVED, who, seen


ADDRESSES = {"p2": "10.244.1.2", "p3": "10.244.1.3", "p4": "10.244.1.4", "far": "10.244.2.2", "node": "198.18.0.11"}
_TIMES = 2
"""How often a client comes back by each address, where it shall stay with its endpoint."""


Promised = Callable[[Cluster, Connection], Promise]


async def kept(
    rig: ServiceRig, cluster: Cluster, where: str, asked: Sequence[Connection], promised_by: Promised = promise
) -> list[str]:
    """What is wrong with the ends of connections that share a memory: their client makes one after the other."""
    wrong: list[str] = []
    visited: list[Target] = []
    choice = any(made.memory and len(made.targets) > 1 for made in (promised_by(cluster, connection) for connection in asked))
    times = 1 + _TIMES if choice else 1
    for connection in [connection for _ in range(times) for connection in asked]:
        promised = promised_by(cluster, connection)
        expected = replace(promised, targets=promised.to_one_who_knows(visited))
        if text := await _broken(rig, expected, where, connection, visited):
            wrong.append(f"{text}\n  after    {visited}")
            break
    return wrong


async def _broken(rig: ServiceRig, promised: Promise, where: str, connection: Connection, visited: list[Target]) -> str:
    """What is wrong with the connection's end; empty if nothing is. Where it arrived is added to `visited`."""
    got, who, seen = await become_of(rig, where, connection)
    if got is Outcome.DROPPED and promised.outcome is not got:
        # On a machine that is busy, silence needs a second hearing.
        got, who, seen = await become_of(rig, where, connection, 10 * rig.patience_s)
    label = f"{where}: {connection}\n  promised {promised}\n  got      {got} {who} {seen}"
    if where == "far" and got is Outcome.DROPPED and (connection.src, 8080) in promised.targets - promised.masqueraded:
        return ""  # a pod of another node led to itself, its own node's business: no machine takes what it seems to have sent
    alike = connection.made_here and connection.protocol == "UDP" and promised.outcome is Outcome.DROPPED
    if got is not promised.outcome and not (alike and got is Outcome.REFUSED):
        return label  # a process of the node is told of either (EPERM) when it sends a datagram
    if got is Outcome.SERVED:
        address = ipaddress.ip_address(ADDRESSES[who] if connection.dst.version == 4 else to_ipv6(ADDRESSES[who]))
        if (address, 8080) not in promised.targets:
            return label
        visited.append((address, 8080))
        masqueraded = ipaddress.ip_address(seen) != connection.src
        # The node's own address looks the same to itself.
        if masqueraded is not ((address, 8080) in promised.masqueraded) and (where, who) != ("node", "node"):
            return label
    return ""


async def broken_promises(
    rig: ServiceRig, rules: ServiceRules, worlds: list[Cluster], promised_by: Promised = promise
) -> tuple[list[str], Counter[Outcome]]:
    """The connections, of all that are worth trying in one cluster after the other, that end otherwise than promised; and how
    many were tried by what is promised."""
    tried: Counter[Outcome] = Counter()
    wrong: list[str] = []
    sharing = rules.mode is not ProxyMode.IPVS  # that has a memory for each virtual server
    before: Cluster | None = None
    for cluster in worlds:
        if before is not None and sharing:
            for service, _ in before.services:
                if service.spec.session_affinity == "ClientIP":
                    rules.set_service(service.key, None)  # with all that it remembers
            await rules.program()
        change_to(rules, before, cluster)
        await rules.program()
        before = cluster
        rules.set_facts(cluster.node)
        await rules.compare()
        await rig.kernel.forget_flows(lambda flow: True)
        asked: dict[tuple[object, ...], list[Connection]] = {}
        for connection in connections(cluster, SOURCES, INTERFACES):
            promised = promised_by(cluster, connection)
            if promised.outcome is not Outcome.UNTOUCHED and (connection.made_here or not connection.dst.is_loopback):
                tried[promised.outcome] += 1
                where = "node" if connection.made_here else PLACES[connection.src]
                place = (
                    (promised.memory,)
                    if sharing and promised.memory
                    else (connection.dst, connection.protocol, connection.port)
                )
                asked.setdefault((where, connection.src, *place), []).append(connection)
        found = await asyncio.gather(*(kept(rig, cluster, str(key[0]), mates, promised_by) for key, mates in asked.items()))
        wrong += [text for texts in found for text in texts]
    return wrong, tried
