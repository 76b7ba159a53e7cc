"""What Kubernetes fills in in a pod's spec, alone (pods) or in a template (pkg/apis/core/v1 defaults, admission)."""

from collections.abc import Iterator
from typing import Any

from podwire.model.meta import Json

FILE_MODE = 0o644
CONTAINER_LISTS = ("initContainers", "containers", "ephemeralContainers")

_TOLERATED = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
_TOLERATED_SECONDS = 300


def containers_of(spec: Json) -> Iterator[Json]:
    """All containers of a pod spec, init containers first."""
    for name in CONTAINER_LISTS:
        yield from spec.get(name) or []


def default_pod_spec(spec: Json) -> None:
    """Defaults that templates get too."""
    for key, value in (
        ("restartPolicy", "Always"),
        ("terminationGracePeriodSeconds", 30),
        ("dnsPolicy", "ClusterFirst"),
        ("securityContext", {}),
        ("schedulerName", "default-scheduler"),
    ):
        if key not in spec or spec[key] == "":
            spec[key] = value.copy() if isinstance(value, dict) else value
    if spec.get("serviceAccountName") and not spec.get("serviceAccount"):
        spec["serviceAccount"] = spec["serviceAccountName"]
    elif spec.get("serviceAccount") and not spec.get("serviceAccountName"):
        spec["serviceAccountName"] = spec["serviceAccount"]
    for container in containers_of(spec):
        _default_container(container)
    for volume in spec.get("volumes") or []:
        _default_volume(volume)


def default_pod(spec: Json) -> None:
    """What only pods themselves get: host ports of the host network, and what admission adds."""
    spec.setdefault("enableServiceLinks", True)
    if spec.get("hostNetwork"):
        for container in containers_of(spec):
            for port in container.get("ports") or []:
                if not port.get("hostPort") and port.get("containerPort"):
                    port["hostPort"] = port["containerPort"]


def admit_pod(spec: Json) -> None:
    """What the default admission plugins add to a new pod: service account, priority, tolerations."""
    if not spec.get("serviceAccountName"):
        spec["serviceAccountName"] = spec["serviceAccount"] = "default"
    spec.setdefault("priority", 0)
    spec.setdefault("preemptionPolicy", "PreemptLowerPriority")
    tolerations = spec.get("tolerations") or []
    for key in _TOLERATED:
        if not any(_tolerates(item, key) for item in tolerations):
            tolerations.append(
                {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": _TOLERATED_SECONDS}
            )
    spec["tolerations"] = tolerations


def _tolerates(toleration: Json, key: str) -> bool:
    return toleration.get("key", "") in ("", key) and toleration.get("effect", "") in ("", "NoExecute")


def pull_policy(image: str) -> str:
    """Always for a tag that moves (`latest`, or none and no digest)."""
    if "@" in image:
        return "IfNotPresent"
    tag = image.rsplit("/", 1)[-1].partition(":")[2]
    return "Always" if tag in ("", "latest") else "IfNotPresent"


def _set(obj: Json, key: str, value: Any) -> None:
    """Sets what is missing or zero: Go cannot tell the two apart in these fields."""
    if not obj.get(key):
        obj[key] = value


def _default_container(container: Json) -> None:
    _set(container, "imagePullPolicy", pull_policy(container.get("image", "")))
    _set(container, "terminationMessagePath", "/dev/termination-log")
    _set(container, "terminationMessagePolicy", "File")
    resources = container.setdefault("resources", {})
    for name, limit in (resources.get("limits") or {}).items():
        resources["requests"] = {name: limit, **(resources.get("requests") or {})}
    for port in container.get("ports") or []:
        _set(port, "protocol", "TCP")
    for env in container.get("env") or []:
        ref = (env.get("valueFrom") or {}).get("fieldRef")
        if ref is not None:
            _set(ref, "apiVersion", "v1")
    for name in ("livenessProbe", "readinessProbe", "startupProbe"):
        if container.get(name) is not None:
            _default_probe(container[name])
    for hook in (container.get("lifecycle") or {}).values():
        if isinstance(hook, dict):
            _default_http(hook)


def _default_probe(probe: Json) -> None:
    for key, value in (("timeoutSeconds", 1), ("periodSeconds", 10), ("successThreshold", 1), ("failureThreshold", 3)):
        _set(probe, key, value)
    _default_http(probe)
    if probe.get("grpc") is not None:
        probe["grpc"].setdefault("service", "")


def _default_http(handler: Json) -> None:
    get = handler.get("httpGet")
    if get is not None:
        _set(get, "path", "/")
        _set(get, "scheme", "HTTP")


def _default_volume(volume: Json) -> None:
    if len(volume) == 1 and "name" in volume:
        volume["emptyDir"] = {}
    for key in ("configMap", "secret", "downwardAPI", "projected"):
        source = volume.get(key)
        if source is None:
            continue
        source.setdefault("defaultMode", FILE_MODE)
        _default_items(source)
    for source in (volume.get("projected") or {}).get("sources") or []:
        _default_items(source.get("downwardAPI") or {})
        if source.get("serviceAccountToken") is not None:
            source["serviceAccountToken"].setdefault("expirationSeconds", 3600)
    if volume.get("hostPath") is not None:
        volume["hostPath"].setdefault("type", "")


def _default_items(source: Json) -> None:
    for item in source.get("items") or []:
        if item.get("fieldRef") is not None:
            _set(item["fieldRef"], "apiVersion", "v1")
