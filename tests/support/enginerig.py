"""What container engines on a `hostrig.Host` have in common: the box they run in, and an image of busybox alone."""

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tarfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import enginebox
import pytest
from hostrig import Host

APPLETS = ("sh", "true", "httpd", "wget", "nc", "sleep", "ping", "cat", "ip")


def need_programs(**packages: str) -> None:
    """Skips, naming what is missing: program=its Debian package."""
    for program, package in packages.items():
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian package {package})")


class Box:
    """Users, mounts and processes of an engine's own, in its host's network."""

    def __init__(self, host: Host, root: Path, holder: asyncio.subprocess.Process, pid: int) -> None:
        self.host, self.root = host, root
        self._holder, self._pid = holder, pid
        self.environment: dict[str, str] = {"PATH": os.environ["PATH"], "HOME": str(root), "TMPDIR": str(root)}

    async def start(self, *command: str, **options: Any) -> asyncio.subprocess.Process:
        """Start a program in here."""
        enter = ("nsenter", f"--net=/proc/self/fd/{self.host.netns}", "--", "nsenter", "--preserve-credentials",
                 *(f"--{kind}" for kind in ("user", "mount", "pid")), f"--target={self._pid}", "--")  # fmt: skip
        return await asyncio.create_subprocess_exec(
            *enter, *command,
            pass_fds=(self.host.netns,), env=self.environment, stdin=asyncio.subprocess.DEVNULL, **options,
        )  # fmt: skip

    async def attempt(self, *command: str) -> tuple[int, str]:
        """Run a program to its end: its status, and what it said."""
        output = self.root / "output"
        # Into a file: a pipe would stay open as long as anything lives that the program leaves behind.
        with output.open("wb") as file:
            process = await self.start(*command, stdout=file, stderr=file)
            code = await asyncio.wait_for(process.wait(), 60)
        return code, output.read_text()

    async def run(self, *command: str) -> str:
        """As `attempt`; fails where it fails."""
        code, text = await self.attempt(*command)
        assert code == 0, f"{self.host.name}: {' '.join(command)}: status {code}: {text}\n{self.host.log.read_text()[-3000:]}"
        return text

    async def end(self) -> None:
        """Kill everything, as a power cut would."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        await self._holder.wait()


@asynccontextmanager
async def engine_box(host: Host, root: Path, environment: Mapping[str, str]) -> AsyncIterator[Box]:
    holder, pid = await _open_box(host)
    box = Box(host, root, holder, pid)
    box.environment |= environment
    try:
        yield box
    finally:
        await box.end()


async def _open_box(host: Host) -> tuple[asyncio.subprocess.Process, int]:
    """The namespaces, and the first process in them."""
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


def root_file_system() -> bytes:
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
