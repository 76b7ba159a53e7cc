"""How a node says, in the API, that Services are programmed: a Lease of its own whose annotations name revisions.

Everything up to those revisions of Services and EndpointSlices was read back from its kernel. So one small object for each
node tells about every Service, and is written when some Service changes, else once a minute. A Service is programmed on
a node when neither it nor one of its slices is newer than what the node acknowledged, and none was removed later; and when
the word is no older than a few minutes and not of a time before the node was started anew.
"""

from collections.abc import Iterable
from datetime import datetime
from typing import Any, NamedTuple

from podwire.model.meta import Json
from podwire.model.objects import EndpointSlice, Lease, Service, View
from podwire.model.timestamps import format_micro_time, parse_time

NAMESPACE = "kube-system"
PREFIX = "podwire-services-"
LABEL = "podwire.dev/acknowledges"
LABEL_VALUE = "services"
SERVICES, SLICES, MODE = "podwire.dev/services-version", "podwire.dev/endpointslices-version", "podwire.dev/proxy-mode"
UNTIL, BOOT = "podwire.dev/endpointslices-unchanged-until", "podwire.dev/boot-id"


class Speaker(NamedTuple):
    """Who gives its word: a node's name, and the boot id of its machine, empty where that is not known."""

    node: str
    boot: str = ""


class Acknowledgement(View, frozen=True):
    """One node's word. `at` is when it was given, by the node's own clock; `boot` the machine's boot id. `slices` is the
    revision at which the node's slices became what they are, the same on all nodes that know the same; until `slices_until`
    none changed."""

    node: str
    services: str
    slices: str
    slices_until: str = ""
    mode: str = ""
    at: datetime | None = None
    boot: str = ""

    @property
    def until(self) -> int:
        """The last revision of slices that the word tells about; 0 where revisions are no numbers."""
        return max(_number(self.slices), _number(self.slices_until))

    def covers(self, service: Service, slices: Iterable[EndpointSlice]) -> bool:
        """Whether this Service and these slices are in the node's kernel. There may be others that the node still has: what
        was removed has no revision."""
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
        "annotations": {
            SERVICES: ack.services,
            SLICES: ack.slices,
            UNTIL: ack.slices_until,
            MODE: ack.mode,
            BOOT: ack.boot,
        },
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
        slices_until=notes.get(UNTIL, ""),
        mode=notes.get(MODE, ""),
        at=at,
        boot=notes.get(BOOT, ""),
    )


def _number(version: str) -> int:
    return int(version) if version.isdecimal() else 0


def _reached(version: str, by: str) -> bool:
    """Revisions are numbers that grow (KEP-5504); what is none is never reached."""
    return version.isdecimal() and by.isdecimal() and int(version) <= int(by)
