"""Keeps the udp back end's tunnel open: its device may be removed and made anew, its routes are the peers' leases."""

import asyncio
import logging
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Network
from random import Random

from podwire.agent.health import Health
from podwire.agent.overlayd.host import Host, Tunnel
from podwire.client.backoff import Backoff
from podwire.model.errors import Unsupported
from podwire.plan.backends import UdpTunnel
from podwire.plan.backends.udp import DEVICE
from podwire.plan.leases import Lease

log = logging.getLogger(__name__)

Way = tuple[IPv4Network, IPv4Address]


class TunnelKeeper:
    """Set peers at any time; `run` until cancelled."""

    def __init__(self, host: Host, backend: UdpTunnel, health: Health, rng: Random) -> None:
        self._host, self._backend, self._health, self._rng = host, backend, health, rng
        self._ways: dict[str, Way] = {}
        self._tunnel: Tunnel | None = None
        self._ended = asyncio.Event()

    def set_peer(self, node: str, lease: Lease | None) -> None:
        new = self._backend.endpoint(lease) if lease else None
        old = self._ways.pop(node, None)
        if new is not None:
            self._ways[node] = new
        if self._tunnel is None:
            return
        if old is not None and (new is None or new[0] != old[0]):
            self._tunnel.set_route(old[0], None)
        if new is not None:
            self._tunnel.set_route(*new)

    async def run(self) -> None:
        backoff = Backoff(self._rng, initial=0.1, maximum=5.0)
        while True:
            self._ended.clear()
            try:
                self._tunnel = tunnel = self._open()
            except (OSError, Unsupported) as error:
                self._health.failed("udp tunnel", error)
                delay = backoff.next()
                log.warning("the udp tunnel cannot be opened: %s; again in %.2f s", error, delay)
                with suppress(TimeoutError):
                    async with asyncio.timeout(delay):
                        await self._ended.wait()
                continue
            backoff.reset()
            self._health.works("udp tunnel")
            try:
                for way in self._ways.values():
                    tunnel.set_route(*way)
                await self._ended.wait()
            finally:
                self._tunnel = None
                await tunnel.close()

    def _open(self) -> Tunnel:
        return self._host.open_tunnel(DEVICE, self._backend.local, self._backend.config.port, self._ended.set)
