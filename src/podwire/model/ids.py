"""The keys by which podwire names things. A NewType or NamedTuple for each, so that one cannot pass for another."""

from typing import NamedTuple, NewType

NodeName = NewType("NodeName", str)
PodUID = NewType("PodUID", str)

NetnsName = NewType("NetnsName", str)
"""A label for a network namespace, resolved to a descriptor by the kernel port: plans are pure and hold no descriptors."""

HOST = NetnsName("")
"""The namespace that the agent itself serves: a machine's own, or a lab node's."""


class ObjectKey(NamedTuple):
    """Identity of an API object within its kind; `namespace` is empty for cluster-scoped kinds."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}" if self.namespace else self.name


def pod_netns(uid: str) -> NetnsName:
    """The label under which a pod's network namespace is registered with the kernel port."""
    return NetnsName(f"pod/{uid}")
