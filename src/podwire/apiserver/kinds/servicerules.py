"""What makes a Service's spec valid, in Kubernetes' wording (pkg/apis/core/validation, ValidateService)."""

import ipaddress

from podwire.apiserver.kinds.metadata import labels
from podwire.apiserver.validation import (
    FieldError,
    Path,
    cidr,
    dns_label,
    dns_subdomain,
    duplicate,
    each,
    forbidden,
    immutable,
    invalid,
    ip_address,
    one_of,
    port_name,
    port_number,
    qualified_name,
    required,
    unsupported,
)
from podwire.model.meta import Json

TYPES = ("ClusterIP", "ExternalName", "LoadBalancer", "NodePort")
PROTOCOLS = ("SCTP", "TCP", "UDP")
POLICIES = ("Cluster", "Local")
DISTRIBUTIONS = ("PreferClose", "PreferSameNode", "PreferSameZone")
FAMILIES = ("IPv4", "IPv6")
FAMILY_POLICIES = ("PreferDualStack", "RequireDualStack", "SingleStack")
MAX_AFFINITY_SECONDS = 86400


def check_ports(spec: Json, at: Path) -> list[FieldError]:
    ports = spec.get("ports") or []
    headless = spec.get("clusterIP") == "None"
    if not ports and not headless and spec.get("type") != "ExternalName":
        return [required(at / "ports")]
    errors: list[FieldError] = []
    names: set[str] = set()
    for i, port in enumerate(ports):
        errors += _check_port(port, at / "ports" @ i, names, needs_name=len(ports) > 1, headless=headless)
    seen: set[tuple[str, int]] = set()
    node_ports: set[tuple[str, int]] = set()
    for i, port in enumerate(ports):
        where, protocol = at / "ports" @ i, port.get("protocol", "TCP")
        if port.get("nodePort"):
            if spec.get("type") not in ("NodePort", "LoadBalancer"):
                errors.append(forbidden(where / "nodePort", "may not be used when `type` is 'ClusterIP'"))
            if (protocol, port["nodePort"]) in node_ports:
                errors.append(duplicate(where / "nodePort", port["nodePort"]))
            node_ports.add((protocol, port["nodePort"]))
        if (protocol, port.get("port")) in seen:
            errors.append(duplicate(where, {"protocol": protocol, "port": port.get("port")}))
        seen.add((protocol, port.get("port")))
    return errors


def _check_port(port: Json, at: Path, names: set[str], *, needs_name: bool, headless: bool) -> list[FieldError]:
    errors: list[FieldError] = []
    name = port.get("name", "")
    if not name:
        errors += [required(at / "name")] if needs_name else []
    else:
        errors += each(at / "name", name, dns_label(name))
        errors += [duplicate(at / "name", name)] if name in names else []
        names.add(name)
    errors += each(at / "port", port.get("port", 0), port_number(port.get("port", 0)))
    protocol, target = port.get("protocol", ""), port.get("targetPort")
    errors += one_of(at / "protocol", protocol, PROTOCOLS) if protocol else [required(at / "protocol")]
    if isinstance(target, str):
        errors += each(at / "targetPort", target, port_name(target))
    elif target is not None:
        errors += each(at / "targetPort", target, port_number(target))
    node_port = port.get("nodePort", 0)
    if node_port and not 0 <= node_port <= 65535:
        errors.append(invalid(at / "nodePort", node_port, "must be between 0 and 65535, inclusive"))
    if port.get("appProtocol"):
        errors += each(at / "appProtocol", port["appProtocol"], qualified_name(port["appProtocol"]))
    return errors


def check_spec(spec: Json, at: Path) -> list[FieldError]:
    kind = spec.get("type", "")
    errors = _check_type(spec, kind, at)
    errors += labels(spec.get("selector"), at / "selector")
    errors += _check_affinity(spec, at)
    for i, address in enumerate(spec.get("externalIPs") or []):
        errors += each(at / "externalIPs" @ i, address, ip_address(address) or _unusable(address))
    errors += one_of(at / "type", kind, TYPES) if kind else [required(at / "type")]
    errors += _check_traffic(spec, kind, at)
    errors += _check_balancer(spec, kind, at)
    return errors + _check_addresses(spec, kind, at)


def _check_type(spec: Json, kind: str, at: Path) -> list[FieldError]:
    errors: list[FieldError] = []
    if kind in ("NodePort", "LoadBalancer") and spec.get("clusterIP") == "None":
        text = "may not be set to 'None' for LoadBalancer services"
        errors.append(invalid(at / "clusterIPs" @ 0, "None", text.replace("LoadBalancer", kind)))
    if kind == "ExternalName":
        name = spec.get("externalName", "")
        errors += (
            each(at / "externalName", name, dns_subdomain(name.removesuffix("."))) if name else [required(at / "externalName")]
        )
        if spec.get("clusterIPs"):
            errors.append(forbidden(at / "clusterIPs", "may not be set for ExternalName services"))
    return errors


def _check_affinity(spec: Json, at: Path) -> list[FieldError]:
    affinity = spec.get("sessionAffinity", "")
    config = spec.get("sessionAffinityConfig")
    if not affinity:
        return [required(at / "sessionAffinity")]
    errors = one_of(at / "sessionAffinity", affinity, ("ClientIP", "None"))
    if affinity == "ClientIP" and config is not None:
        seconds = (config.get("clientIP") or {}).get("timeoutSeconds", 0)
        if not 0 < seconds <= MAX_AFFINITY_SECONDS:
            where = at / "sessionAffinityConfig" / "clientIP" / "timeoutSeconds"
            errors.append(invalid(where, seconds, f"must be greater than 0 and less than {MAX_AFFINITY_SECONDS}"))
    return errors


def _unusable(address: str) -> list[str]:
    """Why an external address cannot be one (validateNonSpecialIP)."""
    ip = ipaddress.ip_address(address)
    texts = {
        "may not be unspecified": ip.is_unspecified,
        "may not be in the loopback range (127.0.0.0/8, ::1/128)": ip.is_loopback,
        "may not be in the link-local range (169.254.0.0/16, fe80::/10)": ip.is_link_local,
        "may not be in the link-local multicast range (224.0.0.0/24, ff02::/10)": ip.is_multicast,
    }
    return [text for text, holds in texts.items() if holds]


def _check_traffic(spec: Json, kind: str, at: Path) -> list[FieldError]:
    errors: list[FieldError] = []
    external, internal = spec.get("externalTrafficPolicy"), spec.get("internalTrafficPolicy")
    facing = kind in ("NodePort", "LoadBalancer") or (kind == "ClusterIP" and bool(spec.get("externalIPs")))
    if external and not facing:
        errors.append(invalid(at / "externalTrafficPolicy", external, "may only be set for externally-accessible services"))
    elif external:
        errors += one_of(at / "externalTrafficPolicy", external, POLICIES)
    elif facing:
        errors.append(required(at / "externalTrafficPolicy"))
    if internal:
        errors += one_of(at / "internalTrafficPolicy", internal, POLICIES)
    elif kind in ("ClusterIP", "NodePort", "LoadBalancer"):
        errors.append(required(at / "internalTrafficPolicy"))
    health = spec.get("healthCheckNodePort", 0)
    if health and not (kind == "LoadBalancer" and external == "Local"):
        text = "may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'"
        errors.append(invalid(at / "healthCheckNodePort", health, text))
    if spec.get("trafficDistribution"):
        errors += one_of(at / "trafficDistribution", spec["trafficDistribution"], DISTRIBUTIONS)
    return errors


def _check_balancer(spec: Json, kind: str, at: Path) -> list[FieldError]:
    errors: list[FieldError] = []
    ranges = spec.get("loadBalancerSourceRanges") or []
    if ranges and kind != "LoadBalancer":
        errors.append(forbidden(at / "loadBalancerSourceRanges", "may only be used when `type` is 'LoadBalancer'"))
    for i, value in enumerate(ranges):
        problems = cidr(value.strip())
        errors += each(at / "loadBalancerSourceRanges" @ i, value, problems)
    if kind == "LoadBalancer" and spec.get("allocateLoadBalancerNodePorts") is None:
        errors.append(required(at / "allocateLoadBalancerNodePorts"))
    if kind != "LoadBalancer" and spec.get("allocateLoadBalancerNodePorts") is not None:
        text = "may only be used when `type` is 'LoadBalancer'"
        errors.append(forbidden(at / "allocateLoadBalancerNodePorts", text))
    if spec.get("loadBalancerClass") is not None:
        if kind != "LoadBalancer":
            errors.append(forbidden(at / "loadBalancerClass", "may only be used when `type` is 'LoadBalancer'"))
        errors += each(at / "loadBalancerClass", spec["loadBalancerClass"], qualified_name(spec["loadBalancerClass"]))
    return errors


def _check_addresses(spec: Json, kind: str, at: Path) -> list[FieldError]:
    addresses, families = spec.get("clusterIPs") or [], spec.get("ipFamilies") or []
    errors: list[FieldError] = []
    if spec.get("clusterIP") and addresses and addresses[0] != spec["clusterIP"]:
        errors.append(invalid(at / "clusterIPs" @ 0, addresses, "first value must match `clusterIP`"))
    if spec.get("ipFamilyPolicy"):
        errors += one_of(at / "ipFamilyPolicy", spec["ipFamilyPolicy"], FAMILY_POLICIES)
    for i, family in enumerate(families):
        if family not in FAMILIES:
            errors.append(unsupported(at / "ipFamilies" @ i, family, FAMILIES))
        elif family in families[:i]:
            errors.append(duplicate(at / "ipFamilies" @ i, family))
    if len(families) > 2:
        errors.append(invalid(at / "ipFamilies", families, "may only hold up to 2 values"))
    for i, address in enumerate(addresses):
        if address == "None" and (i or len(addresses) > 1):
            errors.append(invalid(at / "clusterIPs" @ i, address, "'None' must be the first and only value"))
        elif address != "None":
            errors += each(at / "clusterIPs" @ i, address, ip_address(address))
    if len(addresses) > 2:
        errors.append(invalid(at / "clusterIPs", addresses, "may only hold up to 2 values"))
    valid = [a for a in addresses if not ip_address(a)]
    if len(valid) == 2 and (":" in valid[0]) == (":" in valid[1]):
        text = "may specify no more than one IP for each IP family"
        errors.append(invalid(at / "clusterIPs", addresses, text))
    return errors


def check_ingress(ingress: list[Json], at: Path) -> list[FieldError]:
    """The load balancer's addresses in the status."""
    errors: list[FieldError] = []
    for i, item in enumerate(ingress):
        ip, mode, name = item.get("ip", ""), item.get("ipMode"), item.get("hostname", "")
        if ip:
            errors += each(at @ i / "ip", ip, ip_address(ip))
        if mode is not None:
            errors += one_of(at @ i / "ipMode", mode, ("Proxy", "VIP"))
            if not ip:
                errors.append(forbidden(at @ i / "ipMode", "may not be specified when `ip` is not set"))
        if name:
            errors += each(at @ i / "hostname", name, dns_subdomain(name))
    return errors


def check_unchanged(new: Json, old: Json, at: Path) -> list[FieldError]:
    """Addresses and the first family stay, unless the Service has been or becomes an ExternalName."""
    if "ExternalName" in (new.get("type"), old.get("type")):
        return []
    errors: list[FieldError] = []
    before, after = old.get("clusterIPs") or [], new.get("clusterIPs") or []
    if before and after[:1] != before[:1]:
        errors.append(invalid(at / "clusterIPs" @ 0, after, "may not change once set"))
    if len(before) > 1 and len(after) > 1 and after[1] != before[1]:
        errors.append(invalid(at / "clusterIPs" @ 1, after, "may not change once set"))
    families, was = new.get("ipFamilies") or [], old.get("ipFamilies") or []
    if was and families and families[0] != was[0]:
        errors.append(invalid(at / "ipFamilies" @ 0, families, "may not change once set"))
    if old.get("loadBalancerClass") is not None and "LoadBalancer" == new.get("type") == old.get("type"):
        errors += [
            FieldError(e.reason, e.message.replace("field is immutable", "may not change once set"), e.field)
            for e in immutable(at / "loadBalancerClass", new.get("loadBalancerClass"), old["loadBalancerClass"])
        ]
    return errors
