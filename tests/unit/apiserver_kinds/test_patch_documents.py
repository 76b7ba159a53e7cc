"""JSON patch and merge patch: the RFCs' own examples, and laws that hold for any document."""

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podwire.apiserver.patch import JSON_PATCH, MERGE_PATCH, STRATEGIC_PATCH, PatchFailed, json_patch, merge_patch, patched

SCALARS = st.none() | st.booleans() | st.integers(-9, 9) | st.text("ab~/", max_size=3)
JSONS = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab~/", max_size=2), inner, max_size=3)
)
OBJECTS = st.dictionaries(st.text("abc", max_size=2), JSONS, max_size=4)


@pytest.mark.parametrize(
    ("target", "patch", "result"),
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        (["a", "b"], ["c", "d"], ["c", "d"]),
        ({"a": "b"}, ["c"], ["c"]),
        ({"a": "foo"}, None, None),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_the_examples_of_rfc_7386(target: Any, patch: Any, result: Any) -> None:
    assert merge_patch(target, patch) == result


@pytest.mark.parametrize(
    ("document", "operations", "result"),
    [
        ({"foo": "bar"}, [{"op": "add", "path": "/baz", "value": "qux"}], {"baz": "qux", "foo": "bar"}),
        ({"foo": ["bar", "baz"]}, [{"op": "add", "path": "/foo/1", "value": "qux"}], {"foo": ["bar", "qux", "baz"]}),
        ({"foo": ["bar"]}, [{"op": "add", "path": "/foo/-", "value": ["abc"]}], {"foo": ["bar", ["abc"]]}),
        ({"baz": "qux", "foo": "bar"}, [{"op": "remove", "path": "/baz"}], {"foo": "bar"}),
        ({"foo": ["bar", "qux", "baz"]}, [{"op": "remove", "path": "/foo/1"}], {"foo": ["bar", "baz"]}),
        ({"baz": "qux"}, [{"op": "replace", "path": "/baz", "value": "boo"}], {"baz": "boo"}),
        ({"foo": {"a": 1}, "qux": {}}, [{"op": "move", "from": "/foo/a", "path": "/qux/b"}], {"foo": {}, "qux": {"b": 1}}),
        ({"foo": [1, 2, 3, 4]}, [{"op": "move", "from": "/foo/1", "path": "/foo/3"}], {"foo": [1, 3, 4, 2]}),
        ({"a": {"b": 1}}, [{"op": "copy", "from": "/a", "path": "/c"}], {"a": {"b": 1}, "c": {"b": 1}}),
        ({"/": 9, "~1": 10}, [{"op": "test", "path": "/~01", "value": 10}], {"/": 9, "~1": 10}),
        ({"a": 1}, [{"op": "replace", "path": "", "value": {"b": 2}}], {"b": 2}),
    ],
)
def test_the_examples_of_rfc_6902(document: Any, operations: Any, result: Any) -> None:
    before = copy.deepcopy(document)
    assert json_patch(document, operations) == result
    assert document == before


@pytest.mark.parametrize(
    ("operations", "code"),
    [
        ([{"op": "test", "path": "/foo", "value": "x"}], 422),
        ([{"op": "test", "path": "/one", "value": True}], 422),
        ([{"op": "remove", "path": "/none"}], 422),
        ([{"op": "replace", "path": "/none", "value": 1}], 422),
        ([{"op": "add", "path": "/list/3", "value": 1}], 422),
        ([{"op": "add", "path": "/list/01", "value": 1}], 422),
        ([{"op": "add", "path": "/none/deep", "value": 1}], 422),
        ([{"op": "move", "from": "/list", "path": "/list/0"}], 422),
        ([{"op": "frob", "path": "/foo"}], 400),
        ([{"op": "add", "path": "foo", "value": 1}], 400),
        ([{"op": "add", "path": "/foo"}], 400),
        ({"op": "add"}, 400),
    ],
)
def test_a_patch_that_does_not_work_says_whose_fault_it_is(operations: Any, code: int) -> None:
    with pytest.raises(PatchFailed) as caught:
        json_patch({"foo": "bar", "one": 1, "list": [1, 2]}, operations)
    assert caught.value.code == code


@given(OBJECTS, OBJECTS)
def test_merge_patch_is_idempotent(target: dict[str, Any], patch: dict[str, Any]) -> None:
    once = merge_patch(target, patch)
    assert merge_patch(once, patch) == once


@given(OBJECTS)
def test_merging_nothing_changes_nothing(target: dict[str, Any]) -> None:
    assert merge_patch(target, {}) == target


def pointer(*parts: str) -> str:
    return "".join("/" + part.replace("~", "~0").replace("/", "~1") for part in parts)


@given(OBJECTS, st.text("a~/", max_size=3), JSONS)
def test_what_was_added_is_there_and_removing_it_restores(document: dict[str, Any], key: str, value: Any) -> None:
    document.pop(key, None)
    added = json_patch(document, [{"op": "add", "path": pointer(key), "value": value}])
    assert added[key] == value
    test_and_remove = [{"op": "test", "path": pointer(key), "value": value}, {"op": "remove", "path": pointer(key)}]
    assert json_patch(added, test_and_remove) == document


@pytest.mark.parametrize("content_type", [MERGE_PATCH, STRATEGIC_PATCH])
def test_a_patch_that_is_no_object_is_refused(content_type: str) -> None:
    with pytest.raises(PatchFailed, match="must be a JSON object"):
        patched(content_type, {}, [], "k8s.io.api.core.v1.Pod")


def test_one_entry_point_for_all_three() -> None:
    message, live = "k8s.io.api.core.v1.ConfigMap", {"data": {"a": "1"}}
    assert patched(JSON_PATCH, live, [{"op": "remove", "path": "/data/a"}], message) == {"data": {}}
    assert patched(MERGE_PATCH, live, {"data": {"b": "2"}}, message) == {"data": {"a": "1", "b": "2"}}
    assert patched(STRATEGIC_PATCH, live, {"data": {"a": None}}, message) == {"data": {}}
