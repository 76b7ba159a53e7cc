"""Health-check node ports: where balancers ask a node whether it has endpoints of a Service (externalTrafficPolicy: Local)."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
from aiohttp import web

from podwire.agent.rounds import Round, Rounds
from podwire.kernel.port import Kernel
from podwire.model.addr import Family, IPAddress, packed_family
from podwire.model.ids import ObjectKey
from podwire.model.servicetable import ServiceTable
from podwire.plan.proxyfacts import EVERYWHERE, ListeningPlaces

log = logging.getLogger(__name__)

_AGAIN_SECONDS = 5.0
"""How soon a port is tried again that somebody else listens on."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What one Service asks for; `families`: those of its ClusterIPs."""

    number: int
    ready: int
    families: frozenset[Family]


@dataclass(slots=True)
class _Port:
    """One Service's: who it is, how many of its pods here are ready, and what listens where; None: no such family here."""

    service: ObjectKey
    ready: int
    runner: web.AppRunner
    sites: dict[IPAddress, web.SockSite | None] = field(default_factory=dict)


class HealthCheckPorts:
    """Follows rounds of changes and serves the ports that its Services ask for.

    The answer is kube-proxy's: 200 while the node has ready endpoints and `healthy`, else 503; how many as JSON, and as the
    weight that balancers may use."""

    def __init__(self, rounds: Rounds, kernel: Kernel, healthy: Callable[[], bool]) -> None:
        self._kernel, self._healthy = kernel, healthy
        self._places = EVERYWHERE
        self._wanted: dict[ObjectKey, _Wanted] = {}
        self._served: dict[int, _Port] = {}
        self._changed = asyncio.Event()
        rounds.subscribe(self._round)

    @property
    def ports(self) -> dict[int, ObjectKey]:
        """Those that answer."""
        return {number: self._served[number].service for number, places in self.listening.items() if places}

    @property
    def listening(self) -> dict[int, frozenset[IPAddress]]:
        """Where each of them listens."""
        return {
            number: frozenset(place for place, site in port.sites.items() if site is not None)
            for number, port in self._served.items()
        }

    def set_places(self, places: ListeningPlaces) -> None:
        """Where they listen from now on; until told, everywhere."""
        if places != self._places:
            self._places = places
            self._changed.set()

    def _round(self, done: Round) -> None:
        for key, served in done.changed.items():
            table = served.table
            number = table.health_check_port
            new = _Wanted(number, table.local_ready, _families(table)) if number else None
            if new == self._wanted.get(key):
                continue
            if new is None:
                del self._wanted[key]
            else:
                self._wanted[key] = new
                port = self._served.get(number)
                if port is not None and port.service == key:
                    port.ready = new.ready  # at once: this is what connections are steered by
            self._changed.set()

    async def run(self) -> None:
        """Until cancelled; then nothing listens any more."""
        try:
            while True:
                self._changed.clear()
                missing = await self._settle()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_AGAIN_SECONDS if missing else None):
                        await self._changed.wait()
        finally:
            for number in list(self._served):
                await self._close(number)

    async def _settle(self) -> bool:
        """Open and close until what listens is what is wanted. Whether some could not be opened."""
        wanted = {new.number: (key, new) for key, new in self._wanted.items()}
        for number, port in list(self._served.items()):
            if number not in wanted or wanted[number][0] != port.service:
                await self._close(number)
        missing = False
        for number, (key, new) in wanted.items():
            port = self._served.get(number) or await self._open(number, key)
            port.ready = new.ready
            places = frozenset[IPAddress]().union(*map(self._places.__getitem__, new.families))
            missing |= await self._fit(number, port, places)
        return missing

    async def _fit(self, number: int, port: _Port, places: frozenset[IPAddress]) -> bool:
        """Listen there and nowhere else. Whether that failed."""
        for place in port.sites.keys() - places:
            if (site := port.sites.pop(place)) is not None:
                await site.stop()
        missing = False
        for place in sorted(places - port.sites.keys(), key=str):
            try:
                port.sites[place] = await self._listen(number, port.runner, place)
            except OSError as error:
                missing = True
                log.warning("health-check port %d of %s cannot be listened on at %s: %s", number, port.service, place, error)
        return missing

    async def _open(self, number: int, service: ObjectKey) -> _Port:
        async def answer(_: web.Request) -> web.Response:
            return self._answer(port)

        app = web.Application()
        app.router.add_route("*", "/{path:.*}", answer)
        port = _Port(service, 0, web.AppRunner(app, access_log=None, shutdown_timeout=0.2))
        await port.runner.setup()
        self._served[number] = port
        return port

    async def _listen(self, number: int, runner: web.AppRunner, place: IPAddress) -> web.SockSite | None:
        """Raises OSError."""
        if (sock := await self._kernel.listen(number, place)) is None:
            return None
        site = web.SockSite(runner, sock)
        try:
            await site.start()
        except BaseException:
            sock.close()
            raise
        return site

    async def _close(self, number: int) -> None:
        await self._served.pop(number).runner.cleanup()

    def _answer(self, port: _Port) -> web.Response:
        healthy = self._healthy()
        document = {
            "service": {"namespace": port.service.namespace, "name": port.service.name},
            "localEndpoints": port.ready,
            "serviceProxyHealthy": healthy,
        }
        headers = {
            "Content-Type": "application/json",
            "X-Content-Type-Options": "nosniff",
            "X-Load-Balancing-Endpoint-Weight": str(port.ready),
        }
        return web.Response(body=msgspec.json.encode(document), status=200 if port.ready and healthy else 503, headers=headers)


def _families(table: ServiceTable) -> frozenset[Family]:
    return frozenset(map(packed_family, table.cluster_ips))
