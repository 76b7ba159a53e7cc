"""What kube-proxy 1.20.2 left of itself in iptables (its own rules, captured), and what is taken of that."""

from pathlib import Path

from podwire.plan.kubeproxy import IPVS_DEVICE, NFT_TABLE, removal

CAPTURED = (Path(__file__).parents[2] / "cases/kubeproxy/1.20.2.iptables-save").read_text()
STRANGERS = """\
*filter
:INPUT ACCEPT [0:0]
:KUBE-FIREWALL - [0:0]
:DOCKER-USER - [0:0]
-A INPUT -j KUBE-FIREWALL
-A INPUT -m comment --comment "kubernetes service portals" -j DOCKER-USER
COMMIT
"""


def lines(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


def test_all_of_its_chains_go_and_the_kubelets_stay() -> None:
    text, count = removal(CAPTURED)
    named = {line[1:].split()[0] for line in lines(CAPTURED, ":KUBE-")}
    gone = {line.removeprefix("-X ") for line in lines(text, "-X ")}
    assert named - gone == {"KUBE-MARK-DROP", "KUBE-MARK-MASQ"}
    assert gone == {line[1:].split()[0] for line in lines(text, ":")}
    assert count == len(lines(text, "-X "))
    assert lines(text, "*") == ["*mangle", "*filter", "*nat"]
    assert lines(text, "COMMIT") == ["COMMIT"] * 3


def test_rules_of_the_kernels_own_chains_that_lead_there_go_as_they_are_written() -> None:
    text, _ = removal(CAPTURED)
    built_in = ("-A PREROUTING", "-A INPUT", "-A FORWARD", "-A OUTPUT", "-A POSTROUTING")
    leading = [line.replace("-A ", "-D ", 1) for line in CAPTURED.splitlines() if line.startswith(built_in)]
    assert sorted(lines(text, "-D ")) == sorted(leading)
    assert len(leading) == 8


def test_others_rules_are_left_alone() -> None:
    assert removal(STRANGERS) == ("", 0)
    assert removal("") == ("", 0)
    both, count = removal(STRANGERS.replace(":DOCKER-USER", ":KUBE-SERVICES - [0:0]\n:DOCKER-USER"))
    assert count == 1
    assert lines(both, "-") == ["-X KUBE-SERVICES"]


def test_what_is_removed_is_what_leads_there_by_either_word() -> None:
    saved = """\
*filter
:INPUT ACCEPT [0:0]
:OTHER - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-MARK-DROP - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-IPTABLES-HINT - [0:0]
-A INPUT -m comment --comment "only counts"
-A INPUT -j KUBE-MARK-DROP
-A OTHER -p tcp -g KUBE-SERVICES
-A KUBE-FORWARD -j KUBE-SERVICES
COMMIT
"""
    assert removal(saved) == (
        """\
*filter
:KUBE-FORWARD - [0:0]
:KUBE-SERVICES - [0:0]
-D OTHER -p tcp -g KUBE-SERVICES
-X KUBE-FORWARD
-X KUBE-SERVICES
COMMIT
""",
        2,
    )


def test_what_it_calls_its_table_and_device() -> None:
    assert (NFT_TABLE, IPVS_DEVICE) == ("kube-proxy", "kube-ipvs0")
