"""A pod range per node and family out of the cluster's ranges: Node.spec.podCIDRs, set once and never shared."""

import ipaddress
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from podwire.client.errors import NotFound
from podwire.client.informer import Change
from podwire.controllers.base import Context, Controller, all_of
from podwire.controllers.config import ClusterCidr
from podwire.model.addr import IPNetwork
from podwire.model.objects import Node
from podwire.model.resources import NODES

if TYPE_CHECKING:
    from podwire.model.meta import Json

log = logging.getLogger(__name__)


def assign_pod_cidrs(
    taken: Iterable[IPNetwork], wanting: Sequence[str], ranges: Sequence[ClusterCidr]
) -> Mapping[str, Sequence[IPNetwork]]:
    """For each node in `wanting`, the lowest free prefix of every range; nodes for which a range has none left are missing."""
    taken = list(taken)
    free = [_free_prefixes(cluster, taken, len(wanting)) for cluster in ranges]
    return {name: prefixes for name, *prefixes in zip(wanting, *free, strict=False)}


def _free_prefixes(cluster: ClusterCidr, taken: Iterable[IPNetwork], count: int) -> list[IPNetwork]:
    shift = cluster.network.max_prefixlen - cluster.node_prefix
    base = int(cluster.network.network_address)
    used: set[int] = set()
    for network in taken:
        if network.version != cluster.network.version or not network.overlaps(cluster.network):
            continue
        first = max(int(network.network_address) - base, 0) >> shift
        last = min((int(network.broadcast_address) - base) >> shift, cluster.size - 1)
        used.update(range(first, last + 1))
    free: list[IPNetwork] = []
    index = 0
    while len(free) < count and index < cluster.size:
        if index not in used:
            address = cluster.network.network_address + (index << shift)
            free.append(type(cluster.network)((int(address), cluster.node_prefix)))
        index += 1
    return free


class NodeIpam(Controller[str]):
    """One key stands for all nodes: who gets what depends on all the others."""

    name: ClassVar[str] = "nodeipam"
    workers: ClassVar[int] = 1

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        # What was given out, until the copy of the Node shows it: a write whose answer was lost may still have been made.
        self._given: dict[str, tuple[str, Sequence[IPNetwork]]] = {}
        self.on(self.cluster.nodes, self._node_changed)

    def _node_changed(self, change: Change[Node]) -> None:
        if change.new is None or not change.new.spec.pod_cidrs:
            self.queue.add("all")

    async def sync(self, key: str) -> None:
        if not self.context.config.cluster_cidrs:
            return
        nodes = {key.name: node for key, node in self.cluster.nodes.items().items()}
        self._forget_what_is_known(nodes)
        given = {name: networks for name, (_, networks) in self._given.items()}
        wanting = sorted(name for name, node in nodes.items() if not node.spec.pod_cidrs and name not in given)
        taken = [network for node in nodes.values() for network in _cidrs(node)]
        taken += [network for networks in given.values() for network in networks]
        for name, networks in assign_pod_cidrs(taken, wanting, self.context.config.cluster_cidrs).items():
            self._given[name] = (nodes[name].metadata.uid, networks)
        for name in wanting:
            if name not in self._given:
                message = "all pod ranges are given out; delete unused nodes or start the cluster with a larger range"
                self.events.record(NODES, nodes[name].metadata, "Warning", "CIDRNotAvailable", message)
        await all_of(self._write(name, networks) for name, (_, networks) in self._given.items())

    def _forget_what_is_known(self, nodes: Mapping[str, Node]) -> None:
        for name, (uid, _) in list(self._given.items()):
            node = nodes.get(name)
            if node is None or node.metadata.uid != uid or node.spec.pod_cidrs:
                del self._given[name]

    async def _write(self, name: str, networks: Sequence[IPNetwork]) -> None:
        texts = [str(network) for network in networks]
        patch: Json = {"spec": {"podCIDR": texts[0], "podCIDRs": texts}}
        try:
            written = await self.client.patch(NODES, name, patch)
        except NotFound:
            return
        log.info("node %s: pod range %s", name, ", ".join(texts))
        await self.cluster.nodes.caught_up(written)


def _cidrs(node: Node) -> list[IPNetwork]:
    texts = node.spec.pod_cidrs or ((node.spec.pod_cidr,) if node.spec.pod_cidr else ())
    return [network for text in texts if (network := _network(text)) is not None]


def _network(text: str) -> IPNetwork | None:
    """None for what is no network: nothing can clash with it."""
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        return None
