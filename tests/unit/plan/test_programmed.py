"""What nodes' words say of a Service, and how a word is written."""

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from podwire.model.acknowledgement import Acknowledgement, lease_document, read_lease
from podwire.model.objects import EndpointSlice, Lease, Node, Service
from podwire.plan.programmed import programmed

NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


def service(version: str, **spec: Any) -> Service:
    return msgspec.convert({"metadata": {"name": "web", "resourceVersion": version}, "spec": spec}, Service)


def piece(version: str) -> EndpointSlice:
    return msgspec.convert({"metadata": {"name": "web-1", "resourceVersion": version}}, EndpointSlice)


def node(name: str, *, ready: bool = True) -> Node:
    conditions = [{"type": "Ready", "status": str(ready)}]
    return msgspec.convert({"metadata": {"name": name}, "status": {"conditions": conditions}}, Node)


def word(name: str, services: str, slices: str) -> Acknowledgement:
    return Acknowledgement(node=name, services=services, slices=slices, mode="nftables", at=NOW)


def test_a_service_is_programmed_where_the_word_covers_it_and_its_slices() -> None:
    words = {
        "n1": word("n1", "10", "20"),
        "n2": word("n2", "9", "20"),  # an older Service
        "n3": word("n3", "11", "19"),  # an older slice
        "n5": word("n5", "", ""),
    }
    nodes = [node("n3"), node("n1"), node("n2"), node("n4", ready=False), node("n5")]
    found = programmed(service("10"), [piece("20"), piece("5")], nodes, words)
    assert found.on == ("n1",)
    assert found.late == ("n2", "n3", "n5")
    assert found.absent == ("n4",)
    assert found.at == NOW
    assert not found.everywhere


def test_it_is_programmed_since_the_last_nodes_word() -> None:
    unknown = Acknowledgement(node="n3", services="10", slices="20")
    words = {
        "n1": word("n1", "10", "20"),
        "n2": msgspec.structs.replace(word("n2", "10", "20"), at=NOW - timedelta(hours=1)),
        "n3": unknown,
    }
    found = programmed(service("10"), iter([piece("20")]), [node(name) for name in words], words)
    assert (found.on, found.at) == (("n1", "n2", "n3"), NOW)


def test_who_may_not_know_of_a_removal_is_late() -> None:
    words = {name: word(name, "10", "20") for name in ("n1", "n2")}
    found = programmed(service("10"), [piece("20")], [node("n1"), node("n2")], words, unaware={"n2"})
    assert (found.on, found.late) == (("n1",), ("n2",))


def test_everywhere_is_every_node_that_is_ready() -> None:
    words = {"n1": word("n1", "100", "9")}
    assert programmed(service("99"), [piece("9")], [node("n1"), node("n2", ready=False)], words).everywhere
    assert not programmed(service("99"), [], [], words).everywhere
    assert not programmed(service("not-a-number"), [], [node("n1")], words).everywhere


def test_what_no_node_programs_says_so() -> None:
    assert "headless" in programmed(service("1", clusterIP="None"), [], [node("n1")], {}).why
    assert "ExternalName" in programmed(service("1", type="ExternalName"), [], [node("n1")], {}).why


def test_a_word_is_read_as_it_was_written() -> None:
    ack = word("n1", "10", "20")
    assert read_lease(msgspec.convert(lease_document(ack), Lease)) == ack
    assert read_lease(msgspec.convert({"metadata": {"name": "n1"}}, Lease)) is None
