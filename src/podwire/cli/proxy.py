"""`podwire proxy`: kube-proxy's job on this host, under kube-proxy's flags and configuration file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click

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
    "--feature-gates", "--profiling", "--show-hidden-metrics-for-version", "--proxy-port-range", "--logging-format",
    "--ipvs-sync-period", "--ipvs-min-sync-period", "--ipvs-exclude-cidrs", "--ipvs-tcp-timeout", "--ipvs-tcpfin-timeout",
    "--ipvs-udp-timeout",
)  # fmt: skip
_SWITCH = "[true|false]"
_FLAGS = (
    _Flag("--bind-address", "bindAddress", "ADDRESS", "Not listened on; taken for compatibility."),
    _Flag(
        "--healthz-bind-address",
        "healthzBindAddress",
        "ADDRESS:PORT",
        "/healthz and /livez; port 0: not served. [default: 0.0.0.0:10256]",
    ),
    _Flag(
        "--metrics-bind-address", "metricsBindAddress", "ADDRESS:PORT", "/metrics and /proxyMode. [default: 127.0.0.1:10249]"
    ),
    _Flag("--bind-address-hard-fail", "bindAddressHardFail", _SWITCH, "End when one of these cannot be listened on.", bool),
    _Flag("--proxy-mode", "mode", "MODE", "nftables, iptables or ipvs. [default: nftables]"),
    _Flag("--cluster-cidr", "clusterCIDR", "CIDR[,CIDR]", "Where the cluster's pods are. [default: the Node's podCIDRs]"),
    _Flag(
        "--detect-local-mode",
        "detectLocalMode",
        "MODE",
        "ClusterCIDR, NodeCIDR or BridgeInterface: how this node's pods are told.",
    ),
    _Flag("--pod-bridge-interface", "detectLocal.bridgeInterface", "NAME", "The bridge, for BridgeInterface."),
    _Flag("--pod-interface-name-prefix", "detectLocal.interfaceNamePrefix", "PREFIX", ""),
    _Flag(
        "--nodeport-addresses",
        "nodePortAddresses",
        "CIDR[,CIDR]",
        "Which of the node's addresses serve node ports; `primary` for the Node's own.",
    ),
    _Flag("--masquerade-all", "*.masqueradeAll", _SWITCH, "Whoever uses a ClusterIP is seen with the node's address.", bool),
    _Flag("--hostname-override", "hostnameOverride", "NAME", "The Node. [default: the host's name]"),
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
)


def _parameter(name: str) -> str:
    return name.removeprefix("--").replace("-", "_")


def _kube_proxy_flags(function: F) -> F:
    for flag in reversed(_FLAGS):
        more: dict[str, Any] = {"is_flag": False, "flag_value": True} if flag.kind is bool else {}
        function = click.option(
            flag.name,
            metavar=flag.metavar,
            type=flag.kind,
            default=None,
            help=flag.text or "Taken; without effect.",
            hidden=not flag.text,
            **more,
        )(function)
    return function


@click.command()
@click.option("--config", "config_file", type=click.Path(path_type=Path), metavar="FILE",
              help="A KubeProxyConfiguration. Flags have precedence over it.")  # fmt: skip
@click.option("--kubeconfig", type=click.Path(path_type=Path), metavar="FILE",
              help="How to reach the API server. [default: the service account of the pod that this runs in]")  # fmt: skip
@click.option("--master", metavar="URL", default="", help="The API server, where it asks for no credentials.")
@click.option("--service-cluster-ip-range", "service_cidrs", metavar="CIDR[,CIDR]", default="",
              help="Where ClusterIPs come from, for API servers without ServiceCIDR objects.")  # fmt: skip
@click.option("--cleanup", is_flag=True, help="Remove the rules of all modes, and end. Established connections go on.")
@click.option("--init-only", is_flag=True, help="Set the kernel's switches, and end.")
@click.option("-v", "--v", "verbosity", type=int, metavar="LEVEL", default=0, help="4 and more: everything that is done.")
@_kube_proxy_flags
def proxy(
    config_file: Path | None,
    kubeconfig: Path | None,
    master: str,
    service_cidrs: str,
    cleanup: bool,
    init_only: bool,
    verbosity: int,
    **flags: Any,
) -> None:
    """Serve Services on this host, as kube-proxy does.

    Follows Services and EndpointSlices of any Kubernetes API server, keeps the kernel's rules in step, puts back what others
    change, and says in the API what is programmed. It takes kube-proxy's flags and its configuration file; flags and fields
    that need nothing here are taken and have no effect. Stop kube-proxy first, and remove its rules. Needs root.

    When it ends, its rules stay and connections go on; --cleanup removes them.
    """
    from podwire.cli.proxyrun import Invocation, run_proxy

    overrides = {}
    for flag in _FLAGS:
        value = flags[_parameter(flag.name)]
        if value is not None and flag.field:
            if flag.field == "nodePortAddresses":
                value = [part.strip() for part in value.split(",") if part.strip()]
            for field in _fields(flag.field):
                overrides[field] = value
    run_proxy(
        Invocation(
            config_file=config_file,
            kubeconfig=kubeconfig,
            master=master,
            overrides=overrides,
            service_cidrs=tuple(filter(None, service_cidrs.split(","))),
            cleanup=cleanup,
            init_only=init_only,
            verbose=verbosity >= 4,
        )
    )


def _fields(field: str) -> tuple[str, ...]:
    """`*.name` is a field of each mode's section."""
    if not field.startswith("*."):
        return (field,)
    return tuple(f"{section}.{field[2:]}" for section in ("iptables", "nftables", "ipvs"))
