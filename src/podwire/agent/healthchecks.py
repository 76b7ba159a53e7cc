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
from podwire.model.ids import ObjectKey

log = logging.getLogger(__name__)

_AGAIN_SECONDS = 5.0
"""How soon a port is tried again that somebody else listens on."""


@dataclass(slots=True)
class _Port:
    """One Service's: who it is, how many of its pods here are ready, and what listens."""

    service: ObjectKey
    ready: int
    runner: web.AppRunner | None = field(default=None)


class HealthCheckPorts:
    """Follows rounds of changes and serves the ports that its Services ask for.

    The answer is kube-proxy's: 200 while the node has ready endpoints and `healthy`, else 503; how many as JSON, and as the
    weight that balancers may use."""

    def __init__(self, rounds: Rounds, kernel: Kernel, healthy: Callable[[], bool]) -> None:
        self._kernel, self._healthy = kernel, healthy
        self._wanted: dict[ObjectKey, tuple[int, int]] = {}
        self._served: dict[int, _Port] = {}
        self._changed = asyncio.Event()
        rounds.subscribe(self._round)

    @property
    def ports(self) -> dict[int, ObjectKey]:
        """Those that answer."""
        return {number: port.service for number, port in self._served.items()}

    def _round(self, done: Round) -> None:
        for key, served in done.changed.items():
            number = served.table.health_check_port
            new = (number, served.table.local_ready) if number else None
            if new == self._wanted.get(key):
                continue
            if new is None:
                del self._wanted[key]
            else:
                self._wanted[key] = new
                port = self._served.get(number)
                if port is not None and port.service == key:
                    port.ready = new[1]  # at once: this is what connections are steered by
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
        wanted = {number: (key, ready) for key, (number, ready) in self._wanted.items()}
        for number, port in list(self._served.items()):
            if number not in wanted or wanted[number][0] != port.service:
                await self._close(number)
        missing = False
        for number, (key, ready) in wanted.items():
            if number in self._served:
                self._served[number].ready = ready
                continue
            try:
                await self._open(number, _Port(key, ready))
            except OSError as error:
                missing = True
                log.warning("health-check port %d of %s cannot be listened on: %s", number, key, error)
        return missing

    async def _open(self, number: int, port: _Port) -> None:
        async def answer(_: web.Request) -> web.Response:
            return self._answer(port)

        app = web.Application()
        app.router.add_route("*", "/{path:.*}", answer)
        port.runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.2)
        sockets = await self._kernel.listen(number)
        try:
            await port.runner.setup()
            for sock in sockets:
                await web.SockSite(port.runner, sock).start()
        except BaseException:
            await port.runner.cleanup()
            for sock in sockets:
                sock.close()
            raise
        self._served[number] = port

    async def _close(self, number: int) -> None:
        port = self._served.pop(number)
        if port.runner is not None:
            await port.runner.cleanup()

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
