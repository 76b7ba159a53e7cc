"""EndpointSlices that are gone, and nodes that may not know it yet: no object is left by whose revision one could tell.

So the API server is asked what there was at the revision that a node acknowledged; a Service is programmed there only if none
of its slices went since. Nodes that know the same acknowledge the same revision, so this is one question for most of them.
Where the server's history does not go back so far, the node has to acknowledge the present, which it does by bookmarks.
"""

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress

import msgspec

from podwire.client.api import ApiClient
from podwire.client.errors import Gone
from podwire.client.served import list_served
from podwire.model.acknowledgement import Acknowledgement
from podwire.model.ids import ObjectKey
from podwire.model.objects import ApiObject, EndpointSlice
from podwire.model.resources import ENDPOINTSLICES

Slices = Mapping[ObjectKey, frozenset[str]]
"""Service → the uids of its slices."""

SERVICE_NAME = "kubernetes.io/service-name"
_decoder = msgspec.json.Decoder(ApiObject)


def slices_by_service(slices: Iterable[ApiObject]) -> Slices:
    found: dict[ObjectKey, set[str]] = {}
    for piece in slices:
        key = ObjectKey(piece.metadata.namespace, piece.metadata.labels.get(SERVICE_NAME, ""))
        found.setdefault(key, set()).add(piece.metadata.uid)
    return {key: frozenset(uids) for key, uids in found.items()}


class Removals:
    """Compares the past with `present`, the slices as they were listed at `revision`. `namespace`, `labels`: of that list."""

    def __init__(
        self, client: ApiClient, present: Iterable[EndpointSlice], revision: str, *, namespace: str | None, labels: str
    ) -> None:
        self._client, self._namespace, self._labels = client, namespace, labels
        self._present = slices_by_service(present)
        self._revision = int(revision) if revision.isdecimal() else 0
        self._past: dict[str, Slices] = {}
        """What nodes had whose word names that revision."""

    async def learn(self, words: Collection[Acknowledgement]) -> None:
        """Ask for what is not known yet of these words' past. Raises ApiError."""
        until: dict[str, int] = {}
        for ack in words:
            if ack.until < self._revision and ack.slices not in self._past:
                until[ack.slices] = max(until.get(ack.slices, 0), ack.until)
        for slices, version in until.items():
            # All nodes with this word had the same slices, and the last of them tells of the latest moment: the server
            # remembers that best.
            if version:
                with suppress(Gone):
                    self._past[slices] = await self._list(version)

    def unaware(self, service: ObjectKey, words: Iterable[Acknowledgement]) -> frozenset[str]:
        """Nodes that had slices of the Service which are gone, or of which nobody knows any more what they had."""
        return frozenset(ack.node for ack in words if ack.until < self._revision and not self._nothing_gone(service, ack))

    def _nothing_gone(self, service: ObjectKey, ack: Acknowledgement) -> bool:
        past = self._past.get(ack.slices)
        return past is not None and past.get(service, frozenset()) <= self._present.get(service, frozenset())

    async def _list(self, version: int) -> Slices:
        raw, _ = await list_served(self._client, ENDPOINTSLICES, self._namespace, label_selector=self._labels, at=str(version))
        return slices_by_service(_decoder.decode(item) for item in raw.items or ())
