"""Event, served as core/v1 and as events.k8s.io/v1; stored as core/v1, as Kubernetes does.

The two differ in field names only: note↔message, regarding↔involvedObject, deprecated*↔source, firstTimestamp, … .
"""

from datetime import datetime
from typing import Any

from podwire.apiserver.kinds.base import NAME, Column, Kind
from podwire.apiserver.tables import age
from podwire.apiserver.validation import FieldError, Path, invalid
from podwire.model import resources
from podwire.model.meta import Json
from podwire.model.resources import Resource

EVENTS_V1 = Resource("events.k8s.io", "v1", "events", "Event")

_TO_CORE = {
    "note": "message",
    "regarding": "involvedObject",
    "deprecatedSource": "source",
    "deprecatedFirstTimestamp": "firstTimestamp",
    "deprecatedLastTimestamp": "lastTimestamp",
    "deprecatedCount": "count",
    "reportingController": "reportingComponent",
}
_FROM_CORE = {core: new for new, core in _TO_CORE.items()}


class EventKind(Kind):
    resource = resources.EVENTS
    message = "k8s.io.api.core.v1.Event"
    short_names = ("ev",)
    columns = (
        Column("Last Seen", "The time at which the most recent occurrence of this event was recorded."),
        Column("Type", "Type of this event (Normal, Warning), new types could be added in the future"),
        Column("Reason", "This should be a short, machine understandable string that gives the reason."),
        Column("Object", "The object that this event is about."),
        Column("Subobject", "If referring to a piece of an object, the path to it.", priority=1),
        Column("Source", "The component reporting this event.", priority=1),
        Column("Message", "A human-readable description of the status of this operation."),
        Column("First Seen", "The time at which the event was first recorded.", priority=1),
        Column("Count", "The number of times this event has occurred.", priority=1),
        NAME._replace(priority=1),
    )

    def check(self, obj: Json, root: Path) -> list[FieldError]:
        stored = self.to_storage(obj)
        namespace = (stored.get("involvedObject") or {}).get("namespace", "")
        own = stored.get("metadata", {}).get("namespace", "")
        if namespace != own and (namespace or own not in ("default", "kube-system")):
            return [invalid(root / "involvedObject" / "namespace", namespace, "does not match event.namespace")]
        return []

    def selectable_fields(self, obj: Json) -> dict[str, str]:
        target = obj.get("involvedObject") or {}
        paths = ("kind", "namespace", "name", "uid", "apiVersion", "resourceVersion", "fieldPath")
        fields = {f"involvedObject.{path}": str(target.get(path, "")) for path in paths}
        source = (obj.get("source") or {}).get("component", "") or obj.get("reportingComponent", "")
        own = {"reason": obj.get("reason", ""), "type": obj.get("type", ""), "source": source}
        own["reportingComponent"] = obj.get("reportingComponent", "")
        return {**super().selectable_fields(obj), **fields, **own}

    def row(self, obj: Json, now: datetime) -> list[Any]:
        stored = self.to_storage(obj)
        target, source = stored.get("involvedObject") or {}, stored.get("source") or {}
        series = stored.get("series") or {}
        first = stored.get("firstTimestamp") or stored.get("eventTime")
        last = series.get("lastObservedTime") or stored.get("lastTimestamp") or first
        component = source.get("component") or stored.get("reportingComponent", "")
        where = f"{component}, {source['host']}" if source.get("host") else component
        return [
            age(last, now),
            stored.get("type", ""),
            stored.get("reason", ""),
            f"{target.get('kind', '').lower()}/{target.get('name', '')}",
            target.get("fieldPath", ""),
            where,
            str(stored.get("message", "")).strip(),
            age(first, now),
            series.get("count") or stored.get("count") or 1,
            stored.get("metadata", {}).get("name", ""),
        ]


class EventV1Kind(EventKind):
    resource = EVENTS_V1
    storage = resources.EVENTS
    message = "k8s.io.api.events.v1.Event"

    def to_storage(self, obj: Json) -> Json:
        if obj.get("apiVersion") != EVENTS_V1.api_version:
            return obj
        stored = {_TO_CORE.get(key, key): value for key, value in obj.items()}
        return {**stored, "apiVersion": "v1", "kind": "Event"}

    def from_storage(self, obj: Json) -> Json:
        served = {_FROM_CORE.get(key, key): value for key, value in obj.items()}
        return {**served, "apiVersion": EVENTS_V1.api_version, "kind": "Event"}

    def selectable_fields(self, obj: Json) -> dict[str, str]:
        fields = super().selectable_fields(self.to_storage(obj))
        regarding = {f"regarding.{k.removeprefix('involvedObject.')}": v for k, v in fields.items() if "involvedObject." in k}
        return {**fields, **regarding, "reportingController": fields["reportingComponent"]}
