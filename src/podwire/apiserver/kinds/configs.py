"""ConfigMap, Secret, ServiceAccount: data that pods mount."""

import base64
from datetime import datetime
from typing import Any

from podwire.apiserver.kinds.base import AGE, NAME, Column, Kind, Subresource
from podwire.apiserver.tables import age
from podwire.apiserver.validation import FieldError, Path, config_key, each, forbidden, immutable, invalid, required, too_long
from podwire.model import resources
from podwire.model.meta import Json

SIZE_LIMIT = 1024 * 1024
"""Bytes of data in one ConfigMap or Secret."""

_REQUIRED_KEYS = {
    "kubernetes.io/dockercfg": (".dockercfg",),
    "kubernetes.io/dockerconfigjson": (".dockerconfigjson",),
    "kubernetes.io/tls": ("tls.crt", "tls.key"),
    "kubernetes.io/ssh-auth": ("ssh-privatekey",),
}


class ConfigMapKind(Kind):
    resource = resources.CONFIGMAPS
    message = "k8s.io.api.core.v1.ConfigMap"
    short_names = ("cm",)
    columns = (NAME, Column("Data", "Data contains the configuration data.", type="integer"), AGE)

    def check(self, obj: Json, root: Path) -> list[FieldError]:
        data, binary = obj.get("data") or {}, obj.get("binaryData") or {}
        errors: list[FieldError] = []
        for key in sorted(data):
            errors += each(root / "data" @ key, key, config_key(key))
            if key in binary:
                errors.append(invalid(root / "data" @ key, key, "duplicate of key present in binaryData"))
        for key in sorted(binary):
            errors += each(root / "binaryData" @ key, key, config_key(key))
        size = sum(len(str(v).encode()) for v in data.values()) + sum(len(str(v)) * 3 // 4 for v in binary.values())
        if size > SIZE_LIMIT:
            errors.append(too_long(root, SIZE_LIMIT))
        return errors

    def check_update(self, new: Json, old: Json, root: Path) -> list[FieldError]:
        return _frozen(new, old, root, ("data", "binaryData"))

    def row(self, obj: Json, now: datetime) -> list[Any]:
        meta = obj.get("metadata", {})
        count = len(obj.get("data") or {}) + len(obj.get("binaryData") or {})
        return [meta.get("name", ""), count, age(meta.get("creationTimestamp"), now)]


class SecretKind(Kind):
    resource = resources.SECRETS
    message = "k8s.io.api.core.v1.Secret"
    columns = (
        NAME,
        Column("Type", "Used to facilitate programmatic handling of secret data."),
        Column("Data", "Data contains the secret data.", type="integer"),
        AGE,
    )

    def default(self, obj: Json) -> None:
        obj["type"] = obj.get("type") or "Opaque"
        plain = obj.pop("stringData", None)
        if plain:
            encoded = {key: base64.b64encode(str(text).encode()).decode() for key, text in plain.items()}
            obj["data"] = {**(obj.get("data") or {}), **encoded}

    def check(self, obj: Json, root: Path) -> list[FieldError]:
        data = obj.get("data") or {}
        errors: list[FieldError] = []
        for key in sorted(data):
            errors += each(root / "data" @ key, key, config_key(key))
        errors += [required(root / "data" @ key) for key in _REQUIRED_KEYS.get(obj.get("type", ""), ()) if key not in data]
        if sum(len(str(v)) * 3 // 4 for v in data.values()) > SIZE_LIMIT:
            errors.append(too_long(root / "data", SIZE_LIMIT))
        return errors

    def check_update(self, new: Json, old: Json, root: Path) -> list[FieldError]:
        return immutable(root / "type", new.get("type"), old.get("type")) + _frozen(new, old, root, ("data",))

    def selectable_fields(self, obj: Json) -> dict[str, str]:
        return {**super().selectable_fields(obj), "type": obj.get("type", "")}

    def row(self, obj: Json, now: datetime) -> list[Any]:
        meta = obj.get("metadata", {})
        count = len(obj.get("data") or {})
        return [meta.get("name", ""), obj.get("type", ""), count, age(meta.get("creationTimestamp"), now)]


class ServiceAccountKind(Kind):
    resource = resources.SERVICEACCOUNTS
    message = "k8s.io.api.core.v1.ServiceAccount"
    short_names = ("sa",)
    subresources = (Subresource("token", ("create",), "TokenRequest", "authentication.k8s.io/v1"),)


def _frozen(new: Json, old: Json, root: Path, fields: tuple[str, ...]) -> list[FieldError]:
    if not old.get("immutable"):
        return []
    text = "field is immutable when `immutable` is set"
    changed = [f for f in ("immutable", *fields) if (new.get(f) or None) != (old.get(f) or None)]
    return [forbidden(root / field, text) for field in changed]
