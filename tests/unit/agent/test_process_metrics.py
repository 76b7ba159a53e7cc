"""What every Prometheus client tells of its process, and client-go of its requests: names, labels, numbers."""

import os
import resource
from pathlib import Path

import pytest
from scripted_server import ScriptedServer

from podwire.agent.clientmetrics import ClientMetrics
from podwire.agent.process import process_text
from podwire.client.api import ApiClient, Asked
from podwire.client.errors import ApiError, NotFound, Unavailable
from podwire.model.resources import NODES, PODS


def samples(text: str) -> dict[str, str]:
    return dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))


def test_a_process_by_what_the_kernel_says_of_it(tmp_path: Path) -> None:
    """The name may be anything, brackets too; fields are counted from its end."""
    before = ["S", "1", "1", "1", "0", "-1", "4194560", "100", "0", "0", "0"]
    fields = [*before, "250", "50", "0", "0", "20", "0", "4", "0", "300", "7000000", "25", "0"]
    (tmp_path / "self/fd").mkdir(parents=True)
    for number in range(3):
        (tmp_path / f"self/fd/{number}").touch()
    (tmp_path / "self/stat").write_text(f"42 (a) b) (c) {' '.join(fields)}\n")
    (tmp_path / "stat").write_text("cpu  1 2 3\nbtime 1700000000\nprocesses 9\n")
    ticks, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    found = {name: float(value) for name, value in samples(process_text(tmp_path)).items() if name.startswith("process_")}
    assert found == {
        "process_cpu_seconds_total": 300 / ticks,
        "process_start_time_seconds": 1700000000 + 300 / ticks,
        "process_resident_memory_bytes": 25 * page,
        "process_virtual_memory_bytes": 7000000,
        "process_open_fds": 3,
        "process_max_fds": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }


def test_this_process() -> None:
    text = process_text()
    assert 'podwire_build_info{version="' in text
    assert float(samples(text)["process_resident_memory_bytes"]) > 1 << 20


def test_no_limit_of_descriptors_is_a_large_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert samples(process_text())["process_max_fds"] == "18446744073709551615"


async def test_requests_are_counted_by_status_host_and_method() -> None:
    metrics, server = ClientMetrics(), ScriptedServer()
    server.answer("POST", "/api/v1/namespaces/shop/pods", {}, 201)
    server.answer("GET", "/api/v1/nodes/n1", {}, 404)
    server.answer("GET", "/nothing", {}, 404)
    async with server.serve() as client:
        client.subscribe(metrics.asked)
        await client.create(PODS, {"metadata": {"namespace": "shop", "name": "web"}})
        with pytest.raises(NotFound):
            await client.get(NODES, "n1")
        with pytest.raises(ApiError):
            async for _ in client.stream("GET", "/nothing"):
                pass
    host = server.url.removeprefix("http://")
    found = samples(metrics.text())
    assert found[f'rest_client_requests_total{{code="201",host="{host}",method="POST"}}'] == "1"
    assert found[f'rest_client_requests_total{{code="404",host="{host}",method="GET"}}'] == "2"
    counts = {name: value for name, value in found.items() if "_count{" in name}
    assert counts == {
        f'rest_client_request_duration_seconds_count{{host="{host}",verb="GET"}}': "1",
        f'rest_client_request_duration_seconds_count{{host="{host}",verb="POST"}}': "1",
    }, "a stream has no duration"


async def test_what_nobody_answers_is_an_error() -> None:
    seen: list[Asked] = []
    async with ApiClient("http://127.0.0.1:1/base") as client:
        client.subscribe(seen.append)
        with pytest.raises(Unavailable):
            await client.get(NODES, "n1")
        with pytest.raises(Unavailable):
            async for _ in client.stream("GET", "/api/v1/nodes"):
                pass
    assert [(one.method, one.host, one.code, one.seconds is None) for one in seen] == [
        ("GET", "127.0.0.1:1", "<error>", False),
        ("GET", "127.0.0.1:1", "<error>", True),
    ]


def test_durations_fall_into_kubernetes_buckets() -> None:
    metrics = ClientMetrics()
    for seconds in (0.001, 0.03, 100.0):
        metrics.asked(Asked("GET", "h:1", "200", seconds))
    found = samples(metrics.text())
    name = 'rest_client_request_duration_seconds_bucket{host="h:1",verb="GET",le='
    assert [found[f'{name}"{bound}"}}'] for bound in ("0.005", "0.025", "0.1", "60", "+Inf")] == ["1", "1", "2", "2", "3"]
