"""/healthz, /readyz and /metrics of an overlay agent."""

import re
from collections.abc import Callable

import pytest
from aiohttp.test_utils import TestClient, TestServer

from podwire.agent.overlayd.status import OverlayStatus, metrics_text
from podwire.agent.overlayd.statusserver import status_app
from podwire.agent.subnets.port import Holding, SubnetCounters

GOOD = OverlayStatus(
    node="n1",
    backend="vxlan",
    programmed=True,
    holding=Holding.HELD,
    peers=12,
    refused={"n9": "its VNI is 7, not 1"},
    repaired={"route": 3, "device": 1},
    apply_seconds=0.25,
    counters=SubnetCounters(acquired=1, renew_failures=2),
)
LINE = re.compile(r'[a-z_]+(\{[a-z_]+="[^"\n]*"(,[a-z_]+="[^"\n]*")*\})? [-+0-9.e]+')


async def answers(status: Callable[[], OverlayStatus], path: str) -> tuple[int, str]:
    async with TestClient(TestServer(status_app(status))) as client, client.get(path) as response:
        return response.status, await response.text()


async def test_a_healthy_agent() -> None:
    assert await answers(lambda: GOOD, "/healthz") == (200, "ok\n")
    assert await answers(lambda: GOOD, "/readyz") == (200, "ok\n")


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (OverlayStatus(node="n", backend="", programmed=False, holding=Holding.HELD), "not programmed yet"),
        (OverlayStatus(node="n", backend="", programmed=True, holding=Holding.NONE), "none was acquired yet"),
        (
            OverlayStatus(node="n", backend="", programmed=True, holding=Holding.LAPSED, why="revoked"),
            "no lease is held: revoked",
        ),
        (
            OverlayStatus(node="n", backend="", programmed=True, holding=Holding.HELD, degraded={"links": "refused"}),
            "links: refused",
        ),
    ],
)
async def test_what_is_missing_is_said(status: OverlayStatus, words: str) -> None:
    code, text = await answers(lambda: status, "/readyz")
    assert (code, words in text) == (503, True)
    assert (await answers(lambda: status, "/healthz"))[0] == 200


async def test_metrics_are_prometheus_text() -> None:
    code, text = await answers(lambda: GOOD, "/metrics")
    assert code == 200
    assert "\nprocess_resident_memory_bytes " in text
    for line in text.splitlines():
        assert line.startswith(("# HELP ", "# TYPE ")) or LINE.fullmatch(line), line
    for expected in (
        'podwire_overlay_info{backend="vxlan"} 1',
        "podwire_overlay_lease_held 1",
        "podwire_overlay_peers 12",
        "podwire_overlay_peers_refused 1",
        'podwire_overlay_repaired_total{kind="route"} 3',
        'podwire_overlay_lease_events_total{event="renew_failures"} 2',
        "podwire_overlay_apply_seconds 0.25",
    ):
        assert expected in text.splitlines()


def test_labels_are_escaped() -> None:
    status = OverlayStatus(node="n", backend='a"b\\c\n', programmed=True, holding=Holding.HELD)
    assert 'podwire_overlay_info{backend="a\\"b\\\\c\\n"} 1' in metrics_text(status)
