"""The API server on sockets: several listeners, TLS or plain, one application."""

import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass

from aiohttp import web

BACKLOG = 4096
"""Connections that may wait to be accepted (the kernel cuts it to net.core.somaxconn): hundreds of agents start at once."""

STOP_SECONDS = 2.0
"""How long requests may take to end when the server stops."""


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening socket that someone else opened (in whatever namespace); without `tls` it speaks plain HTTP."""

    sock: socket.socket
    tls: ssl.SSLContext | None = None


class ApiServer:
    """`start` it, `listen` on more sockets at any time, `stop` it."""

    def __init__(self, app: web.Application) -> None:
        # A handler whose client has gone is cancelled: a watch would otherwise wait for its next event.
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=STOP_SECONDS)

    async def start(self, listeners: Sequence[Listener]) -> None:
        """Load the state, then serve. The sockets are the server's from now on."""
        await self._runner.setup()
        for listener in listeners:
            await self.listen(listener)

    async def listen(self, listener: Listener) -> None:
        await web.SockSite(self._runner, listener.sock, ssl_context=listener.tls, backlog=BACKLOG).start()

    async def stop(self) -> None:
        await self._runner.cleanup()
