"""All bad days of a node at once: the whole agent, which is killed (SIGKILL) again and again, and an engine that executes the
plugin and repeats, reorders and drops its DELs, while the API server goes away and the clock is set. Nothing is left of it.

Run as a program in a user and network namespace of its own: `python cnistorm.py storm|fulldisk DIRECTORY [ROUNDS [SEED]]`.
"""

import asyncio
import json
import os
import pickle
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cnicrash import Host, in_child
from cnirig import config, environment
from siterig import underlay

from podwire.agent.config import AgentConfig
from podwire.agent.guest import NoRuntime
from podwire.agent.node import NodeAgent
from podwire.client.api import ApiClient
from podwire.cni.install import install_plugin
from podwire.kernel import syscalls
from podwire.kernel.linux import LinuxKernel
from podwire.model.cni import IO_FAILURE, TRY_LATER
from podwire.model.nft import Ruleset
from podwire.model.resources import NODES, PODS
from podwire.plan.naming import NFT_TABLE
from podwire.testing.memorycluster import CLUSTER, DUAL, SERVICES, memory_cluster, node_address

AT_A_TIME = 4
BATCHES = 8
READY_SECONDS = 20.0
DISK = "3m"
LIMITS = {"ingressRate": 10_000_000, "ingressBurst": 1_000_000, "egressRate": 10_000_000, "egressBurst": 1_000_000}
STATE_FILES = {"agent.lock", "reservations.db", "reservations.db-wal", "reservations.db-shm"}


# --- processes: the API server, and one agent after the other -----------------------------------------------------


def fork(work: Callable[[], Any]) -> int:
    """A process that runs the coroutine of `work`, until it is killed; with this one at the latest."""
    pid = os.fork()
    if pid == 0:
        try:
            syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
            asyncio.run(work())
        finally:
            os._exit(1)
    return pid


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


async def serve_api(directory: Path, netns: int, told: int) -> None:
    """The API server, and the wire to which the node is plugged. SIGUSR1: away; SIGUSR2: back again."""
    loop = asyncio.get_running_loop()
    away, back = asyncio.Event(), asyncio.Event()
    loop.add_signal_handler(signal.SIGUSR1, away.set)
    loop.add_signal_handler(signal.SIGUSR2, back.set)
    await underlay([(1, netns)])
    async with memory_cluster(directory) as cluster:
        cidrs = ["10.244.1.0/24", "fd00:10:244:1::/64"]
        node = {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": "n1"},
            "spec": {"podCIDR": cidrs[0], "podCIDRs": cidrs},
        }
        await cluster.client.create(NODES, node)
        os.write(told, cluster.url.encode())
        os.close(told)
        while True:
            await away.wait()
            away.clear()
            async with cluster.outage():
                await back.wait()
                back.clear()


@dataclass
class Node:
    """The machine: what outlives agents."""

    host: Host
    url: str

    @property
    def directory(self) -> Path:
        return self.host.directory

    @property
    def state(self) -> Path:
        return self.directory / "n1"

    @property
    def socket(self) -> Path:
        return self.directory / "cni.sock"

    def agent(self, kernel: LinuxKernel, client: ApiClient) -> NodeAgent:
        config = AgentConfig(
            node_name="n1",
            node_ips=tuple(node_address(1, family) for family in DUAL),
            cluster_cidrs=tuple(CLUSTER[family] for family in DUAL),
            service_cidrs=tuple(SERVICES[family] for family in DUAL),
            state_dir=self.state,
            cni_socket=self.socket,
            mirror=True,
            heartbeat_seconds=0.5,
            patience_seconds=0.1,
        )
        return NodeAgent(config, kernel, client, NoRuntime(), self._clock)

    async def serve(self) -> None:
        kernel = LinuxKernel(self.host.netns)
        async with ApiClient(self.url) as client:
            await self.agent(kernel, client).run()

    def set_clock(self, hours: float) -> None:
        (self.directory / "clock").write_text(str(hours))

    def _clock(self) -> datetime:
        return datetime.now(UTC) + timedelta(hours=float((self.directory / "clock").read_text()))

    def serves(self, seconds: float) -> bool:
        """Whether an agent answers on the socket, within so long."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
                probe.connect(str(self.socket))
                return True
            time.sleep(0.01)
        return False


def make_node(directory: Path) -> tuple[Node, int]:
    """A machine, and the process of its API server."""
    host = Host(directory)
    reading, writing = os.pipe()
    api = fork(lambda: serve_api(directory, host.netns, writing))
    os.close(writing)
    node = Node(host, os.read(reading, 100).decode())
    os.close(reading)
    node.set_clock(0)
    return node, api


# --- the engine ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    verb: str
    name: str
    more: dict[str, Any] = field(default_factory=dict)


@dataclass
class Outcome:
    call: Call
    status: int
    document: Any

    @property
    def code(self) -> int:
        return int(self.document["code"]) if self.status else 0

    def __str__(self) -> str:
        return f"{self.call.verb} of {self.call.name}: {self.status} {self.document}"


class Engine:
    """Executes the plugin, some at a time."""

    def __init__(self, node: Node) -> None:
        self.node = node
        install_plugin(node.directory / "bin", node.socket)

    def call(self, verb: str, name: str, **more: Any) -> Outcome:
        return self.calls([Call(verb, name, more)])[0]

    def calls(self, calls: Iterable[Call]) -> list[Outcome]:
        running = [(call, self._start(call)) for call in calls]
        outcomes: list[Outcome] = []
        for call, process in running:
            out, _ = process.communicate()
            outcomes.append(Outcome(call, process.returncode, json.loads(out) if out else None))
        return outcomes

    def _start(self, call: Call) -> "subprocess.Popen[bytes]":
        pods = self.node.host.pods
        netns = f"/proc/{os.getpid()}/fd/{pods[call.name]}" if call.name in pods else ""
        variables = environment(self.node.socket, call.verb, call.name, netns)
        process = subprocess.Popen(
            [self.node.directory / "bin" / "podwire"], env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(config(**call.more)).encode())
        process.stdin.close()
        process.stdin = None
        return process


class Storm:
    """Containers with lives of their own. Each has its DEL now, twice, late, out of order, or never."""

    def __init__(self, node: Node, api: int, seed: int) -> None:
        self.node, self._api, self._rng = node, api, random.Random(seed)
        self.engine = Engine(node)
        self.number = 0
        self.running: dict[str, frozenset[str]] = {}
        """Addresses by container; none where its ADD failed."""
        self.owed: list[str] = []
        """DELs that come late."""
        self._away = False

    def round(self) -> None:
        self.api_away(self._rng.random() < 0.3)
        self.node.set_clock(self._rng.uniform(-48, 48))
        pid = fork(self.node.serve)
        if self._rng.random() < 0.8:
            self.node.serves(5.0)
        deadline = time.monotonic() + self._rng.uniform(0.0, 0.5)
        killed = False
        for _ in range(BATCHES):
            if time.monotonic() > deadline and not killed:
                kill(pid)
                killed = True
            self._judge(self.engine.calls(self._batch()))
        if not killed:
            kill(pid)

    def api_away(self, away: bool) -> None:
        if away != self._away:
            os.kill(self._api, signal.SIGUSR1 if away else signal.SIGUSR2)
            self._away = away

    def settle(self) -> None:
        """The DELs that are still owed, all in disorder, and no others; the namespaces of half of the containers go."""
        self.api_away(False)
        self.node.set_clock(0)
        self.owed += [name for name in self.running if self._rng.random() < 0.5]
        for name in self.running:
            if name not in self.owed:
                self.node.host.end(name)
        self._rng.shuffle(self.owed)
        self._judge(self.engine.calls(Call("DEL", name) for name in self.owed))

    def _batch(self) -> list[Call]:
        """Each for another container."""
        calls: dict[str, Call] = {}
        for _ in range(AT_A_TIME):
            call = self._next(set(calls))
            calls[call.name] = call
        return list(calls.values())

    def _next(self, taken: set[str]) -> Call:
        rng, dice = self._rng, self._rng.random()
        names = [name for name in self.running if name not in taken]
        late = [name for name in self.owed if name not in taken]
        if late and dice < 0.15:
            name = rng.choice(late)
            self.owed.remove(name)
            return Call("DEL", name)
        if dice < 0.2:
            return Call("DEL", f"never-{rng.randrange(9)}")
        if names and dice < 0.6:
            return self._end(rng.choice(names))
        if names and dice < 0.65:
            return self._add(rng.choice(names))
        self.number += 1
        name = f"c{self.number}"
        self.node.host.pod(name)
        return self._add(name)

    def _add(self, name: str) -> Call:
        number = int(name.removeprefix("c"))
        runtime: dict[str, Any] = {}
        if number % 3 == 0:
            runtime["portMappings"] = [{"hostPort": 20000 + number, "containerPort": 80, "protocol": "tcp"}]
        if number % 5 == 0:
            runtime["bandwidth"] = LIMITS
        return Call("ADD", name, {"runtimeConfig": runtime} if runtime else {})

    def _end(self, name: str) -> Call:
        """The container's end: with its DEL, and perhaps another one later; with a late DEL, or with none."""
        del self.running[name]
        how = self._rng.choice(("now", "twice", "late", "never"))
        if how in ("twice", "late"):
            self.owed.append(name)
        if how == "late" or how == "never":
            self.node.host.end(name)
            return Call("DEL", "never-at-all")
        return Call("DEL", name)

    def _judge(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            name = outcome.call.name
            if outcome.call.verb == "DEL":
                assert outcome.status == 0, str(outcome)
                if name in self.node.host.pods and name not in self.owed:
                    self.node.host.end(name)
            elif outcome.status == 0:
                ips = frozenset(entry["address"].partition("/")[0] for entry in outcome.document["ips"])
                before = self.running.get(name, frozenset())
                assert before <= ips, f"{name} has {ips}, and had {before}"
                others = {ip: other for other, held in self.running.items() if other != name for ip in held}
                assert not ips & others.keys(), f"{name} has an address of {[others[ip] for ip in ips & others.keys()]}: {ips}"
                self.running[name] = ips
            else:
                assert outcome.code == TRY_LATER, str(outcome)
                self.running.setdefault(name, frozenset())


# --- what is left -------------------------------------------------------------------------------------------------


@dataclass
class Remains:
    """All that containers can leave behind."""

    veths: list[str]
    neighbours: int
    rules: Ruleset
    reserved: list[str]
    records: list[str]
    spooled: list[str]
    files: set[str]
    pods: list[str]
    namespaces: Counter[int]
    """How often each is held by the agent's process, beside those that it has from its parent."""


async def look(node: Node, kernel: LinuxKernel, client: ApiClient) -> Remains:
    seen = await kernel.observe()
    with sqlite3.connect(f"file:{node.state}/reservations.db?mode=ro", uri=True) as db:
        reserved = [str(row) for row in db.execute("SELECT * FROM reservation")]
        records = [row[0] for row in db.execute("SELECT uid FROM attachment")]
    db.close()
    spool = node.socket.with_name("cni.sock.spool")
    pods = (await client.list(PODS)).items
    return Remains(
        veths=[name for name, link in seen.links.items() if link.owned and name.startswith("veth")],
        neighbours=len([entry for entry in seen.neighbours if entry.dev == "cni0"]),
        rules=await kernel.observe_nft(NFT_TABLE),
        reserved=reserved,
        records=records,
        spooled=[file.name for file in spool.iterdir()] if spool.is_dir() else [],
        files={file.name for file in node.state.iterdir()} - STATE_FILES,
        pods=[pod["metadata"]["name"] for pod in pods],
        namespaces=Counter(held_namespaces()) - Counter(os.fstat(fd).st_ino for fd in node.host.pods.values()),
    )


def held_namespaces() -> Iterator[int]:
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            name = os.readlink(f"/proc/self/fd/{fd}")
            if name.startswith("net:["):
                yield int(name[5:-1])


async def with_agent(node: Node, work: Callable[[NodeAgent, LinuxKernel, ApiClient], Any]) -> None:
    kernel = LinuxKernel(node.host.netns)
    async with ApiClient(node.url) as client:
        agent = node.agent(kernel, client)
        running = asyncio.create_task(agent.run())
        try:
            async with asyncio.timeout(READY_SECONDS):
                await agent.ready()
            await work(agent, kernel, client)
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running
            await kernel.close()


def note(node: Node) -> None:
    """Write down how the node is without containers."""

    async def work(agent: NodeAgent, kernel: LinuxKernel, client: ApiClient) -> None:
        (node.directory / "before").write_bytes(pickle.dumps(await look(node, kernel, client)))

    assert in_child(lambda: with_agent(node, work)) == 0


def expect_nothing(node: Node) -> None:
    """It is as it was before; a sweep's time is given, no more."""

    async def work(agent: NodeAgent, kernel: LinuxKernel, client: ApiClient) -> None:
        before = pickle.loads((node.directory / "before").read_bytes())
        deadline = time.monotonic() + READY_SECONDS
        while (now := await look(node, kernel, client)) != before:
            assert time.monotonic() < deadline, "; ".join(differences(now, before))
            await asyncio.sleep(0.05)

    assert in_child(lambda: with_agent(node, work)) == 0, "something is left"
    for name, fd in node.host.pods.items():
        assert in_child(lambda fd=fd: expect_bare(fd)) == 0, f"in the namespace of {name}"  # type: ignore[misc]


def differences(now: Remains, before: Remains) -> Iterator[str]:
    for name, value in asdict(now).items():
        if name != "rules" and value != getattr(before, name):
            yield f"{name}: {value}, before: {getattr(before, name)}"
    for ref, table in now.rules.tables.items():
        old = before.rules.tables[ref]
        for what in ("chains", "sets"):
            parts, earlier = getattr(table, what), getattr(old, what)
            changed = [name for name in parts.keys() | earlier.keys() if parts.get(name) != earlier.get(name)]
            yield from (f"{what[:-1]} {name}: {parts.get(name)}, before: {earlier.get(name)}" for name in changed)


async def expect_bare(netns: int) -> None:
    kernel = LinuxKernel(netns)
    links = (await kernel.observe()).links
    await kernel.close()
    assert links.keys() <= {"lo"}, f"links are left: {links}"


# --- scenes -------------------------------------------------------------------------------------------------------


def storm(directory: Path, rounds: int, seed: int) -> int:
    """Returns how many containers there were."""
    node, api = make_node(directory)
    note(node)
    scene = Storm(node, api, seed)
    for _ in range(rounds):
        scene.round()
    pid = fork(node.serve)
    assert node.serves(READY_SECONDS)
    scene.settle()
    kill(pid)
    expect_nothing(node)
    kill(api)
    return scene.number


def fulldisk(directory: Path, rounds: int, seed: int) -> int:
    """The disk with the node's state is full, in an agent's life and at another's start. Returns how many ADDs were refused."""
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount("none", "/", "", syscalls.MS_REC | syscalls.MS_PRIVATE)
    (directory / "n1").mkdir()
    syscalls.mount("tmpfs", str(directory / "n1"), "tmpfs", 0, f"size={DISK}")
    node, api = make_node(directory)
    note(node)
    engine = Engine(node)
    names = [f"c{number}" for number in range(8)]
    for name in names:
        node.host.pod(name)
    refused = 0
    pid = fork(node.serve)
    for life in range(rounds):
        assert node.serves(READY_SECONDS)
        until_added(engine, names[:4])
        fill(node.state)
        answers = engine.calls(Call("ADD", name) for name in names[4:])
        for answer in answers:
            assert answer.code == IO_FAILURE, str(answer)
            assert "full" in answer.document["details"], str(answer)
        refused += len(answers)
        for name in names[4:]:
            assert in_child(lambda name=name: expect_bare(node.host.pods[name])) == 0, name  # type: ignore[misc]
        for outcome in engine.calls(Call("DEL", name) for name in names[:2] + names[4:]):
            assert outcome.status == 0, str(outcome)
        for name in names[:2]:
            assert in_child(lambda name=name: expect_bare(node.host.pods[name])) == 0, name  # type: ignore[misc]
        if life % 2:
            kill(pid)
            pid = fork(node.serve)
            assert node.serves(READY_SECONDS), "it begins on a full disk"
            assert engine.call("ADD", names[4]).status
        for outcome in engine.calls(Call("DEL", name) for name in names[2:]):
            assert outcome.status == 0, str(outcome)
        (node.state / "ballast").unlink()
        for outcome in engine.calls(Call("DEL", name) for name in names):
            assert outcome.status == 0, str(outcome)
    kill(pid)
    expect_nothing(node)
    kill(api)
    return refused


def until_added(engine: Engine, names: Sequence[str]) -> None:
    deadline = time.monotonic() + READY_SECONDS
    for name in names:
        while (outcome := engine.call("ADD", name)).status:
            assert outcome.code == TRY_LATER, str(outcome)
            assert time.monotonic() < deadline, str(outcome)
            time.sleep(0.02)


def fill(directory: Path) -> None:
    with open(directory / "ballast", "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"\0" * 4096)
    assert os.statvfs(directory).f_bavail == 0, "the disk is not full"


SCENES = {"storm": storm, "fulldisk": fulldisk}

if __name__ == "__main__":
    what, where, *rest = sys.argv[1:]
    print(SCENES[what](Path(where), int(rest[0]), int(rest[1]) if len(rest) > 1 else 0))
