"""A host that saves its nftables rules as the guide says has all but podwire's, and they load."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from packetrig import packet_rig
from service_cases import load_cases

from podwire.agent.proxymodes.nft import NftRules
from podwire.kernel.netns import run_in_netns

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "replace-kube-proxy.md"
OTHERS = """
table inet firewall {
    set friends { type ipv4_addr; flags interval; elements = { 192.0.2.0/24 } }
    chain input {
        type filter hook input priority filter; policy accept;
        ip saddr @friends counter accept comment "mine"
    }
}
table ip6 empty {
}
"""

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.needs("nftables", "bridge devices", "netfilter on bridges (br_netfilter)", "IPv6"),
    pytest.mark.skipif(shutil.which("nft") is None, reason="the nft program is not installed"),
]


def saving() -> str:
    """The guide's command that writes `rules.nft`."""
    (line,) = re.findall(r"^\(echo flush ruleset; .*$", GUIDE.read_text(), re.MULTILINE)
    return str(line)


async def test_what_is_saved_by_the_guide_loads(tmp_path: Path) -> None:
    async with packet_rig() as rig:

        def shell(command: str, text: str = "") -> str:
            def run() -> "subprocess.CompletedProcess[str]":
                return subprocess.run(
                    ["sh", "-c", command], input=text, cwd=tmp_path, capture_output=True, text=True, check=False
                )

            done = run_in_netns(rig.node, run)
            assert done.returncode == 0, done.stderr
            return done.stdout

        shell("nft -f -", OTHERS)
        mine = shell("nft list ruleset")
        case = next(iter(load_cases()))
        rules = NftRules(rig.kernel, case.facts)
        case.feed(rules)
        await rules.compare()
        assert "table ip podwire" in shell("nft list ruleset")
        shell(saving())
        await rules.remove()
        shell("nft flush ruleset && nft -c -f rules.nft && nft -f rules.nft")
        assert shell("nft list ruleset") == mine
