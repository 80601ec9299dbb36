"""Names of prefixes: equal where keys and values are, and nowhere else."""

from __future__ import annotations

from itertools import product

from loray.policy.prefixes import block_names


def test_no_other_owner_has_the_same_names() -> None:
    """Whatever a caller gives as its salt: it is not taken for an adapter, or for where one is active from."""
    owners = [
        (digest, salt, active_from)
        for digest, salt, active_from in product((None, "a", "None", "a@3"), ("", "a", "None", "a@3"), (0, 3))
        if digest is not None or not active_from
    ]
    names = {owner: [*block_names(owner[0], range(8), 4, salt=owner[1], active_from=owner[2])] for owner in owners}
    assert len({name for of_owner in names.values() for name in of_owner}) == 2 * len(owners)
    assert names[None, "a", 0] == [*block_names("a", range(8), 4, salt="a", active_from=8)]  # the base's until there
