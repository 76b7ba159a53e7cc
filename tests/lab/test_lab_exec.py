"""`podwire lab exec`, `lab logs`: commands in pods, nodes and the world, as if one were there."""

import os
import pty
import subprocess
import sys

import pytest
from labcommand import PODWIRE, ROOT, Lab

pytestmark = [pytest.mark.lab, pytest.mark.timeout(120)]

PLACES = ["node-1", "world", "balancer"]
PODS = ["cart", "cart/exporter", "shop/cart", "shop/cart/cart"]
CONNECT = "import socket, sys; print(socket.create_connection((sys.argv[1], int(sys.argv[2])), 3).getpeername()[0])"


@pytest.mark.parametrize("target", PLACES + PODS)
def test_status_and_streams_are_the_commands_own(lab: Lab, target: str) -> None:
    done = lab.exec(target, "sh", "-c", "cat; echo problem >&2; exit 7", stdin="some input\n")
    assert (done.status, done.out, done.err) == (7, "some input\n", "problem\n")


@pytest.mark.parametrize("target", ["node-1", "cart"])
def test_a_command_that_does_not_exist(lab: Lab, target: str) -> None:
    done = lab.exec(target, "no-such-command")
    assert done.status in (126, 127, 1)
    assert "no-such-command" in done.err


def test_an_ordinary_users_path_is_completed(lab: Lab) -> None:
    """As on Debian: without the directories where ip, nft and iptables are."""
    done = subprocess.run(
        [*PODWIRE, "lab", "exec", "--name", lab.name, "node-1", "--", "sh", "-c", "echo $PATH"],
        env={**lab.podwire.environment, "PATH": "/usr/bin:/bin"}, cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin\n"


def test_a_signal_becomes_a_status_as_in_a_shell(lab: Lab) -> None:
    assert lab.exec("world", "sh", "-c", "kill -9 $$").status == 137


def test_options_after_the_target_belong_to_the_command(lab: Lab) -> None:
    assert lab.exec("node-1", "echo", "-n", "--help").out == "--help"


def test_options_of_ours_may_stand_on_either_side_of_the_target(lab: Lab) -> None:
    name = ["--name", lab.name]
    for arguments in (["-n", "shop", *name, "cart"], ["cart", "-n", "shop", *name], [*name, "cart", "--namespace=shop"]):
        assert lab.podwire.ok("lab", "exec", *arguments, "--", "echo", "-n", "--name", "x") == "--name x"
    assert lab.podwire.ok("lab", "exec", *name, "node-1", "echo", "-n", "no dashes") == "no dashes"


def test_each_place_has_its_own_network(lab: Lab) -> None:
    script = "import socket; print(sorted(name for _, name in socket.if_nameindex()))"
    targets = ("world", "node-1", "cart", "cart/exporter")
    seen = {target: lab.exec(target, sys.executable, "-c", script).out for target in targets}
    assert seen["world"].strip() == "['eth0', 'lo']"
    assert "'cni0'" in seen["node-1"]
    assert "'flannel.1'" in seen["node-1"]
    assert seen["cart"] == seen["cart/exporter"]


def test_a_pods_command_has_the_containers_environment(lab: Lab) -> None:
    pod = (
        lab.kubectl("get", "pods", "-n", "shop", "-l", "app.kubernetes.io/name=api", "-o", "name").split()[0].partition("/")[2]
    )
    address = lab.kubectl("get", "pod", "-n", "shop", pod, "-o", "jsonpath={.status.podIP}")
    out = lab.exec(pod, "sh", "-c", "echo $POD_IP $LOG_LEVEL; cat /etc/api/api.yaml; hostname").out
    assert out.splitlines() == [f"{address} info", "currency: EUR", "cart: http://cart:7070", pod]


def test_the_world_reaches_a_node_port(lab: Lab) -> None:
    for address in ("198.18.0.11", "2001:db8:1::11"):
        assert lab.exec("world", sys.executable, "-c", CONNECT, address, "30080").out.strip() == address


@pytest.mark.parametrize("target", ["no-such-pod", "shop/no-such-pod", "cart/no-such-container"])
def test_a_target_that_does_not_exist_is_named_with_the_choices(lab: Lab, target: str) -> None:
    done = lab.exec(target, "true")
    assert done.status == 1
    assert f"there is no pod, node or place named '{target}'" in done.err
    assert "node-1" in done.err


@pytest.mark.parametrize("target", ["node-1", "cart"])
def test_a_terminal_is_a_terminal_on_the_other_side(lab: Lab, target: str) -> None:
    ours, theirs = pty.openpty()
    command = [
        *PODWIRE,
        "lab",
        "exec",
        "--name",
        lab.name,
        target,
        "--",
        "sh",
        "-c",
        "test -t 0 && test -t 1 && echo a terminal",
    ]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=lab.podwire.environment, cwd=ROOT, start_new_session=True
    )
    os.close(theirs)
    try:
        assert process.wait(30) == 0
        assert b"a terminal" in os.read(ours, 4096)
    finally:
        os.close(ours)


def test_logs_of_a_pod_and_of_the_lab(lab: Lab) -> None:
    assert "podwire.controllers" in lab.podwire.ok("lab", "logs", "--name", lab.name)
    assert lab.podwire.ok("lab", "logs", "--name", lab.name, "--tail", "1").count("\n") == 1
    lab.exec("world", sys.executable, "-c", CONNECT, "198.18.0.11", "30080")
    assert lab.podwire("lab", "logs", "--name", lab.name, "shop/cart/exporter").status == 0
    assert lab.podwire("lab", "logs", "--name", lab.name, "node-1").status == 2
