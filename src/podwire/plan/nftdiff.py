"""Mark and sweep over rulesets: what has to be done to a kernel that holds one so that it holds another."""

from podwire.model.nft import Batch, Ruleset


def diff_ruleset(desired: Ruleset, observed: Ruleset) -> Batch:
    """The smallest transaction from `observed` to `desired`; elements that stay keep their counters, and dynamic sets theirs.

    Only tables that `desired` names are touched."""
    return Batch()
