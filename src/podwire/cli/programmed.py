"""Reads nodes' acknowledgements of Services out of any API server, once or until they are what one waits for."""

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, TypeVar

import msgspec

from podwire.cli.removals import SERVICE_NAME, Removals
from podwire.client.api import ApiClient
from podwire.client.errors import NotFound
from podwire.client.informer import Change, Informer
from podwire.client.served import decode_served, list_served
from podwire.model.acknowledgement import LABEL, LABEL_VALUE, NAMESPACE, Acknowledgement, read_lease
from podwire.model.errors import InvalidInput, PodwireError
from podwire.model.ids import ObjectKey
from podwire.model.objects import ApiObject, EndpointSlice, Lease, Node, Service
from podwire.model.resources import ENDPOINTSLICES, LEASES, NAMESPACES, NODES, SERVICES, Resource
from podwire.model.timestamps import format_micro_time
from podwire.plan.programmed import Programmed, programmed, void

T = TypeVar("T", bound=ApiObject)
Clock = Callable[[], datetime]
_SELECTOR = f"{LABEL}={LABEL_VALUE}"
_SLICES = "!service.kubernetes.io/headless"


class NotProgrammed(PodwireError):
    """The time is over, and some nodes are late."""


def _utc_now() -> datetime:
    return datetime.now(UTC)


async def read_all(client: ApiClient, namespace: str, clock: Clock = _utc_now) -> list[dict[str, Any]]:
    """Every Service (of a namespace) as `podwire status services -o json` shows it. Raises ApiError, InvalidInput."""
    services = await _list(client, SERVICES, Service, namespace or None)
    if namespace and not services:
        await _exists(client, namespace)
    listed, revision = await _list_at(client, ENDPOINTSLICES, EndpointSlice, namespace or None, _SLICES)
    removals = Removals(client, listed, revision, namespace=namespace or None, labels=_SLICES)
    slices: dict[ObjectKey, list[EndpointSlice]] = {}
    for piece in listed:
        slices.setdefault(ObjectKey(piece.metadata.namespace, piece.service), []).append(piece)
    nodes = await _list(client, NODES, Node)
    words = _words(await _list(client, LEASES, Lease, NAMESPACE, _SELECTOR))
    silent = void(words, nodes, clock())
    acks = {name: ack for name, ack in words.items() if name not in silent}
    await removals.learn(acks.values())
    rows = []
    for service in sorted(services, key=lambda service: service.key):
        unaware = removals.unaware(service.key, acks.values())
        found = programmed(service, slices.get(service.key, ()), nodes, acks, unaware)
        rows.append(
            {
                "namespace": service.key.namespace,
                "name": service.key.name,
                "programmed": list(found.on),
                "late": list(found.late),
                "absent": list(found.absent),
                "at": format_micro_time(found.at) if found.at else None,
                "why": found.why,
                "silent": {name: silent[name] for name in (*found.late, *found.absent) if name in silent},
            }
        )
    return rows


async def _exists(client: ApiClient, namespace: str) -> None:
    try:
        await client.get(NAMESPACES, namespace)
    except NotFound:
        raise InvalidInput(f"there is no namespace {namespace}") from None


async def wait_programmed(client: ApiClient, namespace: str, name: str, seconds: float, clock: Clock = _utc_now) -> str:
    """Returns a sentence once it is so. Raises NotProgrammed, InvalidInput for a Service that nodes do not serve, NotFound."""
    key = ObjectKey(namespace, name)
    with suppress(NotFound):
        await client.get(SERVICES, name, namespace)
        return await _Wait(client, key, clock).run(seconds)
    raise InvalidInput(f"there is no Service {key}; `podwire status services` lists them")


class _Wait:
    """Watches what the answer depends on."""

    def __init__(self, client: ApiClient, key: ObjectKey, clock: Clock) -> None:
        self._key, self._clock = key, clock
        space = key.namespace
        self._client = client
        self._labels = of_service = f"{SERVICE_NAME}={key.name},{_SLICES}"
        self._services = Informer(client, SERVICES, Service, namespace=space, field_selector=f"metadata.name={key.name}")
        self._slices = Informer(client, ENDPOINTSLICES, EndpointSlice, namespace=space, label_selector=of_service)
        self._nodes = Informer(client, NODES, Node)
        self._leases = Informer(client, LEASES, Lease, namespace=NAMESPACE, label_selector=_SELECTOR)
        self._changed = asyncio.Event()
        self._found = Programmed()
        self._removals: Removals | None = None
        self._removed_live = False
        self._since = 0
        self._heard: set[str] = set()
        """Nodes that gave their word while this waited."""
        self._silent: dict[str, str] = {}
        self._slices.subscribe(self._slice_changed)
        self._leases.subscribe(self._lease_changed)

    async def run(self, seconds: float) -> str:
        informers: tuple[Informer[Any], ...] = (self._services, self._slices, self._nodes, self._leases)
        for informer in informers:
            informer.subscribe(lambda _: self._changed.set())
        running = [asyncio.create_task(informer.run()) for informer in informers]
        try:
            async with asyncio.timeout(seconds):
                for informer in informers:
                    await informer.synced()
                while True:
                    self._changed.clear()
                    if await self._look():
                        break
                    await self._changed.wait()
        except TimeoutError:
            late = ", ".join(map(self._shown, self._found.late)) or "any node"
            raise NotProgrammed(f"after {seconds:g} s Service {self._key} is not programmed on {late}") from None
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        found = self._found
        absent = f"; not ready: {', '.join(found.absent)}" if found.absent else ""
        return f"Service {self._key} is programmed on {', '.join(found.on)}{absent}"

    def _slice_changed(self, change: Change[EndpointSlice]) -> None:
        self._removed_live |= change.new is None

    def _lease_changed(self, change: Change[Lease]) -> None:
        if change.old and change.new and change.old.spec.renew_time != change.new.spec.renew_time:
            self._heard.update(_words((change.new,)))

    def _shown(self, node: str) -> str:
        return f"{node} (which {self._silent[node]})" if node in self._silent else node

    async def _look(self) -> bool:
        service = self._services.get(self._key)
        if service is None:
            raise InvalidInput(f"Service {self._key} was deleted")
        words, nodes = _words(self._leases.items().values()), self._nodes.items().values()
        self._silent = void(words, nodes, self._clock(), self._heard)
        acks = {name: ack for name, ack in words.items() if name not in self._silent}
        slices, revision = tuple(self._slices.items().values()), self._slices.resource_version
        if self._removals is None:
            self._removals = Removals(self._client, slices, revision, namespace=self._key.namespace, labels=self._labels)
        elif self._removed_live:
            self._since = int(revision) if revision.isdecimal() else 0
        self._removed_live = False
        await self._removals.learn(acks.values())
        unaware = self._removals.unaware(self._key, acks.values())
        unaware |= {ack.node for ack in acks.values() if ack.until < self._since}
        self._found = programmed(service, slices, nodes, acks, unaware)
        if self._found.why:
            raise InvalidInput(f"Service {self._key} cannot be waited for: {self._found.why}")
        return self._found.everywhere


def _words(leases: Iterable[Lease]) -> dict[str, Acknowledgement]:
    return {ack.node: ack for ack in map(read_lease, leases) if ack is not None}


async def _list(
    client: ApiClient, resource: Resource, kind: type[T], namespace: str | None = None, labels: str = ""
) -> list[T]:
    return (await _list_at(client, resource, kind, namespace, labels))[0]


async def _list_at(
    client: ApiClient, resource: Resource, kind: type[T], namespace: str | None = None, labels: str = ""
) -> tuple[list[T], str]:
    """With the revision of the list."""
    raw, older = await list_served(client, resource, namespace, label_selector=labels)
    decoder = msgspec.json.Decoder(kind)
    found = (decode_served(decoder, item, older) for item in raw.items or ())
    return [obj for obj in found if obj is not None], raw.metadata.resource_version
