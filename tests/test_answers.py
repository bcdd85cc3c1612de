"""Answers: finding them in a response, and comparing them with the truth."""

import json
import random
import re
import time
from fractions import Fraction
from pathlib import Path

import pytest

from engine.rewards import REWARDS, equality, extract_answer, marked_answer, same_answer

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_real = pytest.mark.skipif(not (REAL / "gsm8k").exists(), reason="the real data sets are not on this machine")


# finding the answer


@pytest.mark.parametrize(
    "text, answer",
    [
        ("<think>5</think><answer> 72 </answer>", "72"),
        ("<answer>71</answer> no, <answer>72</answer>", "72"),
        ("<answer><answer>72</answer></answer>", "72"),
        (r"<answer>\boxed{72}</answer>", "72"),
        (r"\boxed{1} <answer>72</answer> \boxed{2} #### 3", "72"),
        (r"<answer>9 \boxed{72} #### 3", "72"),
        (r"first \boxed{71}, then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."),
        (r"\boxed{72} and \boxed{7", "72"),
        (r"\boxed{x = \boxed{72}}", "72"),
        ("It is 5.\n#### 1,072\nDone with 3.", "1,072"),
        ("#### 71\n#### 72", "72"),
        ("##### 72", "72"),
        ("3 apples and 4 make 7.", "7"),
        ("It costs $1,072.50.", "$1,072.50"),
        ("from 10 to -3", "-3"),
        ("from 10 to \u22123", "-3"),
        ("12-5", "5"),
        ("half is 1/2", "1/2"),
        ("<answer></answer> 72", None),
        ("<answer>  </answer>", None),
        (r"72 \boxed{}", None),
        ("</answer>72<answer>", "72"),
        ("no idea", None),
        ("", None),
    ],
)
def test_the_answer_is_found_where_it_is_marked(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "text, is_marked",
    [("#### 7", True), (r"\boxed{7}", True), ("<answer>7</answer>", True), ("so it is 7", False), ("<answer>7", False)],
)
def test_a_last_number_is_not_a_mark(text, is_marked):
    assert (marked_answer(text) is not None) == is_marked


@pytest.mark.parametrize(
    "piece",
    ["\\boxed{", "<answer>", "####", "{", "1,1", "</answer> ", " ", "\\text{", "7 /", "Q:\n", "1\nQ: ", "x²½"]
    + ["<|im_start|>", "1<|im_start|>", "</think>1\nQ:", "\n", "*", "- "],
)
def test_long_degenerate_responses_take_no_time(piece):
    text = piece * (50_000 // len(piece))
    start = time.perf_counter()
    same_answer(extract_answer(text), "72")
    same_answer(text, "72")
    for name in ("format", "boxed_format"):
        REWARDS[name]("<think></think><answer>" + text + "</answer> no", {})
    assert time.perf_counter() - start < 1.0


@pytest.mark.parametrize(
    "text, answer",
    [
        ("It takes 2 1/2 hours.", "2 1/2"),
        ("It takes 1½ cups.", r"1\frac{1}{2}"),
        (r"so \(2\frac{1}{2}\)", r"2\frac{1}{2}"),
        ("The area is 5 m^2.", "5"),
        ("The volume is 10 cm³.", "10"),
        (r"The volume is $10\,cm^{3}$", "$10"),
        ("a speed of 5 m s^{-2}", "5"),
        ("H2O has x_{10} and step2", None),
        ("1\u202f234\u2009567 people", "1 234 567"),
        ("It costs 12 500 dollars, or 1'234", "1'234"),
        ("12,34,567 rupees", "12,34,567"),
        ("about 5 million people", "5 million"),
        ("$2.5 million", "$2.5 million"),
        ("The total is 1.5e3.", "1.5e3"),
        ("about 2.5E-4", "2.5E-4"),
        ("1.5×10^3 of them", r"1.5\times 10^3"),
        ("so 2^10", "2^10"),
        ("so 10^{-3}.", "10^{-3}"),
        (r"so \(3\sqrt{2}\)", r"3\sqrt{2}"),
        (r"so \(2\pi\)", r"2\pi"),
        (r"so $\frac{\sqrt{3}}{2}$", r"$\frac{\sqrt{3}}{2}"),
        ("so √3/2", r"\sqrt{3}/2"),
        ("so π/2", r"\pi /2"),
        (r"so \sqrt[3]{2}", r"\sqrt[3]{2}"),
        ("so f'(x) = 2x", "2x"),
        ("so it is 3+4i.", "4i"),
        ("It costs $5k.", "$5k"),
        ("x = - 5", "- 5"),
        ("8 - 5", "5"),
        ("in binary 1011_2", "1011_2"),
        ("It is 50%.", "50"),
        ("It ends at 10:30.", "10:30"),
        ("The ratio is 3:4.", "3:4"),
        ("It was on 2024-01-05.", "2024-01-05"),
        ("the 5th", "5"),
        ("in all 1.000.000", "1.000.000"),
        ("so x = 72.", "72"),
        ("It is **72**!", "72"),
        ("10 €", "10"),
        ("-$5", "-$5"),
        ("Answer:USD 72", "USD 72"),
        ("７２ 。", "72"),
        (r"is $72\,\text{million}$", "$72 million"),
        ("is **72** million", "72 million"),
        ("is $72$ thousand.", "$72 thousand"),
        ("一共是1.5万元。", "1.5 万"),
        ("重72千克", "72"),
        ("so 2**10", "2^10"),
        (r"so 0.\overline{3}", r"0.\overline{3}"),
        (r"so 2\sqrt2", r"2\sqrt2"),
        ("so 72 pi", "72 pi"),
        (r"so 72\theta", r"72\theta"),
        ("so 2÷3", r"2\div 3"),
        ("It is negative 3.", "-3"),
        ("It is minus 3.", "-3"),
        ("It is - 3.", "- 3"),
        ("It is 2 and 1/2.", "2 1/2"),
        (r"so {7\over 2}", r"\frac{7}{2}"),
        ("es sind 1.234,56", "1.234,56"),
        ("es sind 7,5", "7,5"),
        ("1, 2, 3", "3"),
        ("1. One.\n2. So she has 72.\n3.", "72"),
        ("The answer is\n3.", "3"),
        ("It costs 5 bn.", "5 bn"),
        ("It costs $1.5mil", "$1.5mil"),
        ("so 72 k", "72 k"),
        ("so 3 dozen eggs", "3 dozen"),
        ("so 5 squared", "5 squared"),
        ("so 101 in base 2", "101 in base 2"),
        ("so 8 base camps", "8"),
        ("so ±3", r"\pm 3"),
    ],
)
def test_the_last_number_is_a_whole_number_as_it_is_written(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"<think>maybe \boxed{71}</think> The answer is 72.", "72"),
        ("<think>maybe <answer>71</answer></think> 72", "72"),
        ("<think>#### 71</think>\nSo 72", "72"),
        ("<think>71</think><answer>72</answer>", "72"),
        ("<think>71</think> I cannot say.", None),
        (r"<think>\boxed{72} is my guess, but", None),
        ("<think>So it is 72", None),
        (r"template-opened \boxed{71}</think> #### 72", "72"),
        ("71</think>72", "72"),
        ("<think>1<think>2</think>3</think> 72", "72"),
        ("<think>71</think> 72 <think>or", None),
        ("<think>1<think>2</think>3\nQuestion: 4?</think> 72", "72"),
        ("<answer>71</answer></think> 72", "72"),
        (r"<thinking>\boxed{71}</thinking> 72", "72"),
        (r"<Think >\boxed{71}</THINK> 72", "72"),
        (r"<Thinking>\boxed{72}", None),
        (r"<think>71</think> \boxed{72}</think>", "72"),
        ("71</think> \\boxed{72}\n</think>\n", "72"),
        (r"<think>1<think>2</think> \boxed{71}</think>", None),
        (r"\boxed{71}</think>", None),
    ],
)
def test_the_answer_is_taken_from_behind_the_thoughts(text, answer):
    assert extract_answer(text) == answer
    assert marked_answer(text) in (None, answer)


@pytest.mark.parametrize(
    "text, answer",
    [
        ("#### 8\n\nQuestion: 2+3?\nAnswer: 5\n#### 5", "8"),
        ("#### 8 Question: 2+3? #### 5", "8"),
        ("\\boxed{\\frac{\\sqrt{2}}{2}}\n\nProblem 2: 2+3? \\boxed{5}", r"\frac{\sqrt{2}}{2}"),
        ("<answer>8</answer>\nUser: 2+3?\n<answer>5</answer>", "8"),
        ("The answer is 8.\n\nQ: 2+3?\nA: 5", "8"),
        ("The answer is 8.\n\n**Question:** 2+3?\n5", "8"),
        ("The answer is 8.\n### Question 2\n2+3? 5", "8"),
        ("**Answer: 8**\n\n---\n\n**Problem 3.** 2+3? 5", "8"),
        ("It is 8.<|endoftext|>Human: 2+3? 5", "8"),
        ("The answer is 8.\nHuman: 2+3?\nAssistant: 5", "8"),
        ("It is 8.<|im_end|>\n<|im_start|>user\n2+3?<|im_end|>\n5", "8"),
        ("<think>a</think> It is 8.\nQuestion: 2+3?\n<think>b</think> 5", "8"),
        ("<think>a</think> #### 8\nQuestion: 2+3?\n<think>b", "8"),
        ("#### 8\nQ: 2?\n#### 5\nQ: 3?\n#### 6", "8"),
        ("Problem: 40 + 32?\nSolution: 40 + 32 = 72, so 72.", "72"),
        ("Let me restate it.\nQuestion: what is 40 + 32?\n72", "72"),
        ("Question: I have 40.\nQuestion: and 32 more?\n72", "72"),
        ("#### Problem 2\nfoo\n#### 72", "72"),
        ("A problem: 40 is not enough. So 72", "72"),
        ("<think>5\nQuestion: 6</think> 72", "72"),
        (r"\boxed{\text{Question: }8}", r"\text{Question: }8"),
        (r"So \boxed{5}. Wait, let me re-read the question: it asks for both. So \boxed{6}", "6"),
        (r"\boxed{7}. To answer the question: the total is \boxed{8}", "8"),
        (r"First \boxed{7}. Example: with 2. Hence \boxed{8}", "8"),
        (r"By \boxed{3} and Problem 3: \boxed{6}", "6"),
        ("Answer to Question 1: \\boxed{7}\nAnswer to Question 2: \\boxed{8}", "8"),
        (r"\boxed{8}. Question: 2+3? \boxed{5}", "8"),
        ("#### 8\nQUESTION: 2+3?\n#### 5", "8"),
        ("#### 8\n问题：2+3?\n#### 5", "8"),
        ("\\boxed{8}\n\n## Problem\n2+3?\n\\boxed{5}", "8"),
        ("\\boxed{8}\n\n**Question**\n2+3?\n\\boxed{5}", "8"),
        ("It is 8.\nNext problem: 2+3?\n5", "8"),
        ("It is 8.\nFollow-up question: 2+3?\n5", "8"),
        (r"\boxed{\text{The answer is }8}", "8"),
        ("It is 8.\nuser\n2+3?\nassistant\n5", "8"),
        ("8<|start_header_id|>user<|end_header_id|>2+3? 5", "8"),
        ("8<start_of_turn>user\n2+3? 5", "8"),
        ("8</s>[INST] 2+3? 5", "8"),
        ("8<eos>5", "8"),
        ("8<|end_of_text|>5", "8"),
        ("8<｜end▁of▁sentence｜><｜User｜>2+3? 5", "8"),
        ("I have 3 apples.\n\n**Question:** and 5 more?\n\n**Answer:** 8", "8"),
        ("Step 1: there are 3 apples.\nExample: 2 more.\nSum: 5", "5"),
        ("#### Step 3: add 40 and 32\nThe sum is 72.", "72"),
        ("#### Step 1: 5\n#### 8", "8"),
        ("#### Answer: -8", "-8"),
        ("#### Final answer\n8", "8"),
        ("<answer>The answer is -8</answer>", "-8"),
    ],
)
def test_an_invented_turn_is_no_part_of_the_answer_and_an_honest_heading_is(text, answer):
    assert extract_answer(text) == answer


# comparing


@pytest.mark.parametrize(
    "predicted, truth",
    [
        ("72", "72"),
        (" 72.", "72"),
        ("72.0", "72"),
        ("+72", "72"),
        ("072", "72"),
        ("$72", "72"),
        (r"\$72", "72"),
        ("72%", "72"),
        (r"72\%", "72"),
        ("72 percent", "72"),
        ("1,072", "1072"),
        ("1{,}072", "1072"),
        (r"10,\!080", "10080"),
        ("-5", "\u22125"),
        ("- 5", "-5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        (".5", "0.5"),
        ("0.50", "1/2"),
        ("1/2", r"\frac{1}{2}"),
        (r"\dfrac12", "0.5"),
        (r"\frac{270}7\text{ degrees}", "270/7"),
        ("1 1/2", "1.5"),
        (r"1\frac{4}{5}", "9/5"),
        (r"-1\frac12", "-3/2"),
        (r"-\frac{1}{2}", r"\frac{-1}{2}"),
        ("6/4", "3/2"),
        ("72 clips", "72"),
        ("72 clips altogether", "72"),
        ("60 miles per hour", "60"),
        ("60 km/h", "60"),
        ("5cm", "5"),
        (r"15\mbox{ cm}^2", "15"),
        (r"5 \text{ m}", "5"),
        (r"90^\circ", "90"),
        ("90°", "90"),
        ("5 cm^2", "5"),
        ("x = 5", "5"),
        (r"3 \times 10^{5}", "300000"),
        (r"2.5 \cdot 10^{-3}", "0.0025"),
        (r"$72$", "72"),
        (r"\(72\)", "72"),
        (r"\text{Evelyn}", "evelyn"),
        ("Even.", r"\text{even}"),
        (r"\text{(C)}", "(C)"),
        ("( 3, 4 ]", "(3,4]"),
        ("0", "-0"),
        ("123456789012345678901234567890", "123,456,789,012,345,678,901,234,567,890"),
    ],
)
def test_spelling_does_not_matter(predicted, truth):
    assert same_answer(predicted, truth) and same_answer(truth, predicted)


@pytest.mark.parametrize(
    "predicted, truth",
    [
        (None, "72"),
        ("", "72"),
        (" ", "72"),
        ("", ""),
        (".", ""),
        ("172", "72"),
        ("727", "72"),
        ("72.5", "72"),
        ("7 2", "72"),
        ("-72", "72"),
        ("--72", "72"),
        ("7,2", "72"),
        ("72,0", "720"),
        ("72 71", "72"),
        ("72, 71", "72"),
        ("72 or 71", "72"),
        (r"72 \text{ or } 71", "72"),
        ("71 = 72", "72"),
        (r"71 \ne 72", "72"),
        ("the answer is 72", "72"),
        ("40+32", "72"),
        (r"36 \cdot 2", "72"),
        (r"36 \times 2", "72"),
        (r"\frac{144+0}{2}", "72"),
        ("2^3", "8"),
        ("72 thousand", "72"),
        ("72 dozen", "72"),
        ("2k", "2"),
        ("2 k", "2"),
        ("2xy", "2"),
        (r"2\pi", "2"),
        ("2 pi", "2"),
        (r"2\sqrt{2}", "2"),
        ("5r^5", "5"),
        ("0.5", "50%"),
        ("1/0", "1"),
        (r"\frac{1}{0}", "0"),
        ("11/2", "1.5"),
        ("(3,4)", "(3,4]"),
        ("1,2", "(1,-2)"),
        ("Evelyn", "Navin"),
        ("3R^2", "3r^3"),
        ("72" * 100, "72"),
        ("9" * 5000, "9"),
        ("<answer>72", "73"),
        ("nan", "72"),
        ("inf", "72"),
        ("\u0667\u0662", "72"),
        ("1e400000000", "72"),
        ("5!", "5"),
        (r"72 \times 10^{99999999}", "72"),
        ("<answer>72</answer>", "7"),
        ("1_000", "1000"),
        ("x=5+1", "5"),
    ],
)
def test_what_is_not_the_answer_is_not_taken_for_it(predicted, truth):
    assert not same_answer(predicted, truth)


@pytest.mark.parametrize(
    "predicted, truth",
    [
        (r"2\sqrt{2}", r"\sqrt{8}"),
        ("-q+p", "p - q"),
        (r"\frac{1}{\sqrt{3}}", r"\frac{\sqrt{3}}{3}"),
        ("2(k+1)", "2k+2"),
        (r"\sqrt{4}", "2"),
        ("[-2, 7]", r"x \in [-2,7]"),
        ("-2, 1", "1,-2"),
        (r"$\frac{\pi}{2}$", r"\pi/2"),
        (r"1+\sqrt{19}, 1-\sqrt{19}", r"1 \pm \sqrt{19}"),
        (r"\left(\tfrac{6}{4}, -13\right)", r"\left( \frac{3}{2}, -13 \right)"),
    ],
)
def test_expressions_are_compared_by_meaning(predicted, truth):
    assert same_answer(predicted, truth)


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
    "one, other",
    [
        ("5 million", "5"),
        (r"72\text{ million}", "72"),
        ("72 billion", "72 million"),
        ("5 k", "5"),
        ("5 dozen", "60"),
        ("5m", "5"),
        ("5 x", "5"),
        ("2 xy", "2"),
        ("0.333", "1/3"),
        (r"0.\overline{3}", "0.3"),
        (r"\overline{72}", "72"),
        ("7,2", "7.2"),
        ("7\\,2", "72"),
        ("12 34", "1234"),
        ("1.234.567", "1234567"),
        ("1.234,5", "1234.5"),
        ("2.718281828", "1e1"),
        ("1e3", "3"),
        ("2e^3", "2000"),
        ("2**3", "23"),
        ("x²", "x2"),
        ("5 m²", "52"),
        ("72 is wrong", "72"),
        ("5 hundredths", "5"),
        ("10:30", "1:3"),
        ("10:30", "10.5"),
        ("6:8", "3:4"),
        ("3:4", "0.75"),
        ("8:34 a.m.", r"8\!:\!34 \text{ p.m.}"),
        ("2024-01-05", "2024-05-01"),
        ("2024-01-05", "2018"),
        ("1/5/2024", "5/1/2024"),
        ("2024-01-05 10:30", "2024-01-05 10:31"),
        ("May 12", "Yam 12"),
        ("(A)", "(B)"),
        ("1011_2", "1011"),
        ("1011_2", "11"),
        ("1011_2", "1011_3"),
        ("1011₂", "10112"),
        ("0.333\\ldots", "0.333"),
        ("0.333...", "1/3"),
        (r"71 \approx 72", "72"),
        ("x_1", "1"),
        ("x = 5", "y = 5"),
        ("xy = 7", "7"),
        ("72 thousand", "72"),
        ("100000000000000000000001", "100000000000000000000000"),
        ("0.1", "0.10000000000000000001"),
    ],
)
def test_what_only_looks_alike_differs_both_ways(one, other):
    assert not same_answer(one, other) and not same_answer(other, one)


@pytest.mark.parametrize(
    "one, other",
    [
        ("3 : 4", "3:4"),
        ("3/4", "3:4"),
        ("5:00", r"05\!:\!00"),
        ("8:34 PM", r"8\!:\!34 \text{ p.m.}"),
        ("2024-1-5", "2024-01-05"),
        ("2024-01-05T10:30:00Z", "2024-01-05T10:30:00Z"),
        ("C", "(C)"),
        (r"\textbf{(C)}", "C."),
        ("1011 (base 2)", "1011_{2}"),
        (r"1011_{\text{two}}", "1011_2"),
        (r"\text{A5}_{11}", "A5_{11}"),
        ("24_{10}", "24"),
        ("1011₂", "1011_2"),
        ("“C”", "C"),
        ("(−∞,2]", r"(-\infty,2]"),
        ("x²", "x^2"),
        ("√2", r"\sqrt{2}"),
        ("2π", r"2\pi"),
    ],
)
def test_words_times_bases_and_symbols_have_one_spelling(one, other):
    assert same_answer(one, other) and same_answer(other, one)


@pytest.mark.parametrize(
    "predicted, truth, same",
    [
        ("48+24=72", "72", True),
        (r"$48 \times 2 = 96$ clips", "96", True),
        ("48+24=73", "72", False),
        ("71=72", "72", False),
        ("72=48+24", "72", False),
        (r"\textbf{(B)}\ 30", "(B)", True),
        (r"(B) $\frac{1}{2}$", "B", True),
        ("(A), (B)", "(A)", False),
        ("(A) or (B)", "A", False),
        ("(B) 30", "(C)", False),
        (r"\text{(C)}+1", "(C)", False),
        (r"(C) + 1", "(C)", False),
        ("(B) 30", "30", False),
    ],
)
def test_what_is_worked_out_is_its_result_and_a_choice_its_letter(predicted, truth, same):
    assert same_answer(predicted, truth) == same


@pytest.mark.parametrize(
    "one, other, same",
    [
        (r"\frac{1}{2^{98}}", "2^{-98}", True),
        (r"\frac{1}{10!}", r"\frac{1}{3628800}", True),
        (r"\frac{1}{2^{98}}", "0.0", False),
        (r"\frac{1}{10!}", "0.0000002", False),
        (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}", False),
        (r"\frac{1}{206!}", r"\frac{1}{204!}", False),
        (r"1-\frac{1}{2^{61}}", "1", False),
        ("10^{-30}x", "10^{-20}x", False),
        (r"x+10^{-20}", "x", False),
        (r"e^{-100}", "e^{-101}", False),
        (r"e^{\pi\sqrt{163}}", "262537412640768744", False),
        (r"\sqrt{10^{40}+1}", "10^{20}", False),
        (r"\pi", "3.141592653589793", False),
        (r"\{0, 1\}", r"\{10^{-20}, 1\}", False),
        ("(0.5, 1)", r"(\frac{1}{2}, 1)", True),
        ("(0.333, 1)", r"(\frac{1}{3}, 1)", False),
        (r"\sqrt{2+\sqrt{3}}", r"\frac{\sqrt{6}+\sqrt{2}}{2}", True),
        (r"\begin{pmatrix} 0.5 \\ 1 \end{pmatrix}", r"\begin{pmatrix} 1/2 \\ 1 \end{pmatrix}", True),
        (r"\begin{pmatrix} 0 \\ 1 \end{pmatrix}", r"\begin{pmatrix} 10^{-20} \\ 1 \end{pmatrix}", False),
        ("1, 1", "1", False),
        ("R^2", "r^2", False),
        ("f'(x)", "f(x)", False),
        (r"xy = \sqrt{7}", r"\sqrt{7}", False),
        (r"x = \sqrt{7}", r"\sqrt{7}", True),
        ("x^2 = -1", "x^2 = -2", False),
        ("y = 2x + 3", "2x - y + 3 = 0", True),
        ("2x < 6", "x < 3", True),
        ("-x < -3", "x < 3", False),
        ("2s + 1", "2 + 1", False),
        (r"2\sqrt{3}\text{ cm}", r"2\sqrt{3}", True),
        (r"7\pi\text{ million}", r"7\pi", False),
        (r"12,348\pi", r"12348 \pi", True),
        ("6, 8, 10", r"6, 8\text{, and }10", True),
        (r"x = -2 \text{ or } x = -12", "-2, -12", True),
        (r"-\frac{1}{5} - \frac{2}{5}i", r"\frac{-1-2i}{5}", True),
        (r"-2 \le x \le 7", "[-2, 7]", True),
        (r"-2 < x \le 7", "[-2, 7]", False),
    ],
)
def test_expressions_are_equal_where_that_is_proven(one, other, same):
    assert (same_answer(one, other), same_answer(other, one)) == (same, same)


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


MATRIX = r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"


@pytest.mark.parametrize(
    "around",
    [r"M^{-1}", "M^2", "xM", "M x", r"M\pi", "M million", "|M|", r"\left|M\right|", r"\sqrt{M}", r"\text{tr}M", "(M)^2"]
    + ["-M", "2M", r"\frac12M", "M+1", r"\det M", "M^T", "M!", "kM"],
)
def test_what_stands_around_a_matrix_counts(around):
    predicted = around.replace("M", MATRIX)
    assert not same_answer(predicted, MATRIX) and not same_answer(MATRIX, predicted)


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("A = M", "M", True),
        ("(M)", r"\left(\begin{array}{cc} 1 & 2 \\ 3 & 4 \end{array}\right)", True),
        (r"\frac12\begin{bmatrix} 2 & 4 \\ 6 & 8 \end{bmatrix}", "M", True),
        (r"\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}^T", "M", True),
        (r"\Delta", r"\delta", False),
        (r"2\Omega", r"2\omega", False),
        (r"x \not= 5", r"x \ne 5", True),
        (r"\not= 5", "5", False),
        (r"x \not\in [1,2]", r"x \notin [1,2]", True),
        (r"x \not\in [1,2]", r"x \in [1,2]", False),
        (r"x<1 \text{ or } x>2", r"x>2 \text{ or } x<1", True),
        (r"x<1 \text{ and } x>2", r"x<1 \text{ or } x>2", False),
        ("2 3", "5", False),
        (r"3\ 4", "7", False),
        (r"\frac 3 2 \pi", r"\frac{3\pi}{2}", True),
        (r"5 \mod 7", "5", False),
        ("(x,y)=(-6,6)", "(-6,6)", True),
        ("(x, y, z) = (1,2,3)", "(1,2,3)", True),
        ("(y,x)=(-6,6)", "(-6,6)", False),
        ("(y,x)=(-6,6)", "(x,y)=(-6,6)", False),
        ("y=1, x=2", "(2,1)", True),
        ("y=1, x=2", "(1,2)", False),
        ("x=-2, x=3", "-2, 3", True),
        ("9 PM", "9 p.m.", True),
        ("9 PM", "9 AM", False),
        (r"9\text{ p.m.}", r"9\text{ a.m.}", False),
        ("5 miles north", "5 miles south", False),
        ("f^{-1}(x) = x+1", "x+1", True),
        ("x^{-1} = 5", "5", False),
        (r"\mathbf{v} = M", "M", True),
        ("101 in base 2", "101_2", True),
        ("2^{10^{10^{10}}}", "2^{10^{10^{9}}}", False),
        ("x^{100000000}+1", "x^{100000000}", False),
    ],
)
def test_what_math_verify_overlooks_is_not_lost(one, other, same):
    one, other = (re.sub(r"\bM\b", lambda _: MATRIX, side) for side in (one, other))
    assert (same_answer(one, other), same_answer(other, one)) == (same, same)


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


# real data


@needs_real
def test_every_math500_answer_equals_itself_and_its_solution_s():
    rows = json.loads((REAL / "math" / "math500.json").read_text())
    start = time.monotonic()
    for row in rows:
        assert same_answer(extract_answer(rf"Thus $\boxed{{{row['answer']}}}$."), row["answer"])
        assert same_answer(extract_answer(row["solution"]), row["answer"])
    assert time.monotonic() - start < 5


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
