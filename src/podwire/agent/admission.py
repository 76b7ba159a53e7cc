"""Whether a node takes a pod that has been bound to it. Pure."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from podwire.model.objects import Pod


class HostPort(NamedTuple):
    """A port of the node that a pod asks for; `ip` is empty for all of the node's addresses."""

    protocol: str
    port: int
    ip: str

    def clashes(self, other: "HostPort") -> bool:
        same_ip = not self.ip or not other.ip or self.ip == other.ip
        return self.protocol == other.protocol and self.port == other.port and same_ip


class Rejection(NamedTuple):
    """Why not, as pod.status.reason and message have it."""

    reason: str
    message: str


def host_ports(pod: Pod) -> Iterator[HostPort]:
    """What `pod` occupies on its node. With hostNetwork every declared port counts."""
    for container in (*pod.spec.init_containers, *pod.spec.containers):
        for port in container.ports:
            number = port.host_port or (port.container_port if pod.spec.host_network else 0)
            if number:
                yield HostPort(port.protocol, number, "" if port.host_ip in ("0.0.0.0", "::") else port.host_ip)


def refuse(pod: Pod, others: Iterable[Pod], max_pods: int) -> Rejection | None:
    """None where `pod` may run beside `others`, the unfinished pods that this node has taken already."""
    wanted = list(host_ports(pod))
    count = 0
    for other in others:
        count += 1
        if not wanted:
            continue
        for held in host_ports(other):
            for port in wanted:
                if port.clashes(held):
                    text = f"host port {port.port}/{port.protocol} is in use by pod {other.key} on this node"
                    return Rejection("NodePorts", text)
    if count >= max_pods:
        return Rejection("OutOfpods", f"this node takes {max_pods} pods and has {count}")
    return None
