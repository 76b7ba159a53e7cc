"""Strategic merge patch: merge patch that knows which lists merge, by which key, and takes $-directives.

Semantics: k8s.io/apimachinery strategicpatch. Directives: `$patch: replace|delete|merge`, `$retainKeys`,
`$setElementOrder/<list>`, `$deleteFromPrimitiveList/<list>`.
"""

import copy
from collections.abc import Iterable
from typing import Any

from podwire.apiserver.listrules import ListRule, strategic_rule
from podwire.apiserver.schema import Field, Schema
from podwire.model.errors import InvalidInput
from podwire.model.meta import Json

PATCH = "$patch"
RETAIN = "$retainKeys"
ORDER = "$setElementOrder/"
DELETE_PLAIN = "$deleteFromPrimitiveList/"


class PatchFailed(InvalidInput):
    """`code` is 400 for a patch that makes no sense and 422 for one that does not fit the object."""

    def __init__(self, code: int, message: str) -> None:
        self.code = code
        super().__init__(message)


def strategic_merge(original: Any, patch: Json, message: str, schema: Schema) -> Json:
    """`original`, a document of type `message`, with `patch`. Raises PatchFailed."""
    return _merge(original if isinstance(original, dict) else {}, patch, message, schema)


def _merge(original: Json, patch: Json, message: str, schema: Schema) -> Json:
    """`message` is "" for a map or a document that no message describes."""
    directive = patch.get(PATCH, "merge")
    if directive == "replace":
        return {key: _plain(value) for key, value in patch.items() if value is not None and not key.startswith("$")}
    if directive == "delete":
        return {}
    if directive != "merge":
        raise PatchFailed(400, f"Unknown patch type found: {directive}")
    fields = schema.fields(message) if message in schema.numbered else {}
    merged = _retained(original, patch)
    for key, value in patch.items():
        if key.startswith("$"):
            continue
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict):
            below = merged.get(key)
            merged[key] = _merge(below if isinstance(below, dict) else {}, value, _type_of(fields.get(key)), schema)
        elif isinstance(value, list):
            merged[key] = _merge_list(merged.get(key), key, patch, (message, fields.get(key)), schema)
        else:
            merged[key] = value
    for key in _only_directed(patch):
        if isinstance(merged.get(key), list):
            merged[key] = _merge_list(merged[key], key, {**patch, key: []}, (message, fields.get(key)), schema)
    return merged


def _type_of(field: Field | None) -> str:
    return "" if field is None or field.mapped else field.type


def _retained(original: Json, patch: Json) -> Json:
    keep = patch.get(RETAIN)
    if keep is None:
        return dict(original)
    if not isinstance(keep, list):
        raise PatchFailed(400, f"{RETAIN} must be a list")
    return {key: value for key, value in original.items() if key in keep}


def _only_directed(patch: Json) -> list[str]:
    """Lists that are ordered or shortened by directive without being in the patch themselves."""
    named = (key.removeprefix(mark) for key in patch for mark in (ORDER, DELETE_PLAIN) if key.startswith(mark))
    return [name for name in dict.fromkeys(named) if name not in patch]


def _plain(value: Any) -> Any:
    """A patch's value for a place where nothing was: no nulls in objects, no directives, no items to delete."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None and not key.startswith("$")}
    if isinstance(value, list):
        return [_plain(item) for item in value if not (isinstance(item, dict) and PATCH in item)]
    return value


def _merge_list(original: Any, key: str, patch: Json, where: tuple[str, Field | None], schema: Schema) -> list[Any]:
    message, field = where
    items = patch[key]
    rule = strategic_rule(message, key) if message else None
    if rule is None:
        return [_plain(item) for item in items]
    before = original if isinstance(original, list) else []
    if not rule.key:
        return _merge_plain(before, items, patch, key)
    if any(isinstance(item, dict) and item.get(PATCH) == "replace" for item in items):
        return [_plain(item) for item in items if not (isinstance(item, dict) and PATCH in item)]
    merged = _merge_items(before, items, rule, _type_of(field), schema)
    return _ordered(merged, before, patch.get(ORDER + key) or items, rule.key)


def _merge_plain(before: list[Any], items: list[Any], patch: Json, key: str) -> list[Any]:
    gone = patch.get(DELETE_PLAIN + key) or []
    merged = [item for item in dict.fromkeys([*before, *items]) if item not in gone]
    return _ordered(merged, before, patch.get(ORDER + key) or items, "")


def _merge_items(before: list[Any], items: list[Any], rule: ListRule, message: str, schema: Schema) -> list[Any]:
    merged = copy.copy(before)
    for item in items:
        if not isinstance(item, dict) or rule.key not in item:
            raise PatchFailed(400, f"map: {item} does not contain declared merge key: {rule.key}")
        name = item[rule.key]
        matches = [i for i, one in enumerate(merged) if isinstance(one, dict) and one.get(rule.key) == name]
        if item.get(PATCH) == "delete":
            merged = [one for i, one in enumerate(merged) if i not in matches]
        elif matches:
            merged[matches[0]] = _merge(merged[matches[0]], item, message, schema)
        else:
            merged.append(_merge({}, item, message, schema))
    return merged


def _identity(item: Any, key: str) -> Any:
    return item.get(key) if key and isinstance(item, dict) else item


def _ordered(merged: list[Any], before: list[Any], order: Iterable[Any], key: str) -> list[Any]:
    """Items named in `order` come in that order; the rest keep their places relative to where they stood before.

    Without $setElementOrder the patch's own items are the order, so what a patch adds comes first (as in Kubernetes).
    """
    rank = {_identity(item, key): i for i, item in enumerate(order)}
    place = {_identity(item, key): i for i, item in enumerate(before)}
    named = sorted((m for m in merged if _identity(m, key) in rank), key=lambda m: rank[_identity(m, key)])
    others = [m for m in merged if _identity(m, key) not in rank]
    result: list[Any] = []
    while named and others:
        left, right = place.get(_identity(others[0], key)), place.get(_identity(named[0], key))
        first = left is not None and right is not None and left < right
        result.append(others.pop(0) if first else named.pop(0))
    return [*result, *others, *named]
