"""What systemd is told, and the units that are printed for it."""

import re
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from podwire.cli.main import main
from podwire.hosts.systemd import node_unit, notify, server_unit


@pytest.mark.parametrize("abstract", [False, True])
def test_readiness_is_told_where_systemd_listens(abstract: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"podwire-test-{tmp_path.name}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(f"\0{name}" if abstract else name)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}" if abstract else name)
        notify("READY=1")
        assert systemd.recv(100) == b"READY=1"
    monkeypatch.delenv("NOTIFY_SOCKET")
    notify("READY=1")  # no service: nobody is told


def settings(unit: str) -> dict[str, str]:
    pairs = (line.partition("=") for line in unit.splitlines() if "=" in line)
    return {name: value for name, _, value in pairs}


def words(command: str) -> list[str]:
    """As systemd splits ExecStart=: quoted words with \\ as C has it, then %% and $$."""
    found = re.findall(r'"((?:[^"\\]|\\.)*)"|(\S+)', command)
    plain = [re.sub(r"\\(.)", r"\1", quoted) or bare for quoted, bare in found]
    return [word.replace("%%", "%").replace("$$", "$") for word in plain]


def test_the_command_is_the_one_that_was_given() -> None:
    command = [
        "/opt/pod wire/bin/podwire",
        "server",
        "--name",
        'a"b',
        "--data-dir",
        r"/srv/100%/$HOME\x",
        "--etcd",
        "https://a:1",
    ]
    assert words(settings(server_unit(command))["ExecStart"]) == command


def test_a_nodes_unit_ends_the_agent_alone(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["join", "--print-unit", "--state-dir", str(tmp_path)])
    assert done.exit_code == 0, done.output
    told = settings(done.output)
    assert (told["Type"], told["KillMode"], told["Restart"]) == ("notify", "process", "always")
    assert words(told["ExecStart"])[1:4] == ["join", "--state-dir", str(tmp_path)]
    assert told["WantedBy"] == settings(node_unit(["podwire"]))["WantedBy"] == "multi-user.target"


def test_a_servers_unit_has_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["server", "--advertise", "192.0.2.1", "--print-unit", "--etcd", "https://192.0.2.9:2379"]
    monkeypatch.setattr("sys.argv", ["/usr/bin/podwire", *arguments])
    done = CliRunner().invoke(main, arguments)
    assert words(settings(done.output)["ExecStart"]) == ["/usr/bin/podwire", *(a for a in arguments if a != "--print-unit")]
