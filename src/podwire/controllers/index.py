"""Objects of an informer by something else than their name."""

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Generic, TypeVar

from podwire.client.informer import Change, Informer
from podwire.model.ids import ObjectKey
from podwire.model.objects import ApiObject

T = TypeVar("T", bound=ApiObject)
V = TypeVar("V", bound=Hashable)


class Index(Generic[V, T]):
    """value → objects, where `values(obj)` gives each object's values. Current before any later subscriber is called."""

    def __init__(self, informer: Informer[T], values: Callable[[T], Iterable[V]]) -> None:
        self._values = values
        self._objects: dict[V, dict[ObjectKey, T]] = {}
        informer.subscribe(self._changed)

    def get(self, value: V) -> Mapping[ObjectKey, T]:
        return self._objects.get(value, {})

    def count(self, value: V) -> int:
        return len(self._objects.get(value, ()))

    def _changed(self, change: Change[T]) -> None:
        if change.old is not None:
            for value in self._values(change.old):
                found = self._objects.get(value)
                if found is not None:
                    found.pop(change.key, None)
                    if not found:
                        del self._objects[value]
        if change.new is not None:
            for value in self._values(change.new):
                self._objects.setdefault(value, {})[change.key] = change.new
