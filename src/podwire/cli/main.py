"""The `podwire` command. Only click and the standard library load before a command runs: `--help` has to be quick."""

import sys
from typing import Any

import click

from podwire import __version__
from podwire.cli.agent import agent
from podwire.cli.cluster import cluster_agent
from podwire.cli.cni import cni
from podwire.cli.ipam import ipam
from podwire.cli.lab import lab
from podwire.cli.node import join, leave
from podwire.cli.paths import demo, paths
from podwire.cli.proxy import proxy
from podwire.cli.server import server, token
from podwire.cli.status import status, wait
from podwire.cli.terminal import suit_encoding
from podwire.cli.verify import verify
from podwire.model.errors import PodwireError


class _Root(click.Group):
    """Turns the errors that podwire raises on purpose into one line and exit status 1."""

    def main(self, *args: Any, **extra: Any) -> Any:
        suit_encoding((sys.stdout, sys.stderr))
        return super().main(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PodwireError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Root, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, message="podwire %(version)s", help="Print podwire's version, and end.")
def main() -> None:
    """The Kubernetes network as one program, with real packets on the Linux kernel.

    Start with `podwire demo`: it brings up a lab of three nodes, deploys a shop and shows every path that a packet can
    take. `podwire lab up` gives you a lab of your own to use with kubectl. No root, no Docker, no images.

    Exit status: 0 success, 1 failure, 2 wrong usage; `lab exec` passes on the command's own.
    """


@main.command()
def version() -> None:
    """Print podwire's version."""
    click.echo(f"podwire {__version__}")


main.add_command(agent)
main.add_command(lab)
main.add_command(demo)
main.add_command(paths)
main.add_command(verify)
main.add_command(proxy)
main.add_command(status)
main.add_command(wait)
main.add_command(server)
main.add_command(token)
main.add_command(join)
main.add_command(leave)
main.add_command(cluster_agent)
main.add_command(cni)
main.add_command(ipam)

if __name__ == "__main__":
    main()
