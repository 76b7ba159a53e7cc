"""Names in the kernel. They follow from what they stand for, so that an agent that starts again finds its own things.

A device name has at most 15 characters (IFNAMSIZ − 1); who a device belongs to is said in its alias, not in its name.
"""

import hashlib
from functools import lru_cache

from podwire.model.addr import Family
from podwire.model.kernelstate import OWNER_ALIAS

BRIDGE = "cni0"
"""The bridge that joins a node's pods (the name that flannel's CNI configuration gives it)."""

POD_DEVICE = "eth0"
"""A pod's own end of its veth pair."""

NFT_TABLE = "podwire"
"""The nftables table, in families ip and ip6."""

_MAX_ALIAS = 255
"""IFALIASZ − 1."""


def host_veth(uid: str) -> str:
    """The node's end of the veth pair of the pod with `uid`: `veth` and 40 bits of hash (14 characters)."""
    return "veth" + hashlib.sha256(uid.encode()).hexdigest()[:10]


def pod_alias(namespace: str, name: str) -> str:
    """The ifalias of a pod's veth, for a reader of `ip link`: `podwire:shop/web-7d4b9`."""
    return f"{OWNER_ALIAS}:{namespace}/{name}"[:_MAX_ALIAS]


@lru_cache(maxsize=64)
def vtep_device(family: Family, vni: int) -> str:
    """flannel's device names: `flannel.1` carries IPv4 pods over an IPv4 underlay, `flannel-v6.1` IPv6 over IPv6."""
    return f"flannel.{vni}" if family is Family.IPV4 else f"flannel-v6.{vni}"


def vtep_mac(node: str, family: Family) -> str:
    """A locally administered unicast MAC for a node's tunnel end. It follows from the node's name, so a re-made device
    keeps what the peers have in their neighbour and forwarding tables true."""
    digest = hashlib.sha256(f"{node}/{family.value}".encode()).digest()
    return (b"\x0a" + digest[:5]).hex(":")
