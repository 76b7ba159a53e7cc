"""What is promised to every connection of a cluster, against what would become of it by what a kernel holds."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Protocol

from draws import every_way
from service_worlds import LOOPBACK, connections

from podwire.model.nft import Batch, DelTable, Prune
from podwire.model.servicetable import NodeFacts
from podwire.plan.services_table import PROTOCOLS
from podwire.trace.journey import Fate, Learned, Machine, Packet, Result, both
from podwire.trace.oracle import Cluster, Connection, Outcome, Promise, Target, promise


class Walk(Protocol):
    """A connection's first packet through what a kernel holds."""

    def __call__(self, packet: Packet, machine: Machine, *, locally_made: bool = False) -> Result: ...


Promised = Callable[[Cluster, Connection], Promise | None]
"""None: nothing."""


def walks(walk: Walk, connection: Connection, node: NodeFacts, learned: Learned | None = None) -> list[tuple[Fraction, Result]]:
    """The connection's fates, and how likely each is. `learned`: what earlier ones have left."""
    packet = Packet(
        connection.src, connection.dst, PROTOCOLS[connection.protocol], 40000, connection.port, iif=connection.interface
    )
    machine = Machine(frozenset({*node.node_ips, LOOPBACK}), learned=learned or {})
    return list(every_way(machine, lambda machine: walk(packet, machine, locally_made=connection.made_here)))


def answer(walk: Walk, connection: Connection, node: NodeFacts) -> Promise:
    """What the rules would do, in the oracle's words. Served without a target: not all of them are, or not in the same way."""
    ways = walks(walk, connection, node)
    results = [result for _, result in ways]
    fates = {r.fate for r in results}
    if fates == {Fate.DROP}:
        return Promise(Outcome.DROPPED)
    if fates == {Fate.RESET if connection.protocol == "TCP" else Fate.UNREACHABLE}:
        return Promise(Outcome.REFUSED)
    if fates != {Fate.PASS}:
        return Promise(Outcome.SERVED, why=f"by chance: {fates}")
    if any(r.packet.priority for r in results):
        return Promise(Outcome.SERVED, why="the packet goes on with a number that was for the rules alone")
    shares: dict[Target, Fraction] = {}
    for likelihood, r in ways:
        target = (r.packet.dst, r.packet.dport)
        shares[target] = shares.get(target, Fraction(0)) + likelihood
    if len(set(shares.values())) > 1:
        return Promise(Outcome.SERVED, why=f"not alike: {shares}")
    outcome = Outcome.SERVED if results[0].rewritten else Outcome.UNTOUCHED
    seen = frozenset((r.packet.dst, r.packet.dport) for r in results if r.masquerade)
    return Promise(outcome, frozenset(shares), seen)


def disagreements(cluster: Cluster, walk: Walk, promised: Promised = promise) -> Iterator[str]:
    """Every connection of which the rules do something else than what is promised."""
    agreed = True
    for connection in connections(cluster):
        wanted = promised(cluster, connection)
        if wanted is None:
            continue
        actual = answer(walk, connection, cluster.node)
        if replace(actual, why="") != replace(wanted, why="", memory=""):
            agreed = False
            yield f"{connection}\n  promised {wanted}\n  rules    {actual}"
    if agreed:
        yield from _forgetful(cluster, walk, promised)


def _forgetful(cluster: Cluster, walk: Walk, promised: Promised) -> Iterator[str]:
    """Each client's connections one after the other, and all of them again: whoever is remembered goes where he went, by
    whichever address he comes, and everyone else anywhere."""
    clients: dict[object, list[tuple[Connection, Promise]]] = {}
    for connection in connections(cluster):
        wanted = promised(cluster, connection)
        if wanted is not None and wanted.outcome is Outcome.SERVED:
            clients.setdefault(connection.src, []).append((connection, wanted))
    for served in clients.values():
        if not any(wanted.memory for _, wanted in served):
            continue
        learned: Learned = {}
        visited: dict[str, list[Target]] = {}
        for number, (connection, wanted) in enumerate((*served, *served)):
            results = [result for _, result in walks(walk, connection, cluster.node, learned)]
            known = wanted.targets.intersection(visited.get(wanted.memory, ()) if wanted.memory else ())
            reached = [(r.packet.dst, r.packet.dport) for r in results]
            if len(set(reached)) != 1 or not known.issuperset(reached) if known else set(reached) != wanted.targets:
                yield f"{connection}\n  promised {wanted}\n  after    {visited}\n  rules    {sorted(set(reached))}"
                break
            chosen = number % len(results)
            learned = both(learned, results[chosen].learned)
            visited.setdefault(wanted.memory, []).append(reached[chosen])


def by_the_device(connection: Connection, found: Promise) -> Promise:
    """To an address of the ipvs mode's device: a process of the node would have that one as its source, and gets the node's."""
    return replace(found, masqueraded=found.targets) if connection.made_here else found


def refused_where_bound(bound: Collection[bytes]) -> Promised:
    """What is promised in the ipvs mode, where that is another thing. Of an address that the node holds for some of its ports
    (`bound`), the others are closed, and do not go on along the routes. IPVS remembers clients by virtual server; the rules
    beside it, which serve the node's own clients of a policy of Local, by port of the Service."""

    def promised(cluster: Cluster, connection: Connection) -> Promise:
        found = promise(cluster, connection)
        if found.outcome is Outcome.UNTOUCHED and connection.dst.packed in bound:
            return Promise(Outcome.REFUSED, why="an address of the node's own")
        if connection.dst.packed in bound:
            found = by_the_device(connection, found)
        by_rules = found.why.endswith(("from the node itself", "from a pod of this node"))
        if not found.memory or by_rules:
            return found
        return replace(found, memory=f"{found.memory} at {connection.dst} {connection.port}")

    return promised


def pruned(learned: Learned, batch: Batch) -> Learned:
    """What is left of what packets left, once the kernel has carried the batch out."""
    kept: Learned = {place: dict(elements) for place, elements in learned.items()}
    for prune in batch.commands:
        if isinstance(prune, DelTable):
            kept = {place: elements for place, elements in kept.items() if place[0] != prune.table}  # type: ignore[index]
        elif isinstance(prune, Prune):
            found = kept.get((prune.table, prune.set.name), {})
            kept[prune.table, prune.set.name] = {
                key: data for key, data in found.items() if not prune.unwanted(key, data, prune.part_length)
            }
    return kept
