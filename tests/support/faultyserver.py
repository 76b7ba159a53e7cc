"""An API server that has bad days: what it answers to one client is changed on the way, as said, the rest is real."""

import asyncio
import json
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web
from rbacrig import Right, right_for

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
EXPIRED = {"kind": "Status", "status": "Failure", "reason": "Expired", "code": 410, "message": "too old resource version"}


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer instead of the real one."""

    status: int
    body: str = ""
    retry_after: str = ""


class Faults:
    """A middleware for `create_app`. Concerned are requests whose User-Agent begins with `user_agent`.

    token: the only good one, where it is set. rights: what was asked for. unauthorized: how often the token was not good."""

    def __init__(self, user_agent: str) -> None:
        self.token = ""
        self.away = False
        self.rights: set[Right] = set()
        self.unauthorized = 0
        self._user_agent = user_agent
        self._instead: dict[tuple[str, str], deque[Refusal]] = defaultdict(deque)
        self._open: dict[int, web.Request] = {}
        self._changed = asyncio.Event()

    def answer(self, verb: str, plural: str, *refusals: Refusal) -> None:
        """The next requests (verb: list or watch) get these."""
        self._instead[verb, plural] += refusals

    def break_off(self) -> None:
        """Cut every watch that is open, at once and with nothing said."""
        for request in self._open.values():
            if request.transport is not None:
                request.transport.abort()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Returns when it holds; looked at after each request."""
        async with asyncio.timeout(20):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    @property
    def used_up(self) -> bool:
        """Whether every answer that was prepared has been given."""
        return not any(self._instead.values())

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if not request.headers.get("User-Agent", "").startswith(self._user_agent):
            return await handler(request)
        verb, _, plural = right = right_for(request) or ("get", "", request.path)
        self.rights.add(right)
        self._changed.set()
        if self.away:
            return web.Response(status=503)
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            self.unauthorized += 1
            return web.Response(status=401, text="Unauthorized")
        if self._instead[verb, plural]:
            return _refuse(self._instead[verb, plural].popleft())
        if verb != "watch":
            return await handler(request)
        self._open[id(request)] = request
        try:
            return await handler(request)
        finally:
            del self._open[id(request)]


def _refuse(refusal: Refusal) -> web.Response:
    headers = {"Retry-After": refusal.retry_after} if refusal.retry_after else {}
    return web.Response(status=refusal.status, text=refusal.body, headers=headers)


def events(*pairs: tuple[str, object]) -> str:
    """The text of a watch: (type, object) each."""
    return "".join(json.dumps({"type": kind, "object": document}) + "\n" for kind, document in pairs)
