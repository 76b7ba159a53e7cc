"""kube-proxy's configuration (kubeproxy.config.k8s.io/v1alpha1) as a value: what a drop-in has to understand of it."""

import contextlib
import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec

from podwire.model.addr import Family, IPAddress, IPNetwork
from podwire.model.errors import InvalidInput
from podwire.model.nulls import without_nulls
from podwire.model.objects import View
from podwire.model.proxymode import ProxyMode
from podwire.model.yamltext import parse_yaml

API_VERSION = "kubeproxy.config.k8s.io/v1alpha1"
HEALTHZ_PORT, METRICS_PORT = 10256, 10249
PRIMARY = "primary"
"""In nodePortAddresses: the node's own addresses as its Node object says them."""
LOCALHOST, ALL = "localhost", "all"
"""The same (Kubernetes 1.37): the loopback addresses, and all there are."""

_KEYWORDS: Mapping[str, tuple[IPNetwork, ...]] = {
    PRIMARY: (),
    LOCALHOST: (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128")),
    ALL: tuple(family.any for family in Family),
}
"""What they are as networks."""

IPVS_SCHEDULERS = ("rr", "wrr", "lc", "wlc", "lblc", "lblcr", "sh", "dh", "sed", "nq", "mh", "fo", "ovf", "twos")
"""The kernel's (net/netfilter/ipvs)."""

_DURATION = re.compile(r"(\d+(?:\.\d*)?)(ns|us|µs|ms|s|m|h)")
_UNIT_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


class ClientConnection(View, frozen=True):
    kubeconfig: str = ""
    accept_content_types: str = ""
    content_type: str = ""
    qps: float = 0
    burst: int = 0


class IptablesOptions(View, frozen=True):
    masquerade_bit: int = 14
    masquerade_all: bool = False
    localhost_node_ports: bool = True
    sync_period: str = "30s"
    min_sync_period: str = "1s"


class NftablesOptions(View, frozen=True):
    masquerade_bit: int = 14
    masquerade_all: bool = False
    sync_period: str = "30s"
    min_sync_period: str = "1s"


class IpvsOptions(View, frozen=True):
    """Fields that nothing here needs: connections' time-outs, strangers' virtual servers (they are never touched)."""

    scheduler: str = ""
    strict_arp: bool = msgspec.field(name="strictARP", default=False)
    exclude_cidrs: tuple[str, ...] = msgspec.field(name="excludeCIDRs", default=())
    masquerade_all: bool = False
    sync_period: str = "30s"
    min_sync_period: str = "0s"
    tcp_timeout: str = "0s"
    tcp_fin_timeout: str = "0s"
    udp_timeout: str = "0s"


class DetectLocal(View, frozen=True):
    bridge_interface: str = ""
    interface_name_prefix: str = ""


class Conntrack(View, frozen=True):
    """Zero leaves the kernel's value as it is."""

    max_per_core: int = 32768
    min: int = 131072
    tcp_established_timeout: str = "24h"
    tcp_close_wait_timeout: str = "1h"
    tcp_be_liberal: bool = False
    udp_timeout: str = "0s"
    udp_stream_timeout: str = "0s"


class ProxyConfig(View, frozen=True):
    """The fields that are obeyed. Those in `WITHOUT_EFFECT` are known and do nothing here."""

    client_connection: ClientConnection = ClientConnection()
    hostname_override: str = ""
    bind_address: str = "0.0.0.0"
    healthz_bind_address: str = ""
    metrics_bind_address: str = ""
    bind_address_hard_fail: bool = False
    mode: str = ""
    iptables: IptablesOptions = IptablesOptions()
    nftables: NftablesOptions = NftablesOptions()
    ipvs: IpvsOptions = IpvsOptions()
    detect_local_mode: str = ""
    detect_local: DetectLocal = DetectLocal()
    cluster_cidr: str = msgspec.field(name="clusterCIDR", default="")
    node_port_addresses: tuple[str, ...] = ()
    conntrack: Conntrack = Conntrack()

    @property
    def proxy_mode(self) -> ProxyMode:
        """Raises InvalidInput for a mode that is not served. None given: nftables."""
        if not self.mode:
            return ProxyMode.NFTABLES
        try:
            return ProxyMode(self.mode)
        except ValueError:
            served = ", ".join(ProxyMode)
            raise InvalidInput(f"proxy mode {self.mode!r} is not served; there are: {served}") from None

    @property
    def healthz_at(self) -> tuple[str, int] | None:
        """Where /healthz and /livez are served; None: nowhere. Raises InvalidInput."""
        return _listening(self.healthz_bind_address, "healthzBindAddress", ("::" if self._ipv6 else "0.0.0.0"), HEALTHZ_PORT)

    @property
    def metrics_at(self) -> tuple[str, int] | None:
        """Where /metrics and /proxyMode are served; None: nowhere. Raises InvalidInput."""
        return _listening(self.metrics_bind_address, "metricsBindAddress", ("::1" if self._ipv6 else "127.0.0.1"), METRICS_PORT)

    @property
    def bind_ip(self) -> IPAddress | None:
        """The address in `bindAddress` where it is one that others can name this host by. Raises InvalidInput."""
        ip = self._bound
        return None if ip.is_unspecified or ip.is_loopback else ip

    @property
    def _ipv6(self) -> bool:
        return self._bound.version == 6

    @property
    def _bound(self) -> IPAddress:
        try:
            return ipaddress.ip_address(self.bind_address or "0.0.0.0")
        except ValueError:
            raise InvalidInput(f"bindAddress: {self.bind_address!r} is no IP address") from None

    @property
    def cluster_cidrs(self) -> tuple[IPNetwork, ...]:
        return networks(tuple(filter(None, self.cluster_cidr.split(","))), "clusterCIDR")

    @property
    def primary_node_ports(self) -> bool:
        """Whether node ports are at the Node's primary addresses alone: kube-proxy's default in its nftables mode only."""
        return self.node_port_addresses == (PRIMARY,) or (
            not self.node_port_addresses and self.proxy_mode is ProxyMode.NFTABLES
        )

    @property
    def node_port_networks(self) -> tuple[IPNetwork, ...]:
        """Which of the node's addresses serve node ports, beside the primary ones where those are asked for. None of a family:
        all of it, unless they are."""
        texts = self.node_port_addresses
        named = [network for text in texts for network in _KEYWORDS.get(text, ())]
        return (*named, *networks([text for text in texts if text not in _KEYWORDS], "nodePortAddresses"))

    @property
    def masquerade_all(self) -> bool:
        """kube-proxy's ipvs goes by the section `iptables`; `--masquerade-all` sets all."""
        options = self.nftables if self.proxy_mode is ProxyMode.NFTABLES else self.iptables
        return options.masquerade_all


_INTERFACE = re.compile(r"[^\s/:*+]{1,15}")
_INTERFACE_FIELDS: Mapping[str, Callable[[DetectLocal], tuple[str, str]]] = {
    "BridgeInterface": lambda found: ("bridgeInterface", found.bridge_interface),
    "InterfaceNamePrefix": lambda found: ("interfaceNamePrefix", found.interface_name_prefix),
}
"""Modes that go by a device: the field that names it, and its value."""

WITHOUT_EFFECT = frozenset(
    (
        "apiVersion", "kind", "featureGates", "logging", "enableProfiling", "showHiddenMetricsForVersion", "winkernel",
        "oomScoreAdj", "configSyncPeriod", "portRange", "udpIdleTimeout", "windowsRunAsService",
    )
)  # fmt: skip
"""Known fields that need nothing here: other back ends', other systems', or how kube-proxy works inside."""


def parse_proxy_config(
    text: str | bytes, source: str, overrides: Mapping[str, Any] | None = None
) -> tuple[ProxyConfig, list[str]]:
    """The configuration in `text` (YAML or JSON; empty for none), and warnings about fields that nobody knows.

    overrides: {"field.subfield": value} on top. Raises InvalidInput that names `source` and the field."""
    documents = [one for one in parse_yaml(text, source) if one is not None]
    if len(documents) > 1:
        raise InvalidInput(f"{source}: has {len(documents)} YAML documents; there can be one KubeProxyConfiguration")
    document = documents[0] if documents else {}
    if not isinstance(document, dict):
        raise InvalidInput(f"{source}: is no KubeProxyConfiguration; it must be a mapping")
    for name, wanted in (("kind", "KubeProxyConfiguration"), ("apiVersion", API_VERSION)):
        if document.get(name, wanted) != wanted:
            raise InvalidInput(f"{source}: {name} is {document[name]!r}, not {wanted}")
    document = without_nulls(document)
    warnings = [f"{source}: field {name} is not known and left out" for name in _unknown(document, ProxyConfig, "")]
    try:
        msgspec.convert(document, ProxyConfig)  # by itself first: flags are put into sections, which have to be there
        for path, value in (overrides or {}).items():
            _put(document, path.split("."), value)
        config = msgspec.convert(document, ProxyConfig)
    except msgspec.ValidationError as error:
        raise InvalidInput(f"{source}: {error}") from error
    _check(config, source)
    return config, warnings


def config_document(config: ProxyConfig) -> dict[str, Any]:
    """A KubeProxyConfiguration in which every field has the value that is used."""
    document = _with_defaults(config)
    for name, at, host in (
        ("healthzBindAddress", config.healthz_at, "0.0.0.0"),
        ("metricsBindAddress", config.metrics_at, "127.0.0.1"),
    ):
        address, port = at or (host, 0)
        document[name] = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    document["mode"] = str(config.proxy_mode)
    return {"apiVersion": API_VERSION, "kind": "KubeProxyConfiguration", **document}


def _with_defaults(view: View) -> dict[str, Any]:
    found = {}
    for field in msgspec.structs.fields(view):
        value = getattr(view, field.name)
        found[field.encode_name] = _with_defaults(value) if isinstance(value, View) else msgspec.to_builtins(value)
    return found


def _check(config: ProxyConfig, source: str) -> None:
    """What would otherwise fail later, or be misunderstood."""
    try:
        _ = config.proxy_mode, config.cluster_cidrs, config.node_port_networks, config.healthz_at, config.metrics_at
        conntrack_switches(config.conntrack, cpus=1)
        _check_sections(config)
    except InvalidInput as error:
        raise InvalidInput(f"{source}: {error}") from error
    if config.detect_local_mode not in ("", "ClusterCIDR", "NodeCIDR", *_INTERFACE_FIELDS):
        raise InvalidInput(
            f"{source}: detectLocalMode {config.detect_local_mode!r} is none of ClusterCIDR, NodeCIDR, BridgeInterface, "
            "InterfaceNamePrefix"
        )
    if config.detect_local_mode in _INTERFACE_FIELDS:
        field, name = _INTERFACE_FIELDS[config.detect_local_mode](config.detect_local)
        if not name:
            raise InvalidInput(f"{source}: detectLocalMode {config.detect_local_mode} needs detectLocal.{field}")
        if not _INTERFACE.fullmatch(name):
            raise InvalidInput(f"{source}: detectLocal.{field}: {name!r} is no name of a device")


def _check_sections(config: ProxyConfig) -> None:
    for section, bit in (("iptables", config.iptables.masquerade_bit), ("nftables", config.nftables.masquerade_bit)):
        if not 0 <= bit <= 31:
            raise InvalidInput(f"{section}.masqueradeBit: {bit} is not between 0 and 31")
    sections = (("iptables", config.iptables), ("nftables", config.nftables), ("ipvs", config.ipvs))
    for section, options in sections:
        duration_seconds(options.sync_period, f"{section}.syncPeriod")
        duration_seconds(options.min_sync_period, f"{section}.minSyncPeriod")
    if config.ipvs.scheduler and config.ipvs.scheduler not in IPVS_SCHEDULERS:
        known = ", ".join(IPVS_SCHEDULERS)
        raise InvalidInput(f"ipvs.scheduler: {config.ipvs.scheduler!r} is not known; there are: {known}")
    for name, number in (("maxPerCore", config.conntrack.max_per_core), ("min", config.conntrack.min)):
        if number < 0:
            raise InvalidInput(f"conntrack.{name}: {number} is less than 0, which leaves the kernel's value as it is")


def networks(texts: tuple[str, ...] | list[str], what: str) -> tuple[IPNetwork, ...]:
    try:
        return tuple(ipaddress.ip_network(text.strip(), strict=False) for text in texts)
    except ValueError as error:
        raise InvalidInput(f"{what}: {error}") from error


def duration_seconds(text: str, what: str) -> float:
    """Go's durations: 1h30m, 500ms, 0s. Raises InvalidInput."""
    if text in ("", "0"):
        return 0.0
    parts = _DURATION.findall(text)
    if "".join(number + unit for number, unit in parts) != text:
        raise InvalidInput(f"{what}: {text!r} is no duration such as 30s or 1h30m")
    return sum(float(number) * _UNIT_SECONDS[unit] for number, unit in parts)


def _listening(text: str, what: str, host: str, port: int) -> tuple[str, int] | None:
    """`0.0.0.0:10256`, `[::]:10256`, or as much of it as is not `host` and `port`: an address, or nothing. None for port 0."""
    if not text:
        return host, port
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(text)), port
    before, _, after = text.rpartition(":")
    try:
        address = ipaddress.ip_address(before.removeprefix("[").removesuffix("]") if before[:1] == "[" else before)
        number = int(after) if after.isascii() and after.isdecimal() else -1
    except ValueError:
        number = -1
    if not 0 <= number < 1 << 16 or (address.version == 6) != (before[:1] == "["):
        raise InvalidInput(f"{what}: {text!r} is no address and port such as 0.0.0.0:10256 or [::]:10256")
    return (str(address), number) if number else None


def conntrack_switches(conntrack: Conntrack, *, cpus: int) -> dict[str, str]:
    """The kernel's switches, below /proc/sys, as kube-proxy sets them."""
    switches: dict[str, str] = {}
    if conntrack.max_per_core > 0:
        switches["net/netfilter/nf_conntrack_max"] = str(max(conntrack.min, conntrack.max_per_core * cpus))
    for key, text, what in (
        ("tcp_timeout_established", conntrack.tcp_established_timeout, "conntrack.tcpEstablishedTimeout"),
        ("tcp_timeout_close_wait", conntrack.tcp_close_wait_timeout, "conntrack.tcpCloseWaitTimeout"),
        ("udp_timeout", conntrack.udp_timeout, "conntrack.udpTimeout"),
        ("udp_timeout_stream", conntrack.udp_stream_timeout, "conntrack.udpStreamTimeout"),
    ):
        seconds = int(duration_seconds(text, what))
        if seconds > 0:
            switches[f"net/netfilter/nf_conntrack_{key}"] = str(seconds)
    if conntrack.tcp_be_liberal:
        switches["net/netfilter/nf_conntrack_tcp_be_liberal"] = "1"
    return switches


def _unknown(document: Mapping[str, Any], type_: Any, path: str) -> Iterator[str]:
    fields = {field.encode_name: field.type for field in msgspec.structs.fields(type_)}
    for name, value in document.items():
        if name in fields:
            if isinstance(value, dict) and isinstance(fields[name], type) and issubclass(fields[name], View):
                yield from _unknown(value, fields[name], f"{path}{name}.")
        elif path or name not in WITHOUT_EFFECT:
            yield path + name


def _put(document: dict[str, Any], path: list[str], value: Any) -> None:
    for name in path[:-1]:
        document = document.setdefault(name, {})
    document[path[-1]] = value
