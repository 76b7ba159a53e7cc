"""What `podwire server` is told and cannot do is said before anything is made."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from podwire.cli.main import main


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--listen", "6443"], "is not like :6443"),
        (["--listen", "127.0.0.1:99999"], "is not like :6443"),
        (["--listen", "127.0.0.1:0"], "is not like :6443"),
        (["--pod-cidr", "10.1.0.0/16", "--pod-cidr", "10.2.0.0/16"], "give one per family"),
        (["--pod-cidr", "10.96.0.0/16"], "overlaps 10.96.0.0/16, which is --pod-cidr"),
        (["--load-balancer-pool", "10.244.9.0/24"], "overlaps 10.244.0.0/16, which is --pod-cidr"),
        (["--pod-cidr", "10.1.0.0/30"], "each node gets a /24"),
        (["--service-cidr", "10.96.0.0/32"], "none of /1 to /29"),
        (["--service-cidr", "::/0"], "none of /64 to /125"),
        (["--etcd-cafile", "ca.crt"], "--etcd-cafile has no effect without --etcd"),
        (["--etcd-certfile", "own.crt"], "--etcd-certfile has no effect without --etcd"),
        (["--etcd-keyfile", "own.key"], "--etcd-keyfile has no effect without --etcd"),
        (["--etcd-username", "root"], "--etcd-username has no effect without --etcd"),
        (["--etcd", ""], "give the URL of a member"),
        (["--name", ""], "give a name or an address"),
        (["--data-dir", ""], "name a directory"),
    ],
)
def test_wrong_usage_makes_nothing(arguments: list[str], words: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    done = CliRunner().invoke(main, ["server", "--data-dir", str(data), "--advertise", "192.0.2.1", *arguments])
    assert done.exit_code == 2, done.output
    assert words in done.output
    assert not data.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["token", "--data-dir", ""],
        ["join", "https://192.0.2.1:6443", "--token", "t", "--state-dir", ""],
        ["join", "https://192.0.2.1:6443", "--token", "t", "--run-dir", ""],
        ["leave", "--state-dir", ""],
        ["cluster-agent", "--node-name", "n", "--cluster-cidr", "10.244.0.0/16", "--state-dir", ""],
    ],
)
def test_an_empty_directory_is_not_the_working_directory(arguments: list[str]) -> None:
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2, done.output
    assert "name a directory" in done.output
