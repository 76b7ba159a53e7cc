"""JSON patch (RFC 6902) and merge patch (RFC 7386); strategic merge is in strategic.py, server-side apply in apply.py.

All of them are functions of documents; none changes its arguments.
"""

import copy
from typing import Any

from podwire.apiserver.schema import api_schema
from podwire.apiserver.strategic import PatchFailed, strategic_merge

JSON_PATCH = "application/json-patch+json"
MERGE_PATCH = "application/merge-patch+json"
STRATEGIC_PATCH = "application/strategic-merge-patch+json"
APPLY_PATCH = "application/apply-patch+yaml"
CONTENT_TYPES = (JSON_PATCH, MERGE_PATCH, STRATEGIC_PATCH, APPLY_PATCH)


def patched(content_type: str, current: Any, patch: Any, message: str) -> Any:
    """`current` with a decoded patch body of one of the first three content types. Raises PatchFailed."""
    if content_type == JSON_PATCH:
        return json_patch(current, patch)
    if not isinstance(patch, dict):
        raise PatchFailed(400, "error decoding patch: the patch must be a JSON object")
    if content_type == MERGE_PATCH:
        return merge_patch(current, patch)
    return strategic_merge(current, patch, message, api_schema())


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7386: members of `patch` replace those of `target`, null removes, objects merge."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value)
    return merged


def json_patch(document: Any, operations: Any) -> Any:
    """RFC 6902. Raises PatchFailed: 400 for a malformed patch, 422 for one that does not fit the document."""
    if not isinstance(operations, list) or not all(isinstance(op, dict) for op in operations):
        raise PatchFailed(400, "error decoding patch: a JSON patch is an array of operations")
    result = copy.deepcopy(document)
    for operation in operations:
        result = _operate(result, operation)
    return result


def _operate(document: Any, operation: dict[str, Any]) -> Any:
    name = operation.get("op")
    path = _pointer(operation, "path")
    match name:
        case "add":
            return _add(document, path, copy.deepcopy(_needed(operation, "value")))
        case "remove":
            return _remove(document, path)
        case "replace":
            value = copy.deepcopy(_needed(operation, "value"))
            if not path:
                return value
            _get(document, path)
            return _set(document, path, value)
        case "move":
            source = _pointer(operation, "from")
            if path[: len(source)] == source and path != source:
                raise PatchFailed(422, "cannot move a value into itself")
            value = _get(document, source)
            return _add(_remove(document, source), path, value)
        case "copy":
            return _add(document, path, copy.deepcopy(_get(document, _pointer(operation, "from"))))
        case "test":
            if not _equal(_get(document, path), _needed(operation, "value")):
                raise PatchFailed(422, f"testing value {operation['path']} failed: test failed")
            return document
    raise PatchFailed(400, f'error decoding patch: unexpected operation "{name}"')


def _needed(operation: dict[str, Any], key: str) -> Any:
    if key not in operation:
        raise PatchFailed(400, f'error decoding patch: operation "{operation.get("op")}" needs "{key}"')
    return operation[key]


def _pointer(operation: dict[str, Any], key: str) -> tuple[str, ...]:
    """RFC 6901."""
    text = operation.get(key)
    if not isinstance(text, str) or (text and not text.startswith("/")):
        raise PatchFailed(400, f'error decoding patch: "{key}" of operation "{operation.get("op")}" is no JSON pointer')
    return tuple(part.replace("~1", "/").replace("~0", "~") for part in text.split("/")[1:])


def _missing(path: tuple[str, ...]) -> PatchFailed:
    return PatchFailed(422, f"the path /{'/'.join(path)} does not exist in the object")


def _index(parent: list[Any], part: str, path: tuple[str, ...], *, end: bool = False) -> int:
    if end and part == "-":
        return len(parent)
    if not part.isascii() or not part.isdigit() or (len(part) > 1 and part[0] == "0"):
        raise _missing(path)
    index = int(part)
    if index >= len(parent) + end:
        raise _missing(path)
    return index


def _get(document: Any, path: tuple[str, ...]) -> Any:
    value = document
    for part in path:
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list):
            value = value[_index(value, part, path)]
        else:
            raise _missing(path)
    return value


def _add(document: Any, path: tuple[str, ...], value: Any) -> Any:
    if not path:
        return value
    parent = _get(document, path[:-1])
    if isinstance(parent, list):
        parent.insert(_index(parent, path[-1], path, end=True), value)
    elif isinstance(parent, dict):
        parent[path[-1]] = value
    else:
        raise _missing(path)
    return document


def _set(document: Any, path: tuple[str, ...], value: Any) -> Any:
    parent = _get(document, path[:-1])
    if isinstance(parent, list):
        parent[_index(parent, path[-1], path)] = value
    else:
        parent[path[-1]] = value
    return document


def _remove(document: Any, path: tuple[str, ...]) -> Any:
    if not path:
        return None
    _get(document, path)
    parent = _get(document, path[:-1])
    if isinstance(parent, list):
        del parent[_index(parent, path[-1], path)]
    else:
        del parent[path[-1]]
    return document


def _equal(left: Any, right: Any) -> bool:
    """JSON equality: unlike Python's, true is not 1."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_equal(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_equal, left, right))
    return bool(left == right)


__all__ = [
    "APPLY_PATCH",
    "CONTENT_TYPES",
    "JSON_PATCH",
    "MERGE_PATCH",
    "STRATEGIC_PATCH",
    "PatchFailed",
    "json_patch",
    "merge_patch",
    "patched",
]
