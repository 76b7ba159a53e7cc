"""How a node says, in the API, that Services are programmed: a Lease of its own whose annotations name revisions.

Everything up to those revisions of Services and EndpointSlices was read back from its kernel. So one small object for each
node tells about every Service, and changes only when some Service does. A Service is programmed on a node when neither it
nor one of its slices is newer than what the node acknowledged.
"""

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from podwire.model.meta import Json
from podwire.model.objects import EndpointSlice, Lease, Service, View
from podwire.model.timestamps import format_micro_time, parse_time

NAMESPACE = "kube-system"
PREFIX = "podwire-services-"
LABEL = "podwire.dev/acknowledges"
LABEL_VALUE = "services"
SERVICES, SLICES, MODE = "podwire.dev/services-version", "podwire.dev/endpointslices-version", "podwire.dev/proxy-mode"


class Acknowledgement(View, frozen=True):
    """One node's word. `at` is when its kernel was read back, by its own clock."""

    node: str
    services: str
    slices: str
    mode: str = ""
    at: datetime | None = None

    def covers(self, service: Service, slices: Iterable[EndpointSlice]) -> bool:
        """Whether this Service, with these slices, is what the node's kernel serves."""
        return _reached(service.metadata.resource_version, self.services) and all(
            _reached(piece.metadata.resource_version, self.slices) for piece in slices
        )


def lease_name(node: str) -> str:
    return PREFIX + node


def lease_document(ack: Acknowledgement) -> Json:
    """The whole Lease; also a merge patch for one that exists."""
    moment = format_micro_time(ack.at) if ack.at else None
    metadata: dict[str, Any] = {
        "name": lease_name(ack.node),
        "namespace": NAMESPACE,
        "labels": {LABEL: LABEL_VALUE},
        "annotations": {SERVICES: ack.services, SLICES: ack.slices, MODE: ack.mode},
    }
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": metadata,
        "spec": {"holderIdentity": ack.node, "renewTime": moment},
    }


def read_lease(lease: Lease) -> Acknowledgement | None:
    """None for a Lease that is none of these."""
    notes = lease.metadata.annotations
    if not lease.metadata.name.startswith(PREFIX) or SERVICES not in notes or SLICES not in notes:
        return None
    at = None
    if lease.spec.renew_time:
        try:
            at = parse_time(lease.spec.renew_time)
        except ValueError:
            at = None
    return Acknowledgement(
        node=lease.metadata.name.removeprefix(PREFIX),
        services=notes[SERVICES],
        slices=notes[SLICES],
        mode=notes.get(MODE, ""),
        at=at,
    )


def _reached(version: str, by: str) -> bool:
    """Revisions are numbers that grow (KEP-5504); what is none is never reached."""
    return version.isdecimal() and by.isdecimal() and int(version) <= int(by)
