"""The shape of every message the API server takes, and documents made to fit it.

One table (data/fields.json: message → field number → name, type, flags) serves protobuf decoding, the check of JSON
documents and OpenAPI. A document is made to fit as Kubernetes' decoder does it: wrong types are an error, nulls and
fields nobody knows are left out (and the latter reported), empty lists and maps go where Go would omit them.
"""

import base64
import binascii
import functools
import json
import re
from collections.abc import Mapping
from datetime import datetime
from importlib import resources
from typing import Any, NamedTuple

from podwire.apiserver.quantities import canonical
from podwire.model.errors import InvalidInput
from podwire.model.meta import Json

META = "k8s.io.apimachinery.pkg.apis.meta.v1."
QUANTITY = "k8s.io.apimachinery.pkg.api.resource.Quantity"
INT_OR_STRING = "k8s.io.apimachinery.pkg.util.intstr.IntOrString"
TIMES = frozenset({META + "Time", META + "MicroTime"})
RAW_JSON = frozenset({META + "FieldsV1", "k8s.io.apimachinery.pkg.runtime.RawExtension"})
"""Messages whose one field holds JSON text; in a JSON document they are that JSON itself."""
LISTS = frozenset({"k8s.io.api.authentication.v1.ExtraValue", "k8s.io.api.authorization.v1.ExtraValue"})
"""Messages that stand for a list of strings."""

_INT_BITS = {"int32": 31, "int64": 63}


class Field(NamedTuple):
    """One field of a message. `type` is a scalar (string, int32, int64, bool, bytes, double) or a message's full name."""

    number: int
    name: str
    type: str
    repeated: bool = False
    mapped: bool = False
    """A map from strings to `type`."""
    inline: bool = False
    """In JSON, its own fields stand among the parent's."""
    pointer: bool = False
    """A zero value is meant, and differs from absence."""
    always: bool = False
    """Written even when zero."""


class BadDocument(InvalidInput):
    """A document whose types do not fit its message (a 400, in Kubernetes' words)."""


class Fitted(NamedTuple):
    """A document made to fit; `unknown` are the paths of the fields that were left out because nobody knows them."""

    document: Json
    unknown: list[str]


class Schema:
    """The field table, by protobuf number and by JSON name."""

    def __init__(self, table: Mapping[str, Mapping[str, list[str]]]) -> None:
        self.numbered = {name: _fields(fields) for name, fields in table.items()}
        self._named: dict[str, dict[str, Field]] = {}

    def fields(self, message: str) -> dict[str, Field]:
        """JSON name → field, inline messages opened up."""
        found = self._named.get(message)
        if found is None:
            found = {}
            for field in self.numbered[message].values():
                found.update(self.fields(field.type) if field.inline else {field.name: field})
            self._named[message] = found
        return found

    def fit(self, obj: Any, message: str) -> Fitted:
        """`obj` made to fit `message`, apiVersion and kind aside. Raises BadDocument."""
        if not isinstance(obj, dict):
            raise BadDocument(f"json: cannot unmarshal {_json_type(obj)} into Go value of type {go_type(message)}")
        unknown: list[str] = []
        head = {key: obj[key] for key in ("apiVersion", "kind") if key in obj}
        body = {key: value for key, value in obj.items() if key not in head}
        try:
            return Fitted({**head, **self._message(body, message, "", unknown)}, unknown)
        except BadDocument as cause:
            kind, version = head.get("kind"), str(head.get("apiVersion", "")).rpartition("/")[2]
            if not kind:
                raise
            text = f'{kind} in version "{version}" cannot be handled as a {kind}: {cause}'
            raise BadDocument(text) from cause

    def _message(self, obj: Json, message: str, path: str, unknown: list[str]) -> Json:
        fields = self.fields(message)
        fitted: Json = {}
        for key, value in obj.items():
            field = fields.get(key)
            if field is None:
                unknown.append(f"{path}{key}")
            elif value is not None:
                where = _Where(message, f"{path}{key}")
                given = self._field(value, field, where, unknown)
                if given or not (field.repeated or field.mapped) or field.always:
                    fitted[key] = given
        return fitted

    def _field(self, value: Any, field: Field, where: "_Where", unknown: list[str]) -> Any:
        if field.mapped:
            if not isinstance(value, dict):
                raise where.mismatch(value, f"map[string]{go_type(field.type)}")
            return {key: self._value(item, field.type, where, unknown) for key, item in value.items()}
        if field.repeated:
            if not isinstance(value, list):
                raise where.mismatch(value, f"[]{go_type(field.type)}")
            return [self._value(v, field.type, where.at(i), unknown) for i, v in enumerate(value) if v is not None]
        return self._value(value, field.type, where, unknown)

    def _value(self, value: Any, kind: str, where: "_Where", unknown: list[str]) -> Any:
        check = _CHECKS.get(kind)
        if check is not None:
            return check(value, kind, where)
        if kind in RAW_JSON:
            return value
        if not isinstance(value, dict):
            raise where.mismatch(value, go_type(kind))
        return self._message(value, kind, f"{where.path}.", unknown)


class _Where(NamedTuple):
    message: str
    path: str

    def at(self, index: int) -> "_Where":
        return _Where(self.message, f"{self.path}[{index}]")

    def mismatch(self, value: Any, wanted: str) -> BadDocument:
        found = f"number {value}" if _json_type(value) == "number" and wanted in ("int32", "int64") else _json_type(value)
        path = re.sub(r"\[\d+\]", "", self.path)
        struct = self.message.rsplit(".", 1)[1]
        return BadDocument(f"json: cannot unmarshal {found} into Go struct field {struct}.{path} of type {wanted}")


def go_type(kind: str) -> str:
    """How Go names the type in its decoding errors."""
    match kind:
        case "bytes":
            return "[]uint8"
        case "double":
            return "float64"
        case _ if "." in kind:
            return ".".join(kind.rsplit(".", 2)[1:])
        case _:
            return kind


def _json_type(value: Any) -> str:
    match value:
        case bool():
            return "bool"
        case int() | float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
        case None:
            return "null"
        case _:
            return "object"


def _integer(value: Any, kind: str, where: _Where) -> Any:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not -(1 << _INT_BITS[kind]) <= value < 1 << _INT_BITS[kind]:
        raise where.mismatch(value, kind)
    return value


def _text(value: Any, kind: str, where: _Where) -> Any:
    if not isinstance(value, str):
        # a map's null value is an empty string to Go
        if value is None:
            return ""
        raise where.mismatch(value, kind)
    return value


def _truth(value: Any, kind: str, where: _Where) -> Any:
    if not isinstance(value, bool):
        raise where.mismatch(value, kind)
    return value


def _double(value: Any, kind: str, where: _Where) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise where.mismatch(value, go_type(kind))
    return value


def _bytes(value: Any, kind: str, where: _Where) -> Any:
    if not isinstance(value, str):
        if value is None:
            return ""
        raise where.mismatch(value, go_type(kind))
    try:
        base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        bad = next((i for i, c in enumerate(value) if not (c.isascii() and (c.isalnum() or c in "+/="))), len(value) // 4 * 4)
        raise BadDocument(f"illegal base64 data at input byte {bad}") from None
    return value


def _quantity(value: Any, kind: str, where: _Where) -> Any:
    text = str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value
    try:
        return canonical(_text(text, "string", where))
    except ValueError:
        pattern = "^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$"
        raise BadDocument(f"quantities must match the regular expression '{pattern}'") from None


def _int_or_string(value: Any, kind: str, where: _Where) -> Any:
    return value if isinstance(value, str) else _integer(value, "int32", where)


def _time(value: Any, kind: str, where: _Where) -> Any:
    text = _text(value, "string", where)
    try:
        datetime.fromisoformat(text)
    except ValueError:
        raise BadDocument(f'parsing time "{text}" as "2006-01-02T15:04:05Z07:00": cannot parse "{text}" as "2006"') from None
    return text


def _strings(value: Any, kind: str, where: _Where) -> Any:
    if not isinstance(value, list):
        raise where.mismatch(value, go_type(kind))
    return [_text(item, "string", where) for item in value]


_CHECKS = {
    "string": _text,
    "int32": _integer,
    "int64": _integer,
    "bool": _truth,
    "bytes": _bytes,
    "double": _double,
    QUANTITY: _quantity,
    INT_OR_STRING: _int_or_string,
    **dict.fromkeys(TIMES, _time),
    **dict.fromkeys(LISTS, _strings),
}


def _fields(table: Mapping[str, list[str]]) -> dict[int, Field]:
    fields = {}
    for number, (name, kind, *rest) in table.items():
        flags = set(rest[0].split()) if rest else set()
        fields[int(number)] = Field(
            int(number),
            name,
            kind,
            repeated="repeated" in flags,
            mapped="map" in flags,
            inline="inline" in flags,
            pointer="pointer" in flags,
            always="always" in flags,
        )
    return fields


@functools.cache
def api_schema() -> Schema:
    """The table that ships with the package, read once."""
    text = resources.files("podwire.apiserver").joinpath("data/fields.json").read_text()
    return Schema(json.loads(text)["messages"])


def strict_error(unknown: list[str]) -> str:
    """What fieldValidation=Strict answers (400) when fields are unknown."""
    return "strict decoding error: " + ", ".join(f'unknown field "{path}"' for path in unknown)
