"""`podwire verify overlay` on a lab: silent when all is well, and it names what is not."""

import json

import pytest
from labcommand import Lab, until

from podwire.trace.overlaycheck import AGREED, FITTING, KEPT, MAPPED, UNIQUE

pytestmark = [pytest.mark.lab, pytest.mark.timeout(120)]


def test_a_sound_overlay_has_evidence_for_every_condition(lab: Lab) -> None:
    until(lambda: lab.podwire("verify", "overlay", "--name", lab.name).status == 0)
    report = json.loads(lab.podwire.ok("verify", "overlay", "--name", lab.name, "-o", "json"))
    assert report["ok"] is True
    count = {condition: sum(f["condition"] == condition for f in report["findings"]) for condition in (KEPT, FITTING, AGREED)}
    assert count == {KEPT: 3 * 2 * 2, FITTING: 3 * 2 * 2, AGREED: 3 * 2 * 2 + 3 * 2}
    assert {f["condition"] for f in report["findings"]} == {KEPT, FITTING, AGREED, MAPPED, UNIQUE}
    edges = [f["evidence"] for f in report["findings"] if f["condition"] == FITTING]
    assert any("flannel.1 says 1450: 1450 bytes arrived, 1451 bytes too big" in words for words in edges)
    assert any("flannel-v6.1 says 1430: 1430 bytes arrived, 1431 bytes too big" in words for words in edges)


def test_a_cut_cable_is_found_by_packets_and_an_agent_that_is_away_by_its_kernel(lab: Lab) -> None:
    try:
        lab.podwire.ok("lab", "fault", "partition", "node-1", "--from", "node-2", "--name", lab.name)
        done = lab.podwire("verify", "overlay", "--name", lab.name)
        assert done.status == 1
        assert f"✗ {FITTING}: 8 of 12" in done.out
        assert f"✗ {KEPT}: 8 of 12" in done.out
        assert f"✓ {AGREED}: 18 of 18" in done.out
        assert "node-1 → node-2 (10.244." in done.out
    finally:
        lab.podwire.ok("lab", "fault", "heal", "--name", lab.name)
    until(lambda: lab.podwire("verify", "overlay", "--name", lab.name).status == 0)
