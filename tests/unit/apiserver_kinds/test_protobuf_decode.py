"""Protobuf bodies decode to the JSON documents they stand for; the encoder here is written for the test."""

import base64
import contextlib
import json
from datetime import datetime
from typing import Any

import pytest
from apidocuments import messages
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from podwire.apiserver.kinds import REGISTRY
from podwire.apiserver.protobuf import MAGIC, BadProtobuf, decode
from podwire.apiserver.schema import INT_OR_STRING, LISTS, QUANTITY, RAW_JSON, TIMES, Field, api_schema

SCHEMA = api_schema()


def varint(number: int) -> bytes:
    number &= 0xFFFFFFFFFFFFFFFF
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def chunk(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def encode_value(value: Any, kind: str) -> tuple[int, bytes]:
    """(wire type, bytes) of one value, length aside."""
    if kind in ("int32", "int64", "bool"):
        return 0, varint(int(value))
    if kind == "string":
        return 2, value.encode()
    if kind == "bytes":
        return 2, base64.b64decode(value)
    if kind == QUANTITY:
        return 2, chunk(1, value.encode())
    if kind == INT_OR_STRING:
        if isinstance(value, str):
            return 2, varint(8) + varint(1) + varint(16) + varint(0) + chunk(3, value.encode())
        return 2, varint(8) + varint(0) + varint(16) + varint(value) + chunk(3, b"")
    if kind in TIMES:
        moment = datetime.fromisoformat(value)
        return 2, varint(8) + varint(int(moment.timestamp())) + varint(16) + varint(moment.microsecond * 1000)
    if kind in RAW_JSON:
        return 2, chunk(1, json.dumps(value).encode())
    if kind in LISTS:
        return 2, b"".join(chunk(1, item.encode()) for item in value)
    return 2, encode_message(value, kind)


def encode_field(field: Field, value: Any) -> bytes:
    if field.mapped:
        out = b""
        for key, item in value.items():
            wire, data = encode_value(item, field.type)
            second = chunk(2, data) if wire == 2 else varint(16) + data
            out += chunk(field.number, chunk(1, key.encode()) + second)
        return out
    if field.repeated:
        return b"".join(encode_field(field._replace(repeated=False), item) for item in value)
    wire, data = encode_value(value, field.type)
    return chunk(field.number, data) if wire == 2 else varint(field.number << 3) + data


def encode_message(obj: dict[str, Any], message: str) -> bytes:
    out = b""
    for field in SCHEMA.numbered[message].values():
        if field.inline:
            own = {key: value for key, value in obj.items() if key in SCHEMA.fields(field.type)}
            out += chunk(field.number, encode_message(own, field.type)) if own else b""
        elif field.name in obj:
            out += encode_field(field, obj[field.name])
    return out


def envelope(api_version: str, kind: str, raw: bytes) -> bytes:
    meta = chunk(1, api_version.encode()) + chunk(2, kind.encode())
    return MAGIC + chunk(1, meta) + chunk(2, raw) + chunk(3, b"") + chunk(4, b"")


@pytest.mark.parametrize("kind", list(REGISTRY), ids=lambda k: k.resource.api_version + "." + k.resource.kind)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_what_is_encoded_comes_back(kind: Any, data: st.DataObject) -> None:
    obj = data.draw(messages(kind.message))
    body = envelope(kind.resource.api_version, kind.resource.kind, encode_message(obj, kind.message))
    assert decode(body) == {"apiVersion": kind.resource.api_version, "kind": kind.resource.kind, **obj}


@given(st.binary(max_size=80))
def test_garbage_is_refused_and_nothing_else_is_raised(body: bytes) -> None:
    with contextlib.suppress(BadProtobuf):
        assert decode(envelope("v1", "Pod", body))["kind"] == "Pod"


def test_zeros_that_go_writes_are_left_out() -> None:
    ports = chunk(1, chunk(1, b"") + chunk(2, b"") + varint(24) + varint(80) + varint(40) + varint(0))
    spec = ports + chunk(3, b"") + chunk(4, b"ClusterIP")
    meta = chunk(1, b"web") + chunk(2, b"") + chunk(8, b"")
    document = decode(envelope("v1", "Service", chunk(1, meta) + chunk(2, spec)))
    assert document["metadata"] == {"name": "web"}
    assert document["spec"] == {"ports": [{"port": 80}], "type": "ClusterIP"}


def test_a_zero_behind_a_pointer_is_meant() -> None:
    document = decode(envelope("apps/v1", "Deployment", chunk(2, varint(8) + varint(0))))
    assert document["spec"] == {"replicas": 0}


def test_an_int_or_string_of_either_sort() -> None:
    port = varint(24) + varint(80) + chunk(4, encode_value("http", INT_OR_STRING)[1])
    assert decode(envelope("v1", "Service", chunk(2, chunk(1, port))))["spec"]["ports"] == [{"port": 80, "targetPort": "http"}]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{}", "does not appear to be a protobuf message"),
        (envelope("batch/v1", "Job", b""), 'no kind "Job" is registered for version "batch/v1"'),
        (envelope("v1", "Pod", b"\x0a\xff"), "ends inside"),
        (envelope("v1", "Pod", chunk(1, chunk(1, b"\xff"))), "not UTF-8"),
    ],
)
def test_bad_bodies_say_what_is_wrong(body: bytes, says: str) -> None:
    with pytest.raises(BadProtobuf, match=says):
        decode(body)


def test_delete_options_come_under_any_group() -> None:
    body = envelope("apps/v1", "DeleteOptions", varint(8) + varint(0) + chunk(4, b"Foreground"))
    assert decode(body) == {
        "apiVersion": "apps/v1",
        "kind": "DeleteOptions",
        "gracePeriodSeconds": 0,
        "propagationPolicy": "Foreground",
    }
