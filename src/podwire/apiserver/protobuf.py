"""application/vnd.kubernetes.protobuf bodies as JSON documents.

A body is the magic `k8s\\0`, then a runtime.Unknown: its typeMeta says what the object is, its raw field is the object.
Go writes fields that are no pointers even when zero; those zeros are left out again, as JSON would leave them.
"""

import base64
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from podwire.apiserver.schema import INT_OR_STRING, LISTS, QUANTITY, RAW_JSON, TIMES, Field, Schema, api_schema
from podwire.model.errors import InvalidInput
from podwire.model.meta import Json

CONTENT_TYPE = "application/vnd.kubernetes.protobuf"
MAGIC = b"k8s\x00"

_UNKNOWN = "k8s.io.apimachinery.pkg.runtime.Unknown"
_PACKAGES = {
    "v1": "k8s.io.api.core.v1",
    "apps/v1": "k8s.io.api.apps.v1",
    "events.k8s.io/v1": "k8s.io.api.events.v1",
    "discovery.k8s.io/v1": "k8s.io.api.discovery.v1",
    "coordination.k8s.io/v1": "k8s.io.api.coordination.v1",
    "networking.k8s.io/v1": "k8s.io.api.networking.v1",
    "autoscaling/v1": "k8s.io.api.autoscaling.v1",
    "authentication.k8s.io/v1": "k8s.io.api.authentication.v1",
    "authorization.k8s.io/v1": "k8s.io.api.authorization.v1",
    "policy/v1": "k8s.io.api.policy.v1",
    "meta.k8s.io/v1": "k8s.io.apimachinery.pkg.apis.meta.v1",
}
_META_KINDS = frozenset({"DeleteOptions", "Status"})
"""Kinds of meta.k8s.io that come with the group of whatever they are sent to."""


class BadProtobuf(InvalidInput):
    """The body is no Kubernetes protobuf, or of a kind whose message is not known."""


def decode(body: bytes, default_api_version: str = "", default_kind: str = "") -> Json:
    """The object in `body` as a JSON document with apiVersion and kind. Raises BadProtobuf."""
    if not body.startswith(MAGIC):
        raise BadProtobuf("provided data does not appear to be a protobuf message, expected prefix [107 56 115 0]")
    schema = api_schema()
    api_version, kind, raw = default_api_version, default_kind, b""
    for number, value in _records(memoryview(body)[len(MAGIC) :]):
        if number == 1 and isinstance(value, memoryview):
            meta = _message(value, "k8s.io.apimachinery.pkg.runtime.TypeMeta", schema)
            api_version, kind = meta.get("apiVersion") or api_version, meta.get("kind") or kind
        elif number == 2 and isinstance(value, memoryview):
            raw = bytes(value)
    message = _message_name(api_version, kind, schema)
    return {"apiVersion": api_version, "kind": kind, **_message(memoryview(raw), message, schema)}


def _message_name(api_version: str, kind: str, schema: Schema) -> str:
    package = _PACKAGES["meta.k8s.io/v1"] if kind in _META_KINDS else _PACKAGES.get(api_version, "")
    name = f"{package}.{kind}"
    if name not in schema.numbered:
        raise BadProtobuf(f'no kind "{kind}" is registered for version "{api_version}"')
    return name


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise BadProtobuf("the protobuf body ends inside a number")
        byte = data[at]
        at += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result & 0xFFFFFFFFFFFFFFFF, at
        shift += 7


def _records(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of each record: an int for wire types 0, 1, 5, the bytes for type 2."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire not in (1, 2, 5):
            raise BadProtobuf(f"protobuf wire type {wire} is not used by Kubernetes")
        size = 8 if wire == 1 else 4
        if wire == 2:
            size, at = _varint(data, at)
        if at + size > len(data):
            raise BadProtobuf("the protobuf body ends inside a field")
        chunk = data[at : at + size]
        yield number, chunk if wire == 2 else int.from_bytes(chunk, "little")
        at += size


def _message(data: memoryview, message: str, schema: Schema) -> Json:
    fields = schema.numbered[message]
    obj: Json = {}
    for number, raw in _records(data):
        field = fields.get(number)
        if field is None:
            continue
        if field.mapped:
            key, value = _entry(raw, field, schema)
            obj.setdefault(field.name, {})[key] = value
        elif field.repeated:
            obj.setdefault(field.name, []).extend(_repeated(raw, field, schema))
        elif field.inline:
            obj.update(_message(_bytes(raw, field), field.type, schema))
        else:
            value = _value(raw, field, schema)
            if _meant(value, field):
                obj[field.name] = value
            else:
                obj.pop(field.name, None)
    return obj


def _meant(value: Any, field: Field) -> bool:
    """Whether JSON would carry the value: pointers always, a zero of other types not. Empty messages are kept."""
    if value is None:
        return False
    if field.pointer or field.always or isinstance(value, dict):
        return True
    return bool(value)


def _bytes(raw: int | memoryview, field: Field) -> memoryview:
    if isinstance(raw, int):
        raise BadProtobuf(f"the protobuf field {field.name} holds a number where {field.type} was expected")
    return raw


def _repeated(raw: int | memoryview, field: Field, schema: Schema) -> list[Any]:
    if isinstance(raw, memoryview) and field.type in ("int32", "int64", "bool"):
        values, at = [], 0
        while at < len(raw):
            number, at = _varint(raw, at)
            values.append(_value(number, field, schema))
        return values
    return [_value(raw, field, schema)]


def _entry(raw: int | memoryview, field: Field, schema: Schema) -> tuple[str, Any]:
    key, value = "", None
    single = field._replace(mapped=False)
    for number, item in _records(_bytes(raw, field)):
        if number == 1:
            key = _text(_bytes(item, field))
        elif number == 2:
            value = _value(item, single, schema)
    return key, "" if value is None and field.type in ("string", "bytes", QUANTITY) else value


def _value(raw: int | memoryview, field: Field, schema: Schema) -> Any:
    match field.type:
        case "int32" | "int64":
            if not isinstance(raw, int):
                raise BadProtobuf(f"the protobuf field {field.name} is no number")
            return raw - (1 << 64) if raw >> 63 else raw
        case "bool":
            return bool(raw)
        case "string":
            return _text(_bytes(raw, field))
        case "bytes":
            return base64.b64encode(_bytes(raw, field)).decode()
    return _special(_bytes(raw, field), field, schema)


def _special(data: memoryview, field: Field, schema: Schema) -> Any:
    """A message that JSON writes in a form of its own, or a plain one."""
    if field.type == QUANTITY:
        return next((_text(_bytes(v, field)) for n, v in _records(data) if n == 1), "0")
    if field.type == INT_OR_STRING:
        return _int_or_string(data, field)
    if field.type in TIMES:
        return _time(data, micro=field.type.endswith("MicroTime"))
    if field.type in RAW_JSON:
        return next((_raw_json(_bytes(v, field)) for n, v in _records(data) if n == 1), {})
    if field.type in LISTS:
        return [_text(_bytes(v, field)) for n, v in _records(data) if n == 1]
    return _message(data, field.type, schema)


def _text(data: memoryview) -> str:
    try:
        return bytes(data).decode()
    except UnicodeDecodeError as cause:
        raise BadProtobuf("the protobuf body holds text that is not UTF-8") from cause


def _raw_json(data: memoryview) -> Any:
    try:
        return json.loads(bytes(data))
    except ValueError as cause:
        raise BadProtobuf("the protobuf body holds a raw field that is not JSON") from cause


def _int_or_string(data: memoryview, field: Field) -> int | str:
    kind, number, text = 0, 0, ""
    for index, value in _records(data):
        if index == 1 and isinstance(value, int):
            kind = value
        elif index == 2 and isinstance(value, int):
            number = value - (1 << 64) if value >> 63 else value
        elif index == 3:
            text = _text(_bytes(value, field))
    return text if kind == 1 else number


def _time(data: memoryview, *, micro: bool) -> str | None:
    """RFC 3339; None for Go's zero time, which is encoded as nothing at all."""
    parts = {number: value for number, value in _records(data) if isinstance(value, int)}
    if not parts:
        return None
    seconds = parts.get(1, 0)
    seconds = seconds - (1 << 64) if seconds >> 63 else seconds
    try:
        moment = datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, ValueError, OSError) as cause:
        raise BadProtobuf("the protobuf body holds a time out of range") from cause
    text = moment.strftime("%Y-%m-%dT%H:%M:%S")
    return f"{text}.{parts.get(2, 0) // 1000:06d}Z" if micro else f"{text}Z"
