"""What kube-proxy leaves behind when it ends, and the text for `iptables-restore --noflush` that removes it. Pure.

Facts from kube-proxy's own clean-up (pkg/proxy/iptables and ipvs, 1.20 to 1.37): its chains begin with KUBE-; some that do are
the kubelet's. In nftables mode it has a table of its own in either family.
"""

from collections.abc import Mapping

NFT_TABLE = "kube-proxy"
IPVS_DEVICE = "kube-ipvs0"
"""The device that has the Services' addresses in its ipvs mode."""

_PREFIX = "KUBE-"
_KUBELETS = frozenset(("KUBE-MARK-DROP", "KUBE-MARK-MASQ", "KUBE-FIREWALL", "KUBE-KUBELET-CANARY", "KUBE-IPTABLES-HINT"))
"""Made, and put back, by kubelets; KUBE-FIREWALL is also what keeps others away from 127.0.0.1."""


def removal(saved: str) -> tuple[str, int]:
    """What removes kube-proxy's chains, and rules elsewhere that lead to them, given what `iptables-save` says; and how many
    chains those are. The text is empty where there are none."""
    parts, count = [], 0
    for table, (chains, rules) in _tables(saved).items():
        going = [chain for chain in chains if chain.startswith(_PREFIX) and chain not in _KUBELETS]
        if not going:
            continue
        count += len(going)
        leading = [line for line in rules if line.split()[1] not in going and _target(line) in going]
        # Naming a chain empties it, so that none is in use any more when they are deleted.
        lines = [f"*{table}", *(f":{chain} - [0:0]" for chain in going)]
        lines += [line.replace("-A ", "-D ", 1) for line in leading]
        lines += [f"-X {chain}" for chain in going]
        parts.append("\n".join((*lines, "COMMIT", "")))
    return "".join(parts), count


def _tables(saved: str) -> Mapping[str, tuple[list[str], list[str]]]:
    """By table: names of chains, and rules as they are."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    table = ""
    for line in saved.splitlines():
        if line.startswith("*"):
            table = line[1:].strip()
            found[table] = ([], [])
        elif line.startswith(":"):
            found[table][0].append(line[1:].split()[0])
        elif line.startswith("-A "):
            found[table][1].append(line)
    return found


def _target(rule: str) -> str:
    """The chain, or what else, that a rule leads to."""
    words = rule.split()
    for option in ("-j", "-g"):
        if option in words:
            return words[words.index(option) + 1]
    return ""
