"""The server's own ranges, as a ServiceCIDR: what kube-proxy and `podwire proxy` ask for."""

import ipaddress
from typing import Any

import pytest
from apirig import Api, Serve

from podwire.apiserver.config import ServerConfig
from podwire.store.memory import MemoryStore

PATH = "/apis/networking.k8s.io/v1/servicecidrs"


def ranges(*texts: str) -> ServerConfig:
    return ServerConfig(service_cidrs=tuple(ipaddress.ip_network(text) for text in texts))


async def served(api: Api) -> dict[str, Any]:
    items = (await api.ok("GET", PATH))["items"]
    assert [item["metadata"]["name"] for item in items] == ["kubernetes"]
    found: dict[str, Any] = items[0]
    return found


async def test_the_ranges_are_those_that_the_server_was_started_with(serve: Serve) -> None:
    store = MemoryStore()
    api = await serve(store=store, config=ranges("10.96.0.0/12", "fd00:10:96::/112"))
    first = await served(api)
    assert first["spec"]["cidrs"] == ["10.96.0.0/12", "fd00:10:96::/112"]
    assert [(c["type"], c["status"]) for c in first["status"]["conditions"]] == [("Ready", "True")]
    again = await served(await serve(store=store, config=ranges("10.96.0.0/12", "fd00:10:96::/112")))
    assert again == first, "a server that starts again leaves it as it is"
    other = await served(await serve(store=store, config=ranges("10.112.0.0/16")))
    assert other["spec"]["cidrs"] == ["10.112.0.0/16"]


@pytest.mark.parametrize(
    ("name", "cidrs", "message"),
    [
        ("more", ["10.112.0.0/16"], "metadata.name: Forbidden: further ranges are not served"),
        ("kubernetes", [], "spec.cidrs: Required value"),
        ("kubernetes", ["10.0.0.0/8", "fd00::/64", "10.1.0.0/16"], "may only hold up to 2 values"),
        ("kubernetes", ["10.0.0.0/8", "10.1.0.0/16"], "may specify no more than one IP for each IP family"),
        ("kubernetes", ["10.0.0.1/8"], "spec.cidrs[0]: Invalid value"),
        ("kubernetes", ["fd00:0::/64"], "must be in canonical form"),
    ],
)
async def test_what_is_no_range(api: Api, name: str, cidrs: list[str], message: str) -> None:
    answer = await api.fails(422, "POST", PATH, {"metadata": {"name": name}, "spec": {"cidrs": cidrs}})
    assert message in answer["message"]


async def test_ranges_do_not_change(serve: Serve) -> None:
    api = await serve(config=ranges("10.96.0.0/12"))
    patch = {"spec": {"cidrs": ["10.0.0.0/8"]}}
    answer = await api.fails(422, "PATCH", f"{PATH}/kubernetes", patch, Content_Type="application/merge-patch+json")
    assert "field is immutable" in answer["message"]
