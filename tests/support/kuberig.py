"""Kubernetes' own programs for tests, where the environment says where they are: PODWIRE_KUBE_APISERVER, PODWIRE_KUBELET, ….

Nothing of Kubernetes is part of podwire or of the Debian packages that tests install, so these tests are for those who have
the programs: docs/guides/kubernetes.md says how they are run.
"""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from etcdrig import Member, answers, one_member
from hostrig import Host, answering, until

from podwire.apiserver.pki import Authority, KeyPair, kubeconfig
from podwire.client.api import ApiClient
from podwire.client.etcd import EtcdClient
from podwire.model.resources import NAMESPACES, NODES, Resource
from podwire.model.timestamps import format_time

ADDRESS, PORT = "198.18.7.254", 6443
URL = f"https://{ADDRESS}:{PORT}"
SLICES = Resource("discovery.k8s.io", "v1beta1", "endpointslices", "EndpointSlice")
"""As Kubernetes 1.20 has them."""

MANIFESTS = Path(__file__).parents[2] / "deploy/kubernetes"
KUBECTL = shutil.which("kubectl", path=str(Path(sys.executable).parent)) or "kubectl"


def program(name: str) -> str:
    """Where the program is, or a skip that names the variable."""
    variable = f"PODWIRE_{name.upper().replace('-', '_')}"
    path = os.environ.get(variable, "")
    if not os.access(path, os.X_OK):
        pytest.skip(f"{variable} does not name Kubernetes' {name}")
    return path


class Process:
    """One of the programs, in the tests' own network namespace or on a `host`; its output goes to a file."""

    def __init__(self, folder: Path, name: str, arguments: Sequence[str], host: Host | None = None) -> None:
        self.log = folder / (f"{name}.log" if host is None else f"{name}-{host.name}.log")
        self._command = (program(name), *arguments)
        self._fds: tuple[int, ...] = ()
        if host is not None:
            self._command, self._fds = ("nsenter", f"--net=/proc/self/fd/{host.netns}", "--", *self._command), (host.netns,)
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(*self._command, stdout=log, stderr=log, pass_fds=self._fds)

    async def ended(self) -> None:
        """Returns when it has ended of itself."""
        assert self._process is not None
        await self._process.wait()

    async def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            process.send_signal(how)
        try:
            await asyncio.wait_for(process.wait(), 10)
        except TimeoutError:
            process.kill()
            await process.wait()


class Kubernetes:
    """A kube-apiserver with an etcd of its own, RBAC on. `client` and `admin_config` are its administrator's."""

    def __init__(self, folder: Path, authority: Authority, member: Member, server: Process, client: ApiClient) -> None:
        self.folder, self.authority, self.etcd, self.server, self.client = folder, authority, member, server, client
        self.admin_config = folder / "admin.kubeconfig"

    @property
    def url(self) -> str:
        return URL

    def issue(self, name: str, address: str, *groups: str) -> KeyPair:
        """A certificate for this user, and for a server at this address."""
        return self.authority.issue(name, [address], datetime.now(UTC), organisations=groups)

    def account_config(self, name: str, token: str) -> Path:
        """A kubeconfig file with this token."""
        path = self.folder / f"{name}.kubeconfig"
        path.write_text(kubeconfig("test", URL, self.authority.pair.certificate, token))
        return path

    async def token(self, account: str, seconds: int = 3600) -> str:
        """A token of a ServiceAccount in kube-system, as the kubelet asks for one."""
        request = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {"audiences": ["api"], "expirationSeconds": seconds},
        }
        path = f"/api/v1/namespaces/kube-system/serviceaccounts/{account}/token"
        answer = await self.client.request("POST", path, body=request)
        return str(json.loads(answer)["status"]["token"])

    async def kubectl(self, *arguments: str) -> str:
        """kubectl as the administrator; its output. Fails where it fails."""
        command = (KUBECTL, "--kubeconfig", str(self.admin_config), *arguments)
        done = await asyncio.to_thread(
            subprocess.run, command, capture_output=True, text=True, timeout=30, check=False, env={"HOME": str(self.folder)}
        )
        assert done.returncode == 0, done.stderr
        return str(done.stdout)

    async def restarted(self) -> None:
        """kill -9, and a new one with the same data."""
        await self.server.end(signal.SIGKILL)
        await self.server.start()
        await self.answers()

    async def answers(self) -> None:
        """Returns once the server is ready. Fails where it has ended, or takes a minute."""
        ready = asyncio.create_task(answering(self.admin_config, within=60.0))
        ended = asyncio.create_task(self.server.ended())
        await asyncio.wait((ready, ended), return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        if not ready.done() or ready.exception():
            ready.cancel()
            pytest.fail(f"kube-apiserver does not come up: {self.server.log.read_text()[-3000:]}")
        await ready.result().close()

    async def compact(self) -> None:
        """Forget etcd's history up to now, as kube-apiserver does every five minutes."""
        async with EtcdClient([self.etcd.client_url]) as etcd:
            await etcd.compact((await etcd.read("nothing")).header.revision)


@asynccontextmanager
async def kubernetes(folder: Path, *arguments: str, on: Member | None = None) -> AsyncIterator[Kubernetes]:
    """A control plane at `URL`, with an etcd of its own if not `on` that one. The bridge of `hostrig.machines`, which has its
    address, must be there."""
    program("kube-apiserver")
    authority = _write_files(folder)
    async with AsyncExitStack() as stack:
        member = await stack.enter_async_context(one_member(folder)) if on is None else on
        async with EtcdClient([member.client_url]) as etcd:
            await answers(etcd)
        server = Process(folder, "kube-apiserver", (*_flags(folder, member.client_url), *arguments))
        await server.start()
        stack.push_async_callback(server.end, signal.SIGKILL)
        client = await stack.enter_async_context(ApiClient(URL, token="admin", ssl=authority.client_context()))
        made = Kubernetes(folder, authority, member, server, client)
        await made.answers()
        await until(client, NAMESPACES, lambda found: {"default", "kube-system"} <= {n["metadata"]["name"] for n in found})
        yield made


def _write_files(folder: Path) -> Authority:
    folder.mkdir()
    now = datetime.now(UTC)
    authority = Authority.create("kubernetes", now)
    server = authority.issue("kube-apiserver", [ADDRESS, "10.96.0.1"], now)
    kubelet_client = authority.issue("kube-apiserver-kubelet-client", [], now, organisations=["system:masters"])
    accounts = authority.issue("service accounts", [], now)
    files = {
        "ca.crt": authority.pair.certificate,
        "server.crt": server.certificate,
        "server.key": server.key,
        "kubelet.crt": kubelet_client.certificate,
        "kubelet.key": kubelet_client.key,
        "accounts.crt": accounts.certificate,
        "accounts.key": accounts.key,
        "tokens.csv": b"admin,admin,1,system:masters\n",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "admin.kubeconfig").write_text(kubeconfig("test", URL, authority.pair.certificate, "admin"))
    return authority


def _flags(folder: Path, etcd: str) -> tuple[str, ...]:
    return (
        f"--etcd-servers={etcd}",
        f"--bind-address={ADDRESS}",
        f"--advertise-address={ADDRESS}",
        f"--secure-port={PORT}",
        f"--tls-cert-file={folder}/server.crt",
        f"--tls-private-key-file={folder}/server.key",
        f"--client-ca-file={folder}/ca.crt",
        f"--token-auth-file={folder}/tokens.csv",
        f"--kubelet-client-certificate={folder}/kubelet.crt",
        f"--kubelet-client-key={folder}/kubelet.key",
        f"--kubelet-certificate-authority={folder}/ca.crt",
        "--kubelet-preferred-address-types=InternalIP",
        f"--cert-dir={folder}",
        f"--service-account-key-file={folder}/accounts.crt",
        f"--service-account-signing-key-file={folder}/accounts.key",
        "--service-account-issuer=https://kubernetes.default.svc",
        "--api-audiences=api",
        "--authorization-mode=Node,RBAC",
        "--service-cluster-ip-range=10.96.0.0/16",
        "--allow-privileged=true",
    )


async def register(client: ApiClient, name: str, address: str, pod_cidr: str, **spec: Any) -> None:
    """A Node as its kubelet and the controller manager write it; its network is not there yet."""
    meta = {"name": name, "labels": {"kubernetes.io/hostname": name}}
    await client.create(NODES, {"metadata": meta, "spec": {"podCIDR": pod_cidr, "podCIDRs": [pod_cidr], **spec}})
    addresses = [{"type": "InternalIP", "address": address}, {"type": "Hostname", "address": name}]
    now = format_time(datetime.now(UTC))
    common = {"reason": "Test", "lastTransitionTime": now, "lastHeartbeatTime": now}
    conditions = [{"type": "Ready", "status": "True"}, {"type": "NetworkUnavailable", "status": "True"}]
    status = {"addresses": addresses, "conditions": [condition | common for condition in conditions]}
    await client.patch(NODES, name, {"status": status}, subresource="status")


@asynccontextmanager
async def controllers(kube: Kubernetes) -> AsyncIterator[Process]:
    """kube-controller-manager: podCIDRs, EndpointSlices, Deployments and what else it does by itself."""
    arguments = (
        f"--kubeconfig={kube.admin_config}", "--leader-elect=false", "--allocate-node-cidrs=true",
        "--cluster-cidr=10.244.0.0/16", "--service-cluster-ip-range=10.96.0.0/16", "--node-monitor-period=1s",
        f"--service-account-private-key-file={kube.folder}/accounts.key", f"--root-ca-file={kube.folder}/ca.crt",
        "--use-service-account-credentials=false", "--port=0", "--secure-port=0",
    )  # fmt: skip
    async with _running(Process(kube.folder, "kube-controller-manager", arguments)) as process:
        yield process


@asynccontextmanager
async def scheduler(kube: Kubernetes) -> AsyncIterator[Process]:
    """kube-scheduler."""
    arguments = (f"--kubeconfig={kube.admin_config}", "--leader-elect=false", "--port=0", "--secure-port=0")
    async with _running(Process(kube.folder, "kube-scheduler", arguments)) as process:
        yield process


def kube_proxy(kube: Kubernetes, host: Host) -> Process:
    """kube-proxy on the host, to be started, in its mode iptables. The machine's connection tracker is left as it is."""
    switches = ("max-per-core", "min", "tcp-timeout-established", "tcp-timeout-close-wait")
    arguments = (
        "--proxy-mode=iptables", "--cluster-cidr=10.244.0.0/16", *(f"--conntrack-{name}=0" for name in switches),
        f"--hostname-override={host.name}", f"--kubeconfig={kube.admin_config}",
    )  # fmt: skip
    return Process(kube.folder, "kube-proxy", arguments, host)


@asynccontextmanager
async def _running(process: Process) -> AsyncIterator[Process]:
    await process.start()
    try:
        yield process
    finally:
        await process.end(signal.SIGKILL)
