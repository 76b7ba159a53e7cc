import pytest
import yaml

from podwire.model.errors import InvalidInput
from podwire.model.proxyconfig import config_document, conntrack_switches, duration_seconds, parse_proxy_config
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
    assert config.healthz_at == ("0.0.0.0", 10256), "empty is not off"
    assert config.metrics_at == ("127.0.0.1", 10249)
    assert conntrack_switches(config.conntrack, cpus=8) == {
        "net/netfilter/nf_conntrack_max": "262144",
        "net/netfilter/nf_conntrack_tcp_timeout_established": "86400",
        "net/netfilter/nf_conntrack_tcp_timeout_close_wait": "3600",
    }


# By the names of v1alpha1, with the values of its SetDefaults_KubeProxyConfiguration; `mode` is ours.
DEFAULTS = """
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
clientConnection: {kubeconfig: "", acceptContentTypes: "", contentType: "", qps: 0, burst: 0}
hostnameOverride: ""
bindAddress: 0.0.0.0
healthzBindAddress: 0.0.0.0:10256
metricsBindAddress: 127.0.0.1:10249
bindAddressHardFail: false
mode: nftables
iptables: {masqueradeBit: 14, masqueradeAll: false, localhostNodePorts: true, syncPeriod: 30s, minSyncPeriod: 1s}
nftables: {masqueradeBit: 14, masqueradeAll: false, syncPeriod: 30s, minSyncPeriod: 1s}
ipvs: {scheduler: "", strictARP: false, excludeCIDRs: [], masqueradeAll: false, syncPeriod: 30s, minSyncPeriod: 0s,
       tcpTimeout: 0s, tcpFinTimeout: 0s, udpTimeout: 0s}
detectLocalMode: ""
detectLocal: {bridgeInterface: "", interfaceNamePrefix: ""}
clusterCIDR: ""
nodePortAddresses: []
conntrack: {maxPerCore: 32768, min: 131072, tcpEstablishedTimeout: 24h, tcpCloseWaitTimeout: 1h, tcpBeLiberal: false,
            udpTimeout: 0s, udpStreamTimeout: 0s}
"""


def test_an_empty_file_is_kube_proxys_defaults() -> None:
    config, _ = parse_proxy_config("", "flags")
    assert config.healthz_at == ("0.0.0.0", 10256)
    assert config.metrics_at == ("127.0.0.1", 10249)
    assert yaml.safe_load(yaml.safe_dump(config_document(config))) == yaml.safe_load(DEFAULTS)


def test_what_is_written_of_addresses_that_are_not_listened_on() -> None:
    off = "{healthzBindAddress: '0.0.0.0:0', metricsBindAddress: '[::1]:0'}"
    document = config_document(parse_proxy_config(off, "f")[0])
    assert (document["healthzBindAddress"], document["metricsBindAddress"]) == ("0.0.0.0:0", "127.0.0.1:0")
    assert config_document(parse_proxy_config("bindAddress: '::'", "f")[0])["healthzBindAddress"] == "[::]:10256"


def test_the_connection_trackers_switches_have_the_kernels_names() -> None:
    text = """
    conntrack: {maxPerCore: 10, min: 7, tcpEstablishedTimeout: 1m, tcpCloseWaitTimeout: 2m, udpTimeout: 3m,
                udpStreamTimeout: 4m, tcpBeLiberal: true}
    """
    conntrack = parse_proxy_config(text, "f")[0].conntrack
    switches = {
        name.removeprefix("net/netfilter/nf_conntrack_"): value for name, value in conntrack_switches(conntrack, cpus=2).items()
    }
    assert switches == {
        "max": "20",
        "tcp_timeout_established": "60",
        "tcp_timeout_close_wait": "120",
        "udp_timeout": "180",
        "udp_timeout_stream": "240",
        "tcp_be_liberal": "1",
    }
    nothing = parse_proxy_config("conntrack: {maxPerCore: 0, tcpEstablishedTimeout: '', tcpCloseWaitTimeout: 0s}", "f")[
        0
    ].conntrack
    assert conntrack_switches(nothing, cpus=2) == {}


@pytest.mark.parametrize("bit", [0, 31])
def test_every_bit_of_a_mark_may_be_the_one_to_masquerade_by(bit: int) -> None:
    config, _ = parse_proxy_config(f"iptables: {{masqueradeBit: {bit}}}", "f")
    assert config.iptables.masquerade_bit == bit


def test_every_scheduler_of_the_kernel_is_known() -> None:
    for name in ("rr", "wrr", "lc", "wlc", "lblc", "lblcr", "sh", "dh", "sed", "nq", "mh", "fo", "ovf", "twos"):
        assert parse_proxy_config(f"ipvs: {{scheduler: {name}}}", "f")[0].ipvs.scheduler == name


def test_known_fields_without_effect_are_taken_in_silence() -> None:
    text = """
    {featureGates: {A: true}, logging: {format: text}, enableProfiling: true, showHiddenMetricsForVersion: "1.33",
     winkernel: {}, oomScoreAdj: -999, configSyncPeriod: 15m, portRange: "", udpIdleTimeout: 250ms, windowsRunAsService: false}
    """
    assert parse_proxy_config(text, "f")[1] == []


@pytest.mark.parametrize(
    ("text", "healthz", "metrics"),
    [
        ("bindAddress: '::'", ("::", 10256), ("::1", 10249)),
        ("{healthzBindAddress: 192.0.2.1, metricsBindAddress: 0.0.0.0}", ("192.0.2.1", 10256), ("0.0.0.0", 10249)),
        ("{healthzBindAddress: '::1', metricsBindAddress: '[::]:1'}", ("::1", 10256), ("::", 1)),
        ("{healthzBindAddress: '0.0.0.0:0', metricsBindAddress: '[::]:0'}", None, None),
        ("{healthzBindAddress: '0.0.0.0:65535', metricsBindAddress: '127.0.0.1:1'}", ("0.0.0.0", 65535), ("127.0.0.1", 1)),
    ],
)
def test_where_it_listens(text: str, healthz: tuple[str, int] | None, metrics: tuple[str, int] | None) -> None:
    config, _ = parse_proxy_config(text, "f")
    assert (config.healthz_at, config.metrics_at) == (healthz, metrics)


@pytest.mark.parametrize("text", [KUBEADM, "", "{healthzBindAddress: '[::1]:0', mode: ipvs}"])
def test_a_configuration_that_is_written_reads_as_it_was(text: str) -> None:
    document = config_document(parse_proxy_config(text, "f")[0])
    assert {"masqueradeBit", "masqueradeAll", "localhostNodePorts"} <= document["iptables"].keys(), "defaults are written, too"
    again, warnings = parse_proxy_config(yaml.safe_dump(document), "g")
    assert (config_document(again), warnings) == (document, [])


def test_flags_win_over_the_file() -> None:
    overrides = {"mode": "iptables", "iptables.masqueradeAll": True, "nodePortAddresses": ["192.0.2.0/24"]}
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
        ("nodePortAddresses: [primary, Localhost]", "nodePortAddresses: 'Localhost'"),
        ("a: 1\n---\na: 2", "has 2 YAML documents"),
        ("healthzBindAddress: here", "healthzBindAddress: 'here' is no address and port"),
        ("metricsBindAddress: '::1:10249x'", "is no address and port"),
        ("metricsBindAddress: '[127.0.0.1]:1'", "is no address and port"),
        ("healthzBindAddress: '0.0.0.0:65536'", "is no address and port"),
        ("healthzBindAddress: '0.0.0.0:１'", "is no address and port"),
        ("healthzBindAddress: '0.0.0.0:'", "is no address and port"),
        ("bindAddress: here", "bindAddress: 'here' is no IP address"),
        ("iptables: []", r"\$\.iptables"),
        ("iptables: 3", r"\$\.iptables"),
        ("iptables: {masqueradeBit: -1}", r"iptables\.masqueradeBit: -1 is not between 0 and 31"),
        ("nftables: {masqueradeBit: 32}", r"nftables\.masqueradeBit: 32 is not between 0 and 31"),
        ("iptables: {syncPeriod: 1 fortnight}", r"iptables\.syncPeriod: '1 fortnight' is no duration"),
        ("conntrack: {maxPerCore: -1}", r"conntrack\.maxPerCore: -1 is less than 0"),
        ("conntrack: {tcpEstablishedTimeout: -1s}", "'-1s' is no duration"),
        ("ipvs: {scheduler: fairest}", "'fairest' is not known"),
        ("iptables: {masqueradeBit: none}\n", r"iptables\.masqueradeBit"),
        ("conntrack: {udpTimeout: soon}", "'soon' is no duration"),
        ("detectLocalMode: Magic", "none of ClusterCIDR"),
        ("detectLocalMode: InterfaceNamePrefix", "needs detectLocal.interfaceNamePrefix"),
        ("detectLocalMode: BridgeInterface\ndetectLocal: {bridgeInterface: a/b}", "is no name of a device"),
        ("detectLocalMode: BridgeInterface", "needs detectLocal.bridgeInterface"),
    ],
)
def test_what_is_wrong_is_said(text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        parse_proxy_config(text, "the-file", {"iptables.masqueradeAll": True})
    assert str(caught.value).startswith("the-file: ")


@pytest.mark.parametrize(
    ("text", "seconds"), [("", 0.0), ("1h30m", 5400.0), ("500ms", 0.5), ("0s", 0.0), ("0", 0.0), ("1.5s", 1.5), ("2us", 2e-6)]
)
def test_durations(text: str, seconds: float) -> None:
    assert duration_seconds(text, "x") == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["5", "s", "1s2", "-1s", "1 s"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(InvalidInput):
        duration_seconds(text, "x")
