"""How Services get into the kernel."""

import enum


class ProxyMode(enum.StrEnum):
    """A back end. The value is what `--proxy-mode` and kube-proxy's configuration call it."""

    NFTABLES = "nftables"
    IPTABLES = "iptables"
    IPVS = "ipvs"
