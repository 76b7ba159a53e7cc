"""`podwire verify overlay`: whoever says where to look is never answered about something else."""

import pytest
from click.testing import CliRunner

from podwire.cli.main import main

ETCD = ("--etcd-endpoints", "http://127.0.0.1:1")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*ETCD, "--kubeconfig-file", "/nowhere"), "give one of them"),
        ((*ETCD, "--name", "mine"), "--name is for a lab, --etcd-endpoints for this host"),
        (("--kubeconfig-file", "/nowhere", "--lab", "mine"), "--name is for a lab, --kubeconfig-file for this host"),
        (
            ("--kubeconfig-file", "/nowhere", "--etcd-username", "root"),
            "--etcd-username has no effect without --etcd-endpoints",
        ),
        (("--etcd-prefix", "/other"), "--etcd-prefix has no effect without --etcd-endpoints"),
        ((*ETCD, "--kube-annotation-prefix", "example.org"), "has no effect without --kubeconfig-file"),
        (("--node-name", "node-1"), "--node-name is for this host"),
    ],
)
def test_options_that_do_not_fit_together_are_wrong_usage(arguments: tuple[str, ...], words: str) -> None:
    done = CliRunner().invoke(main, ["verify", "overlay", *arguments])
    assert done.exit_code == 2
    assert words in done.output


def test_no_endpoints_are_not_a_lab() -> None:
    """As after `--etcd-endpoints "$UNSET"`."""
    done = CliRunner().invoke(main, ["verify", "overlay", "--etcd-endpoints", ""])
    assert done.exit_code != 0
    assert "etcd endpoints ''" in str(done.exception) + done.output


def test_the_password_in_the_environment_concerns_a_lab_in_no_way(tmp_path: object) -> None:
    environment = {"FLANNELD_ETCD_PASSWORD": "secret", "XDG_STATE_HOME": str(tmp_path)}
    done = CliRunner().invoke(main, ["verify", "overlay", "--name", "none"], env=environment)
    assert "no lab named 'none'" in str(done.exception) + done.output
