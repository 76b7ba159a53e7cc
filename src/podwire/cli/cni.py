"""`podwire cni`: the plugin where container engines look for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from podwire.cli.node import CNI_SOCKET

_PATH = click.Path(path_type=Path)


@click.group(short_help="Serve container engines: podman, containerd, CRI-O and kubelet.")
def cni() -> None:
    """Serve container engines: podman, containerd, CRI-O and kubelet, through the Container Network Interface."""


@cni.command(short_help="Install the plugin and its configuration.")
@click.option("--bin-dir", type=_PATH, default=Path("/opt/cni/bin"), show_default=True,
              help="Where the engine looks for plugins.")  # fmt: skip
@click.option("--conf-dir", type=_PATH, default=Path("/etc/cni/net.d"), show_default=True,
              help="Where the engine looks for networks.")  # fmt: skip
@click.option("--network", default="podwire", show_default=True, help="The network's name.")
@click.option("--priority", type=click.IntRange(0, 99), default=10, show_default=True,
              help="The number before the configuration's name: engines that take one network take the first.")  # fmt: skip
@click.option("--mtu", type=click.IntRange(0, 65535), default=0,
              help="For the containers' links. [default: what the overlay carries]")  # fmt: skip
@click.option("--cni-socket", type=_PATH, default=CNI_SOCKET, show_default=True, help="Where the agent serves.")
@click.option("--python", "interpreted", is_flag=True, help="Do not compile the plugin, also where there is a compiler.")
@click.option("--no-conf", is_flag=True, help="Install the plugin alone.")
def install(
    bin_dir: Path, conf_dir: Path, network: str, priority: int, mtu: int, cni_socket: Path, interpreted: bool, no_conf: bool
) -> None:
    """Install the plugin and the configuration of a network that uses it. Again: brings both up to date.

    The plugin is a small program that hands all to the agent on this machine. It is compiled if there is a C compiler, which
    saves ten milliseconds for each container; otherwise it is a Python script for /usr/bin/python3.
    """
    from podwire.cni.install import PLUGIN_NAME, check_network, install_configuration, install_plugin

    check_network(network)
    with _writing(bin_dir, "--bin-dir"):
        how = install_plugin(bin_dir, cni_socket, compiled=not interpreted)
    click.echo(f"{bin_dir / PLUGIN_NAME} ({how}), for an agent on {cni_socket}")
    if not no_conf:
        with _writing(conf_dir, "--conf-dir"):
            written = install_configuration(conf_dir, network, priority=priority, mtu=mtu)
        click.echo(str(written))


@contextmanager
def _writing(directory: Path, option: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        message = f"{directory} cannot be written ({error.strerror}): run this as root, or choose with {option}"
        raise click.ClickException(message) from error
