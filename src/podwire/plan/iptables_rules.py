"""What iptables chains hold for Services: the fixed ones, and the rules of one frontend. Rules are text, spelled as
`iptables-save` spells them, so that what is planned and what is read back can be compared.

Named in order of a packet's way; it does the same as `services_rules` does in nftables:

    nat PREROUTING ─► from a pod here? INSIDE ; OUTSIDE (externalTrafficPolicy: Local) ; INSIDE ─► I-xx ─► SVC-… (─► SEP-…)
    nat OUTPUT     ─► INSIDE
    filter INPUT ─► health-check node ports: accepted
    filter INPUT, FORWARD, OUTPUT ─► what was not rewritten although it should: refused or dropped
    filter FORWARD ─► what the connection tracker cannot place: dropped ; to be masqueraded, and known connections: accepted
    nat POSTROUTING ─► REWRITTEN (masquerade) ; LEAVING (masquerade out of the cluster)

The nat table can neither refuse nor drop, so the filter table repeats the question of who came from where.
Frontends hang in up to 256 chains by the last byte of their address, so a packet passes a 256th of them.
"""

import ipaddress
import re
import string
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import NamedTuple

from podwire.model.addr import Family, IPNetwork
from podwire.model.servicetable import Backend, Frontend, FrontendKind, NodeFacts, Pool, backend_address, backend_port
from podwire.plan.nftexprs import multicast, networks_of
from podwire.plan.services_maps import place_key

PREFIX = "PODWIRE-"
"""Every chain of ours begins so, and no rule of ours stands in another's but the jumps of `HOOKS`."""

NAT, FILTER = "nat", "filter"
HEALTH = "HEALTH"
"""The chain that opens a host's firewall for health-check node ports, as kube-proxy's iptables does and its nftables cannot."""
TABLES = (NAT, FILTER)

_NEW = "-m conntrack --ctstate NEW "
HOOKS = {
    NAT: (("PREROUTING", "", "PREROUTING"), ("OUTPUT", "", "OUTPUT"), ("POSTROUTING", "", "POSTROUTING")),
    FILTER: (("INPUT", _NEW, "INPUT"), ("FORWARD", "", "FORWARD"), ("OUTPUT", _NEW, "F-INSIDE")),
}
"""Table → (the kernel's chain, matches, our chain without its prefix)."""

MASQUERADE_BIT = 14
"""kube-proxy's default: the packet mark between PREROUTING or OUTPUT and POSTROUTING that says "masquerade"."""

Rules = tuple[str, ...]
"""The lines of one chain, without `-A <chain>`."""

INVALID = '-m conntrack --ctstate INVALID -m comment --comment "of no known connection" -j DROP'
"""In the chain FORWARD."""

_PROTOCOLS = {6: "tcp", 17: "udp", 132: "sctp"}
_FRONTEND = re.compile(r"-d ([0-9a-f.:]+)/(?:32|128) -p (\w+) -m \w+ --dport (\d+) ")
_UNQUOTED = frozenset(string.ascii_letters + string.digits + "_-")
_LOOPBACK = "127.0.0.0/8"


def chain(name: str) -> str:
    return PREFIX + name


def bucket_name(kind: str, address: bytes) -> str:
    """The chain of all frontends whose address ends as this one; `kind`: "I", "O", "FI" or "FO"."""
    return chain(f"{kind}-{address[-1]:02x}")


def bucket_match(family: Family, name: str) -> str:
    """The destinations that belong in the chain of that name."""
    last = int(name.rsplit("-", 1)[1], 16)
    if family is Family.IPV4:
        return f"-d 0.0.0.{last}/0.0.0.255"
    return f"-d {ipaddress.IPv6Address(last)}/::ff"


def service_chain(key: bytes, *, outside: bool) -> str:
    return chain(("EXT-" if outside else "SVC-") + _digest(key))


def endpoint_chain(key: bytes, packed: Backend, *, outside: bool) -> str:
    return chain("SEP-" + _digest(key + packed + bytes((outside,))))


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=8).hexdigest().upper()


# --- the fixed chains ---------------------------------------------------------------------------------------------


def fixed_chains(family: Family, facts: NodeFacts, mark: str, *, drop_invalid: bool) -> dict[tuple[str, str], Rules]:
    """(table, chain) → rules, of every chain that no Service has a part in. `drop_invalid`: see `_forward`."""
    pods = (*map(_from, networks_of(family, facts.local_pods)), *map(_by, facts.local_interfaces))
    loopback = facts.loopback and family is Family.IPV4
    inside, outside, others = chain("INSIDE"), chain("OUTSIDE"), '-m comment --comment "from a pod of this node"'
    to_mark = f"-j MARK --set-xmark {mark}/{mark}"
    returns = tuple(f"{pod}{others} -j RETURN" for pod in pods)
    unreachable = _unreachable(family)
    chains: dict[tuple[str, str], Rules] = {
        (NAT, chain("PREROUTING")): (
            *((f"-d {_LOOPBACK} -j ACCEPT",) if loopback else ()),
            *(f"{pod}{others} -g {inside}" for pod in pods),
            f"-j {outside}",
            f"-g {inside}",
        ),
        (NAT, chain("OUTPUT")): (f"-g {inside}",),
        (NAT, chain("POSTROUTING")): (
            f"-m conntrack --ctstate DNAT -j {chain('REWRITTEN')}",
            *(f"{_from(cidr)}-j {chain('LEAVING')}" for cidr in networks_of(family, facts.pod_cidrs)),
        ),
        (NAT, chain("REWRITTEN")): (f"-m mark --mark {mark}/{mark} -g {chain('MASQUERADE')}", f"-j {chain('HAIRPIN')}"),
        (NAT, chain("MASQUERADE")): (f"-j MARK --set-xmark {mark}/0x0", "-j MASQUERADE --random-fully"),
        (NAT, chain("MARK-OTHERS")): (*returns, to_mark) if facts.tells_pods(family.version) else (),
        (NAT, chain("MARK-LOCAL")): (*returns, f"-m addrtype --src-type LOCAL {to_mark}"),
        (NAT, chain("LEAVING")): _leaving(family, facts, mark),
        (FILTER, chain("INPUT")): (
            *((f"-d {_LOOPBACK} ! -i lo {_comment('127.0.0.1 is for this machine alone')} -j DROP",) if loopback else ()),
            f"-j {chain(HEALTH)}",
            f"-g {chain('FILTER')}",
        ),
        (FILTER, chain("FILTER")): (
            "-m conntrack --ctstate DNAT -j RETURN",
            *(f"{pod}{others} -g {chain('F-INSIDE')}" for pod in pods),
            f"-j {chain('F-OUT')}",
            f"-g {chain('F-INSIDE')}",
        ),
        (FILTER, chain("FORWARD")): _forward(mark, drop_invalid=drop_invalid),
        (FILTER, chain("F-INSIDE")): (
            "-m conntrack --ctstate DNAT -j RETURN",
            f"-j {chain('F-IN')}",
            *(
                f'{_to(cidr)}-m comment --comment "no Service has this ClusterIP" -j DROP'
                for cidr in networks_of(family, facts.service_cidrs)
            ),
        ),
        (FILTER, chain("REFUSE")): ("-p tcp -j REJECT --reject-with tcp-reset", f"-j REJECT --reject-with {unreachable}"),
    }  # fmt: skip
    return chains


def _forward(mark: str, *, drop_invalid: bool) -> Rules:
    """kube-proxy's KUBE-FORWARD. A packet outside its connection's window (`drop_invalid`) would not be translated back, and
    its receiver would end the connection (kubernetes issue 74839). Where the policy of FORWARD is to drop, as docker has it,
    Services work all the same."""
    return (
        f"-m conntrack --ctstate NEW -j {chain('FILTER')}",
        *((INVALID,) if drop_invalid else ()),
        f'-m mark --mark {mark}/{mark} -m comment --comment "to a Service, masqueraded" -j ACCEPT',
        '-m conntrack --ctstate RELATED,ESTABLISHED -m comment --comment "known connections" -j ACCEPT',
    )


def _leaving(family: Family, facts: NodeFacts, mark: str) -> Rules:
    inside = networks_of(family, facts.cluster_cidrs) or networks_of(family, facts.pod_cidrs)
    return (
        f'-m mark --mark {mark}/{mark} -m comment --comment "marked by kube-proxy" -j RETURN',
        *(f'{_to(cidr)}-m comment --comment "pod to pod: never rewritten" -j RETURN' for cidr in inside),
        f"-d {multicast(family)} -m comment --comment multicast -j RETURN",
        '-m comment --comment "pod to outside the cluster" -j MASQUERADE --random-fully',
    )


def _from(network: IPNetwork) -> str:
    return f"-s {network} " if network.prefixlen else ""


def _by(interface: str) -> str:
    return f"-i {interface.replace('*', '+')} "


def _to(network: IPNetwork) -> str:
    return f"-d {network} " if network.prefixlen else ""


def _unreachable(family: Family) -> str:
    return "icmp-port-unreachable" if family is Family.IPV4 else "icmp6-port-unreachable"


# --- one frontend -------------------------------------------------------------------------------------------------


class Owned(NamedTuple):
    """A frontend, its key, and the name of the Service (or pod) whose it is."""

    key: bytes
    frontend: Frontend
    owner: str


def frontend_match(frontend: Frontend) -> str:
    protocol = _PROTOCOLS[frontend.protocol]
    return f"-d {_host(frontend.address)} -p {protocol} -m {protocol} --dport {frontend.port}"


def frontend_key_of(line: str) -> bytes | None:
    """The key of the frontend that a rule is for, whose match begins as `frontend_match` has it; None for other rules."""
    found = _FRONTEND.match(line)
    if found is None:
        return None
    address, protocol, port = found.groups()
    number = next((number for number, name in _PROTOCOLS.items() if name == protocol), 0)
    return place_key(ipaddress.ip_address(address).packed, number, int(port)) if number else None


def nat_entry(of: Owned, pool: Pool, *, outside: bool) -> Rules:
    """The rules that lead packets for the frontend to its chain. Where it has none, they leave the nat table, and the filter
    table deals with them."""
    frontend = of.frontend
    match, comment = frontend_match(frontend), _comment(of.owner)
    leave = f"{match} {comment} -j ACCEPT"
    if not pool.backends:
        return (leave,)
    lead = f"-g {service_chain(of.key, outside=outside)}"
    if frontend.source_ranges is None:
        return (f"{match} {comment} {lead}",)
    return (*(f"{match} {_range(r)} {comment} {lead}" for r in frontend.source_ranges), leave)


def filter_entry(of: Owned, pool: Pool, family: Family) -> Rules:
    """The rules for packets that the nat table did not rewrite: nobody serves the frontend, or not for this source."""
    frontend, owner = of.frontend, of.owner
    match = frontend_match(frontend)
    restricted = frontend.source_ranges is not None
    drop = f"{match} {_comment(owner + ' loadBalancerSourceRanges')} -j DROP"
    if pool.backends:
        return (drop,) if restricted else ()
    if pool.drop:
        verdict = f"{_comment(owner + ' has endpoints on other nodes only')} -j DROP"
    else:
        reason = "tcp-reset" if frontend.protocol == 6 else _unreachable(family)
        verdict = f"{_comment(owner + ' has no endpoints')} -j REJECT --reject-with {reason}"
    if frontend.source_ranges is None:
        return (f"{match} {verdict}",)
    return (*(f"{match} {_range(r)} {verdict}" for r in frontend.source_ranges), drop)


def refused_cluster_ip(address: bytes) -> str:
    return f'-d {_host(address)} -m comment --comment "no such port on this ClusterIP" -j {chain("REFUSE")}'


def health_check(port: int, owner: str) -> str:
    return f"-p tcp -m tcp --dport {port} {_comment(owner + ' health check')} -j ACCEPT"


def hairpin(address: bytes) -> str:
    host = _host(address)
    return f'-s {host} -d {host} -m comment --comment "a pod to itself" -j MASQUERADE --random-fully'


def service_rules(of: Owned, pool: Pool, facts: NodeFacts, mark: str, *, outside: bool) -> Rules:
    """The chain of a frontend that has backends: who is masqueraded, and which backend it shall be."""
    picks = _sticky(of, pool, outside) if of.frontend.affinity_s else _picks(of.frontend, pool)
    return (*_marks(of.frontend, facts, mark), *picks)


def _marks(frontend: Frontend, facts: NodeFacts, mark: str) -> Iterator[str]:
    if frontend.masquerade or (facts.masquerade_all and frontend.kind is FrontendKind.CLUSTER_IP):
        yield f"-j MARK --set-xmark {mark}/{mark}"
    elif frontend.kind is FrontendKind.CLUSTER_IP:
        yield f"-j {chain('MARK-OTHERS')}"
    elif frontend.outside is not None:
        yield f"-j {chain('MARK-LOCAL')}"


def _picks(frontend: Frontend, pool: Pool) -> Iterator[str]:
    protocol = _PROTOCOLS[frontend.protocol]
    for chance, packed in zip(_chances(len(pool.backends)), pool.backends, strict=True):
        yield f"-p {protocol} {chance}-j DNAT --to-destination {destination(packed)}"


def _sticky(of: Owned, pool: Pool, outside: bool) -> Iterator[str]:
    names = [endpoint_chain(of.key, packed, outside=outside) for packed in pool.backends]
    for packed, name in zip(pool.backends, names, strict=True):
        yield f"{_recent(of, packed, f'--rcheck --seconds {of.frontend.affinity_s} --reap')} -j {name}"
    for chance, name in zip(_chances(len(names)), names, strict=True):
        yield f"{chance}-j {name}"


def endpoint_rules(of: Owned, packed: Backend) -> Rules:
    """The chain of one backend of a frontend with affinity: the client is noted, then led there."""
    return (
        f"-p {_PROTOCOLS[of.frontend.protocol]} {_recent(of, packed, '--set')} -j DNAT --to-destination {destination(packed)}",
    )


def _recent(of: Owned, packed: Backend, what: str) -> str:
    mask = "255.255.255.255" if len(of.frontend.address) == 4 else "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"
    return f"-m recent {what} --name {clients_list(of, packed)} --mask {mask} --rsource"


def clients_list(of: Owned, packed: Backend) -> str:
    """Who was led to a backend of the Service's port: one list for all frontends of the port, whichever pool they lead to."""
    port = f"{of.owner} {of.frontend.protocol} {of.frontend.port_name}"
    return chain("CLIENTS-" + _digest(port.encode() + packed))


def _chances(count: int) -> Iterator[str]:
    """The match by which each of `count` rules in a row gets the same share; the last takes what is left."""
    for left in range(count, 1, -1):
        # The kernel keeps 31 bits, and iptables-save shows those.
        yield f"-m statistic --mode random --probability {round((1 << 31) / left) / (1 << 31):.11f} "
    yield ""


def _range(bounds: tuple[bytes, bytes]) -> str:
    first, last = map(ipaddress.ip_address, bounds)
    return f"-m iprange --src-range {first}-{last}"


def _host(address: bytes) -> str:
    return f"{ipaddress.ip_address(address)}/{8 * len(address)}"


def destination(packed: Backend) -> str:
    """As DNAT takes it."""
    address = ipaddress.ip_address(backend_address(packed))
    text = f"[{address}]" if address.version == 6 else str(address)
    return f"{text}:{backend_port(packed)}"


def _comment(text: str) -> str:
    quoted = text if _UNQUOTED.issuperset(text) else f'"{text}"'
    return f"-m comment --comment {quoted}"


def dispatch(family: Family, buckets: Iterable[str]) -> Rules:
    return tuple(f"{bucket_match(family, name)} -g {name}" for name in sorted(buckets))


def merged(entries: Sequence[Rules]) -> Rules:
    return tuple(line for rules in entries for line in rules)
