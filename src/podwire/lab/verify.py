"""`podwire verify overlay` for a lab: the leases, every node's kernel, and real packets, held against each other."""

import asyncio
import contextlib
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import ip_address
from typing import Any, Protocol

from podwire.kernel.capture import Capture
from podwire.lab.overlayprobe import MOST_AT_ONCE, probe_mtu
from podwire.lab.paths import PathResult, new_mark, run_probe, take_snapshot
from podwire.lab.probes import Probe, Snapshot, place_of, pod_to_pod
from podwire.model.addr import IPAddress, IPNetwork, family_of
from podwire.model.kernelstate import NetState
from podwire.model.objects import Node, Pod
from podwire.plan.ipam import gateway
from podwire.plan.leases import Lease
from podwire.trace.overlaycheck import (
    AGREED,
    FITTING,
    KEPT,
    Finding,
    NodeView,
    PodAddress,
    check_mapping,
    check_own,
    check_uniqueness,
    check_ways,
    longest_route,
)

MOST_PAIRS = 40
"""So many ordered pairs of nodes are probed; of a bigger lab each node's next neighbours, and the report says so."""


class OverlaySite(Protocol):
    """A lab as this needs it; see `podwire.lab.cluster.LabCluster`."""

    @property
    def client(self) -> Any: ...

    async def open_namespaces(self, pods: Iterable[Pod]) -> dict[str, int]: ...

    async def observe_nodes(self) -> Mapping[str, NetState]: ...

    async def leases(self) -> Mapping[str, Lease]: ...


async def verify_overlay(site: OverlaySite) -> list[Finding]:
    """Everything, as findings; the lab is overlay-sound if all are ok."""
    snapshot, leases, states = await asyncio.gather(take_snapshot(site.client), site.leases(), site.observe_nodes())
    pods = [pod for pod in snapshot.running if not pod.spec.host_network]
    addresses = [PodAddress(str(pod.key), pod.spec.node_name, ip_address(text)) for pod in pods for text in pod.ips]
    views = {name: NodeView(name, _addresses(snapshot.node(name)), state) for name, state in states.items()}
    found = [*check_mapping(leases, addresses), *check_uniqueness(leases, addresses), *check_ways(leases, views)]
    for name, view in views.items():
        found += check_own(view, leases[name]) if name in leases else [_without_lease(name)]
    pairs = _pairs(sorted(views))
    sources, mtus = await asyncio.gather(_probe_sources(site, snapshot, pods, pairs), _probe_mtus(site, views, leases, pairs))
    return [*found, *sources, *mtus]


def document(findings: Sequence[Finding]) -> dict[str, Any]:
    """The report as JSON has it."""
    return {
        "ok": all(finding.ok is not False for finding in findings),
        "findings": [
            {"condition": f.condition, "subject": f.subject, "ok": f.ok, "evidence": f.evidence} for f in findings
        ],
    }  # fmt: skip


def _addresses(node: Node | None) -> frozenset[IPAddress]:
    return frozenset(map(ip_address, node.internal_ips if node else ()))


def _without_lease(node: str) -> Finding:
    return Finding(condition=AGREED, subject=node, ok=False, evidence="the node holds no lease")


def _pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    pairs = list(itertools.permutations(names, 2))
    if len(pairs) <= MOST_PAIRS:
        return pairs
    return [(name, names[(at + 1) % len(names)]) for at, name in enumerate(names)]


async def _probe_sources(
    site: OverlaySite, snapshot: Snapshot, pods: Sequence[Pod], pairs: Sequence[tuple[str, str]]
) -> list[Finding]:
    """One packet for each family from a pod of one node to a pod of another, watched on all devices on the way."""
    probes = []
    for one, two in pairs:
        senders = [pod for pod in pods if pod.spec.node_name == one]
        targets = [pod for pod in pods if pod.spec.node_name == two and any(True for _ in pod_to_pod(pod, pod))]
        if senders and targets:
            probes += [(one, two, probe) for probe in pod_to_pod(senders[0], targets[0])]
    if not probes:
        return [Finding(KEPT, "all", ok=None, evidence="not probed: no two nodes have pods, one of them with a port")]
    wanted = {place for _, _, probe in probes for place in (probe.origin, *probe.ends_at)}
    namespaces = await site.open_namespaces([pod for pod in pods if place_of(pod) in wanted])
    try:
        async with Capture() as capture:
            await capture.open(namespaces)
            results = await _run_probes([probe for _, _, probe in probes], namespaces, capture)
            return [_source_finding(f"{one} → {two}", result) for (one, two, _), result in zip(probes, results, strict=True)]
    finally:
        _close(namespaces)


async def _run_probes(probes: Sequence[Probe], namespaces: Mapping[str, int], capture: Capture) -> list[PathResult]:
    mark, turns = new_mark(), asyncio.Semaphore(MOST_AT_ONCE)
    capture.expect(mark)

    async def one(probe: Probe) -> PathResult:
        async with turns:
            return await run_probe(probe, namespaces, capture, mark)

    return list(await asyncio.gather(*map(one, probes)))


def _source_finding(nodes: str, result: PathResult) -> Finding:
    way = " → ".join(dict.fromkeys(f"{hop.place} {hop.device}" for hop in result.hops)) or "nothing was seen"
    source = result.hops[-1].packet.src if result.hops else None
    words = result.reason or f"{source} arrived as {source}, by {way}"
    return Finding(KEPT, f"{nodes}: {result.probe.sender} → {result.probe.target}", result.ok, words)


async def _probe_mtus(
    site: OverlaySite, views: Mapping[str, NodeView], leases: Mapping[str, Lease], pairs: Sequence[tuple[str, str]]
) -> list[Finding]:
    """At the edge and one byte over, from node to node, to the address of the other's bridge."""
    namespaces = await site.open_namespaces(())
    try:
        tasks = [
            _mtu_finding(views[one], two, namespaces[one], subnet, leases.get(one))
            for one, two in pairs
            for subnet in (leases[two].subnets if two in leases else ())
        ]
        found = list(await asyncio.gather(*tasks))
    finally:
        _close(namespaces)
    every = len(views) * (len(views) - 1)
    if len(pairs) < every:
        words = f"{len(pairs)} of {every} ordered pairs of nodes were probed: each node and the next"
        found.append(Finding(FITTING, "sample", ok=True, evidence=words))
    return found


async def _mtu_finding(view: NodeView, to: str, netns: int, subnet: IPNetwork, own: Lease | None) -> Finding:
    target = gateway(subnet)
    route = longest_route(view.state, target)
    link = view.state.links.get(route.dev) if route else None
    subject = f"{view.name} → {to} ({target})"
    if link is None or link.mtu is None:
        return Finding(FITTING, subject, ok=False, evidence=f"there is no way to {target}")
    try:
        here = own.subnet(family_of(subnet)) if own else None
        edge, over = await probe_mtu(netns, target, link.mtu, gateway(here) if here else None)
    except OSError as error:
        return Finding(FITTING, subject, ok=False, evidence=f"{target}: {error.strerror or error}")
    words = f"{link.name} says {link.mtu}: {edge.size} bytes {edge.outcome}, {over.size} bytes {over.outcome}"
    return Finding(FITTING, subject, ok=(edge.outcome, over.outcome) == ("arrived", "too big"), evidence=words)


def _close(namespaces: Mapping[str, int]) -> None:
    for descriptor in namespaces.values():
        with contextlib.suppress(OSError):
            os.close(descriptor)
