"""The agent behind `podwire agent`: flanneld's job.

    configuration → underlay → back end → lease → own devices, files, rules → peers; and repair, from then on

An agent that ends takes nothing with it: devices, routes and rules stay, pods go on, and the next agent adopts them.
"""

import asyncio
import logging
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from random import Random

from podwire.agent.health import Health
from podwire.agent.overlayd.files import docker_options, subnet_env, wireguard_keys, write_atomically
from podwire.agent.overlayd.host import Host
from podwire.agent.overlayd.rules import ForwardRules, MasqueradeRules
from podwire.agent.overlayd.status import OverlayStatus
from podwire.agent.overlayd.tunnelkeeper import TunnelKeeper
from podwire.agent.peers import PeerSync
from podwire.agent.plumbing import Plumbing, PlumbingError
from podwire.agent.repair import Repair
from podwire.agent.subnets.port import Holding, OwnLease, SubnetManager
from podwire.client.backoff import Backoff
from podwire.kernel.port import Kernel, KernelError
from podwire.model.addr import Family, IPAddress, IPNetwork
from podwire.model.kernelstate import NetState
from podwire.model.netconf import NetConfig, WireguardBackend
from podwire.model.ops import DelLink
from podwire.plan.backends import Backend, UdpTunnel, Underlay, make_backend
from podwire.plan.ipmasq import masquerade_rules, no_rules
from podwire.plan.leases import Lease
from podwire.plan.overlayhost import in_the_way, plan_overlay_host, switches_to_read
from podwire.plan.underlay import Routing, Wish, choose_underlay

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlayOptions:
    """What the command line says. node: the name from which a VXLAN device's MAC follows.

    can_reach: choose the interface that leads there. docker_file: None for none. resync: seconds between looks at iptables."""

    node: str
    wish: Wish = field(default_factory=Wish)
    can_reach: IPAddress | None = None
    masquerade: bool = False
    fully_random: bool = True
    forward_rules: bool = True
    resync: float = 5.0
    subnet_file: Path = Path("/run/flannel/subnet.env")
    docker_file: Path | None = None
    wireguard_key: Path = Path("/run/flannel/wgkey")


class OverlayAgent:
    """`run` until cancelled; kernel and subnet manager are the caller's to close."""

    def __init__(
        self, options: OverlayOptions, kernel: Kernel, subnets: SubnetManager, host: Host, rng: Random | None = None
    ) -> None:
        self._options, self._kernel, self._subnets, self._host = options, kernel, subnets, host
        self._rng = rng or Random()
        self._health = Health()
        self._plumbing = Plumbing(kernel)
        self._peers = PeerSync(self._plumbing)
        self._masquerade = MasqueradeRules(kernel, self._health, self._rng)
        self._own_changed = asyncio.Event()
        self._ready = asyncio.Event()
        self._refused: dict[str, str] = {}
        self._backend: Backend | None = None
        self._underlay: Underlay | None = None
        self._tunnel: TunnelKeeper | None = None
        self._switches: dict[str, str] = {}

    async def ready(self) -> None:
        """Returns once the node's network is programmed and the files are written for the first time."""
        await self._ready.wait()

    @property
    def idle(self) -> bool:
        """Whether the kernel holds what the peers' leases say."""
        return self._ready.is_set() and self._peers.idle

    def status(self) -> OverlayStatus:
        own = self._subnets.own
        return OverlayStatus(
            node=self._options.node,
            backend=self._backend.type if self._backend else "",
            programmed=self._ready.is_set(),
            holding=own.holding,
            why=own.why,
            peers=len(self._subnets.peers) - len(self._refused),
            refused=dict(self._refused),
            repaired=dict(self._health.repaired),
            apply_seconds=self._peers.apply_seconds,
            counters=self._subnets.counters,
            degraded=self._health.degraded | self._plumbing.refused_sysctls,
        )

    async def run(self) -> None:
        """Raises InvalidInput or Unsupported for a configuration that cannot be used on this host, OSError for files."""
        config = await self._subnets.network_config()
        for warning in config.warnings:
            log.warning("%s", warning)
        self._host.require(config.backend.type)
        self._underlay = underlay = self._choose(config, await self._kernel.observe())
        log.info("interface %s with %s", underlay.device, ", ".join(str(i) for i in underlay.interfaces))
        self._backend = backend = self._make_backend(config, underlay)
        self._switches = {key: self._host.read_switch(key) for key in switches_to_read(underlay)}
        if isinstance(backend, UdpTunnel):
            local = underlay.local(Family.IPV4)
            assert isinstance(local, IPv4Address)
            self._tunnel = TunnelKeeper(self._host, backend, local, self._health, self._rng)
        lease = await self._subnets.acquire(backend.attrs())
        log.info("leased %s", ", ".join(map(str, lease.subnets)))
        self._subnets.subscribe(self)
        await self._adopt(config, lease.subnets)
        repair = Repair(self._kernel, self._plumbing, self._masquerade, self._health, self._rng)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._subnets.run())
            group.create_task(repair.run())
            group.create_task(self._peers.run(repair))
            group.create_task(self._masquerade.run())
            if self._options.forward_rules:
                rules = ForwardRules(self._host.run_command, config.networks, self._health, self._options.resync)
                group.create_task(rules.run())
            if self._tunnel is not None:
                group.create_task(self._tunnel.run())
            await self._masquerade.programmed()
            self._ready.set()
            await self._follow_own(config, lease.subnets, repair)

    # --- at start -------------------------------------------------------------------------------------------------

    def _choose(self, config: NetConfig, state: NetState) -> Underlay:
        options, families = self._options, config.families
        all_needed = not (isinstance(config.backend, WireguardBackend) and config.backend.mode != "separate")
        if options.can_reach is not None and not (options.wish.names or options.wish.patterns):
            source = self._host.source_towards(options.can_reach)
            wish = Wish(names=(str(source),) if source else (f"towards {options.can_reach}",), public=options.wish.public)
            return choose_underlay(state, wish, Routing(devices={}), families, all_needed=all_needed)
        devices = {family: self._host.default_device(family) for family in families}
        sources = (self._host.source_towards(_elsewhere(family)) for family in families)
        routing = Routing(devices=devices, sources=tuple(filter(None, sources)))
        return choose_underlay(state, options.wish, routing, families, all_needed=all_needed)

    def _make_backend(self, config: NetConfig, underlay: Underlay) -> Backend:
        keys = wireguard_keys(self._options.wireguard_key) if isinstance(config.backend, WireguardBackend) else None
        return make_backend(config, underlay, self._options.node, keys)

    async def _adopt(self, config: NetConfig, subnets: tuple[IPNetwork, ...]) -> None:
        """Take the host over as it is; tries until the kernel agrees."""
        backoff = Backoff(self._rng, initial=0.1, maximum=10.0)
        base = self._base(subnets)
        while True:
            started = asyncio.get_running_loop().time()
            known = self._peers.wanted()
            try:
                await self._clear_the_way(base)
                await self._plumbing.adopt(base, known, ())
            except (PlumbingError, KernelError) as error:
                self._health.failed("links", error)
                delay = backoff.next()
                log.warning("the node cannot be programmed: %s; again in %.2f s", error, delay)
                await asyncio.sleep(delay)
                continue
            self._health.works("links")
            self._peers.adopted(known)
            self._write(config, subnets)
            log.info("this host and %d peers programmed in %.3f s", len(known), asyncio.get_running_loop().time() - started)
            return

    async def _clear_the_way(self, base: NetState) -> None:
        strangers = in_the_way(base, await self._kernel.observe())
        for link in strangers:
            log.warning("%s was made by somebody else with other settings: it is made anew", link.name)
        if strangers:
            await self._kernel.apply(tuple(DelLink(link.name) for link in strangers))

    # --- the own lease --------------------------------------------------------------------------------------------

    def _base(self, subnets: tuple[IPNetwork, ...]) -> NetState:
        assert self._backend is not None
        assert self._underlay is not None
        return plan_overlay_host(self._backend, self._underlay, subnets, self._switches)

    def _write(self, config: NetConfig, subnets: tuple[IPNetwork, ...]) -> None:
        """The rules and files that follow from the node's subnets."""
        assert self._backend is not None
        options, mtu = self._options, self._backend.mtu
        wanted = masquerade_rules(config.networks, subnets, fully_random=options.fully_random)
        self._masquerade.set(wanted if options.masquerade else no_rules())
        write_atomically(options.subnet_file, subnet_env(config.networks, subnets, mtu, masquerade=options.masquerade))
        if options.docker_file is not None:
            write_atomically(options.docker_file, docker_options(subnets, mtu, masquerade=options.masquerade))

    async def _follow_own(self, config: NetConfig, subnets: tuple[IPNetwork, ...], repair: Repair) -> None:
        """When the lease is lost and another one got, the node's own devices follow; its pods keep their addresses until
        they are made anew."""
        while True:
            await self._own_changed.wait()
            self._own_changed.clear()
            held = self._subnets.own.held
            if held is None or held.subnets == subnets:
                continue
            log.warning("this node has other subnets now: %s instead of %s", _words(held.subnets), _words(subnets))
            subnets = held.subnets
            try:
                await self._plumbing.set_base(self._base(subnets))
            except (PlumbingError, KernelError) as error:
                log.warning("%s; left to repair", error)
                repair.request_check()
            self._write(config, subnets)

    # --- told by the subnet manager -------------------------------------------------------------------------------

    def own_changed(self, own: OwnLease) -> None:
        if own.holding is Holding.LAPSED:
            log.warning("this node's lease is not held any more: %s", own.why)
        self._own_changed.set()

    def peer_changed(self, node: str, lease: Lease | None) -> None:
        assert self._backend is not None
        objection = self._backend.objection(lease) if lease else ""
        if objection and self._refused.get(node) != objection:
            log.warning("peer %s is left out: %s", node, objection)
        if objection:
            self._refused[node] = objection
        else:
            self._refused.pop(node, None)
        self._peers.set(node, self._backend.plan_lease(lease) if lease else NetState())
        if self._tunnel is not None:
            self._tunnel.set_peer(node, lease)


def _elsewhere(family: Family) -> IPAddress:
    """Addresses for documentation: whoever asks how they are reached learns of the default route."""
    return IPv4Address("192.0.2.1") if family is Family.IPV4 else IPv6Address("2001:db8::1")


def _words(subnets: tuple[IPNetwork, ...]) -> str:
    return ", ".join(map(str, subnets))
