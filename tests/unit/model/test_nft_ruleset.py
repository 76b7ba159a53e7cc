"""A ruleset is a value: batches apply to it as to the kernel, or not at all."""

import pytest

from podwire.model.addr import Family
from podwire.model.nft import (
    AddChain,
    AddElements,
    AddSet,
    AddTable,
    BaseHook,
    Batch,
    Chain,
    Command,
    DelChain,
    DelElements,
    DelSet,
    DelTable,
    FieldType,
    Hook,
    NftConflict,
    NftSet,
    ReplaceElements,
    Rule,
    Ruleset,
    SetRules,
    TableRef,
)
from podwire.model.nftexpr import DROP, Immediate, Unknown, goto
from podwire.plan.nftdiff import diff_ruleset

TABLE = TableRef(Family.IPV4, "t")
OTHER = TableRef(Family.IPV6, "t")
NAMES = NftSet("names", (FieldType.PORT,), data=(FieldType.IPV4,))
LEADS = NftSet("leads", (FieldType.PORT,), verdicts=True)
ONE, TWO = b"\0\1\0\0", b"\0\2\0\0"
A, B = b"\x0a\0\0\1", b"\x0a\0\0\2"
RULE = Rule((Immediate(DROP),))

BASE = Ruleset().apply(
    Batch(
        (
            AddTable(TABLE),
            AddSet(TABLE, NAMES),
            AddSet(TABLE, LEADS),
            AddChain(TABLE, Chain("c")),
            SetRules(TABLE, "c", (RULE,)),
            AddElements(TABLE, NAMES, ((ONE, A),)),
            AddElements(TABLE, LEADS, ((ONE, goto("c")),)),
        )
    )
)


def test_apply_leaves_the_original_alone() -> None:
    after = BASE.apply(Batch((ReplaceElements(TABLE, NAMES, ((ONE, B),)), SetRules(TABLE, "c", ()))))
    assert BASE.tables[TABLE].sets["names"].elements == {ONE: A}
    assert after.tables[TABLE].sets["names"].elements == {ONE: B}
    assert BASE.tables[TABLE].chains["c"].rules == (RULE,)
    assert after.tables[TABLE].chains["c"].rules == ()


def test_adding_what_is_there_changes_nothing() -> None:
    again = (AddTable(TABLE), AddSet(TABLE, NAMES), AddChain(TABLE, Chain("c")), AddElements(TABLE, NAMES, ((ONE, A),)))
    assert BASE.apply(Batch(again)) == BASE


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (AddChain(OTHER, Chain("c")), "no table"),
        (AddChain(TABLE, Chain("c", BaseHook("nat", Hook.OUTPUT, 0))), "another hook"),
        (SetRules(TABLE, "x", ()), "no chain"),
        (DelChain(TABLE, "x"), "no chain"),
        (AddSet(TABLE, NftSet("names", (FieldType.IPV4,))), "another type"),
        (DelSet(TABLE, "x"), "no set"),
        (AddElements(TABLE, NAMES, ((ONE, B),)), "other data"),
        (AddElements(TABLE, LEADS, ((TWO, goto("x")),)), "no chain"),
        (DelElements(TABLE, NAMES, ((TWO, None),)), "no such element"),
        (ReplaceElements(TABLE, NAMES, ((TWO, A),)), "no such element"),
    ],
)
def test_what_the_kernel_would_refuse(command: Command, reason: str) -> None:
    with pytest.raises(NftConflict, match=reason):
        BASE.apply(Batch((command,)))


def test_deleting_and_making_again_within_one_batch() -> None:
    batch = Batch((DelSet(TABLE, "names"), AddSet(TABLE, NAMES), AddElements(TABLE, NAMES, ((TWO, B),))))
    assert BASE.apply(batch).tables[TABLE].sets["names"].elements == {TWO: B}
    assert BASE.apply(Batch((DelTable(TABLE),))) == Ruleset()


def test_only_one_name() -> None:
    more = BASE.apply(Batch((AddTable(OTHER), AddTable(TableRef(Family.IPV4, "someone-elses")))))
    assert set(more.only("t").tables) == {TABLE, OTHER}


# --- diff -----------------------------------------------------------------------------------------------------------


def test_diff_of_equals_is_empty() -> None:
    assert not diff_ruleset(BASE, BASE)


def test_diff_from_nothing() -> None:
    assert Ruleset().apply(diff_ruleset(BASE, Ruleset())) == BASE


@pytest.mark.parametrize(
    "damage",
    [
        (DelTable(TABLE),),
        (AddTable(TABLE, dormant=True),),
        (AddTable(TABLE, dormant=True), SetRules(TABLE, "c", ())),
        (SetRules(TABLE, "c", ()),),
        (AddChain(TABLE, Chain("stranger")), SetRules(TABLE, "stranger", (Rule((Immediate(goto("c")),)),))),
        (AddSet(TABLE, NftSet("stranger", (FieldType.PORT,))),),
        (DelElements(TABLE, NAMES, ((ONE, None),)), AddElements(TABLE, NAMES, ((TWO, B),))),
        (ReplaceElements(TABLE, NAMES, ((ONE, B),)),),
        (DelElements(TABLE, LEADS, ((ONE, None),)), DelChain(TABLE, "c")),
        (DelSet(TABLE, "names"), AddSet(TABLE, NftSet("names", (FieldType.IPV4,)))),
        (
            DelElements(TABLE, LEADS, ((ONE, None),)),
            DelChain(TABLE, "c"),
            AddChain(TABLE, Chain("c", BaseHook("nat", Hook.INPUT, 0))),
        ),
    ],
)
def test_damage_is_repaired_and_others_tables_stay(damage: tuple[Command, ...]) -> None:
    foreign = TableRef(Family.IPV4, "someone-elses")
    damaged = BASE.apply(Batch((AddTable(foreign), *damage)))
    repair = diff_ruleset(BASE, damaged)
    assert repair
    assert damaged.apply(repair).only("t") == BASE
    assert foreign in damaged.apply(repair).tables


def test_what_is_right_is_not_touched() -> None:
    damaged = BASE.apply(Batch((AddElements(TABLE, NAMES, ((TWO, B),)),)))
    assert diff_ruleset(BASE, damaged) == Batch((DelElements(TABLE, NAMES, ((TWO, None),)),))


def test_elements_come_with_what_is_said_of_them() -> None:
    said = BASE.apply(Batch((AddElements(TABLE, NAMES, ((TWO, B),), {TWO: "two"}),)))
    assert diff_ruleset(said, BASE) == Batch((AddElements(TABLE, NAMES, ((TWO, B),), {TWO: "two"}),))
    both = BASE.apply(Batch((ReplaceElements(TABLE, NAMES, ((ONE, B),)), AddElements(TABLE, NAMES, ((TWO, A),)))))
    other = diff_ruleset(said, both)
    assert other == Batch((ReplaceElements(TABLE, NAMES, ((ONE, A), (TWO, B)), {TWO: "two"}),))


def test_what_packets_left_in_dynamic_sets_stays() -> None:
    seen = NftSet("seen", (FieldType.IPV4,), timeout_s=60, dynamic=True)
    desired = BASE.apply(Batch((AddSet(TABLE, seen),)))
    assert not diff_ruleset(desired, desired.apply(Batch((AddElements(TABLE, seen, ((A, None),)),))))


ZERO, SECOND, THIRD = (Rule((Immediate(DROP),), text) for text in ("zero", "second", "third"))
STRANGE = Rule((Unknown("quota"),), "strange")


@pytest.mark.parametrize(
    ("held", "wanted", "before", "after"),
    [
        ((ZERO,), (ZERO, SECOND), (ZERO, SECOND), None),
        ((ZERO, SECOND), (ZERO,), None, (ZERO,)),
        ((ZERO, STRANGE, SECOND), (ZERO, THIRD), (ZERO, SECOND, THIRD), (ZERO, THIRD)),
        ((STRANGE, ZERO), (ZERO,), (ZERO,), None),
        ((ZERO, SECOND, THIRD), (SECOND, THIRD), None, (SECOND, THIRD)),
    ],
)
def test_rules_for_what_was_and_what_will_be_are_there_while_elements_change(
    held: tuple[Rule, ...], wanted: tuple[Rule, ...], before: tuple[Rule, ...] | None, after: tuple[Rule, ...] | None
) -> None:
    """Those of others that could not be written again are not kept meanwhile."""
    add = AddElements(TABLE, NAMES, ((TWO, B),))
    desired = BASE.apply(Batch((SetRules(TABLE, "c", wanted), add)))
    observed = BASE.apply(Batch((SetRules(TABLE, "c", held),)))
    first, last = ([SetRules(TABLE, "c", rules)] if rules is not None else [] for rules in (before, after))
    assert diff_ruleset(desired, observed) == Batch((*first, add, *last))
