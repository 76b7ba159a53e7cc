"""Reservations of other plugins' addresses: host-local's folder, and flannel's list of the networks it was used for.

host-local (containernetworking/plugins, plugins/ipam/host-local/backend/disk) keeps a file for each address, named by it, in
`/var/lib/cni/networks/<network>`; in it the container's id and, since 0.8, the interface behind CR LF. flannel's plugin keeps
the configuration that it passed on for each container in `/var/lib/cni/flannel/<container id>`.
"""

import ipaddress
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from podwire.model.addr import IPAddress
from podwire.model.cni import AttachmentKey
from podwire.model.errors import InvalidInput

log = logging.getLogger(__name__)

HOST_LOCAL_DIR = Path("/var/lib/cni/networks")
FLANNEL_DIR = Path("/var/lib/cni/flannel")


class ForeignReservation(NamedTuple):
    """What another plugin has given to a container."""

    address: IPAddress
    network: str
    key: AttachmentKey


def host_local_reservations(folder: Path) -> Iterator[ForeignReservation]:
    """All in the folder of one network. Raises InvalidInput where there is no such folder."""
    if not folder.is_dir():
        raise InvalidInput(f"{folder} is not a folder of host-local's reservations: name one below {HOST_LOCAL_DIR}")
    for file in sorted(folder.iterdir()):
        try:
            address = ipaddress.ip_address(file.name.replace("_", ":"))  # host-local writes `:` where it can
        except ValueError:
            continue  # its lock, and last_reserved_ip.<range>
        container, _, ifname = file.read_text(encoding="utf-8", errors="replace").partition("\n")
        container = container.strip()
        if container:
            yield ForeignReservation(address, folder.name, AttachmentKey(container, ifname.strip() or "eth0"))
        else:
            log.warning("%s does not say whose address it is: left out", file)


def flannel_networks(folder: Path) -> tuple[Path, ...]:
    """host-local's folders of the networks for which flannel's plugin has passed on its work. Raises InvalidInput."""
    if not folder.is_dir():
        raise InvalidInput(f"{folder} is not the folder of flannel's CNI plugin, which is {FLANNEL_DIR} by default")
    found: dict[Path, None] = {}
    for file in sorted(folder.iterdir()):
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
            name, ipam = document["name"], document.get("ipam") or {}
            found[Path(ipam.get("dataDir") or HOST_LOCAL_DIR) / name] = None
        except (ValueError, KeyError, TypeError, AttributeError, IsADirectoryError):
            log.warning("%s is no configuration that flannel has passed on: left out", file)
    return tuple(found)
