"""metav1.Table and PartialObjectMetadata: what `kubectl get` asks for."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from podwire.model.meta import Json

if TYPE_CHECKING:
    from podwire.apiserver.kinds.base import Kind

META_API = "meta.k8s.io/v1"


def table(kind: "Kind", objs: Iterable[Json], list_meta: Json, now: datetime, *, include: str = "Metadata") -> Json:
    """A Table of `objs`. `include` is the request's includeObject: None, Metadata or Object.

    `list_meta` is the list's (or single object's) metadata, of which resourceVersion and continue are taken.
    """
    keep = {key: list_meta[key] for key in ("resourceVersion", "continue", "remainingItemCount") if key in list_meta}
    return {
        "kind": "Table",
        "apiVersion": META_API,
        "metadata": keep,
        "columnDefinitions": column_definitions(kind),
        "rows": [row(kind, obj, now, include=include) for obj in objs],
    }


def column_definitions(kind: "Kind") -> list[Json]:
    return [
        {"name": c.name, "type": c.type, "format": c.format, "description": c.description, "priority": c.priority}
        for c in kind.columns
    ]


def row(kind: "Kind", obj: Json, now: datetime, *, include: str = "Metadata") -> Json:
    """One TableRow; its object is what `include` asks for."""
    cells = {"cells": kind.row(obj, now)}
    if include == "Metadata":
        return {**cells, "object": partial_metadata(obj)}
    if include == "Object":
        return {**cells, "object": obj}
    return {**cells, "object": None}


def partial_metadata(obj: Json) -> Json:
    return {"kind": "PartialObjectMetadata", "apiVersion": META_API, "metadata": obj.get("metadata", {})}


def partial_metadata_list(objs: Iterable[Json], list_meta: Json) -> Json:
    items = [partial_metadata(obj) for obj in objs]
    return {"kind": "PartialObjectMetadataList", "apiVersion": META_API, "metadata": list_meta, "items": items}


def parse_time(text: str) -> datetime:
    """An API timestamp (RFC 3339, seconds or microseconds, Z)."""
    return datetime.fromisoformat(text).astimezone(UTC)


def age(created: str | None, now: datetime) -> str:
    """Time since `created` as kubectl writes it: 5s, 3m12s, 4h5m, 2d3h, 40d, 1y30d; <unknown> without it."""
    return human_duration((now - parse_time(created)).total_seconds()) if created else "<unknown>"


def human_duration(total: float) -> str:
    """Seconds as k8s.io/apimachinery duration.HumanDuration: two units at most, fewer the longer it is."""
    seconds = int(total)
    if seconds < -1:
        return "<invalid>"
    if seconds < 0:
        return "0s"
    if seconds < 120:
        return f"{seconds}s"
    minutes = seconds // 60
    if minutes < 10:
        return _two(minutes, "m", seconds % 60, "s")
    if minutes < 180:
        return f"{minutes}m"
    hours = minutes // 60
    if hours < 8:
        return _two(hours, "h", minutes % 60, "m")
    if hours < 48:
        return f"{hours}h"
    days = hours // 24
    if days < 8:
        return _two(days, "d", hours % 24, "h")
    if days < 365 * 2:
        return f"{days}d"
    years = days // 365
    return _two(years, "y", days % 365, "d") if years < 8 else f"{years}y"


def _two(big: int, big_unit: str, small: int, small_unit: str) -> str:
    return f"{big}{big_unit}{small}{small_unit}" if small else f"{big}{big_unit}"


def join(values: Sequence[Any], empty: str = "<none>") -> str:
    """A cell that lists values with commas."""
    return ",".join(str(v) for v in values) if values else empty


def labels_cell(labels: Json | None) -> str:
    """A label map or equality selector as `a=b,c=d`."""
    return join([f"{key}={value}" for key, value in sorted((labels or {}).items())])
