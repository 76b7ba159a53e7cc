"""/openapi/v3: the schemas and paths by which kubectl explains, validates and merges.

Schemas come from the field table, merge markers from listrules.py; paths list the verbs of each kind with the query
parameters that clients look for (fieldValidation, dryRun, fieldManager, force).
"""

import hashlib
import json
from collections.abc import Iterable
from importlib import resources

from podwire.apiserver.kinds.base import Kind
from podwire.apiserver.kinds.registry import Registry
from podwire.apiserver.listrules import ATOMIC_MAPS, ATOMIC_MESSAGES, LIST_RULES, RETAIN_KEYS, short
from podwire.apiserver.schema import INT_OR_STRING, LISTS, META, QUANTITY, RAW_JSON, TIMES, Field, Schema, api_schema
from podwire.model.meta import Json

GROUP_KIND = "x-kubernetes-group-version-kind"
_SCALARS: dict[str, Json] = {
    "string": {"type": "string"},
    "bytes": {"type": "string", "format": "byte"},
    "int32": {"type": "integer", "format": "int32"},
    "int64": {"type": "integer", "format": "int64"},
    "double": {"type": "number", "format": "double"},
    "bool": {"type": "boolean"},
    QUANTITY: {"type": "string"},
    INT_OR_STRING: {"type": "string", "format": "int-or-string"},
    **{name: {"type": "string", "format": "date-time"} for name in TIMES},
    **{name: {"type": "object"} for name in RAW_JSON},
    **{name: {"type": "array", "items": {"type": "string"}} for name in LISTS},
}
_OPTIONAL = frozenset({("EndpointSlice", "ports")})
"""Fields that are always written and yet not required."""

_TYPE_META = {
    "apiVersion": "APIVersion defines the versioned schema of this representation of an object.",
    "kind": "Kind is a string value representing the REST resource this object represents.",
}
_WRITE_VERBS = {"post": "create", "put": "update", "patch": "patch"}


class OpenApi:
    """The documents of every served group and version, built when first asked for."""

    def __init__(self, registry: Registry) -> None:
        self._registry, self._schema = registry, api_schema()
        self._built: dict[str, bytes] = {}
        text = json.dumps(sorted((k.resource, k.message) for k in registry))
        data = resources.files("podwire.apiserver").joinpath("data")
        texts = data.joinpath("descriptions.json").read_bytes()
        self._texts: dict[str, str] = json.loads(texts)
        """For `kubectl explain`, by message (`Pod`), field (`PodSpec.containers`) or field of any message (`*.spec`)."""
        table = data.joinpath("fields.json").read_bytes()
        self._hash = hashlib.sha256(table + texts + text.encode()).hexdigest().upper()

    def index(self) -> Json:
        """/openapi/v3: where each group's document is; the hash lets clients keep it for good."""
        return {"paths": {path: {"serverRelativeURL": f"/openapi/v3/{path}?hash={self._hash}"} for path in self._paths()}}

    @property
    def etag(self) -> str:
        return self._hash

    def document(self, path: str) -> bytes | None:
        """The JSON document of `api/v1` or `apis/<group>/<version>`; None for a path that is not served."""
        if path not in self._built:
            kinds = self._paths().get(path)
            if kinds is None:
                return None
            self._built[path] = json.dumps(self._build(kinds), separators=(",", ":")).encode()
        return self._built[path]

    def _paths(self) -> dict[str, list[Kind]]:
        found: dict[str, list[Kind]] = {}
        for kind in self._registry:
            group, version = kind.resource.group, kind.resource.version
            found.setdefault(f"apis/{group}/{version}" if group else f"api/{version}", []).append(kind)
        return found

    def _build(self, kinds: list[Kind]) -> Json:
        roots = {kind.message for kind in kinds} | {META + "DeleteOptions", META + "Status", META + "ListMeta"}
        if any(kind.has_scale for kind in kinds):
            roots.add("k8s.io.api.autoscaling.v1.Scale")
        schemas = {schema_name(name): self._message(name) for name in sorted(_closure(roots, self._schema))}
        paths: Json = {}
        for kind in kinds:
            _mark_kind(schemas[schema_name(kind.message)], kind)
            schemas[schema_name(kind.message) + "List"] = _list_schema(kind)
            paths |= _kind_paths(kind)
        if "io.k8s.api.autoscaling.v1.Scale" in schemas:
            scale = schemas["io.k8s.api.autoscaling.v1.Scale"]
            scale[GROUP_KIND] = [{"group": "autoscaling", "version": "v1", "kind": "Scale"}]
            scale["properties"] = _type_meta() | scale["properties"]
        return {
            "openapi": "3.0.0",
            "info": {"title": "Kubernetes", "version": "v1.36.0"},
            "paths": paths,
            "components": {"schemas": schemas},
        }

    def _message(self, name: str) -> Json:
        fields = self._schema.fields(name)
        described: Json = {"type": "object"}
        text = self._texts.get(short(name))
        if text:
            described["description"] = text
        if fields:
            described["properties"] = {key: self._property(name, field) for key, field in fields.items()}
        needed = sorted(key for key, field in fields.items() if field.always and (short(name), key) not in _OPTIONAL)
        if needed:
            described["required"] = needed
        if short(name) in ATOMIC_MESSAGES:
            described["x-kubernetes-map-type"] = "atomic"
        return described

    def _property(self, message: str, field: Field) -> Json:
        value = _value(field)
        if field.repeated:
            value = {"type": "array", "items": value} | _list_marks(message, field)
        elif field.mapped:
            value = {"type": "object", "additionalProperties": value}
            if (short(message), field.name) in ATOMIC_MAPS:
                value["x-kubernetes-map-type"] = "atomic"
        elif (short(message), field.name) in RETAIN_KEYS:
            value = {"allOf": [value], "x-kubernetes-patch-strategy": "retainKeys"}
        text = self._texts.get(f"{short(message)}.{field.name}") or self._texts.get(f"*.{field.name}")
        if text:
            value = {"description": text, **({"allOf": [value]} if "$ref" in value else value)}
        return value


def schema_name(message: str) -> str:
    """`k8s.io.api.core.v1.Pod` → `io.k8s.api.core.v1.Pod`, as OpenAPI names it."""
    return "io.k8s" + message.removeprefix("k8s.io")


def _closure(roots: Iterable[str], schema: Schema) -> set[str]:
    found: set[str] = set()
    todo = list(roots)
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found.add(name)
        todo += [f.type for f in schema.fields(name).values() if f.type not in _SCALARS]
    return found


def _value(field: Field) -> Json:
    scalar = _SCALARS.get(field.type)
    return dict(scalar) if scalar is not None else {"$ref": f"#/components/schemas/{schema_name(field.type)}"}


def _list_marks(message: str, field: Field) -> Json:
    rule = LIST_RULES.get((short(message), field.name))
    if rule is None:
        return {"x-kubernetes-list-type": "atomic"}
    marks: Json = {}
    if rule.strategic:
        marks["x-kubernetes-patch-strategy"] = "merge,retainKeys" if rule.retain else "merge"
        if rule.key:
            marks["x-kubernetes-patch-merge-key"] = rule.key
    if not rule.apply:
        marks["x-kubernetes-list-type"] = "atomic"
    elif rule.keys:
        marks |= {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": list(rule.keys)}
    else:
        marks["x-kubernetes-list-type"] = "set"
    return marks


def _gvk(kind: Kind, suffix: str = "") -> Json:
    resource = kind.resource
    return {"group": resource.group, "version": resource.version, "kind": resource.kind + suffix}


def _type_meta() -> Json:
    return {key: {"description": text, "type": "string"} for key, text in _TYPE_META.items()}


def _mark_kind(schema: Json, kind: Kind) -> None:
    schema[GROUP_KIND] = [_gvk(kind)]
    schema["properties"] = _type_meta() | schema.get("properties", {})


def _list_schema(kind: Kind) -> Json:
    item = {"$ref": f"#/components/schemas/{schema_name(kind.message)}"}
    meta = {"$ref": f"#/components/schemas/{schema_name(META + 'ListMeta')}"}
    return {
        "description": f"{kind.resource.kind}List is a list of {kind.resource.kind} objects.",
        "type": "object",
        "properties": _type_meta() | {"items": {"type": "array", "items": item}, "metadata": meta},
        "required": ["items"],
        GROUP_KIND: [_gvk(kind, "List")],
    }


# --- paths --------------------------------------------------------------------------------------------------------


def _kind_paths(kind: Kind) -> Json:
    resource = kind.resource
    base = resource.path("{namespace}" if resource.namespaced else None)
    where = [_parameter("namespace", "path")] if resource.namespaced else []
    paths: Json = {
        base: {"get": _operation(kind, "list"), "post": _operation(kind, "post"), "parameters": where},
        f"{base}/{{name}}": {
            "get": _operation(kind, "get"),
            "put": _operation(kind, "put"),
            "patch": _operation(kind, "patch"),
            "delete": _operation(kind, "delete"),
            "parameters": [_parameter("name", "path"), *where],
        },
    }
    if resource.namespaced:
        paths[resource.path()] = {"get": _operation(kind, "list")}
    for sub in kind.subresources:
        if sub.name in ("status", "scale"):
            operations = {verb: _operation(kind, verb, sub.name) for verb in ("get", "put", "patch")}
            paths[f"{base}/{{name}}/{sub.name}"] = {**operations, "parameters": [_parameter("name", "path"), *where]}
    return paths


def _operation(kind: Kind, verb: str, sub: str = "") -> Json:
    """`verb` is an HTTP method, or list for the get of a collection."""
    names = {"dryRun": "string", "fieldManager": "string", "fieldValidation": "string"} if verb in _WRITE_VERBS else {}
    if verb == "patch":
        names["force"] = "boolean"
    if verb == "list":
        names = {"labelSelector": "string", "fieldSelector": "string", "limit": "integer", "continue": "string"}
        names |= {"resourceVersion": "string", "watch": "boolean"}
    gvk = {"group": "autoscaling", "version": "v1", "kind": "Scale"} if sub == "scale" else _gvk(kind)
    return {
        "operationId": f"{_WRITE_VERBS.get(verb, verb)}{kind.resource.kind}{sub.title()}",
        "parameters": [_parameter(name, "query", type_) for name, type_ in names.items()],
        "responses": {"200": {"description": "OK"}},
        "x-kubernetes-action": _WRITE_VERBS.get(verb, verb),
        GROUP_KIND: gvk,
    }


def _parameter(name: str, place: str, type_: str = "string") -> Json:
    parameter: Json = {"name": name, "in": place, "schema": {"type": type_, "uniqueItems": True}}
    if place == "path":
        parameter["required"] = True
    return parameter
