"""A pod's files: what is mounted over /etc, its volumes, its logs. One directory per pod, gone with it."""

import base64
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from podwire.model.objects import Container, KeyToPath, Pod, ProjectedVolume, Volume
from podwire.model.podruntime import PodNetwork
from podwire.runtime.environment import References, field_value
from podwire.runtime.errors import RuntimeFailure
from podwire.runtime.shim.messages import Mount

_LOCALHOST = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"


class PodFiles:
    """The directory of one pod under `root`."""

    def __init__(self, root: Path, uid: str) -> None:
        self.directory = root / "pods" / uid
        self._etc: list[str] = []
        self._volumes: dict[str, Path] = {}

    @property
    def stage(self) -> str:
        """An empty directory for the shim to build mounts in."""
        return str(self.directory / "stage")

    def log_path(self, container: str, attempt: int) -> str:
        return str(self.directory / "logs" / container / f"{attempt}.log")

    def write(self, pod: Pod, network: PodNetwork, references: References) -> None:
        """Write everything; on repeat what changed is written anew. Raises RuntimeFailure for what cannot be mounted."""
        (self.directory / "stage").mkdir(parents=True, exist_ok=True)
        self._write_etc(pod, network)
        for volume in pod.spec.volumes:
            self._volumes[volume.name] = self._volume(volume, pod, network, references)

    def mounts(self, container: Container) -> tuple[Mount, ...]:
        """All that `container` sees mounted. Raises RuntimeFailure for a volume that the pod does not declare."""
        mounts = [Mount(str(self.directory / "etc" / name), f"/etc/{name}") for name in self._etc]
        for wanted in container.volume_mounts:
            source = self._volumes.get(wanted.name)
            if source is None:
                raise RuntimeFailure(f'container {container.name} mounts volume "{wanted.name}", which the pod does not have')
            if wanted.sub_path:
                source = _below(source, wanted.sub_path)
                if not source.exists():
                    source.mkdir(parents=True)
            mounts = [mount for mount in mounts if mount.target != wanted.mount_path]
            mounts.append(Mount(str(source), wanted.mount_path, wanted.read_only))
        return tuple(mounts)

    def remove(self) -> None:
        """Delete the directory, whatever containers left in it."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _write_etc(self, pod: Pod, network: PodNetwork) -> None:
        etc = self.directory / "etc"
        etc.mkdir(exist_ok=True)
        contents = {"hostname": f"{pod.spec.hostname or pod.metadata.name}\n"}
        if pod.spec.host_network:
            contents = {}
        if not pod.spec.host_network or pod.spec.host_aliases:
            contents["hosts"] = hosts_file(pod, network)
        cluster_first = pod.spec.dns_policy == "ClusterFirst" and not pod.spec.host_network
        if cluster_first or pod.spec.dns_policy == "ClusterFirstWithHostNet":
            contents["resolv.conf"] = resolver_file(pod.metadata.namespace, network)
        for name, text in contents.items():
            _write(etc / name, text.encode(), 0o644)
        self._etc = list(contents)

    def _volume(self, volume: Volume, pod: Pod, network: PodNetwork, references: References) -> Path:
        if volume.host_path is not None:
            path = Path(volume.host_path.path)
            if volume.host_path.type == "DirectoryOrCreate":
                path.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                raise _failed_mount(volume.name, f"hostPath {path} does not exist on this machine")
            return path
        if (kind := volume.unsupported) is not None:
            raise _failed_mount(volume.name, f"podwire does not have volumes of kind {kind}")
        place = self.directory / "volumes" / volume.name
        place.mkdir(parents=True, exist_ok=True)
        for name, (content, mode) in self._contents(volume, pod, network, references).items():
            _write(_below(place, name), content, mode)
        return place

    def _contents(self, volume: Volume, pod: Pod, network: PodNetwork, references: References) -> dict[str, tuple[bytes, int]]:
        """Relative path → content and mode."""
        if (config_map := volume.config_map) is not None:
            data = _config_map_data(config_map.name, config_map.optional, volume.name, references)
            return _selected(data, config_map.items, config_map.default_mode, config_map.optional, volume.name)
        if (secret := volume.secret) is not None:
            data = _secret_data(secret.secret_name, secret.optional, volume.name, references)
            return _selected(data, secret.items, secret.default_mode, secret.optional, volume.name)
        if volume.downward_api is not None:
            return {
                item.path: (field_value(pod, network, item.field_ref.field_path).encode(), 0o644)
                for item in volume.downward_api.items
                if item.field_ref is not None
            }
        if volume.projected is not None:
            return _projected(volume.name, volume.projected, pod, network, references)
        return {}


def referenced(pod: Pod) -> tuple[set[str], set[str]]:
    """The names of the ConfigMaps and Secrets that the pod's volumes need."""
    config_maps = {volume.config_map.name for volume in pod.spec.volumes if volume.config_map}
    secrets = {volume.secret.secret_name for volume in pod.spec.volumes if volume.secret}
    for volume in pod.spec.volumes:
        for source in volume.projected.sources if volume.projected else ():
            if source.config_map:
                config_maps.add(source.config_map.name)
            if source.secret:
                secrets.add(source.secret.name)
    return config_maps, secrets


def hosts_file(pod: Pod, network: PodNetwork) -> str:
    """/etc/hosts: localhost, the pod's own names, its host aliases."""
    name = pod.spec.hostname or pod.metadata.name
    names = name
    if pod.spec.subdomain:
        names = f"{name}.{pod.spec.subdomain}.{pod.metadata.namespace}.svc.{network.cluster_domain}\t{name}"
    own = "".join(f"{ip}\t{names}\n" for ip in network.ips)
    aliases = "".join(f"{alias.ip}\t{' '.join(alias.hostnames)}\n" for alias in pod.spec.host_aliases)
    return f"# Written by podwire for this pod.\n{_LOCALHOST}{own}{aliases}"


def resolver_file(namespace: str, network: PodNetwork) -> str:
    """/etc/resolv.conf for dnsPolicy ClusterFirst."""
    domain = network.cluster_domain
    servers = "".join(f"nameserver {server}\n" for server in network.nameservers)
    return f"search {namespace}.svc.{domain} svc.{domain} {domain}\n{servers}options ndots:5\n"


def _projected(
    name: str, volume: ProjectedVolume, pod: Pod, network: PodNetwork, references: References
) -> dict[str, tuple[bytes, int]]:
    contents: dict[str, tuple[bytes, int]] = {}
    for source in volume.sources:
        if (config_map := source.config_map) is not None:
            data = _config_map_data(config_map.name, config_map.optional, name, references)
            contents.update(_selected(data, config_map.items, 0o644, config_map.optional, name))
        if (secret := source.secret) is not None:
            data = _secret_data(secret.name, secret.optional, name, references)
            contents.update(_selected(data, secret.items, 0o644, secret.optional, name))
        for item in source.downward_api.items if source.downward_api else ():
            if item.field_ref is not None:
                contents[item.path] = (field_value(pod, network, item.field_ref.field_path).encode(), 0o644)
    return contents


def _config_map_data(name: str, optional: bool, volume: str, references: References) -> dict[str, bytes]:
    config_map = references.config_maps.get(name)
    if config_map is None:
        if optional:
            return {}
        raise _failed_mount(volume, f'configmap "{name}" not found')
    text = {key: value.encode() for key, value in config_map.data.items()}
    return text | {key: base64.b64decode(value) for key, value in config_map.binary_data.items()}


def _secret_data(name: str, optional: bool, volume: str, references: References) -> dict[str, bytes]:
    secret = references.secrets.get(name)
    if secret is None:
        if optional:
            return {}
        raise _failed_mount(volume, f'secret "{name}" not found')
    return {key: base64.b64decode(value) for key, value in secret.data.items()}


def _selected(
    data: Mapping[str, bytes], items: Iterable[KeyToPath], default_mode: int, optional: bool, volume: str
) -> dict[str, tuple[bytes, int]]:
    chosen = list(items)
    if not chosen:
        return {key: (value, default_mode) for key, value in data.items()}
    contents = {}
    for item in chosen:
        if item.key in data:
            contents[item.path] = (data[item.key], item.mode if item.mode is not None else default_mode)
        elif not optional:
            raise _failed_mount(volume, f"references non-existent config key: {item.key}")
    return contents


def _below(directory: Path, path: str) -> Path:
    """`path` inside `directory`. Raises RuntimeFailure for one that leads out of it."""
    inside = Path(os.path.normpath(directory / path))
    if not inside.is_relative_to(directory):
        raise RuntimeFailure(f"path {path!r} leads out of its volume")
    return inside


def _write(path: Path, content: bytes, mode: int) -> None:
    """Replace whole files only: a container never reads half of one. A file that is mounted keeps its inode."""
    try:
        if path.read_bytes() == content:
            return
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(mode)


def _failed_mount(volume: str, why: str) -> RuntimeFailure:
    return RuntimeFailure(f'MountVolume.SetUp failed for volume "{volume}" : {why}', "FailedMount")
