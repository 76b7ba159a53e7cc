"""A container's command, arguments and environment from its specification: pure."""

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from podwire.model.objects import ConfigMap, Container, EnvVar, Pod, Secret
from podwire.model.podruntime import PodNetwork
from podwire.runtime.errors import RuntimeFailure

STANDARD_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_CONFIG_ERROR = "CreateContainerConfigError"
_REFERENCE = re.compile(r"\$(?:\$|\(([^()]*)\))")
_SUBSCRIPT = re.compile(r"(metadata\.(?:labels|annotations))\['(.+)'\]")


@dataclass(frozen=True, slots=True)
class References:
    """The objects that a pod refers to, by name. Missing: there is none."""

    config_maps: Mapping[str, ConfigMap] = field(default_factory=dict)
    secrets: Mapping[str, Secret] = field(default_factory=dict)


def expand(text: str, values: Mapping[str, str]) -> str:
    """Kubernetes' own expansion: `$(NAME)` to its value, as it stands if unknown; `$$` to `$`."""

    def replacement(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        return values.get(match[1], match[0])

    return _REFERENCE.sub(replacement, text)


def command_line(container: Container, values: Mapping[str, str]) -> tuple[str, ...]:
    """What to execute; empty without a `command`: the image's entry point is not known, so a stand-in takes its place."""
    if not container.command:
        return ()
    return tuple(expand(word, values) for word in (*container.command, *container.args))


def config_map_names(container: Container) -> set[str]:
    """Those that the container's environment refers to."""
    named = {source.config_map_ref.name for source in container.env_from if source.config_map_ref}
    sources = [variable.value_from for variable in container.env if variable.value_from]
    return named | {source.config_map_key_ref.name for source in sources if source.config_map_key_ref}


def secret_names(container: Container) -> set[str]:
    named = {source.secret_ref.name for source in container.env_from if source.secret_ref}
    sources = [variable.value_from for variable in container.env if variable.value_from]
    return named | {source.secret_key_ref.name for source in sources if source.secret_key_ref}


def environment(
    pod: Pod, container: Container, network: PodNetwork, references: References, inherited_path: str = ""
) -> dict[str, str]:
    """The whole environment, `env` over `envFrom` over what every container gets.

    Raises RuntimeFailure (CreateContainerConfigError) for a reference to something that is not there."""
    path = ":".join(dict.fromkeys(part for part in f"{inherited_path}:{STANDARD_PATH}".split(":") if part))
    values = {"PATH": path, "HOSTNAME": pod.spec.hostname or pod.metadata.name, "HOME": "/root"}
    for source in container.env_from:
        values.update({source.prefix + key: value for key, value in _all_of(source, pod, references).items()})
    for variable in container.env:
        value = _value(variable, pod, network, references)
        if value is not None:
            values[variable.name] = value if variable.value_from else expand(value, values)
    return values


def _all_of(source: object, pod: Pod, references: References) -> dict[str, str]:
    config_map_ref, secret_ref = getattr(source, "config_map_ref", None), getattr(source, "secret_ref", None)
    if config_map_ref is not None:
        config_map = references.config_maps.get(config_map_ref.name)
        if config_map is None and not config_map_ref.optional:
            raise _missing("configmap", config_map_ref.name)
        return dict(config_map.data) if config_map else {}
    if secret_ref is not None:
        secret = references.secrets.get(secret_ref.name)
        if secret is None and not secret_ref.optional:
            raise _missing("secret", secret_ref.name)
        return {key: _text(value) for key, value in secret.data.items()} if secret else {}
    return {}


def _value(variable: EnvVar, pod: Pod, network: PodNetwork, references: References) -> str | None:
    source = variable.value_from
    if source is None:
        return variable.value
    if source.field_ref is not None:
        return field_value(pod, network, source.field_ref.field_path)
    if (ref := source.config_map_key_ref) is not None:
        config_map = references.config_maps.get(ref.name)
        if config_map is None and not ref.optional:
            raise _missing("configmap", ref.name)
        if config_map is not None and ref.key in config_map.data:
            return config_map.data[ref.key]
        if ref.optional:
            return None
        raise _missing_key(ref.key, "ConfigMap", pod, ref.name)
    if (ref := source.secret_key_ref) is not None:
        secret = references.secrets.get(ref.name)
        if secret is None and not ref.optional:
            raise _missing("secret", ref.name)
        if secret is not None and ref.key in secret.data:
            return _text(secret.data[ref.key])
        if ref.optional:
            return None
        raise _missing_key(ref.key, "Secret", pod, ref.name)
    return None


def field_value(pod: Pod, network: PodNetwork, path: str) -> str:
    """A downward API field. Raises RuntimeFailure for one that does not exist."""
    meta = pod.metadata
    simple = {
        "metadata.name": meta.name,
        "metadata.namespace": meta.namespace,
        "metadata.uid": meta.uid,
        "metadata.labels": _pairs(meta.labels),
        "metadata.annotations": _pairs(meta.annotations),
        "spec.nodeName": pod.spec.node_name,
        "spec.serviceAccountName": pod.spec.service_account_name or "default",
        "status.podIP": str(network.ips[0]) if network.ips else "",
        "status.podIPs": ",".join(map(str, network.ips)),
        "status.hostIP": str(network.host_ips[0]) if network.host_ips else "",
        "status.hostIPs": ",".join(map(str, network.host_ips)),
    }
    if path in simple:
        return simple[path]
    if match := _SUBSCRIPT.fullmatch(path):
        pairs = meta.labels if match[1] == "metadata.labels" else meta.annotations
        return pairs.get(match[2], "")
    raise RuntimeFailure(f"the pod has no field {path!r} to take a value from", _CONFIG_ERROR)


def _pairs(pairs: Mapping[str, str]) -> str:
    quoted = {key: value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") for key, value in pairs.items()}
    return "\n".join(f'{key}="{value}"' for key, value in sorted(quoted.items()))


def _text(encoded: str) -> str:
    return base64.b64decode(encoded).decode("utf-8", "surrogateescape")


def _missing(kind: str, name: str) -> RuntimeFailure:
    return RuntimeFailure(f'{kind} "{name}" not found', _CONFIG_ERROR)


def _missing_key(key: str, kind: str, pod: Pod, name: str) -> RuntimeFailure:
    return RuntimeFailure(f"couldn't find key {key} in {kind} {pod.metadata.namespace}/{name}", _CONFIG_ERROR)
