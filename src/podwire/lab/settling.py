"""Has what the API says arrived in every kernel? For whoever wants to send packets the moment after a change."""

import asyncio
from collections.abc import Callable, Iterable, Mapping

import msgspec

from podwire.agent.node import NodeAgent
from podwire.client.api import ApiClient
from podwire.lab.balancer import Balancer, Versions
from podwire.lab.errors import LabError
from podwire.model.ids import ObjectKey
from podwire.model.objects import ApiObject
from podwire.model.resources import ENDPOINTSLICES, NODES, SERVICES, Resource

HEADLESS_LABEL = "service.kubernetes.io/headless"
"""Slices that carry it are not for the nodes (podwire.agent.services)."""

_LOOK_AGAIN_SECONDS = 0.02


async def await_settled(
    client: ApiClient, agents: Callable[[], Mapping[str, NodeAgent | None]], balancer: Balancer, within: float
) -> None:
    """Return when the nodes and the balancer hold what follows from the API's present state.

    `agents` gives the nodes' agents by name as they are now. Raises LabError after `within` seconds, naming who is late."""
    late: list[str] = []
    try:
        async with asyncio.timeout(within):
            while True:
                late = await _late(client, agents(), balancer)
                if not late:
                    return
                await asyncio.sleep(_LOOK_AGAIN_SECONDS)
    except TimeoutError:
        raise LabError(
            f"after {within:g} s not yet programmed: {', '.join(late) or 'unknown'}; `podwire lab logs` may say why"
        ) from None


async def _late(client: ApiClient, agents: Mapping[str, NodeAgent | None], balancer: Balancer) -> list[str]:
    services, slices, nodes = [await _objects(client, resource) for resource in (SERVICES, ENDPOINTSLICES, NODES)]
    for_nodes = {
        SERVICES: _versions(services),
        ENDPOINTSLICES: _versions(obj for obj in slices if HEADLESS_LABEL not in obj.metadata.labels),
        NODES: _versions(nodes),
    }
    late = [name for name, agent in agents.items() if agent is None or not agent.has_programmed(for_nodes)]
    if not balancer.has_programmed(_versions(services), _versions(slices)):
        late.append("balancer")
    return late


async def _objects(client: ApiClient, resource: Resource) -> list[ApiObject]:
    listed = await client.list_raw(resource)
    return [msgspec.json.decode(item, type=ApiObject) for item in listed.items or ()]


def _versions(objects: Iterable[ApiObject]) -> Versions:
    return {ObjectKey(obj.metadata.namespace, obj.metadata.name): obj.metadata.resource_version for obj in objects}
