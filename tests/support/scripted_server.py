"""An API server that answers from a script: each request takes the next answer queued for its method and path."""

import asyncio
import ssl
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from aiohttp import web

from podwire.client.api import ApiClient

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ScriptedServer:
    def __init__(self) -> None:
        self.url = ""
        self.answered = 0
        self._progress = asyncio.Event()
        self.requests: list[tuple[str, str, dict[str, str], Any]] = []
        self._answers: dict[tuple[str, str], deque[Answer]] = defaultdict(deque)

    def answer(self, method: str, path: str, document: object, status: int = 200, **headers: str) -> None:
        async def respond(request: web.Request) -> web.StreamResponse:
            body = document if isinstance(document, bytes) else msgspec.json.encode(document)
            return web.Response(body=body, status=status, headers=headers)

        self._answers[method, path].append(respond)

    def hang_up(self, method: str, path: str) -> None:
        """The next such request has its connection broken instead of an answer."""

        async def respond(request: web.Request) -> web.StreamResponse:
            if request.transport is not None:
                request.transport.abort()
            return web.Response()

        self._answers[method, path].append(respond)

    def watch(
        self, path: str, *events: tuple[str, object], hold: bool = False, break_off: bool = False, text: bytes = b""
    ) -> None:
        """The next watch of `path` sends `events` and then `text` as it is, and ends, hangs (`hold`) or breaks the connection
        (`break_off`)."""

        async def respond(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(request)
            for type, obj in events:
                await response.write(msgspec.json.encode({"type": type, "object": obj}) + b"\n")
            await response.write(text)
            if hold:
                await asyncio.Event().wait()
            if break_off and request.transport is not None:
                request.transport.abort()
            return response

        self._answers["WATCH", path].append(respond)

    async def answers_given(self, count: int) -> None:
        """Waits until `count` requests have been answered in all."""
        async with asyncio.timeout(5):
            while self.answered < count:
                self._progress.clear()
                await self._progress.wait()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        method = "WATCH" if request.query.get("watch") else request.method
        data = await request.read()
        body = msgspec.json.decode(data) if data else None
        self.requests.append((method, request.path, dict(request.query), body))
        answers = self._answers[method, request.path]
        if not answers:
            await asyncio.Event().wait()
        response = await answers.popleft()(request)
        self.answered += 1
        self._progress.set()
        return response

    @asynccontextmanager
    async def serve(self, tls: ssl.SSLContext | None = None) -> AsyncIterator[ApiClient]:
        """Yields a client of it; with `tls`, one that does not trust it."""
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", self._handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
        await site.start()
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{runner.addresses[0][1]}"
        try:
            async with ApiClient(self.url, token="secret") as client:
                yield client
        finally:
            await runner.cleanup()
