"""File names: any name that a user types is valid on every system."""

from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realera.storage.file_names import portable

NOW = datetime(2026, 3, 7, 9, 5, 2)


@pytest.mark.parametrize(
    ("typed", "written"),
    [
        ("no-airplane", "no-airplane"),
        ("styles/van gogh", "styles/van gogh"),
        ("styles\\van gogh", "styles/van gogh"),
        ("猫 v1.5", "猫 v1.5"),
        ("%date:yyyy-MM-dd%/no-cat", "2026-03-07/no-cat"),
        ("%date:hhmm%_%date:d.M.yy%", "0905_7.3.26"),
        ("%year%%month%%day%-%hour%%minute%%second%", "20260307-090502"),
        ("cat: a 50% edit?", "cat_ a 50% edit_"),
        ("%KSampler.seed%", "%KSampler.seed%"),
        ("CON", "CON_"),
        ("nul.v2/lpt1", "nul_.v2/lpt1_"),
        ("console", "console"),
        ("trailing. /dots...", "trailing/dots"),
        ("../../escaped", "../../escaped"),
    ],
)
def test_a_name_is_valid_on_windows_and_contains_the_time(typed, written):
    assert portable(typed, NOW) == written


@given(st.text(max_size=30))
def test_whatever_is_typed_no_part_is_refused_by_windows(typed):
    made = portable(typed, NOW)
    assert portable(made, NOW) == made
    assert not set('<>:"|?*\\') & set(made)
    for part in made.split("/"):
        assert not part.strip(". ") or part[-1] not in ". "
