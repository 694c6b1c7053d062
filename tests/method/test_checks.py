"""A parameter means what it says, or it is refused."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reprolib import checks

NEITHER_NUMBER_NOR_FLAG = st.one_of(st.text(), st.none(), st.lists(st.integers(), max_size=2), st.complex_numbers())


@given(st.integers(-5, 1000), st.integers(-2, 2))
def test_whole_takes_whole_numbers_from_the_least_on(value, least):
    if value >= least:
        assert checks.whole("epochs", value, least) == value
        assert type(checks.whole("epochs", np.int64(value), least)) is int
    else:
        with pytest.raises(ValueError, match=f"epochs must be a whole number of at least {least}, not {value}"):
            checks.whole("epochs", value, least)


@given(st.one_of(NEITHER_NUMBER_NOR_FLAG, st.booleans(), st.floats()))
def test_whole_takes_nothing_else(value):
    with pytest.raises(ValueError, match="epochs must be a whole number of at least 1, not "):
        checks.whole("epochs", value)


@given(st.one_of(st.integers(0, 1000), st.floats(0, allow_infinity=False), st.just(-0.0)))
def test_number_has_one_normal_form(value):
    found = checks.number("lr", value)
    assert type(found) is float and found == value and math.copysign(1, found) == 1


@given(st.one_of(NEITHER_NUMBER_NOR_FLAG, st.booleans(), st.sampled_from([math.nan, math.inf, -0.1, -1, 10**400])))
def test_number_takes_nothing_else(value):
    with pytest.raises(ValueError, match="lr must be a number of at least 0, not "):
        checks.number("lr", value)


@given(st.one_of(NEITHER_NUMBER_NOR_FLAG, st.integers(), st.floats()))
def test_flag_takes_true_and_false_alone(value):
    assert checks.flag("rescore", True) is True and checks.flag("rescore", False) is False
    with pytest.raises(ValueError, match="rescore must be true or false, not "):
        checks.flag("rescore", value)


@given(st.one_of(NEITHER_NUMBER_NOR_FLAG, st.booleans(), st.integers()))
def test_choice_names_what_there_is(value):
    assert type(checks.choice("score", np.str_("random"), ("magnitude", "random"))) is str
    with pytest.raises(ValueError, match=r"score .* is unknown: use magnitude, random"):
        checks.choice("score", value, ("magnitude", "random"))
