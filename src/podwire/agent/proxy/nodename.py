"""The name of the Node that a proxy serves for, and what to say where the API server has none of that name."""

import ipaddress
import re
from collections.abc import Iterable

from podwire.client.api import ApiClient
from podwire.client.errors import ApiError
from podwire.model.addr import IPAddress
from podwire.model.errors import InvalidInput
from podwire.model.resources import NODES

_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_SHOWN = 5


def node_name(override: str, hostname: str) -> str:
    """`override`, or without one the host's name, as kube-proxy has it: without blanks around it, in lower case. Raises
    InvalidInput where no Node can have that name."""
    wanted = override or hostname
    name = wanted.strip().lower()
    if not _NAME.fullmatch(name):
        source = "--hostname-override" if override else "this host's name"
        advice = "" if override else ": give the Node's by --hostname-override"
        raise InvalidInput(f"{source} {wanted!r} is no name that a Node can have{advice}")
    return name


async def likely_names(client: ApiClient, own: Iterable[IPAddress]) -> str:
    """In words, which Node could be meant: the one with an address of this host, else some of those there are. Empty where the
    API server does not tell."""
    try:
        items = (await client.list(NODES)).items
    except ApiError:
        return ""
    here = {str(ip) for ip in own}
    for item in items:
        for address in item.get("status", {}).get("addresses", ()):
            if _plain(address["address"]) in here:
                return f"{item['metadata']['name']} has this host's address {address['address']}"
    names = sorted(item["metadata"]["name"] for item in items)
    more = ", …" if len(names) > _SHOWN else ""
    return f"there are {', '.join(names[:_SHOWN])}{more}" if names else "there is none at all"


def _plain(text: str) -> str:
    """An address as Python writes it; a host name as it is."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return text
