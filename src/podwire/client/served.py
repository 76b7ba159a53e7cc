"""What a server of any version has, as values of ours: older servers' versions of kinds, and the nulls that Go writes."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import msgspec

from podwire.client.api import ApiClient, RawList
from podwire.client.errors import NotFound
from podwire.model.meta import Json
from podwire.model.nulls import without_nulls
from podwire.model.objects import ApiObject
from podwire.model.resources import ENDPOINTSLICES, Resource

log = logging.getLogger(__name__)

T = TypeVar("T", bound=ApiObject)


@dataclass(frozen=True, slots=True)
class OlderVersion:
    """`upgrade` takes one object of that version (its own to change) and returns it as of the version podwire speaks."""

    resource: Resource
    upgrade: Callable[[Json], Json]


def _slice_from_v1beta1(document: Json) -> Json:
    """EndpointSlice of Kubernetes 1.17 to 1.20: an endpoint's place stands in its `topology`, by the labels of Nodes."""
    for endpoint in document.get("endpoints") or ():
        topology: dict[str, Any] = endpoint.pop("topology", None) or {}
        for field, label in (("nodeName", "kubernetes.io/hostname"), ("zone", "topology.kubernetes.io/zone")):
            if not endpoint.get(field) and label in topology:
                endpoint[field] = topology[label]
    return document


OLDER: dict[Resource, OlderVersion] = {
    ENDPOINTSLICES: OlderVersion(ENDPOINTSLICES._replace(version="v1beta1"), _slice_from_v1beta1)
}


class ServedList(NamedTuple):
    """A list, still encoded, and which version it is of (None: the one that was asked for)."""

    raw: RawList
    older: OlderVersion | None


async def list_served(
    client: ApiClient,
    resource: Resource,
    namespace: str | None = None,
    *,
    label_selector: str = "",
    field_selector: str = "",
    at: str = "",
) -> ServedList:
    """`ApiClient.list_raw`, in an older version where the server does not have `resource`. Raises ApiError."""
    try:
        raw = await client.list_raw(resource, namespace, label_selector=label_selector, field_selector=field_selector, at=at)
    except NotFound:
        older = OLDER.get(resource)
        if older is None:
            raise
        raw = await client.list_raw(
            older.resource, namespace, label_selector=label_selector, field_selector=field_selector, at=at
        )
        return ServedList(raw, older)
    return ServedList(raw, None)


def decode_served(decoder: "msgspec.json.Decoder[T]", raw: msgspec.Raw, older: OlderVersion | None) -> T | None:
    """One object as a value; None (and a line in the log) for one that is not as the API defines it."""
    if older is None:
        try:
            return decoder.decode(raw)
        except msgspec.ValidationError:
            pass
    # Go encodes some absent lists and maps as null (EndpointSlice.endpoints), which the views do not expect.
    document = without_nulls(msgspec.json.decode(raw))
    if older is not None:
        document = older.upgrade(document)
    try:
        return decoder.decode(msgspec.json.encode(document))
    except msgspec.ValidationError as error:
        meta = document.get("metadata", {})
        where = f"{meta.get('namespace') or ''}/{meta.get('name')}".removeprefix("/")
        log.warning("%s %s is left out: it is not as the API defines it (%s)", decoder.type.__name__, where, error)
        return None
