"""The pod runtime of one node: pods as processes, by way of the shim."""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from podwire.model.objects import Pod
from podwire.model.podruntime import PodEvent, PodNetwork, PodReport, Sandbox
from podwire.runtime.clock import Clock, SystemClock
from podwire.runtime.errors import RuntimeFailure
from podwire.runtime.podfiles import PodFiles
from podwire.runtime.shim.messages import ContainerRecord, SandboxSpec
from podwire.runtime.shimclient import ShimClient
from podwire.runtime.source import ConfigSource
from podwire.runtime.supervisor import NodeContext, PodSupervisor

_log = logging.getLogger(__name__)
_MAX_EVENTS = 1000


@dataclass(slots=True)
class _Entry:
    """A pod that has a sandbox. `records` by container id."""

    spec: SandboxSpec
    pid: int
    records: dict[str, ContainerRecord] = field(default_factory=dict)
    supervisor: PodSupervisor | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def sandbox(self) -> Sandbox:
        return Sandbox(self.spec.uid, self.spec.namespace, self.spec.name, self.pid, f"/proc/{self.pid}/ns/net")


class NodeRuntime:
    """Implements the agent's PodRuntime over the shim at `shim_socket`.

    `netns`: a path to the node's network namespace (probes start there, hostNetwork pods live there). `root`: a directory
    of this node's own for the pods' files and logs. Connects on first use.
    """

    def __init__(self, node_name: str, *, shim_socket: Path, netns: str, root: Path, clock: Clock | None = None) -> None:
        self.node_name = node_name
        self._shim_socket, self._netns = shim_socket, netns
        self._entries: dict[str, _Entry] = {}
        self._client = ShimClient(self._container_changed, self._sandbox_gone, self._shim_lost)
        self._connecting = asyncio.Lock()
        self._connected = False
        self._reports: dict[str, PodReport] = {}
        self._dirty: dict[str, None] = {}  # uids in the order in which they changed
        self._events: deque[PodEvent] = deque(maxlen=_MAX_EVENTS)
        self._news = asyncio.Event()
        self._node = NodeContext(
            node_name=node_name,
            root=root,
            client=self._client,
            clock=clock or SystemClock(),
            inherited_path=os.environ.get("PATH", ""),
            report=self._report,
            tell=self._tell,
        )

    # --- PodRuntime -----------------------------------------------------------------------------------------------

    async def sandboxes(self) -> tuple[Sandbox, ...]:
        """All of this node, also those made before; pods' files that no sandbox belongs to are deleted."""
        await self.connect()
        return tuple(entry.sandbox for entry in self._entries.values())

    async def create_sandbox(self, pod: Pod) -> Sandbox:
        """Raises RuntimeFailure (FailedCreatePodSandBox) where the machine does not let us."""
        await self.connect()
        entry = self._entries.get(pod.metadata.uid)
        if entry is None:
            host = pod.spec.host_network
            spec = SandboxSpec(
                uid=pod.metadata.uid,
                namespace=pod.metadata.namespace,
                name=pod.metadata.name,
                hostname=self.node_name if host else pod.spec.hostname or pod.metadata.name,
                host_network=host,
                share_pids=pod.spec.share_process_namespace,
            )
            pid = await self._client.sandbox(spec)
            entry = self._entries.setdefault(spec.uid, _Entry(spec, pid))
        return entry.sandbox

    async def start(self, pod: Pod, network: PodNetwork, source: ConfigSource) -> None:
        """Needs a sandbox; a repeat for a pod that is supervised already changes nothing."""
        entry = self._entries.get(pod.metadata.uid)
        if entry is None:
            raise RuntimeFailure(f"pod {pod.metadata.namespace}/{pod.metadata.name} has no sandbox to start in")
        if entry.supervisor is None:
            entry.supervisor = PodSupervisor(self._node, pod, network, source, tuple(entry.records.values()))
            entry.supervisor.start()

    async def stop(self, uid: str, grace_seconds: int) -> None:
        await self.connect()
        entry = self._entries.get(uid)
        if entry is None:
            return
        if entry.supervisor is not None:
            await entry.supervisor.stop(grace_seconds)
        else:
            await self._stop_unsupervised(entry, grace_seconds)

    async def remove(self, uid: str) -> None:
        await self.connect()
        entry = self._entries.get(uid)
        if entry is not None and entry.supervisor is not None:
            await entry.supervisor.close()
        if entry is not None:
            await self._client.remove(uid)
        self._entries.pop(uid, None)
        self._reports.pop(uid, None)
        self._dirty.pop(uid, None)
        await asyncio.to_thread(PodFiles(self._node.root, uid).remove)

    async def reports(self) -> AsyncIterator[PodReport | PodEvent]:
        """One consumer at a time: states are coalesced, events are not (beyond 1000 unread the oldest go)."""
        self._dirty.update(dict.fromkeys(self._reports))
        while True:
            while self._events or self._dirty:
                if self._events:
                    yield self._events.popleft()
                    continue
                uid = next(iter(self._dirty))
                del self._dirty[uid]
                if uid in self._reports:
                    yield self._reports[uid]
            self._news.clear()
            await self._news.wait()

    async def close(self) -> None:
        for entry in self._entries.values():
            if entry.supervisor is not None:
                await entry.supervisor.close()
        self._client.close()

    # --- for the node's HTTPS server --------------------------------------------------------------------------------

    @property
    def client(self) -> ShimClient:
        return self._client

    def pods(self) -> Iterator[tuple[SandboxSpec, PodReport | None]]:
        """Every pod with a sandbox, and its latest state if it is supervised."""
        for uid, entry in self._entries.items():
            yield entry.spec, self._reports.get(uid)

    def run_of(self, namespace: str, pod: str, container: str, *, previous: bool = False) -> ContainerRecord | None:
        """A container's latest run (or the one before): None if the pod runs here but the container has none.

        Raises KeyError if there is no such pod on this node."""
        entry = self.entry_of(namespace, pod)
        runs = sorted((r for r in entry.records.values() if r.name == container), key=lambda record: record.attempt)
        return runs[-1 - previous] if len(runs) > previous else None

    def entry_of(self, namespace: str, pod: str) -> _Entry:
        for entry in self._entries.values():
            if (entry.spec.namespace, entry.spec.name) == (namespace, pod):
                return entry
        raise KeyError(f"{namespace}/{pod}")

    def waiting_reason(self, namespace: str, pod: str, container: str) -> str | None:
        """Why a container has no run, in kubelet's words; None if the pod has no such container."""
        report = self._reports.get(self.entry_of(namespace, pod).spec.uid)
        if report is None:
            return "ContainerCreating"
        for status in (*report.init_container_statuses, *report.container_statuses):
            if status["name"] == container:
                state = status["state"]
                return str(state.get("waiting", state.get("terminated", {})).get("reason", "ContainerCreating"))
        return None

    def latest(self, record: ContainerRecord) -> ContainerRecord:
        """The same run as it stands now."""
        entry = self._entries.get(record.uid)
        return entry.records.get(record.cid, record) if entry else record

    # --- within ---------------------------------------------------------------------------------------------------

    async def connect(self) -> None:
        """Join the shim and learn what runs; once. Raises RuntimeFailure if it does not answer."""
        async with self._connecting:
            if self._connected:
                return
            found, records = await self._client.connect(self._shim_socket, self.node_name, self._netns)
            for spec, pid in found:
                self._entries[spec.uid] = _Entry(spec, pid)
            for record in records:
                if record.uid in self._entries:
                    self._entries[record.uid].records[record.cid] = record
            self._connected = True
            self._delete_leftovers()

    def _delete_leftovers(self) -> None:
        pods = self._node.root / "pods"
        with contextlib.suppress(FileNotFoundError):
            for directory in pods.iterdir():
                if directory.name not in self._entries:
                    shutil.rmtree(directory, ignore_errors=True)

    async def _stop_unsupervised(self, entry: _Entry, grace_seconds: int) -> None:
        """Pods of which we know no more than that they run: SIGTERM, after the grace SIGKILL."""
        for number, seconds in ((signal.SIGTERM, float(grace_seconds)), (signal.SIGKILL, None)):
            running = [record for record in entry.records.values() if record.running]
            for record in running:
                await self._client.kill(record, number)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    while any(record.running for record in entry.records.values()):
                        entry.changed.clear()
                        await entry.changed.wait()

    def _container_changed(self, record: ContainerRecord) -> None:
        entry = self._entries.get(record.uid)
        if entry is None:
            return
        entry.records[record.cid] = record
        outdated = [r for r in entry.records.values() if r.name == record.name and r.attempt < record.attempt - 1]
        for old in outdated:
            del entry.records[old.cid]
            for path in (old.log, f"{old.log}.1"):
                Path(path).unlink(missing_ok=True)
        entry.changed.set()
        if entry.supervisor is not None and not record.running:
            entry.supervisor.ended(record)

    def _sandbox_gone(self, uid: str) -> None:
        """Somebody killed the pause process, and the kernel thereby all of the pod."""
        entry = self._entries.pop(uid, None)
        if entry is None:
            return
        message = f"the sandbox of pod {entry.spec.namespace}/{entry.spec.name} was killed from outside"
        _log.warning("%s", message)
        if entry.supervisor is not None:
            entry.supervisor.abandon()
        self._report(PodReport(uid, phase="Failed", ready=False, reason="SandboxLost", message=message))

    def _shim_lost(self) -> None:
        _log.error("the shim has ended: all pods of node %s are gone", self.node_name)
        self._connected = False
        for uid in tuple(self._entries):
            self._sandbox_gone(uid)

    def _report(self, report: PodReport) -> None:
        self._reports[report.uid] = report
        self._dirty[report.uid] = None
        self._news.set()

    def _tell(self, event: PodEvent) -> None:
        self._events.append(event)
        self._news.set()
