import asyncio
import ipaddress
import os
import signal
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from podwire.agent.reservations import AddressTaken, Owner, RecordUnusable, Reservations
from podwire.model.addr import IPAddress, IPNetwork
from podwire.plan.ipam import AddressesExhausted

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
V4 = ipaddress.ip_network("10.244.1.0/24")
V6 = ipaddress.ip_network("fd00:10:244:1::/64")


async def reserve(book: Reservations, uid: str, *prefixes: IPNetwork) -> tuple[IPAddress, ...]:
    return await book.reserve(Owner(uid, "default", f"pod-{uid}"), prefixes or (V4, V6), NOW)


async def test_one_address_of_each_family_and_the_same_on_repeat(tmp_path: Path) -> None:
    book = Reservations(tmp_path / "r.db")
    first = await reserve(book, "a")
    assert [str(ip) for ip in first] == ["10.244.1.2", "fd00:10:244:1::2"]
    assert await reserve(book, "a") == first
    assert await reserve(book, "b") != first
    book.close()


async def test_what_was_reserved_is_known_to_the_next_agent(tmp_path: Path) -> None:
    book = Reservations(tmp_path / "r.db")
    held = await reserve(book, "a")
    await reserve(book, "b")
    await book.release("b")
    book.close()
    again = Reservations(tmp_path / "r.db")
    assert again.of("a") == held
    assert {r.uid for r in again.all()} == {"a"}
    assert {(r.namespace, r.name, r.since) for r in again.all()} == {("default", "pod-a", NOW.isoformat())}
    # b's addresses are free, but come again last.
    assert [str(ip) for ip in await reserve(again, "c")] == ["10.244.1.4", "fd00:10:244:1::4"]
    again.close()


async def test_an_address_that_is_asked_for(tmp_path: Path) -> None:
    book = Reservations(tmp_path / "r.db")
    wanted = ipaddress.ip_address("10.244.1.77")
    asking = Owner("a", "default", "pod-a")
    assert wanted in await book.reserve(asking, (V4, V6), NOW, wanted=(wanted,))
    assert [str(ip) for ip in await reserve(book, "b")] == ["10.244.1.2", "fd00:10:244:1::3"]
    for text, why in (("10.244.1.77", "held by default/pod-a"), ("10.9.9.9", "in none of"), ("10.244.1.1", "gateway")):
        with pytest.raises(AddressTaken, match=why):
            await book.reserve(Owner("c", "default", "pod-c"), (V4, V6), NOW, wanted=(ipaddress.ip_address(text),))
    moved = ipaddress.ip_address("10.244.1.78")
    assert (await book.reserve(asking, (V4, V6), NOW, wanted=(moved,)))[0] == moved
    assert book.holder(wanted) is None
    book.close()


async def test_a_record_lives_and_goes_with_its_addresses(tmp_path: Path) -> None:
    book = Reservations(tmp_path / "r.db")
    await book.reserve(Owner("a", "n", "x"), (V4,), NOW, record=b"one")
    await book.reserve(Owner("b", "n", "y"), (), NOW, record=b"two")
    book.close()
    again = Reservations(tmp_path / "r.db")
    assert again.records == {"a": b"one", "b": b"two"}
    await again.release("a")
    await again.release("b")
    again.close()
    last = Reservations(tmp_path / "r.db")
    assert not last.records
    assert not last.all()
    last.close()


async def test_a_full_subnet_is_told_and_nothing_half_is_kept(tmp_path: Path) -> None:
    small = ipaddress.ip_network("10.0.0.0/30")
    book = Reservations(tmp_path / "r.db")
    await reserve(book, "a", small)
    with pytest.raises(AddressesExhausted, match=r"10\.0\.0\.0/30 .*10\.0\.0\.2 default/pod-a"):
        await reserve(book, "b", V4, small)
    assert book.of("b") == ()
    await book.release("a")
    assert len(await reserve(book, "b", V4, small)) == 2
    book.close()


async def test_addresses_of_a_former_subnet_are_given_up(tmp_path: Path) -> None:
    other = ipaddress.ip_network("10.244.7.0/24")
    book = Reservations(tmp_path / "r.db")
    await reserve(book, "a")
    assert [str(ip) for ip in await reserve(book, "a", other, V6)] == ["10.244.7.2", "fd00:10:244:1::2"]
    assert len(book.all()) == 2
    book.close()


async def test_many_at_once_get_different_addresses(tmp_path: Path) -> None:
    book = Reservations(tmp_path / "r.db")
    found = await asyncio.gather(*(reserve(book, str(n)) for n in range(60)))
    assert len({ip for ips in found for ip in ips}) == 120
    book.close()
    again = Reservations(tmp_path / "r.db")
    assert {r.address for r in again.all()} == {ip for ips in found for ip in ips}
    again.close()


async def test_a_closed_book_takes_nothing(tmp_path: Path) -> None:
    book = Reservations(tmp_path / "r.db")
    book.close()
    with pytest.raises(sqlite3.ProgrammingError):
        await reserve(book, "a")
    assert book.of("a") == ()


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=30))
@settings(max_examples=25, deadline=None)
def test_no_address_has_two_pods_and_memory_agrees_with_disk(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[bool, int]]
) -> None:
    path = tmp_path_factory.mktemp("book") / "r.db"
    prefix = ipaddress.ip_network("10.0.0.0/29")

    async def scenario() -> None:
        book = Reservations(path)
        for take, number in steps:
            if take:
                try:
                    await reserve(book, str(number), prefix)
                except AddressesExhausted:
                    assert len(book.all()) == 5
            else:
                await book.release(str(number))
            held = book.all()
            assert len({r.uid for r in held}) == len(held)
        kept = set(book.all())
        book.close()
        again = Reservations(path)
        assert set(again.all()) == kept
        again.close()

    asyncio.run(scenario())


WRITER = """
import asyncio, ipaddress, sys
from datetime import datetime, UTC
from pathlib import Path
from podwire.agent.reservations import AddressTaken, Owner, RecordUnusable, Reservations

async def main() -> None:
    book = Reservations(Path(sys.argv[1]))
    prefix = ipaddress.ip_network("10.0.0.0/16")
    for number in range(100_000):
        (ip,) = await book.reserve(Owner(str(number), "default", "p"), (prefix,), datetime.now(UTC))
        print(number, ip, flush=True)

asyncio.run(main())
"""


def test_every_address_that_was_given_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "r.db"
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "src"}
    )
    assert process.stdout is not None
    with process.stdout as lines:
        told = [lines.readline().split() for _ in range(50)]
        process.send_signal(signal.SIGKILL)
        told += [line.split() for line in lines if line.endswith("\n")]
    process.wait(10)
    book = Reservations(path)
    held = {r.uid: str(r.address) for r in book.all()}
    book.close()
    assert [(number, held.get(number)) for number, _ in told] == [tuple(line) for line in told]


def test_a_file_that_is_no_record_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "r.db").write_bytes(b"anything but a database" * 100)
    with pytest.raises(RecordUnusable, match=r"r\.db cannot be used \(file is not a database\)"):
        Reservations(tmp_path / "r.db")
