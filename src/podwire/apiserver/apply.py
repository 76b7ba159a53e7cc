"""Server-side apply: the merge, and who owns which field (metadata.managedFields).

Ownership is kept from an object's first apply on; before, all that was there belongs to the manager "before-first-apply",
as in Kubernetes for objects that are older than its field tracking. `record_update` keeps it up in all other writes.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from podwire.apiserver.fieldsets import (
    SELF,
    FieldPath,
    child_type,
    duplicates,
    from_tree,
    granular,
    item_key,
    paths_of,
    readable,
    to_tree,
)
from podwire.apiserver.listrules import ListRule, apply_rule
from podwire.apiserver.schema import Schema, api_schema
from podwire.apiserver.strategic import PatchFailed
from podwire.apiserver.validation import FieldError
from podwire.model.errors import InvalidInput, PodwireError
from podwire.model.meta import Json

LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
BEFORE_FIRST = "before-first-apply"

_UNOWNED = frozenset(
    {("f:apiVersion",), ("f:kind",)}
    | {
        ("f:metadata", f"f:{name}")
        for name in (
            "name",
            "namespace",
            "generateName",
            "creationTimestamp",
            "selfLink",
            "uid",
            "resourceVersion",
            "generation",
            "managedFields",
            "deletionTimestamp",
            "deletionGracePeriodSeconds",
        )
    }
)
"""Fields that nobody owns."""


class ApplyConflict(PodwireError):
    """Others own fields with other values: a 409 with one cause for each field."""

    def __init__(self, causes: list[FieldError]) -> None:
        self.causes = causes
        one = len(causes) == 1
        text = f"Apply failed with {len(causes)} conflict{'' if one else 's'}: "
        if one:
            text += f"{causes[0].message}: {causes[0].field}"
        else:
            whose = list(dict.fromkeys(cause.message for cause in causes))
            groups = []
            for who in whose:
                fields = "".join(f"\n- {cause.field}" for cause in causes if cause.message == who)
                groups.append(who.replace("conflict with", "conflicts with", 1) + ":" + fields)
            text += "\n".join(groups)
        super().__init__(text)


@dataclass(frozen=True)
class Manager:
    """Who writes: the request's fieldManager, by which operation, to which subresource ("" for the object)."""

    name: str
    api_version: str
    operation: str = "Apply"
    subresource: str = ""

    def describe(self) -> str:
        sub = f' with subresource "{self.subresource}"' if self.subresource else ""
        using = f" using {self.api_version}" if self.operation == "Update" else ""
        return f'conflict with "{self.name}"{sub}{using}'


@dataclass(frozen=True)
class _Entry:
    manager: Manager
    paths: frozenset[FieldPath]
    time: str

    def document(self) -> Json:
        entry = {
            "manager": self.manager.name,
            "operation": self.manager.operation,
            "apiVersion": self.manager.api_version,
            "time": self.time,
            "fieldsType": "FieldsV1",
            "fieldsV1": to_tree(self.paths),
        }
        if self.manager.subresource:
            entry["subresource"] = self.manager.subresource
        return entry


def apply(live: Json | None, config: Json, message: str, manager: Manager, now: str, *, force: bool = False) -> Json:
    """`live` (None: it is created) with what `config` says, managedFields included.

    Fields that the manager applied before, and nobody else owns, go when `config` no longer has them. `config` is fitted.
    Raises ApplyConflict, and PatchFailed where two items of a list have the same key.
    """
    schema = api_schema()
    twice = duplicates(config, message, schema)
    if twice:
        raise PatchFailed(400, "failed to create typed patch object: errors: " + "; ".join(twice))
    base: Json = live if live is not None else {key: config[key] for key in ("apiVersion", "kind")}
    config = {**config, "metadata": {k: v for k, v in (config.get("metadata") or {}).items() if k != "managedFields"}}
    wanted = {path: value for path, value in paths_of(config, message, schema).items() if not _unowned(path)}
    held = paths_of(base, message, schema)
    entries = _entries(base) if live is not None else []
    if live is not None and not entries:
        first = Manager(BEFORE_FIRST, manager.api_version, "Update")
        entries = [_Entry(first, frozenset(path for path in held if not _unowned(path)), now)]
    mine = next((e for e in entries if _same(e.manager, manager)), None)
    others = [e for e in entries if e is not mine]
    others = _settle_conflicts(others, wanted, held, force=force, ignored=_last_applied(base, held, message, manager))
    merged = _merge(base, config, message, schema)
    if mine is not None:
        kept = set().union(*(e.paths for e in others)) if others else set()
        gone = {path for path in mine.paths - set(wanted) if path not in kept}
        merged = _without(merged, gone, set(wanted) | kept, message, schema)
    unchanged = mine is not None and mine.paths == frozenset(wanted) and merged == base
    entry = mine if unchanged and mine is not None else _Entry(manager, frozenset(wanted), now)
    return _with_entries(merged, [*others, entry])


def record_update(new: Json, old: Json, message: str, manager: Manager, now: str) -> Json:
    """`new` with managedFields brought up to date for a write that is no apply. Objects never applied have none."""
    tracked = _entries(old)
    if not tracked or (new.get("metadata") or {}).get("managedFields") == []:
        return _with_entries(new, [])
    entries = _entries(new) or tracked
    schema = api_schema()
    before, after = paths_of(old, message, schema), paths_of(new, message, schema)
    changed = {path for path, value in after.items() if path not in before or before[path] != value}
    changed = {path for path in changed if not _unowned(path)}
    alive = set(after)
    manager = replace(manager, operation="Update")
    mine = next((e for e in entries if _same(e.manager, manager)), None)
    kept = [replace(entry, paths=frozenset(entry.paths & alive - changed)) for entry in entries if entry is not mine]
    own = changed | ((set(mine.paths) & alive) if mine is not None else set())
    time = now if changed or mine is None else mine.time
    return _with_entries(new, [*kept, _Entry(manager, frozenset(own), time)])


def _unowned(path: FieldPath) -> bool:
    return path[:1] in _UNOWNED or path[:2] in _UNOWNED


def _same(left: Manager, right: Manager) -> bool:
    return (left.name, left.operation, left.subresource) == (right.name, right.operation, right.subresource)


def _entries(obj: Json) -> list[_Entry]:
    found = []
    for entry in (obj.get("metadata") or {}).get("managedFields") or []:
        names = (entry.get(key, "") for key in ("manager", "apiVersion", "operation", "subresource"))
        paths = frozenset(from_tree(entry.get("fieldsV1") or {}))
        found.append(_Entry(Manager(*names), paths - {()}, entry.get("time", "")))
    return found


def _with_entries(obj: Json, entries: Iterable[_Entry]) -> Json:
    meta = {key: value for key, value in (obj.get("metadata") or {}).items() if key != "managedFields"}
    listed = [entry.document() for entry in entries if entry.paths]
    if listed:
        meta["managedFields"] = listed
    return {**obj, "metadata": meta}


def _last_applied(base: Json, held: dict[FieldPath, Any], message: str, manager: Manager) -> set[FieldPath]:
    """What client-side apply put there is no conflict when kubectl itself moves on to server-side apply."""
    text = ((base.get("metadata") or {}).get("annotations") or {}).get(LAST_APPLIED)
    if manager.name != "kubectl" or not text:
        return set()
    try:
        applied = api_schema().fit(json.loads(text), message).document
    except (ValueError, InvalidInput):
        return set()
    paths = paths_of(applied, message, api_schema())
    return {path for path, value in paths.items() if path in held and held[path] == value}


def _settle_conflicts(
    others: list[_Entry], wanted: dict[FieldPath, Any], held: dict[FieldPath, Any], *, force: bool, ignored: set[FieldPath]
) -> list[_Entry]:
    """The other entries without what is taken from them; ApplyConflict if something may not be taken."""
    contested = {p for p, value in wanted.items() if p[-1] != SELF and (p not in held or held[p] != value)}
    causes: list[FieldError] = []
    settled = []
    for entry in others:
        lost = entry.paths & contested
        if not force:
            whose = entry.manager.describe()
            causes += [FieldError("FieldManagerConflict", whose, readable(path)) for path in sorted(lost - ignored)]
        settled.append(replace(entry, paths=entry.paths - lost))
    if causes:
        raise ApplyConflict(causes)
    return settled


# --- the merge ----------------------------------------------------------------------------------------------------


def _merge(live: Json, config: Json, message: str, schema: Schema) -> Json:
    fields = schema.fields(message) if message in schema.numbered else {}
    merged = dict(live)
    for key, value in config.items():
        field, before = fields.get(key), live.get(key)
        if before is None or not granular(value, message, key, field):
            merged[key] = value
        elif isinstance(value, list):
            rule = apply_rule(message, key)
            assert rule is not None
            merged[key] = _merge_list(before, value, rule, child_type(field), schema)
        elif field is not None and field.mapped:
            merged[key] = {**before, **value}
        else:
            merged[key] = _merge(before, value, child_type(field), schema)
    return merged


def _merge_list(live: list[Any], config: list[Any], rule: ListRule, message: str, schema: Schema) -> list[Any]:
    """Live items stay where they are, merged with config's of the same key; config's new ones follow."""
    given = {item_key(item, rule): item for item in config}
    merged = []
    for item in live:
        new = given.pop(item_key(item, rule), None)
        keyed = isinstance(new, dict) and isinstance(item, dict)
        merged.append(_merge(item, new, message, schema) if keyed else item)
    return [*merged, *given.values()]


def _without(obj: Json, gone: set[FieldPath], kept: set[FieldPath], message: str, schema: Schema) -> Json:
    """`obj` without the paths in `gone`; list items go whole when nobody owns anything in them."""
    fields = schema.fields(message) if message in schema.numbered else {}
    result: Json = {}
    for key, value in obj.items():
        part = f"f:{key}"
        if (part,) in gone:
            continue
        below, stay = _below(gone, part), _below(kept, part)
        if not below:
            result[key] = value
            continue
        field = fields.get(key)
        left = _prune(value, below, stay, (message, key), child_type(field), schema)
        if left or stay or not isinstance(left, (dict, list)) or (isinstance(left, dict) and not value):
            result[key] = left
    return result


def _prune(value: Any, gone: set[FieldPath], kept: set[FieldPath], where: tuple[str, str], message: str, schema: Schema) -> Any:
    if isinstance(value, dict):
        return _without(value, gone, kept, message, schema)
    rule = apply_rule(*where)
    if not isinstance(value, list) or rule is None:
        return value
    left = []
    for item in value:
        part = item_key(item, rule)
        below, stay = _below(gone, part), _below(kept, part)
        if (part,) in gone and (part,) not in kept:
            continue
        if (SELF,) in below and not stay:
            continue
        left.append(_without(item, below, stay, message, schema) if below and isinstance(item, dict) else item)
    return left


def _below(paths: set[FieldPath], part: str) -> set[FieldPath]:
    return {path[1:] for path in paths if len(path) > 1 and path[0] == part}
