"""Several API servers on one store: each keeps a Lease, and the addresses of all that live are the endpoints of the
Service default/kubernetes. (kube-apiserver: lease-based endpoint reconciler, Leases labelled with its identity.)
"""

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from datetime import datetime, timedelta
from ipaddress import ip_address

from podwire.apiserver.bootstrap import publish, put
from podwire.apiserver.config import ServerConfig
from podwire.apiserver.hub import Hub
from podwire.apiserver.kinds import REGISTRY, Kind
from podwire.apiserver.objects import DeleteOptions, Objects, Place
from podwire.apiserver.status import StatusError
from podwire.model.addr import IPAddress
from podwire.model.meta import Json
from podwire.model.resources import LEASES
from podwire.model.timestamps import format_micro_time, parse_time
from podwire.store.port import StoreError

_log = logging.getLogger(__name__)

NAMESPACE = "kube-system"
LABEL = "apiserver.kubernetes.io/identity"
ADDRESSES = "podwire.io/addresses"


async def keep_presence(objects: Objects, hub: Hub, config: ServerConfig) -> None:
    """Runs until cancelled; then the other servers need not wait for this one's Lease to run out."""
    name = f"apiserver-{config.identity}"
    try:
        while True:
            try:
                await put(objects, LEASES, NAMESPACE, _lease(config, name))
                await hub.up_to_date()
                await publish(objects, config, sorted(_alive(hub, config.now()), key=int))
            except (StatusError, StoreError) as error:
                _log.warning("this API server's presence could not be written: %s", error)
            await asyncio.sleep(config.presence_seconds)
    finally:
        with contextlib.suppress(StatusError, StoreError, TimeoutError):
            async with asyncio.timeout(1.0):
                await objects.delete(Place(_kind(), NAMESPACE, name), DeleteOptions())


def _lease(config: ServerConfig, name: str) -> Json:
    return {
        "metadata": {
            "name": name,
            "labels": {LABEL: "kube-apiserver"},
            "annotations": {ADDRESSES: ",".join(map(str, config.advertise))},
        },
        "spec": {
            "holderIdentity": config.identity,
            "leaseDurationSeconds": max(1, round(4 * config.presence_seconds)),
            "renewTime": format_micro_time(config.now()),
        },
    }


def _alive(hub: Hub, now: datetime) -> Iterator[IPAddress]:
    for entry in hub.shelf(_kind()).all():
        if entry.namespace != NAMESPACE or entry.labels.get(LABEL) != "kube-apiserver":
            continue
        lease = entry.document(_kind())
        spec = lease.get("spec") or {}
        until = parse_time(spec["renewTime"]) + timedelta(seconds=spec.get("leaseDurationSeconds") or 0)
        if until > now:
            annotations = lease["metadata"].get("annotations") or {}
            yield from (ip_address(text) for text in filter(None, annotations.get(ADDRESSES, "").split(",")))


def _kind() -> Kind:
    kind = REGISTRY.by_kind(LEASES.api_version, LEASES.kind)
    assert kind is not None
    return kind
