"""Typed views with the parts that only controllers need, whole JSON documents where they copy those."""

from typing import Any

import msgspec

from podwire.model.meta import Json, LabelSelector, ObjectMeta, Requirement
from podwire.model.objects import (
    ApiObject,
    Deployment,
    DeploymentSpec,
    Pod,
    PodSpec,
    PodStatus,
    ReplicaSet,
    ReplicaSetSpec,
    ReplicaSetStatus,
    View,
)
from podwire.model.resources import Resource

_REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
_PREFERRED = "preferredDuringSchedulingIgnoredDuringExecution"


class NodeSelectorTerm(View, frozen=True):
    """All its expressions must hold; a term without any matches nothing."""

    match_expressions: tuple[Requirement, ...] = ()
    match_fields: tuple[Requirement, ...] = ()


class NodeSelector(View, frozen=True):
    node_selector_terms: tuple[NodeSelectorTerm, ...] = ()


class PreferredNode(View, frozen=True):
    weight: int
    preference: NodeSelectorTerm = NodeSelectorTerm()


class NodeAffinity(View, frozen=True):
    required: NodeSelector | None = msgspec.field(name=_REQUIRED, default=None)
    preferred: tuple[PreferredNode, ...] = msgspec.field(name=_PREFERRED, default=())


class PodAffinityTerm(View, frozen=True):
    topology_key: str
    label_selector: LabelSelector | None = None
    namespaces: tuple[str, ...] = ()


class PreferredPods(View, frozen=True):
    weight: int
    pod_affinity_term: PodAffinityTerm


class PodAffinity(View, frozen=True):
    """Also podAntiAffinity."""

    required: tuple[PodAffinityTerm, ...] = msgspec.field(name=_REQUIRED, default=())
    preferred: tuple[PreferredPods, ...] = msgspec.field(name=_PREFERRED, default=())


class Affinity(View, frozen=True):
    node_affinity: NodeAffinity = NodeAffinity()
    pod_affinity: PodAffinity = PodAffinity()
    pod_anti_affinity: PodAffinity = PodAffinity()


class WorkloadPodSpec(PodSpec, frozen=True):
    affinity: Affinity = Affinity()
    scheduling_gates: tuple[Json, ...] = ()


class ContainerStatus(View, frozen=True):
    restart_count: int = 0


class WorkloadPodStatus(PodStatus, frozen=True):
    container_statuses: tuple[ContainerStatus, ...] = ()
    start_time: str | None = None


class WorkloadPod(Pod, frozen=True):
    spec: WorkloadPodSpec = WorkloadPodSpec()
    status: WorkloadPodStatus = WorkloadPodStatus()


class StatusCondition(View, frozen=True):
    """apps/v1 DeploymentCondition and its like."""

    type: str
    status: str
    reason: str = ""
    message: str = ""
    last_update_time: str | None = None
    last_transition_time: str | None = None


class ReplicaSetDocSpec(ReplicaSetSpec, frozen=True):
    template: Json = msgspec.field(default_factory=dict)


class ReplicaSetDocStatus(ReplicaSetStatus, frozen=True):
    conditions: tuple[StatusCondition, ...] = ()


class ReplicaSetDoc(ReplicaSet, frozen=True):
    spec: ReplicaSetDocSpec = ReplicaSetDocSpec()
    status: ReplicaSetDocStatus = ReplicaSetDocStatus()


class DeploymentDocSpec(DeploymentSpec, frozen=True):
    template: Json = msgspec.field(default_factory=dict)


class DeploymentDocStatus(View, frozen=True):
    observed_generation: int = 0
    replicas: int = 0
    updated_replicas: int = 0
    ready_replicas: int = 0
    available_replicas: int = 0
    unavailable_replicas: int = 0
    collision_count: int | None = None
    conditions: tuple[StatusCondition, ...] = ()


class DeploymentDoc(Deployment, frozen=True):
    spec: DeploymentDocSpec = DeploymentDocSpec()
    status: DeploymentDocStatus = DeploymentDocStatus()


class SliceDoc(ApiObject, frozen=True):
    """An EndpointSlice whose endpoints and ports are documents, as they are written."""

    address_type: str = "IPv4"
    endpoints: tuple[Json, ...] = ()
    ports: tuple[Json, ...] = ()

    @property
    def service(self) -> str:
        return self.metadata.labels.get("kubernetes.io/service-name", "")


class NamespaceSpec(View, frozen=True):
    finalizers: tuple[str, ...] = ()


class NamespaceDoc(ApiObject, frozen=True):
    spec: NamespaceSpec = NamespaceSpec()


def owner_reference(resource: Resource, meta: ObjectMeta) -> Json:
    """The ownerReferences entry by which a controller marks what it made for the object `meta`."""
    return {
        "apiVersion": resource.api_version,
        "kind": resource.kind,
        "name": meta.name,
        "uid": meta.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }


def to_json(value: Any) -> Any:
    """A view as the document it would be, defaults left out."""
    return msgspec.to_builtins(value)
