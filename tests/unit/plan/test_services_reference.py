"""The reference of Services (docs/reference/services.md) names for each behaviour what shows it: that there is."""

import re
from collections import Counter
from pathlib import Path

import pytest
from service_cases import CASES, PARTS, all_cases

ROOT = Path(__file__).parents[3]
REFERENCE = ROOT / "docs" / "reference" / "services.md"
COLUMNS = ["behaviour", "nftables", "iptables", "ipvs", "case file"]


def behaviours() -> list[list[str]]:
    """The rows of the table, each as its cells."""
    section = re.split(r"^## ", REFERENCE.read_text(), flags=re.MULTILINE)
    (text,) = [part for part in section if part.startswith("Behaviours\n")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == COLUMNS
    return rows[2:]


ROWS = behaviours()


def shown_by(row: list[str]) -> list[str]:
    return re.findall(r"`([^`]+)`", row[-1])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:60])
def test_what_a_behaviour_is_shown_by_exists(row: list[str]) -> None:
    assert len(row) == len(COLUMNS), "a cell has a | in it"
    if row[-1] == "all":
        return
    assert shown_by(row), "nothing shows it"
    for name in shown_by(row):
        path = ROOT / name if name.endswith(".py") else CASES / f"{name}.yaml"
        assert path.is_file(), f"{name} is not there"


def test_every_case_file_is_named() -> None:
    named = {name for row in ROWS for name in shown_by(row)}
    assert {path.stem for path in CASES.glob("*.yaml")} <= named


def test_every_case_is_of_a_sort_that_is_executed_and_has_a_name_of_its_own() -> None:
    names = Counter(name for name, _, _ in all_cases())
    assert [name for name, count in names.items() if count > 1] == []
    for name, _, item in all_cases():
        assert len([part for part in PARTS if part in item]) == 1, f"{name} is not executed"
