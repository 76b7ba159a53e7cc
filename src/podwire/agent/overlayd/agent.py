"""The agent behind `podwire agent`: flanneld's job.

    configuration → underlay → back end → lease → own devices, files, rules → peers; and repair, from then on

What it was told and found (configuration, underlay, back end) is a `Setup`. When another one is called for, the agent lives on,
and takes the host over once more, as an agent that starts would.

An agent that ends takes nothing with it: devices, routes and rules stay, pods go on, and the next agent adopts them.
"""

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from podwire.agent.health import Health
from podwire.agent.overlayd.files import docker_options, subnet_env, write_atomically
from podwire.agent.overlayd.host import Host
from podwire.agent.overlayd.rules import ForwardRules, MasqueradeRules
from podwire.agent.overlayd.setup import Setup, SetupMaker
from podwire.agent.overlayd.status import OverlayStatus
from podwire.agent.overlayd.surroundings import Surroundings
from podwire.agent.overlayd.tunnelkeeper import TunnelKeeper
from podwire.agent.peers import PeerSync
from podwire.agent.plumbing import Plumbing, PlumbingError
from podwire.agent.repair import Repair
from podwire.agent.subnets.port import Holding, OwnLease, SubnetManager
from podwire.client.backoff import Backoff
from podwire.kernel.port import Kernel, KernelError
from podwire.model.addr import IPAddress, IPNetwork
from podwire.model.kernelstate import NetState
from podwire.model.ops import DelLink
from podwire.plan.backends import UdpTunnel
from podwire.plan.ipmasq import masquerade_rules, no_rules
from podwire.plan.leases import Lease
from podwire.plan.overlayhost import in_the_way
from podwire.plan.underlay import Wish

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlayOptions:
    """What the command line says. node: the name from which a VXLAN device's MAC follows.

    can_reach: choose the interface that leads there. docker_file: None for none. resync: seconds between looks at iptables.
    blackhole: what goes to an own subnet that no device has is dropped."""

    node: str
    wish: Wish = field(default_factory=Wish)
    can_reach: IPAddress | None = None
    masquerade: bool = False
    fully_random: bool = True
    forward_rules: bool = True
    resync: float = 5.0
    blackhole: bool = False
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
        self._maker = SetupMaker(
            host=host,
            node=options.node,
            wish=options.wish,
            can_reach=options.can_reach,
            wireguard_key=options.wireguard_key,
        )
        self._surroundings = Surroundings(self._maker, kernel, subnets, self._health, self._turn_to)
        self._setup: Setup | None = None
        self._next: Setup | None = None
        """The one that there should be instead."""
        self._changed = asyncio.Event()
        """The own lease, or `_next`."""
        self._ready = asyncio.Event()
        self._refused: dict[str, str] = {}
        self._tunnel: TunnelKeeper | None = None
        self._mtu = 0

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
            backend=self._setup.backend.type if self._setup else "",
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
        setup = self._maker.make(config, await self._kernel.observe_devices())
        log.info("interface %s with %s", setup.underlay.device, _words(setup.underlay.interfaces))
        self._use(setup)
        lease = await self._subnets.acquire(setup.backend.attrs())
        log.info("leased %s", _words(lease.subnets))
        self._subnets.subscribe(self)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._subnets.run())
            group.create_task(self._follow_surroundings())
            telling: asyncio.Task[None] | None = None
            while True:
                following = await self._live(setup)
                log.warning("the host is set up anew: %s", _difference(setup, following))
                if following.backend.attrs() != setup.backend.attrs():
                    if telling is not None:
                        telling.cancel()
                    telling = group.create_task(self._subnets.update(following.backend.attrs()))
                setup = following
                self._use(setup)
                for node, peer in self._subnets.peers.items():
                    self.peer_changed(node, peer)

    def _use(self, setup: Setup) -> None:
        self._setup, self._next = setup, None
        self._ready.clear()
        self._refused.clear()
        self._surroundings.in_use(setup)
        self._tunnel = None
        if isinstance(setup.backend, UdpTunnel):
            self._tunnel = TunnelKeeper(self._host, setup.backend, self._health, self._rng)

    async def _follow_surroundings(self) -> None:
        await self._ready.wait()
        await self._surroundings.run()

    def _turn_to(self, setup: Setup) -> None:
        self._next = setup
        self._changed.set()

    async def _live(self, setup: Setup) -> Setup:
        """Take the host over with this setup and keep it so; returns the one that is called for next."""
        own = self._subnets.own.lease
        assert own is not None, "acquire has returned"
        following = await self._adopt(setup, own.subnets)
        if following is not None:
            return following
        repair = Repair(self._kernel, self._plumbing, self._masquerade, self._health, self._rng, self._surroundings.heard)
        async with asyncio.TaskGroup() as life:
            work = [repair.run(), self._peers.run(repair), self._masquerade.run(), self._become_ready()]
            if self._options.forward_rules:
                networks = setup.config.networks
                work.append(ForwardRules(self._host.run_command, networks, self._health, self._options.resync).run())
            if self._tunnel is not None:
                work.append(self._tunnel.run())
            tasks = [life.create_task(one) for one in work]
            following = await self._follow_own(setup, own.subnets, repair)
            for task in tasks:
                task.cancel()
        return following

    async def _become_ready(self) -> None:
        await self._masquerade.programmed()
        self._ready.set()
        self._surroundings.look()

    # --- taking over ----------------------------------------------------------------------------------------------

    async def _adopt(self, setup: Setup, subnets: tuple[IPNetwork, ...]) -> Setup | None:
        """Take the host over as it is; tries until the kernel agrees, or (returned) another setup is called for."""
        backoff = Backoff(self._rng, initial=0.1, maximum=10.0)
        base = setup.base(subnets, blackhole=self._options.blackhole)
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
                self._surroundings.look()
                if self._next is not None:
                    return self._next
                continue
            self._health.works("links")
            self._peers.adopted(known)
            self._write(setup, subnets)
            log.info("this host and %d peers programmed in %.3f s", len(known), asyncio.get_running_loop().time() - started)
            return None

    async def _clear_the_way(self, base: NetState) -> None:
        strangers = in_the_way(base, await self._kernel.observe_devices())
        for link in strangers:
            log.warning("%s was made by somebody else with other settings: it is made anew", link.name)
        if strangers:
            await self._kernel.apply(tuple(DelLink(link.name) for link in strangers))

    def _write(self, setup: Setup, subnets: tuple[IPNetwork, ...]) -> None:
        """The rules and files that follow from the node's subnets."""
        options, networks, mtu = self._options, setup.config.networks, setup.backend.mtu
        if self._mtu and mtu != self._mtu:
            log.warning("pods that are made from now on have an MTU of %d, not %d; the others keep theirs", mtu, self._mtu)
        self._mtu = mtu
        wanted = masquerade_rules(networks, subnets, fully_random=options.fully_random)
        self._masquerade.set(wanted if options.masquerade else no_rules())
        write_atomically(options.subnet_file, subnet_env(networks, subnets, mtu, masquerade=options.masquerade))
        if options.docker_file is not None:
            write_atomically(options.docker_file, docker_options(subnets, mtu, masquerade=options.masquerade))

    # --- the own lease --------------------------------------------------------------------------------------------

    async def _follow_own(self, setup: Setup, subnets: tuple[IPNetwork, ...], repair: Repair) -> Setup:
        """When the lease is lost and another one got, the node's own devices follow; its pods keep their addresses until
        they are made anew. Returns the setup that is called for next."""
        while True:
            if self._next is not None:
                return self._next
            await self._changed.wait()
            self._changed.clear()
            held = self._subnets.own.held
            if held is None or held.subnets == subnets:
                continue
            log.warning("this node has other subnets now: %s instead of %s", _words(held.subnets), _words(subnets))
            subnets = held.subnets
            try:
                await self._plumbing.set_base(setup.base(subnets, blackhole=self._options.blackhole))
            except (PlumbingError, KernelError) as error:
                log.warning("%s; left to repair", error)
                repair.request_check()
            self._write(setup, subnets)
            self._surroundings.lease_changed()

    # --- told by the subnet manager -------------------------------------------------------------------------------

    def own_changed(self, own: OwnLease) -> None:
        if own.holding is Holding.LAPSED:
            log.warning("this node's lease is not held any more: %s", own.why)
        self._changed.set()

    def peer_changed(self, node: str, lease: Lease | None) -> None:
        assert self._setup is not None
        backend = self._setup.backend
        objection = backend.objection(lease) if lease else ""
        if objection and self._refused.get(node) != objection:
            log.warning("peer %s is left out: %s", node, objection)
        if objection:
            self._refused[node] = objection
        else:
            self._refused.pop(node, None)
        self._peers.set(node, backend.plan_lease(lease) if lease else NetState())
        if self._tunnel is not None:
            self._tunnel.set_peer(node, lease)


def _difference(before: Setup, after: Setup) -> str:
    """What is other than it was."""
    words = []
    if before.underlay.device != after.underlay.device:
        words.append(f"interface {after.underlay.device} instead of {before.underlay.device}")
    if before.underlay.interfaces != after.underlay.interfaces:
        words.append(f"addresses {_words(after.underlay.interfaces)} instead of {_words(before.underlay.interfaces)}")
    if before.underlay.mtu != after.underlay.mtu:
        words.append(f"the interface's MTU is {after.underlay.mtu}, not {before.underlay.mtu}")
    if before.config != after.config:
        words.append(f"the network configuration has changed (back end {after.backend.type})")
    return ", ".join(words)


def _words(things: Iterable[object]) -> str:
    return ", ".join(map(str, things))
