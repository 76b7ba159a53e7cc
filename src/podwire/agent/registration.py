"""A node's own API objects, Node and Lease, as documents. Pure, but for `read_machine`."""

import os
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from podwire import __version__
from podwire.agent.config import AgentConfig
from podwire.model.addr import Family, family_of
from podwire.model.meta import Json
from podwire.model.objects import Condition
from podwire.model.timestamps import format_micro_time, format_time
from podwire.plan.leases import LeaseAttrs, encode_annotations, vxlan_data
from podwire.plan.naming import vtep_mac

LEASE_NAMESPACE = "kube-node-lease"

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm"}


@dataclass(frozen=True, slots=True)
class Machine:
    """What a Node's nodeInfo says of the machine."""

    kernel_version: str = ""
    os_image: str = ""
    architecture: str = ""
    boot_id: str = ""


@dataclass(frozen=True, slots=True)
class NodeState:
    """How the node is, for its conditions. `message` says what is missing."""

    network: bool = False
    ready: bool = False
    message: str = "the agent is starting"


def read_machine() -> Machine:
    """This machine, from uname and /etc/os-release."""
    name = os.uname()
    return Machine(
        kernel_version=name.release,
        os_image=_os_name(),
        architecture=_ARCHITECTURES.get(name.machine, name.machine),
        boot_id=_first_line(Path("/proc/sys/kernel/random/boot_id")),
    )


def node_document(config: AgentConfig, machine: Machine) -> Json:
    """The Node to create. Its annotations tell flannel's "kube subnet manager" on the other nodes how to reach this one."""
    labels = {
        "kubernetes.io/hostname": config.node_name,
        "kubernetes.io/os": "linux",
        "kubernetes.io/arch": machine.architecture,
    }
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": config.node_name,
            "labels": labels | dict(config.labels),
            "annotations": node_annotations(config),
        },
        "spec": {},
    }


def own_attrs(config: AgentConfig) -> LeaseAttrs:
    """What the peers must know of the node, with VXLAN."""
    ips = {family_of(ip): ip for ip in config.node_ips}
    data = {family: vxlan_data(config.vni, vtep_mac(config.node_name, family)) for family in ips}
    four, six = ips.get(Family.IPV4), ips.get(Family.IPV6)
    return LeaseAttrs(
        public_ip=four if isinstance(four, IPv4Address) else None,
        public_ipv6=six if isinstance(six, IPv6Address) else None,
        backend_type="vxlan",
        backend_data=data.get(Family.IPV4, ""),
        backend_v6_data=data.get(Family.IPV6, ""),
    )


def node_annotations(config: AgentConfig) -> dict[str, str]:
    return encode_annotations(own_attrs(config), [family_of(ip) for ip in config.node_ips])


def node_status(config: AgentConfig, machine: Machine, state: NodeState, before: Collection[Condition], now: datetime) -> Json:
    """A merge patch for nodes/status. `before` are the conditions as last read: those of others and the transition times of
    unchanged ones are kept."""
    capacity = {
        "cpu": str(config.cpus),
        "memory": f"{config.memory_bytes >> 10}Ki",
        "pods": str(config.max_pods),
        "ephemeral-storage": "0",
    }
    addresses = [{"type": "InternalIP", "address": str(ip)} for ip in config.node_ips]
    return {
        "status": {
            "addresses": [*addresses, {"type": "Hostname", "address": config.node_name}],
            "capacity": capacity,
            "allocatable": capacity,
            "conditions": conditions(state, before, now),
            "daemonEndpoints": {"kubeletEndpoint": {"Port": config.kubelet_port}},
            "nodeInfo": {
                "machineID": "",
                "systemUUID": "",
                "bootID": machine.boot_id,
                "kernelVersion": machine.kernel_version,
                "osImage": machine.os_image,
                "containerRuntimeVersion": f"podwire://{__version__}",
                "kubeletVersion": config.kubelet_version,
                "kubeProxyVersion": "",
                "operatingSystem": "linux",
                "architecture": machine.architecture,
            },
        }
    }


def conditions(state: NodeState, before: Collection[Condition], now: datetime) -> list[Json]:
    """The node's conditions: ours as `state` says, with heartbeat time `now`; those of others as they were."""
    time = format_time(now)
    ours = (
        _condition("MemoryPressure", False, "KubeletHasSufficientMemory", "the agent does not measure memory"),
        _condition("DiskPressure", False, "KubeletHasNoDiskPressure", "the agent does not measure disks"),
        _condition("PIDPressure", False, "KubeletHasSufficientPID", "the agent does not measure processes"),
        _condition("NetworkUnavailable", not state.network, *_network_words(state)),
        _condition("Ready", state.ready, *_ready_words(state)),
    )
    known = {condition.type: condition for condition in before}
    documents: list[Json] = []
    for condition in ours:
        old = known.pop(condition["type"], None)
        since = old.last_transition_time if old and old.status == condition["status"] else None
        documents.append(condition | {"lastHeartbeatTime": time, "lastTransitionTime": since or time})
    return documents + [_kept(other) for other in known.values()]


def _kept(other: Condition) -> Json:
    return {
        "type": other.type,
        "status": other.status,
        "reason": other.reason,
        "message": other.message,
        "lastTransitionTime": other.last_transition_time,
    }


def lease_spec(config: AgentConfig, now: datetime) -> Json:
    return {
        "holderIdentity": config.node_name,
        "leaseDurationSeconds": config.lease_seconds,
        "renewTime": format_micro_time(now),
    }


def lease_document(config: AgentConfig, node_uid: str, now: datetime) -> Json:
    """The node's Lease; owned by the Node, so that it goes with it."""
    owner = {"apiVersion": "v1", "kind": "Node", "name": config.node_name, "uid": node_uid}
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {"name": config.node_name, "namespace": LEASE_NAMESPACE, "ownerReferences": [owner]},
        "spec": lease_spec(config, now),
    }


def _condition(kind: str, status: bool, reason: str, message: str) -> Json:
    return {"type": kind, "status": "True" if status else "False", "reason": reason, "message": message}


def _network_words(state: NodeState) -> tuple[str, str]:
    return ("OverlayIsUp", "the overlay is programmed") if state.network else ("OverlayIsDown", state.message)


def _ready_words(state: NodeState) -> tuple[str, str]:
    return ("KubeletReady", "the agent is posting ready status") if state.ready else ("KubeletNotReady", state.message)


def _os_name() -> str:
    try:
        lines = Path("/etc/os-release").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "Linux"
    names = [line.partition("=")[2].strip('"') for line in lines if line.startswith("PRETTY_NAME=")]
    return names[0] if names else "Linux"


def _first_line(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
