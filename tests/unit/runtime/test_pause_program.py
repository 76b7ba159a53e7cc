import struct
from pathlib import Path

import pytest

from podwire.runtime.pause import build_pause, write_pause


@pytest.mark.parametrize(("machine", "number"), [("x86_64", 62), ("aarch64", 183)])
def test_is_an_elf_file_of_the_machine_that_fits_in_one_page(machine: str, number: int) -> None:
    program = build_pause(machine)
    assert program[:7] == b"\x7fELF\x02\x01\x01"
    assert struct.unpack_from("<HH", program, 16) == (2, number)
    assert len(program) < 400


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_enters_at_its_code_within_the_loaded_segment(machine: str) -> None:
    program = build_pause(machine)
    (entry,) = struct.unpack_from("<Q", program, 24)
    _, flags, offset, address, _, in_file, in_memory, _ = struct.unpack_from("<IIQQQQQQ", program, 64)
    assert flags == 5  # readable and executable, never writable
    assert (offset, in_file, in_memory) == (0, len(program), len(program))
    assert address < entry < address + in_file


def test_branches_back_to_its_first_instruction_on_aarch64() -> None:
    code = struct.unpack("<8I", build_pause("aarch64")[-32:])
    offset = code[7] & 0x3FFFFFF
    assert offset - (1 << 26) == -7


def test_is_written_executable_over_an_earlier_copy(tmp_path: Path) -> None:
    path = tmp_path / "pause"
    path.write_bytes(b"old")
    write_pause(str(path), "x86_64")
    assert path.read_bytes() == build_pause("x86_64")
    assert path.stat().st_mode & 0o777 == 0o755
    assert [entry.name for entry in tmp_path.iterdir()] == ["pause"]
