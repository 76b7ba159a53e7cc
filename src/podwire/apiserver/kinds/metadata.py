"""Validation of ObjectMeta, the same for every kind."""

from collections.abc import Callable
from typing import Any

from podwire.apiserver.validation import (
    FieldError,
    Path,
    dns_label,
    each,
    forbidden,
    invalid,
    label_value,
    qualified_name,
    required,
    too_long,
)
from podwire.model.meta import Json

NameRule = Callable[[str], list[str]]
"""Why a name is not allowed; empty if it is."""

ANNOTATIONS_LIMIT = 256 * 1024
"""Bytes of all annotations together (k8s.io/apimachinery TotalAnnotationSizeLimitB)."""


def validate_metadata(meta: Json, rule: NameRule, *, namespaced: bool) -> list[FieldError]:
    """Name, namespace, labels, annotations, owners and finalizers."""
    root = Path() / "metadata"
    errors: list[FieldError] = []
    if meta.get("generateName") and not meta.get("name"):
        errors += each(root / "generateName", meta["generateName"], rule(str(meta["generateName"]).rstrip("-") or "x"))
    name = meta.get("name", "")
    if not name:
        errors.append(required(root / "name", "name or generateName is required"))
    else:
        errors += each(root / "name", name, rule(str(name)))
    if namespaced:
        errors += _namespace(meta.get("namespace", ""), root / "namespace")
    errors += labels(meta.get("labels"), root / "labels")
    errors += _annotations(meta.get("annotations"), root / "annotations")
    errors += _owners(meta.get("ownerReferences"), root / "ownerReferences")
    for i, finalizer in enumerate(meta.get("finalizers") or []):
        errors += each(root / "finalizers" @ i, finalizer, qualified_name(str(finalizer)))
    return errors


def _namespace(value: str, path: Path) -> list[FieldError]:
    return each(path, value, dns_label(value)) if value else [required(path)]


def labels(value: Any, path: Path) -> list[FieldError]:
    errors: list[FieldError] = []
    for key, text in (value or {}).items():
        errors += each(path, key, qualified_name(key))
        errors += each(path, text, label_value(str(text)))
    return errors


def _annotations(value: Any, path: Path) -> list[FieldError]:
    errors: list[FieldError] = []
    size = 0
    for key, text in (value or {}).items():
        errors += each(path, key, qualified_name(key.lower()))
        size += len(key.encode()) + len(str(text).encode())
    if size > ANNOTATIONS_LIMIT:
        errors.append(too_long(path, ANNOTATIONS_LIMIT))
    return errors


def _owners(value: Any, path: Path) -> list[FieldError]:
    errors: list[FieldError] = []
    controllers = 0
    for i, owner in enumerate(value or []):
        errors += [
            invalid(path @ i / field, owner.get(field, ""), "must not be empty")
            for field in ("apiVersion", "kind", "name", "uid")
            if not owner.get(field)
        ]
        controllers += bool(owner.get("controller"))
    if controllers > 1:
        text = 'Only one reference can have Controller set to true. Found "true" in references for several owners'
        errors.append(invalid(path, value, text))
    return errors


def selector(value: Any, path: Path) -> list[FieldError]:
    """A metav1.LabelSelector's keys, operators and values."""
    errors: list[FieldError] = []
    if value is None:
        return errors
    errors += labels(value.get("matchLabels"), path / "matchLabels")
    for i, item in enumerate(value.get("matchExpressions") or []):
        at = path / "matchExpressions" @ i
        operator = item.get("operator", "")
        errors += each(at / "key", item.get("key", ""), qualified_name(str(item.get("key", ""))))
        if operator in ("In", "NotIn"):
            if not item.get("values"):
                errors.append(required(at / "values", "must be specified when `operator` is 'In' or 'NotIn'"))
        elif operator in ("Exists", "DoesNotExist"):
            if item.get("values"):
                detail = "may not be specified when `operator` is 'Exists' or 'DoesNotExist'"
                errors.append(forbidden(at / "values", detail))
        else:
            errors.append(invalid(at / "operator", operator, "not a valid selector operator"))
    return errors
