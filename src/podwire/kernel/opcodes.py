"""Typed operations to rtnetlink requests. Pure: which names an operation needs, its requests, which refusals are none."""

import errno
from collections.abc import Mapping

from podwire.model.kernelstate import Vxlan
from podwire.model.ops import (
    AddAddress,
    AddLink,
    ChangeLink,
    DelAddress,
    DelFdb,
    DelLink,
    DelNeighbour,
    DelRoute,
    Op,
    SetFdb,
    SetNeighbour,
    SetRoute,
    SetShaper,
)
from podwire.wire import rtnl

RtnlOp = (
    AddLink
    | ChangeLink
    | DelLink
    | AddAddress
    | DelAddress
    | SetRoute
    | DelRoute
    | SetNeighbour
    | DelNeighbour
    | SetFdb
    | DelFdb
    | SetShaper
)

_ABSENT = {
    DelLink: (errno.ENODEV,),
    DelAddress: (errno.EADDRNOTAVAIL, errno.ENODEV),
    DelRoute: (errno.ESRCH, errno.ENODEV, errno.ENETUNREACH),
    DelNeighbour: (errno.ENOENT, errno.ENODEV),
    DelFdb: (errno.ENOENT, errno.ENODEV),
}
"""The refusals that say that what was to go is not there."""


def devices(op: RtnlOp) -> tuple[str, ...]:
    """The devices whose index `op` needs."""
    match op:
        case AddLink(link=link):
            kind = link.kind
            return tuple(name for name in (link.master, kind.underlay if isinstance(kind, Vxlan) else None) if name)
        case ChangeLink(link=link):
            return (link.name, link.master) if link.master else (link.name,)
        case AddAddress(address=address) | DelAddress(address=address):
            return (address.dev,)
        case SetRoute(route=route):
            return () if route.blackhole else tuple(hop.dev for hop in route.nexthops) or (route.dev,)
        case SetNeighbour(neighbour=neighbour) | DelNeighbour(neighbour=neighbour):
            return (neighbour.dev,)
        case SetFdb(entry=entry) | DelFdb(entry=entry):
            return (entry.dev,)
        case SetShaper(dev=dev):
            return (dev,)
        case DelLink() | DelRoute():
            return ()


def encode(op: RtnlOp, indices: Mapping[str, int]) -> list[bytes]:
    """The requests of any operation but AddLink, which takes two rounds. Raises ValueError for a malformed MAC."""
    match op:
        case ChangeLink(link=link):
            return rtnl.change_link(link, indices=indices)
        case DelLink(name=name):
            return [rtnl.del_link(name)]
        case AddAddress(address=address):
            return [rtnl.set_address(address, indices[address.dev])]
        case DelAddress(address=address):
            return [rtnl.del_address(address, indices[address.dev])]
        case SetRoute(route=route):
            return [rtnl.set_route(route, indices)]
        case DelRoute(route=route):
            return [rtnl.del_route(route)]
        case SetNeighbour(neighbour=neighbour):
            return [rtnl.set_neighbour(neighbour, indices[neighbour.dev])]
        case DelNeighbour(neighbour=neighbour):
            return [rtnl.del_neighbour(neighbour, indices[neighbour.dev])]
        case SetFdb(entry=entry):
            return [rtnl.set_fdb(entry, indices[entry.dev])]
        case DelFdb(entry=entry):
            return [rtnl.del_fdb(entry, indices[entry.dev])]
        case SetShaper(dev=dev, shaper=shaper):
            return [rtnl.set_shaper(shaper, indices[dev])]
        case AddLink():
            raise ValueError("AddLink is made of new_link and settle_link")


def is_absent(op: Op, code: int) -> bool:
    """Whether errno `code` only says that what `op` removes is not there, which is what it wanted."""
    return code in _ABSENT.get(type(op), ())
