"""`podwire proxy`: kube-proxy's job on this host, under kube-proxy's flags and configuration file."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click

from podwire import __version__
from podwire.cli.goflags import GoCommand, switch

F = TypeVar("F", bound=Callable[..., Any])


class _Flag(NamedTuple):
    """One of kube-proxy's flags: the field of KubeProxyConfiguration that it sets ("" for none; `text` empty: it is taken
    and does nothing here)."""

    name: str
    field: str
    metavar: str
    text: str
    kind: Any = str


_WITHOUT_EFFECT = (
    "--config-sync-period", "--kube-api-qps", "--kube-api-burst", "--kube-api-content-type", "--oom-score-adj",
    "--feature-gates", "--show-hidden-metrics-for-version", "--proxy-port-range", "--udp-timeout",
    "--ipvs-sync-period", "--ipvs-min-sync-period", "--ipvs-exclude-cidrs", "--ipvs-tcp-timeout", "--ipvs-tcpfin-timeout",
    "--ipvs-udp-timeout", "--machine-id-file", "--boot-id-file",
    "--logging-format", "--log-flush-frequency", "--log-backtrace-at", "--log-dir", "--log-file", "--log-file-max-size",
    "--log-json-info-buffer-size", "--log-text-info-buffer-size", "--stderrthreshold", "--vmodule",
)  # fmt: skip
_SWITCHES_WITHOUT_EFFECT = (
    "--profiling", "--cleanup-ipvs", "--logtostderr", "--alsologtostderr", "--add-dir-header", "--skip-headers",
    "--skip-log-headers", "--one-output", "--log-json-split-stream", "--log-text-split-stream",
)  # fmt: skip
"""How kube-proxy works inside, what podwire does anyhow (`--cleanup` of all modes), and where klog writes (here: stderr)."""

_SWITCH = "[=true|false]"
_FLAGS = (
    _Flag(
        "--bind-address",
        "bindAddress",
        "ADDRESS",
        "The node's own address; 0.0.0.0 or :: leaves it to its Node. If it is IPv6, so are /healthz and /metrics "
        "by default. [default: 0.0.0.0]",
    ),
    _Flag(
        "--healthz-bind-address",
        "healthzBindAddress",
        "ADDRESS:PORT",
        "/healthz and /livez; empty or port 0: not served. [default: 0.0.0.0:10256]",
    ),
    _Flag(
        "--metrics-bind-address",
        "metricsBindAddress",
        "ADDRESS:PORT",
        "/metrics and /proxyMode; empty or port 0: not served. [default: 127.0.0.1:10249]",
    ),
    _Flag("--bind-address-hard-fail", "bindAddressHardFail", _SWITCH, "End when one of these cannot be listened on.", bool),
    _Flag("--proxy-mode", "mode", "MODE", "nftables, iptables or ipvs. [default: nftables]"),
    _Flag("--cluster-cidr", "clusterCIDR", "CIDR[,CIDR]", "Where the cluster's pods are. [default: the Node's podCIDRs]"),
    _Flag(
        "--detect-local-mode",
        "detectLocalMode",
        "MODE",
        "ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix: how this node's pods are told.",
    ),
    _Flag("--pod-bridge-interface", "detectLocal.bridgeInterface", "NAME", "The bridge, for BridgeInterface."),
    _Flag("--pod-interface-name-prefix", "detectLocal.interfaceNamePrefix", "PREFIX", "The devices, for InterfaceNamePrefix."),
    _Flag(
        "--nodeport-addresses",
        "nodePortAddresses",
        "CIDR[,CIDR]",
        "Which of the node's addresses serve node ports and their health checks: also `primary`, `localhost`, `all`. "
        "[default: nftables: primary, else all]",
    ),
    _Flag("--masquerade-all", "*.masqueradeAll", _SWITCH, "Whoever uses a ClusterIP is seen with the node's address.", bool),
    _Flag("--hostname-override", "hostnameOverride", "NAME", "The Node's name. [default: the host's, in lower case]"),
    _Flag(
        "--iptables-masquerade-bit", "iptables.masqueradeBit", "BIT", "The packet mark's bit in iptables. [default: 14]", int
    ),
    _Flag(
        "--iptables-localhost-nodeports",
        "iptables.localhostNodePorts",
        _SWITCH,
        "iptables: node ports on 127.0.0.1. [default: true]",
        bool,
    ),
    _Flag(
        "--iptables-min-sync-period", "iptables.minSyncPeriod", "TIME", "Taken: changes are gathered for 10 ms at most here."
    ),
    _Flag("--iptables-sync-period", "iptables.syncPeriod", "TIME", "Taken: changes by others are heard of, not looked for."),
    _Flag("--ipvs-scheduler", "ipvs.scheduler", "NAME", "ipvs: how endpoints are chosen. [default: rr]"),
    _Flag("--ipvs-strict-arp", "ipvs.strictARP", _SWITCH, "ipvs: answer ARP only for addresses of the interface asked.", bool),
    _Flag("--conntrack-max-per-core", "conntrack.maxPerCore", "N", "0 leaves nf_conntrack_max as it is. [default: 32768]", int),
    _Flag("--conntrack-min", "conntrack.min", "N", "At least so many, with the former. [default: 131072]", int),
    _Flag("--conntrack-tcp-timeout-established", "conntrack.tcpEstablishedTimeout", "TIME", "0 leaves it. [default: 24h]"),
    _Flag("--conntrack-tcp-timeout-close-wait", "conntrack.tcpCloseWaitTimeout", "TIME", "0 leaves it. [default: 1h]"),
    _Flag(
        "--conntrack-tcp-be-liberal", "conntrack.tcpBeLiberal", _SWITCH, "Do not call packets outside the window invalid.", bool
    ),
    _Flag("--conntrack-udp-timeout", "conntrack.udpTimeout", "TIME", "0 leaves it."),
    _Flag("--conntrack-udp-timeout-stream", "conntrack.udpStreamTimeout", "TIME", "0 leaves it."),
    *(_Flag(name, "", "VALUE", "") for name in _WITHOUT_EFFECT),
    *(_Flag(name, "", _SWITCH, "", bool) for name in _SWITCHES_WITHOUT_EFFECT),
)


_LISTS = frozenset(("nodePortAddresses",))
"""Fields whose flags may be given several times; all count."""


def _parameter(name: str) -> str:
    return name.removeprefix("--").replace("-", "_")


def _kube_proxy_flags(function: F) -> F:
    for flag in reversed(_FLAGS):
        function = click.option(
            flag.name,
            metavar=flag.metavar,
            type=click.BOOL if flag.kind is bool else flag.kind,
            multiple=flag.field in _LISTS,
            default=None,
            help=flag.text or "Taken; without effect.",
            hidden=not flag.text,
        )(function)
    return function


def _file(name: str, *more: str, text: str) -> Callable[[F], F]:
    """An option for a file; empty: none, as Go has it."""
    return click.option(name, *more, metavar="FILE", default="", help=text)


@click.command(cls=GoCommand)
@_file("--config", "config_file", text="A KubeProxyConfiguration. Flags have precedence over it.")
@_file("--write-config-to", "written", text="Write the configuration there that would be used, and end.")
@_file(
    "--kubeconfig",
    text="How to reach the API server. [default: what --config says, else the account of the pod that this runs in]",
)
@click.option(
    "--master",
    metavar="URL",
    default="",
    help="The API server, in the place of the kubeconfig's; alone, where it asks for no credentials.",
)
@click.option("--service-cluster-ip-range", "service_cidrs", metavar="CIDR[,CIDR]", default="",
              help="Where ClusterIPs come from, for API servers without ServiceCIDR objects.")  # fmt: skip
@click.option(
    "--healthz-port", type=int, metavar="PORT", default=None, help="Older than --healthz-bind-address; 0: not served."
)
@click.option(
    "--metrics-port", type=int, metavar="PORT", default=None, help="Older than --metrics-bind-address; 0: not served."
)
@switch(
    "--cleanup",
    text="Remove the rules of all modes, and what the node says of them in the API, and end. Open connections go on where "
    "others' rules translate, too.",
)
@switch(
    "--cleanup-kube-proxy", text="Remove what kube-proxy left (iptables and nftables), and end. Also beside a podwire proxy."
)
@switch("--init-only", text="Set the kernel's switches, and end.")
@switch("--version", "show_version", text="Print podwire's version, and end.")
@click.option("-v", "--v", "verbosity", type=int, metavar="LEVEL", default=0, help="4 and more: everything that is done.")
@_kube_proxy_flags
def proxy(
    config_file: str,
    written: str,
    kubeconfig: str,
    master: str,
    service_cidrs: str,
    healthz_port: int | None,
    metrics_port: int | None,
    show_version: bool,
    **flags: Any,
) -> None:
    """Serve Services on this host, as kube-proxy does.

    Follows Services and EndpointSlices of any Kubernetes API server, keeps the kernel's rules in step, puts back what others
    change, and says in the API what is programmed. It takes kube-proxy's flags, written as Go programs have them
    (--masquerade-all, --masquerade-all=false), and its configuration file; flags and fields that need nothing here, such as
    where kube-proxy writes its log, are taken and have no effect. Needs root.

    Stop kube-proxy first; when this serves, `podwire proxy --cleanup-kube-proxy` removes what that left.

    When it ends, its rules stay and connections go on; --cleanup removes them.
    """
    from podwire.cli.proxyrun import Invocation, run_proxy

    if show_version:
        click.echo(f"podwire {__version__}")
        return
    run_proxy(
        Invocation(
            config_file=Path(config_file) if config_file else None,
            written=Path(written) if written else None,
            kubeconfig=Path(kubeconfig) if kubeconfig else None,
            master=master,
            overrides={**_fields(flags), **_addresses(flags, healthz_port, metrics_port)},
            service_cidrs=tuple(filter(None, service_cidrs.split(","))),
            cleanup=flags["cleanup"],
            cleanup_kube_proxy=flags["cleanup_kube_proxy"],
            init_only=flags["init_only"],
            verbose=flags["verbosity"] >= 4,
        )
    )


def _fields(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the configuration, by their paths, that were set."""
    found: dict[str, Any] = {}
    for flag in _FLAGS:
        value = flags[_parameter(flag.name)]
        if value is None or value == () or not flag.field:
            continue
        if flag.field in _LISTS:
            value = [part.strip() for text in value for part in text.split(",") if part.strip()]
        if flag.field.startswith("*."):  # a field of each mode's section
            found |= {f"{section}.{flag.field[2:]}": value for section in ("iptables", "nftables", "ipvs")}
        else:
            found[flag.field] = value
    return found


def _addresses(flags: Mapping[str, Any], healthz_port: int | None, metrics_port: int | None) -> dict[str, str]:
    """In a file an empty address is the default one; as a flag it switches off. A port alone is the older flag."""
    found = {}
    for field, text, port, host in (
        ("healthzBindAddress", flags["healthz_bind_address"], healthz_port, "0.0.0.0"),
        ("metricsBindAddress", flags["metrics_bind_address"], metrics_port, "127.0.0.1"),
    ):
        if text == "" or port == 0:
            found[field] = f"{host}:0"
        elif text is None and port is not None:
            found[field] = f"{host}:{port}"
    return found
