"""A `ServiceSync` that is fed by a case file in the place of an API server."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import count
from random import Random
from typing import Any, TypeVar

import msgspec
from service_cases import feed

from podwire.agent.health import Health
from podwire.agent.proxymodes.nft import NftRules
from podwire.agent.services import ServiceSync
from podwire.client.api import ApiClient
from podwire.client.informer import Informer
from podwire.kernel.port import Kernel
from podwire.model.addr import Family
from podwire.model.ids import ObjectKey
from podwire.model.objects import ApiObject, EndpointSlice, Pod, Service
from podwire.model.resources import ENDPOINTSLICES, SERVICES
from podwire.model.servicetable import NodeFacts

T = TypeVar("T", bound=ApiObject)


class _Given(Informer[T]):
    """Has what it is given."""

    def put(self, key: ObjectKey, obj: T | None) -> None:
        self._change(key, obj)


class FedSync:
    """`service_cases.Fed` for an agent's Services in nftables. Make it and `run` it by `syncing`."""

    def __init__(self, kernel: Kernel) -> None:
        nobody = ApiClient("http://nobody")
        self._services = _Given(nobody, SERVICES, Service)
        self._slices = _Given(nobody, ENDPOINTSLICES, EndpointSlice)
        self._revisions = count(1)
        self.sync = ServiceSync(
            kernel, self._services, self._slices, Health(), Random(1), lambda facts: NftRules(kernel, facts)
        )

    def set_service(self, key: ObjectKey, service: Service | None, slices: Sequence[EndpointSlice] = ()) -> None:
        self._services.put(key, self._new(service) if service else None)
        mine = {ObjectKey(key.namespace, f"{key.name}-{number}"): piece for number, piece in enumerate(slices)}
        for name, held in list(self._slices.items().items()):
            if held.service == key.name and name not in mine:
                self._slices.put(name, None)
        for name, piece in mine.items():
            self._slices.put(name, self._new(piece))

    def set_host_ports(self, uid: str, pod: Pod | None) -> None:
        self.sync.set_host_ports(uid, pod)

    async def feed(self, items: Iterable[dict[str, Any]], family: Family) -> None:
        """Returns when the kernel has what follows from these objects."""
        for item in items:
            feed(self, item, family)
        async with asyncio.timeout(10):
            while not self.sync.idle:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.002)

    def _new(self, obj: T) -> T:
        metadata = msgspec.structs.replace(obj.metadata, resource_version=str(next(self._revisions)))
        return msgspec.structs.replace(obj, metadata=metadata)


@asynccontextmanager
async def syncing(kernel: Kernel, facts: NodeFacts, items: Iterable[dict[str, Any]], family: Family) -> AsyncIterator[FedSync]:
    """An agent that begins with these objects, once the kernel has what follows from them. Its rules stay when it ends."""
    fed = FedSync(kernel)
    for item in items:
        feed(fed, item, family)
    running = asyncio.create_task(fed.sync.run(facts))
    try:
        await fed.feed((), family)
        yield fed
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
