"""What the agent keeps of an attachment that a container engine asked for, and the pieces of plan that follow from it. Pure."""

import hashlib
import ipaddress
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import msgspec

from podwire.agent.admission import HostPort
from podwire.model.addr import IPAddress
from podwire.model.cni import AttachmentKey, CniInterface, CniIp, CniRequest, CniResult, CniRoute
from podwire.model.kernelstate import Shaper
from podwire.model.meta import Json, ObjectMeta
from podwire.model.objects import Container, ContainerPort, Pod, PodIP, PodSpec, PodStatus
from podwire.plan.naming import BRIDGE, host_veth
from podwire.plan.node import NodeNetwork
from podwire.plan.podlinks import PodAttachment


class AttachmentRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One interface of one container, as it is on disk (JSON).

    `inode` is the namespace's identity at `netns`; `visible`: that path leads there for the agent too. `boot`: the boot in
    which it was made; namespaces do not outlive it. `chained`: another plugin made the interface, we do its host ports;
    `ips` are then its addresses. `imported`: taken over from another plugin, whose link stays as it is until DEL."""

    container: str
    ifname: str
    network: str
    since: str
    boot: str
    netns: str = ""
    inode: int = 0
    visible: bool = False
    namespace: str = ""
    name: str = ""
    ports: tuple[tuple[int, int, str, str], ...] = ()
    """(host port, container port, protocol, host address)"""
    limits: tuple[int, int, int, int] = (0, 0, 0, 0)
    """As `model.cni.Bandwidth` has them."""
    mac: str = ""
    mtu: int = 0
    routes: tuple[tuple[str, str], ...] = ()
    default_routes: bool = True
    dns: Json = {}
    args: dict[str, str] = {}
    annotations: dict[str, str] = {}
    chained: bool = False
    ips: tuple[str, ...] = ()
    imported: bool = False

    @property
    def key(self) -> AttachmentKey:
        return AttachmentKey(self.container, self.ifname)

    @property
    def uid(self) -> str:
        return self.key.uid

    @property
    def title(self) -> tuple[str, str]:
        """Namespace and name for people: the pod's where the engine says it, else the network's and the container's."""
        return (self.namespace, self.name) if self.name else (self.network, self.container[:12])

    def encode(self) -> bytes:
        return msgspec.json.encode(self)

    def same_but_for_time(self, other: "AttachmentRecord") -> bool:
        return msgspec.structs.replace(self, since="") == msgspec.structs.replace(other, since="")


class Origin(NamedTuple):
    """Where and when an attachment is made."""

    since: str
    boot: str
    inode: int = 0
    visible: bool = False


def decode_record(raw: bytes) -> AttachmentRecord:
    """Raises msgspec.MsgspecError for what is no record."""
    return msgspec.json.decode(raw, type=AttachmentRecord)


def record_of(request: CniRequest, origin: Origin) -> AttachmentRecord:
    previous, limits = request.previous, request.bandwidth
    return AttachmentRecord(
        container=request.container,
        ifname=request.ifname,
        network=request.network,
        since=origin.since,
        boot=origin.boot,
        netns=request.netns,
        inode=origin.inode,
        visible=origin.visible,
        namespace=request.args.get("K8S_POD_NAMESPACE", ""),
        name=request.args.get("K8S_POD_NAME", ""),
        ports=tuple((p.host_port, p.container_port, p.protocol, p.host_ip) for p in request.ports),
        limits=(limits.ingress_rate, limits.ingress_burst, limits.egress_rate, limits.egress_burst),
        mac=request.mac,
        mtu=request.mtu,
        routes=tuple((str(route.dst), str(route.gateway or "")) for route in request.routes),
        dns=request.dns,
        args=dict(request.args),
        annotations=dict(request.annotations),
        chained=previous is not None,
        ips=tuple(str(ip.address.ip) for ip in _inside(previous)) if previous else (),
    )


def _inside(previous: CniResult) -> Iterator[CniIp]:
    """The addresses of the container: those of an interface in a sandbox, or all where the result does not say."""
    for ip in previous.ips:
        index = ip.interface
        if index is None or not 0 <= index < len(previous.interfaces) or previous.interfaces[index].sandbox:
            yield ip


def attachment_of(record: AttachmentRecord, network: NodeNetwork, ips: Iterable[IPAddress]) -> PodAttachment:
    """The link to plan. Raises ValueError where an address is outside the node's subnets."""
    namespace, name = record.title
    base = network.attachment(record.uid, namespace, name, ips)
    return replace(
        base,
        mtu=min(record.mtu or base.mtu, base.mtu),
        device=record.ifname,
        wanted_mac=record.mac,
        host_mac=_host_mac(record.uid),
        default_routes=record.default_routes,
        to_pod=_shaper(record.limits[0], record.limits[1]),
        from_pod=_shaper(record.limits[2], record.limits[3]),
        routes=tuple((ipaddress.ip_network(dst), ipaddress.ip_address(via) if via else None) for dst, via in record.routes),
    )


def result_of(record: AttachmentRecord, network: NodeNetwork, ips: Iterable[IPAddress]) -> CniResult:
    """What ADD says, in the words of the reference plugins: the bridge, the node's end, the container's end."""
    pod = attachment_of(record, network, ips)
    gateways = pod.gateways if pod.default_routes else ()
    through = {via.version: via for via in pod.gateways}
    routes = [CniRoute(ipaddress.ip_network("0.0.0.0/0" if via.version == 4 else "::/0"), via) for via in gateways]
    routes += [CniRoute(dst, via or through.get(dst.version)) for dst, via in pod.routes]
    return CniResult(
        interfaces=(
            CniInterface(BRIDGE, network.bridge_mac, mtu=network.pod_mtu),
            CniInterface(host_veth(record.uid), pod.host_mac or "", mtu=pod.mtu),
            CniInterface(record.ifname, pod.mac, record.netns, pod.mtu),
        ),
        ips=tuple(CniIp(ip, via, 2) for ip, via in zip(pod.ips, pod.gateways, strict=True)),
        routes=tuple(routes),
        dns=record.dns,
    )


def host_port_pod(record: AttachmentRecord, ips: Iterable[IPAddress]) -> Pod:
    """The attachment's port mappings as the Services' planner takes them: a pod with host ports."""
    namespace, name = record.title
    ports = tuple(
        ContainerPort(container_port=inside, host_port=outside, protocol=protocol, host_ip=host_ip)
        for outside, inside, protocol, host_ip in record.ports
    )
    texts = tuple(PodIP(ip=str(ip)) for ip in ips)
    return Pod(
        metadata=ObjectMeta(namespace=namespace, name=name, uid=record.uid),
        spec=PodSpec(containers=(Container(name="cni", ports=ports),)),
        status=PodStatus(pod_ip=texts[0].ip if texts else "", pod_ips=texts),
    )


def occupied(record: AttachmentRecord) -> Iterator[HostPort]:
    for outside, _, protocol, host_ip in record.ports:
        yield HostPort(protocol, outside, "" if host_ip in ("0.0.0.0", "::") else host_ip)


def _shaper(rate: int, burst: int) -> Shaper | None:
    return Shaper(rate, burst) if rate else None


def _host_mac(uid: str) -> str:
    """Locally administered; follows from the attachment, so that ADD can say it without asking the kernel."""
    return (b"\x0a\x5a" + hashlib.sha256(uid.encode()).digest()[:4]).hex(":")
