"""Fixtures: API servers on Unix sockets."""

import itertools
import os
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import aiohttp
import pytest
from apirig import Api, Serve

from podwire.apiserver.app import create_app
from podwire.apiserver.config import ServerConfig
from podwire.apiserver.server import ApiServer, Listener
from podwire.store.memory import MemoryStore
from podwire.store.port import Store

_numbers = itertools.count()


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Starts servers: `await serve(store=…, config=…, token=…)`."""
    async with AsyncExitStack() as stack:

        async def start(store: Store | None = None, config: ServerConfig | None = None, token: str = "") -> Api:
            held = store if store is not None else MemoryStore()
            name = f"\0podwire-test-{os.getpid()}-{next(_numbers)}"
            listening = socket.socket(socket.AF_UNIX)
            listening.bind(name)
            server = ApiServer(create_app(held, config or ServerConfig()))
            stack.push_async_callback(held.close)
            stack.push_async_callback(server.stop)
            listening.listen(64)
            await server.start([Listener(listening)])
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            connector = aiohttp.UnixConnector(name, limit=0)
            session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector, headers=headers))
            return Api(session, held)

        yield start


@pytest.fixture
async def api(serve: Serve) -> Api:
    """A server with nothing in it, on a memory store."""
    return await serve()
