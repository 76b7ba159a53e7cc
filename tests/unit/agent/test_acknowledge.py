"""When a node gives its word that Services are programmed, when it does not, and how it gets there. In virtual time."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import msgspec
import pytest
from virtualtime import run_virtual

from podwire.agent.acknowledge import IDLE_SECONDS, INTERVAL, Acknowledger
from podwire.agent.rounds import OnRound, Round, Served, Versions
from podwire.client.api import ApiClient
from podwire.client.errors import AlreadyExists, ApiError, Forbidden, NotFound, Unavailable
from podwire.model.acknowledgement import NAMESPACE, Acknowledgement, Speaker, lease_name, read_lease
from podwire.model.ids import ObjectKey
from podwire.model.meta import Json
from podwire.model.objects import Lease
from podwire.model.proxymode import ProxyMode
from podwire.model.resources import LEASES, Resource
from podwire.model.servicetable import ServiceTable

START = datetime(2026, 1, 2, tzinfo=UTC)


class Leases(ApiClient):
    """An API server's one Lease. `refusals`: what the next requests get. `writes`: when (loop time) it was written,
    and how."""

    def __init__(self) -> None:
        super().__init__("http://127.0.0.1:1")
        self.lease: Json | None = None
        self.refusals: list[ApiError] = []
        self.writes: list[tuple[float, str]] = []

    def _write(self, how: str, document: Any) -> Json:
        self.writes.append((asyncio.get_running_loop().time(), how))
        self.lease = document
        return dict(document)

    def _answer(self) -> None:
        if self.refusals:
            raise self.refusals.pop(0)

    async def patch(self, resource: Resource, name: str, patch: Any, namespace: str | None = None, **more: Any) -> Json:
        assert (resource, name, namespace) == (LEASES, lease_name("n1"), NAMESPACE)
        self._answer()
        if self.lease is None:
            raise NotFound(404, "NotFound", "there is no such Lease")
        return self._write("patch", patch)

    async def create(self, resource: Resource, obj: Any, namespace: str | None = None, **more: Any) -> Json:
        self._answer()
        if self.lease is not None:
            raise AlreadyExists(409, "AlreadyExists", "there is such a Lease")
        return self._write("create", obj)

    @property
    def word(self) -> Acknowledgement | None:
        return read_lease(msgspec.convert(self.lease, Lease)) if self.lease is not None else None


class Rules:
    """What an Acknowledger sees of a `ServiceSync`. `read`: how often the kernel was read back."""

    mode: ProxyMode | None = ProxyMode.IPVS

    def __init__(self) -> None:
        self.versions = Versions()
        self.read = 0
        self._observers: list[OnRound] = []

    def subscribe(self, observer: OnRound) -> None:
        self._observers.append(observer)

    async def read_back(self) -> Versions:
        self.read += 1
        self._tell({})
        return self.versions

    def round(self, revision: int, *, changed: bool = True, error: str = "") -> None:
        self.versions = Versions(str(revision), str(revision), str(revision))
        served = {ObjectKey("default", "web"): Served(None, (), ServiceTable())} if changed else {}
        self._tell(served, error)

    def _tell(self, changed: dict[ObjectKey, Served], error: str = "") -> None:
        for observer in self._observers:
            observer(Round(changed=changed, full=False, seconds=0.0, queued=0.0, error=error))


def acknowledging(story: Callable[[Rules, Leases, Acknowledger], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        began, rules, leases = loop.time(), Rules(), Leases()
        clock = lambda: START + timedelta(seconds=loop.time() - began)  # noqa: E731
        acknowledger = Acknowledger(leases, Speaker("n1", "boot-1"), rules, clock, Random(1))
        running = asyncio.create_task(acknowledger.run())
        try:
            await story(rules, leases, acknowledger)
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running
            await leases.close()

    run_virtual(main())


def test_the_first_change_is_acknowledged_at_once_and_others_once_a_second() -> None:
    async def story(rules: Rules, leases: Leases, acknowledger: Acknowledger) -> None:
        began = asyncio.get_running_loop().time()
        for revision in range(1, 12):
            rules.round(revision)
            await asyncio.sleep(0.1)
        await asyncio.sleep(5)
        assert [round(at - began, 6) for at, _ in leases.writes] == [0.0, INTERVAL, 2 * INTERVAL]
        assert leases.word == Acknowledgement(
            node="n1",
            services="11",
            slices="11",
            slices_until="11",
            mode="ipvs",
            at=START + timedelta(seconds=2),
            boot="boot-1",
        )
        assert acknowledger.last == Versions("11", "11", "11")

    acknowledging(story)


def test_rounds_that_failed_or_changed_nothing_are_no_news_but_the_first() -> None:
    async def story(rules: Rules, leases: Leases, acknowledger: Acknowledger) -> None:
        rules.round(1, error="refused")
        await asyncio.sleep(5)
        assert (leases.word, acknowledger.refused) == (None, "")
        rules.round(1, changed=False)
        await asyncio.sleep(5)
        assert len(leases.writes) == 1, "there was no word yet"
        rules.round(1, changed=False)
        rules.round(1, error="refused")
        await asyncio.sleep(5)
        assert (len(leases.writes), rules.read) == (1, 1)

    acknowledging(story)


def test_a_lease_that_goes_is_made_again_and_one_that_others_made_meanwhile_is_written() -> None:
    async def story(rules: Rules, leases: Leases, acknowledger: Acknowledger) -> None:
        for revision in (1, 2):
            rules.round(revision)
            await asyncio.sleep(5)
        leases.lease = None
        rules.round(3)
        await asyncio.sleep(5)
        leases.refusals = [NotFound(404, "NotFound", "not just now")]
        for revision in (4, 5):
            rules.round(revision)
            await asyncio.sleep(5)
        assert [how for _, how in leases.writes] == ["create", "patch", "create", "patch", "patch"]
        assert leases.word is not None
        assert leases.word.services == "5"

    acknowledging(story)


def test_who_may_not_say_so_says_that_once_and_tries_on(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)

    async def story(rules: Rules, leases: Leases, acknowledger: Acknowledger) -> None:
        leases.refusals = [Unavailable("no answer"), *[Forbidden(403, "Forbidden", "no such right")] * 5]
        rules.round(1)
        await asyncio.sleep(0.5)
        assert (acknowledger.refused, acknowledger.last) == ("no such right", None)
        await asyncio.sleep(30)
        assert (acknowledger.refused, acknowledger.last) == ("", Versions("1", "1", "1"))
        assert [record.message for record in caplog.records] == [
            "Services are programmed, but this node may not say so in the API: no such right"
        ]

    acknowledging(story)


def test_an_api_server_that_does_not_answer_is_asked_again_with_what_is_true_then(caplog: pytest.LogCaptureFixture) -> None:
    async def story(rules: Rules, leases: Leases, acknowledger: Acknowledger) -> None:
        leases.refusals = [Unavailable("no answer")] * 3
        rules.round(1)
        await asyncio.sleep(0.05)
        assert acknowledger.refused == "no answer"
        rules.versions = Versions("2", "2", "2")
        await asyncio.sleep(1.5)
        assert len(leases.writes) == 1
        assert acknowledger.last == Versions("2", "2", "2")
        leases.refusals = [Unavailable("no answer")] * 1000
        rules.round(3)
        await asyncio.sleep(3600)
        began = len(leases.refusals)
        await asyncio.sleep(60)
        assert 12 <= began - len(leases.refusals) <= 40, "however long it lasts, it is asked every few seconds"
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

    acknowledging(story)


def test_a_word_is_given_anew_once_a_minute_with_what_bookmarks_tell() -> None:
    async def story(rules: Rules, leases: Leases, acknowledger: Acknowledger) -> None:
        rules.round(1)
        await asyncio.sleep(10)
        rules.versions = Versions("1", "1", "9")
        await asyncio.sleep(30)
        assert len(leases.writes) == 1
        await asyncio.sleep(30)
        assert len(leases.writes) == 2
        assert acknowledger.last == Versions("1", "1", "9")
        await asyncio.sleep(300)
        assert len(leases.writes) == 7, "nothing new: it is still so"
        assert leases.word is not None
        assert leases.word.at == START + timedelta(seconds=6 * (IDLE_SECONDS + INTERVAL))

    acknowledging(story)
