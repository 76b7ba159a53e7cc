from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from podwire.controllers.nodehealth import NOT_READY, UNREACHABLE, eviction_delay, judge_node, not_ready_patch
from podwire.model.meta import Json
from podwire.model.objects import Node, Pod, Taint

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def node(ready: str = "", *taints: tuple[str, str]) -> Node:
    conditions: list[Json] = [{"type": "NetworkUnavailable", "status": "False"}]
    if ready:
        conditions.append({"type": "Ready", "status": ready})
    spec = {"taints": [{"key": key, "effect": effect} for key, effect in taints]}
    return msgspec.convert({"metadata": {"name": "n1"}, "spec": spec, "status": {"conditions": conditions}}, Node)


def both(key: str) -> list[tuple[str, str]]:
    return [(key, "NoSchedule"), (key, "NoExecute")]


def taints_after(of: Node, *, silent: bool = False) -> list[tuple[str, str]] | None:
    spec = judge_node(of, silent=silent, now=NOW).spec
    return None if spec is None else [(t["key"], t["effect"]) for t in spec["spec"]["taints"] or ()]


def test_a_silent_node_becomes_unknown_and_unreachable() -> None:
    verdict = judge_node(node("True"), silent=True, now=NOW)
    assert verdict.pods_lost
    assert verdict.status is not None
    conditions = {c["type"]: c["status"] for c in verdict.status["status"]["conditions"]}
    assert conditions == {"Ready": "Unknown"}
    assert taints_after(node("True"), silent=True) == both(UNREACHABLE)


def test_a_silent_node_that_never_said_anything_gets_a_condition() -> None:
    verdict = judge_node(node(), silent=True, now=NOW)
    assert verdict.status is not None
    assert verdict.status["status"]["conditions"][-1]["status"] == "Unknown"


@pytest.mark.parametrize(
    ("of", "expected"),
    [
        (node("True"), None),
        (node(), None),
        (node("False"), both(NOT_READY)),
        (node("Unknown"), both(UNREACHABLE)),
        (node("Unknown", *both(UNREACHABLE)), None),
        (node("True", *both(UNREACHABLE)), []),
        (node("True", ("mine", "NoSchedule"), *both(UNREACHABLE)), [("mine", "NoSchedule")]),
        (node("False", ("mine", "NoSchedule"), *both(UNREACHABLE)), [("mine", "NoSchedule"), *both(NOT_READY)]),
    ],
)
def test_taints_follow_the_condition(of: Node, expected: list[tuple[str, str]] | None) -> None:
    assert taints_after(of) == expected


def test_what_is_right_is_not_written_again() -> None:
    verdict = judge_node(node("Unknown", *both(UNREACHABLE)), silent=True, now=NOW)
    assert (verdict.status, verdict.spec, verdict.pods_lost) == (None, None, True)


def pod(*tolerations: Json, **status: Any) -> Pod:
    return msgspec.convert(
        {"metadata": {"name": "p", "uid": "u"}, "spec": {"tolerations": list(tolerations)}, "status": status}, Pod
    )


def test_ready_is_taken_off_the_pods_of_a_lost_node() -> None:
    conditions = [{"type": "Initialized", "status": "True"}, {"type": "Ready", "status": "True"}]
    patch = not_ready_patch(pod(conditions=conditions), NOW)
    assert patch is not None
    assert [(c["type"], c["status"]) for c in patch["status"]["conditions"]] == [("Ready", "False")]
    assert not_ready_patch(pod(), NOW) is None


@pytest.mark.parametrize(
    ("tolerations", "expected"),
    [
        ([], 300.0),
        ([{"key": UNREACHABLE, "operator": "Exists"}], None),
        ([{"key": UNREACHABLE, "operator": "Exists", "tolerationSeconds": 20}], 20.0),
        ([{"operator": "Exists"}, {"key": UNREACHABLE, "operator": "Exists", "tolerationSeconds": 20}], None),
        ([{"key": "else", "operator": "Exists"}], 300.0),
    ],
)
def test_how_long_a_pod_stays_on_a_lost_node(tolerations: list[Json], expected: float | None) -> None:
    taints = [Taint(key=UNREACHABLE, effect="NoExecute"), Taint(key=UNREACHABLE, effect="NoSchedule")]
    assert eviction_delay(pod(*tolerations), taints, 300.0) == expected


def test_a_taint_of_the_users_evicts_at_once() -> None:
    assert eviction_delay(pod(), [Taint(key="mine", effect="NoExecute")], 300.0) == 0.0
    assert eviction_delay(pod(), [Taint(key="mine", effect="NoSchedule")], 300.0) is None
