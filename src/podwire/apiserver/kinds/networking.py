"""ServiceCIDR and IPAddress: where ClusterIPs come from, and who has which. What keeps them in step with the Services is in
claims.py, and in the controllers."""

import ipaddress
from datetime import datetime
from typing import Any

from podwire.apiserver.kinds.base import AGE, NAME, STATUS, Column, Kind
from podwire.apiserver.tables import age
from podwire.apiserver.validation import FieldError, Path, dns_subdomain, each, immutable, invalid, path_segment, required
from podwire.model import resources
from podwire.model.meta import Json
from podwire.model.servicecidr import FINALIZER, ready_condition
from podwire.model.timestamps import format_time

DEFAULT = "kubernetes"
"""The ServiceCIDR of the ranges that the server was started with."""


class ServiceCIDRKind(Kind):
    resource = resources.SERVICECIDRS
    message = "k8s.io.api.networking.v1.ServiceCIDR"
    subresources = (STATUS,)
    columns = (NAME, Column("CIDRs", "The ranges that ClusterIPs come from."), AGE)

    def initialise(self, obj: Json, now: datetime) -> None:
        meta = obj["metadata"]
        meta["finalizers"] = [FINALIZER, *(f for f in meta.get("finalizers") or () if f != FINALIZER)]
        obj["status"] = {"conditions": [ready_condition(str(meta.get("name", "")), format_time(now))]}

    def check(self, obj: Json, root: Path) -> list[FieldError]:
        errors: list[FieldError] = []
        cidrs, at = (obj.get("spec") or {}).get("cidrs") or [], root / "spec" / "cidrs"
        if not cidrs:
            return [*errors, required(at, "at least one CIDR required")]
        if len(cidrs) > 2:
            return [*errors, invalid(at, cidrs, "may only hold up to 2 values")]
        networks = []
        for i, text in enumerate(cidrs):
            try:
                network = ipaddress.ip_network(text)
            except ValueError:
                errors.append(invalid(at @ i, text, "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)"))
                continue
            networks.append(network)
            if str(network) != text:
                errors.append(invalid(at @ i, text, f'must be in canonical form ("{network}")'))
        if len(networks) == 2 and networks[0].version == networks[1].version:
            errors.append(
                invalid(at, cidrs, "may specify no more than one IP for each IP family, i.e 192.168.0.0/24 and 2001:db8::/64")
            )
        return errors

    def check_update(self, new: Json, old: Json, root: Path) -> list[FieldError]:
        before, after = (old.get("spec") or {}).get("cidrs"), (new.get("spec") or {}).get("cidrs")
        return immutable(root / "spec" / "cidrs", after, before)

    def row(self, obj: Json, now: datetime) -> list[Any]:
        meta, cidrs = obj.get("metadata", {}), (obj.get("spec") or {}).get("cidrs") or []
        return [meta.get("name", ""), ",".join(cidrs), age(meta.get("creationTimestamp"), now)]


class IPAddressKind(Kind):
    """Its name is the address: whoever creates it first has it."""

    resource = resources.IPADDRESSES
    message = "k8s.io.api.networking.v1.IPAddress"
    short_names = ("ip",)
    columns = (NAME, Column("ParentRef", "What has the address."))

    def name_problems(self, name: str) -> list[str]:
        try:
            canonical = str(ipaddress.ip_address(name))
        except ValueError:
            return ["must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"]
        return [] if canonical == name else [f'must be in canonical form ("{canonical}")']

    def check(self, obj: Json, root: Path) -> list[FieldError]:
        parent, at = (obj.get("spec") or {}).get("parentRef"), root / "spec" / "parentRef"
        if not parent:
            return [required(at)]
        errors = each(at / "group", parent.get("group"), dns_subdomain(parent["group"]) if parent.get("group") else ())
        for key in ("resource", "name"):
            value = parent.get(key) or ""
            errors += each(at / key, value, path_segment(value)) if value else [required(at / key)]
        namespace = parent.get("namespace") or ""
        return errors + each(at / "namespace", namespace, path_segment(namespace))

    def check_update(self, new: Json, old: Json, root: Path) -> list[FieldError]:
        before, after = (old.get("spec") or {}).get("parentRef"), (new.get("spec") or {}).get("parentRef")
        return immutable(root / "spec" / "parentRef", after, before)

    def row(self, obj: Json, now: datetime) -> list[Any]:
        return [obj.get("metadata", {}).get("name", ""), _parent((obj.get("spec") or {}).get("parentRef") or {})]


def _parent(reference: Json) -> str:
    """`services/shop/web`, and with its group `gateways.gateway.networking.k8s.io/shop/web`."""
    resource = ".".join(filter(None, (reference.get("resource"), reference.get("group")))).lower()
    return "/".join(filter(None, (resource, reference.get("namespace"), reference.get("name")))) or "<none>"
