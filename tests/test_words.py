"""Plain words: the list of STYLE.md, over code, flags, errors and documentation."""

from __future__ import annotations

import pytest
import words
from folders import ROOT


@pytest.mark.parametrize("word", [*words.WORDS, *words.NAMES])
def test_the_word_is_not_used(word):
    found = words.every_hit(ROOT, word)
    assert not found, "\n".join(f"{hit.path}:{hit.line}: {hit.text}" for hit in found)


@pytest.mark.parametrize(
    ("word", "line", "hit"),
    [
        ("place", "# the place of a token", True),
        ("place", "asked_places = 3", True),
        ("place", "class AskedPlaces:", True),
        ("place", "used in place of a mask", True),
        ("place", "written in place, as torch does", False),
        ("place", "replaced, displacement, placement", False),
        ("place", 'OLD = "places"  # alias: places', False),
        ("push", "Push(scale=2)", True),
        ("push", "pushing on", False),
        ("sees", "a row sees the others", True),
        ("sees", "see `Denoiser`", False),
        ("patience", "--patience SECONDS", True),
    ],
)
def test_a_word_is_found_where_it_stands_alone_or_in_a_name(tmp_path, word, line, hit):
    path = tmp_path / "a.py"
    path.write_text(line + "\n")
    assert bool(list(words.hits(word, path))) is hit


def test_the_sense_of_a_codec_is_looked_for_in_names_of_the_package_alone(tmp_path):
    (tmp_path / "mdiff").mkdir()
    (tmp_path / "mdiff" / "a.py").write_text("# to reach the end\nx = codec.reach\n")
    (tmp_path / "b.py").write_text("x = codec.reach\n")
    assert words.every_hit(tmp_path, "reach") == [("mdiff/a.py", 2, "x = codec.reach")]
