"""ServiceCIDR."""

import ipaddress
from datetime import datetime
from typing import Any

from podwire.apiserver.kinds.base import AGE, NAME, STATUS, Column, Kind
from podwire.apiserver.tables import age
from podwire.apiserver.validation import FieldError, Path, forbidden, immutable, invalid, required
from podwire.model import resources
from podwire.model.meta import Json
from podwire.model.timestamps import format_time

DEFAULT = "kubernetes"
"""The one there is: the ranges that the server was started with."""


class ServiceCIDRKind(Kind):
    resource = resources.SERVICECIDRS
    message = "k8s.io.api.networking.v1.ServiceCIDR"
    subresources = (STATUS,)
    columns = (NAME, Column("CIDRs", "The ranges that ClusterIPs come from."), AGE)

    def initialise(self, obj: Json, now: datetime) -> None:
        message = "Kubernetes default Service CIDR is ready"
        ready = {"type": "Ready", "status": "True", "reason": "", "message": message, "lastTransitionTime": format_time(now)}
        obj["status"] = {"conditions": [ready]}

    def check(self, obj: Json, root: Path) -> list[FieldError]:
        errors = []
        if (obj.get("metadata") or {}).get("name") != DEFAULT:
            errors.append(forbidden(root / "metadata" / "name", f"further ranges are not served, only {DEFAULT}"))
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
