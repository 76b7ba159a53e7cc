"""What the generic verbs need to know about a kind. A new kind is one subclass of `Kind` and one line in `registry.py`.

Documents are JSON as decoded. `prepare_create` and `prepare_update` own their first argument (it was just decoded from a
request) and may change it in place; `old` documents come from the store and are never changed.
The verbs own metadata.{name, generateName, namespace, uid, creationTimestamp, resourceVersion, deletionTimestamp,
managedFields}; a kind owns `generation` and everything outside metadata.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any, ClassVar, NamedTuple

from podwire.apiserver.kinds.metadata import validate_metadata
from podwire.apiserver.schema import Fitted, api_schema
from podwire.apiserver.tables import age
from podwire.apiserver.validation import FieldError, Path, dns_subdomain
from podwire.model.meta import Json
from podwire.model.resources import Resource


class Column(NamedTuple):
    """One printed column of `kubectl get`; priority 1 is shown with `-o wide` only."""

    name: str
    description: str = ""
    type: str = "string"
    format: str = ""
    priority: int = 0


NAME = Column("Name", "Name of the object, unique within its namespace and kind.", format="name")
AGE = Column("Age", "Time since the object was created.")


class Subresource(NamedTuple):
    """`kind` and `api_version` are what discovery says of it; empty means the parent's."""

    name: str
    verbs: tuple[str, ...]
    kind: str = ""
    api_version: str = ""


STATUS = Subresource("status", ("get", "patch", "update"))
SCALE = Subresource("scale", ("get", "patch", "update"), "Scale", "autoscaling/v1")

VERBS = ("create", "delete", "deletecollection", "get", "list", "patch", "update", "watch")


class Kind:
    """One served resource: its names, its lifecycle rules and how it prints."""

    resource: ClassVar[Resource]
    storage: ClassVar[Resource]
    """Under which resource it is stored; differs from `resource` only for a second version of the same objects."""
    message: ClassVar[str]
    """Name of its message in the field table (schema.py): protobuf decoding, unknown fields, OpenAPI."""
    short_names: ClassVar[tuple[str, ...]] = ()
    categories: ClassVar[tuple[str, ...]] = ()
    subresources: ClassVar[tuple[Subresource, ...]] = ()
    verbs: ClassVar[tuple[str, ...]] = VERBS
    columns: ClassVar[tuple[Column, ...]] = (NAME, AGE)
    counts_generation: ClassVar[bool] = False
    """Whether metadata.generation is kept: 1 at creation, one more at every change outside metadata and status."""
    unconditional_update: ClassVar[bool] = True
    """Whether an update without resourceVersion is taken (last write wins)."""

    def __init_subclass__(cls) -> None:
        if "resource" in cls.__dict__ and "storage" not in cls.__dict__:
            cls.storage = cls.resource

    @property
    def singular(self) -> str:
        return self.resource.kind.lower()

    @property
    def has_status(self) -> bool:
        return any(sub.name == "status" for sub in self.subresources)

    @property
    def has_scale(self) -> bool:
        return any(sub.name == "scale" for sub in self.subresources)

    # --- lifecycle

    def fit(self, obj: Any) -> Fitted:
        """A request's document made to fit the kind's message, before all else. Raises BadDocument (a 400)."""
        if isinstance(obj, dict):
            obj = {"apiVersion": self.resource.api_version, "kind": self.resource.kind, **obj}
        return api_schema().fit(obj, self.message)

    def prepare_create(self, obj: Json, now: datetime) -> Json:
        """The document as it will be stored: defaults set, status as a new object has it, generation 1."""
        if self.has_status:
            obj.pop("status", None)
        self.default(obj)
        self.initialise(obj, now)
        if self.counts_generation:
            obj.setdefault("metadata", {})["generation"] = 1
        return obj

    def prepare_update(self, new: Json, old: Json, *, subresource: str = "") -> Json:
        """The document that replaces `old`: a main write keeps old's status, a status write keeps all but status.

        The caller has made new's metadata agree with old's where it is immutable. Generation is set here.
        """
        if subresource == "status":
            return self.take_status(new, old)
        if self.has_status:
            _carry(new, old, "status")
        self.default(new)
        self.retain(new, old)
        if self.counts_generation:
            before = old.get("metadata", {}).get("generation", 1)
            new.setdefault("metadata", {})["generation"] = before + 1 if self.desired(new) != self.desired(old) else before
        return new

    def take_status(self, new: Json, old: Json) -> Json:
        """`old` with new's status and the parts of metadata that a status write may change (agents annotate nodes so)."""
        merged = {key: value for key, value in old.items() if key != "status"}
        merged["metadata"] = dict(old.get("metadata", {}))
        for key in ("labels", "annotations", "finalizers"):
            _carry(merged["metadata"], new.get("metadata", {}), key)
        for key in ("managedFields", "resourceVersion"):
            if key in new.get("metadata", {}):
                merged["metadata"][key] = new["metadata"][key]
        if "status" in new:
            merged["status"] = new["status"]
        return merged

    def default(self, obj: Json) -> None:
        """Fills in, in place, what Kubernetes fills in. Must be idempotent."""

    def initialise(self, obj: Json, now: datetime) -> None:
        """Sets, in place, what only a new object gets (its first status, …)."""

    def retain(self, new: Json, old: Json) -> None:
        """Takes over from `old` what a client may leave out of an update (a Service's clusterIP, …)."""

    def desired(self, obj: Json) -> Json:
        """The part of the document whose change counts as a new generation."""
        return {key: value for key, value in obj.items() if key not in ("metadata", "status", "apiVersion", "kind")}

    def validate(self, obj: Json, old: Json | None = None, *, subresource: str = "") -> list[FieldError]:
        """All that is wrong with `obj`, in document order; with `old`, also what may not change."""
        errors = validate_metadata(obj.get("metadata", {}), self.name_problems, namespaced=self.resource.namespaced)
        root = Path()
        if subresource not in ("", "scale"):
            return errors + (self.check_status(obj, root) if subresource == "status" else [])
        errors += self.check(obj, root)
        if old is not None:
            errors += self.check_update(obj, old, root)
        return errors

    def check(self, obj: Json, root: Path) -> list[FieldError]:
        """What is wrong with the document alone, metadata aside."""
        return []

    def check_status(self, obj: Json, root: Path) -> list[FieldError]:
        """What is wrong with a status write."""
        return []

    def check_update(self, new: Json, old: Json, root: Path) -> list[FieldError]:
        """What may not change between `old` and `new`."""
        return []

    def name_problems(self, name: str) -> list[str]:
        """Why an object of this kind cannot have that name; empty if it can."""
        return dns_subdomain(name)

    def warnings(self, obj: Json) -> list[str]:
        """Texts for the Warning header of a create or update."""
        return []

    def grace_seconds(self, obj: Json, requested: int | None) -> int:
        """Seconds between a delete request and the removal; 0 removes at once."""
        return 0

    # --- reading

    def selectable_fields(self, obj: Json) -> dict[str, str]:
        """Field path → value, for fieldSelector. A path that is missing here cannot be selected on."""
        meta = obj.get("metadata", {})
        fields = {"metadata.name": str(meta.get("name", ""))}
        if self.resource.namespaced:
            fields["metadata.namespace"] = str(meta.get("namespace", ""))
        return fields

    def row(self, obj: Json, now: datetime) -> list[Any]:
        """The cells under `columns`."""
        return [obj.get("metadata", {}).get("name", ""), age(obj.get("metadata", {}).get("creationTimestamp"), now)]

    def to_storage(self, obj: Json) -> Json:
        """The document in the form it is stored in."""
        return obj

    def from_storage(self, obj: Json) -> Json:
        """The stored document in this version's form. May return its argument; never changes it."""
        return obj

    # --- scale

    def scale_of(self, obj: Json) -> Json:
        """The object's autoscaling/v1 Scale. Only kinds with the subresource have it."""
        raise LookupError(f"{self.resource.plural} cannot be scaled")

    def with_replicas(self, obj: Json, replicas: int) -> Json:
        """A copy of `obj` scaled to `replicas`."""
        return {**obj, "spec": {**obj.get("spec", {}), "replicas": replicas}}


def _carry(new: Json, old: Mapping[str, Any], key: str) -> None:
    if key in old:
        new[key] = old[key]
    else:
        new.pop(key, None)
