"""Answers: finding them in a response."""

import time

import pytest

from engine.rewards import REWARDS, extract_answer, marked_answer, same_answer


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
    start = time.process_time()
    same_answer(extract_answer(text), "72")
    same_answer(text, "72")
    for name in ("format", "boxed_format"):
        REWARDS[name]("<think></think><answer>" + text + "</answer> no", {})
    assert time.process_time() - start < 1.0


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
