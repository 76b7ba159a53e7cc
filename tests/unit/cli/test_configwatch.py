"""A configuration file that changes ends what runs by it, but only for something that it could be started with."""

import asyncio
from pathlib import Path

import pytest

from podwire.cli.configwatch import ConfigChanged, until_changed
from podwire.model.errors import InvalidInput

LOOK = 0.005


class Watched:
    """A file that holds a word, being watched."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "config.conf"
        self.path.write_text("one")
        self.loads = 0

    def load(self) -> str:
        self.loads += 1
        text = self.path.read_text()
        if text == "bad":
            raise InvalidInput(f"{self.path}: is bad")
        return text.strip()

    async def loaded(self, times: int) -> None:
        async with asyncio.timeout(5.0):
            while self.loads < times:  # noqa: ASYNC110
                await asyncio.sleep(LOOK)

    async def watch(self) -> None:
        async with asyncio.timeout(5.0):
            await until_changed(self.path, self.load, "one", LOOK)


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


async def test_written_into(watched: Watched) -> None:
    watching = asyncio.create_task(watched.watch())
    await watched.loaded(1)
    watched.path.write_text("other")
    with pytest.raises(ConfigChanged, match=r"config\.conf has changed: this ends, to be started anew"):
        await watching


async def test_a_link_whose_target_changes(watched: Watched, tmp_path: Path) -> None:
    """As kubelet changes a mounted ConfigMap."""
    for name, text in (("..1", "one"), ("..2", "two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.conf").write_text(text)
    (tmp_path / "..data").symlink_to("..1")
    watched.path.unlink()
    watched.path.symlink_to("..data/config.conf")
    watching = asyncio.create_task(watched.watch())
    await watched.loaded(1)
    (tmp_path / "..next").symlink_to("..2")
    (tmp_path / "..next").rename(tmp_path / "..data")
    with pytest.raises(ConfigChanged):
        await watching


async def test_changed_before_it_was_watched(watched: Watched) -> None:
    watched.path.write_text("two")
    with pytest.raises(ConfigChanged):
        await watched.watch()


async def test_what_cannot_be_used_or_says_the_same_changes_nothing(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    watching = asyncio.create_task(watched.watch())
    for times, text in enumerate(("one", "one\n", "bad", "one \n"), 1):
        watched.path.write_text(text)
        await watched.loaded(times)
    watched.path.unlink()
    for _ in range(5):
        await asyncio.sleep(LOOK)
    assert not watching.done()
    assert watched.loads == 4, "a file that stays as it is, or is away, is not read"
    assert [r.getMessage() for r in caplog.records] == [f"{watched.path}: is bad; going on with what it said before"]
    watched.path.write_text("two")
    with pytest.raises(ConfigChanged):
        await watching
