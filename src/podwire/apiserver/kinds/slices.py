"""EndpointSlice (discovery.k8s.io/v1)."""

from datetime import datetime
from typing import Any

from podwire.apiserver.kinds.base import AGE, NAME, Column, Kind
from podwire.apiserver.tables import age
from podwire.apiserver.validation import (
    FieldError,
    Path,
    dns_label,
    dns_subdomain,
    duplicate,
    each,
    immutable,
    invalid,
    ip_address,
    one_of,
    required,
)
from podwire.model import resources
from podwire.model.meta import Json

MAX_ENDPOINTS = 1000
MAX_PORTS = 20000
MAX_ADDRESSES = 100


class EndpointSliceKind(Kind):
    resource = resources.ENDPOINTSLICES
    message = "k8s.io.api.discovery.v1.EndpointSlice"
    columns = (
        NAME,
        Column("AddressType", "addressType specifies the type of address carried by this EndpointSlice."),
        Column("Ports", "ports specifies the list of network ports exposed by each endpoint in this slice."),
        Column("Endpoints", "endpoints is a list of unique endpoints in this slice."),
        AGE,
    )
    counts_generation = True

    def default(self, obj: Json) -> None:
        obj.setdefault("endpoints", [])
        for port in obj.setdefault("ports", []):
            port.setdefault("name", "")
            port.setdefault("protocol", "TCP")

    def check(self, obj: Json, root: Path) -> list[FieldError]:
        kind = obj.get("addressType", "")
        errors = one_of(root / "addressType", kind, ("FQDN", "IPv4", "IPv6")) if kind else [required(root / "addressType")]
        endpoints = obj.get("endpoints") or []
        if len(endpoints) > MAX_ENDPOINTS:
            errors.append(_too_many(root / "endpoints", len(endpoints), MAX_ENDPOINTS))
        for i, endpoint in enumerate(endpoints):
            errors += _check_endpoint(endpoint, kind, root / "endpoints" @ i)
        return errors + _check_ports(obj.get("ports") or [], root / "ports")

    def check_update(self, new: Json, old: Json, root: Path) -> list[FieldError]:
        return immutable(root / "addressType", new.get("addressType"), old.get("addressType"))

    def row(self, obj: Json, now: datetime) -> list[Any]:
        meta = obj.get("metadata", {})
        addresses = [a for e in obj.get("endpoints") or [] for a in e.get("addresses") or []]
        return [
            meta.get("name", ""),
            obj.get("addressType", ""),
            _few([str(p.get("port")) if p.get("port") else "*" for p in obj.get("ports") or []], "<unset>"),
            _few(addresses, "<unset>"),
            age(meta.get("creationTimestamp"), now),
        ]


def _too_many(path: Path, count: int, limit: int) -> FieldError:
    return FieldError("FieldValueTooMany", f"Too many: {count}: must have at most {limit} items", str(path))


def _check_endpoint(endpoint: Json, kind: str, at: Path) -> list[FieldError]:
    addresses = endpoint.get("addresses") or []
    errors: list[FieldError] = []
    if not addresses:
        errors.append(required(at / "addresses", "must contain at least 1 address"))
    if len(addresses) > MAX_ADDRESSES:
        errors.append(_too_many(at / "addresses", len(addresses), MAX_ADDRESSES))
    for i, address in enumerate(addresses):
        where = at / "addresses" @ i
        if kind == "FQDN":
            errors += each(where, address, dns_subdomain(address))
        elif ip_address(address):
            errors += each(where, address, ip_address(address))
        elif (":" in address) != (kind == "IPv6"):
            errors.append(invalid(where, address, f"must be an {kind} address"))
    if endpoint.get("nodeName"):
        errors += each(at / "nodeName", endpoint["nodeName"], dns_subdomain(endpoint["nodeName"]))
    if endpoint.get("hostname"):
        errors += each(at / "hostname", endpoint["hostname"], dns_label(endpoint["hostname"]))
    return errors


def _check_ports(ports: list[Json], at: Path) -> list[FieldError]:
    errors: list[FieldError] = []
    if len(ports) > MAX_PORTS:
        errors.append(_too_many(at, len(ports), MAX_PORTS))
    names: set[str] = set()
    for i, port in enumerate(ports):
        name = port.get("name", "")
        if name:
            errors += each(at @ i / "name", name, dns_label(name))
        if name in names:
            errors.append(duplicate(at @ i / "name", name))
        names.add(name)
        errors += one_of(at @ i / "protocol", port.get("protocol", "TCP"), ("SCTP", "TCP", "UDP"))
    return errors


def _few(values: list[str], empty: str) -> str:
    """Three at most, and how many more there are."""
    if not values:
        return empty
    more = f" + {len(values) - 3} more..." if len(values) > 3 else ""
    return ",".join(values[:3]) + more
