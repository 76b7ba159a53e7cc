"""Where objects stand in the store and in which form: kube-apiserver's key scheme, JSON values without resourceVersion."""

from typing import Any

import msgspec

from podwire.apiserver.kinds.base import Kind
from podwire.model.meta import Json
from podwire.model.resources import Resource
from podwire.store.port import KeyValue

ROOT = "/registry/"

OLD_NAMES = {"services": "services/specs", "nodes": "minions"}
"""Where kube-apiserver keeps what had another name once. Every built-in kind lies by its plural alone, without its group."""

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(dict[str, Any])


def prefix_of(resource: Resource, namespace: str = "") -> str:
    """`/registry/pods/`, `/registry/deployments/shop/`, `/registry/services/specs/`: as kube-apiserver has them."""
    base = f"{ROOT}{OLD_NAMES.get(resource.plural, resource.plural)}/"
    return f"{base}{namespace}/" if namespace else base


def key_of(resource: Resource, namespace: str, name: str) -> str:
    return prefix_of(resource, namespace if resource.namespaced else "") + name


def encode(document: Any) -> bytes:
    """Compact JSON."""
    return _encoder.encode(document)


def to_value(kind: Kind, obj: Json) -> bytes:
    """The bytes to store: resourceVersion is not part of them, it is the store's revision."""
    stored = kind.to_storage(obj)
    meta = {key: value for key, value in stored.get("metadata", {}).items() if key != "resourceVersion"}
    return _encoder.encode({**stored, "metadata": meta})


def from_value(value: bytes, revision: int) -> Json:
    """The stored document with its resourceVersion, in the storage version's form."""
    obj = _decoder.decode(value)
    obj["metadata"]["resourceVersion"] = str(revision)
    return obj


def from_item(kind: Kind, item: KeyValue) -> Json:
    """The document that `item` holds, in `kind`'s version."""
    return kind.from_storage(from_value(item.value, item.mod_revision))
