"""Editing a chain: rules that stay are not touched, and the result is what was asked for."""

from dataclasses import dataclass, field

import hypothesis.strategies as st
from hypothesis import given

from podwire.model.nft import Rule
from podwire.wire.nftedit import Edit, HeldRule, edit_rules


@dataclass
class Chain:
    """A chain as the kernel keeps it."""

    rules: list[HeldRule] = field(default_factory=list)
    next_handle: int = 1

    def run(self, edit: Edit) -> None:
        for rule, before in edit.insertions:
            at = [h.handle for h in self.rules].index(before) if before else len(self.rules)
            self.rules.insert(at, HeldRule(rule, self.next_handle))
            self.next_handle += 1
        for handle in edit.deletions:
            self.rules.remove(next(h for h in self.rules if h.handle == handle))


def rules(names: str) -> list[Rule]:
    return [Rule((), name) for name in names]


texts = st.text("abcde", max_size=8)


@given(texts, st.lists(texts, max_size=4))
def test_any_chain_becomes_any_other(first: str, then: list[str]) -> None:
    chain = Chain()
    for names in (first, *then):
        edit = edit_rules(chain.rules, rules(names))
        assert edit is not None
        chain.run(edit)
        assert [h.rule for h in chain.rules] == rules(names) == [h.rule for h in edit.result]


def test_what_stays_is_not_touched() -> None:
    held = [HeldRule(rule, handle) for handle, rule in enumerate(rules("abz"), start=1)]
    edit = edit_rules(held, rules("acz"))
    assert edit is not None
    assert (edit.insertions, edit.deletions) == ([(Rule((), "c"), 3)], [2])
    grown = edit_rules(held, rules("abcz"))
    assert grown is not None
    shrunk = edit_rules(grown.result, rules("acz"))
    assert shrunk is not None
    assert (shrunk.insertions, shrunk.deletions) == ([], [2]), "a rule that was only just sent needs no handle to stay"


def test_a_rule_without_a_handle_cannot_be_deleted_nor_come_next() -> None:
    assert edit_rules([HeldRule(rules("a")[0], 0)], ()) is None
    assert edit_rules([HeldRule(rules("b")[0], 0)], rules("ab")) is None
