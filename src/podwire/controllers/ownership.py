"""Who owns whom, and what must go. Pure: a graph of objects by uid, and the decision for one of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from podwire.model.meta import ObjectMeta, OwnerReference
from podwire.model.resources import Resource

FOREGROUND = "foregroundDeletion"
ORPHAN = "orphan"


@dataclass(frozen=True, slots=True)
class Item:
    """An object as the collector sees it."""

    resource: Resource
    meta: ObjectMeta

    @property
    def deleting(self) -> bool:
        return self.meta.deletion_timestamp is not None

    @property
    def waits_for_dependents(self) -> bool:
        return self.deleting and FOREGROUND in self.meta.finalizers

    @property
    def orphans_dependents(self) -> bool:
        return self.deleting and ORPHAN in self.meta.finalizers

    def __str__(self) -> str:
        where = f"{self.meta.namespace}/" if self.meta.namespace else ""
        return f"{self.resource.kind} {where}{self.meta.name}"


class OwnerGraph:
    """All objects by uid, and for each uid the objects that name it as an owner."""

    def __init__(self) -> None:
        self._items: dict[str, Item] = {}
        self._dependents: dict[str, dict[str, None]] = {}

    def get(self, uid: str) -> Item | None:
        return self._items.get(uid)

    def dependents(self, uid: str) -> list[Item]:
        return [self._items[dependent] for dependent in self._dependents.get(uid, ())]

    def put(self, item: Item) -> None:
        self.remove(item.meta.uid)
        self._items[item.meta.uid] = item
        for owner in item.meta.owner_references:
            self._dependents.setdefault(owner.uid, {})[item.meta.uid] = None

    def remove(self, uid: str) -> None:
        item = self._items.pop(uid, None)
        if item is None:
            return
        for owner in item.meta.owner_references:
            found = self._dependents.get(owner.uid)
            if found is not None:
                found.pop(uid, None)
                if not found:
                    del self._dependents[owner.uid]


class Presence(Enum):
    """What is known of an owner."""

    SOLID = "solid"  # exists and stays
    WAITING = "waiting"  # exists, and is being deleted in the foreground: it waits for its dependents
    ABSENT = "absent"


@dataclass(slots=True)
class Verdict:
    """What to do with an object: delete it (with that propagation), or take these owners' references off it."""

    delete: bool = False
    propagation: str = "Background"
    drop_owners: list[str] = field(default_factory=list)


def judge(item: Item, owners: Mapping[str, Presence], *, has_dependents: bool) -> Verdict:
    """`owners` tells of every owner of `item`, by uid.

    One solid owner keeps the object; references to owners that are no more are taken off it then. With none, it goes:
    with an owner that waits, and dependents of its own that must go before, in the foreground too.
    """
    verdict = Verdict()
    if item.deleting or not item.meta.owner_references:
        return verdict
    states = [owners[owner.uid] for owner in item.meta.owner_references]
    if Presence.SOLID in states:
        verdict.drop_owners = [uid for uid, state in owners.items() if state is not Presence.SOLID]
        return verdict
    verdict.delete = True
    if Presence.WAITING in states and has_dependents:
        verdict.propagation = "Foreground"
    elif ORPHAN in item.meta.finalizers:
        verdict.propagation = "Orphan"
    elif FOREGROUND in item.meta.finalizers:
        verdict.propagation = "Foreground"
    return verdict


def blockers(owner: Item, dependents: Iterable[Item]) -> list[Item]:
    """The dependents that a foreground deletion of `owner` waits for."""
    return [d for d in dependents if any(o.uid == owner.meta.uid and o.block_owner_deletion for o in d.meta.owner_references)]


def owner_namespace(item: Item, reference: OwnerReference, resource: Resource) -> str | None:
    """Where that owner must be: in the object's namespace, or in none. None: the reference can never be valid (a cluster-scoped
    object that names a namespaced owner)."""
    if not resource.namespaced:
        return ""
    return item.meta.namespace or None
