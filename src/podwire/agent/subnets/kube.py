"""The subnet manager of a Kubernetes cluster: a node's subnets are its Node's podCIDRs, and what peers must know of it stands
in flannel's annotations there. Somebody else (the node IPAM controller) sees to it that no two Nodes have one subnet.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from random import Random
from types import MappingProxyType

from podwire.agent.subnets.port import Holding, OwnLease, SubnetCounters, SubnetListener
from podwire.client.api import ApiClient, PatchKind
from podwire.client.backoff import Backoff
from podwire.client.errors import ApiError
from podwire.client.informer import Change, Informer
from podwire.model.addr import IPNetwork, family_of
from podwire.model.ids import ObjectKey
from podwire.model.netconf import NetConfig
from podwire.model.objects import Node
from podwire.model.resources import NODES
from podwire.plan.leases import (
    ANNOTATION_PREFIX,
    Lease,
    LeaseAttrs,
    annotation,
    encode_annotations,
    lease_of_node,
    pod_cidrs,
    told_addresses,
)

log = logging.getLogger(__name__)

REREAD_SECONDS = 5.0
"""How often the configuration's file is looked at: a mounted ConfigMap is replaced in a way that tells nobody."""


class KubeSubnets:
    """See `port.SubnetManager`. The informer is the caller's to run: it has all Nodes.

    config: what flannel reads from net-conf.json; reread: reads it anew, raising as `parse_net_config`. client: with it the
    node's annotations are written, where they are not so already; None: somebody else does that. prefix: of the annotations."""

    def __init__(
        self,
        nodes: Informer[Node],
        node: str,
        config: NetConfig,
        *,
        client: ApiClient | None = None,
        prefix: str = ANNOTATION_PREFIX,
        rng: Random | None = None,
        reread: Callable[[], NetConfig] | None = None,
    ) -> None:
        self._nodes, self._node, self._config, self._reread = nodes, node, config, reread
        self._client, self._prefix = client, prefix
        self._rng = rng or Random()
        self._attrs: LeaseAttrs | None = None
        self._own = OwnLease()
        self._peers: dict[str, Lease] = {}
        self._listeners: list[SubnetListener] = []
        self._own_changed = asyncio.Event()
        self._released = False
        self._refused = False
        """Whether the configuration, when it was reread last, was none."""
        self.counters = SubnetCounters()
        nodes.subscribe(self._changed)

    @property
    def own(self) -> OwnLease:
        return self._own

    @property
    def peers(self) -> Mapping[str, Lease]:
        return MappingProxyType(self._peers)

    def subscribe(self, listener: SubnetListener) -> None:
        self._listeners.append(listener)
        for node, lease in self._peers.items():
            listener.peer_changed(node, lease)
        if self._own.lease is not None:
            listener.own_changed(self._own)

    async def network_config(self) -> NetConfig:
        return self._config

    async def next_config(self) -> NetConfig:
        if self._reread is None:
            await asyncio.Event().wait()  # nobody says another one
        assert self._reread is not None
        while True:
            await asyncio.sleep(REREAD_SECONDS)
            refused, self._refused = self._refused, True
            config = self._reread()
            self._refused = False
            if config != self._config or refused:
                self._config = config
                return config

    def suits(self, config: NetConfig) -> bool:
        return self._own.lease is None or not _outside(config, self._own.lease.subnets)

    async def acquire(self, attrs: LeaseAttrs) -> Lease:
        self._attrs = attrs
        await self._nodes.synced()
        while True:
            self._own_changed.clear()
            node = self._nodes.get(ObjectKey("", self._node))
            self._read_own(node)
            held = self._own.held
            if held is not None and node is not None:
                await self._tell(node, held)
                return held
            log.warning("node %s: %s; waiting", self._node, self._own.why)
            await self._own_changed.wait()

    async def update(self, attrs: LeaseAttrs) -> None:
        self._attrs = attrs
        self._read_own(self._nodes.get(ObjectKey("", self._node)))
        self._own_changed.set()  # `run` writes it

    async def run(self) -> None:
        while True:
            await self._own_changed.wait()
            self._own_changed.clear()
            node = self._nodes.get(ObjectKey("", self._node))
            held = self._own.held
            if node is not None and held is not None:
                await self._tell(node, held)

    async def release(self) -> None:
        """Peers forget the node with its annotations; its subnets stay the Node's."""
        self._released = True
        if self._client is not None:
            patch = {"metadata": {"annotations": {annotation(self._prefix, "kube-subnet-manager"): None}}}
            await self._client.patch(NODES, self._node, patch, subresource="status", kind=PatchKind.STRATEGIC)

    # --- this node ------------------------------------------------------------------------------------------------

    def _read_own(self, node: Node | None) -> None:
        attrs = self._attrs
        if attrs is None:
            return
        cidrs = pod_cidrs(node) if node else ()
        before = self._own.lease
        if node is None:
            why = "its Node is not in the API" if before is None else "its Node was deleted"
        elif not cidrs:
            why = "its Node has no podCIDR yet"
        else:
            why = _outside(self._config, cidrs)
        if not why:
            own = OwnLease(Lease(self._node, cidrs, attrs), Holding.HELD)
        else:
            own = OwnLease(before, Holding.LAPSED if before else Holding.NONE, why)
        if own == self._own:
            return
        self.counters.acquired += own.held is not None and (
            self._own.held is None or own.held.subnets != self._own.held.subnets
        )
        self.counters.lost += own.holding is Holding.LAPSED and self._own.holding is Holding.HELD
        self._own = own
        for listener in self._listeners:
            listener.own_changed(own)

    async def _tell(self, node: Node, lease: Lease) -> None:
        """Write the annotations until they are there."""
        if self._client is None or self._released:
            return
        families = [f for f in map(family_of, lease.subnets) if lease.attrs.address(f) is not None]
        wanted = encode_annotations(told_addresses(node, lease.attrs, self._prefix), families, self._prefix)
        if wanted.items() <= node.metadata.annotations.items():
            return
        backoff = Backoff(self._rng, initial=0.1, maximum=10.0)
        patch = {"metadata": {"annotations": wanted}}
        while True:
            try:
                await self._client.patch(NODES, self._node, patch, subresource="status", kind=PatchKind.STRATEGIC)
            except ApiError as error:
                self.counters.renew_failures += 1
                delay = backoff.next()
                log.warning("node %s cannot say how it is reached: %s; again in %.1f s", self._node, error, delay)
                await asyncio.sleep(delay)
            else:
                self.counters.renewed += 1
                return

    # --- the peers ------------------------------------------------------------------------------------------------

    def _changed(self, change: Change[Node]) -> None:
        name = change.key.name
        if change.old and change.new and _says_the_same(change.old, change.new):
            return
        if name == self._node:
            self._read_own(change.new)
            self._own_changed.set()
            return
        lease = lease_of_node(change.new, self._prefix) if change.new else None
        if self._peers.get(name) == lease:
            return
        if lease is None:
            del self._peers[name]
        else:
            self._peers[name] = lease
        for listener in self._listeners:
            listener.peer_changed(name, lease)


def _says_the_same(old: Node, new: Node) -> bool:
    """Whether nothing that peers read has changed: most changes of Nodes are heartbeats, and each reaches every node."""
    return old.spec == new.spec and old.metadata.annotations == new.metadata.annotations


def _outside(config: NetConfig, cidrs: tuple[IPNetwork, ...]) -> str:
    """Why a Node with these podCIDRs cannot be used; empty where it can."""
    for cidr in cidrs:
        network = config.network(family_of(cidr))
        if network is not None and not _within(cidr, network):
            return f"its podCIDR {cidr} lies outside the network {network}: give both the same range"
    return ""


def _within(cidr: IPNetwork, network: IPNetwork) -> bool:
    return cidr.prefixlen >= network.prefixlen and cidr.network_address in network
