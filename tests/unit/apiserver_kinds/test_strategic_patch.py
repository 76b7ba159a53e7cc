"""Strategic merge patch: which lists merge, and the directives that kubectl sends."""

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podwire.apiserver.patch import STRATEGIC_PATCH, PatchFailed, patched

POD = "k8s.io.api.core.v1.Pod"
SERVICE = "k8s.io.api.core.v1.Service"
DEPLOYMENT = "k8s.io.api.apps.v1.Deployment"


def strategic(live: Any, patch: Any, message: str = POD) -> Any:
    before = copy.deepcopy(live)
    result = patched(STRATEGIC_PATCH, live, patch, message)
    assert live == before
    return result


def containers(*items: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"spec": {"containers": list(items), **more}}


def test_containers_merge_by_name_and_their_env_by_name() -> None:
    live = containers({"name": "a", "image": "x", "env": [{"name": "A", "value": "1"}]}, {"name": "b", "image": "y"})
    patch = containers({"name": "a", "env": [{"name": "B", "value": "2"}]}, {"name": "c", "image": "z"})
    assert strategic(live, patch) == containers(
        {"name": "a", "image": "x", "env": [{"name": "B", "value": "2"}, {"name": "A", "value": "1"}]},
        {"name": "c", "image": "z"},
        {"name": "b", "image": "y"},
    )


def test_lists_without_a_key_are_replaced() -> None:
    live = containers({"name": "a", "args": ["1", "2"]})
    assert strategic(live, containers({"name": "a", "args": ["3"]})) == containers({"name": "a", "args": ["3"]})
    tolerations = {"spec": {"tolerations": [{"key": "x"}]}}
    assert strategic(tolerations, {"spec": {"tolerations": [{"key": "y"}]}}) == {"spec": {"tolerations": [{"key": "y"}]}}


def test_an_item_is_deleted_by_directive() -> None:
    live = containers({"name": "a"}, {"name": "b"})
    assert strategic(live, containers({"name": "a", "$patch": "delete"})) == containers({"name": "b"})


def test_a_list_is_replaced_by_directive() -> None:
    live = containers({"name": "a"}, {"name": "b"})
    assert strategic(live, containers({"$patch": "replace"}, {"name": "c"})) == containers({"name": "c"})


def test_a_map_is_replaced_or_emptied_by_directive() -> None:
    live = {"metadata": {"labels": {"a": "1", "b": "2"}}}
    assert strategic(live, {"metadata": {"labels": {"$patch": "replace", "c": "3"}}}) == {"metadata": {"labels": {"c": "3"}}}
    assert strategic(live, {"metadata": {"labels": {"$patch": "delete"}}}) == {"metadata": {"labels": {}}}


def test_retained_keys_are_all_that_stays() -> None:
    live = {"spec": {"strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1}}}}
    patch = {"spec": {"strategy": {"$retainKeys": ["type"], "type": "Recreate"}}}
    assert strategic(live, patch, DEPLOYMENT) == {"spec": {"strategy": {"type": "Recreate"}}}
    volume = containers(volumes=[{"name": "v", "emptyDir": {}}])
    change = {"spec": {"volumes": [{"name": "v", "$retainKeys": ["name", "hostPath"], "hostPath": {"path": "/x"}}]}}
    assert strategic(volume, change)["spec"]["volumes"] == [{"name": "v", "hostPath": {"path": "/x"}}]


def test_element_order_is_kept_and_others_keep_their_place() -> None:
    live = containers({"name": "a"}, {"name": "sidecar"}, {"name": "b"})
    patch = {
        "spec": {"$setElementOrder/containers": [{"name": "b"}, {"name": "a"}], "containers": [{"name": "a", "image": "x"}]}
    }
    names = [c["name"] for c in strategic(live, patch)["spec"]["containers"]]
    assert names.index("b") < names.index("a")
    assert sorted(names) == ["a", "b", "sidecar"]


def test_order_alone_reorders() -> None:
    live = containers({"name": "a", "image": "x"}, {"name": "b"})
    patch = {"spec": {"$setElementOrder/containers": [{"name": "b"}, {"name": "a"}]}}
    assert strategic(live, patch) == containers({"name": "b"}, {"name": "a", "image": "x"})


def test_plain_values_merge_and_are_deleted_by_directive() -> None:
    live = {"metadata": {"finalizers": ["a", "b"]}}
    assert strategic(live, {"metadata": {"finalizers": ["c", "a"]}}) == {"metadata": {"finalizers": ["c", "a", "b"]}}
    patch = {"metadata": {"$deleteFromPrimitiveList/finalizers": ["a"]}}
    assert strategic(live, patch) == {"metadata": {"finalizers": ["b"]}}


def test_service_ports_merge_by_port() -> None:
    live = {"spec": {"ports": [{"port": 80, "nodePort": 30080}, {"port": 443}]}}
    patch = {"spec": {"ports": [{"port": 80, "targetPort": 8080}]}}
    ports = [{"port": 80, "nodePort": 30080, "targetPort": 8080}, {"port": 443}]
    assert strategic(live, patch, SERVICE) == {"spec": {"ports": ports}}


def test_nulls_and_directives_leave_no_trace_in_new_parts() -> None:
    patch = containers({"name": "a", "image": None, "env": [{"name": "X", "$patch": "delete"}], "resources": {"limits": None}})
    assert strategic({}, patch) == containers({"name": "a", "env": [], "resources": {}})


def test_bad_patches_are_told() -> None:
    with pytest.raises(PatchFailed, match="does not contain declared merge key: name"):
        strategic(containers({"name": "a"}), containers({"image": "x"}))
    with pytest.raises(PatchFailed, match="Unknown patch type found: frob"):
        strategic({}, {"spec": {"$patch": "frob"}})


NAMES = st.sampled_from("abcde")
CONTAINERS = st.lists(
    st.fixed_dictionaries({"name": NAMES}, optional={"image": st.sampled_from("xyz")}), unique_by=lambda c: c["name"]
)


@given(CONTAINERS, CONTAINERS)
def test_patching_twice_is_patching_once(live: list[dict[str, str]], patch: list[dict[str, str]]) -> None:
    once = strategic(containers(*live), containers(*patch))
    assert strategic(once, containers(*patch)) == once


@given(CONTAINERS, CONTAINERS)
def test_a_full_order_wins(live: list[dict[str, str]], patch: list[dict[str, str]]) -> None:
    order = sorted({c["name"] for c in [*live, *patch]}, reverse=True)
    change = {"spec": {"containers": patch, "$setElementOrder/containers": [{"name": name} for name in order]}}
    names = [c["name"] for c in strategic(containers(*live), change)["spec"]["containers"]]
    assert names == order
