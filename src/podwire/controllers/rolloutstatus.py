"""Deployment.status: the counts, and the conditions by which people and `kubectl rollout status` tell how far it is. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import msgspec

from podwire.controllers.documents import DeploymentDoc, DeploymentDocStatus, ReplicaSetDoc, StatusCondition
from podwire.controllers.rollout import limits_of
from podwire.model.meta import Json
from podwire.model.timestamps import format_time, parse_time

NO_DEADLINE = 2**31 - 1


@dataclass(frozen=True, slots=True)
class RolloutStatus:
    """The status document, whether it differs from what the object has, and when a deadline will change it by itself."""

    document: Json
    changed: bool
    check_at: datetime | None


def rollout_status(
    deployment: DeploymentDoc, new: ReplicaSetDoc | None, sets: Sequence[ReplicaSetDoc], now: datetime, *, created: str = ""
) -> RolloutStatus:
    """`created` names a new ReplicaSet that this very step made (and that `sets` does not show yet)."""
    old = deployment.status
    replicas = sum(rs.status.replicas for rs in sets)
    available = sum(rs.status.available_replicas for rs in sets)
    status = DeploymentDocStatus(
        observed_generation=deployment.metadata.generation,
        replicas=replicas,
        updated_replicas=new.status.replicas if new else 0,
        ready_replicas=sum(rs.status.ready_replicas for rs in sets),
        available_replicas=available,
        unavailable_replicas=max(replicas - available, deployment.spec.replicas - available, 0),
        collision_count=old.collision_count,
    )
    name = created or (new.metadata.name if new else "")
    conditions = _with(old.conditions, _available(deployment, status), now)
    progress = _progress(deployment, status, name, now, created=bool(created))
    if progress is not None:
        conditions = _with(conditions, progress, now)
    status = msgspec.structs.replace(status, conditions=conditions)
    document: Json = {
        "observedGeneration": status.observed_generation,
        "replicas": status.replicas,
        "updatedReplicas": status.updated_replicas,
        "readyReplicas": status.ready_replicas,
        "availableReplicas": status.available_replicas,
        "unavailableReplicas": status.unavailable_replicas,
        "conditions": msgspec.to_builtins(conditions),
    }
    return RolloutStatus(document, status != old, _deadline(deployment, conditions, now))


def _with(conditions: tuple[StatusCondition, ...], new: StatusCondition, now: datetime) -> tuple[StatusCondition, ...]:
    """`new` in the place of the one of its type; times move only with what they are the times of."""
    stamp = format_time(now)
    current = next((c for c in conditions if c.type == new.type), None)
    words = (new.status, new.reason, new.message)
    if current is not None and (current.status, current.reason, current.message) == words and not new.last_update_time:
        return conditions
    transition = current.last_transition_time if current is not None and current.status == new.status else stamp
    new = msgspec.structs.replace(new, last_update_time=stamp, last_transition_time=transition or stamp)
    return tuple(new if c is current else c for c in conditions) if current is not None else (*conditions, new)


def _available(deployment: DeploymentDoc, status: DeploymentDocStatus) -> StatusCondition:
    if status.available_replicas >= limits_of(deployment).available:
        message = "Deployment has minimum availability."
        return StatusCondition(type="Available", status="True", reason="MinimumReplicasAvailable", message=message)
    message = "Deployment does not have minimum availability."
    return StatusCondition(type="Available", status="False", reason="MinimumReplicasUnavailable", message=message)


def _progress(
    deployment: DeploymentDoc, status: DeploymentDocStatus, name: str, now: datetime, *, created: bool
) -> StatusCondition | None:
    """The Progressing condition, or None where it stays as it is."""
    current = _current(deployment.status.conditions)
    reason = current.reason if current is not None else ""
    desired = deployment.spec.replicas
    if deployment.spec.paused:
        return _condition("Unknown", "DeploymentPaused", "Deployment is paused")
    if reason == "DeploymentPaused":
        return _condition("Unknown", "DeploymentResumed", "Deployment is resumed")
    if created:
        return _condition("True", "NewReplicaSetCreated", f'Created new replica set "{name}"')
    if not name:
        return None
    if status.updated_replicas == status.replicas == status.available_replicas == desired:
        return _condition("True", "NewReplicaSetAvailable", f'ReplicaSet "{name}" has successfully progressed.')
    if current is None:
        return _condition("True", "FoundNewReplicaSet", f'Found new replica set "{name}"')
    if reason == "NewReplicaSetAvailable" and status.updated_replicas == status.replicas:
        return None  # it had come through; what ails its pods since then is no matter of the rollout
    if _advanced(deployment.status, status) or reason == "NewReplicaSetAvailable":
        message = f'ReplicaSet "{name}" is progressing.'
        # The deadline counts from the last progress, so the time moves although the words are the same.
        return msgspec.structs.replace(_condition("True", "ReplicaSetUpdated", message), last_update_time=format_time(now))
    deadline = _deadline(deployment, deployment.status.conditions, now)
    if deadline is not None and deadline <= now:
        return _condition("False", "ProgressDeadlineExceeded", f'ReplicaSet "{name}" has timed out progressing.')
    return None


def _condition(status: str, reason: str, message: str) -> StatusCondition:
    return StatusCondition(type="Progressing", status=status, reason=reason, message=message)


def _current(conditions: Sequence[StatusCondition]) -> StatusCondition | None:
    return next((c for c in conditions if c.type == "Progressing"), None)


def _advanced(old: DeploymentDocStatus, new: DeploymentDocStatus) -> bool:
    return (
        new.updated_replicas > old.updated_replicas
        or new.replicas - new.updated_replicas < old.replicas - old.updated_replicas
        or new.ready_replicas > old.ready_replicas
        or new.available_replicas > old.available_replicas
    )


def _deadline(deployment: DeploymentDoc, conditions: Sequence[StatusCondition], now: datetime) -> datetime | None:
    """When the rollout counts as stuck unless it gets further before."""
    current = _current(conditions)
    seconds = deployment.spec.progress_deadline_seconds
    if current is None or current.status != "True" or current.reason == "NewReplicaSetAvailable" or seconds >= NO_DEADLINE:
        return None
    since = parse_time(current.last_update_time) if current.last_update_time else now
    return since + timedelta(seconds=seconds)
