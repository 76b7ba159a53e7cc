"""A real API server on a Unix socket, and a client that shows everything it answers."""

import asyncio
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from podwire.store.port import Store

Json = dict[str, Any]


@dataclass
class Answer:
    """One response. `doc` is the decoded JSON body."""

    code: int
    body: bytes
    headers: Mapping[str, str]
    warnings: list[str] = field(default_factory=list)

    @property
    def doc(self) -> Any:
        return json.loads(self.body)


class Stream:
    """A watch: `next()` gives one event and fails if none comes."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response

    async def next(self) -> Json:
        line = await asyncio.wait_for(self.response.content.readline(), 5)
        assert line, "the watch ended"
        event: Json = json.loads(line)
        return event

    async def take(self, count: int) -> list[tuple[str, str]]:
        """(type, name) of the next events."""
        events = [await self.next() for _ in range(count)]
        return [(e["type"], e["object"]["metadata"].get("name", "")) for e in events]

    async def ended(self) -> bool:
        return await asyncio.wait_for(self.response.content.readline(), 5) == b""


class Api:
    """HTTP against one server."""

    def __init__(self, session: aiohttp.ClientSession, store: Store) -> None:
        self.session, self.store = session, store

    async def __call__(self, method: str, path: str, body: object = None, **headers: str) -> Answer:
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        sent = {"Content-Type": "application/json"} if body is not None else {}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        # aiohttp warns of bytes above 1 MiB, for they are written in one go.
        big = io.BytesIO(data) if data is not None and len(data) > 1 << 20 else data
        async with self.session.request(method, "http://api" + path, data=big, headers=sent) as response:
            return Answer(response.status, await response.read(), response.headers, response.headers.getall("Warning", []))

    async def ok(self, method: str, path: str, body: object = None, **headers: str) -> Any:
        answer = await self(method, path, body, **headers)
        assert answer.code < 300, answer.body
        return answer.doc

    async def fails(self, code: int, method: str, path: str, body: object = None, **headers: str) -> Any:
        answer = await self(method, path, body, **headers)
        assert answer.code == code, answer.body
        document = answer.doc
        assert (document["kind"], document["status"], document["code"]) == ("Status", "Failure", code)
        return document

    @asynccontextmanager
    async def watch(self, path: str, **headers: str) -> AsyncIterator[Stream]:
        async with self.session.get("http://api" + path, headers=headers) as response:
            assert response.status == 200, await response.text()
            yield Stream(response)

    async def configmap(self, name: str, namespace: str = "default", **labels: str) -> Any:
        body = {"metadata": {"name": name, "labels": labels}}
        return await self.ok("POST", f"/api/v1/namespaces/{namespace}/configmaps", body)

    async def pod(self, name: str, **spec: Any) -> Any:
        body = {"metadata": {"name": name}, "spec": {"containers": [{"name": "main", "image": "x"}], **spec}}
        return await self.ok("POST", "/api/v1/namespaces/default/pods", body)


Serve = Callable[..., Awaitable[Api]]
