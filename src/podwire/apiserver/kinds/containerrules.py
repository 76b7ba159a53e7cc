"""What makes one container of a pod valid (pkg/apis/core/validation, validateContainers)."""

from collections.abc import Collection
from typing import Any

from podwire.apiserver.quantities import parse_quantity
from podwire.apiserver.validation import (
    FieldError,
    Path,
    config_key,
    dns_label,
    duplicate,
    each,
    env_name,
    forbidden,
    invalid,
    ip_address,
    non_negative,
    not_found,
    one_of,
    port_name,
    port_number,
    required,
)
from podwire.model.meta import Json

PROTOCOLS = ("TCP", "UDP", "SCTP")
PULL_POLICIES = ("Always", "IfNotPresent", "Never")
PROBES = ("livenessProbe", "readinessProbe", "startupProbe")
HANDLERS = ("exec", "httpGet", "tcpSocket", "grpc", "sleep")


def check_container(container: Json, at: Path, volumes: Collection[Any], *, init: bool) -> list[FieldError]:
    """One container; `volumes` are the names of the pod's volumes. Names are compared by the caller."""
    name, image = container.get("name", ""), container.get("image", "")
    errors = each(at / "name", name, dns_label(name)) if name else [required(at / "name")]
    if not image:
        errors.append(required(at / "image"))
    elif image != image.strip():
        errors.append(invalid(at / "image", image, "must not have leading or trailing whitespace"))
    errors += _check_ports(container.get("ports") or [], at / "ports")
    errors += _check_env(container.get("env") or [], at / "env")
    errors += _check_env_from(container.get("envFrom") or [], at / "envFrom")
    errors += _check_mounts(container.get("volumeMounts") or [], at / "volumeMounts", volumes)
    errors += one_of(at / "imagePullPolicy", container.get("imagePullPolicy", "Always"), PULL_POLICIES)
    errors += _check_resources(container.get("resources") or {}, at / "resources")
    return errors + _check_lifecycle(container, at, init=init)


def _check_lifecycle(container: Json, at: Path, *, init: bool) -> list[FieldError]:
    errors: list[FieldError] = []
    restart = container.get("restartPolicy")
    if restart and not init:
        errors.append(forbidden(at / "restartPolicy", "may not be set for non-init containers"))
    elif restart:
        errors += one_of(at / "restartPolicy", restart, ("Always",))
    if init and restart != "Always":
        text = "may not be set for init containers without restartPolicy=Always"
        errors += [forbidden(at / key, text) for key in ("lifecycle", *PROBES) if container.get(key)]
        return errors
    for key in PROBES:
        if container.get(key) is not None:
            errors += _check_probe(container[key], at / key, once=key != "readinessProbe")
    for key, hook in (container.get("lifecycle") or {}).items():
        if isinstance(hook, dict):
            errors += _check_handler(hook, at / "lifecycle" / key)
    return errors


def _check_ports(ports: list[Json], at: Path) -> list[FieldError]:
    errors: list[FieldError] = []
    names: set[str] = set()
    for i, port in enumerate(ports):
        where, name = at @ i, port.get("name", "")
        if name:
            problems = port_name(name)
            errors += each(where / "name", name, problems)
            if not problems and name in names:
                errors.append(duplicate(where / "name", name))
            names.add(name)
        number = port.get("containerPort", 0)
        errors += each(where / "containerPort", number, port_number(number)) if number else [required(where / "containerPort")]
        if port.get("hostPort"):
            errors += each(where / "hostPort", port["hostPort"], port_number(port["hostPort"]))
        if port.get("hostIP"):
            errors += each(where / "hostIP", port["hostIP"], ip_address(port["hostIP"]))
        errors += one_of(where / "protocol", port.get("protocol", "TCP"), PROTOCOLS)
    return errors


def _check_env(env: list[Json], at: Path) -> list[FieldError]:
    errors: list[FieldError] = []
    for i, item in enumerate(env):
        name, source = item.get("name", ""), item.get("valueFrom")
        errors += each(at @ i / "name", name, env_name(name)) if name else [required(at @ i / "name")]
        if source is None:
            continue
        where = at @ i / "valueFrom"
        if item.get("value"):
            errors.append(invalid(where, "", "may not be specified when `value` is not empty"))
        if not source:
            text = "must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef`, `secretKeyRef` or `fileKeyRef`"
            errors.append(invalid(where, "", text))
        elif len(source) > 1:
            errors.append(invalid(where, "", "may not have more than one field specified at a time"))
        for key in ("configMapKeyRef", "secretKeyRef"):
            ref = source.get(key)
            if ref is not None:
                errors += (
                    each(where / key / "key", ref["key"], config_key(ref["key"]))
                    if ref.get("key")
                    else [required(where / key / "key")]
                )
        if source.get("fieldRef") is not None and not source["fieldRef"].get("fieldPath"):
            errors.append(required(where / "fieldRef" / "fieldPath"))
    return errors


def _check_env_from(sources: list[Json], at: Path) -> list[FieldError]:
    errors: list[FieldError] = []
    for i, source in enumerate(sources):
        if source.get("prefix"):
            errors += each(at @ i / "prefix", source["prefix"], env_name(source["prefix"]))
        refs = [key for key in ("configMapRef", "secretRef") if source.get(key) is not None]
        if not refs:
            errors.append(invalid(at @ i, "", "must specify one of: `configMapRef` or `secretRef`"))
        elif len(refs) > 1:
            errors.append(invalid(at @ i, "", "may not have more than one field specified at a time"))
        errors += [required(at @ i / key / "name") for key in refs if not source[key].get("name")]
    return errors


def _check_mounts(mounts: list[Json], at: Path, volumes: Collection[Any]) -> list[FieldError]:
    errors: list[FieldError] = []
    paths: set[str] = set()
    for i, mount in enumerate(mounts):
        name, path = mount.get("name", ""), mount.get("mountPath", "")
        if not name:
            errors.append(required(at @ i / "name"))
        elif name not in volumes:
            errors.append(not_found(at @ i / "name", name))
        if not path:
            errors.append(required(at @ i / "mountPath"))
        elif path in paths:
            errors.append(invalid(at @ i / "mountPath", path, "must be unique"))
        paths.add(path)
        if str(mount.get("subPath", "")).startswith("/"):
            errors.append(invalid(at @ i / "subPath", mount["subPath"], "must be a relative path"))
    return errors


def _check_resources(resources: Json, at: Path) -> list[FieldError]:
    errors: list[FieldError] = []
    limits = resources.get("limits") or {}
    for key in ("limits", "requests"):
        for name, text in (resources.get(key) or {}).items():
            if parse_quantity(text) < 0:
                errors.append(invalid(at / key @ name, text, "must be greater than or equal to 0"))
    for name, text in (resources.get("requests") or {}).items():
        if name in limits and parse_quantity(text) > parse_quantity(limits[name]):
            errors.append(invalid(at / "requests", text, f"must be less than or equal to {name} limit of {limits[name]}"))
    return errors


def _check_probe(probe: Json, at: Path, *, once: bool) -> list[FieldError]:
    errors = _check_handler(probe, at)
    for key in ("initialDelaySeconds", "timeoutSeconds", "periodSeconds", "successThreshold", "failureThreshold"):
        errors += non_negative(at / key, probe.get(key, 0))
    if once and probe.get("successThreshold", 1) != 1:
        errors.append(invalid(at / "successThreshold", probe["successThreshold"], "must be 1"))
    return errors


def _check_handler(handler: Json, at: Path) -> list[FieldError]:
    given = [key for key in HANDLERS if handler.get(key) is not None]
    if not given:
        return [required(at, "must specify a handler type")]
    errors = [forbidden(at / key, "may not specify more than 1 handler type") for key in given[1:]]
    if handler.get("exec") is not None and not handler["exec"].get("command"):
        errors.append(required(at / "exec" / "command"))
    for key in ("httpGet", "tcpSocket"):
        if handler.get(key) is None:
            continue
        port = handler[key].get("port", 0)
        problems = port_name(port) if isinstance(port, str) else port_number(port)
        errors += each(at / key / "port", port, problems)
    get = handler.get("httpGet")
    if get is not None:
        errors += one_of(at / "httpGet" / "scheme", get.get("scheme", "HTTP"), ("HTTP", "HTTPS"))
    if handler.get("grpc") is not None:
        errors += each(at / "grpc" / "port", handler["grpc"].get("port", 0), port_number(handler["grpc"].get("port", 0)))
    return errors
