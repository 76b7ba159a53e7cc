"""Create, change and remove objects: the generic lifecycle that is the same for every kind. Knows no HTTP."""

import secrets
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol

from podwire.apiserver import status
from podwire.apiserver.apply import Manager, record_update
from podwire.apiserver.kinds.base import Kind
from podwire.apiserver.storage import from_item, from_value, key_of, to_value
from podwire.apiserver.validation import FieldError, Path, forbidden, invalid
from podwire.model import resources
from podwire.model.meta import Json
from podwire.model.timestamps import format_time
from podwire.store.port import ABSENT, Check, Conflict, Delete, KeyValue, Put, Store, Write

NAME_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"
"""No vowels and no look-alikes (k8s.io/apimachinery util/rand), for generateName's five characters."""

ATTEMPTS = 12
"""How often a write that carries no resourceVersion is tried again after losing a race."""

IMMORTAL = frozenset({"default", "kube-system", "kube-public"})
"""Namespaces that cannot be deleted (NamespaceLifecycle admission)."""

FOREGROUND = "foregroundDeletion"
ORPHAN = "orphan"

OWN_RULES = frozenset({"binding", "finalize"})
"""Subresources that change what an ordinary update may not; the edit itself keeps to what they are for."""

Edit = Callable[[Json], Json]
"""Makes the new document out of a fresh copy of the current one; called again after a lost race."""


class Claim(Protocol):
    """What one write takes and gives back beside the object itself."""

    document: Json
    """The new document, completed by what was taken; for a removal, the old one."""
    writes: Sequence[Write]
    """What goes into the same commit as the object."""

    def close(self, *, done: bool, lost: str = "") -> None:
        """The commit was done, or not (and key `lost`, if it is one of `writes`, is someone else's)."""
        ...


class Claims(Protocol):
    """What a kind keeps in the store beside its objects (a Service: its addresses and ports)."""

    async def plan(self, new: Json | None, old: Json | None) -> Claim:
        """For `new`, which is not changed, in place of `old`; None: not there. Raises StatusError."""
        ...


@dataclass(slots=True)
class NoClaim:
    """Most kinds keep nothing beside their objects."""

    document: Json
    writes: Sequence[Write] = ()

    def close(self, *, done: bool, lost: str = "") -> None:
        pass


@dataclass(frozen=True, slots=True)
class Place:
    """An object's address."""

    kind: Kind
    namespace: str
    name: str

    @property
    def key(self) -> str:
        return key_of(self.kind.storage, self.namespace, self.name)


@dataclass(frozen=True, slots=True)
class DeleteOptions:
    """metav1.DeleteOptions."""

    grace_seconds: int | None = None
    uid: str = ""
    resource_version: str = ""
    propagation: str = ""
    dry_run: bool = False


class Objects:
    """The verbs on single objects. `claims` maps a storage plural to what settles its claims."""

    def __init__(self, store: Store, now: Callable[[], datetime], claims: Mapping[str, Claims]) -> None:
        self._store, self._now, self._claims = store, now, claims

    async def read(self, place: Place) -> Json:
        """The current document. Raises StatusError 404."""
        return from_item(place.kind, await self._item(place))

    # --- create

    async def create(self, kind: Kind, namespace: str, obj: Json, *, dry_run: bool = False) -> Json:
        """Raises StatusError 409 where the name is taken, 404 or 403 by the namespace, 422 for what is wrong with `obj`."""
        meta = self._new_metadata(kind, namespace, obj)
        prefix = meta.get("generateName", "") if not meta.get("name") else ""
        if prefix:
            meta["name"] = _generated(prefix)
        # First, as in Kubernetes: what is wrong with the namespace comes before what is wrong with the object.
        guards = await self._guard_namespace(kind, namespace, meta.get("name", ""))
        draft = kind.prepare_create(obj, self._now())
        self._check(kind, draft, None, "")
        for _ in range(ATTEMPTS):
            # What a claim completes may have to be done over, with other addresses: it leaves the draft as it is.
            claim = await self._claim(kind, draft, None)
            obj = claim.document
            place = Place(kind, namespace, obj["metadata"]["name"])
            if dry_run:
                claim.close(done=False)
                return await self._dry_create(place, obj)
            try:
                revision = await self._commit(Put(place.key, to_value(kind, obj), ABSENT), claim, guards)
            except Conflict as error:
                if error.key == place.key and not prefix:
                    raise status.already_exists(kind.resource, place.name) from error
                if error.key == place.key:
                    draft["metadata"]["name"] = _generated(prefix)
                guards = await self._guard_namespace(kind, namespace, place.name)
                continue
            obj["metadata"]["resourceVersion"] = str(revision)
            return obj
        raise status.conflict(kind.resource, place.name, "too many others were created at the same time; please try again")

    def _new_metadata(self, kind: Kind, namespace: str, obj: Json) -> Json:
        meta: Json = obj.setdefault("metadata", {})
        if meta.get("resourceVersion"):
            raise status.bad_request("resourceVersion should not be set on objects to be created")
        for key in ("resourceVersion", "deletionTimestamp", "deletionGracePeriodSeconds", "selfLink", "generation"):
            meta.pop(key, None)
        obj["apiVersion"], obj["kind"] = kind.resource.api_version, kind.resource.kind
        meta["uid"] = str(uuid.uuid4())
        meta["creationTimestamp"] = format_time(self._now())
        if kind.resource.namespaced:
            meta["namespace"] = namespace
        else:
            meta.pop("namespace", None)
        return meta

    async def _guard_namespace(self, kind: Kind, namespace: str, name: str) -> Sequence[Write]:
        """What makes sure that nothing is created in a namespace that goes at the same moment. Raises StatusError 404, 403."""
        if not kind.resource.namespaced:
            return ()
        item = await self._store.get(key_of(resources.NAMESPACES, "", namespace))
        if item is None:
            raise status.not_found(resources.NAMESPACES, namespace)
        if b'"deletionTimestamp"' in item.value and from_value(item.value, 0)["metadata"].get("deletionTimestamp"):
            raise status.terminating(kind.resource, name, namespace)
        return (Check(item.key, item.mod_revision),)

    async def _dry_create(self, place: Place, obj: Json) -> Json:
        if await self._store.get(place.key) is not None:
            raise status.already_exists(place.kind.resource, place.name)
        return obj

    # --- update

    async def update(
        self, place: Place, edit: Edit, *, subresource: str = "", dry_run: bool = False, manager: str | None = ""
    ) -> Json:
        """Replace the object by what `edit` makes of it. A resourceVersion or uid in the result is a precondition (409).

        An update that removes the last reason to keep an object that is being deleted removes it. `manager` is who owns
        the fields that change; None: the edit has seen to metadata.managedFields itself.
        """
        for _ in range(ATTEMPTS):
            item = await self._item(place)
            old = from_item(place.kind, item)
            new = edit(from_item(place.kind, item))
            self._check_preconditions(place, new, old)
            new = self._merge(place, new, old, subresource)
            if manager is not None:
                who = Manager(manager or "unknown", place.kind.resource.api_version, "Update", subresource)
                new = record_update(new, old, place.kind.message, who, format_time(self._now()))
            self._check(place.kind, new, old, subresource)
            if _without_version(new) == _without_version(old):
                return old
            gone = _can_go(place.kind, new)
            claim = await self._claim(place.kind, None if gone else new, old)
            new = new if gone else claim.document
            if dry_run:
                claim.close(done=False)
                return new
            value = None if gone else to_value(place.kind, new)
            try:
                revision = await self._commit(_write(place.key, value, item.mod_revision), claim)
            except Conflict:
                # Looked at anew: an edit that names the version it has seen fails there, any other is done again.
                continue
            new["metadata"]["resourceVersion"] = str(revision)
            return new
        raise status.conflict(place.kind.resource, place.name)

    def _check_preconditions(self, place: Place, new: Json, old: Json) -> None:
        meta, before = new.setdefault("metadata", {}), old["metadata"]
        uid, version = meta.get("uid") or before["uid"], str(meta.get("resourceVersion") or "")
        if uid != before["uid"]:
            why = f"Precondition failed: UID in precondition: {uid}, UID in object meta: {before['uid']}"
            raise status.conflict(place.kind.resource, place.name, why)
        if version in ("", "0"):
            if not place.kind.unconditional_update:
                error = invalid(Path() / "metadata" / "resourceVersion", 0, "must be specified for an update")
                raise status.invalid(place.kind.resource, place.name, [error])
        elif version != before["resourceVersion"]:
            raise status.conflict(place.kind.resource, place.name)

    def _merge(self, place: Place, new: Json, old: Json, subresource: str) -> Json:
        """Metadata that no client may change stays; the kind decides about the rest."""
        meta, before = new["metadata"], old["metadata"]
        new["apiVersion"], new["kind"] = place.kind.resource.api_version, place.kind.resource.kind
        for key in ("name", "namespace", "uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds",
                    "generateName", "generation", "resourceVersion"):  # fmt: skip
            if key in before:
                meta[key] = before[key]
            else:
                meta.pop(key, None)
        return new if subresource in OWN_RULES else place.kind.prepare_update(new, old, subresource=subresource)

    # --- delete

    async def delete(self, place: Place, options: DeleteOptions) -> tuple[Json, bool]:
        """The object as it was or as it is now, and whether it is really gone (else: marked, waiting for someone)."""
        for _ in range(ATTEMPTS):
            item = await self._item(place)
            old = from_item(place.kind, item)
            self._check_delete(place, old, options)
            marked = self._marked(place.kind, from_item(place.kind, item), options)
            gone = _can_go(place.kind, marked)
            if options.dry_run:
                return marked, gone
            if not gone and _without_version(marked) == _without_version(old):
                return old, False
            claim = await self._claim(place.kind, None, old) if gone else NoClaim(marked)
            value = None if gone else to_value(place.kind, marked)
            try:
                revision = await self._commit(_write(place.key, value, item.mod_revision), claim)
            except Conflict:
                continue
            marked["metadata"]["resourceVersion"] = str(revision)
            return marked, gone
        raise status.conflict(place.kind.resource, place.name)

    def _check_delete(self, place: Place, old: Json, options: DeleteOptions) -> None:
        meta = old["metadata"]
        if place.kind.resource == resources.NAMESPACES and place.name in IMMORTAL:
            raise status.forbidden(resources.NAMESPACES, place.name, "this namespace may not be deleted")
        if options.uid and options.uid != meta["uid"]:
            why = f"Precondition failed: UID in precondition: {options.uid}, UID in object meta: {meta['uid']}"
            raise status.conflict(place.kind.resource, place.name, why)
        if options.resource_version and options.resource_version != meta["resourceVersion"]:
            why = (
                f"Precondition failed: ResourceVersion in precondition: {options.resource_version},"
                f" ResourceVersion in object meta: {meta['resourceVersion']}"
            )
            raise status.conflict(place.kind.resource, place.name, why)

    def _marked(self, kind: Kind, obj: Json, options: DeleteOptions) -> Json:
        """`obj` as a delete request leaves it: deletionTimestamp, grace period, the propagation policy's finalizer."""
        meta = obj["metadata"]
        grace = kind.grace_seconds(obj, options.grace_seconds)
        pending = meta.get("deletionGracePeriodSeconds")
        if "deletionTimestamp" not in meta or (pending is not None and grace < pending):
            meta["deletionTimestamp"] = format_time(self._now() + timedelta(seconds=grace))
            meta["deletionGracePeriodSeconds"] = grace
            if kind.counts_generation:
                meta["generation"] = meta.get("generation", 0) + 1
        finalizers = [f for f in meta.get("finalizers") or () if not options.propagation or f not in (FOREGROUND, ORPHAN)]
        wanted = {"Foreground": FOREGROUND, "Orphan": ORPHAN}.get(options.propagation)
        if wanted:
            finalizers.append(wanted)
        if finalizers:
            meta["finalizers"] = finalizers
        else:
            meta.pop("finalizers", None)
        if kind.resource == resources.NAMESPACES:
            obj["status"] = {**(obj.get("status") or {}), "phase": "Terminating"}
        return obj

    # --- shared

    async def _item(self, place: Place) -> KeyValue:
        item = await self._store.get(place.key)
        if item is None:
            raise status.not_found(place.kind.resource, place.name)
        return item

    async def _claim(self, kind: Kind, new: Json | None, old: Json | None) -> Claim:
        claims = self._claims.get(kind.storage.plural)
        return NoClaim(new or old or {}) if claims is None else await claims.plan(new, old)

    async def _commit(self, write: Write, claim: Claim, guards: Sequence[Write] = ()) -> int:
        done, lost = False, ""
        try:
            revision = await self._store.commit([write, *guards, *claim.writes])
            done = True
        except Conflict as error:
            lost = error.key
            raise
        finally:
            claim.close(done=done, lost=lost)
        return revision

    def _check(self, kind: Kind, obj: Json, old: Json | None, subresource: str) -> None:
        errors = kind.validate(obj, old, subresource="status" if subresource in OWN_RULES else subresource)
        if old is not None:
            errors = [*_finalizer_errors(obj, old), *errors]
        if errors:
            raise status.invalid(kind.resource, str(obj["metadata"].get("name", "")), errors)


def _write(key: str, value: bytes | None, expected: int) -> Write:
    return Delete(key, expected) if value is None else Put(key, value, expected)


def _generated(prefix: str) -> str:
    """A name of at most 63 characters (k8s.io/apiserver storage/names)."""
    return prefix[:58] + "".join(secrets.choice(NAME_ALPHABET) for _ in range(5))


def _without_version(obj: Json) -> Json:
    meta = {key: value for key, value in obj["metadata"].items() if key != "resourceVersion"}
    return {**obj, "metadata": meta}


def _can_go(kind: Kind, obj: Json) -> bool:
    """Whether nothing keeps an object that is being deleted any more."""
    meta = obj["metadata"]
    if "deletionTimestamp" not in meta or meta.get("deletionGracePeriodSeconds") or meta.get("finalizers"):
        return False
    return not (kind.resource == resources.NAMESPACES and (obj.get("spec") or {}).get("finalizers"))


def _finalizer_errors(new: Json, old: Json) -> list[FieldError]:
    if "deletionTimestamp" not in old["metadata"]:
        return []
    added = [f for f in new["metadata"].get("finalizers") or () if f not in (old["metadata"].get("finalizers") or ())]
    if not added:
        return []
    text = f"no new finalizers can be added if the object is being deleted, found new finalizers {added}"
    return [forbidden(Path() / "metadata" / "finalizers", text)]
