"""What kinds a server has, by its own account (the discovery documents that every version of Kubernetes serves)."""

import asyncio
from dataclasses import dataclass

import msgspec

from podwire.client.api import ApiClient
from podwire.client.errors import ApiError
from podwire.model.resources import Resource


@dataclass(frozen=True, slots=True)
class ServedKind:
    """A resource in its group's preferred version, and the verbs the server offers for it."""

    resource: Resource
    verbs: frozenset[str]


class _ApiResource(msgspec.Struct):
    name: str
    kind: str
    namespaced: bool = True
    verbs: list[str] = []


class _ApiResourceList(msgspec.Struct):
    resources: list[_ApiResource] | None = None


class _GroupVersion(msgspec.Struct, rename="camel"):
    version: str


class _Group(msgspec.Struct, rename="camel"):
    name: str
    preferred_version: _GroupVersion


class _GroupList(msgspec.Struct):
    groups: list[_Group] | None = None


async def served_kinds(client: ApiClient) -> tuple[ServedKind, ...]:
    """All kinds, without subresources. A group that cannot be asked (an aggregated API that is down) is left out."""
    groups = msgspec.json.decode(await client.request("GET", "/apis"), type=_GroupList).groups or []
    asked = [("", "v1"), *((group.name, group.preferred_version.version) for group in groups)]
    answers = await asyncio.gather(*(_kinds(client, group, version) for group, version in asked))
    return tuple(kind for answer in answers for kind in answer)


async def _kinds(client: ApiClient, group: str, version: str) -> list[ServedKind]:
    path = f"/apis/{group}/{version}" if group else f"/api/{version}"
    try:
        answer = msgspec.json.decode(await client.request("GET", path), type=_ApiResourceList)
    except ApiError:
        if not group:
            raise
        return []
    return [
        ServedKind(Resource(group, version, entry.name, entry.kind, entry.namespaced), frozenset(entry.verbs))
        for entry in answer.resources or ()
        if "/" not in entry.name
    ]
