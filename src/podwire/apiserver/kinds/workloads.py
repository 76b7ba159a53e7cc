"""Deployment and ReplicaSet (apps/v1)."""

from datetime import datetime
from typing import Any

from podwire.apiserver.kinds.base import AGE, NAME, SCALE, STATUS, Column, Kind
from podwire.apiserver.tables import age, join
from podwire.model import resources
from podwire.model.meta import Json


class ScaledKind(Kind):
    """A kind with spec.replicas, spec.selector and spec.template."""

    subresources = (STATUS, SCALE)
    categories = ("all",)
    counts_generation = True

    def scale_of(self, obj: Json) -> Json:
        meta, spec, status = obj.get("metadata", {}), obj.get("spec") or {}, obj.get("status") or {}
        keep = ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")
        return {
            "kind": "Scale",
            "apiVersion": "autoscaling/v1",
            "metadata": {key: meta[key] for key in keep if key in meta},
            "spec": {"replicas": spec.get("replicas", 0)},
            "status": {"replicas": status.get("replicas", 0), "selector": selector_text(spec.get("selector") or {})},
        }


class DeploymentKind(ScaledKind):
    resource = resources.DEPLOYMENTS
    message = "k8s.io.api.apps.v1.Deployment"
    short_names = ("deploy",)
    columns = (
        NAME,
        Column("Ready", "Number of the pod with ready state"),
        Column("Up-to-date", "Number of pods that have the desired template.", type="integer"),
        Column("Available", "Number of pods that have been ready for minReadySeconds.", type="integer"),
        AGE,
        Column("Containers", "Names of each container in the template.", priority=1),
        Column("Images", "Images referenced by each container in the template.", priority=1),
        Column("Selector", "Label selector for pods.", priority=1),
    )

    def row(self, obj: Json, now: datetime) -> list[Any]:
        meta, spec, status = obj.get("metadata", {}), obj.get("spec") or {}, obj.get("status") or {}
        return [
            meta.get("name", ""),
            f"{status.get('readyReplicas', 0)}/{spec.get('replicas', 0)}",
            status.get("updatedReplicas", 0),
            status.get("availableReplicas", 0),
            age(meta.get("creationTimestamp"), now),
            *_template_cells(spec),
        ]


class ReplicaSetKind(ScaledKind):
    resource = resources.REPLICASETS
    message = "k8s.io.api.apps.v1.ReplicaSet"
    short_names = ("rs",)
    columns = (
        NAME,
        Column("Desired", "Replicas is the number of desired pods.", type="integer"),
        Column("Current", "Replicas is the most recently observed number of non-terminating pods.", type="integer"),
        Column("Ready", "The number of non-terminating pods that are ready.", type="integer"),
        AGE,
        Column("Containers", "Names of each container in the template.", priority=1),
        Column("Images", "Images referenced by each container in the template.", priority=1),
        Column("Selector", "Label selector for pods.", priority=1),
    )

    def initialise(self, obj: Json, now: datetime) -> None:
        obj["status"] = {"replicas": 0}

    def selectable_fields(self, obj: Json) -> dict[str, str]:
        return {**super().selectable_fields(obj), "status.replicas": str((obj.get("status") or {}).get("replicas", 0))}

    def row(self, obj: Json, now: datetime) -> list[Any]:
        meta, spec, status = obj.get("metadata", {}), obj.get("spec") or {}, obj.get("status") or {}
        return [
            meta.get("name", ""),
            spec.get("replicas", 0),
            status.get("replicas", 0),
            status.get("readyReplicas", 0),
            age(meta.get("creationTimestamp"), now),
            *_template_cells(spec),
        ]


def _template_cells(spec: Json) -> list[str]:
    containers = ((spec.get("template") or {}).get("spec") or {}).get("containers") or []
    names, images = [c.get("name", "") for c in containers], [c.get("image", "") for c in containers]
    return [join(names), join(images), selector_text(spec.get("selector") or {}) or "<none>"]


def selector_text(selector: Json) -> str:
    """A metav1.LabelSelector in the form of a labelSelector query."""
    parts = [f"{key}={value}" for key, value in sorted((selector.get("matchLabels") or {}).items())]
    for item in selector.get("matchExpressions") or []:
        key, values = item.get("key", ""), ",".join(sorted(item.get("values") or []))
        match item.get("operator"):
            case "In":
                parts.append(f"{key} in ({values})")
            case "NotIn":
                parts.append(f"{key} notin ({values})")
            case "Exists":
                parts.append(key)
            case "DoesNotExist":
                parts.append(f"!{key}")
    return ",".join(parts)
