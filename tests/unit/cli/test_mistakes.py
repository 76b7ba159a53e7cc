"""What people get wrong: each mistake is said in one line, with what to do; nothing is started, and nothing is a traceback."""

import re
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from podwire.cli.main import main

USAGE, FAILURE = 2, 1
NO_LAB = "no lab named 'default' is up: `podwire lab ls` shows those that are, `podwire lab up` starts one"
TOKEN = f"abcdef.0123456789abcdef.{'a' * 64}"


def kubeconfig(cluster: dict[str, Any], user: dict[str, Any], current: str = "a") -> str:
    return yaml.safe_dump(
        {
            "current-context": current,
            "contexts": [{"name": "a", "context": {"cluster": "c", "user": "u"}}],
            "clusters": [{"name": "c", "cluster": cluster}],
            "users": [{"name": "u", "user": user}],
        }
    )


NOBODY = {"server": "https://127.0.0.1:1"}
FILES: dict[str, str | bytes] = {
    "broken.yaml": "a: [b\n",
    "binary.yaml": b"\x89PNG\r\n",
    "date.yaml": "a: 2026-02-30\n",
    "empty.yaml": "# nothing yet\n",
    "list.yaml": "- a\n",
    "away.kubeconfig": kubeconfig(NOBODY, {"token": "t"}),
    "unresolved.kubeconfig": kubeconfig({"server": "https://no-such-host.invalid:6443"}, {"token": "t"}),
    "no-server.kubeconfig": kubeconfig({}, {}),
    "no-context.kubeconfig": kubeconfig(NOBODY, {}, ""),
    "no-file.kubeconfig": kubeconfig(NOBODY, {"client-certificate": "gone.pem", "client-key": "gone.pem"}),
    "no-base64.kubeconfig": kubeconfig(NOBODY | {"certificate-authority-data": "abc"}, {}),
    "no-pem.kubeconfig": kubeconfig(NOBODY | {"certificate-authority-data": "Zm9v"}, {}),
    "odd.kubeconfig": "current-context: a\ncontexts: a\n",
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    (tmp_path / "no-manifests").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PODWIRE_STATE_DIR", str(tmp_path / "labs"))
    return tmp_path


@pytest.fixture
def no_resolver(monkeypatch: pytest.MonkeyPatch) -> None:
    """No name is known, and none is asked for outside of this machine; addresses are what they are."""
    resolve = socket.getaddrinfo

    def known(host: str, port: int, family: int = 0, type: int = 0, proto: int = 0, flags: int = 0) -> list[Any]:
        return resolve(host, port, family, type, proto, flags | socket.AI_NUMERICHOST)

    monkeypatch.setattr(socket, "getaddrinfo", known)


@pytest.mark.usefixtures("no_resolver")
@pytest.mark.parametrize(
    ("line", "status", "words"),
    [
        # which command
        ("labs", USAGE, "No such command 'labs'"),
        ("lab start", USAGE, "No such command 'start'"),
        ("lab up --node 3", USAGE, "No such option '--node'.*--nodes"),
        ("lab up --nodes 0", USAGE, "0 is not in the range"),
        ("lab up --ip-family ipv5", USAGE, "'ipv5' is not one of 'ipv4', 'ipv6', 'dual'"),
        ("lab up --backend carrier-pigeon", USAGE, "carrier-pigeon"),
        ("wait", USAGE, "Missing option '--programmed'"),
        ("wait --programmed pod/web", USAGE, "takes a Service, as svc/NAME"),
        ("paths --pod cart", USAGE, "podwire paths --pod FROM --to TO"),
        ("lab fault drop node-1", USAGE, "Missing option '--percent'"),
        # which lab
        ("paths", FAILURE, NO_LAB),
        ("lab down", FAILURE, NO_LAB),
        ("lab exec world ls", FAILURE, NO_LAB),
        ("lab logs --follow", FAILURE, NO_LAB),
        ("lab kubeconfig --path", FAILURE, NO_LAB),
        ("lab node add", FAILURE, NO_LAB),
        ("status services", FAILURE, NO_LAB),
        ("verify overlay", FAILURE, NO_LAB),
        ("wait --programmed svc/web", FAILURE, NO_LAB),
        # manifests
        ("lab up -f missing.yaml", USAGE, "'missing.yaml' does not exist"),
        ("lab up -f broken.yaml", FAILURE, r"broken.yaml: is not YAML \(line 2, column 1: "),
        ("lab up -f binary.yaml", FAILURE, "binary.yaml: is not YAML"),
        ("lab up -f date.yaml", FAILURE, r"date.yaml: is not YAML \(day is out of range"),
        ("lab up -f empty.yaml", FAILURE, "nothing to apply: empty.yaml holds no object"),
        ("lab up -f list.yaml", FAILURE, "list.yaml, document 1 is no Kubernetes object: it needs apiVersion and kind"),
        ("lab up -f no-manifests", FAILURE, r"no-manifests holds no \*.yaml"),
        # another cluster
        ("status services --kubeconfig missing", FAILURE, r"missing: cannot be read \(No such file or directory\)"),
        ("status services --kubeconfig no-manifests", FAILURE, r"no-manifests: cannot be read \(Is a directory\)"),
        ("status services --kubeconfig broken.yaml", FAILURE, r"broken.yaml: is not YAML \(line 2, column 1: "),
        ("status services --kubeconfig list.yaml", FAILURE, "list.yaml: is not a kubeconfig file"),
        ("status services --kubeconfig odd.kubeconfig", FAILURE, "contexts has no entry named 'a'; it has: none"),
        ("status services --kubeconfig no-context.kubeconfig", FAILURE, "no context is chosen; set current-context"),
        ("status services --kubeconfig no-server.kubeconfig", FAILURE, "cluster 'c' has no server URL"),
        (
            "status services --kubeconfig no-file.kubeconfig",
            FAILURE,
            r"gone.pem: .*client-certificate cannot be read \(No such",
        ),
        ("status services --kubeconfig no-base64.kubeconfig", FAILURE, "certificate-authority-data is no base64"),
        ("status services --kubeconfig no-pem.kubeconfig", FAILURE, "certificate-authority is no PEM certificate"),
        (
            "status services --kubeconfig away.kubeconfig",
            FAILURE,
            r"at https://127.0.0.1:1 did not answer \(Connection refused\)",
        ),
        (
            "status services --kubeconfig unresolved.kubeconfig",
            FAILURE,
            r"no-such-host.invalid:6443 did not answer \(Name or service not known\)",
        ),
        # real machines
        (
            "proxy --config missing.yaml",
            FAILURE,
            r"missing.yaml: cannot be read \(No such file or directory\); give a KubeProxyConf",
        ),
        ("proxy --config broken.yaml", FAILURE, r"broken.yaml: is not YAML \(line 2, column 1: "),
        ("proxy --config binary.yaml", FAILURE, "binary.yaml: is not YAML"),
        ("proxy --config list.yaml", FAILURE, "list.yaml: is no KubeProxyConfiguration"),
        ("proxy --proxy-mode userspace", FAILURE, "'userspace' is not served; there are: nftables, iptables, ipvs"),
        ("agent --public-ip here", USAGE, "'here' is no IP address"),
        ("server --listen here", USAGE, "'here' is not like :6443"),
        ("server --data-dir broken.yaml/a --advertise 127.0.0.1", FAILURE, r"broken.yaml/a cannot be made \(Not a directory\)"),
        ("token --data-dir no-manifests", FAILURE, "is no server's data directory: say which with --data-dir"),
        ("join --state-dir state", USAGE, "podwire join URL --token TOKEN"),
        ("join https://127.0.0.1:1 --token abc --state-dir state", FAILURE, "this is no join token: `podwire token`"),
        (f"join https://127.0.0.1:1 --token {TOKEN} --state-dir state", FAILURE, r"https://127.0.0.1:1.*Connection refused"),
        ("leave --state-dir state", FAILURE, "nothing to leave"),
        # containers
        ("cni install --bin-dir broken.yaml/bin", FAILURE, r"bin cannot be written \(Not a directory\).*--bin-dir"),
        ("ipam ls --state-dir state", FAILURE, "is that the agent's --state-dir"),
        ("ipam explain here", USAGE, "'here' is not an IP address"),
        ("ipam gc --cni-socket none", FAILURE, r"no agent serves none \(No such file or directory\)"),
        ("ipam import no-manifests --state-dir broken.yaml/a", FAILURE, r"cannot be made \(Not a directory\).*--state-dir"),
    ],
)
def test_a_mistake_is_said_in_one_line(here: Path, line: str, status: int, words: str) -> None:
    done = CliRunner().invoke(main, line.split(), prog_name="podwire")
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == status, done.output
    said = done.stderr.strip().splitlines()
    assert re.search(words, said[-1]), done.stderr
    assert said[-1].startswith("Error: ")
    assert len(said) == 1 if status == FAILURE else said[0].startswith("Usage: podwire"), done.stderr
    assert not (here / "labs").exists(), "nothing was started"
    assert not (here / "state" / "node.json").exists()
