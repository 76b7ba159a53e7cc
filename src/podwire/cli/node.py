"""`podwire join` and `podwire leave`: a machine becomes a node, and stops being one."""

import ipaddress
import socket
from pathlib import Path

import click

from podwire.cli.server import ADDRESS, DIRECTORY, log_to_stderr, own_command

STATE_DIR = Path("/var/lib/podwire/node")
RUN_DIR = Path("/run/podwire/node")
CNI_SOCKET = Path("/run/podwire/cni.sock")

state_option = click.option("--state-dir", "state", type=DIRECTORY, default=STATE_DIR, show_default=True,
                            help="The node's certificate and reservations; survives reboots.")  # fmt: skip
run_option = click.option("--run-dir", "run", type=DIRECTORY, default=RUN_DIR, show_default=True,
                          help="Sockets and pods' files; does not survive a reboot.")  # fmt: skip

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@click.command(short_help="Make this machine a node of a cluster.")
@click.argument("urls", metavar="[URL[,URL…]]", default="", required=False)
@click.option("--token", default="", envvar="PODWIRE_TOKEN", help="What `podwire token` printed. Needed the first time only.")
@click.option("--name", default="", help="The node's name. [default: the machine's host name]")
@click.option("--address", "addresses", type=ADDRESS, multiple=True,
              help="The node's address for other nodes, one per family. [default: that from which it reaches URL]")  # fmt: skip
@state_option
@run_option
@click.option("--cni-socket", type=click.Path(path_type=Path), default=CNI_SOCKET, show_default=True,
              help="Where the CNI plugin finds the agent.")  # fmt: skip
@click.option("--once", is_flag=True, help="Join, but do not run the agent.")
@click.option("--print-unit", is_flag=True, help="Print the systemd unit that runs this node, and end.")
def join(
    urls: str, token: str, name: str, addresses: tuple[_Address, ...], state: Path, run: Path, cni_socket: Path, once: bool,
    print_unit: bool,
) -> None:  # fmt: skip
    """Make this machine a node of the cluster at URL, and run its agent.

    Of several servers of the cluster, it uses the first that answers, until that fails. Once it has joined, `podwire join`
    alone runs the agent again: pods, links and rules were not touched by its absence; with other URLs it uses those servers of
    its cluster from then on. Needs root. A node's certificate allows it its own objects and what its pods refer to, and is
    renewed by itself.
    """
    import asyncio

    from podwire.hosts.membership import JoinToken, Membership, parse_servers
    from podwire.hosts.membership import join as join_cluster
    from podwire.hosts.node import NodeOptions, own_addresses, run_node

    if print_unit:
        from podwire.hosts.systemd import node_unit

        kept = ["join", "--state-dir", str(state), "--run-dir", str(run), "--cni-socket", str(cni_socket)]
        click.echo(node_unit([own_command(())[0], *kept]), nl=False)
        return
    log_to_stderr()
    state, run = state.absolute(), run.absolute()
    membership = Membership.load(state)
    if membership is None:
        if not (urls and token):
            raise click.UsageError(
                "this machine has not joined yet: podwire join URL --token TOKEN (as `podwire token` prints it)"
            )
        servers = parse_servers(urls)
        own = tuple(map(str, addresses)) or own_addresses(servers[0])
        wanted = name or socket.gethostname().partition(".")[0].lower()
        membership = asyncio.run(join_cluster(state, servers, JoinToken.parse(token), wanted, own))
        click.echo(f"this machine is node {wanted} of {membership.cluster}", err=True)
    elif urls and (servers := parse_servers(urls)) != membership.record.servers:
        asyncio.run(membership.move_to(servers))
        click.echo(f"node {membership.record.name} uses {membership.cluster} from now on", err=True)
    if not once:
        asyncio.run(run_node(membership, NodeOptions(run, cni_socket)))


@click.command(short_help="Stop being a node, and remove what podwire has made.")
@state_option
@run_option
@click.option("--force", is_flag=True, help="Also where engines' containers are attached, or the API server does not answer.")
def leave(state: Path, run: Path, force: bool) -> None:
    """Stop being a node: end its pods, delete its Node object, remove its links, rules and files.

    Stop the agent first (systemctl disable --now podwire-node).
    """
    import asyncio

    from podwire.hosts.leaving import leave as leave_cluster
    from podwire.hosts.membership import Membership
    from podwire.hosts.node import NodeOptions

    log_to_stderr()
    membership = Membership.load(state.absolute())
    if membership is None:
        raise click.ClickException(f"this machine is no node ({state} has no membership): nothing to leave")
    asyncio.run(leave_cluster(membership, NodeOptions(run.absolute()), force=force))
    click.echo(f"node {membership.record.name} has left {membership.cluster}")
