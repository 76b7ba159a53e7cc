"""`podwire proxy` under the flags that kube-proxy is started with."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from podwire import __version__
from podwire.cli.main import main

# As `kube-proxy --help` of 1.20 and of 1.36 lists them.
SWITCHES = """
    --bind-address-hard-fail --cleanup-ipvs --iptables-localhost-nodeports --ipvs-strict-arp --masquerade-all --profiling
    --conntrack-tcp-be-liberal
    --add-dir-header --alsologtostderr --logtostderr --one-output --skip-headers --skip-log-headers --add_dir_header
    --log-json-split-stream --log-text-split-stream
"""
VALUES = """
    --bind-address=:: --cluster-cidr=10.0.0.0/8 --config-sync-period=15m --conntrack-max-per-core=1 --conntrack-min=1
    --conntrack-tcp-timeout-close-wait=1h --conntrack-tcp-timeout-established=24h --conntrack-udp-timeout=1s
    --conntrack-udp-timeout-stream=1s --detect-local-mode=NodeCIDR --feature-gates=A=true,B=false
    --healthz-bind-address=0.0.0.0:10256 --healthz-port=10256 --hostname-override=n1 --iptables-masquerade-bit=14
    --iptables-min-sync-period=1s --iptables-sync-period=30s --ipvs-exclude-cidrs=10.0.0.0/8 --ipvs-min-sync-period=1s
    --ipvs-scheduler=rr --ipvs-sync-period=30s --ipvs-tcp-timeout=1s --ipvs-tcpfin-timeout=1s --ipvs-udp-timeout=1s
    --kube-api-burst=10 --kube-api-content-type=application/json --kube-api-qps=5 --kubeconfig= --master=
    --metrics-bind-address=[::]:10249 --metrics-port=10249 --nodeport-addresses=10.0.0.0/8 --oom-score-adj=-999
    --pod-bridge-interface=cni0 --pod-interface-name-prefix=veth --proxy-mode=ipvs --proxy-port-range=1-2 --udp-timeout=1s
    --show-hidden-metrics-for-version=1.35
    --log-backtrace-at=:0 --log_dir=/ --log-file=x --log-file-max-size=1800 --log-flush-frequency=5s --logging-format=text
    --log-json-info-buffer-size=0 --log-text-info-buffer-size=0 --stderrthreshold=2 --vmodule=a=1 -v=2 --v=2 --config=
"""


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["proxy", *arguments])


def written(path: Path, *arguments: str) -> dict[str, Any]:
    """The configuration that these flags make."""
    result = run(*arguments, "--write-config-to", str(path))
    assert result.exit_code == 0, result.output
    document = yaml.safe_load(path.read_text())
    assert isinstance(document, dict)
    return document


@pytest.mark.parametrize("flag", [*SWITCHES.split(), *VALUES.split(), *(f"{name}=false" for name in SWITCHES.split())])
def test_each_of_kube_proxys_flags_is_taken(flag: str, tmp_path: Path) -> None:
    written(tmp_path / "c", flag)


def test_a_switch_takes_no_word_for_its_value(tmp_path: Path) -> None:
    document = written(tmp_path / "c", "--masquerade-all", "--profiling", "--ipvs-strict-arp=false", "-v", "4")
    assert (document["iptables"]["masqueradeAll"], document["ipvs"]["strictARP"]) == (True, False)
    assert run("--masquerade-all", "false").exit_code == 2
    assert run("--profiling", "--version").output == f"podwire {__version__}\n"


def test_node_port_addresses_add_up(tmp_path: Path) -> None:
    document = written(tmp_path / "c", "--nodeport-addresses=10.0.0.0/8,fd00::/8", "--nodeport-addresses", "192.0.2.0/24")
    assert document["nodePortAddresses"] == ["10.0.0.0/8", "fd00::/8", "192.0.2.0/24"]


@pytest.mark.parametrize(
    ("flags", "healthz", "metrics"),
    [
        ((), "0.0.0.0:10256", "127.0.0.1:10249"),
        (("--healthz-bind-address=", "--metrics-bind-address", ""), "0.0.0.0:0", "127.0.0.1:0"),
        (("--healthz-port=0", "--metrics-port=1"), "0.0.0.0:0", "127.0.0.1:1"),
        (("--healthz-bind-address=192.0.2.1", "--metrics-bind-address=[::]:7"), "192.0.2.1:10256", "[::]:7"),
        (("--bind-address=::",), "[::]:10256", "[::1]:10249"),
    ],
)
def test_where_it_listens(flags: tuple[str, ...], healthz: str, metrics: str, tmp_path: Path) -> None:
    document = written(tmp_path / "c", *flags)
    assert (document["healthzBindAddress"], document["metricsBindAddress"]) == (healthz, metrics)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--iptables-masquerade-bit=40",), "iptables.masqueradeBit: 40 is not between 0 and 31"),
        (("--conntrack-min=-1",), "conntrack.min: -1 is less than 0"),
        (("--iptables-sync-period", "1 fortnight"), "'1 fortnight' is no duration"),
        (("--ipvs-scheduler=fairest",), "'fairest' is not known"),
    ],
)
def test_a_value_that_is_wrong_is_said_in_one_line(flags: tuple[str, ...], message: str) -> None:
    result = run(*flags, "--write-config-to=/dev/null")
    assert (result.exit_code, result.output.count("\n")) == (1, 1)
    assert message in result.output
