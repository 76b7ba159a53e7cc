"""What an agent can say of itself: small values for status pages and tests."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class AgentStatus:
    """One agent at one moment.

    commits: nftables transactions made. repairs: how often something that others changed was put back; repaired: how many
    things, by kind ("route", "neighbour", "fdb", "device", "device-setting", "address", "sysctl", "rules").
    routed_pods: the node's pods reach each other through its IP stack, because its bridge's traffic cannot meet netfilter.
    degraded: what does not work, by subject ("services", "net/bridge/bridge-nf-call-iptables", …), in words.
    """

    node: str
    network_ready: bool
    services_ready: bool
    pods: int
    commits: int
    repairs: int
    routed_pods: bool
    degraded: Mapping[str, str]
    repaired: Mapping[str, int] = field(default_factory=dict)

    @property
    def ready(self) -> bool:
        return self.network_ready and self.services_ready


@dataclass(slots=True)
class Health:
    """The counters behind `AgentStatus`, written by the agent's parts."""

    network_ready: bool = False
    services_ready: bool = False
    commits: int = 0
    repairs: int = 0
    routed_pods: bool = False
    degraded: dict[str, str] = field(default_factory=dict)
    repaired: Counter[str] = field(default_factory=Counter)

    def failed(self, subject: str, error: object) -> None:
        self.degraded[subject] = str(error)

    def works(self, subject: str) -> None:
        self.degraded.pop(subject, None)
