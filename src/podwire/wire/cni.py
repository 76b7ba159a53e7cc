"""The Container Network Interface, sans-IO: what a plugin is given → a checked request; results and errors → their documents.

Also the two frames between the executed plugin and the agent: a request is `MAGIC`, then `NAME=VALUE` each with a NUL behind
it, one more NUL, and the configuration as it came; an answer is a line `<exit status> <length>` and so many bytes.
Source: CNI specification 1.1.0 (containernetworking/cni, SPEC.md) and its conventions (CONVENTIONS.md).
"""

import ipaddress
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from podwire.model.addr import IPAddress, IPNetwork
from podwire.model.cni import (
    CNI_VERSIONS,
    INCOMPATIBLE_VERSION,
    INVALID_CONFIG,
    INVALID_ENVIRONMENT,
    LABELS,
    UNDECODABLE,
    UNSUPPORTED_FIELD,
    AttachmentKey,
    Bandwidth,
    CniError,
    CniInterface,
    CniIp,
    CniRequest,
    CniResult,
    CniRoute,
    PortMapping,
)
from podwire.model.meta import Json

MAGIC = b"podwire-cni 1\n"
VARIABLES = ("CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS")

_NEEDED = {
    "ADD": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"),
    "CHECK": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"),
    "DEL": ("CNI_CONTAINERID", "CNI_IFNAME"),
    "GC": (),
    "STATUS": (),
    "VERSION": (),
}
_SINCE = {"CHECK": "0.4.0", "GC": "1.1.0", "STATUS": "1.1.0"}
"""Verbs that younger configurations only may be asked for."""

NETWORK_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]*")
"""Also that of a container's id."""
_BAD_IFNAME = re.compile(r"[/:\s\0]")
_MAC = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")
_IFNAME_MAX = 15
_PROTOCOLS = ("TCP", "UDP", "SCTP")
_RATE_MAX = (1 << 62) - 1


# --- frames -------------------------------------------------------------------------------------------------------


def encode_frame(environment: Mapping[str, str], config: bytes) -> bytes:
    """What the plugin sends."""
    variables = b"".join(f"{name}={environment[name]}\0".encode() for name in VARIABLES if environment.get(name))
    return MAGIC + variables + b"\0" + config


def decode_frame(frame: bytes) -> tuple[dict[str, str], bytes]:
    """Environment and configuration. Raises ValueError for what no plugin of ours has sent, or not to its end."""
    if not frame.startswith(MAGIC):
        raise ValueError("not a request of podwire's CNI plugin")
    rest = frame[len(MAGIC) :]
    if rest.startswith(b"\0"):
        return {}, rest[1:]
    head, end, config = rest.partition(b"\0\0")
    if not end:
        raise ValueError("the plugin's request is cut short")
    pairs = (entry.partition("=") for entry in head.decode(errors="replace").split("\0"))
    return {name: value for name, _, value in pairs}, config


def encode_answer(status: int, document: bytes) -> bytes:
    return f"{status} {len(document)}\n".encode() + document


def decode_answer(answer: bytes) -> tuple[int, bytes]:
    """Exit status and document. Raises ValueError for an answer that is not whole."""
    line, _, document = answer.partition(b"\n")
    status, _, length = line.partition(b" ")
    if not length or int(length) != len(document):
        raise ValueError("the agent's answer is cut short")
    return int(status), document


# --- requests -----------------------------------------------------------------------------------------------------


def parse_request(environment: Mapping[str, str], config: bytes) -> CniRequest:
    """Check what the plugin was given. Raises CniError with the specification's codes."""
    command = environment.get("CNI_COMMAND", "")
    if command not in _NEEDED:
        what = f"unknown CNI_COMMAND {command!r}" if command else "required env variable CNI_COMMAND is missing"
        raise CniError(INVALID_ENVIRONMENT, what)
    missing = [name for name in _NEEDED[command] if not environment.get(name)]
    if missing:
        raise CniError(INVALID_ENVIRONMENT, f"required env variables [{','.join(missing)}] are missing")
    document = _document(config)
    version = document.get("cniVersion") or "0.1.0"
    if command == "VERSION":
        return CniRequest(command=command, version=version if version in CNI_VERSIONS else CNI_VERSIONS[-1], network="")
    _check_version(command, version)
    if command in ("ADD", "CHECK") and document.get("prevResult") is None:
        _refuse_unsupported(document)
    network, kind = _network_name(document), _text(document, "type")
    if command == "DEL":
        # Whatever the rest says: an ADD that was refused for it is followed by a DEL that says the same, and must not be.
        return CniRequest(command=command, version=version, network=network, type=kind, **_who(command, environment))
    return CniRequest(
        command=command,
        version=version,
        network=network,
        type=kind,
        **_who(command, environment),
        **_what(document, _arguments(environment.get("CNI_ARGS", ""))),
        **_chain(command, document),
    )


def render_versions(version: str) -> Json:
    """VERSION's answer."""
    return {"cniVersion": version, "supportedVersions": list(CNI_VERSIONS)}


def _document(config: bytes) -> Json:
    try:
        document = json.loads(config or b"null")
    except ValueError as error:
        raise CniError(UNDECODABLE, "the network configuration is not JSON", str(error)) from error
    if not isinstance(document, dict):
        raise CniError(UNDECODABLE, "the network configuration is not a JSON object")
    return document


def _check_version(command: str, version: Any) -> None:
    if version not in CNI_VERSIONS:
        raise CniError(
            INCOMPATIBLE_VERSION, "incompatible CNI versions", f"config is {version!r}, plugin supports {list(CNI_VERSIONS)}"
        )
    since = _SINCE.get(command)
    if since and CNI_VERSIONS.index(version) < CNI_VERSIONS.index(since):
        raise CniError(INCOMPATIBLE_VERSION, f"config version {version} does not allow {command}", f"it takes {since} or later")


_UNSUPPORTED = (
    ("vlan",),
    ("vlanTrunk",),
    ("ipam", "type"),
    ("ipam", "subnet"),
    ("ipam", "ranges"),
    ("runtimeConfig", "ipRanges"),
)
"""What another plugin would heed and this one, where it makes the interface, cannot: addresses are the node's own."""


def _refuse_unsupported(document: Json) -> None:
    for path in _UNSUPPORTED:
        value: Any = document
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        if value:
            said = f"{'.'.join(path)}: {json.dumps(value)}"
            raise CniError(UNSUPPORTED_FIELD, f"unsupported field in the network configuration: {said}")


def _network_name(document: Json) -> str:
    name = _text(document, "name")
    if not NETWORK_NAME.fullmatch(name):
        what = f"invalid network name {name!r}" if name else "missing network name"
        raise CniError(INVALID_CONFIG, what)
    return name


def _who(command: str, environment: Mapping[str, str]) -> dict[str, Any]:
    if "CNI_CONTAINERID" not in _NEEDED[command]:
        return {}
    container, ifname = environment["CNI_CONTAINERID"], environment["CNI_IFNAME"]
    if not NETWORK_NAME.fullmatch(container):
        raise CniError(INVALID_ENVIRONMENT, f"invalid characters in CNI_CONTAINERID {container!r}")
    if len(ifname) > _IFNAME_MAX or ifname in (".", "..") or _BAD_IFNAME.search(ifname):
        raise CniError(INVALID_ENVIRONMENT, f"invalid interface name CNI_IFNAME {ifname!r}")
    return {"container": container, "ifname": ifname, "netns": environment.get("CNI_NETNS", "")}


def _arguments(text: str) -> dict[str, str]:
    pairs = [entry.partition("=") for entry in text.split(";") if entry]
    wrong = [name for name, equals, _ in pairs if not equals]
    if wrong:
        raise CniError(INVALID_ENVIRONMENT, f"CNI_ARGS: {wrong[0]!r} is not KEY=VALUE")
    return {name: value for name, _, value in pairs}


def _what(document: Json, args: Mapping[str, str]) -> dict[str, Any]:
    """The parts of the configuration that say how the attachment shall be."""
    runtime = _object(document, "runtimeConfig")
    convention = _object(_object(document, "args"), "cni")
    asked = runtime.get("ips") or convention.get("ips") or list(filter(None, args.get("IP", "").split(",")))
    limits = runtime.get("bandwidth") or {name: document[name] for name in _LIMITS if name in document}
    return {
        "args": args,
        "ports": tuple(_port(entry) for entry in _list(runtime, "portMappings")),
        "bandwidth": _bandwidth(limits),
        "ips": tuple(_address(entry) for entry in _items("ips", asked)),
        "mac": _mac(runtime.get("mac") or convention.get("mac") or args.get("MAC", "")),
        "mtu": _number(document, "mtu", 65535),
        "routes": tuple(_route(entry) for entry in _list(_object(document, "ipam"), "routes")),
        "dns": _object(document, "dns"),
        "annotations": _annotations(document, runtime, convention),
    }


def _annotations(document: Json, runtime: Json, convention: Json) -> dict[str, str]:
    """What the engine says of the container beside its network: a CRI's pod annotations; and, joined into LABELS, the labels
    of CNI's conventions (args.cni.labels) and those aliases that look like labels (podman --network-alias app=web)."""
    found = {str(k): str(v) for k, v in _object(runtime, "io.kubernetes.cri.pod-annotations").items()}
    labels = [f"{entry.get('key')}={entry.get('value')}" for entry in _list(convention, "labels") if isinstance(entry, dict)]
    aliases = _object(runtime, "aliases").get(str(document.get("name")))
    labels += [str(alias) for alias in aliases if "=" in str(alias)] if isinstance(aliases, list) else []
    return found | ({LABELS: ",".join(filter(None, (found.get(LABELS, ""), *labels)))} if labels else {})


def _chain(command: str, document: Json) -> dict[str, Any]:
    found: dict[str, Any] = {}
    previous = document.get("prevResult")
    if previous is not None:
        if not isinstance(previous, dict):
            raise CniError(UNDECODABLE, "prevResult is not a JSON object")
        found |= {"previous": decode_result(previous), "previous_document": previous}
    if command == "GC":
        entries = _items("cni.dev/valid-attachments", document.get("cni.dev/valid-attachments"))
        found["valid"] = frozenset(_valid(entry) for entry in entries)
    return found


def _valid(entry: Any) -> AttachmentKey:
    if not isinstance(entry, dict) or not entry.get("containerID") or not entry.get("ifname"):
        raise CniError(INVALID_CONFIG, "cni.dev/valid-attachments: each needs containerID and ifname", json.dumps(entry))
    return AttachmentKey(str(entry["containerID"]), str(entry["ifname"]))


_PORT_FIELDS = ("hostPort", "containerPort", "protocol", "hostIP")


def _spelled(entry: Json, names: Iterable[str]) -> Json:
    """With the names spelled as CNI does. Go's decoders take any case, and containerd's `HostPort` relies on that."""
    known = {name.lower(): name for name in names}
    return {known.get(name.lower(), name): value for name, value in entry.items()}


def _port(entry: Any) -> PortMapping:
    if not isinstance(entry, dict):
        raise CniError(INVALID_CONFIG, "portMappings: an entry is not an object", json.dumps(entry))
    entry = _spelled(entry, _PORT_FIELDS)
    numbers: list[int] = []
    for name in _PORT_FIELDS[:2]:
        value = entry.get(name)
        if type(value) is not int or not 0 < value < 65536:
            raise CniError(INVALID_CONFIG, f"portMappings: {name} {value!r} is not a port number", json.dumps(entry))
        numbers.append(value)
    protocol = str(entry.get("protocol") or "tcp").upper()
    if protocol not in _PROTOCOLS:
        raise CniError(INVALID_CONFIG, f"portMappings: protocol {entry['protocol']!r} is not tcp, udp or sctp")
    host_ip = str(entry.get("hostIP") or "")
    return PortMapping(numbers[0], numbers[1], protocol, str(_address(host_ip)) if host_ip else "")


_LIMITS = ("ingressRate", "ingressBurst", "egressRate", "egressBurst")


def _bandwidth(limits: Any) -> Bandwidth:
    if not isinstance(limits, dict):
        raise CniError(INVALID_CONFIG, "bandwidth is not an object", json.dumps(limits))
    limits = _spelled(limits, _LIMITS)
    values = [_number(limits, name, _RATE_MAX) for name in _LIMITS]
    for name, rate, burst in (("ingress", values[0], values[1]), ("egress", values[2], values[3])):
        if bool(rate) != bool(burst):
            raise CniError(INVALID_CONFIG, f"bandwidth: {name} needs both a rate and a burst", json.dumps(limits))
        if burst >> 32:
            raise CniError(INVALID_CONFIG, f"bandwidth: {name}Burst {burst} is more than 4 Gbit", json.dumps(limits))
    return Bandwidth(*values)


def _address(text: Any) -> IPAddress:
    try:
        return ipaddress.ip_interface(str(text)).ip
    except ValueError as error:
        raise CniError(INVALID_CONFIG, f"{text!r} is not an IP address") from error


def _mac(text: Any) -> str:
    if not text:
        return ""
    if not isinstance(text, str) or not _MAC.fullmatch(text):
        raise CniError(INVALID_CONFIG, f"{text!r} is not a MAC address")
    if int(text[:2], 16) & 1:
        raise CniError(INVALID_CONFIG, f"{text!r} is a multicast MAC address")
    return text.lower()


def _route(entry: Any) -> CniRoute:
    if not isinstance(entry, dict):
        raise CniError(INVALID_CONFIG, "routes: an entry is not an object", json.dumps(entry))
    try:
        dst: IPNetwork = ipaddress.ip_network(str(entry.get("dst")), strict=False)
    except ValueError as error:
        raise CniError(INVALID_CONFIG, f"routes: dst {entry.get('dst')!r} is not a prefix") from error
    gateway = entry.get("gw")
    return CniRoute(dst, _address(gateway) if gateway else None)


# --- typed access to documents ------------------------------------------------------------------------------------


def _text(document: Json, name: str) -> str:
    value = document.get(name) or ""
    if not isinstance(value, str):
        raise CniError(INVALID_CONFIG, f"{name} is not a string", json.dumps(value))
    return value


def _number(document: Json, name: str, most: int) -> int:
    value = document.get(name) or 0
    if type(value) is not int or not 0 <= value <= most:
        raise CniError(INVALID_CONFIG, f"{name} {value!r} is not a number from 0 to {most}")
    return value


def _object(document: Json, name: str) -> Json:
    value = document.get(name) or {}
    if not isinstance(value, dict):
        raise CniError(INVALID_CONFIG, f"{name} is not an object", json.dumps(value))
    return value


def _list(document: Json, name: str) -> list[Any]:
    return _items(name, document.get(name))


def _items(name: str, value: Any) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise CniError(INVALID_CONFIG, f"{name} is not a list", json.dumps(value))
    return value


# --- results ------------------------------------------------------------------------------------------------------


def render_result(result: CniResult, version: str) -> Json:
    """A result as the configuration's version has it: before 1.0 an address says its family, from 1.1 a link its MTU."""
    since = CNI_VERSIONS.index
    interfaces: list[Json] = []
    for link in result.interfaces:
        entry: Json = {"name": link.name}
        entry |= {"mac": link.mac} if link.mac else {}
        entry |= {"mtu": link.mtu} if link.mtu and since(version) >= since("1.1.0") else {}
        entry |= {"sandbox": link.sandbox} if link.sandbox else {}
        interfaces.append(entry)
    ips: list[Json] = []
    for ip in result.ips:
        entry = {"version": str(ip.address.version)} if since(version) < since("1.0.0") else {}
        entry |= {"interface": ip.interface} if ip.interface is not None else {}
        entry["address"] = str(ip.address)
        entry |= {"gateway": str(ip.gateway)} if ip.gateway else {}
        ips.append(entry)
    routes = [{"dst": str(r.dst)} | ({"gw": str(r.gateway)} if r.gateway else {}) for r in result.routes]
    document: Json = {"cniVersion": version}
    document |= {"interfaces": interfaces} if interfaces else {}
    document |= {"ips": ips} if ips else {}
    document |= {"routes": routes} if routes else {}
    return document | {"dns": result.dns}


def decode_result(document: Json) -> CniResult:
    """The parts of an earlier plugin's result that matter here. Raises CniError (undecodable)."""
    try:
        interfaces = tuple(
            CniInterface(str(i["name"]), str(i.get("mac", "")), str(i.get("sandbox", "")), int(i.get("mtu", 0)))
            for i in document.get("interfaces") or ()
        )
        ips = tuple(
            CniIp(
                ipaddress.ip_interface(ip["address"]),
                ipaddress.ip_address(ip["gateway"]) if ip.get("gateway") else None,
                ip.get("interface"),
            )
            for ip in document.get("ips") or ()
        )
        routes = tuple(_route(route) for route in document.get("routes") or ())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CniError(UNDECODABLE, "prevResult cannot be read", str(error)) from error
    return CniResult(interfaces, ips, routes, document.get("dns") or {})


def render_error(error: CniError, version: str) -> Json:
    document: Json = {"cniVersion": version, "code": error.code, "msg": error.message}
    return document | ({"details": error.details} if error.details else {})
