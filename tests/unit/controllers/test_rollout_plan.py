"""Deployments: the plan alone, played against a model of ReplicaSets whose pods get ready and fail at random."""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from podwire.controllers.documents import DeploymentDoc, DeploymentDocStatus, ReplicaSetDoc
from podwire.controllers.rollout import REVISION, find_new, limits_of, plan_rollout, same_template, template_hash
from podwire.controllers.rolloutstatus import rollout_status
from podwire.model.meta import Json

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def deployment(replicas: int = 3, image: str = "web:1", **spec: Any) -> DeploymentDoc:
    template = {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{"name": "c", "image": image}]}}
    document = {
        "metadata": {"name": "web", "namespace": "shop", "uid": "d", "generation": 1},
        "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": "web"}}, "template": template} | spec,
    }
    return msgspec.convert(document, DeploymentDoc)


@dataclass
class World:
    """ReplicaSets with perfect pods: each set has as many as it should, `ready` of them available."""

    sets: dict[str, Json] = field(default_factory=dict)
    ready: dict[str, int] = field(default_factory=dict)

    def views(self) -> list[ReplicaSetDoc]:
        views = []
        for name, document in self.sets.items():
            size = document["spec"]["replicas"]
            ready = min(self.ready.get(name, 0), size)
            status = {"replicas": size, "readyReplicas": ready, "availableReplicas": ready, "observedGeneration": 1}
            meta = document["metadata"] | {"uid": name, "generation": 1}
            views.append(msgspec.convert(document | {"metadata": meta, "status": status}, ReplicaSetDoc))
        return views

    def step(self, of: DeploymentDoc) -> bool:
        """One pass of the controller; whether it changed anything."""
        plan = plan_rollout(of, self.views(), old_pods=False)
        if plan.create is not None:
            self.sets[plan.create["metadata"]["name"]] = plan.create
        for name, size in plan.scale.items():
            self.sets[name]["spec"]["replicas"] = size
            self.ready[name] = min(self.ready.get(name, 0), size)
        for name, annotations in plan.annotate.items():
            self.sets[name]["metadata"]["annotations"] |= annotations
        for replica_set in plan.delete:
            del self.sets[replica_set.metadata.name]
        return bool(plan.create or plan.scale or plan.annotate or plan.delete)

    def all_ready(self) -> None:
        self.ready = {name: document["spec"]["replicas"] for name, document in self.sets.items()}

    def settle(self, of: DeploymentDoc) -> None:
        for _ in range(1000):
            if not self.step(of):
                return
            self.all_ready()
        raise AssertionError("it never came to rest")

    @property
    def total(self) -> int:
        return sum(document["spec"]["replicas"] for document in self.sets.values())

    @property
    def available(self) -> int:
        return sum(min(self.ready.get(name, 0), doc["spec"]["replicas"]) for name, doc in self.sets.items())


portion = st.one_of(st.integers(0, 5), st.integers(0, 100).map(lambda n: f"{n}%"))


@settings(deadline=None)
@given(
    replicas=st.integers(0, 12),
    surge=portion,
    unavailable=portion,
    images=st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=5),
    data=st.data(),
)
def test_a_rolling_update_keeps_its_limits_whatever_happens_and_ends(
    replicas: int, surge: int | str, unavailable: int | str, images: list[str], data: st.DataObject
) -> None:
    world = World()
    strategy = {"rollingUpdate": {"maxSurge": surge, "maxUnavailable": unavailable}}
    for image in images:
        of = deployment(replicas, image, strategy=strategy)
        limits = limits_of(of)
        for _ in range(data.draw(st.integers(0, 12))):
            before = world.available
            world.step(of)
            assert world.total <= limits.total
            assert world.available >= min(before, limits.available)
            for name, document in world.sets.items():
                world.ready[name] = data.draw(st.integers(0, document["spec"]["replicas"]))
    world.all_ready()
    world.settle(of)
    new = find_new(of, world.views())
    assert new is not None
    assert new.spec.replicas == replicas
    assert world.total == replicas


@settings(deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=6))
def test_scaling_in_the_middle_of_a_rollout_ends_at_the_last_size(sizes: list[int]) -> None:
    world = World()
    world.settle(deployment(10, "old"))
    for size in sizes:
        of = deployment(size, "new")
        world.step(of)
        world.step(of)
        assert world.total <= max(limits_of(of).total, 0)
        world.all_ready()
    world.settle(of)
    assert world.total == sizes[-1]


def test_a_share_each_when_the_size_changes_in_mid_rollout() -> None:
    world = World()
    world.settle(deployment(10, "old", strategy={"rollingUpdate": {"maxSurge": 2, "maxUnavailable": 2}}))
    of = deployment(10, "new", strategy={"rollingUpdate": {"maxSurge": 2, "maxUnavailable": 2}})
    world.step(of)
    world.step(of)
    assert sorted(doc["spec"]["replicas"] for doc in world.sets.values()) == [2, 8]
    world.step(deployment(20, "new", strategy={"rollingUpdate": {"maxSurge": 2, "maxUnavailable": 2}}))
    assert sorted(doc["spec"]["replicas"] for doc in world.sets.values()) == [4, 18]


def test_going_back_finds_the_old_set_and_gives_it_a_new_revision() -> None:
    world = World()
    for image in ("a", "b", "a"):
        world.settle(deployment(2, image))
    revisions = {doc["metadata"]["annotations"][REVISION]: doc["spec"]["replicas"] for doc in world.sets.values()}
    assert revisions == {"2": 0, "3": 2}


def test_history_is_limited() -> None:
    world = World()
    for number in range(6):
        world.settle(deployment(1, f"web:{number}", revisionHistoryLimit=2))
    assert sorted(doc["metadata"]["annotations"][REVISION] for doc in world.sets.values()) == ["4", "5", "6"]


def test_a_paused_deployment_scales_but_does_not_roll() -> None:
    world = World()
    world.settle(deployment(2, "a"))
    world.settle(deployment(3, "b", paused=True))
    assert [doc["spec"]["replicas"] for doc in world.sets.values()] == [3]
    world.settle(deployment(3, "b"))
    assert sorted(doc["spec"]["replicas"] for doc in world.sets.values()) == [0, 3]


def test_recreate_makes_the_new_set_only_when_old_pods_are_gone() -> None:
    world = World()
    world.settle(deployment(2, "a", strategy={"type": "Recreate"}))
    of = deployment(2, "b", strategy={"type": "Recreate"})
    assert list(plan_rollout(of, world.views(), old_pods=True).scale.values()) == [0]
    world.step(of)
    waiting = plan_rollout(of, world.views(), old_pods=True)
    assert (waiting.create, waiting.scale) == (None, {})
    created = plan_rollout(of, world.views(), old_pods=False).create
    assert created is not None
    assert created["spec"]["replicas"] == 2


@pytest.mark.parametrize(
    ("replicas", "surge", "unavailable", "expected"),
    [
        (4, "25%", "25%", (5, 3)),
        (3, "25%", "25%", (4, 3)),
        (10, 1, 0, (11, 10)),
        (1, 0, 0, (1, 0)),
        (1, "0%", "25%", (1, 0)),
        (2, 0, "100%", (2, 0)),
        (0, 1, 1, (1, 0)),
    ],
)
def test_limits(replicas: int, surge: int | str, unavailable: int | str, expected: tuple[int, int]) -> None:
    strategy = {"rollingUpdate": {"maxSurge": surge, "maxUnavailable": unavailable}}
    limits = limits_of(deployment(replicas, strategy=strategy))
    assert (limits.total, limits.available) == expected


def test_the_hash_follows_from_the_template_alone() -> None:
    one, other = deployment(image="a").spec.template, deployment(image="b").spec.template
    assert template_hash(one, 0) == template_hash(dict(reversed(one.items())), 0)
    assert len({template_hash(one, 0), template_hash(other, 0), template_hash(one, 1)}) == 3


def test_what_encoders_add_does_not_make_a_template_another() -> None:
    one: Json = {"metadata": {"labels": {"a": "b"}, "creationTimestamp": None}, "spec": {"containers": [], "x": {}}}
    assert same_template(one, {"metadata": {"labels": {"a": "b"}}, "spec": {}})
    assert not same_template(one, {"metadata": {"labels": {"a": "c"}}, "spec": {}})


def with_status(of: DeploymentDoc, document: Json) -> DeploymentDoc:
    return msgspec.structs.replace(of, status=msgspec.convert(document, DeploymentDocStatus))


def reason(document: Json, kind: str) -> str:
    return str(next(c["reason"] for c in document["conditions"] if c["type"] == kind))


def test_conditions_tell_the_story_of_a_rollout() -> None:
    world, of = World(), deployment(2)
    world.step(of)
    (name,) = world.sets
    first = rollout_status(of, None, [], NOW, created=name)
    assert (reason(first.document, "Progressing"), reason(first.document, "Available")) == (
        "NewReplicaSetCreated",
        "MinimumReplicasUnavailable",
    )
    of = with_status(of, first.document)
    world.ready[name] = 1
    half = rollout_status(of, find_new(of, world.views()), world.views(), NOW + timedelta(seconds=5))
    assert reason(half.document, "Progressing") == "ReplicaSetUpdated"
    of = with_status(of, half.document)
    assert half.check_at == NOW + timedelta(seconds=605)
    same = rollout_status(of, find_new(of, world.views()), world.views(), NOW + timedelta(seconds=9))
    assert not same.changed
    late = rollout_status(of, find_new(of, world.views()), world.views(), NOW + timedelta(seconds=606))
    assert reason(late.document, "Progressing") == "ProgressDeadlineExceeded"
    world.ready[name] = 2
    done = rollout_status(of, find_new(of, world.views()), world.views(), NOW + timedelta(seconds=20))
    assert (reason(done.document, "Progressing"), reason(done.document, "Available")) == (
        "NewReplicaSetAvailable",
        "MinimumReplicasAvailable",
    )
    of = with_status(of, done.document)
    world.ready[name] = 0
    failing = rollout_status(of, find_new(of, world.views()), world.views(), NOW + timedelta(seconds=9000))
    assert reason(failing.document, "Progressing") == "NewReplicaSetAvailable"
    assert failing.check_at is None


def test_pausing_and_resuming_is_shown() -> None:
    world, of = World(), deployment(1)
    world.settle(of)
    paused = rollout_status(deployment(1, paused=True), None, world.views(), NOW)
    assert reason(paused.document, "Progressing") == "DeploymentPaused"
    resumed = rollout_status(with_status(of, paused.document), find_new(of, world.views()), world.views(), NOW)
    assert reason(resumed.document, "Progressing") == "DeploymentResumed"
