"""What `podwire lab exec TARGET` and `lab logs TARGET` mean by TARGET. Pure."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from podwire.lab.topology import BALANCER, WORLD
from podwire.model.errors import InvalidInput
from podwire.model.objects import Pod

DEFAULT_CONTAINER = "kubectl.kubernetes.io/default-container"
"""The annotation by which a pod says which of its containers is meant when none is named."""


@dataclass(frozen=True, slots=True)
class PlaceTarget:
    """A namespace on the fabric: a node, `world` or `balancer`."""

    name: str


@dataclass(frozen=True, slots=True)
class PodTarget:
    """A container of a pod."""

    namespace: str
    name: str
    container: str


Target = PlaceTarget | PodTarget


def find_target(text: str, nodes: Collection[str], pods: Sequence[Pod], namespace: str = "") -> Target:
    """`world`, `balancer`, a node, `pod`, `pod/container`, `namespace/pod` or `namespace/pod/container` → what it names.

    Without `namespace` a pod may be in any; without a container its default one is meant.

    Raises InvalidInput for what does not exist or could be several."""
    if text in (WORLD, BALANCER) or (text in nodes and not namespace):
        return PlaceTarget(text)
    pods = [pod for pod in pods if not namespace or pod.metadata.namespace == namespace]
    found = [target for pod in pods if (target := _match(text.split("/"), pod)) is not None]
    if not found:
        names = ", ".join(str(pod.key) for pod in sorted(pods, key=lambda p: p.key)[:8]) or "none"
        raise InvalidInput(
            f"there is no pod, node or place named {text!r}: nodes are {', '.join(sorted(nodes))}; pods are {names}"
        )
    if len(found) > 1:
        choices = ", ".join(f"{t.namespace}/{t.name}/{t.container}" for t in found)
        raise InvalidInput(f"{text!r} could be {choices}: write it as namespace/pod/container")
    return found[0]


def _match(parts: Sequence[str], pod: Pod) -> PodTarget | None:
    namespace, name = pod.metadata.namespace, pod.metadata.name
    containers = [container.name for container in pod.spec.containers]
    default = pod.metadata.annotations.get(DEFAULT_CONTAINER, containers[0] if containers else "")
    match list(parts):
        case [p] if p == name:
            return PodTarget(namespace, name, default)
        case [p, c] if p == name and c in containers:
            return PodTarget(namespace, name, c)
        case [ns, p] if (ns, p) == (namespace, name):
            return PodTarget(namespace, name, default)
        case [ns, p, c] if (ns, p) == (namespace, name) and c in containers:
            return PodTarget(namespace, name, c)
        case _:
            return None
