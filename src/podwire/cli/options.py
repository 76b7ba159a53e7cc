"""Options that several commands share, and the two that need parsing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from podwire.lab.spec import LAB_MODES, MAX_NODES, LabSpec, check_name, parse_port_range
from podwire.model.errors import InvalidInput, Unsupported

F = TypeVar("F", bound=Callable[..., Any])


def _checked(parse: Callable[[str], Any]) -> Callable[[click.Context, click.Parameter, str], Any]:
    """A click callback that turns our InvalidInput into wrong usage (exit status 2)."""

    def callback(ctx: click.Context, param: click.Parameter, value: str) -> Any:
        try:
            return parse(value)
        except InvalidInput as error:
            raise click.BadParameter(str(error), ctx, param) from error

    return callback


def lab_option(function: F) -> F:
    """`--name NAME` for commands that work on a lab which is up."""
    return click.option(
        "--name", "--lab", "lab_name", default="default", show_default=True, callback=_checked(check_name), metavar="NAME",
        help="The lab to use.",
    )(function)  # fmt: skip


def name_argument(function: F) -> F:
    """`[NAME]` where the lab itself is what the command is about; `--name NAME` does the same."""
    function = click.argument(
        "lab_argument", metavar="[NAME]", default="", callback=_checked(lambda n: check_name(n) if n else n)
    )(function)
    return lab_option(function)


def spec_options(default_name: str, *, nodes: int = 3) -> Callable[[F], F]:
    """The parameters of a new lab."""

    def decorate(function: F) -> F:
        for option in reversed(
            (
                click.option("--name", default=default_name, show_default=True, callback=_checked(check_name),
                             help="What to call the lab. Labs of different names run side by side."),
                click.option("--nodes", type=click.IntRange(1, MAX_NODES), default=nodes, show_default=True,
                             help="How many nodes."),
                click.option("--ip-family", type=click.Choice(["ipv4", "ipv6", "dual"]), default="dual", show_default=True,
                             help="Address families of nodes, pods and Services; dual puts IPv4 first."),
                click.option("--service-cluster-ip-range", "service_cidrs", metavar="CIDR[,CIDR]", default="",
                             help="Where ClusterIPs come from, one prefix per family. "
                                  "[default: 10.96.0.0/12,fd00:10:96::/112]"),
                click.option("--service-node-port-range", "node_ports", metavar="LOW-HIGH", default="30000-32767",
                             show_default=True, callback=_checked(parse_port_range), help="Where NodePorts come from."),
                click.option("--proxy-mode", type=click.Choice(LAB_MODES), default="nftables", show_default=True,
                             help="What serves Services on the nodes; see also `podwire lab node proxy-mode`."),
                click.option("--subnet-manager", type=click.Choice(["kube", "etcd"]), default="kube", show_default=True,
                             help="Where nodes have their subnets from: their Node's podCIDRs, or leases in an etcd "
                                  "that runs in the lab, as flannel has them."),
                click.option("--etcd-members", type=click.Choice(["1", "3", "5"]), default="1", show_default=True,
                             help="How many members that etcd has."),
                click.option("--backend", default="vxlan", show_default=True, metavar="NAME|JSON",
                             help="How packets get from node to node: vxlan, host-gw, udp, ipip, wireguard, or flannel's "
                                  "Backend object, e.g. '{\"Type\":\"vxlan\",\"DirectRouting\":true}'."),
            )
        ):  # fmt: skip
            function = option(function)
        return function

    return decorate


def make_spec(service_cidrs: str, etcd_members: str, **options: Any) -> LabSpec:
    """The options of `spec_options` as one value; what does not fit together is wrong usage."""
    cidrs = tuple(filter(None, (part.strip() for part in service_cidrs.split(","))))
    try:
        return LabSpec(service_cidrs=cidrs, etcd_members=int(etcd_members), **options)
    except (InvalidInput, Unsupported) as error:
        raise click.UsageError(str(error)) from error


def files_option(function: F) -> F:
    return click.option(
        "-f", "--filename", "files", multiple=True, metavar="FILE", type=click.Path(exists=True, path_type=Path),
        help="Manifests to apply when the lab is up: a YAML or JSON file, or a directory of them. May be repeated.",
    )(function)  # fmt: skip
