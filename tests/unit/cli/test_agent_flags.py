"""`podwire agent` takes what flanneld 0.28 takes, with the same defaults, on the command line and from the environment."""

from collections.abc import Mapping
from typing import Any

import pytest
from click.testing import CliRunner

from podwire.cli.agent import agent

FLAGS: dict[str, Any] = {
    "etcd-endpoints": "http://127.0.0.1:4001,http://127.0.0.1:2379",
    "etcd-prefix": "/coreos.com/network",
    "etcd-keyfile": "",
    "etcd-certfile": "",
    "etcd-cafile": "",
    "etcd-username": "",
    "etcd-password": "",
    "iface": (),
    "iface-regex": (),
    "iface-can-reach": None,
    "subnet-file": "/run/flannel/subnet.env",
    "public-ip": None,
    "public-ipv6": None,
    "subnet-lease-renew-margin": 60,
    "ip-masq": False,
    "ip-masq-fully-random-disable": False,
    "kube-subnet-mgr": False,
    "kube-api-url": "",
    "kube-annotation-prefix": "flannel.alpha.coreos.com",
    "kubeconfig-file": "",
    "healthz-ip": "0.0.0.0",
    "healthz-port": 0,
    "iptables-resync": 5,
    "iptables-forward-rules": True,
    "ip-blackhole-route": False,
    "net-config-path": "/etc/kube-flannel/net-conf.json",
    "set-node-network-unavailable": True,
}
"""flanneld's, with its defaults; None and () where it has an empty string."""


def settings(arguments: list[str], environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the command would run with."""
    found: dict[str, Any] = {}
    monkeypatch.setattr("podwire.cli.agentrun.run_agent", found.update)
    done = CliRunner().invoke(agent, arguments, env=dict(environment))
    assert done.exit_code == 0, done.output
    return found


def test_every_flag_with_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    found = settings([], {}, monkeypatch)
    for flag, default in FLAGS.items():
        value = found[flag.replace("-", "_")]
        assert (value if isinstance(default, bool | int | tuple | None) else str(value)) == default, flag


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("ETCD_ENDPOINTS", "https://a:2379", "https://a:2379"),
        ("ETCD_PASSWORD", "secret", "secret"),
        ("IP_MASQ", "true", True),
        ("IPTABLES_FORWARD_RULES", "false", False),
        ("IP_BLACKHOLE_ROUTE", "true", True),
        ("SUBNET_LEASE_RENEW_MARGIN", "30", 30),
        ("KUBE_SUBNET_MGR", "true", True),
        ("IFACE", "eth1", ("eth1",)),
        ("IFACE_REGEX", "eth[0 ]+|wlan 1", ("eth[0 ]+|wlan 1",)),
    ],
)
def test_each_from_the_environment(name: str, text: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings([], {f"FLANNELD_{name}": text}, monkeypatch)[name.lower()] == value
    assert settings([], {f"FLANNELD_{name}": ""}, monkeypatch)[name.lower()] == FLAGS[name.lower().replace("_", "-")]


def test_as_go_writes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--ip-masq", "--iptables-forward-rules=false", "--iface=eth0", "--iface=eth1", "--public-ip=203.0.113.5"]
    found = settings(words, {}, monkeypatch)
    assert (found["ip_masq"], found["iptables_forward_rules"], found["iface"]) == (True, False, ("eth0", "eth1"))
    assert str(found["public_ip"]) == "203.0.113.5"


@pytest.mark.parametrize(
    "words",
    [
        ["--subnet-lease-renew-margin", "1440"],
        ["--public-ip", "2001:db8::1"],
        ["--iface-regex", "("],
        ["--kube-annotation-prefix", "a/b/c"],
        ["--healthz-ip", "nowhere"],
        ["--iptables-resync", "0"],
    ],
)
def test_wrong_values_are_wrong_usage(words: list[str]) -> None:
    done = CliRunner().invoke(agent, words)
    assert done.exit_code == 2
    assert words[0].lstrip("-") in done.output


@pytest.mark.parametrize(
    ("words", "environment"),
    [
        (["--kube-subnet-mgr", "--subnet-manager", "etcd"], {}),
        (["--kube-subnet-mgr"], {"FLANNELD_SUBNET_MANAGER": "etcd"}),
    ],
)
def test_two_subnet_managers_are_wrong_usage(words: list[str], environment: Mapping[str, str]) -> None:
    done = CliRunner().invoke(agent, words, env=dict(environment))
    assert done.exit_code == 2
    assert "contradict" in done.output


def test_the_kube_manager_may_be_named_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings(["--kube-subnet-mgr", "--subnet-manager", "kube"], {}, monkeypatch)["kube_subnet_mgr"] is True
