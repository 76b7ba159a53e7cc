"""One pod on its node, from binding to deletion: address, sandbox, link, host ports, containers, status; and all back again.

The order is what makes a crash harmless at any point: an address is on disk before a link has it, and free only after the
link is gone; the object leaves the API last. Each step can be done again.
"""

import asyncio
import logging
import sqlite3
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from random import Random

import msgspec

from podwire.agent.config import AgentConfig
from podwire.agent.plumbing import Plumbing
from podwire.agent.podstatus import FINISHED, SANDBOX_LOST, rejection_patch, status_patch, without_times
from podwire.agent.ports import ConfigSource, PodRuntime
from podwire.agent.reservations import Owner, Reservations
from podwire.client.api import ApiClient
from podwire.client.backoff import Backoff
from podwire.client.errors import Conflict, NotFound
from podwire.client.events import EventRecorder
from podwire.model.addr import IPAddress
from podwire.model.errors import PodwireError
from podwire.model.meta import Json
from podwire.model.objects import Pod, PodIP
from podwire.model.podruntime import PodEvent, PodNetwork, PodReport
from podwire.model.resources import PODS
from podwire.model.timestamps import format_time
from podwire.plan.node import NodeNetwork

log = logging.getLogger(__name__)

_RETRIED = (PodwireError, sqlite3.Error, OSError)
"""What a step may fail with for reasons that pass."""


STARTING_SECONDS = 0.02
"""How long a first report that a pod is not ready is held back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PodEnvironment:
    """What the workers of a node share. `network` is done when the node has its subnets and its own links;
    `set_host_ports(uid, pod)` tells the Services' planner (None: gone)."""

    config: AgentConfig
    client: ApiClient
    runtime: PodRuntime
    plumbing: Plumbing
    reservations: Reservations
    source: ConfigSource
    events: EventRecorder
    network: asyncio.Future[NodeNetwork]
    set_host_ports: Callable[[str, Pod | None], None]
    clock: Callable[[], datetime]
    rng: Random


class PodWorker:
    """`run` is one task; `update`, `gone` and `report` tell it what changed."""

    def __init__(self, env: PodEnvironment, pod: Pod) -> None:
        self._env = env
        self.pod = pod
        self._in_api = True
        self._report: PodReport | None = None
        self._written: Json | None = None
        self._ips: tuple[IPAddress, ...] = ()
        self._changed = asyncio.Event()

    @property
    def uid(self) -> str:
        return self.pod.metadata.uid

    def update(self, pod: Pod) -> None:
        contradicted = self.pod.ready and not pod.ready and self._report is not None and self._report.ready
        self.pod = pod
        if contradicted:  # somebody took this node for dead; what was written does not stand any more
            self._written = None
        if contradicted or pod.metadata.deletion_timestamp:
            self._changed.set()

    def gone(self) -> None:
        """The object is no longer in the API (deleted by force): end the pod at once."""
        self._in_api = False
        self._changed.set()

    def report(self, report: PodReport) -> None:
        self._report = report
        self._changed.set()

    def event(self, event: PodEvent) -> None:
        self._env.events.record(PODS, self.pod.metadata, event.type, event.reason, event.message)

    async def run(self) -> None:
        """Returns when nothing is left of the pod, neither here nor in the API."""
        # Until the node has been adopted, what an earlier agent left must not change under the adoption's feet.
        await asyncio.shield(self._env.network)
        if self.pod.finished:
            await self._persist("giving up the network of a finished pod", self._release_network)
        else:
            await self._bring_up()
        await self._follow()
        await self._take_down()

    async def reject(self, reason: str, message: str) -> None:
        """The node does not take this pod: say so and wait until it is deleted."""
        self._env.events.record(PODS, self.pod.metadata, "Warning", reason, message)
        patch = rejection_patch(reason, message)
        await self._persist("rejecting the pod", lambda: self._patch_status(patch))
        while not self._leaving:
            await self._next_change()
        await self._take_down()

    # --- up -------------------------------------------------------------------------------------------------------

    @property
    def _leaving(self) -> bool:
        return not self._in_api or self.pod.metadata.deletion_timestamp is not None

    async def _bring_up(self) -> None:
        backoff = Backoff(self._env.rng, initial=0.1, maximum=30.0)
        while not self._leaving:
            try:
                await self._start()
            except _RETRIED as error:
                delay = backoff.next()
                log.warning("pod %s cannot be started: %s; again in %.2f s", self.pod.key, error, delay)
                self._env.events.record(PODS, self.pod.metadata, "Warning", "FailedCreatePodSandBox", str(error))
                await self._next_change(delay)
            else:
                return

    async def _start(self) -> None:
        env, pod = self._env, self.pod
        network = await asyncio.shield(env.network)
        if pod.spec.host_network:
            await env.runtime.create_sandbox(pod)
            self._ips = env.config.node_ips
        else:
            owner = Owner(self.uid, pod.metadata.namespace, pod.metadata.name)
            self._ips = await env.reservations.reserve(owner, network.pod_cidrs, env.clock())
            sandbox = await env.runtime.create_sandbox(pod)
            if self.uid not in env.plumbing.pods:
                attachment = network.attachment(self.uid, pod.metadata.namespace, pod.metadata.name, self._ips)
                await env.plumbing.plumb(attachment, sandbox.netns)
            env.set_host_ports(self.uid, with_ips(pod, self._ips))
        pod_network = PodNetwork(
            ips=self._ips,
            host_ips=env.config.node_ips,
            nameservers=env.config.nameservers,
            cluster_domain=env.config.cluster_domain,
        )
        await env.runtime.start(pod, pod_network, env.source)

    # --- running --------------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        """Carry reports to the API until the pod has to go."""
        while not self._leaving:
            if self._sandbox_lost:
                await self._rebuild()
            await self._await_start()
            delay = await self._settle()
            if not self._leaving:
                await self._next_change(delay)

    async def _await_start(self) -> None:
        """Most pods run a few milliseconds after their first report. Telling that alone saves a write, and with it a change
        of the endpoints on every node."""
        if self._written is None and self._report is not None and not self._report.ready:
            await self._next_change(STARTING_SECONDS)

    @property
    def _sandbox_lost(self) -> bool:
        """Whether the pod is to be built anew because somebody killed its pause process (and the kernel all of its own)."""
        report = self._report
        return report is not None and report.reason == SANDBOX_LOST and self.pod.spec.restart_policy != "Never"

    async def _rebuild(self) -> None:
        """A new sandbox at the same addresses."""
        message = "Pod sandbox changed, it will be killed and re-created."
        self._env.events.record(PODS, self.pod.metadata, "Normal", "SandboxChanged", message)
        self._report = None
        await self._persist("removing what is left of its sandbox", lambda: self._env.runtime.remove(self.uid))
        if self.uid in self._env.plumbing.pods:
            await self._persist("removing its link", lambda: self._env.plumbing.unplumb(self.uid))
        await self._bring_up()

    async def _settle(self) -> float | None:
        """Write what the latest report says, if that is new. Returns after how many seconds to try again; None: it is done."""
        report = self._report
        if report is None:
            return None
        try:
            await self._write_status(report)
            if report.phase in FINISHED:
                await self._release_network()
        except (NotFound, Conflict):
            return None  # it is gone; the watch will say so
        except _RETRIED as error:
            log.warning("pod %s: %s; again in 0.5 s", self.pod.key, error)
            return 0.5
        return None

    async def _write_status(self, report: PodReport) -> None:
        env = self._env
        now = format_time(env.clock())
        patch = status_patch(self.pod, report, self._ips, env.config.node_ips, now)
        essence = without_times(patch)
        if essence == self._written:
            return
        if self._written is None and not self.pod.status.pod_ip:
            patch["status"]["startTime"] = now
        await self._patch_status(patch)
        self._written = essence

    async def _patch_status(self, patch: Json) -> None:
        """Raises NotFound where the pod is gone, Conflict where another of its name is there."""
        if self._in_api:
            meta = self.pod.metadata
            mine = {"metadata": {"uid": meta.uid}, **patch}
            await self._env.client.patch(PODS, meta.name, mine, meta.namespace, subresource="status")

    # --- down -----------------------------------------------------------------------------------------------------

    async def _take_down(self) -> None:
        await self._persist("stopping its containers", self._stop)
        await self._persist("giving up its network", self._release_network)
        await self._persist("removing its sandbox", lambda: self._env.runtime.remove(self.uid))
        await self._persist("deleting it from the API", self._delete)

    async def _stop(self) -> None:
        """End the containers within the grace; a grace that is shortened meanwhile counts."""
        grace = self._grace()
        stopping = asyncio.ensure_future(self._env.runtime.stop(self.uid, grace))
        try:
            while not stopping.done():
                changed = asyncio.ensure_future(self._changed.wait())
                try:
                    await asyncio.wait((stopping, changed), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    changed.cancel()
                if stopping.done():
                    break
                self._changed.clear()
                await self._settle()
                if self._grace() < grace:
                    grace = self._grace()
                    await self._env.runtime.stop(self.uid, grace)
            await stopping
        finally:
            stopping.cancel()

    def _grace(self) -> int:
        if not self._in_api:
            return 0
        asked = self.pod.metadata.deletion_grace_period_seconds
        return self.pod.spec.termination_grace_period_seconds if asked is None else asked

    async def _release_network(self) -> None:
        env = self._env
        env.set_host_ports(self.uid, None)
        if self.pod.spec.host_network:
            return
        if self.uid in env.plumbing.pods or env.reservations.of(self.uid):
            await env.plumbing.unplumb(self.uid)
            await env.reservations.release(self.uid)

    async def _delete(self) -> None:
        if not self._in_api:
            return
        meta = self.pod.metadata
        try:
            await self._env.client.delete(PODS, meta.name, meta.namespace, grace_period_seconds=0, uid=meta.uid)
        except (NotFound, Conflict):
            log.debug("pod %s was deleted by someone else", self.pod.key)

    # --- waiting --------------------------------------------------------------------------------------------------

    async def _persist(self, what: str, step: Callable[[], Awaitable[None]]) -> None:
        """Do `step` until it succeeds: nothing may be left behind because it failed once."""
        backoff = Backoff(self._env.rng, initial=0.1, maximum=30.0)
        while True:
            try:
                await step()
            except (NotFound, Conflict):
                return  # the object is gone from the API
            except _RETRIED as error:
                delay = backoff.next()
                log.warning("pod %s: %s failed: %s; again in %.2f s", self.pod.key, what, error, delay)
                await asyncio.sleep(delay)
            else:
                return

    async def _next_change(self, at_most: float | None = None) -> None:
        try:
            async with asyncio.timeout(at_most):
                await self._changed.wait()
        except TimeoutError:
            return
        self._changed.clear()


def with_ips(pod: Pod, ips: tuple[IPAddress, ...]) -> Pod:
    """The pod as it will look when its status is written."""
    texts = tuple(PodIP(ip=str(ip)) for ip in ips)
    status = msgspec.structs.replace(pod.status, pod_ip=texts[0].ip if texts else "", pod_ips=texts)
    return msgspec.structs.replace(pod, status=status)
