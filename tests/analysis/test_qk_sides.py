import pytest

from crosshead.analysis.qk_sides import describe_side, same_grain

EVERYWHERE = {" the": 30.0, " cat": 2.0, " Cat": 1.0, "cat": 1.0, "ing": 3.0, " sing": 2.0, " ring": 2.0, "7": 5.0,
              ".": 10.0, " Bob": 4.0, " Ann": 4.0, " NASA": 2.0, " run": 20.0, " of": 20.0}  # fmt: skip


@pytest.mark.parametrize(("mass", "grain", "what"), [
    ({" cat": 9.0, ".": 1.0}, "token", " cat"),
    ({" cat": 3.0, " Cat": 3.0, "cat": 3.0, ".": 1.0}, "word", "cat"),
    ({"ing": 3.0, " sing": 3.0, " ring": 3.0, ".": 1.0}, "substring", "ing"),
    ({" Bob": 3.0, " Ann": 3.0, " NASA": 3.0, " run": 1.0}, "capitalisation", "capital first"),
    ({"7": 1.0, "12": 1.0, "3rd": 1.0}, "word class", "digits"),
    ({" the": 30.0, " of": 20.0, " run": 20.0, "7": 5.0, ".": 10.0, " cat": 2.0}, "broad", None),
    ({}, "silent", None),
])  # fmt: skip
def test_a_side_gets_the_finest_grain_that_holds_most_of_it(mass, grain, what):
    found = describe_side(mass, EVERYWHERE)
    assert (found["grain"], found["what"]) == (grain, what)
    assert len(found["tokens"]) <= 8


def test_a_grain_that_is_common_everywhere_says_nothing():
    mass = {" the": 3.0, " of": 3.0, " run": 4.0}
    everywhere = {" the": 30.0, " of": 30.0, " run": 40.0}
    assert describe_side(mass, everywhere)["grain"] == "broad"
    assert describe_side(mass, everywhere | {".": 200.0})["what"] == "starts a word"


@pytest.mark.parametrize(("first", "second", "expected"), [
    (" cat", " cat", "token"), (" cat", "Cat", "word"), (" sing", " ringing", "substring"),
    (" dog", " cat", "word class"), ("7", " cat", "none"), (".", ",", "word class"),
])  # fmt: skip
def test_how_two_tokens_are_alike(first, second, expected):
    assert same_grain(first, second) == expected
