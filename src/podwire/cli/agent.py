"""`podwire agent`: flanneld's job on this host, under flanneld's flags and environment variables."""

import ipaddress
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from podwire.cli.annotationprefix import annotation_prefix

if TYPE_CHECKING:
    from podwire.model.addr import IPAddress

F = TypeVar("F", bound=Callable[..., Any])


class _Address(click.ParamType["IPAddress | None"]):
    """An IP address, of one family if `version` says so."""

    name = "address"

    def __init__(self, version: int = 0) -> None:
        self._version = version

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> "IPAddress | None":
        if not isinstance(value, str) or not value:
            return None
        try:
            address = ipaddress.ip_address(value)
        except ValueError:
            self.fail(f"{value!r} is no IP address", param, ctx)
        if self._version and address.version != self._version:
            self.fail(f"{value} is no IPv{self._version} address", param, ctx)
        return address


class _Whole(click.types.StringParamType):
    """Text that is one value also in the environment, where click would divide it at blanks and flanneld does not."""

    def split_envvar_value(self, rv: str) -> Sequence[str]:
        return (rv,)


def _pattern(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        try:
            re.compile(value)
        except re.error as error:
            raise click.BadParameter(f"{value!r} is no regular expression: {error}", ctx, param) from error
    return values


def _flag(name: str, text: str, *, default: bool = False) -> Callable[[F], F]:
    """A switch that can also be written as Go has it: `--ip-masq=false`."""
    return click.option(
        name, is_flag=False, flag_value=True, type=bool, default=default, show_default=True, metavar="[true|false]", help=text
    )


def _value(name: str, metavar: str, text: str, default: str | int | None = "", **more: Any) -> Callable[[F], F]:
    return click.option(name, metavar=metavar, help=text, default=default, show_default=bool(default), **more)


_FILE = click.Path(path_type=Path)
_RUN = "/run/flannel"


@click.command(context_settings={"auto_envvar_prefix": "FLANNELD"})
@click.option(
    "--subnet-manager", type=click.Choice(["etcd", "kube"]), default="etcd", show_default=True, help="Where leases are."
)
@_flag("--kube-subnet-mgr", "The same as --subnet-manager kube.")
@_value("--etcd-endpoints", "URLS", "Several with commas.", "http://127.0.0.1:4001,http://127.0.0.1:2379")
@_value("--etcd-prefix", "KEY", "Below it are `config` and `subnets`.", "/coreos.com/network")
@_value("--etcd-keyfile", "FILE", "This client's TLS key.")
@_value("--etcd-certfile", "FILE", "This client's TLS certificate.")
@_value("--etcd-cafile", "FILE", "CA certificates that etcd's is checked with.")
@_value("--etcd-username", "NAME", "etcd user.")
@_value("--etcd-password", "WORD", "Its password; better given as FLANNELD_ETCD_PASSWORD.")
@_value(
    "--subnet-lease-renew-margin", "MINUTES", "How long before its end a lease is renewed.", 60, type=click.IntRange(1, 1439)
)
@_value("--kubeconfig-file", "FILE", "How to reach the API server (kube).  [default: the pod's service account]")
@_value("--kube-api-url", "URL", "The API server, where it asks for no credentials (kube).")
@_value("--kube-annotation-prefix", "PREFIX", "Of the annotations on Nodes (kube); with a slash of its own, or without.",
        "flannel.alpha.coreos.com", callback=annotation_prefix)  # fmt: skip
@_value("--net-config-path", "FILE", "The network configuration (kube).", "/etc/kube-flannel/net-conf.json", type=_FILE)
@_flag("--set-node-network-unavailable", "Set the Node's condition NetworkUnavailable to false (kube).", default=True)
@_value("--node-name", "NAME", "The Node (kube); a tunnel's MAC follows from it.  [default: the host's name]",
        envvar=["FLANNELD_NODE_NAME", "NODE_NAME"])  # fmt: skip
@_value("--iface", "NAME|ADDRESS", "Interface to the other hosts; may be given again: the first that fits counts.",
        None, multiple=True, type=_Whole())  # fmt: skip
@_value("--iface-regex", "REGEX", "The same, for names or addresses.", None, multiple=True, type=_Whole(), callback=_pattern)
@_value("--iface-can-reach", "ADDRESS", "The interface that leads there.", type=_Address())
@_value("--public-ip", "ADDRESS", "What peers are told instead of the interface's address (behind a NAT).", type=_Address(4))
@_value("--public-ipv6", "ADDRESS", "The same for IPv6.", type=_Address(6))
@_flag("--ip-masq", "Masquerade what leaves the pod network.")
@_flag("--ip-masq-fully-random-disable", "Masquerade without fully random ports.")
@_flag("--iptables-forward-rules", "Accept forwarded pod packets in iptables, where there is one.", default=True)
@_value("--iptables-resync", "SECONDS", "How often those rules are looked at.", 5, type=click.IntRange(1))
@_flag("--ip-blackhole-route", "Drop what goes to this host's subnet while no device there has it.")
@_value("--subnet-file", "FILE", "What CNI plugins read.", f"{_RUN}/subnet.env", type=_FILE)
@_value("--docker-options-file", "FILE", "Also write an environment file for dockerd.", None, type=_FILE)
@_value("--wireguard-key-file", "FILE", "This host's key; made where there is none.", f"{_RUN}/wgkey", type=_FILE,
        envvar=["FLANNELD_WIREGUARD_KEY_FILE", "WIREGUARD_KEY_FILE"])  # fmt: skip
@_value("--healthz-ip", "ADDRESS", "Where /healthz, /readyz and /metrics are served.", "0.0.0.0", type=_Address())
@_value("--healthz-port", "PORT", "Their port; 0: they are not served.", "0", type=click.IntRange(0, 65535))
@click.option("-v", "--verbose", count=True, help="Say more; twice: everything.")
def agent(**settings: Any) -> None:
    """Join this host to an overlay, as flanneld does.

    Leases a subnet for this host (from etcd, or its Node's podCIDR), makes the back end's devices, follows the other hosts'
    leases and repairs what somebody else changes. It reads and writes what flanneld does, so hosts of both kinds form one
    network. Needs root. Every option can be set as FLANNELD_<OPTION> in the environment.

    When it ends, devices and routes stay, and so do the pods' connections; the next one goes on from there.
    """
    _one_manager(click.get_current_context(), settings)
    from podwire.cli.agentrun import run_agent

    run_agent(settings)


def _one_manager(ctx: click.Context, settings: Mapping[str, Any]) -> None:
    """Raises UsageError where the two options for the subnet manager say two things."""
    chosen = ctx.get_parameter_source("subnet_manager") is not click.core.ParameterSource.DEFAULT
    if settings["kube_subnet_mgr"] and chosen and settings["subnet_manager"] == "etcd":
        raise click.UsageError("--kube-subnet-mgr and --subnet-manager etcd contradict each other: give one of them")
