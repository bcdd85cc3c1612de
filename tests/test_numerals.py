"""Answers that are numbers: every spelling of one is equal to it, and no other number is."""

import json
import random
import re
import time
from fractions import Fraction

import pytest

from engine.rewards import equality, same_answer
from tests.tables import REAL, needs_real


@pytest.mark.parametrize(
    "spellings, number",
    [
        ("1.5e3|1.5E+03|1.5\\times10^{3}|1.5×10^3|1.5*10^3|15e2|1,500|１５００|€1500.00|¥1,500|$1,500.", "1500"),
        ("1e-05|0.00001|10^{-5}|10⁻⁵|\\frac{1}{100000}", "0.00001"),
        ("1 234 567|1\u202f234\u202f567|1'234'567|12,34,567|1{,}234{,}567|1,\\!234,\\!567|1\\,234\\,567", "1234567"),
        ("5 million|5,000,000|500万|5 millions|5\\text{ million}|$5 million|5 million dollars|50 lakh|5e6", "5000000"),
        ("US$72|USD 72|72 USD|Rs. 72|72¢|₹72|72 cents|£72.00", "72"),
        ("**72**|*72*|__72__|`72`|**$72**|**72** apples|= 72|≈ 72|\\approx 72|(72)|{72}|72;|72\u200b", "72"),
        (r"\mathbf{72}|\textbf{72}|\underline{72}|\boxed{72}|\color{red}{72}|\textcolor{red}{72}|\text{72}", "72"),
        ("x = 72|n_1=72|f(3) = 72|AB = 72|\\angle ABC = 72^\\circ|\\text{Area} = 72|Total = 72|P(A)=72", "72"),
        (r"45°C|45º|45\degree|45^{\circ}|45 m|45 m²|45 cm³|45 m/s^2|45\text{ m/s}|45th|45^{\text{th}}|45 sq. ft", "45"),
        ("1½|1 1/2|1\\frac{1}{2}|3/2|1.5", "1.5"),
        ("¾|3/4|\\tfrac34|0.75|75e-2|3⁄4", "3/4"),
        ("four|\\text{four}|Four.", "4"),
        ("forty-two|Forty two", "42"),
        ("0.1\\overline{6}|\\frac16", "1/6"),
    ],
)
def test_a_number_is_itself_however_people_and_models_write_it(spellings, number):
    for spelling in spellings.split("|"):
        assert same_answer(spelling, number) and same_answer(number, spelling), spelling
        assert not same_answer(spelling, f"{number}1") and not same_answer(f"{spelling} or 3", number)


@pytest.mark.parametrize(
    "spellings",
    [
        r"\text{M}|\text{ k}|\text{K}|\text{ B}|\text{ x}| quadrillion| mil| mio| grand| lac| in thousands| Millions",
        r" dozens| tenth| sevenths|\text{ thirds}| twentieths|\text{ millionths}| quarter| ppm|‰| permille| point five",
        r" divided by two| remainder two| choose two| factorials| binary| octal| hex| modulo seven| degrees below zero",
        r" hundred five| gross| kilo| Millionen| infinity| two| theta| sin| arctan| gamma|\mu|万|千|百万|分之一|半|十",
    ],
)
def test_a_word_that_changes_a_number_is_no_unit(spellings):
    for spelling in spellings.split("|"):
        assert not same_answer(f"5{spelling}", "5") and not same_answer("5", f"5{spelling}"), spelling
        assert not same_answer(rf"5\sqrt{{11}}{spelling}", r"5\sqrt{11}"), spelling


@pytest.mark.parametrize(
    "spellings",
    [
        r"个|元|千克|。|小时|\text{ m}|\text{ g}|\text{ m/s}^2| miles per hour| sq ft| square units| km/h| °F| a.m.",
        " months| pairs| points| cents| mins| boxes| paths| pounds of earth| feet of width|th| units|\\text{ in}| cm",
    ],
)
def test_a_unit_leaves_a_number_alone(spellings):
    for spelling in spellings.split("|"):
        assert same_answer(f"5{spelling}", "5") and same_answer("5", f"5{spelling}"), spelling


def test_plain_numbers_are_compared_without_math_verify(monkeypatch):
    monkeypatch.setattr(equality, "same_latex", None)
    start = time.perf_counter()
    for n in range(1000):
        assert same_answer(f"${n:,}.50", f"{n}.5") and not same_answer(f"{n}", f"{n + 1}")
    assert time.perf_counter() - start < 1.0
    assert same_answer("2 1/2 cups", "2.5") and not same_answer("x + 1", "2")


def spellings(rng, value: Fraction):
    """Ways to write a number with two decimals at most."""
    sign, size = "-" * (value < 0), abs(value)
    whole, cents = divmod(int(size * 100), 100)
    digits = rng.choice([f"{whole}", f"{whole:,}", f"00{whole}"])
    decimal = digits + (f".{cents:02d}" if cents else rng.choice(["", ".", ".0", ".00"]))
    scale = rng.randint(1, 9)
    top, bottom = size.numerator * scale, size.denominator * scale
    fraction = rng.choice([f"{top}/{bottom}", rf"\frac{{{top}}}{{{bottom}}}", rf"\dfrac {{{top}}} {{{bottom}}}"])
    mixed = f"{whole} {cents * scale}/{100 * scale}"
    dash = rng.choice(["-", "\u2212", "\u2013"]) if sign else rng.choice(["", "+"])
    body = rng.choice([decimal, fraction, mixed])
    before = rng.choice(["", "$", r"\$", " "])
    after = rng.choice(["", "%", r"\%", " pens", r"\text{ cm}", r"^\circ", "$", " ", " miles per hour", r"\right"])
    return dash + before + body + after


def test_numbers_are_equal_exactly_when_their_values_are():
    rng = random.Random(0)
    for _ in range(4000):
        left = Fraction(rng.randint(-300_000, 300_000), rng.choice([1, 2, 4, 5, 10, 100]))
        left = Fraction(round(left * 100), 100)
        right = left if rng.random() < 0.5 else left + rng.choice([-1, 1]) * rng.choice([Fraction(1, 100), 1, 10, 1000])
        a, b = spellings(rng, left), spellings(rng, right)
        assert same_answer(a, b) == (left == right), (a, b)


@needs_real
def test_no_gsm8k_answer_is_paid_for_another():
    lines = [line for name in ("train", "test") for line in (REAL / "gsm8k" / f"{name}.jsonl").read_text().splitlines()]
    truths = sorted({json.loads(line)["answer"].rpartition("####")[2].strip() for line in lines})
    values = {truth: int(truth.replace(",", "")) for truth in truths}
    by_value = sorted(truths, key=values.get)
    for truth, above in zip(by_value, by_value[1:]):
        assert same_answer(above, truth) == (values[above] == values[truth])
        assert same_answer(f"{values[truth]:,}".replace(",", "\u202f") + ".00 €", truth)
        others = {0, 1, -1, 2 * values[truth], -values[truth], values[truth] + 1, 10 * values[truth]} - {values[truth]}
        assert not any(same_answer(str(other), truth) for other in others), truth


@needs_real
def test_no_math500_number_is_paid_for_a_near_one():
    answers = {row["answer"] for row in json.loads((REAL / "math" / "math500.json").read_text())}
    numbers = [answer for answer in answers if re.fullmatch(r"-?\d+|-?\\frac\{\d+\}\{\d+\}", answer)]
    assert len(numbers) > 150
    for answer in numbers:
        last = int(answer.rstrip("}")[-1])
        near = answer.rstrip("}")[:-1] + str((last + 1) % 10) + "}" * answer.endswith("}")
        for wrong in (near, answer[1:] if answer[0] == "-" else f"-{answer}", f"{answer} million"):
            assert wrong.startswith("-0") or wrong == "0 million" or not same_answer(wrong, answer), (wrong, answer)
