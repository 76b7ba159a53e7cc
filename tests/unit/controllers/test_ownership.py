from typing import Any

import msgspec
import pytest

from podwire.controllers.ownership import FOREGROUND, ORPHAN, Item, OwnerGraph, Presence, blockers, judge
from podwire.model.meta import Json, ObjectMeta
from podwire.model.resources import CONFIGMAPS

SOLID, WAITING, ABSENT = Presence.SOLID, Presence.WAITING, Presence.ABSENT


def item(name: str, *owners: str, block: bool = False, **meta: Any) -> Item:
    references: list[Json] = [
        {"apiVersion": "v1", "kind": "ConfigMap", "name": o, "uid": o, "blockOwnerDeletion": block} for o in owners
    ]
    document = {"name": name, "uid": name, "namespace": "shop", "ownerReferences": references} | meta
    return Item(CONFIGMAPS, msgspec.convert(document, ObjectMeta))


@pytest.mark.parametrize(
    ("states", "deleted", "dropped"),
    [
        ({"a": SOLID}, False, []),
        ({"a": ABSENT}, True, []),
        ({"a": WAITING}, True, []),
        ({"a": ABSENT, "b": ABSENT}, True, []),
        ({"a": ABSENT, "b": SOLID}, False, ["a"]),
        ({"a": WAITING, "b": SOLID}, False, ["a"]),
        ({"a": SOLID, "b": SOLID}, False, []),
    ],
)
def test_one_solid_owner_keeps_an_object(states: dict[str, Presence], deleted: bool, dropped: list[str]) -> None:
    verdict = judge(item("x", *states), states, has_dependents=False)
    assert (verdict.delete, verdict.drop_owners) == (deleted, dropped)


def test_what_has_no_owner_or_is_going_already_is_left() -> None:
    assert not judge(item("x"), {}, has_dependents=True).delete
    going = item("x", "a", deletionTimestamp="2026-01-01T00:00:00Z")
    assert not judge(going, {"a": ABSENT}, has_dependents=True).delete


def test_foreground_is_passed_on_to_those_with_dependents() -> None:
    assert judge(item("x", "a"), {"a": WAITING}, has_dependents=True).propagation == "Foreground"
    assert judge(item("x", "a"), {"a": WAITING}, has_dependents=False).propagation == "Background"
    assert judge(item("x", "a"), {"a": ABSENT}, has_dependents=True).propagation == "Background"
    assert judge(item("x", "a", finalizers=[ORPHAN]), {"a": ABSENT}, has_dependents=True).propagation == "Orphan"
    assert judge(item("x", "a", finalizers=[FOREGROUND]), {"a": ABSENT}, has_dependents=True).propagation == "Foreground"


def test_only_those_that_block_are_waited_for() -> None:
    owner = item("a")
    one, two = item("x", "a", block=True), item("y", "a")
    assert blockers(owner, [one, two]) == [one]


def test_the_graph_follows_changes() -> None:
    graph = OwnerGraph()
    graph.put(item("x", "a"))
    graph.put(item("y", "a", "b"))
    assert [i.meta.name for i in graph.dependents("a")] == ["x", "y"]
    graph.put(item("y", "b"))
    assert [i.meta.name for i in graph.dependents("a")] == ["x"]
    graph.remove("x")
    graph.remove("x")
    assert graph.dependents("a") == []
    assert graph.get("x") is None
    assert [i.meta.name for i in graph.dependents("b")] == ["y"]
