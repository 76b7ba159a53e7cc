"""From a lab's name to a client of its API server. Imports what is heavy only when called."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from podwire.lab.state import LabDirectory, state_root
from podwire.model.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from podwire.client.api import ApiClient

T = TypeVar("T")


def lab_directory(name: str) -> LabDirectory:
    """Where the lab of this name is, or would be, for the calling user."""
    return LabDirectory(state_root(os.environ, os.geteuid()), name)


def with_client(name: str, work: "Callable[[ApiClient], Awaitable[T]]") -> T:
    """Run `work` on a client of the lab that is up under this name. Raises LabError when there is none."""
    directory = lab_directory(name)
    directory.live_record()
    return with_kubeconfig(directory.kubeconfig, work)


def with_kubeconfig(path: Path, work: "Callable[[ApiClient], Awaitable[T]]") -> T:
    """Run `work` on a client of the cluster that a kubeconfig names. Raises InvalidInput where that cannot be used."""
    import asyncio

    from podwire.client.errors import Unauthorized
    from podwire.client.kubeconfig import client_from_kubeconfig

    async def run() -> T:
        async with client_from_kubeconfig(path) as client:
            return await work(client)

    try:
        return asyncio.run(run())
    except Unauthorized as error:
        raise InvalidInput(f"{path}: the API server does not take these credentials; get a new kubeconfig for it") from error


async def ask_lab(client: "ApiClient", method: str, path: str) -> bytes:
    """A request to the lab itself (`podwire.lab.control`), which may take as long as what it asks for. Raises ApiError."""
    from contextlib import aclosing

    async with aclosing(client.stream(method, path)) as chunks:
        return b"".join([chunk async for chunk in chunks])
