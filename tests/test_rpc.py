"""The values of a call."""

from __future__ import annotations

import pytest

from livenessprobe.rpc import Unreachable, code_name


@pytest.mark.parametrize(
    ("number", "name"),
    [(0, "OK"), (1, "Canceled"), (16, "Unauthenticated"), (17, "Code(17)"), (2**32 - 1, "Code(4294967295)")],
)
def test_codes_have_the_names_of_go(number: int, name: str) -> None:
    assert code_name(number) == name


def test_the_unreachable_may_heal_only_if_that_is_said() -> None:
    unreachable = Unreachable("gone", " for good")

    assert (unreachable.reason, unreachable.hint, unreachable.may_heal) == ("gone", " for good", False)
    assert str(unreachable) == "gone for good"
    assert str(Unreachable("gone")) == "gone"
    assert Unreachable("missing", may_heal=True).may_heal
