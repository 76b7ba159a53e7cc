"""Sandboxes and their pause processes, in real namespaces."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from podrig import OWN_NETNS, Rig, children_of, make_pod, rig, shell, until

from podwire.model.podruntime import Sandbox
from podwire.runtime.errors import RuntimeFailure
from podwire.runtime.pods import NodeRuntime
from podwire.runtime.shimclient import join_shim

pytestmark = pytest.mark.kernel

STAND_IN = {"name": "web", "image": "nginx", "ports": [{"containerPort": 8080}]}


@pytest_asyncio.fixture
async def shim(tmp_path: Path) -> AsyncIterator[Rig]:
    async with rig(tmp_path) as made:
        yield made


def namespace(pid: int | str, kind: str) -> int:
    return os.stat(f"/proc/{pid}/ns/{kind}").st_ino


def status(pid: int, key: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith(f"{key}:"))


def gone(pid: int) -> bool:
    """Whether it has ended; who reaps it is not ours to say."""
    try:
        return status(pid, "State")[0] == "Z"
    except FileNotFoundError:
        return True


async def test_a_pause_process_holds_namespaces_in_a_few_pages(shim: Rig) -> None:
    node = shim.node()
    sandbox = await node.runtime.create_sandbox(make_pod("web", hostname="www"))
    assert isinstance(sandbox, Sandbox)
    for kind in ("net", "uts", "ipc", "pid"):
        assert namespace(sandbox.pid, kind) != namespace("self", kind)
    assert status(sandbox.pid, "NSpid").split()[-1] == "1"
    assert int(status(sandbox.pid, "VmRSS").split()[0]) < 100
    assert int(status(sandbox.pid, "SigIgn"), 16) & (1 << (signal.SIGCHLD - 1))
    assert os.listdir(f"/proc/{sandbox.pid}/fd") == ["0", "1", "2"]
    assert await node.runtime.create_sandbox(make_pod("web")) == sandbox
    assert await node.runtime.sandboxes() == (sandbox,)


async def test_a_host_network_pod_shares_the_nodes_network_and_name(shim: Rig) -> None:
    node = shim.node()
    pod = make_pod("agent", shell("hostname; cat /proc/sys/kernel/hostname"), hostNetwork=True, restartPolicy="Never")
    sandbox = await node.run(pod)
    assert os.stat(sandbox.netns).st_ino == namespace("self", "net")
    await node.report(pod, lambda report: report.phase == "Succeeded")
    assert shim.log(pod) == "node-1\nnode-1\n"


async def test_each_runtime_sees_its_own_nodes_pods(shim: Rig) -> None:
    one, two = shim.node("node-1"), shim.node("node-2")
    await one.runtime.create_sandbox(make_pod("a"))
    await two.runtime.create_sandbox(make_pod("b"))
    assert [sandbox.name for sandbox in await one.runtime.sandboxes()] == ["a"]
    assert [sandbox.name for sandbox in await two.runtime.sandboxes()] == ["b"]


async def test_removal_leaves_no_process_and_no_file(shim: Rig) -> None:
    node = shim.node()
    before = children_of(shim.shim.pid)
    pods = [make_pod("p", shell("sleep 1000 & sleep 1000"), STAND_IN), make_pod("q", STAND_IN)]
    for pod in pods:
        await node.run(pod)
        await node.ready(pod)
    assert len(children_of(shim.shim.pid) - before) == 3
    for pod in pods:
        await node.end(pod)
    assert children_of(shim.shim.pid) == before
    assert list((shim.root / "node-1" / "pods").iterdir()) == []
    assert await node.runtime.sandboxes() == ()
    await node.runtime.stop("unknown", 0)
    await node.runtime.remove("unknown")


async def test_pods_outlive_the_runtime_and_are_adopted_as_they_are(shim: Rig) -> None:
    first = shim.node()
    probed = {**STAND_IN, "readinessProbe": {"tcpSocket": {"port": 8080}, "periodSeconds": 60}}
    pod = make_pod("web", probed, shell("while :; do sleep 1; done"), hostNetwork=True)
    await first.run(pod)
    before = await first.ready(pod)
    await first.close()

    second = shim.node()
    assert [sandbox.name for sandbox in await second.runtime.sandboxes()] == ["web"]
    await second.run(pod)
    after = await second.report(pod, lambda report: True)
    assert after == before  # ready from the first report on, the same containers, no restart
    assert not second.events("Started")
    await second.end(pod)


async def test_a_pod_that_nobody_started_again_can_still_be_stopped(shim: Rig) -> None:
    first = shim.node()
    pod = make_pod("web", STAND_IN, shell("trap 'exit 0' TERM; while :; do sleep 0.1; done"))
    await first.run(pod)
    await first.ready(pod)
    await first.close()
    second = shim.node()
    await second.end(pod, grace_seconds=5)
    assert children_of(shim.shim.pid) == set()


async def test_files_of_pods_that_are_gone_are_deleted_at_the_next_start(shim: Rig) -> None:
    stale = shim.root / "node-1" / "pods" / "uid-gone"
    stale.mkdir(parents=True)
    await shim.node().runtime.sandboxes()
    assert not stale.exists()


async def test_a_killed_pause_process_is_a_failed_pod(shim: Rig) -> None:
    node = shim.node()
    pod = make_pod("web", STAND_IN, shell("sleep 1000"))
    sandbox = await node.run(pod)
    await node.ready(pod)
    os.kill(sandbox.pid, signal.SIGKILL)
    report = await node.report(pod, lambda report: report.phase == "Failed")
    assert report.reason == "SandboxLost"
    await until(lambda: not children_of(shim.shim.pid))
    assert (await node.run(pod)).pid != sandbox.pid
    await node.ready(pod)
    await node.end(pod)


async def test_the_end_of_the_shim_is_the_end_of_all_pods(tmp_path: Path) -> None:
    async with rig(tmp_path) as made:
        node = made.node()
        pod = make_pod("web", shell("sleep 1000"))
        sandbox = await node.run(pod)
        await node.ready(pod)
        pids = children_of(made.shim.pid)
        assert sandbox.pid in pids
        os.kill(made.shim.pid, signal.SIGKILL)
        await until(lambda: all(gone(pid) for pid in pids))
        assert (await node.report(pod, lambda report: report.phase == "Failed")).reason == "SandboxLost"
        with pytest.raises(RuntimeFailure, match="does not answer"):
            await node.runtime.sandboxes()


async def test_pods_survive_the_sigkill_of_the_process_that_made_them(tmp_path: Path) -> None:
    script = (
        "import asyncio, sys; from pathlib import Path; from podrig import *\n"
        "async def main():\n"
        "    node = Rig(Path(sys.argv[1])).node(); pod = make_pod('web', shell('exec sleep 1000'))\n"
        "    await node.run(pod); await node.ready(pod); print('ready', flush=True); await asyncio.sleep(1000)\n"
        "asyncio.run(main())"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "support")}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, str(tmp_path), env=environment, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    process.kill()
    await process.wait()

    shim = join_shim(tmp_path)
    try:
        runtime = NodeRuntime("node-1", shim_socket=shim.socket_path, netns=OWN_NETNS, root=tmp_path / "node-1")
        (sandbox,) = await runtime.sandboxes()
        record = runtime.run_of("shop", "web", "main")
        assert record is not None
        assert record.running
        assert children_of(shim.pid) == {sandbox.pid, record.pid}
        await runtime.remove(sandbox.uid)
        assert children_of(shim.pid) == set()
        await runtime.close()
    finally:
        shim.stop()
