"""Yardsticks and chance: pytest tests/test_yardsticks.py. Seconds, no network."""

import doctest
import math
import random
import sys
from collections import Counter

import pytest
import yardsticks


def test_the_examples_in_the_docstrings_are_true():
    assert doctest.testmod(yardsticks) == (0, 3)


@pytest.mark.parametrize("order", [1, 2, 3, 6])
def test_the_probabilities_of_all_characters_add_up_to_one(order):
    draw = random.Random(order)
    training = "".join(draw.choices("abrk \n", [5, 3, 2, 1, 4, 1], k=300))
    characters = [*sorted(set(training)), "?"]  # and one for any unknown
    total = sum(2 ** -yardsticks.kneser_ney(training, char, order) for char in characters)
    assert total == pytest.approx(1)


def test_kneser_ney_of_long_drawn_text_comes_near_its_entropy_and_uses_context():
    draw = random.Random(1)
    training, validation = ("".join(draw.choices("abcd", [8, 4, 2, 2], k=k)) for k in (20_000, 5_000))
    assert yardsticks.kneser_ney(training, validation, 2) == pytest.approx(1.75, abs=0.05)
    assert yardsticks.kneser_ney("abcd" * 50, "abcd" * 50) < 0.2 < 1 < yardsticks.kneser_ney("abcd" * 50, "abcd" * 50, 1)


def test_a_context_counts_less_where_the_character_always_follows_the_same_one():
    # "o" is frequent, but only after "k"; "a" is rarer, after many. After an unknown context "a" is the better guess.
    training = "ko" * 20 + "".join(f"{c}a" for c in "bcdfghjlm")
    a, o = (yardsticks.kneser_ney(training + "?", char, 2) for char in "ao")
    assert Counter(training)["o"] > Counter(training)["a"] and a < o


def test_a_compressor_s_figure_is_what_the_validation_text_adds():
    training = "Noc nad miastem, deszcz na szybie\n" * 30
    assert yardsticks.compressed(training, "abc", lambda data: data) == 8
    again, new = (yardsticks.compressed(training, text, yardsticks.xz) for text in (training[:300], "Źdźbło, pchła!" * 9))
    assert again < 0.5 < new


def test_ppmd_learns_while_it_reads():
    pytest.importorskip("pyppmd")
    text = "".join(random.Random(2).choices("abcdefgh", k=400))
    once, twice = (yardsticks.compressed("abc", text * times, yardsticks.ppmd) for times in (1, 2))
    assert twice < 0.7 * once


def test_a_missing_package_is_named_in_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyppmd", None)
    figures = yardsticks.measure("Raz dwa " * 50, "raz dwa")
    assert list(figures) == ["Kneser-Ney, order 6", "xz"] and all(map(math.isfinite, figures.values()))
    assert capsys.readouterr().out == "PPMd left out: it needs pyppmd (pip install pyppmd)\n"


def test_a_text_too_long_to_count_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(yardsticks, "LONGEST", 10)
    assert yardsticks.measure("a" * 11, "a") == {} and "left out" in capsys.readouterr().out


def test_babble_has_only_the_text_s_own_pairs():
    text = "Ala ma kota\nKot ma mleko\n"
    written = yardsticks.babble(text, 500, seed=3)
    assert len(written) == 500 and written != yardsticks.babble(text, 500, seed=4)
    assert set(zip(written, written[1:])) <= set(zip(text, text[1:] + text[:1]))


def test_from_the_command_line(tmp_path, capsys):
    path = tmp_path / "songs.txt"
    path.write_text("Noc nad miastem\nDeszcz na szybie\n" * 40, encoding="utf-8")
    yardsticks.main([str(path)])
    assert capsys.readouterr().out.splitlines()[0].startswith("Kneser-Ney, order 6")
    with pytest.raises(SystemExit) as stop:
        yardsticks.main([str(tmp_path / "none.txt")])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and err.startswith("error: cannot read") and err.count("\n") == 1 and out == ""
