"""Sets of fields, as managedFields keeps them: FieldsV1 trees, and the same as flat sets of paths.

A path is a tuple of FieldsV1 keys: `f:name` a member, `k:{…}` a list item by its keys, `v:…` an item of a set; a last `.`
is the list item itself. (sigs.k8s.io/structured-merge-diff, fieldpath.)
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from podwire.apiserver.listrules import ATOMIC_MAPS, ATOMIC_MESSAGES, ListRule, apply_rule, short
from podwire.apiserver.schema import Field, Schema
from podwire.model.meta import Json

FieldPath = tuple[str, ...]
SELF = "."

_KEY_DEFAULTS: dict[str, Any] = {"protocol": "TCP"}
"""List keys that clients may leave out, and what they then mean."""


def item_key(item: Any, rule: ListRule) -> str:
    """The path part of a list item under `rule`."""
    if not rule.keys:
        return "v:" + _json(item)
    keys = {key: item.get(key, _KEY_DEFAULTS.get(key)) for key in rule.keys} if isinstance(item, dict) else {}
    return "k:" + _json({key: value for key, value in sorted(keys.items()) if value is not None})


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def child_type(field: Field | None) -> str:
    """The message of a field's values; "" if they have none."""
    return "" if field is None or field.mapped or "." not in field.type else field.type


def granular(value: Any, message: str, key: str, field: Field | None) -> bool:
    """Whether a member is owned piece by piece: maps and messages that are not atomic, lists with a rule."""
    if isinstance(value, list):
        return apply_rule(message, key) is not None
    if not isinstance(value, dict) or not message:
        return False
    if field is not None and field.mapped:
        return (short(message), key) not in ATOMIC_MAPS
    return bool(child_type(field)) and short(child_type(field)) not in ATOMIC_MESSAGES


def paths_of(obj: Json, message: str, schema: Schema) -> dict[FieldPath, Any]:
    """Every owned path of a document with the value there (list items themselves map to None)."""
    return dict(_walk(obj, message, (), schema))


def _walk(obj: Json, message: str, at: FieldPath, schema: Schema) -> Iterator[tuple[FieldPath, Any]]:
    fields = schema.fields(message) if message in schema.numbered else {}
    for key, value in obj.items():
        field, path = fields.get(key), (*at, f"f:{key}")
        if not granular(value, message, key, field) or not value:
            yield path, value
        elif isinstance(value, list):
            rule = apply_rule(message, key)
            assert rule is not None
            yield from _walk_list(value, rule, child_type(field), path, schema)
        elif field is not None and field.mapped:
            for name, item in value.items():
                yield (*path, f"f:{name}"), item
        else:
            yield from _walk(value, child_type(field), path, schema)


def duplicates(obj: Json, message: str, schema: Schema) -> list[str]:
    """List items that share a key, as `.spec.ports: duplicate entries for key [port=80,protocol="TCP"]`."""
    return list(_duplicates(obj, message, (), schema))


def _duplicates(obj: Json, message: str, at: FieldPath, schema: Schema) -> Iterator[str]:
    fields = schema.fields(message) if message in schema.numbered else {}
    for key, value in obj.items():
        field, path = fields.get(key), (*at, f"f:{key}")
        rule = apply_rule(message, key) if isinstance(value, list) else None
        if rule is not None:
            keys = [item_key(item, rule) for item in value]
            again = dict.fromkeys(part for i, part in enumerate(keys) if part in keys[:i])
            yield from (f"{readable(path)}: duplicate entries for key {readable((part,))}" for part in again)
            for part, item in zip(keys, value, strict=True):
                if isinstance(item, dict):
                    yield from _duplicates(item, child_type(field), (*path, part), schema)
        elif isinstance(value, dict) and granular(value, message, key, field):
            yield from _duplicates(value, child_type(field), path, schema)


def _walk_list(
    items: list[Any], rule: ListRule, message: str, at: FieldPath, schema: Schema
) -> Iterator[tuple[FieldPath, Any]]:
    for item in items:
        path = (*at, item_key(item, rule))
        if not rule.keys:
            yield path, item
        elif isinstance(item, dict):
            yield (*path, SELF), None
            if short(message) not in ATOMIC_MESSAGES or set(item) != set(rule.keys):
                yield from _walk(item, message, path, schema)


def to_tree(paths: Iterable[FieldPath]) -> Json:
    """The FieldsV1 document of a set of paths."""
    root: Json = {}
    for path in sorted(paths):
        node = root
        for part in path:
            node = node.setdefault(part, {})
    return root


def from_tree(tree: Json) -> set[FieldPath]:
    """The paths of a FieldsV1 document."""
    return set(_leaves(tree, ()))


def _leaves(tree: Any, at: FieldPath) -> Iterator[FieldPath]:
    if not isinstance(tree, dict) or not tree:
        yield at
        return
    for part, below in tree.items():
        yield from _leaves(below, (*at, part))


def readable(path: FieldPath) -> str:
    """`.spec.containers[name="web"].image`, as conflicts are reported."""
    text = ""
    for part in path:
        if part.startswith("f:"):
            text += "." + part[2:]
        elif part.startswith("k:"):
            keys = json.loads(part[2:])
            text += "[" + ",".join(f"{key}={_json(value)}" for key, value in sorted(keys.items())) + "]"
        elif part.startswith("v:"):
            text += f"[={part[2:]}]"
    return text
