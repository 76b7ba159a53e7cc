"""Debian's podman on a `hostrig.Host`: mounts and processes of its own, the CNI back end, and an image of busybox alone."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from enginerig import Box, engine_box, need_programs, root_file_system
from hostrig import Host

from podwire.cni.install import install_configuration, install_plugin

IMAGE = "localhost/busybox:test"


def need_podman() -> None:
    need_programs(podman="podman", crun="crun", busybox="busybox-static", conmon="conmon")


class Podman:
    """The engine of one machine. Its containers end with its box."""

    def __init__(self, box: Box) -> None:
        self._box = box

    async def __call__(self, *arguments: str) -> str:
        """`podman …`; its output. Fails where it fails."""
        return await self._box.run("podman", *arguments)

    async def attempt(self, *arguments: str) -> tuple[int, str]:
        return await self._box.attempt("podman", *arguments)

    async def run(self, name: str, *arguments: str, command: tuple[str, ...]) -> None:
        """A container in the background."""
        free = ("--cgroups=disabled", "--security-opt", "seccomp=unconfined")
        await self("run", "-d", *free, "--name", name, *arguments, IMAGE, *command)

    async def inspect(self, name: str) -> Any:
        return json.loads(await self("inspect", name))[0]

    async def addresses(self, name: str) -> list[str]:
        networks = (await self.inspect(name))["NetworkSettings"]["Networks"]
        return [a for n in networks.values() for a in (n["IPAddress"], n["GlobalIPv6Address"]) if a]


@asynccontextmanager
async def podman_on(host: Host, root: Path) -> AsyncIterator[Podman]:
    """Install podman's files, podwire's plugin and its network below `root`."""
    need_podman()
    for name in ("storage", "run"):
        (root / name).mkdir(parents=True)
    _write_configuration(root)
    install_plugin(root / "bin", host.cni_socket)
    install_configuration(root / "net.d", "podwire")
    files = {"CONTAINERS_CONF": "containers.conf", "CONTAINERS_STORAGE_CONF": "storage.conf"}
    async with engine_box(host, root, {name: str(root / file) for name, file in files.items()}) as box:
        podman = Podman(box)
        (root / "image.tar").write_bytes(root_file_system())
        await podman("import", str(root / "image.tar"), IMAGE)
        yield podman


def _write_configuration(root: Path) -> None:
    (root / "containers.conf").write_text(
        "[containers]\n"
        'default_sysctls = []\nlog_driver = "k8s-file"\n'
        "[engine]\n"
        'cgroup_manager = "cgroupfs"\nevents_logger = "none"\nruntime = "crun"\nno_pivot_root = true\n'
        f'static_dir = "{root}/libpod"\ntmp_dir = "{root}/run/libpod"\nvolume_path = "{root}/volumes"\n'
        "[network]\n"
        f'network_backend = "cni"\ncni_plugin_dirs = ["{root}/bin"]\nnetwork_config_dir = "{root}/net.d"\n'
        'default_network = "podwire"\n'
    )
    (root / "storage.conf").write_text(
        f'[storage]\ndriver = "vfs"\ngraphroot = "{root}/storage"\nrunroot = "{root}/run/storage"\n'
    )
