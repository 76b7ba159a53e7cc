import pytest

from podwire.model.errors import InvalidInput
from podwire.model.proxyconfig import conntrack_switches, duration_seconds, host_and_port, parse_proxy_config
from podwire.model.proxymode import ProxyMode

# As kubeadm writes it: much is null, much is of other back ends.
KUBEADM = """
apiVersion: kubeproxy.config.k8s.io/v1alpha1
bindAddress: 0.0.0.0
bindAddressHardFail: false
clientConnection:
  acceptContentTypes: ""
  burst: 0
  contentType: ""
  kubeconfig: /var/lib/kube-proxy/kubeconfig.conf
  qps: 0
clusterCIDR: 10.244.0.0/16,fd00:10:244::/56
configSyncPeriod: 0s
conntrack:
  maxPerCore: null
  min: null
  tcpBeLiberal: false
  tcpCloseWaitTimeout: null
  tcpEstablishedTimeout: null
  udpStreamTimeout: 0s
  udpTimeout: 0s
detectLocal:
  bridgeInterface: ""
  interfaceNamePrefix: ""
detectLocalMode: ""
enableProfiling: false
healthzBindAddress: ""
hostnameOverride: ""
iptables:
  localhostNodePorts: null
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
ipvs:
  excludeCIDRs: null
  scheduler: ""
kind: KubeProxyConfiguration
logging:
  flushFrequency: 0
metricsBindAddress: 127.0.0.1:10249
mode: ""
nftables:
  masqueradeAll: true
  masqueradeBit: null
  minSyncPeriod: 0s
nodePortAddresses: null
oomScoreAdj: null
portRange: ""
"""


def test_what_kubeadm_writes_is_understood() -> None:
    config, warnings = parse_proxy_config(KUBEADM, "config.conf")
    assert warnings == []
    assert config.client_connection.kubeconfig == "/var/lib/kube-proxy/kubeconfig.conf"
    assert config.proxy_mode is ProxyMode.NFTABLES
    assert [str(n) for n in config.cluster_cidrs] == ["10.244.0.0/16", "fd00:10:244::/56"]
    assert config.masquerade_all
    assert host_and_port(config.healthz_bind_address) is None
    assert host_and_port(config.metrics_bind_address) == ("127.0.0.1", 10249)
    assert conntrack_switches(config.conntrack, cpus=8) == {
        "net/netfilter/nf_conntrack_max": "262144",
        "net/netfilter/nf_conntrack_tcp_timeout_established": "86400",
        "net/netfilter/nf_conntrack_tcp_timeout_close_wait": "3600",
    }


def test_an_empty_file_is_kube_proxys_defaults() -> None:
    config, _ = parse_proxy_config("", "flags")
    assert host_and_port(config.healthz_bind_address) == ("0.0.0.0", 10256)


def test_flags_win_over_the_file() -> None:
    overrides = {"mode": "iptables", "iptables.masqueradeAll": True, "nodePortAddresses": ["primary", "192.0.2.0/24"]}
    config, _ = parse_proxy_config(KUBEADM, "config.conf", overrides)
    assert (config.proxy_mode, config.masquerade_all) == (ProxyMode.IPTABLES, True)
    assert [str(n) for n in config.node_port_networks] == ["192.0.2.0/24"]


def test_unknown_fields_are_said() -> None:
    _, warnings = parse_proxy_config("mood: good\nconntrack: {max: 3}\nipvs: {scheduler: rr}", "f")
    assert warnings == ["f: field mood is not known and left out", "f: field conntrack.max is not known and left out"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "must be a mapping"),
        ("a: [", "is not YAML"),
        ("kind: Pod", "kind is 'Pod', not KubeProxyConfiguration"),
        ("mode: userspace", "'userspace' is not served; there are: nftables"),
        ("clusterCIDR: 10.0.0.0/99", "clusterCIDR"),
        ("nodePortAddresses: [everything]", "nodePortAddresses"),
        ("healthzBindAddress: here", "is no address and port"),
        ("iptables: {masqueradeBit: none}\n", r"iptables\.masqueradeBit"),
        ("conntrack: {udpTimeout: soon}", "'soon' is no duration"),
        ("detectLocalMode: Magic", "none of ClusterCIDR"),
        ("detectLocalMode: InterfaceNamePrefix", "is not served"),
        ("detectLocalMode: BridgeInterface", "needs detectLocal.bridgeInterface"),
    ],
)
def test_what_is_wrong_is_said(text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        parse_proxy_config(text, "the-file")
    assert str(caught.value).startswith("the-file: ")


@pytest.mark.parametrize(
    ("text", "seconds"), [("1h30m", 5400.0), ("500ms", 0.5), ("0s", 0.0), ("0", 0.0), ("1.5s", 1.5), ("2us", 2e-6)]
)
def test_durations(text: str, seconds: float) -> None:
    assert duration_seconds(text, "x") == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["5", "s", "1s2", "-1s", "1 s"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(InvalidInput):
        duration_seconds(text, "x")
