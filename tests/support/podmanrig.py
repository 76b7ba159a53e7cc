"""Debian's podman on a `hostrig.Host`: mounts and processes of its own, the CNI back end, and an image of busybox alone."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import enginebox
import pytest
from hostrig import Host

IMAGE = "localhost/busybox:test"
APPLETS = ("sh", "true", "httpd", "wget", "nc", "sleep", "ping", "cat", "ip")


def need_podman() -> None:
    """Skips, naming what is missing."""
    for program, package in (("podman", "podman"), ("crun", "crun"), ("busybox", "busybox-static"), ("conmon", "conmon")):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian package {package})")


class Podman:
    """The engine of one machine. Its containers end with it."""

    def __init__(self, host: Host, root: Path, holder: asyncio.subprocess.Process, pid: int) -> None:
        self._host, self._root, self._holder, self._pid = host, root, holder, pid

    async def __call__(self, *arguments: str) -> str:
        """`podman …`; its output. Fails where it fails."""
        code, text = await self.attempt(*arguments)
        assert code == 0, (
            f"{self._host.name}: podman {' '.join(arguments)}: status {code}: {text}\n{self._host.log.read_text()[-3000:]}"
        )
        return text

    async def attempt(self, *arguments: str) -> tuple[int, str]:
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self._root),
            "CONTAINERS_CONF": str(self._root / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(self._root / "storage.conf"),
            "TMPDIR": str(self._root),
        }
        enter = ("nsenter", "--preserve-credentials", *(f"--{kind}" for kind in ("user", "mount", "pid")),
                 f"--target={self._pid}", "--")  # fmt: skip
        enter = ("nsenter", f"--net=/proc/self/fd/{self._host.netns}", "--", *enter)
        output = self._root / "output"
        # Into a file: a pipe would stay open as long as the container's monitor lives.
        with output.open("wb") as file:
            process = await asyncio.create_subprocess_exec(
                *enter, "podman", *arguments,
                pass_fds=(self._host.netns,), env=environment, stdin=asyncio.subprocess.DEVNULL, stdout=file, stderr=file,
            )  # fmt: skip
            code = await asyncio.wait_for(process.wait(), 60)
        return code, output.read_text()

    async def run(self, name: str, *arguments: str, command: tuple[str, ...]) -> None:
        """A container in the background."""
        free = ("--cgroups=disabled", "--security-opt", "seccomp=unconfined")
        await self("run", "-d", *free, "--name", name, *arguments, IMAGE, *command)

    async def inspect(self, name: str) -> Any:
        return json.loads(await self("inspect", name))[0]

    async def addresses(self, name: str) -> list[str]:
        networks = (await self.inspect(name))["NetworkSettings"]["Networks"]
        return [a for n in networks.values() for a in (n["IPAddress"], n["GlobalIPv6Address"]) if a]

    async def end(self) -> None:
        """Kill everything, as a power cut would."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        await self._holder.wait()


@asynccontextmanager
async def podman_on(host: Host, root: Path) -> AsyncIterator[Podman]:
    """Install podman's files below `root`; the CNI plugin and configuration are the test's to put into `bin` and `net.d`."""
    need_podman()
    for name in ("bin", "net.d", "storage", "run"):
        (root / name).mkdir(parents=True)
    _write_configuration(root)
    holder, pid = await _open_box(host)
    podman = Podman(host, root, holder, pid)
    try:
        (root / "image.tar").write_bytes(image())
        await podman("import", str(root / "image.tar"), IMAGE)
        yield podman
    finally:
        await podman.end()


async def _open_box(host: Host) -> tuple[asyncio.subprocess.Process, int]:
    """Namespaces for an engine, in the host's network; and the first process in them."""
    holder = await asyncio.create_subprocess_exec(
        "nsenter", f"--net=/proc/self/fd/{host.netns}", "--", sys.executable, enginebox.__file__,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, pass_fds=(host.netns,),
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdin is not None
    outside = await _line(holder.stdout)
    try:
        _map_ids(int(outside))
    except OSError:
        holder.kill()
        await holder.wait()
        pytest.skip("a container engine needs 65536 user ids, and an ordinary user's namespace has one")
    holder.stdin.write(b"\n")
    pid = int(await _line(holder.stdout))
    assert await _line(holder.stdout) == "ready"
    return holder, pid


async def _line(stream: asyncio.StreamReader) -> str:
    return (await asyncio.wait_for(stream.readline(), 10)).decode().strip()


def _map_ids(pid: int) -> None:
    for name in ("uid_map", "gid_map"):
        Path(f"/proc/{pid}/{name}").write_text("0 0 65536\n")


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


def image() -> bytes:
    """A root file system with nothing but busybox, as a tar file."""
    program = shutil.which("busybox")
    assert program is not None
    data = BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for directory in ("bin", "tmp", "proc", "sys", "dev", "etc", "www"):
            entry = tarfile.TarInfo(directory)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        tar.add(program, "bin/busybox", filter=_as_root)
        for applet in APPLETS:
            link = tarfile.TarInfo(f"bin/{applet}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
    return data.getvalue()


def _as_root(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.mode = 0o755
    return entry
