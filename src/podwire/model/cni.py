"""What a container engine asks of a network plugin, and what it gets back, as values (CNI specification 1.1.0)."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from podwire.model.addr import IPAddress, IPInterface, IPNetwork
from podwire.model.errors import PodwireError
from podwire.model.meta import Json

CNI_VERSIONS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
"""The versions of configuration that are understood, oldest first."""

INCOMPATIBLE_VERSION = 1
UNSUPPORTED_FIELD = 2
UNKNOWN_CONTAINER = 3
INVALID_ENVIRONMENT = 4
IO_FAILURE = 5
UNDECODABLE = 6
INVALID_CONFIG = 7
TRY_LATER = 11
NOT_AVAILABLE = 50
NOT_AVAILABLE_LIMITED = 51
KERNEL_REFUSED = 100
"""Own codes begin at 100: the kernel refused part of the attachment; on CHECK, it is not as it was left."""
NO_ADDRESS = 101
"""No address is free, or the one asked for has another holder."""


class CniError(PodwireError):
    """A request that cannot be served; becomes the plugin's error document. `code` is the specification's, or one of ours."""

    def __init__(self, code: int, message: str, details: str = "") -> None:
        self.code, self.message, self.details = code, message, details
        super().__init__(message + (f": {details}" if details else ""))


@dataclass(frozen=True, slots=True)
class PortMapping:
    """A port of the host that leads into the container. `protocol` is TCP, UDP or SCTP; an empty `host_ip` means all."""

    host_port: int
    container_port: int
    protocol: str = "TCP"
    host_ip: str = ""


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Limits in bits per second, bursts in bits; 0: none. `ingress` is what the container receives."""

    ingress_rate: int = 0
    ingress_burst: int = 0
    egress_rate: int = 0
    egress_burst: int = 0


@dataclass(frozen=True, slots=True)
class CniRoute:
    """A route in the container; without `gateway`, through the network's own."""

    dst: IPNetwork
    gateway: IPAddress | None = None


@dataclass(frozen=True, slots=True)
class CniIp:
    """An address; `interface` is an index into the result's interfaces."""

    address: IPInterface
    gateway: IPAddress | None = None
    interface: int | None = None


@dataclass(frozen=True, slots=True)
class CniInterface:
    """`sandbox` is the path of the namespace, empty for one of the host's."""

    name: str
    mac: str = ""
    sandbox: str = ""
    mtu: int = 0


@dataclass(frozen=True, slots=True)
class CniResult:
    """What ADD made. `dns` is the document as the configuration has it."""

    interfaces: tuple[CniInterface, ...] = ()
    ips: tuple[CniIp, ...] = ()
    routes: tuple[CniRoute, ...] = ()
    dns: Json = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AttachmentKey:
    """An attachment's identity: one interface of one container."""

    container: str
    ifname: str

    @property
    def uid(self) -> str:
        """By which the node's links, reservations and host ports know it; never that of a Pod."""
        return f"{CNI_UID}{self.container}/{self.ifname}"


CNI_UID = "cni:"

LABELS = "podwire.io/labels"
"""The annotation of an attachment that has its container's labels, as in `app=web,tier=front`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CniRequest:
    """One execution of the plugin, checked. For GC, STATUS and VERSION the container's fields are empty.

    `args` are CNI_ARGS; `ips` and `mac` what was asked for, by capability, args or CNI_ARGS; `previous` the result of the
    plugins before this one in the chain, as decoded and (`previous_document`) as it came; `valid` the attachments that GC
    has to leave."""

    command: str
    version: str
    network: str
    type: str = ""
    container: str = ""
    netns: str = ""
    ifname: str = ""
    args: Mapping[str, str] = field(default_factory=dict)
    ports: tuple[PortMapping, ...] = ()
    bandwidth: Bandwidth = Bandwidth()
    ips: tuple[IPAddress, ...] = ()
    mac: str = ""
    mtu: int = 0
    routes: tuple[CniRoute, ...] = ()
    dns: Json = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    previous: CniResult | None = None
    previous_document: Json | None = None
    valid: frozenset[AttachmentKey] = frozenset()

    @property
    def key(self) -> AttachmentKey:
        return AttachmentKey(self.container, self.ifname)
