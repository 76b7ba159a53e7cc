"""Debian's containerd and runc on a `hostrig.Host`, driven over CRI as a kubelet drives them."""

import asyncio
import contextlib
import hashlib
import json
import signal
import tarfile
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import criwire
from criwire import Answer, CriError, Message
from enginerig import Box, engine_box, need_programs, root_file_system
from hostrig import PODWIRE, Host

IMAGE = "localhost/busybox:test"
TCP, UDP = 0, 1

# What the tests' place cannot give is not asked for: cgroups, and a score for the kernel's out-of-memory killer.
CONFIGURATION = """\
version = 2
root = "{root}/containerd"
state = "{root}/run"
disabled_plugins = ["io.containerd.internal.v1.opt"]
[grpc]
  address = "{root}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{image}"
  disable_cgroup = true
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{root}/bin"
    conf_dir = "{root}/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "native"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        NoPivotRoot = true
"""


def need_containerd() -> None:
    need_programs(containerd="containerd", ctr="containerd", runc="runc", busybox="busybox-static")


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A pod as CRI has it: its id there, and what it was asked to be."""

    id: str
    config: Message


class Containerd:
    """The engine of one machine. Its pods end with its box."""

    def __init__(self, box: Box) -> None:
        self.box = box
        self._log, self.socket = box.root / "containerd.log", box.root / "containerd.sock"
        self._process: asyncio.subprocess.Process | None = None
        self._attempts = 0

    async def start(self) -> None:
        """Returns when pods can be made: it has found its network."""
        with self._log.open("ab") as log:
            self._process = await self.box.start(
                "containerd", "--config", str(self.box.root / "config.toml"), stdout=log, stderr=log
            )
        async with asyncio.timeout(20):
            while True:
                if await self._network_ready():
                    return
                await asyncio.sleep(0.05)

    async def kill(self) -> None:
        """SIGKILL, as a crash: its shims and their containers live on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        await self._process.wait()

    async def run_sandbox(
        self,
        name: str,
        *,
        ports: Iterable[tuple[int, int, int]] = (),
        annotations: dict[str, str] | None = None,
        attempt: int = 0,
    ) -> Sandbox:
        """A pod without containers. `ports`: (protocol, container's, host's)."""
        config: Message = {
            1: {1: name, 2: f"uid-{name}", 3: "default", 4: attempt},
            2: name,
            3: str(self.box.root / "logs"),
            5: [{1: protocol, 2: inside, 3: outside} for protocol, inside, outside in ports],
            6: {"made-by": "tests"},
            7: annotations or {},
            8: {},
        }
        answer = await self.call("RunPodSandbox", {1: config})
        return Sandbox(answer.text(1), config)

    async def addresses(self, sandbox: Sandbox) -> list[str]:
        network = (await self.call("PodSandboxStatus", {1: sandbox.id})).message(1).message(5)
        return [network.text(1), *(extra.text(1) for extra in network.messages(2))]

    async def run_container(self, sandbox: Sandbox, name: str, *command: str) -> str:
        config: Message = {1: {1: name}, 2: {1: IMAGE}, 3: command, 11: f"{name}.log", 15: {}}
        answer = await self.call("CreateContainer", {1: sandbox.id, 2: config, 3: sandbox.config})
        await self.call("StartContainer", {1: answer.text(1)})
        return answer.text(1)

    async def execute(self, container: str, *command: str) -> str:
        """Its standard output. Fails where it fails."""
        answer = await self.call("ExecSync", {1: container, 2: command, 3: 10})
        assert not answer.number(3), (command, answer.text(1), answer.text(2))
        return answer.text(1)

    async def remove(self, sandbox: Sandbox) -> None:
        """StopPodSandbox and RemovePodSandbox; containers go with it."""
        await self.call("StopPodSandbox", {1: sandbox.id})
        await self.call("RemovePodSandbox", {1: sandbox.id})

    async def call(self, method: str, request: Message) -> Answer:
        try:
            return await criwire.call(self.socket, method, request)
        except CriError as error:
            raise AssertionError(f"{error}\n{self._log.read_text()[-4000:]}") from error

    async def import_image(self) -> None:
        path = self.box.root / "image.tar"
        path.write_bytes(image_archive())
        await self.ctr("images", "import", "--snapshotter", "native", str(path))

    async def ctr(self, *arguments: str) -> str:
        """`ctr` in the namespace of CRI's containers; its output. Fails where it fails."""
        return await self.box.run("ctr", "--address", str(self.socket), "--namespace", "k8s.io", *arguments)

    async def plugin(self, verb: str) -> tuple[int, str]:
        """Execute podwire's plugin as an engine executes one that is not for a container."""
        conflist = json.loads((self.box.root / "net.d/10-podwire.conflist").read_text())
        one = conflist["plugins"][0] | {"cniVersion": "1.1.0", "name": conflist["name"]}
        path = self.box.root / "bin"
        call = f"CNI_COMMAND={verb} CNI_PATH={path} {path}/podwire <<'.'\n{json.dumps(one)}\n.\n"
        return await self.box.attempt("sh", "-c", call)

    async def _network_ready(self) -> bool:
        with contextlib.suppress(OSError, CriError):
            status = await criwire.call(self.socket, "Status", {})
            return all(condition.number(2) for condition in status.message(1).messages(1))
        return False


@asynccontextmanager
async def containerd_on(host: Host, root: Path) -> AsyncIterator[Containerd]:
    """Start the engine with its files below `root`, and install podwire's plugin and its network as an administrator does."""
    need_containerd()
    _write_configuration(root)
    async with engine_box(host, root, {}) as box:
        directories = ("--bin-dir", str(root / "bin"), "--conf-dir", str(root / "net.d"))
        await box.run(*PODWIRE, "cni", "install", "--cni-socket", str(host.cni_socket), *directories)
        engine = Containerd(box)
        await engine.start()
        await engine.import_image()
        yield engine


def _write_configuration(root: Path) -> None:
    root.mkdir()
    (root / "config.toml").write_text(CONFIGURATION.format(root=root, image=IMAGE))


def image_archive() -> bytes:
    """The image of busybox as `docker save` writes one. Its own command waits for ever: it serves as a sandbox's too."""
    layer = root_file_system()
    configuration = {
        "architecture": "amd64", "os": "linux", "config": {"Entrypoint": ["/bin/sleep", "1000000"], "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }  # fmt: skip
    manifest = [{"Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"]}]
    files = {"manifest.json": _json(manifest), "config.json": _json(configuration), "layer.tar": layer}
    data = BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, BytesIO(content))
    return data.getvalue()


def _json(document: object) -> bytes:
    return json.dumps(document).encode()
