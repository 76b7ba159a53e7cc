"""Keeping one container: start, watch, probe, restart, end."""

import asyncio
import contextlib
import json
import secrets
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from podwire.model.errors import PodwireError
from podwire.model.objects import Container, Handler, Probe
from podwire.runtime.backoff import RestartBackoff
from podwire.runtime.clock import Clock
from podwire.runtime.errors import RuntimeFailure
from podwire.runtime.prober import Prober, run_command
from podwire.runtime.probes import ProbeKind, ProbeTracker, probes_of
from podwire.runtime.shim.messages import ContainerRecord, ContainerSpec
from podwire.runtime.shimclient import ShimClient
from podwire.runtime.status import ContainerView, should_restart

EAGER_SECONDS = 0.1
"""A container that was not ready at its first probe is asked again after this time, doubling up to the probe's period."""

_CONFIG_RETRY_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class KeeperPorts:
    """What a keeper needs of its surroundings. `specify(container, cid, attempt)` gives what to run, or raises RuntimeFailure;
    `tell(type, reason, message, container)` makes an event; `changed` is called when the view did. `pending`: why containers
    wait that were not started yet."""

    client: ShimClient
    clock: Clock
    prober: Prober
    specify: Callable[[Container, str, int], Awaitable[ContainerSpec]]
    changed: Callable[[], None]
    tell: Callable[[str, str, str, str], None]
    pending: str


class ContainerKeeper:
    """One container of a pod over all its runs. `records`: the runs that exist already, oldest first."""

    def __init__(
        self, container: Container, policy: str, ports: KeeperPorts, records: list[ContainerRecord], *, init: bool
    ) -> None:
        self.container, self._policy, self._ports, self._init = container, policy, ports, init
        self._current = records[-1] if records else None
        self._previous = records[-2] if len(records) > 1 else None
        self._waiting, self._message = "", ""
        self._ready, self._started = False, asyncio.Event()
        if self._current is not None:  # so that an agent that starts anew does not call it unready for a moment
            self._recall(self._current)
        self._ended: asyncio.Future[ContainerRecord] | None = None
        self._early: ContainerRecord | None = None  # ended before we had heard that it started
        self._grace = 30.0
        started = self._current.started_at if self._current else 0.0
        self._backoff = RestartBackoff.resumed(self._current.attempt if self._current else 0, started)

    @property
    def view(self) -> ContainerView:
        return ContainerView(
            name=self.container.name,
            image=self.container.image,
            current=self._current,
            previous=self._previous,
            waiting=self._waiting or (self._ports.pending if self._current is None else ""),
            message=self._message,
            ready=self._ready,
            started=self._started.is_set(),
            init=self._init,
            sidecar=self.sidecar,
        )

    @property
    def sidecar(self) -> bool:
        """An init container that keeps running beside the others (restartPolicy Always)."""
        return self._init and self.container.restart_policy == "Always"

    @property
    def running(self) -> ContainerRecord | None:
        return self._current if self._current is not None and self._current.running else None

    async def started(self) -> None:
        """Wait until it has started, by its startup probe if there is one."""
        await self._started.wait()

    def ended(self, record: ContainerRecord) -> None:
        """Take the news that a run has ended."""
        if self._current is None or record.cid != self._current.cid:
            self._early = record
            return
        self._current, self._ready = record, self._init and record.exit_code == 0
        self._started.clear()
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(record)
        self._ports.changed()

    async def run(self, grace_seconds: float) -> int:
        """Keep the container as its policy says; returns the exit code when it is over for good."""
        self._grace = grace_seconds
        while True:
            record = self._current
            if record is None:
                record = await self._start(0)
            if record.running:
                record = await self._watch(record)
            if not should_restart(self._policy, record.exit_code):
                return record.exit_code
            await self._hold_back(record)
            self._backoff.restarted(record.finished_at, self._ports.clock.now())
            await self._start(record.attempt + 1)

    def settle(self) -> None:
        """Nothing will be started any more: what ended has ended."""
        if self._current is not None and not self._current.running:
            self._waiting, self._message = "", ""

    async def terminate(self, grace_seconds: float) -> None:
        """preStop, SIGTERM, after the grace SIGKILL; returns when it has ended."""
        record = self.running
        if record is None:
            return
        if self._ended is None or self._ended.done():
            self._ended = asyncio.get_running_loop().create_future()
        ended = self._ended
        try:
            async with asyncio.timeout(max(grace_seconds, 0.001)):
                lifecycle = self.container.lifecycle
                if lifecycle is not None and lifecycle.pre_stop is not None and grace_seconds > 0:
                    with contextlib.suppress(RuntimeFailure, OSError, ValueError):
                        await self._hook(lifecycle.pre_stop, record)
                await self._ports.client.kill(record, signal.SIGTERM)
                await asyncio.shield(ended)
        except TimeoutError:
            await self._ports.client.kill(record, signal.SIGKILL)
            await asyncio.shield(ended)

    # --- starting -------------------------------------------------------------------------------------------------

    async def _start(self, attempt: int) -> ContainerRecord:
        cid = secrets.token_hex(32)
        spec = await self._specify(cid, attempt)
        try:
            record = await self._ports.client.run(spec)
        except RuntimeFailure as error:
            now = self._ports.clock.now()
            record = ContainerRecord(
                uid=spec.uid, cid=cid, name=spec.name, attempt=attempt, log=spec.log, stand_in=not spec.argv, pid=0,
                started_at=now, finished_at=now, exit_code=128, reason="StartError", message=str(error),
            )  # fmt: skip
            self._ports.tell("Warning", "Failed", f"Error: {error}", self.container.name)
        if self._early is not None and self._early.cid == cid:
            record = self._early
        self._early = None
        oldest, self._previous = self._previous, self._current
        self._current, self._waiting, self._message = record, "", ""
        self._ready = False
        self._started.clear()
        if oldest is not None:
            await self._ports.client.forget(oldest)
        if record.pid:
            what = f"stand-in for container {record.name} ({self.container.image})" if record.stand_in else record.name
            self._ports.tell("Normal", "Started", f"Started {what}", record.name)
            await self._post_start(record)
        self._ports.changed()
        return record

    async def _specify(self, cid: str, attempt: int) -> ContainerSpec:
        """What to run; waits for ConfigMaps and Secrets that are not there yet."""
        while True:
            try:
                return await self._ports.specify(self.container, cid, attempt)
            except (
                PodwireError,
                OSError,
            ) as error:  # a reference that is missing, an API server that does not answer, a full disk
                cause = error.reason if isinstance(error, RuntimeFailure) else "CreateContainerConfigError"
                mount = cause == "FailedMount"
                reason, message = ("ContainerCreating", "") if mount else (cause, str(error))
                if (reason, message) != (self._waiting, self._message):
                    self._waiting, self._message = reason, message
                    if mount:  # concerns the pod, not one of its containers
                        self._ports.tell("Warning", "FailedMount", str(error), "")
                    else:
                        self._ports.tell("Warning", "Failed", f"Error: {error}", self.container.name)
                    self._ports.changed()
                await self._ports.clock.sleep(_CONFIG_RETRY_SECONDS)

    async def _post_start(self, record: ContainerRecord) -> None:
        lifecycle = self.container.lifecycle
        if lifecycle is None or lifecycle.post_start is None:
            return
        try:
            await self._hook(lifecycle.post_start, record)
        except (RuntimeFailure, OSError, ValueError) as error:
            self._ports.tell("Warning", "FailedPostStartHook", f"PostStartHook failed: {error}", record.name)
            await self.terminate(self._grace)

    async def _hook(self, handler: Handler, record: ContainerRecord) -> None:
        if handler.sleep is not None:
            await self._ports.clock.sleep(handler.sleep.seconds)
        elif handler.exec is not None and not record.stand_in:
            code, output = await run_command(self._ports.client, record, handler.exec.command)
            if code != 0:
                raise RuntimeFailure(f"command exited with {code}: {output.decode('utf-8', 'replace').strip()}")
        elif handler.http_get is not None:
            result = await self._ports.prober.http_get(self.container, handler.http_get, plain=record.stand_in)
            if not result.success:
                raise RuntimeFailure(result.output)

    async def _hold_back(self, record: ContainerRecord) -> None:
        until = self._backoff.start_at(record.finished_at)
        seconds = until - self._ports.clock.now()
        if seconds <= 0:
            return
        delay = int(self._backoff.delay)
        self._waiting = "CrashLoopBackOff"
        self._message = f"back-off {delay}s restarting failed container={self.container.name}"
        self._ports.tell("Warning", "BackOff", f"Back-off restarting failed container {self.container.name}", record.name)
        self._ports.changed()
        await self._ports.clock.sleep(seconds)

    # --- watching -------------------------------------------------------------------------------------------------

    async def _watch(self, record: ContainerRecord) -> ContainerRecord:
        """Probe until it ends."""
        if self._ended is None or self._ended.done():
            self._ended = asyncio.get_running_loop().create_future()
        ended = self._ended
        if self._current is not None and not self._current.running:
            return self._current  # ended while a hook ran
        self._recall(record)
        self._ports.changed()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._probe(*probe, record)) for probe in probes_of(self.container)]
            final = await asyncio.shield(ended)
            for task in tasks:
                task.cancel()
        return final

    def _recall(self, record: ContainerRecord) -> None:
        """Readiness of a run as it is now: what probes found before, or what holds before the first of them."""
        if not record.running:
            self._ready = self._init and record.exit_code == 0
            return
        kinds = {kind for kind, _ in probes_of(self.container)}
        known = _remembered(record.note)
        if known.get("started", ProbeKind.STARTUP not in kinds):
            self._started.set()
        self._ready = self._started.is_set() and known.get("ready", ProbeKind.READINESS not in kinds)

    async def _probe(self, kind: ProbeKind, probe: Probe, record: ContainerRecord) -> None:
        if kind is ProbeKind.STARTUP and self._started.is_set():
            return
        clock = self._ports.clock
        await clock.sleep(max(0.0, record.started_at + probe.initial_delay_seconds - clock.now()))
        if kind is not ProbeKind.STARTUP:
            await self._started.wait()
        tracker = ProbeTracker(kind, probe, self._ready if kind is ProbeKind.READINESS else None)
        while True:
            result = await self._ports.prober.probe(self.container, probe, record)
            verdict = tracker.feed(result.success)
            if not result.success:
                text = f"{kind.value} probe failed: {result.output}"
                self._ports.tell("Warning", "Unhealthy", text, self.container.name)
            if verdict and await self._act_on(tracker, record):
                return
            period = max(1, probe.period_seconds)
            if kind is ProbeKind.LIVENESS or tracker.passing:
                await clock.sleep(period)
            else:
                await self._until_due(probe, record, period)

    async def _until_due(self, probe: Probe, record: ContainerRecord, period: float) -> None:
        """Wait out the period to the next probe that counts, or until one in between succeeds: a container that is up in
        0.3 s need not wait out 10."""
        clock, delay, spent = self._ports.clock, EAGER_SECONDS, 0.0
        while spent + delay < period:
            await clock.sleep(delay)
            spent += delay
            if (await self._ports.prober.probe(self.container, probe, record)).success:
                return
            delay *= 2
        await clock.sleep(period - spent)

    async def _act_on(self, tracker: ProbeTracker, record: ContainerRecord) -> bool:
        """Do what a verdict asks for; True when this probe has nothing more to do."""
        match tracker.kind:
            case ProbeKind.READINESS:
                if tracker.passing != self._ready:
                    self._ready = tracker.passing
                    await self._remember(record)
                return False
            case ProbeKind.STARTUP if tracker.passing:
                self._started.set()
                if self.container.readiness_probe is None:
                    self._ready = True
                await self._remember(record)
                return True
            case _ if tracker.passing:
                return False
        kind = tracker.kind.value.lower()
        self._ports.tell("Normal", "Killing", f"Container {record.name} failed {kind} probe, will be restarted", record.name)
        await self.terminate(self._grace)
        return True

    async def _remember(self, record: ContainerRecord) -> None:
        """Keep with the container what probes found, so that an agent that starts anew does not call it unready."""
        self._ports.changed()
        note = json.dumps({"ready": self._ready, "started": self._started.is_set()})
        await self._ports.client.note(record, note)


def _remembered(note: str) -> dict[str, bool]:
    try:
        known = json.loads(note) if note else {}
    except ValueError:
        known = {}
    return known if isinstance(known, dict) else {}
