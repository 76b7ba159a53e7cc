"""Supervising one pod: init containers in order, then all others, each with its keeper; and ending them in order."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from podwire.model.objects import ConfigMap, Container, Pod, Secret
from podwire.model.podruntime import PodEvent, PodNetwork, PodReport
from podwire.runtime.clock import Clock
from podwire.runtime.environment import (
    References,
    command_line,
    config_map_names,
    environment,
    expand,
    secret_names,
)
from podwire.runtime.keeper import ContainerKeeper, KeeperPorts
from podwire.runtime.podfiles import PodFiles, referenced
from podwire.runtime.prober import Prober
from podwire.runtime.probes import probes_of
from podwire.runtime.shim.messages import ContainerRecord, ContainerSpec, StandInPort
from podwire.runtime.shimclient import ShimClient
from podwire.runtime.source import ConfigSource
from podwire.runtime.status import container_status, phase

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NodeContext:
    """What all pods of a node share. `report` and `tell` hand over what the agent is to know."""

    node_name: str
    root: Path
    client: ShimClient
    clock: Clock
    inherited_path: str
    report: Callable[[PodReport], None]
    tell: Callable[[PodEvent], None]


class PodSupervisor:
    """One pod from its start to its end. `records`: the container runs that exist already."""

    def __init__(
        self, node: NodeContext, pod: Pod, network: PodNetwork, source: ConfigSource, records: Sequence[ContainerRecord]
    ) -> None:
        self._node, self.pod, self._network, self._source = node, pod, network, source
        self.files = PodFiles(node.root, pod.metadata.uid)
        self._written = False
        self._terminal = False
        self._references = References()
        address = next(iter(network.ips or network.host_ips), None)
        ports = KeeperPorts(
            client=node.client,
            clock=node.clock,
            prober=Prober(node.client, str(address) if address is not None else "127.0.0.1"),
            specify=self._specify,
            changed=self._changed,
            tell=self._tell,
            pending="PodInitializing" if pod.spec.init_containers else "ContainerCreating",
        )
        spec = pod.spec
        self._init = [self._keeper(c, ports, records, init=True) for c in spec.init_containers]
        self._main = [self._keeper(c, ports, records, init=False) for c in spec.containers]
        self._task: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._stop_at = 0.0
        self._hurry = asyncio.Event()
        self._last_report: PodReport | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(
            _guarded(self._run()), name=f"pod {self.pod.metadata.namespace}/{self.pod.metadata.name}"
        )

    async def close(self) -> None:
        """Let go: nothing is watched any more, everything runs on."""
        for task in (self._task, self._stopping):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    def abandon(self) -> None:
        """Stop supervising at once: there is nothing left."""
        if self._task is not None:
            self._task.cancel()

    async def stop(self, grace_seconds: float) -> None:
        """End all containers; a second call with less grace hurries the first."""
        if self._task is not None:
            self._task.cancel()
        until = self._node.clock.now() + grace_seconds
        if self._stopping is None:
            self._stop_at = until
            self._stopping = asyncio.create_task(self._stop(grace_seconds))
        elif until < self._stop_at:
            self._stop_at = until
            hurried = [keeper.terminate(grace_seconds) for keeper in (*self._main, *self._init)]
            await asyncio.gather(*hurried)
        await asyncio.shield(self._stopping)

    def ended(self, record: ContainerRecord) -> None:
        """Take the news that a container's run has ended."""
        for keeper in (*self._init, *self._main):
            if keeper.container.name == record.name:
                keeper.ended(record)

    def current_report(self) -> PodReport:
        """The pod's state as it is now."""
        init_views = [keeper.view for keeper in self._init]
        views = [keeper.view for keeper in self._main]
        statuses = tuple(container_status(view) for view in views)
        sidecars_ready = all(view.ready for view in init_views if view.sidecar)
        return PodReport(
            uid=self.pod.metadata.uid,
            phase=phase(init_views, views, self.pod.spec.restart_policy, self._terminal),
            ready=bool(statuses) and all(status["ready"] for status in statuses) and sidecars_ready,
            container_statuses=statuses,
            init_container_statuses=tuple(container_status(view) for view in init_views),
        )

    # --- running --------------------------------------------------------------------------------------------------

    def _keeper(
        self, container: Container, ports: KeeperPorts, records: Sequence[ContainerRecord], *, init: bool
    ) -> ContainerKeeper:
        policy = self.pod.spec.restart_policy
        if init:  # an init container that succeeded is not run again
            policy = container.restart_policy or ("Never" if policy == "Never" else "OnFailure")
        own = sorted((record for record in records if record.name == container.name), key=lambda record: record.attempt)
        return ContainerKeeper(container, policy, ports, own, init=init)

    async def _run(self) -> None:
        grace = float(self.pod.spec.termination_grace_period_seconds)
        self._changed()
        async with asyncio.TaskGroup() as group:
            sidecars = []
            for keeper in self._init:
                if keeper.sidecar:
                    sidecars.append(group.create_task(_guarded(keeper.run(grace))))
                    await keeper.started()
                elif await keeper.run(grace) != 0:
                    return  # restartPolicy Never: the pod has failed
            await asyncio.gather(*(_guarded(keeper.run(grace)) for keeper in self._main))
            for task in sidecars:
                task.cancel()
            for keeper in reversed(self._init):
                await keeper.terminate(grace)

    async def _stop(self, grace_seconds: float) -> None:
        self._terminal = True
        if self._task is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        begun = self._node.clock.now()
        for keeper in (*self._main, *self._init):
            if keeper.running is not None:
                self._tell("Normal", "Killing", f"Stopping container {keeper.container.name}", keeper.container.name)
        await asyncio.gather(*(keeper.terminate(grace_seconds) for keeper in self._main))
        for keeper in reversed(self._init):
            await keeper.terminate(max(0.0, begun + grace_seconds - self._node.clock.now()))
        for keeper in (*self._main, *self._init):
            keeper.settle()
        self._changed()

    # --- what keepers ask for ---------------------------------------------------------------------------------------

    async def _specify(self, container: Container, cid: str, attempt: int) -> ContainerSpec:
        pod, network = self.pod, self._network
        volume_maps, volume_secrets = referenced(pod)
        references = References(
            await self._config_maps(volume_maps | config_map_names(container)),
            await self._secrets(volume_secrets | secret_names(container)),
        )
        self.files.write(pod, network, references)
        values = environment(pod, container, network, references, self._node.inherited_path)
        return ContainerSpec(
            uid=pod.metadata.uid,
            cid=cid,
            name=container.name,
            attempt=attempt,
            log=self.files.log_path(container.name, attempt),
            stage=self.files.stage,
            argv=command_line(container, values),
            env=tuple(f"{key}={value}" for key, value in values.items()),
            cwd=expand(container.working_dir, values),
            mounts=self.files.mounts(container),
            ports=stand_in_ports(container),
            node=self._node.node_name,
            completes=any(keeper.container is container and not keeper.sidecar for keeper in self._init),
        )

    async def _config_maps(self, names: set[str]) -> dict[str, ConfigMap]:
        found = {name: await self._source.config_map(self.pod.metadata.namespace, name) for name in sorted(names)}
        return {name: value for name, value in found.items() if value is not None}

    async def _secrets(self, names: set[str]) -> dict[str, Secret]:
        found = {name: await self._source.secret(self.pod.metadata.namespace, name) for name in sorted(names)}
        return {name: value for name, value in found.items() if value is not None}

    def _changed(self) -> None:
        report = self.current_report()
        if report != self._last_report:
            self._last_report = report
            self._node.report(report)

    def _tell(self, kind: str, reason: str, message: str, container: str) -> None:
        self._node.tell(PodEvent(self.pod.metadata.uid, kind, reason, message, container))


def stand_in_ports(container: Container) -> tuple[StandInPort, ...]:
    """Where a stand-in answers: on the declared ports, and on those that probes name by number (a container need not
    declare what it serves)."""
    declared = [StandInPort(port.protocol, port.container_port) for port in container.ports]
    targets = [probe.http_get or probe.tcp_socket for _, probe in probes_of(container)]
    probed = [StandInPort("TCP", target.port) for target in targets if target is not None and isinstance(target.port, int)]
    return tuple(dict.fromkeys(declared + probed))


async def _guarded(keeping: Coroutine[Any, Any, Any]) -> None:
    """A keeper that breaks leaves the pod's other containers alone."""
    try:
        await keeping
    except Exception:  # a task boundary
        _log.exception("a pod or container is no longer supervised")
