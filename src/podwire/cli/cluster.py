"""`podwire cluster-agent`: podwire as the network of a real Kubernetes node."""

import ipaddress
from pathlib import Path

import click

from podwire.cli.server import ADDRESS, DIRECTORY, NETWORK, log_to_stderr

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_PATH = click.Path(path_type=Path)
CNI_SOCKET = Path("/run/podwire/cni.sock")


@click.command("cluster-agent", short_help="Serve this node beside its kubelet.")
@click.option("--node-name", envvar="NODE_NAME", required=True, help="This node, as the API has it.")
@click.option("--kubeconfig", type=_PATH, help="How to reach the API server. [default: the pod's own service account]")
@click.option("--cluster-cidr", "cluster_cidrs", type=NETWORK, multiple=True, required=True, envvar="CLUSTER_CIDR",
              help="The pods' network of the whole cluster, one per family.")  # fmt: skip
@click.option("--service-cidr", "service_cidrs", type=NETWORK, multiple=True, envvar="SERVICE_CIDR",
              help="Where ClusterIPs come from, one per family, for API servers without ServiceCIDR objects.")  # fmt: skip
@click.option("--address", "addresses", type=ADDRESS, multiple=True,
              help="This node's address for the others, one per family. [default: the Node's InternalIPs]")  # fmt: skip
@click.option("--services/--no-services", default=True, show_default=True, envvar="SERVICES",
              help="Serve Services, in kube-proxy's place.")  # fmt: skip
@click.option("--state-dir", "state", type=DIRECTORY, default=Path("/var/lib/podwire/cluster"), show_default=True,
              help="The record of addresses; survives reboots.")  # fmt: skip
@click.option("--cni-socket", type=_PATH, default=CNI_SOCKET, show_default=True, help="Where the CNI plugin finds the agent.")
@click.option("--vni", type=click.IntRange(1, (1 << 24) - 1), default=1, show_default=True, help="VXLAN's network identifier.")
@click.option("--vxlan-port", type=click.IntRange(1, 65535), default=8472, show_default=True, help="VXLAN's UDP port.")
def cluster_agent(
    node_name: str, kubeconfig: Path | None, cluster_cidrs: tuple[_Network, ...], service_cidrs: tuple[_Network, ...],
    addresses: tuple[_Address, ...], services: bool, state: Path, cni_socket: Path, vni: int, vxlan_port: int,
) -> None:  # fmt: skip
    """Serve this node beside its kubelet: overlay, CNI, and Services unless told otherwise.

    The Node and its pods are the kubelet's. Written in the API are flannel's annotations, the condition NetworkUnavailable,
    and the removal of the taint podwire.io/agent-not-ready where there is one. Ending it takes nothing from running pods.
    """
    import asyncio

    from podwire.hosts.guest import GuestOptions, run_guest

    log_to_stderr()
    options = GuestOptions(
        node=node_name, cluster_cidrs=cluster_cidrs, service_cidrs=service_cidrs, kubeconfig=kubeconfig, addresses=addresses,
        services=services, state=state, cni_socket=cni_socket, vni=vni, vxlan_port=vxlan_port,
    )  # fmt: skip
    asyncio.run(run_guest(options))
