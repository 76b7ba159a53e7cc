"""Labs come up, live side by side, and go without a trace, however they end."""

import contextlib
import http.client
import ipaddress
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from labcommand import PODWIRE, ROOT, SHOP, Lab, Podwire, until

from podwire.lab.state import LabDirectory, start_time

pytestmark = [pytest.mark.lab, pytest.mark.timeout(120)]


_NEVER_READY = (
    "{selector: {matchLabels: {app: web}}, template: {metadata: {labels: {app: web}}, "
    "spec: {containers: [{name: web, image: web, command: [sleep, inf], readinessProbe: {exec: {command: ['false']}}}]}}}"
)


def members(pid: int) -> dict[int, int]:
    """pid → start time of all processes in the same user namespace as `pid`, or in one below it."""
    root = os.stat(f"/proc/{pid}/ns/user").st_ino
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _user_namespace(entry) == root:
            found[int(entry.name)] = start_time(int(entry.name))
    return found


def _user_namespace(process: Path) -> int:
    try:
        return (process / "ns" / "user").stat().st_ino
    except OSError:
        return 0


def namespaces(processes: Iterable[str]) -> set[tuple[str, int]]:
    """(kind, inode) of every namespace that one of these processes is in; those that are gone count for nothing."""
    found = set()
    for process in processes:
        for kind in ("user", "net", "mnt", "pid", "uts", "ipc"):
            try:
                found.add((kind, Path(f"/proc/{process}/ns/{kind}").stat().st_ino))
            except OSError:
                break
    return found


def namespaces_in_use() -> set[tuple[str, int]]:
    return namespaces(name for name in os.listdir("/proc") if name.isdigit())


def port_of(podwire: Podwire, name: str) -> int:
    server = next(lab["server"] for lab in podwire.labs() if lab["name"] == name)
    return int(server.rpartition(":")[2])


def listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def test_up_and_down(podwire: Podwire) -> None:
    out = podwire.ok("lab", "up", "--name", "plain", "--nodes", "2")
    kubeconfig = re.search(r"^export KUBECONFIG=(.+)$", out, re.MULTILINE)
    assert kubeconfig
    assert Path(kubeconfig[1]).stat().st_mode & 0o777 == 0o600
    entry = next(lab for lab in podwire.labs() if lab["name"] == "plain")
    assert entry["nodes"] == ["node-1", "node-2"]
    assert entry["kubeconfig"] == kubeconfig[1]
    assert podwire.ok("lab", "kubeconfig", "plain") == Path(kubeconfig[1]).read_text()
    assert "plain" in podwire.ok("lab", "ls")
    port, state = port_of(podwire, "plain"), Path(kubeconfig[1]).parent
    assert listens(port)
    podwire.ok("lab", "down", "plain")
    assert not listens(port)
    assert not state.exists()
    assert "plain" not in podwire.ok("lab", "ls")


def test_what_is_not_there_is_said_in_one_sentence(podwire: Podwire) -> None:
    for command in ("down", "kubeconfig", "logs", "node add", "exec"):
        done = podwire("lab", *command.split(), "--name", "nobody", *(("world", "true") if command == "exec" else ()))
        assert done.status == 1
        assert done.err == (
            "Error: no lab named 'nobody' is up: `podwire lab ls` shows those that are, `podwire lab up` starts one\n"
        )


@pytest.mark.parametrize(
    "wrong",
    ["--nodes=0", "--name=A/B", "--ip-family=ipx", "--service-node-port-range=x", "--service-cluster-ip-range=10.0.0.0/16"],
)
def test_wrong_usage_has_status_2_and_starts_nothing(podwire: Podwire, wrong: str) -> None:
    before = podwire.labs()
    assert podwire("lab", "up", wrong).status == 2
    assert podwire.labs() == before


def test_labs_side_by_side_have_the_same_addresses_and_do_not_meet(podwire: Podwire) -> None:
    ask = "import socket; print(socket.gethostname(), socket.create_connection(('198.18.0.11', 10250), 3).getsockname()[0])"
    for name in ("left", "right"):
        podwire.ok("lab", "up", "--name", name, "--nodes", "1")
    try:
        for name in ("left", "right"):
            out = podwire.ok("lab", "exec", "--name", name, "world", "--", sys.executable, "-c", ask)
            assert out.split() == [f"podwire-{name}", "198.18.1.1"]
        again = podwire("lab", "up", "--name", "left")
        assert again.status == 1
        assert "a lab named 'left' is up already" in again.err
        assert "✗" not in again.err
        podwire.ok("lab", "down", "left")
        assert podwire.ok("lab", "exec", "--name", "right", "world", "--", "true") == ""
    finally:
        podwire("lab", "down", "left")
        podwire("lab", "down", "right")


def test_sigkill_leaves_nothing(podwire: Podwire) -> None:
    """No process, namespace, interface, mount or socket; and the name is free at once."""
    interfaces = sorted(os.listdir("/sys/class/net"))
    mounts = Path("/proc/self/mountinfo").read_text()
    podwire.ok("lab", "up", "--name", "doomed", "-f", str(SHOP), "--wait")
    pid, port = podwire.pid("doomed"), port_of(podwire, "doomed")
    alive = members(pid)
    assert len(alive) > 5, "the lab process, the shim, and the pods' own processes"
    made = namespaces(map(str, alive)) - namespaces(["self"])
    assert {"user", "net", "mnt", "pid", "uts", "ipc"} <= {kind for kind, _ in made}
    os.kill(pid, signal.SIGKILL)
    until(lambda: not any(start_time(member) == born for member, born in alive.items()))
    until(lambda: not made & namespaces_in_use())
    assert sorted(os.listdir("/sys/class/net")) == interfaces
    assert Path("/proc/self/mountinfo").read_text() == mounts
    assert "podwire" not in Path("/proc/net/unix").read_text()
    assert not listens(port)
    assert "doomed" not in {lab["name"] for lab in podwire.labs()}
    assert not (podwire.state / "doomed").exists()


@pytest.mark.usefixtures("heeded_signals")
def test_a_launcher_that_is_interrupted_takes_its_lab_with_it(podwire: Podwire) -> None:
    process = subprocess.Popen(
        [*PODWIRE, "lab", "up", "--name", "hasty", "--nodes", "20"],
        env=podwire.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT,
    )  # fmt: skip
    until(lambda: (podwire.state / "hasty" / "lab.json").exists())
    process.send_signal(signal.SIGINT)
    assert process.wait(30) != 0
    assert "hasty" not in {lab["name"] for lab in podwire.labs()}


@pytest.mark.usefixtures("heeded_signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_demo_that_is_ended_takes_its_lab_with_it(podwire: Podwire, number: signal.Signals) -> None:
    process, pid = begun_demo(podwire)
    process.send_signal(number)
    _, rest = process.communicate(timeout=30)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert "✗" not in rest
    assert "Traceback" not in rest
    until(lambda: not start_time(pid))
    assert "begun" not in {lab["name"] for lab in podwire.labs()}
    assert not (podwire.state / "begun").exists()


def test_a_demo_that_is_to_keep_its_lab_leaves_it_even_when_killed(podwire: Podwire) -> None:
    process, pid = begun_demo(podwire, "--keep")
    process.kill()
    process.communicate(timeout=30)
    assert podwire.pid("begun") == pid
    podwire.ok("lab", "down", "begun")


def begun_demo(podwire: Podwire, *options: str) -> tuple[subprocess.Popen[str], int]:
    """A demo whose node is ready and whose pods are not, and the pid of its lab."""
    process = subprocess.Popen(
        [*PODWIRE, "demo", "--name", "begun", "--nodes", "1", *options],
        env=podwire.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    assert process.stderr
    assert process.stderr.readline().startswith("✓ lab begun: 1 node ready")
    record = LabDirectory(podwire.state, "begun").live_record()
    return process, record.pid


@pytest.mark.parametrize(
    ("spec", "wait", "said"),
    [
        ("{replicas: many}", (), "✗ 1 object applied"),
        (_NEVER_READY, ("--wait", "--timeout", "1"), "not ready after 1 s"),
    ],
)
def test_a_lab_that_stays_up_after_an_error_says_so(
    podwire: Podwire, spec: str, wait: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    manifest = tmp_path / "web.yaml"
    manifest.write_text(f"{{apiVersion: apps/v1, kind: Deployment, metadata: {{name: web}}, spec: {spec}}}")
    done = podwire("lab", "up", "--name", "doubtful", "--nodes", "1", "-f", str(manifest), *wait)
    try:
        assert done.status == 1
        assert said in done.err
        assert done.err.endswith("; the lab is up: `podwire lab down doubtful` takes it down\n")
    finally:
        podwire.ok("lab", "down", "doubtful")


def test_where_namespaces_are_forbidden_it_says_what_to_do(podwire: Podwire) -> None:
    """A user namespace whose limit of further ones is 0 stands for a machine that forbids them."""
    forbid = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    strict = Podwire(podwire.state, ("unshare", "--user", "--map-root-user", "sh", "-c", forbid, "sh"))
    done = strict("lab", "up", "--name", "never")
    assert done.status == 1
    assert "a lab needs namespaces of its own and cannot have them here" in done.err
    assert "max_" in done.err
    assert "namespaces" in done.err
    assert "Traceback" not in done.err


def test_an_ordinary_user_has_labs_too(ordinary: Podwire) -> None:
    ordinary.ok("lab", "up", "--name", "mine", "-f", str(SHOP), "--wait")
    pid = ordinary.pid("mine")
    assert os.stat(f"/proc/{pid}").st_uid != 0 or not ordinary.prefix
    assert len(Path(f"/proc/{pid}/uid_map").read_text().splitlines()) == 1
    assert ordinary("lab", "exec", "--name", "mine", "node-1", "--", "sh", "-c", "exit 5").status == 5
    report = ordinary("paths", "--lab", "mine", "-o", "json")
    assert report.status == 0, report.out + report.err
    ordinary.ok("lab", "down", "mine")
    until(lambda: not Path(f"/proc/{pid}").exists())


def children(pid: int) -> dict[int, str]:
    """pid → state letter of the direct children of a process."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == pid:
                found[int(entry.name)] = fields[0]
    return found


@pytest.fixture
def small(podwire: Podwire) -> Iterator[str]:
    """A lab of one node, for tests that break it."""
    podwire.ok("lab", "up", "--name", "small", "--nodes", "1")
    yield "small"
    podwire("lab", "down", "small")


def test_orphans_are_buried(podwire: Podwire, small: str) -> None:
    pid = podwire.pid(small)
    before = children(pid)
    podwire.ok("lab", "exec", "--name", small, "node-1", "--", "sh", "-c", "sleep 0.3 >/dev/null 2>&1 &")
    orphan = until(lambda: set(children(pid)) - set(before))
    until(lambda: not orphan & set(children(pid)))
    assert "Z" not in children(pid).values()


def test_a_lab_whose_pods_have_no_holder_any_more_ends_and_says_why(podwire: Podwire, small: str) -> None:
    """Its only child is the shim. Better no lab than one in which nothing can start."""
    log = podwire.state / small / "lab.log"
    (shim,) = children(podwire.pid(small))
    os.kill(shim, signal.SIGKILL)
    with log.open() as file:  # the next look at the labs deletes what is left of it
        until(lambda: small not in {lab["name"] for lab in podwire.labs()})
        assert "the process that holds the pods has ended" in file.read()


def test_nobody_gets_in_without_the_token(podwire: Podwire, small: str) -> None:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    for path in ("/api/v1/pods", "/lab/v1/status", "/lab/v1/paths"):
        connection = http.client.HTTPSConnection("127.0.0.1", port_of(podwire, small), timeout=5, context=context)
        with contextlib.closing(connection):
            connection.request("POST" if path.endswith("paths") else "GET", path)
            assert connection.getresponse().status == 401, path


def test_ranges_are_those_that_were_asked_for(podwire: Podwire) -> None:
    ranges = ["--service-cluster-ip-range", "10.50.0.0/20,fd00:50::/112", "--service-node-port-range", "31000-31009"]
    podwire.ok("lab", "up", "--name", "ranges", "--nodes", "1", *ranges)
    try:
        lab = Lab(podwire, "ranges", podwire.ok("lab", "kubeconfig", "ranges", "--path").strip())
        assert lab.kubectl("get", "service", "kubernetes", "-o", "jsonpath={.spec.clusterIP}") == "10.50.0.1"
        lab.kubectl("create", "service", "nodeport", "web", "--tcp=80:80")
        port = int(lab.kubectl("get", "service", "web", "-o", "jsonpath={.spec.ports[0].nodePort}"))
        address = lab.kubectl("get", "service", "web", "-o", "jsonpath={.spec.clusterIP}")
        assert 31000 <= port <= 31009
        assert ipaddress.ip_address(address) in ipaddress.ip_network("10.50.0.0/20")
    finally:
        podwire.ok("lab", "down", "ranges")
