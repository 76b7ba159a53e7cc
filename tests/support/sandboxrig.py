"""Pods' sandboxes on a host as an engine makes them: a namespace, and the CNI plugin executed for it."""

import asyncio
import json
import os
import socket
import subprocess
import threading
from pathlib import Path

from hostrig import Host, http_get

from podwire.kernel.netns import create_netns, run_in_netns
from podwire.model.meta import Json

PLUGIN = Path(__file__).parents[2] / "src/podwire/cni/plugin.py"


class Container:
    """A pod's sandbox as the kubelet's runtime makes it."""

    def __init__(self, host: Host, name: str) -> None:
        self.host, self.name, self.netns = host, name, create_netns()

    def cni(self, command: str) -> Json:
        """Execute the plugin. Raises nothing: an error is its document."""
        environment = {
            "PATH": os.environ["PATH"], "CNI_COMMAND": command, "CNI_CONTAINERID": self.name, "CNI_IFNAME": "eth0",
            "CNI_NETNS": f"/proc/{os.getpid()}/fd/{self.netns}", "PODWIRE_CNI_SOCKET": str(self.host.cni_socket),
            "CNI_ARGS": f"IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME={self.name};K8S_POD_UID=u-{self.name}",
        }  # fmt: skip
        config = json.dumps({"cniVersion": "1.0.0", "name": "podwire", "type": "podwire"})
        done = subprocess.run(
            ["python3", "-IS", str(PLUGIN)],
            input=config,
            env=environment,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        document: Json = json.loads(done.stdout or "{}")
        assert done.returncode == 0, document
        return document

    def add(self) -> str:
        self.ip = str(self.cni("ADD")["ips"][0]["address"]).partition("/")[0]
        return self.ip

    def delete(self) -> None:
        """DEL, and the namespace goes too."""
        self.cni("DEL")
        os.close(self.netns)

    def fetch(self, address: str, port: int) -> str:
        return str(run_in_netns(self.netns, lambda: http_get(address, port)))

    async def word_of(self, address: str, port: int = 80, *, within: float = 10.0) -> str:
        """What answers there, as soon as something does: the body."""
        async with asyncio.timeout(within):
            while True:
                word = (await asyncio.to_thread(self.fetch, address, port)).rpartition("\r\n\r\n")[2]
                if word:
                    return word
                await asyncio.sleep(0.02)

    def serve(self, word: str) -> socket.socket:
        return serve_word(self.netns, word)


def serve_word(netns: int, word: str, address: str = "", port: int = 80) -> socket.socket:
    """Listen there, and answer every connection with `word` from a thread that ends with the socket."""
    listener = run_in_netns(netns, lambda: socket.create_server((address, port)))

    def answer() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(4096)
                connection.sendall(f"HTTP/1.0 200 OK\r\n\r\n{word}".encode())

    threading.Thread(target=answer, daemon=True).start()
    return listener


def end_listener(listener: socket.socket) -> None:
    """Its thread ends too."""
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


async def start_cluster_agent(host: Host, kubeconfig: Path, *arguments: str, service_cidr: str = "10.96.0.0/16") -> None:
    """`podwire cluster-agent` for the node of the host's name."""
    await host.start(
        "cluster-agent", "--node-name", host.name, "--kubeconfig", str(kubeconfig), "--cluster-cidr", "10.244.0.0/16",
        "--service-cidr", service_cidr, "--state-dir", str(host.state), "--cni-socket", str(host.cni_socket), *arguments,
    )  # fmt: skip


async def cni_ready(host: Host) -> None:
    """Returns once an agent says there that it can attach containers."""
    environment = {"PATH": os.environ["PATH"], "CNI_COMMAND": "STATUS", "PODWIRE_CNI_SOCKET": str(host.cni_socket)}
    config = json.dumps({"cniVersion": "1.1.0", "name": "podwire", "type": "podwire"}).encode()

    def ask() -> bool:
        command = ["python3", "-IS", str(PLUGIN)]
        return not subprocess.run(command, input=config, env=environment, capture_output=True, check=False).returncode

    async with asyncio.timeout(20):
        while not await asyncio.to_thread(ask):  # noqa: ASYNC110 - another process gets ready
            await asyncio.sleep(0.05)
