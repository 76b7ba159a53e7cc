"""The pods of the node: one worker each, and what is left over from pods that are no more."""

import asyncio
import logging
from collections.abc import Iterator

from podwire.agent.admission import refuse
from podwire.agent.mirrorpod import mirror_uid
from podwire.agent.podworker import PodEnvironment, PodWorker, with_ips
from podwire.client.backoff import Backoff
from podwire.client.informer import Change, Informer
from podwire.model.cni import CNI_UID
from podwire.model.errors import PodwireError
from podwire.model.objects import Pod
from podwire.model.podruntime import PodEvent, PodReport, Sandbox
from podwire.plan.node import NodeNetwork
from podwire.plan.podlinks import PodAttachment

log = logging.getLogger(__name__)

ORPHAN_GRACE_SECONDS = 2


class Pods:
    """Starts a worker for every pod that is bound to the node, and tells it what happens to its pod.

    Workers are tasks of `group`."""

    def __init__(self, env: PodEnvironment, informer: Informer[Pod], group: asyncio.TaskGroup) -> None:
        self._env, self._informer, self._group = env, informer, group
        self._workers: dict[str, PodWorker] = {}
        self._reports: dict[str, PodReport] = {}
        if not env.config.guest:
            informer.subscribe(self._changed)

    def _changed(self, change: Change[Pod]) -> None:
        if mirror_uid(change.object):
            return  # it only shows what an engine runs
        pod = change.new
        if pod is None:
            worker = self._workers.get(change.object.metadata.uid)
            if worker:
                worker.gone()
            return
        worker = self._workers.get(pod.metadata.uid)
        if worker is None:
            worker = self._workers[pod.metadata.uid] = PodWorker(self._env, pod)
            if pod.metadata.uid in self._reports:
                worker.report(self._reports.pop(pod.metadata.uid))
            self._group.create_task(self._work(worker), name=f"pod {pod.key}")
        else:
            worker.update(pod)

    async def _work(self, worker: PodWorker) -> None:
        backoff = Backoff(self._env.rng, initial=1.0, maximum=60.0)
        try:
            while True:
                try:
                    await self._admit_and_run(worker)
                except Exception:
                    # A task boundary: a fault in one pod's handling must not take the node's other pods with it.
                    delay = backoff.next()
                    log.exception("pod %s: its worker failed; starting it again in %.1f s", worker.pod.key, delay)
                    await asyncio.sleep(delay)
                else:
                    return
        finally:
            self._workers.pop(worker.uid, None)

    async def _admit_and_run(self, worker: PodWorker) -> None:
        known = worker.pod.status.phase or "Pending"
        if known == "Pending" and not worker.pod.metadata.deletion_timestamp:
            rejection = refuse(worker.pod, self._others(worker), self._env.config.max_pods)
            if rejection:
                await worker.reject(*rejection)
                return
        await worker.run()

    def _others(self, worker: PodWorker) -> Iterator[Pod]:
        """The pods taken before this one: those that run already, and of the others those whose worker was made earlier."""
        earlier = True
        for other in self._workers.values():
            if other is worker:
                earlier = False
            elif other.pod.status.phase == "Running" or (earlier and not other.pod.finished):
                yield other.pod

    # --- reports --------------------------------------------------------------------------------------------------

    async def follow_reports(self) -> None:
        """Hand the runtime's reports to the workers until cancelled."""
        async for report in self._env.runtime.reports():
            worker = self._workers.get(report.uid)
            match report:
                case PodReport() if worker:
                    worker.report(report)
                case PodReport() if not self._informer.has_synced:
                    self._reports[report.uid] = report
                case PodEvent() if worker:
                    worker.event(report)

    # --- taking over ----------------------------------------------------------------------------------------------

    async def adoptable(self, network: NodeNetwork) -> list[tuple[PodAttachment, str]]:
        """The pods that run already and go on, with the path of their namespace. Needs the informer to be synced."""
        found: list[tuple[PodAttachment, str]] = []
        for sandbox in await self._env.runtime.sandboxes():
            pod = self._pod(sandbox.uid)
            ips = self._env.reservations.of(sandbox.uid)
            if pod is None or pod.finished or not ips:
                continue
            try:
                attachment = network.attachment(sandbox.uid, sandbox.namespace, sandbox.name, ips)
            except ValueError:
                continue  # the node has another subnet now; the worker gives it a new address
            found.append((attachment, sandbox.netns))
            self._env.set_host_ports(sandbox.uid, with_ips(pod, ips))
        return found

    async def clean_up(self) -> None:
        """End what belongs to pods that are no longer in the API, and free what no sandbox has any more. Call it when the
        node has been adopted: links of such pods are gone then."""
        sandboxes = {sandbox.uid: sandbox for sandbox in await self._env.runtime.sandboxes()}
        for uid in {reservation.uid for reservation in self._env.reservations.all()}:
            if uid not in sandboxes and self._pod(uid) is None and not uid.startswith(CNI_UID):
                log.info("freeing the address of pod %s, which is no more", uid)
                await self._env.reservations.release(uid)
        for sandbox in sandboxes.values():
            if self._pod(sandbox.uid) is None:
                self._group.create_task(self._end_orphan(sandbox), name=f"orphan {sandbox.uid}")

    async def _end_orphan(self, sandbox: Sandbox) -> None:
        backoff = Backoff(self._env.rng, initial=0.1, maximum=30.0)
        while True:
            try:
                await self._env.runtime.stop(sandbox.uid, ORPHAN_GRACE_SECONDS)
                await self._env.runtime.remove(sandbox.uid)
                await self._env.reservations.release(sandbox.uid)
            except PodwireError as error:
                delay = backoff.next()
                log.warning("pod %s/%s, deleted while the agent was away: %s", sandbox.namespace, sandbox.name, error)
                await asyncio.sleep(delay)
            else:
                log.info("ended pod %s/%s, deleted while the agent was away", sandbox.namespace, sandbox.name)
                return

    def _pod(self, uid: str) -> Pod | None:
        worker = self._workers.get(uid)
        return worker.pod if worker else None
