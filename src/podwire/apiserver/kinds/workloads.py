"""Deployment and ReplicaSet (apps/v1)."""

import re
from datetime import datetime
from typing import Any

import msgspec

from podwire.apiserver.kinds.base import AGE, NAME, SCALE, STATUS, Column, Kind
from podwire.apiserver.kinds.metadata import labels, selector
from podwire.apiserver.kinds.podspecdefaults import default_pod_spec
from podwire.apiserver.kinds.podspecrules import check_pod_spec
from podwire.apiserver.tables import age, join
from podwire.apiserver.validation import FieldError, Path, forbidden, immutable, invalid, non_negative, one_of, required
from podwire.model import resources
from podwire.model.meta import Json, LabelSelector

_PERCENT = re.compile(r"[0-9]+%")
_PERCENT_TEXT = (
    "a valid percent string must be a numeric string followed by an ending '%' (e.g. '1%',  or '93%', regex used for "
    "validation is '[0-9]+%')"
)


class ScaledKind(Kind):
    """A kind with spec.replicas, spec.selector and spec.template."""

    subresources = (STATUS, SCALE)
    categories = ("all",)
    counts_generation = True

    def default(self, obj: Json) -> None:
        spec = obj.setdefault("spec", {})
        spec.setdefault("replicas", 1)
        template = spec.setdefault("template", {})
        template.setdefault("metadata", {})
        default_pod_spec(template.setdefault("spec", {}))

    def check(self, obj: Json, root: Path) -> list[FieldError]:
        spec, at, kind = obj.get("spec") or {}, root / "spec", self.resource.kind
        errors = non_negative(at / "replicas", spec.get("replicas", 0))
        errors += non_negative(at / "minReadySeconds", spec.get("minReadySeconds", 0))
        wanted = spec.get("selector")
        template, where = spec.get("template") or {}, at / "template"
        own = (template.get("metadata") or {}).get("labels") or {}
        if wanted is None:
            errors.append(required(at / "selector"))
        else:
            problems = selector(wanted, at / "selector")
            errors += problems
            if not wanted.get("matchLabels") and not wanted.get("matchExpressions"):
                text = "empty selector is invalid for deployment"
                errors.append(invalid(at / "selector", wanted, text))
            elif not problems and not msgspec.convert(wanted, LabelSelector).matches(own):
                text = "`selector` does not match template `labels`"
                errors.append(invalid(where / "metadata" / "labels", own, text))
        return errors + _check_template(template, where, kind)

    def check_update(self, new: Json, old: Json, root: Path) -> list[FieldError]:
        after, before = ((obj.get("spec") or {}).get("selector") for obj in (new, old))
        return immutable(root / "spec" / "selector", after, before)

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

    def default(self, obj: Json) -> None:
        super().default(obj)
        spec = obj["spec"]
        strategy = spec.setdefault("strategy", {})
        strategy["type"] = strategy.get("type") or "RollingUpdate"
        if strategy["type"] == "RollingUpdate":
            rolling = strategy.setdefault("rollingUpdate", {})
            rolling.setdefault("maxSurge", "25%")
            rolling.setdefault("maxUnavailable", "25%")
        spec.setdefault("revisionHistoryLimit", 10)
        spec.setdefault("progressDeadlineSeconds", 600)

    def check(self, obj: Json, root: Path) -> list[FieldError]:
        spec, at = obj.get("spec") or {}, root / "spec"
        errors = super().check(obj, root)
        errors += _check_strategy(spec.get("strategy") or {}, at / "strategy")
        errors += non_negative(at / "revisionHistoryLimit", spec.get("revisionHistoryLimit", 0))
        deadline = spec.get("progressDeadlineSeconds", 600)
        errors += non_negative(at / "progressDeadlineSeconds", deadline)
        if deadline <= spec.get("minReadySeconds", 0):
            errors.append(invalid(at / "progressDeadlineSeconds", deadline, "must be greater than minReadySeconds"))
        return errors

    def take_status(self, new: Json, old: Json) -> Json:
        merged = super().take_status(new, old)
        if "labels" in old.get("metadata", {}):
            merged["metadata"]["labels"] = old["metadata"]["labels"]
        return merged

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


def _check_template(template: Json, at: Path, kind: str) -> list[FieldError]:
    meta, spec = template.get("metadata") or {}, template.get("spec") or {}
    errors = labels(meta.get("labels"), at / "labels")
    errors += check_pod_spec(spec, at / "spec")
    if spec.get("restartPolicy") != "Always":
        errors += one_of(at / "spec" / "restartPolicy", spec.get("restartPolicy"), ("Always",))
    if spec.get("activeDeadlineSeconds") is not None:
        text = f"activeDeadlineSeconds in {kind} is not Supported"
        errors.append(forbidden(at / "spec" / "activeDeadlineSeconds", text))
    return errors


def _check_strategy(strategy: Json, at: Path) -> list[FieldError]:
    rolling, kind = strategy.get("rollingUpdate"), strategy.get("type", "")
    if kind == "Recreate" and rolling is not None:
        return [forbidden(at / "rollingUpdate", "may not be specified when strategy `type` is 'Recreate'")]
    if kind != "RollingUpdate":
        return one_of(at / "type", kind, ("Recreate", "RollingUpdate"))
    if rolling is None:
        return [required(at / "rollingUpdate", "this should be defaulted and never be nil")]
    where, surge, gone = at / "rollingUpdate", rolling.get("maxSurge", 0), rolling.get("maxUnavailable", 0)
    errors = _check_share(where / "maxUnavailable", gone) + _check_share(where / "maxSurge", surge)
    if not errors and _is_zero(surge) and _is_zero(gone):
        errors.append(invalid(where / "maxUnavailable", gone, "may not be 0 when `maxSurge` is 0"))
    if isinstance(gone, str) and _PERCENT.fullmatch(gone) and int(gone[:-1]) > 100:
        errors.append(invalid(where / "maxUnavailable", gone, "must not be greater than 100%"))
    return errors


def _check_share(path: Path, value: Any) -> list[FieldError]:
    """A number of pods or a percentage."""
    if isinstance(value, str):
        return [] if _PERCENT.fullmatch(value) else [invalid(path, value, _PERCENT_TEXT)]
    return non_negative(path, value)


def _is_zero(value: Any) -> bool:
    return value == 0 or (isinstance(value, str) and int(value[:-1]) == 0)


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
