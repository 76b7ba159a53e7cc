"""What a lab should be: the parameters of `podwire lab up` as one value, checked once and passed on as JSON."""

import ipaddress
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from podwire.model.addr import Family, IPNetwork, family_of, parse_families
from podwire.model.errors import InvalidInput

MAX_NODES = 245
"""So many fit the default ranges: 256 node prefixes in the pods' range, addresses 198.18.0.11 to 198.18.0.255."""

_IPV4_ONLY = ("udp", "ipip")
LAB_MODES = ("nftables", "iptables")

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?")
_SERVICE_CIDRS = {Family.IPV4: "10.96.0.0/12", Family.IPV6: "fd00:10:96::/112"}
UNDERLAY: Mapping[Family, IPNetwork] = {
    Family.IPV4: ipaddress.ip_network("198.18.0.0/15"),
    Family.IPV6: ipaddress.ip_network("2001:db8:1::/48"),
}
"""Where nodes, world and balancer have their addresses."""

_POD_CIDRS = {Family.IPV4: "10.244.0.0/16", Family.IPV6: "fd00:10:244::/56"}
_LB_POOLS = {Family.IPV4: "203.0.113.0/24", Family.IPV6: "2001:db8:2::/112"}


def check_name(name: str) -> str:
    """`name` if it can name a lab. Raises InvalidInput otherwise."""
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            f"lab name {name!r} cannot be used: take 1 to 40 lower-case letters, digits and '-', "
            "beginning and ending with a letter or digit"
        )
    return name


@dataclass(frozen=True, slots=True)
class LabSpec:
    """One lab. Prefixes are text, one per family in `families`' order; empty tuples mean the defaults of design.md §7."""

    name: str = "default"
    nodes: int = 3
    ip_family: str = "dual"
    service_cidrs: tuple[str, ...] = ()
    node_ports: tuple[int, int] = (30000, 32767)
    subnet_manager: str = "kube"
    """Where nodes have their subnets from: "kube" (Node.spec.podCIDRs) or "etcd" (flannel's leases; no podCIDRs then)."""
    backend: str = "vxlan"
    """How packets get from node to node: a back end's name, or flannel's `Backend` as JSON."""
    etcd_members: int = 1
    proxy_mode: str = "nftables"
    """What serves Services at the start: nftables or iptables."""

    def __post_init__(self) -> None:
        check_name(self.name)
        if not 1 <= self.nodes <= MAX_NODES:
            raise InvalidInput(f"number of nodes {self.nodes} cannot be used: take 1 to {MAX_NODES}")
        low, high = self.node_ports
        if not 1 <= low <= high <= 65535:
            raise InvalidInput(f"node port range {low}-{high} cannot be used: write it as 30000-32767")
        parse_families(self.ip_family)
        self.service_prefixes  # noqa: B018  (raises InvalidInput where the prefixes do not fit)
        if self.subnet_manager not in ("kube", "etcd"):
            raise InvalidInput(f"subnet manager {self.subnet_manager!r} is not known: take kube or etcd")
        if self.proxy_mode not in LAB_MODES:
            raise InvalidInput(
                f"proxy mode {self.proxy_mode} cannot be used in a lab: take nftables or iptables (the switches "
                "that IPVS needs are there for the machine's own root only)"
            )
        if self.etcd_members not in (1, 3, 5):
            raise InvalidInput(f"{self.etcd_members} etcd members cannot be had: take 1, 3 or 5")
        if self.etcd_members > 1 and self.subnet_manager != "etcd":
            raise InvalidInput(f"{self.etcd_members} etcd members are for a lab that has an etcd: add --subnet-manager etcd")
        self._check_backend()

    def _check_backend(self) -> None:
        from podwire.model.netconf import parse_net_config  # the command line imports this module at its start

        type_ = self.backend_type
        if type_ in _IPV4_ONLY and Family.IPV6 in self.families:
            raise InvalidInput(f"backend {type_} carries IPv4 only: add --ip-family ipv4, or take vxlan, host-gw or wireguard")
        if type_ == "alloc":
            raise InvalidInput(
                "backend alloc cannot be used in a lab: it leaves the routes to a cloud's network, and a lab has none that "
                "would learn them; take vxlan, host-gw, udp, ipip or wireguard"
            )
        parse_net_config(self.network_config, source="lab network", leased=self.subnet_manager == "etcd")

    @property
    def backend_type(self) -> str:
        """The back end's name as given. Raises InvalidInput for a backend that is no JSON object and no name."""
        return str(json.loads(self.network_config)["Backend"].get("Type"))

    @property
    def own_overlay(self) -> bool:
        """Whether the nodes need to be told of a subnet manager or a back end that is not an agent's default."""
        return self.subnet_manager != "kube" or self.backend != "vxlan"

    @property
    def network_config(self) -> str:
        """flannel's network configuration. Raises InvalidInput for a backend that is no JSON object and no name."""
        text = self.backend.strip()
        try:
            backend = json.loads(text) if text.startswith("{") else {"Type": text}
        except ValueError as error:
            raise InvalidInput(f"backend {text} is neither a name nor a JSON object: {error}") from error
        document: dict[str, Any] = {"Backend": backend, "EnableIPv4": False, "EnableIPv6": False}
        for family, prefix in self.pod_prefixes.items():
            if family is Family.IPV4:
                document |= {"EnableIPv4": True, "Network": str(prefix), "SubnetLen": 24}
            else:
                document |= {"EnableIPv6": True, "IPv6Network": str(prefix), "IPv6SubnetLen": 64}
        return json.dumps(document)

    @property
    def families(self) -> tuple[Family, ...]:
        return parse_families(self.ip_family)

    @property
    def service_prefixes(self) -> Mapping[Family, IPNetwork]:
        """The Service address range of each family. Raises InvalidInput."""
        given = {family_of(net): net for net in map(_prefix, self.service_cidrs)}
        if len(given) != len(self.service_cidrs) or (given and set(given) != set(self.families)):
            raise InvalidInput(
                f"service range {','.join(self.service_cidrs)} does not fit --ip-family {self.ip_family}: give one per family"
            )
        for family, prefix in given.items():
            for use, taken in self._own_prefixes(family).items():
                if prefix.overlaps(taken):
                    raise InvalidInput(f"service range {prefix} overlaps {taken}, which is the lab's for {use}: take another")
        return {f: given.get(f) or ipaddress.ip_network(_SERVICE_CIDRS[f]) for f in self.families}

    def _own_prefixes(self, family: Family) -> Mapping[str, IPNetwork]:
        return {
            "pods": self.pod_prefixes[family],
            "nodes": UNDERLAY[family],
            "load balancers": self.balancer_pools[family],
        }

    @property
    def pod_prefixes(self) -> Mapping[Family, IPNetwork]:
        """Where the nodes' podCIDRs come from."""
        return {f: ipaddress.ip_network(_POD_CIDRS[f]) for f in self.families}

    @property
    def balancer_pools(self) -> Mapping[Family, IPNetwork]:
        """Where LoadBalancer addresses come from."""
        return {f: ipaddress.ip_network(_LB_POOLS[f]) for f in self.families}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        low, high = document["node_ports"]
        return cls(
            name=document["name"],
            nodes=document["nodes"],
            ip_family=document["ip_family"],
            service_cidrs=tuple(document["service_cidrs"]),
            node_ports=(low, high),
            subnet_manager=document["subnet_manager"],
            backend=document["backend"],
            etcd_members=document["etcd_members"],
            proxy_mode=document["proxy_mode"],
        )


def parse_port_range(text: str) -> tuple[int, int]:
    """`30000-32767` → (30000, 32767). Raises InvalidInput."""
    match = re.fullmatch(r"(\d{1,5})-(\d{1,5})", text.strip())
    if not match:
        raise InvalidInput(f"node port range {text!r} cannot be used: write it as 30000-32767")
    return int(match[1]), int(match[2])


def _prefix(text: str) -> IPNetwork:
    try:
        net = ipaddress.ip_network(text.strip())
    except ValueError as error:
        raise InvalidInput(f"service range {text!r} is not a prefix such as 10.96.0.0/12: {error}") from error
    if not 4 <= net.max_prefixlen - net.prefixlen <= 20:
        raise InvalidInput(f"service range {text} has to hold 16 to 1048576 addresses (IPv4 /12 to /28, IPv6 /108 to /124)")
    return net
