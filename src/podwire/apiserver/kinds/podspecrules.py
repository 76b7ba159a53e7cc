"""What makes a pod's spec valid, in Kubernetes' wording (pkg/apis/core/validation, ValidatePodSpec)."""

from podwire.apiserver.kinds.containerrules import check_container
from podwire.apiserver.kinds.metadata import labels, selector
from podwire.apiserver.validation import (
    FieldError,
    Path,
    dns_label,
    dns_subdomain,
    duplicate,
    each,
    forbidden,
    invalid,
    ip_address,
    non_negative,
    one_of,
    qualified_name,
    required,
)
from podwire.model.meta import Json

RESTART_POLICIES = ("Always", "OnFailure", "Never")
DNS_POLICIES = ("ClusterFirstWithHostNet", "ClusterFirst", "Default", "None")


def check_pod_spec(spec: Json, at: Path) -> list[FieldError]:
    """All rules for a pod's spec, also in a template."""
    errors = _check_volumes(spec, at / "volumes")
    errors += _check_containers(spec, at)
    errors += one_of(at / "restartPolicy", spec.get("restartPolicy", ""), RESTART_POLICIES)
    errors += one_of(at / "dnsPolicy", spec.get("dnsPolicy", ""), DNS_POLICIES)
    errors += labels(spec.get("nodeSelector"), at / "nodeSelector")
    errors += _check_names(spec, at)
    errors += _check_tolerations(spec.get("tolerations") or [], at / "tolerations")
    errors += _check_spread(spec.get("topologySpreadConstraints") or [], at / "topologySpreadConstraints")
    errors += _check_host_aliases(spec.get("hostAliases") or [], at / "hostAliases")
    errors += non_negative(at / "terminationGracePeriodSeconds", spec.get("terminationGracePeriodSeconds", 0))
    deadline = spec.get("activeDeadlineSeconds")
    if deadline is not None and not 1 <= deadline <= 2**31 - 1:
        errors.append(invalid(at / "activeDeadlineSeconds", deadline, "must be between 1 and 2147483647, inclusive"))
    if spec.get("dnsPolicy") == "None" and not (spec.get("dnsConfig") or {}).get("nameservers"):
        text = "must provide at least one DNS nameserver when `dnsPolicy` is None"
        errors.append(required(at / "dnsConfig" / "nameservers", text))
    return errors


def _check_containers(spec: Json, at: Path) -> list[FieldError]:
    volumes = {volume.get("name") for volume in spec.get("volumes") or []}
    names: set[str] = set()
    host_ports: set[tuple[str, str, int]] = set()
    errors: list[FieldError] = []
    if not spec.get("containers"):
        errors.append(required(at / "containers"))
    for key in ("containers", "initContainers"):
        for i, container in enumerate(spec.get(key) or []):
            where = at / key @ i
            errors += check_container(container, where, volumes, init=key == "initContainers")
            name = container.get("name", "")
            if name in names:
                errors.append(duplicate(where / "name", name))
            names.add(name)
            errors += _check_host_ports(container, where, host_ports, on_host=bool(spec.get("hostNetwork")))
    return errors


def _check_host_ports(container: Json, at: Path, seen: set[tuple[str, str, int]], *, on_host: bool) -> list[FieldError]:
    errors: list[FieldError] = []
    for i, port in enumerate(container.get("ports") or []):
        host_port, where = port.get("hostPort", 0), at / "ports" @ i
        if not host_port:
            continue
        if on_host and host_port != port.get("containerPort"):
            errors.append(
                invalid(where / "containerPort", port.get("containerPort"), "must match `hostPort` when `hostNetwork` is true")
            )
        key = (port.get("hostIP", ""), port.get("protocol", "TCP"), host_port)
        if key in seen:
            errors.append(duplicate(where / "hostPort", f"{key[1]}/{key[0]}/{host_port}"))
        seen.add(key)
    return errors


def _check_volumes(spec: Json, at: Path) -> list[FieldError]:
    errors: list[FieldError] = []
    names: set[str] = set()
    for i, volume in enumerate(spec.get("volumes") or []):
        name, where = volume.get("name", ""), at @ i
        errors += each(where / "name", name, dns_label(name)) if name else [required(where / "name")]
        if name in names:
            errors.append(duplicate(where / "name", name))
        names.add(name)
        sources = [key for key in volume if key != "name"]
        if not sources:
            errors.append(required(where, "must specify a volume type"))
        errors += [forbidden(where / key, "may not specify more than 1 volume type") for key in sources[1:]]
        if volume.get("configMap") is not None and not volume["configMap"].get("name"):
            errors.append(required(where / "configMap" / "name"))
        if volume.get("secret") is not None and not volume["secret"].get("secretName"):
            errors.append(required(where / "secret" / "secretName"))
        if volume.get("hostPath") is not None and not volume["hostPath"].get("path"):
            errors.append(required(where / "hostPath" / "path"))
        for key in ("configMap", "secret"):
            errors += _check_items((volume.get(key) or {}).get("items") or [], where / key / "items")
    return errors


def _check_items(items: list[Json], at: Path) -> list[FieldError]:
    errors: list[FieldError] = []
    for i, item in enumerate(items):
        if not item.get("key"):
            errors.append(required(at @ i / "key"))
        path = item.get("path", "")
        if not path:
            errors.append(required(at @ i / "path"))
        elif path.startswith("/"):
            errors.append(invalid(at @ i / "path", path, "must be a relative path"))
        elif ".." in path.split("/"):
            errors.append(invalid(at @ i / "path", path, "must not contain '..'"))
    return errors


def _check_names(spec: Json, at: Path) -> list[FieldError]:
    errors: list[FieldError] = []
    for key, rule in (
        ("nodeName", dns_subdomain),
        ("serviceAccountName", dns_subdomain),
        ("hostname", dns_label),
        ("subdomain", dns_label),
        ("priorityClassName", dns_subdomain),
    ):
        if spec.get(key):
            errors += each(at / key, spec[key], rule(spec[key]))
    return errors


def _check_tolerations(tolerations: list[Json], at: Path) -> list[FieldError]:
    errors: list[FieldError] = []
    for i, item in enumerate(tolerations):
        key, operator, effect = item.get("key", ""), item.get("operator", ""), item.get("effect", "")
        where = at @ i
        if key:
            errors += each(where / "key", key, qualified_name(key))
        elif operator != "Exists":
            errors.append(
                invalid(
                    where / "operator",
                    operator,
                    'operator must be Exists when `key` is empty, which means "match all values and all keys"',
                )
            )
        if operator == "Exists" and item.get("value"):
            errors.append(invalid(where / "operator", item, "value must be empty when `operator` is 'Exists'"))
        elif operator not in ("", "Equal", "Exists"):
            errors += one_of(where / "operator", operator, ("Equal", "Exists"))
        if item.get("tolerationSeconds") is not None and effect != "NoExecute":
            errors.append(invalid(where / "effect", effect, "effect must be 'NoExecute' when `tolerationSeconds` is set"))
        if effect:
            errors += one_of(where / "effect", effect, ("NoSchedule", "PreferNoSchedule", "NoExecute"))
    return errors


def _check_spread(constraints: list[Json], at: Path) -> list[FieldError]:
    errors: list[FieldError] = []
    for i, item in enumerate(constraints):
        skew = item.get("maxSkew", 0)
        if skew <= 0:
            errors.append(invalid(at @ i / "maxSkew", skew, "must be greater than zero"))
        if not item.get("topologyKey"):
            errors.append(required(at @ i / "topologyKey", "can not be empty"))
        actions = ("DoNotSchedule", "ScheduleAnyway")
        errors += one_of(at @ i / "whenUnsatisfiable", item.get("whenUnsatisfiable", ""), actions)
        errors += selector(item.get("labelSelector"), at @ i / "labelSelector")
    return errors


def _check_host_aliases(aliases: list[Json], at: Path) -> list[FieldError]:
    errors: list[FieldError] = []
    for i, alias in enumerate(aliases):
        errors += each(at @ i / "ip", alias.get("ip", ""), ip_address(str(alias.get("ip", ""))))
        for j, name in enumerate(alias.get("hostnames") or []):
            errors += each(at @ i / "hostnames" @ j, name, dns_subdomain(name))
    return errors


# --- updates ------------------------------------------------------------------------------------------------------

_MUTABLE = (
    "pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,"
    "`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),"
    "`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)"
)


def check_pod_update(new: Json, old: Json, at: Path) -> list[FieldError]:
    """Of a pod's spec only images, the deadline (downwards), more tolerations and fewer scheduling gates may change."""
    errors: list[FieldError] = []
    for key in ("containers", "initContainers"):
        if len(new.get(key) or []) != len(old.get(key) or []):
            return [forbidden(at / key, "pod updates may not add or remove containers")]
    deadline, before = new.get("activeDeadlineSeconds"), old.get("activeDeadlineSeconds")
    if before is not None and (deadline is None or deadline > before):
        text = f"must be less than or equal to previous value '{before}'"
        errors.append(invalid(at / "activeDeadlineSeconds", deadline, text))
    tolerations = new.get("tolerations") or []
    if not all(item in tolerations for item in old.get("tolerations") or []):
        errors.append(forbidden(at / "tolerations", "existing toleration can not be modified except its tolerationSeconds"))
    gates = [gate.get("name") for gate in old.get("schedulingGates") or []]
    for i, gate in enumerate(new.get("schedulingGates") or []):
        if gate.get("name") not in gates:
            errors.append(forbidden(at / "schedulingGates" @ i, "only deletion is allowed, but found new scheduling gate"))
    if _comparable(new) != _comparable(old):
        errors.append(forbidden(at, _MUTABLE))
    return errors


def _comparable(spec: Json) -> Json:
    free = ("activeDeadlineSeconds", "tolerations", "schedulingGates")
    kept = {key: value for key, value in spec.items() if key not in free and value not in ({}, [])}
    for name in ("containers", "initContainers"):
        if name in kept:
            kept[name] = [{k: v for k, v in c.items() if k != "image"} for c in kept[name]]
    return kept
