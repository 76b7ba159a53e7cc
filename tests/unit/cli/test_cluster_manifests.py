"""The manifests for a real Kubernetes: whole, consistent with each other, with the commands, and with the plugin."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from podwire.cli.main import main
from podwire.cni.install import configuration, install_plugin
from podwire.model.cni import NOT_AVAILABLE
from podwire.wire.cni import decode_frame, encode_answer, parse_request

MANIFESTS = Path(__file__).parents[3] / "deploy/kubernetes"
KUBECTL = shutil.which("kubectl", path=str(Path(sys.executable).parent)) or shutil.which("kubectl") or ""

pytestmark = pytest.mark.skipif(not KUBECTL, reason="kubectl is not installed")


@pytest.mark.parametrize("overlay", ["flannel", "both", "kube-proxy"])
def test_manifests_are_whole(overlay: str) -> None:
    done = subprocess.run(
        [KUBECTL, "kustomize", str(MANIFESTS / "overlays" / overlay)], capture_output=True, text=True, timeout=20, check=True
    )
    documents = [d for d in yaml.safe_load_all(done.stdout) if d]
    (daemon,) = [d for d in documents if d["kind"] == "DaemonSet"]
    template = daemon["spec"]["template"]
    assert template["metadata"]["labels"] == daemon["spec"]["selector"]["matchLabels"]
    names = {(d["kind"], d["metadata"]["name"]) for d in documents}
    assert ("ServiceAccount", template["spec"]["serviceAccountName"]) in names
    for container in template["spec"]["containers"]:
        command = [argument.partition("=")[0] for argument in container["args"]]
        helped = CliRunner().invoke(main, [command[0], "--help"]).output
        assert all(option in helped for option in command[1:])
    maps = {d["metadata"]["name"]: d["data"] for d in documents if d["kind"] == "ConfigMap"}
    if "podwire" in maps:
        assert json.loads(maps["podwire"]["05-podwire.conflist"]) == configuration("podwire")


def test_the_startup_taint_takes_one_right_more(tmp_path: Path) -> None:
    shutil.copytree(MANIFESTS, tmp_path / "kubernetes")
    chosen = tmp_path / "kubernetes/mine"
    chosen.mkdir()
    (chosen / "kustomization.yaml").write_text("resources: [../overlays/both]\ncomponents: [../components/startup-taint]\n")
    done = subprocess.run([KUBECTL, "kustomize", str(chosen)], capture_output=True, text=True, timeout=20, check=True)
    (role,) = [d for d in yaml.safe_load_all(done.stdout) if d["kind"] == "ClusterRole"]
    assert {"apiGroups": [""], "resources": ["nodes"], "verbs": ["patch"]} in role["rules"]


@pytest.mark.parametrize(
    ("agent", "ready", "alive"),
    [("answers", True, True), ("refuses", False, True), ("was killed", False, True), ("hangs", False, False)],
)
def test_the_agents_probes_see_what_an_engine_would(tmp_path: Path, agent: str, ready: bool, alive: bool) -> None:
    daemon_set = yaml.safe_load((MANIFESTS / "agent" / "daemonset.yaml").read_text())
    (container,) = daemon_set["spec"]["template"]["spec"]["containers"]
    install_plugin(tmp_path, tmp_path / "cni.sock")
    asked: list[str] = []

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            frame = b"".join(iter(lambda: connection.recv(65536), b""))
            asked.append(parse_request(*decode_frame(frame)).command)
            refusal = json.dumps({"code": NOT_AVAILABLE, "msg": "no address is free"}).encode()
            connection.sendall(encode_answer(1, refusal) if agent == "refuses" else encode_answer(0, b""))

    def probe(name: str, listener: socket.socket) -> bool:
        command = [w.replace("/usr/lib/podwire/cni", str(tmp_path)) for w in container[name]["exec"]["command"]]
        command[-1] = command[-1].replace("timeout 10 ", "timeout 0.5 ")
        server = threading.Thread(target=serve, args=(listener,), daemon=True)
        if agent in ("answers", "refuses"):
            server.start()
        try:
            return subprocess.run(command, capture_output=True, timeout=3, check=False).returncode == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            if server.ident is not None:
                server.join(5)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "cni.sock"))
        listener.listen()
        if agent == "was killed":
            listener.close()
        assert (probe("readinessProbe", listener), probe("livenessProbe", listener)) == (ready, alive)
    assert asked == (["STATUS"] * 2 if agent in ("answers", "refuses") else [])


def test_a_take_over_that_was_cut_short_begins_again(tmp_path: Path) -> None:
    daemon_set = yaml.safe_load((MANIFESTS / "agent" / "daemonset.yaml").read_text())
    init = next(c for c in daemon_set["spec"]["template"]["spec"]["initContainers"] if c["name"] == "take-over")
    script = init["command"][2].replace("/var/lib/", f"{tmp_path}/")
    theirs, cut_short = tmp_path / "cni" / "networks" / "cbr0", tmp_path / "podwire" / ".take-over" / "agent"
    theirs.mkdir(parents=True)
    (theirs / "10.244.1.5").write_text("c1\r\neth0")
    cut_short.mkdir(parents=True)
    (cut_short / "reservations.db").touch()
    environment = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for expected in ("1 address taken over\n", ""):
        done = subprocess.run(["sh", "-ec", script], env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, expected), done.stderr
        assert [file.name for file in (tmp_path / "podwire").iterdir()] == ["cluster"]
        assert (tmp_path / "podwire" / "cluster" / "agent" / "reservations.db").exists()
