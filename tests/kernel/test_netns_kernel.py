"""Namespaces by descriptor, switches per namespace, and entering a user namespace from a process of its own."""

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from podwire.kernel import netns, syscalls
from podwire.kernel.features import Feature, Features, probe_features
from podwire.kernel.sysctl import read_sysctls, write_sysctls
from podwire.model.errors import Unsupported

pytestmark = pytest.mark.kernel


def devices() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


def test_a_new_namespace_is_not_ours(make_netns: Callable[[], int]) -> None:
    here = netns.current_netns()
    first, second = make_netns(), make_netns()
    assert len({netns.netns_inode(fd) for fd in (here, first, second)}) == 3
    os.close(here)


def test_work_in_a_namespace_moves_only_its_thread(make_netns: Callable[[], int]) -> None:
    fd = make_netns()
    before = os.readlink("/proc/self/ns/net")
    assert netns.run_in_netns(fd, devices) == ["lo"]
    inside = netns.run_in_netns(fd, lambda: os.readlink("/proc/thread-self/ns/net"))
    assert inside == f"net:[{netns.netns_inode(fd)}]"
    assert os.readlink("/proc/self/ns/net") == before


def test_errors_come_back_from_the_thread(make_netns: Callable[[], int]) -> None:
    with pytest.raises(ZeroDivisionError):
        netns.run_in_netns(make_netns(), lambda: 1 // 0)
    with open("/dev/null") as wrong, pytest.raises(OSError, match="entering the network namespace"):
        netns.run_in_netns(wrong.fileno(), devices)


async def test_in_netns_gives_the_result_or_the_error(make_netns: Callable[[], int]) -> None:
    fd = make_netns()
    sock = await netns.in_netns(fd, lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
    with sock, pytest.raises(OSError, match="Network is unreachable"):
        sock.connect(("192.0.2.1", 9))
    with pytest.raises(ZeroDivisionError):
        await netns.in_netns(fd, lambda: 1 // 0)


async def test_what_nobody_waits_for_is_closed(make_netns: Callable[[], int]) -> None:
    entered, go, closed = threading.Event(), threading.Event(), asyncio.Event()

    class Opened:
        def close(self) -> None:
            closed.set()

    def slow() -> Opened:
        entered.set()
        go.wait(5)
        return Opened()

    task = asyncio.create_task(netns.in_netns(make_netns(), slow))
    await asyncio.to_thread(entered.wait, 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go.set()
    async with asyncio.timeout(5):
        await closed.wait()


def test_sysctls_belong_to_their_namespace(make_netns: Callable[[], int]) -> None:
    first, second = make_netns(), make_netns()
    assert write_sysctls(first, {"net/ipv4/ip_forward": "1", "net/ipv4/tcp_rmem": "4096 8192 16384"}) == {}
    assert read_sysctls(first, ("net/ipv4/ip_forward", "net/ipv4/tcp_rmem")) == {
        "net/ipv4/ip_forward": "1",
        "net/ipv4/tcp_rmem": "4096 8192 16384",
    }
    assert read_sysctls(second, ("net/ipv4/ip_forward", "net/no/such")) == {"net/ipv4/ip_forward": "0"}


def test_one_refused_sysctl_leaves_the_others(make_netns: Callable[[], int]) -> None:
    fd = make_netns()
    refused = write_sysctls(fd, {"net/ipv4/conf/eth9/forwarding": "1", "net/ipv4/ip_forward": "1", "vm/swappiness": "1"})
    assert {key: type(error) for key, error in refused.items()} == {
        "net/ipv4/conf/eth9/forwarding": FileNotFoundError,
        "vm/swappiness": OSError,
    }
    assert read_sysctls(fd, ("net/ipv4/ip_forward",)) == {"net/ipv4/ip_forward": "1"}


def test_features_of_this_kernel() -> None:
    features = probe_features()
    features.require(Feature.NAMESPACES, Feature.VETH, Feature.BRIDGE)
    assert set(features.missing).isdisjoint(features.present)


def test_a_missing_feature_is_named_with_advice() -> None:
    features = Features(frozenset(Feature) - {Feature.VXLAN})
    assert features.missing == (Feature.VXLAN,)
    with pytest.raises(Unsupported, match=r"lacks VXLAN devices: run `sudo modprobe vxlan") as caught:
        features.require(Feature.VETH, Feature.VXLAN)
    assert caught.value.feature == "VXLAN devices"


ENTER = """
import os, sys
from podwire.kernel import netns, syscalls
netns.enter_user_namespace(syscalls.CLONE_NEWNET | syscalls.CLONE_NEWNS | syscalls.CLONE_NEWUTS, map_all={map_all})
syscalls.sethostname("inside")
syscalls.mount("", "/", flags=syscalls.MS_REC | syscalls.MS_PRIVATE)
syscalls.mount("tmpfs", "/tmp", "tmpfs")
assert os.listdir("/tmp") == []
fd = netns.create_netns()
assert netns.run_in_netns(fd, lambda: os.listdir("/proc/sys/net/ipv4/conf")) == ["all", "default", "lo"]
print(os.geteuid(), os.getegid(), os.uname().nodename, sum(1 for _ in open("/proc/net/dev")) - 2)
"""


def run(script: str, *prefix: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*prefix, sys.executable, "-c", script], capture_output=True, text=True, timeout=20, check=False)


@pytest.mark.parametrize("map_all", [False, True])
def test_a_process_enters_as_root(map_all: bool) -> None:
    done = run(ENTER.format(map_all=map_all))
    assert (done.stdout.split(), done.stderr) == (["0", "0", "inside", "1"], "")


@pytest.mark.parametrize("map_all", [False, True])
def test_a_process_enters_as_an_ordinary_user(map_all: bool) -> None:
    """`unshare --map-user` gives a process that has no privilege at all, as a user at a shell."""
    script = "import os; assert os.geteuid() == 1000\n" + ENTER.format(map_all=map_all)
    done = run(script, "unshare", "--user", "--map-user=1000", "--map-group=1000")
    assert (done.stdout.split(), done.stderr) == (["0", "0", "inside", "1"], "")


def test_many_ids_stay_mapped_where_they_were() -> None:
    with open("/proc/self/uid_map") as file:
        rows = [line.split() for line in file]
    count = sum(int(row[2]) for row in rows)
    script = ENTER.format(map_all=True) + "\nprint(sum(int(line.split()[2]) for line in open('/proc/self/uid_map')))"
    assert run(script).stdout.splitlines()[1] == str(count)


def test_refusals_say_what_and_why() -> None:
    with pytest.raises(FileNotFoundError, match="mounting tmpfs on /nowhere"):
        syscalls.mount("tmpfs", "/nowhere", "tmpfs")
    with pytest.raises(OSError, match="unmounting /nowhere"):
        syscalls.umount2("/nowhere", syscalls.MNT_DETACH)
    with pytest.raises(OSError, match="changing the root to /nowhere"):
        syscalls.pivot_root("/nowhere", "/nowhere")
    with pytest.raises(OSError, match="prctl option 9999"):
        syscalls.prctl(9999)


def test_process_name() -> None:
    names: list[str] = []

    def work() -> None:
        syscalls.set_process_name("a-very-long-thread-name")
        with open("/proc/thread-self/comm") as file:
            names.append(file.read())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert names == ["a-very-long-thr\n"]
