"""A Deployment and its ReplicaSets → the next step of its rollout, and its status. Pure.

Follows kube-controller-manager: the step never has more pods than replicas + maxSurge, nor takes away availability below
replicas - maxUnavailable; one step scales the new set up or the old ones down, and each step starts from what really is.
"""

import copy
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from podwire.controllers.documents import DeploymentDoc, ReplicaSetDoc, owner_reference
from podwire.model.meta import Json
from podwire.model.resources import DEPLOYMENTS, REPLICASETS

HASH_LABEL = "pod-template-hash"
REVISION = "deployment.kubernetes.io/revision"
DESIRED = "deployment.kubernetes.io/desired-replicas"
MAXIMUM = "deployment.kubernetes.io/max-replicas"
_NOT_COPIED = frozenset(
    (
        "kubectl.kubernetes.io/last-applied-configuration",
        REVISION,
        DESIRED,
        MAXIMUM,
        "deployment.kubernetes.io/revision-history",
    )
)
_SAFE = "bcdfghjklmnpqrstvwxz2456789"
"""No vowels and no digits that look like them, as Kubernetes' generated names: no words, no confusion."""


@dataclass(slots=True)
class RolloutPlan:
    """`scale`: ReplicaSet → replicas. `annotate`: ReplicaSet → annotations that are wrong on it."""

    create: Json | None = None
    scale: dict[str, int] = field(default_factory=dict)
    annotate: dict[str, dict[str, str]] = field(default_factory=dict)
    delete: list[ReplicaSetDoc] = field(default_factory=list)
    revision: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    """The numbers that bound a rolling update."""

    desired: int
    surge: int
    unavailable: int

    @property
    def total(self) -> int:
        return self.desired + self.surge

    @property
    def available(self) -> int:
        return max(self.desired - self.unavailable, 0)


def limits_of(deployment: DeploymentDoc) -> Limits:
    spec = deployment.spec
    if spec.strategy.type != "RollingUpdate":
        return Limits(spec.replicas, 0, 0 if spec.strategy.type != "Recreate" else spec.replicas)
    rolling = spec.strategy.rolling_update
    surge = _portion(rolling.max_surge if rolling else "25%", spec.replicas, up=True)
    unavailable = _portion(rolling.max_unavailable if rolling else "25%", spec.replicas, up=False)
    if not surge and not unavailable:
        unavailable = 1  # both rounded to nothing would mean no progress at all
    return Limits(spec.replicas, surge, min(unavailable, spec.replicas))


def _portion(value: int | str, whole: int, *, up: bool) -> int:
    """An IntOrString: a number, or a percentage of `whole`."""
    if isinstance(value, int):
        return value
    exact = int(value.rstrip("%")) * whole / 100
    return math.ceil(exact) if up else math.floor(exact)


def template_hash(template: Mapping[str, object], collisions: int) -> str:
    """pod-template-hash: ten safe characters that follow from the template (and from how often they clashed)."""
    ordered = msgspec.json.encode(template, order="sorted")
    digest = hashlib.sha256(ordered + str(collisions).encode()).digest()
    return "".join(_SAFE[byte % len(_SAFE)] for byte in digest[:10])


def _bare_template(replica_set: ReplicaSetDoc) -> Json:
    """Its template as the Deployment has it: without the hash label."""
    template = copy.deepcopy(replica_set.spec.template)
    labels = template.get("metadata", {}).get("labels")
    if labels is not None:
        labels.pop(HASH_LABEL, None)
    return template


def same_template(one: Mapping[str, object], other: Mapping[str, object]) -> bool:
    return _normal(one) == _normal(other)


def _normal(template: Mapping[str, object]) -> object:
    """creationTimestamp: null and empty maps come and go with encoders; they mean nothing."""

    def clean(value: object) -> object:
        if isinstance(value, dict):
            cleaned = {key: clean(item) for key, item in value.items()}
            return {key: item for key, item in cleaned.items() if item is not None and item != {} and item != []}
        return [clean(item) for item in value] if isinstance(value, list) else value

    return clean(dict(template))


def find_new(deployment: DeploymentDoc, sets: Sequence[ReplicaSetDoc]) -> ReplicaSetDoc | None:
    """The set that has the Deployment's template; the oldest, if several do."""
    same = [rs for rs in sets if same_template(_bare_template(rs), deployment.spec.template)]
    return min(same, key=lambda rs: (rs.metadata.creation_timestamp or "", rs.metadata.name), default=None)


def revision_of(replica_set: ReplicaSetDoc) -> int:
    text = replica_set.metadata.annotations.get(REVISION, "")
    return int(text) if text.isdecimal() else 0


def plan_rollout(deployment: DeploymentDoc, sets: Sequence[ReplicaSetDoc], *, old_pods: bool) -> RolloutPlan:
    """The next step. `sets` are the Deployment's; `old_pods`: whether old sets still have pods (Recreate waits for them)."""
    plan = RolloutPlan()
    new = find_new(deployment, sets)
    old = [rs for rs in sets if rs is not new]
    highest = max(map(revision_of, old), default=0)
    plan.revision = str(max(highest + 1, revision_of(new) if new else 0))
    if deployment.metadata.deletion_timestamp is not None:
        return plan
    if deployment.spec.paused or _rescaled(deployment, sets):
        _scale_in_proportion(plan, deployment, new, old)
        if deployment.spec.paused:
            plan.revision = deployment.metadata.annotations.get(REVISION, "")
            _annotate(plan, deployment, new, sets, plan.revision if new else "")
            return plan
    elif deployment.spec.strategy.type == "Recreate":
        _recreate(plan, deployment, new, old, old_pods=old_pods)
    else:
        _roll(plan, deployment, new, old)
    _annotate(plan, deployment, new, sets, plan.revision)
    if new is not None and _complete(deployment, new, old):
        plan.delete = _superfluous(deployment, old)
    return plan


def _rescaled(deployment: DeploymentDoc, sets: Sequence[ReplicaSetDoc]) -> bool:
    """Whether spec.replicas changed since the sets were last scaled."""
    wanted = str(deployment.spec.replicas)
    return any(rs.spec.replicas > 0 and rs.metadata.annotations.get(DESIRED, wanted) != wanted for rs in sets)


def _recreate(
    plan: RolloutPlan, deployment: DeploymentDoc, new: ReplicaSetDoc | None, old: Sequence[ReplicaSetDoc], *, old_pods: bool
) -> None:
    running = [rs for rs in old if rs.spec.replicas > 0]
    if running:
        plan.scale.update({rs.metadata.name: 0 for rs in running})
    elif old_pods:
        return
    elif new is None:
        plan.create = new_replica_set(deployment, deployment.spec.replicas, plan.revision)
    elif new.spec.replicas != deployment.spec.replicas:
        plan.scale[new.metadata.name] = deployment.spec.replicas


def _roll(plan: RolloutPlan, deployment: DeploymentDoc, new: ReplicaSetDoc | None, old: Sequence[ReplicaSetDoc]) -> None:
    limits = limits_of(deployment)
    total = sum(rs.spec.replicas for rs in old) + (new.spec.replicas if new else 0)
    if new is None:
        plan.create = new_replica_set(deployment, max(min(limits.total - total, limits.desired), 0), plan.revision)
        return
    if new.spec.replicas > limits.desired:
        plan.scale[new.metadata.name] = limits.desired
        return
    grow = min(limits.total - total, limits.desired - new.spec.replicas)
    if grow > 0:
        plan.scale[new.metadata.name] = new.spec.replicas + grow
        return
    _shrink_old(plan, new, old, limits)


def _shrink_old(plan: RolloutPlan, new: ReplicaSetDoc, old: Sequence[ReplicaSetDoc], limits: Limits) -> None:
    """Unhealthy pods of old sets go first, then healthy ones as far as availability allows."""
    order = sorted(old, key=lambda rs: (rs.metadata.creation_timestamp or "", rs.metadata.name))
    left = {rs.metadata.name: rs.spec.replicas for rs in order}
    total = sum(left.values()) + new.spec.replicas
    may_go = total - limits.available - (new.spec.replicas - _available(new))
    for rs in order:
        unhealthy = min(left[rs.metadata.name] - _available(rs), max(may_go, 0))
        left[rs.metadata.name] -= unhealthy
        may_go -= unhealthy
    available = _available(new) + sum(map(_available, order))
    may_go = min(may_go, available - limits.available)
    for rs in order:
        going = min(left[rs.metadata.name], max(may_go, 0))
        left[rs.metadata.name] -= going
        may_go -= going
    plan.scale.update({rs.metadata.name: left[rs.metadata.name] for rs in order if left[rs.metadata.name] != rs.spec.replicas})


def _available(replica_set: ReplicaSetDoc) -> int:
    """A status from before the last scaling may tell of pods that are on their way out."""
    return min(replica_set.status.available_replicas, replica_set.spec.replicas)


def _scale_in_proportion(
    plan: RolloutPlan, deployment: DeploymentDoc, new: ReplicaSetDoc | None, old: Sequence[ReplicaSetDoc]
) -> None:
    """spec.replicas changed: one active set takes it all; in the middle of a rolling update each gets its share."""
    limits = limits_of(deployment)
    every = [*old, *([new] if new else [])]
    active = [rs for rs in every if rs.spec.replicas > 0]
    if len(active) <= 1:
        target = active[0] if active else max(every, key=revision_of, default=None)
        if target is not None and target.spec.replicas != limits.desired:
            plan.scale[target.metadata.name] = limits.desired
        return
    if deployment.spec.strategy.type == "Recreate":
        return
    allowed = limits.total if limits.desired else 0
    before = sum(rs.spec.replicas for rs in active)
    difference = allowed - before
    # The largest first; what rounding leaves over is the largest set's.
    active.sort(key=lambda rs: (-rs.spec.replicas, rs.metadata.creation_timestamp or "", rs.metadata.name))
    shares = [int(math.copysign(abs(difference) * rs.spec.replicas // before, difference)) for rs in active]
    shares[0] += difference - sum(shares)
    for rs, share in zip(active, shares, strict=True):
        if share:
            plan.scale[rs.metadata.name] = max(rs.spec.replicas + share, 0)


def _annotate(
    plan: RolloutPlan, deployment: DeploymentDoc, new: ReplicaSetDoc | None, sets: Sequence[ReplicaSetDoc], revision: str
) -> None:
    limits = limits_of(deployment)
    for rs in sets:
        wanted: dict[str, str] = {}
        if plan.scale.get(rs.metadata.name, rs.spec.replicas) > 0:
            wanted |= {DESIRED: str(limits.desired), MAXIMUM: str(limits.total)}
        if rs is new and revision:
            wanted |= _copied(deployment) | {REVISION: revision}
        wrong = {key: value for key, value in wanted.items() if rs.metadata.annotations.get(key) != value}
        if wrong:
            plan.annotate[rs.metadata.name] = wrong


def _copied(deployment: DeploymentDoc) -> dict[str, str]:
    return {key: value for key, value in deployment.metadata.annotations.items() if key not in _NOT_COPIED}


def _complete(deployment: DeploymentDoc, new: ReplicaSetDoc, old: Sequence[ReplicaSetDoc]) -> bool:
    desired = deployment.spec.replicas
    return (
        new.spec.replicas == new.status.replicas == new.status.available_replicas == desired
        and new.status.observed_generation >= new.metadata.generation
        and not any(rs.status.replicas or rs.spec.replicas for rs in old)
    )


def _superfluous(deployment: DeploymentDoc, old: Sequence[ReplicaSetDoc]) -> list[ReplicaSetDoc]:
    """Old sets beyond revisionHistoryLimit, oldest first."""
    empty = [rs for rs in old if not rs.spec.replicas and not rs.status.replicas and not rs.metadata.deletion_timestamp]
    empty.sort(key=revision_of)
    return empty[: max(len(empty) - deployment.spec.revision_history_limit, 0)]


def new_replica_set(deployment: DeploymentDoc, replicas: int, revision: str) -> Json:
    meta, limits = deployment.metadata, limits_of(deployment)
    label = template_hash(deployment.spec.template, deployment.status.collision_count or 0)
    template = copy.deepcopy(deployment.spec.template)
    template_meta = template.setdefault("metadata", {})
    template_meta["labels"] = dict(template_meta.get("labels") or {}) | {HASH_LABEL: label}
    selector: Json = msgspec.to_builtins(deployment.spec.selector)
    selector["matchLabels"] = dict(selector.get("matchLabels") or {}) | {HASH_LABEL: label}
    annotations = _copied(deployment) | {REVISION: revision, DESIRED: str(limits.desired), MAXIMUM: str(limits.total)}
    spec: Json = {"replicas": replicas, "selector": selector, "template": template}
    if deployment.spec.min_ready_seconds:
        spec["minReadySeconds"] = deployment.spec.min_ready_seconds
    return {
        "apiVersion": REPLICASETS.api_version,
        "kind": "ReplicaSet",
        "metadata": {
            "name": f"{meta.name}-{label}",
            "namespace": meta.namespace,
            "labels": template_meta["labels"],
            "annotations": annotations,
            "ownerReferences": [owner_reference(DEPLOYMENTS, meta)],
        },
        "spec": spec,
    }
