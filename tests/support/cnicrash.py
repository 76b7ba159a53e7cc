"""An agent that is killed (SIGKILL) at a chosen step, or at a random moment, and what the next one finds.

Run as a program in a user and network namespace of its own: `python cnicrash.py steps|churn|engine DIRECTORY [ROUNDS [SEED]]`.
Every agent is a forked process; the containers' namespaces are held by this one, so they outlive it.
"""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from cnirig import PLUGIN, CniNode, config, environment, make_node, node_network, serving

from podwire.kernel import syscalls
from podwire.kernel.linux import LinuxKernel
from podwire.kernel.netns import create_netns
from podwire.kernel.port import KernelError
from podwire.model.cni import AttachmentKey, CniError
from podwire.model.ops import Applied, Failure, Plan
from podwire.plan.naming import host_veth
from podwire.wire.cni import parse_request

NETWORK = node_network()
MAX_STEPS = 500
CONTAINERS = 12


class Fuse:
    """Kills this process when the step number `at` is reached."""

    def __init__(self, at: int) -> None:
        self._at, self._step = at, 0

    def step(self) -> None:
        self._step += 1
        if self._step == self._at:
            os.kill(os.getpid(), signal.SIGKILL)


class FusedKernel(LinuxKernel):
    """Every operation is a step; so is the end of a plan."""

    def __init__(self, netns: int, fuse: Fuse) -> None:
        super().__init__(netns)
        self._fuse = fuse

    async def apply(self, plan: Plan) -> Applied:
        done = 0
        failures: list[Failure] = []
        for op in plan:
            self._fuse.step()
            applied = await super().apply((op,))
            done += applied.done
            failures += applied.failures
        self._fuse.step()
        return Applied(done, tuple(failures))


def fuse_disk(node: CniNode, fuse: Fuse) -> None:
    """Before and after every transaction."""
    write = node.reservations._transact

    def transact(statements: Any) -> None:
        fuse.step()
        write(statements)
        fuse.step()

    node.reservations._transact = transact  # type: ignore[method-assign]


class Host:
    """One node and the namespaces of its containers."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.netns = create_netns()
        self.pods: dict[str, int] = {}

    def pod(self, name: str) -> int:
        if name not in self.pods:
            self.pods[name] = create_netns()
        return self.pods[name]

    def end(self, name: str) -> None:
        if name in self.pods:
            os.close(self.pods.pop(name))

    def close(self) -> None:
        for name in tuple(self.pods):
            self.end(name)
        os.close(self.netns)


async def add(node: CniNode, host: Host, name: str) -> None:
    path = f"/proc/{os.getppid()}/fd/{host.pods[name]}"
    request = parse_request(environment(Path("/none"), "ADD", name, path), json.dumps(config()).encode())
    await node.attachments.add(request, host.pods[name])


async def delete(node: CniNode, name: str) -> None:
    await node.attachments.delete(AttachmentKey(name, "eth0"))


def in_child(work: Callable[[], Awaitable[None]], kill_after: float = 0.0) -> int:
    """Run `work` in a forked process; its exit status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            asyncio.run(work())  # type: ignore[arg-type]  # a coroutine function's
            status = 0
        except BaseException:  # the fork must not go on as the parent
            traceback.print_exc()
        finally:
            os._exit(status)
    if kill_after:
        time.sleep(kill_after)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


async def life(host: Host, at: int) -> None:
    """Two containers come, one goes."""
    fuse = Fuse(at)
    node = await make_node(host.directory, FusedKernel(host.netns, fuse), NETWORK, tunnels=False)
    fuse_disk(node, fuse)
    await add(node, host, "a")
    await add(node, host, "b")
    await delete(node, "a")


async def inspect(host: Host, *, then_all_go: bool) -> None:
    """The next agent: nothing is there that nobody knows. With `then_all_go` every container is detached, as an engine does
    whose ADD has failed, and nothing is left."""
    kernel = LinuxKernel(host.netns)
    node = await make_node(host.directory, kernel, NETWORK, tunnels=False)
    await expect_consistent(node, kernel)
    for name in host.pods:
        await add(node, host, name)
    await expect_consistent(node, kernel)
    if then_all_go:
        for name in host.pods:
            await delete(node, name)
        links = {name for name in (await kernel.observe()).links if name.startswith("veth")}
        assert not links, f"links are left: {links}"
        assert not node.reservations.all(), f"addresses are left: {node.reservations.all()}"
        assert not node.reservations.records, f"records are left: {list(node.reservations.records)}"
        assert not (await kernel.observe()).neighbours
    node.reservations.close()
    await kernel.close()


async def expect_consistent(node: CniNode, kernel: LinuxKernel) -> None:
    records = {record.uid for record in node.attachments.records}
    held: Mapping[str, Any] = {reservation.uid: reservation for reservation in node.reservations.all()}
    assert held.keys() == records, f"addresses of {held.keys()}, attachments {records}"
    links = {name for name in (await kernel.observe()).links if name.startswith("veth")}
    assert links <= {host_veth(uid) for uid in records}, "a link that belongs to nobody"
    for uid in records:
        assert len(node.reservations.of(uid)) == len(NETWORK.pod_cidrs), f"{uid} has half of its addresses"


def steps(directory: Path) -> int:
    """Kill at every step there is; returns how many that were."""
    for at in range(1, MAX_STEPS):
        host = Host(directory / str(at))
        host.pod("a")
        host.pod("b")
        status = in_child(lambda host=host, at=at: life(host, at))  # type: ignore[misc]
        assert status in (0, -signal.SIGKILL), f"step {at}: the agent ended with {status}"
        assert in_child(lambda host=host: inspect(host, then_all_go=True)) == 0, f"after step {at}"  # type: ignore[misc]
        host.close()
        if status == 0:
            return at - 1
    raise AssertionError("no end of steps")


async def churn_life(host: Host, seed: int) -> None:
    """Containers come and go, many at a time, until the process is killed. DELs are dropped, repeated and late."""
    rng = random.Random(seed)
    node = await make_node(host.directory, LinuxKernel(host.netns), NETWORK, tunnels=False)

    async def one(name: str) -> None:
        while True:
            with suppress(CniError, KernelError):
                await add(node, host, name)
                for _ in range(rng.choice((0, 1, 1, 2))):
                    await delete(node, name)

    await asyncio.gather(*(one(name) for name in host.pods))


def churn(directory: Path, rounds: int, seed: int) -> int:
    """Kill at random moments under churn; in between, containers end without a DEL. Returns how many agents were killed."""
    rng = random.Random(seed)
    host = Host(directory)
    killed = 0
    for number in range(rounds):
        for name in rng.sample(sorted(host.pods), len(host.pods) // 3):
            host.end(name)
        for index in range(CONTAINERS):
            host.pod(f"c{index}" if rng.random() < 0.8 else f"c{index}-{number}")
        while len(host.pods) > CONTAINERS * 2:
            host.end(rng.choice(sorted(host.pods)))
        moment = rng.uniform(0.05, 0.4)
        killed += in_child(lambda: churn_life(host, rng.random().__hash__()), moment) == -signal.SIGKILL
        assert in_child(lambda: inspect(host, then_all_go=False)) == 0, f"round {number} of seed {seed}"
    assert in_child(lambda: inspect(host, then_all_go=True)) == 0, "at the end"
    host.close()
    return killed


async def serve(host: Host) -> None:
    async with serving(await make_node(host.directory, LinuxKernel(host.netns), NETWORK, tunnels=False)):
        await asyncio.Event().wait()


async def expect_nothing(host: Host) -> None:
    kernel = LinuxKernel(host.netns)
    node = await make_node(host.directory, kernel, NETWORK, tunnels=False)
    links = {name for name in (await kernel.observe()).links if name.startswith("veth")}
    assert not links, f"links are left: {links}"
    assert not node.reservations.all(), f"addresses are left: {node.reservations.all()}"
    assert not list((host.directory / "cni.sock.spool").glob("*")), "DELs are left"
    node.reservations.close()
    await kernel.close()


def engine(directory: Path, rounds: int, seed: int) -> int:
    """An engine that executes the plugin while agents are killed: it is told of each DEL that it is done, and that is so.

    Namespaces are kept to the end: nothing is freed for being dead. Returns how many DELs were made without an agent."""
    rng = random.Random(seed)
    host = Host(directory)
    attached: set[str] = set()
    alone = 0
    for _ in range(rounds):
        pid = fork_agent(host)
        deadline = time.monotonic() + rng.uniform(0.1, 0.4)
        killed = False
        for _ in range(16):
            if time.monotonic() > deadline and not killed:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                killed = True
            name = f"c{rng.randrange(CONTAINERS)}"
            if name in attached and rng.random() < 0.6:
                detach(host, name)
                attached.discard(name)
                alone += killed
            else:
                attached.add(name)  # also if it fails: an engine detaches then
                call_plugin(host, "ADD", name)
        if not killed:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    for name in attached:
        detach(host, name)
    assert in_child(lambda: expect_nothing(host)) == 0, f"seed {seed}"
    host.close()
    return alone


def fork_agent(host: Host) -> int:
    """It ends with this process at the latest."""
    pid = os.fork()
    if pid == 0:
        try:
            syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
            asyncio.run(serve(host))
        finally:
            os._exit(1)
    return pid


def detach(host: Host, name: str) -> None:
    done = call_plugin(host, "DEL", name)
    assert done.returncode == 0, f"DEL of {name} is refused: {done.stdout.decode()} {done.stderr.decode()}"


def call_plugin(host: Host, verb: str, name: str) -> subprocess.CompletedProcess[bytes]:
    netns = f"/proc/{os.getpid()}/fd/{host.pod(name)}"
    variables = environment(host.directory / "cni.sock", verb, name, netns)
    command = [sys.executable, "-IS", str(PLUGIN)]
    return subprocess.run(command, env=variables, input=json.dumps(config()).encode(), capture_output=True, check=False)


MODES = {"churn": churn, "engine": engine}

if __name__ == "__main__":
    what, where, *rest = sys.argv[1:]
    if what == "steps":
        print(steps(Path(where)))
    else:
        print(MODES[what](Path(where), int(rest[0]), int(rest[1]) if len(rest) > 1 else 0))
