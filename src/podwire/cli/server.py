"""`podwire server` and `podwire token`: the control plane of a cluster of real machines."""

import ipaddress
import logging
import os
import shutil
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from podwire.client.api import ApiClient
    from podwire.hosts.server import ServerOptions

DATA_DIR = Path("/var/lib/podwire/server")
"""Also in `podwire.hosts.server`, which is not loaded for `--help`."""


class _Parsed(click.ParamType):  # type: ignore[type-arg]
    """An `ipaddress` value."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name, self._parse = name, parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self._parse(value) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _directory(value: str) -> Path:
    if not value:
        raise ValueError("it is empty: name a directory")  # Path("") would be the working directory
    return Path(value)


ADDRESS = _Parsed("ADDRESS", ipaddress.ip_address)
NETWORK = _Parsed("NETWORK", ipaddress.ip_network)
DIRECTORY = _Parsed("PATH", _directory)

data_option = click.option("--data-dir", "data", type=DIRECTORY, default=DATA_DIR, show_default=True,
                           help="Certificates, the kubeconfig for kubectl and (without etcd) the database.")  # fmt: skip


@click.command()
@data_option
@click.option("--advertise", type=ADDRESS, multiple=True,
              help="This server's address for nodes; one per family. [default: that of the default route]")  # fmt: skip
@click.option("--listen", default=":6443", show_default=True, metavar="[ADDRESS]:PORT", help="Where to serve.")
@click.option("--name", "names", multiple=True, metavar="NAME", help="A further name or address in the certificate.")
@click.option("--etcd", "endpoints", multiple=True, metavar="URL",
              help="Keep everything in this etcd; once for each member. [default: in SQLite]")  # fmt: skip
@click.option("--etcd-cafile", default="", metavar="FILE", help="Who signed the etcd members' certificates.")
@click.option("--etcd-certfile", default="", metavar="FILE", help="This server's certificate for etcd.")
@click.option("--etcd-keyfile", default="", metavar="FILE", help="The key to it.")
@click.option("--etcd-username", default="", metavar="NAME",
              help="etcd's user, where it has authentication; the password is read from PODWIRE_ETCD_PASSWORD.")  # fmt: skip
@click.option("--pod-cidr", "pod_cidrs", type=NETWORK, multiple=True, default=("10.244.0.0/16",), show_default=True,
              help="The pods' network, one per family; each node gets a /24 or /64 of it.")  # fmt: skip
@click.option("--service-cidr", "service_cidrs", type=NETWORK, multiple=True, default=("10.96.0.0/12",), show_default=True,
              help="The Services' network, one per family.")  # fmt: skip
@click.option("--load-balancer-pool", "pools", type=NETWORK, multiple=True,
              help="Addresses for Services of type LoadBalancer, one network per family.")  # fmt: skip
@click.option("--print-unit", is_flag=True, help="Print the systemd unit that runs this command, and end.")
def server(print_unit: bool, **options: Any) -> None:
    """Run the control plane: API server and controllers.

    Nodes join it with what `podwire token` prints. One server keeps its state in SQLite. Several share an etcd and the pki/
    directory of the first (copy it before the others start); one of them at a time leads the controllers.
    """
    if print_unit:
        from podwire.hosts.systemd import server_unit

        click.echo(server_unit(own_command(("--print-unit",))), nl=False)
        return
    import asyncio

    from podwire.hosts.server import run_server

    _check_networks(options["pod_cidrs"], options["service_cidrs"], options["pools"])
    _check_words(options)
    log_to_stderr()
    asyncio.run(run_server(_options(**options)))


def _check_networks(pod_cidrs: tuple[Any, ...], service_cidrs: tuple[Any, ...], pools: tuple[Any, ...]) -> None:
    """One per family, and no address with two uses. Raises BadParameter."""
    given: list[tuple[str, Any]] = []
    for option, networks in (("--pod-cidr", pod_cidrs), ("--service-cidr", service_cidrs), ("--load-balancer-pool", pools)):
        for network in networks:
            for other, taken in given:
                if taken.version == network.version and other == option:
                    raise click.BadParameter(f"{taken} and {network} are of one family: give one per family", param_hint=option)
                if taken.version == network.version and taken.overlaps(network):
                    raise click.BadParameter(f"{network} overlaps {taken}, which is {other}: take another", param_hint=option)
            given.append((option, network))
            _check_size(option, network)


def _check_words(options: dict[str, Any]) -> None:
    """Nothing empty, and nothing that has no effect. Raises UsageError."""
    if not all(options["names"]):
        raise click.BadParameter("it is empty: give a name or an address", param_hint="--name")
    if not all(part for one in options["endpoints"] for part in one.split(",")):
        raise click.BadParameter("it is empty: give the URL of a member", param_hint="--etcd")
    odd = [name for name, value in options.items() if name.startswith("etcd_") and value]
    if odd and not options["endpoints"]:
        raise click.UsageError(f"--{odd[0].replace('_', '-')} has no effect without --etcd")


_NODE_BITS = {4: 24, 6: 64}
_SERVICE_BITS = {4: (1, 29), 6: (64, 125)}
"""Eight addresses at least, and no more than kube-apiserver takes of IPv6."""


def _check_size(option: str, network: Any) -> None:
    node, (least, most) = _NODE_BITS[network.version], _SERVICE_BITS[network.version]
    if option == "--pod-cidr" and network.prefixlen > node:
        raise click.BadParameter(f"{network} is too small: each node gets a /{node} of it", param_hint=option)
    if option == "--service-cidr" and not least <= network.prefixlen <= most:
        raise click.BadParameter(f"{network} is none of /{least} to /{most}", param_hint=option)


def _options(
    data: Path, advertise: tuple[Any, ...], listen: str, names: tuple[str, ...], endpoints: tuple[str, ...],
    pod_cidrs: tuple[Any, ...], service_cidrs: tuple[Any, ...], pools: tuple[Any, ...], etcd_username: str, **etcd: str,
) -> "ServerOptions":  # fmt: skip
    from podwire.hosts.node import default_addresses
    from podwire.hosts.server import EtcdOptions, ServerOptions

    host, colon, port = listen.rpartition(":")
    if not colon or not port.isdecimal() or int(port) not in range(1, 65536):
        raise click.BadParameter(f"{listen!r} is not like :6443, 192.0.2.1:6443 or [2001:db8::1]:6443", param_hint="--listen")
    user = (etcd_username, os.environ.get("PODWIRE_ETCD_PASSWORD", "")) if etcd_username else None
    tls = {name.removeprefix("etcd_"): value for name, value in etcd.items()}
    return ServerOptions(
        advertise=advertise or tuple(map(ipaddress.ip_address, default_addresses())),
        data=data.absolute(),
        listen=(host.strip("[]"), int(port)),
        names=names,
        etcd=EtcdOptions(tuple(part for one in endpoints for part in one.split(",")), user=user, **tls),
        pod_cidrs=pod_cidrs,
        service_cidrs=service_cidrs,
        load_balancer_pools=pools,
    )


@click.command()
@data_option
@click.option("--ttl", type=click.FloatRange(min=0), default=24.0, show_default=True, metavar="HOURS",
              help="How long it lets nodes join; 0: until it is deleted.")  # fmt: skip
@click.option("--only", is_flag=True, help="Print the token alone, for scripts.")
def token(data: Path, ttl: float, only: bool) -> None:
    """Print the command by which a machine joins.

    Run it on a server, while that runs. The command names all servers of the cluster that live. The token names the cluster's
    authority, so a joining machine trusts no other; it is a Secret bootstrap-token-<id> in kube-system, and deleting that ends
    it.
    """
    from podwire.apiserver.pki import fingerprint
    from podwire.cli.connect import with_kubeconfig
    from podwire.hosts.tokens import create_token, server_urls

    kubeconfig, ca = data / "admin.kubeconfig", data / "pki" / "ca.crt"
    if not (kubeconfig.exists() and ca.exists()):
        raise click.ClickException(f"{data} is no server's data directory: say which with --data-dir")

    async def make(client: "ApiClient") -> tuple[str, str]:
        life = timedelta(hours=ttl) if ttl else None
        made = await create_token(client, fingerprint(ca.read_bytes()), datetime.now(UTC), life)
        return ",".join(await server_urls(client)), str(made)

    urls, made = with_kubeconfig(kubeconfig, make)
    click.echo(made if only else f"podwire join {urls} --token {made}")


def own_command(without: tuple[str, ...]) -> list[str]:
    """The command line of this process, less some words, for systemd: with the program's whole path."""
    program = shutil.which(sys.argv[0]) or sys.argv[0]
    return [os.path.abspath(program), *(word for word in sys.argv[1:] if word not in without)]


def log_to_stderr() -> None:
    """For services: journald adds the time."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
