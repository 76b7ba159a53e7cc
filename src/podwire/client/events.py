"""core/v1 Events: what a component wants a person to know, repeats counted instead of repeated."""

import asyncio
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from podwire.client.api import ApiClient
from podwire.client.errors import AlreadyExists, ApiError, Forbidden, NotFound
from podwire.model.meta import Json, ObjectMeta
from podwire.model.resources import EVENTS, Resource
from podwire.model.timestamps import format_time

log = logging.getLogger(__name__)

MAX_PENDING = 1000
"""Events that wait to be written; more than this are dropped, newest first: Events must never hold up the work."""
MAX_KNOWN = 4096


@dataclass(frozen=True, slots=True)
class EventKey:
    """What makes two Events the same one."""

    resource: Resource
    namespace: str
    name: str
    uid: str
    type: str
    reason: str
    message: str

    @property
    def event_name(self) -> str:
        """Stable for the key, so that a restarted component goes on counting where it can."""
        digest = hashlib.sha256("\0".join((self.uid, self.type, self.reason, self.message)).encode()).hexdigest()
        return f"{self.name}.{digest[:16]}"


@dataclass(frozen=True, slots=True)
class _Seen:
    count: int
    first: str
    written: int = 0


class EventRecorder:
    """Takes Events without waiting (`record`) and writes them while `run()` runs, one after the other.

    The same Event again raises the count of the first; repeats that come faster than they can be written are one write.
    `component` is source.component, `host` the node's name; `now` gives the time (aware).
    """

    def __init__(
        self, client: ApiClient, component: str, *, host: str = "", now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._client = client
        self._component, self._host, self._now = component, host, now
        self._seen: OrderedDict[EventKey, _Seen] = OrderedDict()
        self._pending: OrderedDict[EventKey, None] = OrderedDict()
        self._wake = asyncio.Event()

    def record(self, resource: Resource, meta: ObjectMeta, type: str, reason: str, message: str) -> None:
        """About the object `meta` of kind `resource`: type is "Normal" or "Warning", reason one CamelCase word."""
        key = EventKey(resource, meta.namespace, meta.name, meta.uid, type, reason, message)
        if key not in self._pending and len(self._pending) >= MAX_PENDING:
            log.warning("event dropped, too many wait: %s %s/%s: %s", reason, meta.namespace, meta.name, message)
            return
        time = format_time(self._now())
        seen = self._seen.pop(key, _Seen(0, time))
        self._seen[key] = replace(seen, count=seen.count + 1)
        while len(self._seen) > MAX_KNOWN:
            self._seen.popitem(last=False)
        self._pending[key] = None
        self._wake.set()

    async def run(self) -> None:
        """Write until cancelled. An Event that the server does not take is logged and dropped."""
        while True:
            while not self._pending:
                self._wake.clear()
                await self._wake.wait()
            key, _ = self._pending.popitem(last=False)
            try:
                await self._write(key)
            except (Forbidden, NotFound) as error:
                # The namespace is on its way out, or gone: nobody is going to read it.
                log.debug("event %s of %s/%s was not written: %s", key.reason, key.namespace, key.name, error)
            except ApiError as error:
                log.warning("event %s of %s/%s was not written: %s", key.reason, key.namespace, key.name, error)

    async def _write(self, key: EventKey) -> None:
        seen = self._seen.get(key)
        if seen is None:
            return
        namespace = key.namespace or "default"
        time = format_time(self._now())
        self._seen[key] = replace(seen, written=seen.count)
        if seen.written:
            try:
                patch = {"count": seen.count, "lastTimestamp": time}
                await self._client.patch(EVENTS, key.event_name, patch, namespace)
            except NotFound:
                pass  # it has expired or been deleted: make it anew
            else:
                return
        try:
            await self._client.create(EVENTS, self._document(key, seen, namespace, time), namespace)
        except AlreadyExists:
            # From before this component was restarted: go on counting.
            before = await self._client.get(EVENTS, key.event_name, namespace)
            total = int(before.get("count") or 0) + seen.count
            self._seen[key] = replace(seen, count=total, written=total)
            await self._client.patch(EVENTS, key.event_name, {"count": total, "lastTimestamp": time}, namespace)

    def _document(self, key: EventKey, seen: _Seen, namespace: str, time: str) -> Json:
        involved = {
            "apiVersion": key.resource.api_version,
            "kind": key.resource.kind,
            "name": key.name,
            "uid": key.uid,
        }
        if key.namespace:
            involved["namespace"] = key.namespace
        source = {"component": self._component}
        if self._host:
            source["host"] = self._host
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": key.event_name, "namespace": namespace},
            "involvedObject": involved,
            "type": key.type,
            "reason": key.reason,
            "message": key.message[:1024],
            "source": source,
            "count": seen.count,
            "firstTimestamp": seen.first,
            "lastTimestamp": time,
            "reportingComponent": self._component,
            "reportingInstance": self._host or self._component,
        }
