"""Kubernetes' own kubelet on a `hostrig.Host`, with Debian's containerd, in the box of the engine.

What the kubelet would change of the machine itself is out of its reach: it finds kernel switches as it wants them, in files of
the box's own, cgroups that cannot be written, and no kernel log.
"""

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cririg import IMAGE, Containerd, containerd_on
from hostrig import Host
from kuberig import Kubernetes, program

from podwire.apiserver.pki import client_kubeconfig

if TYPE_CHECKING:
    import asyncio

_SWITCHES = {
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
}
"""What the kubelet demands (pkg/kubelet/cm: setupKernelTunables)."""

_CONFIGURATION = """\
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {{anonymous: {{enabled: false}}, x509: {{clientCAFile: {kube}/ca.crt}}}}
authorization: {{mode: AlwaysAllow}}
tlsCertFile: {root}/kubelet.crt
tlsPrivateKeyFile: {root}/kubelet.key
address: {address}
clusterDomain: cluster.local
cgroupDriver: cgroupfs
cgroupsPerQOS: false
enforceNodeAllocatable: []
evictionHard: {{nodefs.available: 0%, imagefs.available: 0%, nodefs.inodesFree: 0%, memory.available: 1Mi}}
failSwapOn: false
protectKernelDefaults: true
imageGCHighThresholdPercent: 100
localStorageCapacityIsolation: false
resolvConf: ""
readOnlyPort: 0
healthzBindAddress: 127.0.0.1
nodeStatusUpdateFrequency: 1s
fileCheckFrequency: 5s
"""


class Kubelet:
    """`engine` is its containerd. It ends with the engine's box."""

    def __init__(self, host: Host, root: Path, engine: Containerd, kube: Kubernetes) -> None:
        self.host, self.engine = host, engine
        self.log = root / "kubelet.log"
        self._root, self._kube = root, kube
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        folder = self._root / "kubelet"
        command = (
            program("kubelet"), "--config", str(self._root / "kubelet.yaml"),
            "--kubeconfig", str(self._root / "kubelet.kubeconfig"),
            "--root-dir", str(folder), "--cert-dir", str(folder / "pki"),
            "--hostname-override", self.host.name, "--node-ip", self.host.address, "--container-runtime", "remote",
            "--container-runtime-endpoint", f"unix://{self.engine.socket}", "--pod-infra-container-image", IMAGE,
            "--register-with-taints", "podwire.io/agent-not-ready=:NoSchedule", "--v", "2",
        )  # fmt: skip
        with self.log.open("ab") as log:
            self._process = await self.engine.box.start(*command, stdout=log, stderr=log)

    async def end(self) -> None:
        """SIGTERM; pods live on."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await process.wait()


@asynccontextmanager
async def kubelet_on(host: Host, root: Path, kube: Kubernetes) -> AsyncIterator[Kubelet]:
    program("kubelet")
    async with containerd_on(host, root) as engine:
        _write_files(root, host, kube)
        await engine.box.run("sh", "-ec", "\n".join(_mounts(root)))
        kubelet = Kubelet(host, root, engine, kube)
        await kubelet.start()
        yield kubelet


def _write_files(root: Path, host: Host, kube: Kubernetes) -> None:
    (root / "kubelet.yaml").write_text(_CONFIGURATION.format(kube=kube.folder, root=root, address=host.address))
    pair = kube.issue(f"system:node:{host.name}", host.address, "system:nodes")
    (root / "kubelet.kubeconfig").write_text(client_kubeconfig("test", kube.url, kube.authority.pair.certificate, pair))
    (root / "kubelet.crt").write_bytes(pair.certificate)
    (root / "kubelet.key").write_bytes(pair.key)
    switches = root / "switches"
    switches.mkdir()
    for name, value in _SWITCHES.items():
        (switches / name.replace("/", ".")).write_text(value + "\n")


def _mounts(root: Path) -> list[str]:
    lines = [f"mount --bind {root}/switches/{name.replace('/', '.')} /proc/sys/{name}" for name in _SWITCHES]
    # It wants figures out of cgroups: the machine's, to be read only.
    cgroups = "umount /sys/fs/cgroup && for each in /sys/fs/cgroup/*/; do mount -o remount,bind,ro $each; done"
    return [*lines, "mount --bind /dev/null /dev/kmsg", cgroups]
