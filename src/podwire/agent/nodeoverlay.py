"""The node's part in the overlay: its hold on its subnets, and the way to those of the others."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from podwire.agent.health import Health
from podwire.agent.overlayd.tunnelkeeper import TunnelKeeper
from podwire.agent.peers import PeerSync
from podwire.agent.subnets.port import OwnLease, SubnetManager
from podwire.client.informer import Informer
from podwire.model.addr import IPNetwork
from podwire.model.errors import PodwireError, Unsupported
from podwire.model.kernelstate import NetState
from podwire.model.netconf import NetConfig
from podwire.model.objects import Node
from podwire.plan.backends import Backend, UdpTunnel
from podwire.plan.leases import Lease, LeaseAttrs, vxlan_peers
from podwire.plan.overlay import plan_peer
from podwire.plan.states import union

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlay:
    """Which subnet manager and which back end an agent uses; said by who makes the agent.

    subnets: makes the manager; the agent's own copy of all Nodes is there for it. Called again when the node begins anew with
    other subnets. backend: makes the back end that the network's configuration asks for. tunnel: makes what carries the packets
    of the back end udp, which no kernel does."""

    subnets: Callable[[Informer[Node]], SubnetManager]
    backend: Callable[[NetConfig], Backend]
    tunnel: Callable[[UdpTunnel, Health], TunnelKeeper] | None = None


class SubnetsChanged(PodwireError):
    """The node holds other subnets than those it was set up with."""

    def __init__(self, before: tuple[IPNetwork, ...], now: tuple[IPNetwork, ...]) -> None:
        super().__init__(f"the node's subnets were {_words(before)} and are now {_words(now)}")


class NodeOverlay:
    """Listens to the subnet manager. `told`: called with why the node's hold on its subnets has lapsed, "" when it has it."""

    def __init__(
        self,
        manager: SubnetManager,
        peers: PeerSync,
        vni: int,
        told: Callable[[str], None],
        tunnel: Callable[[UdpTunnel], TunnelKeeper] | None = None,
    ) -> None:
        self.manager = manager
        self.backend: Backend | None = None
        self._make_tunnel = tunnel
        self._tunnel: TunnelKeeper | None = None
        self._peers, self._vni, self._told = peers, vni, told
        self._subnets: tuple[IPNetwork, ...] = ()
        self._moved: asyncio.Future[tuple[IPNetwork, ...]] = asyncio.get_running_loop().create_future()

    async def join(self, own: Callable[[NetConfig], Backend] | LeaseAttrs) -> tuple[IPNetwork, ...]:
        """Get the node its subnets; returns them when it holds them. `own`: what makes the back end; or what the peers must
        know of the node, and the back end is VXLAN.

        Raises InvalidInput or Unsupported for a network configuration that cannot be used."""
        config = await self.manager.network_config()
        for warning in config.warnings:
            log.warning("%s", warning)
        if isinstance(own, LeaseAttrs):
            attrs = own
        else:
            self.backend = own(config)
            attrs = self.backend.attrs()
            if isinstance(self.backend, UdpTunnel):
                if self._make_tunnel is None:
                    raise Unsupported("the back end udp in this agent", "choose another, or run `podwire agent`")
                self._tunnel = self._make_tunnel(self.backend)
        self.manager.subscribe(self)
        lease = await self.manager.acquire(attrs)
        self._subnets = lease.subnets
        return lease.subnets

    async def run(self) -> None:
        """Keep the hold until cancelled. Raises SubnetsChanged."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.manager.run())
            now = await self._moved
            raise SubnetsChanged(self._subnets, now)

    async def carry(self) -> None:
        """Carry packets to the others where that is the agent's to do, until cancelled. Start it when the node is adopted."""
        if self._tunnel is not None:
            await self._tunnel.run()

    def withheld(self) -> str:
        """Why no address may be given out of the node's subnets; "" where it may."""
        own = self.manager.own
        return "" if own.held else own.why or "it has none yet"

    # --- what the manager tells -----------------------------------------------------------------------------------

    def peer_changed(self, node: str, lease: Lease | None) -> None:
        self._peers.set(node, self._plan(lease) if lease else NetState())
        if self._tunnel is not None:
            self._tunnel.set_peer(node, lease)

    def own_changed(self, own: OwnLease) -> None:
        held = own.held
        if held is None:
            self._told(own.why)
            return
        self._told("")
        if self._subnets and held.subnets != self._subnets and not self._moved.done():
            self._moved.set_result(held.subnets)

    def _plan(self, lease: Lease) -> NetState:
        if self.backend is None:
            return union(map(plan_peer, vxlan_peers(lease, self._vni)))
        if objection := self.backend.objection(lease):
            log.warning("peer %s: %s", lease.node, objection)
        return self.backend.plan_lease(lease)


def _words(subnets: tuple[IPNetwork, ...]) -> str:
    return ", ".join(map(str, subnets))
