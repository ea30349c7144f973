r"""Notations that both graders must read as a person does. For each there are answers in which it is something else.

An answer that a grader cannot read costs a correct answer its reward. An answer that it reads in a second way gives a
reward for nothing, so every table has both kinds.
"""
import json
import re
import time
from pathlib import Path

import pytest

from eval_math import grade
from grading import grade_gsm8k, grade_last_number, grade_math, gsm8k_gold
from tasks import Question

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"no data folder {DATA}")


def check_math(gold, right, wrong):
    for answer in right:
        assert grade_math(rf"So the answer is $\boxed{{{answer}}}$.", gold), f"{answer} is {gold}"
    for answer in wrong:
        assert not grade_math(rf"So the answer is $\boxed{{{answer}}}$.", gold), f"{answer} is not {gold}"


def check_gsm8k(gold, right, wrong):
    for answer in right:
        assert grade_gsm8k(f"3 + 4 = 7, so 14.\n#### {answer}", gold), f"{answer!r} is {gold}"
    for answer in wrong:
        assert not grade_gsm8k(f"3 + 4 = 7, so 14.\n#### {answer}", gold), f"{answer!r} is not {gold}"


# ---- a digit after ^ or _ ----

def test_a_prime_is_a_part_of_a_name():
    check_math("x'", [r"x^{\prime}", r"x^\prime", "{x'}"], ["x", "x''", "y'"])
    check_math("f''(2)", [r"f^{\prime\prime}(2)"], ["f'(2)", "f(2)"])
    check_math("2x+1", ["1+2x"], ["1+2x'", r"1+2x^{\prime}"])
    check_math(r"6 \text{ feet}", ["6'"], ["6x'"])                                 # of a number it is a unit


@pytest.mark.parametrize("gold, right, wrong", [
    ("3", [r"\log_2(8)", r"\log_2\left(8\right)", r"\log_2 [8]", r"\log_2{(8)}", r"\log_4\frac{128}{2}", "log_2(8)",
           r"\log_2\binom{8}{1}", r"\log_2^2(8)-6", r"\log_10(1000)", r"\mathrm{log}_2(8)"],
     [r"\log_2(9)", r"\log_3(8)", r"\log_2(8)+1", r"\log_8(2)"]),
    ("-2", [r"\log_2\frac{1}{4}", r"\log_2 \dfrac14", r"\log_2(0.25)", r"\log_2 0.25", r"\log_2 1/4"],
     [r"\log_2\frac{1}{5}", r"\log_2 2\frac14"]),
    ("7", [r"\log_2 128", r"\log_2(128)"], [r"\log_2 127"]),
    (r"\sin^2 t", [r"\sin^2(t)", r"\sin^2\left(t\right)", r"\sin ^2 (t)", r"\sin^2{(t)}", r"1-\cos^2(t)", "sin^2(t)"],
     [r"\sin(t^2)", r"\sin^3(t)", r"\sin^2(2t)", r"2\sin(t)", r"\cos^2(t)", r"\sin^2(u)"]),
    (r"\cos^3\frac{x}{2}", [r"\cos^3(\frac{x}{2})", r"\cos^3(x/2)", r"\cos^3\dfrac x2"], [r"\cos\frac{x^3}{8}"]),
    (r"\tan^2 3x", [r"\tan^2(3x)", r"\tan^2\left(3x\right)"], [r"\tan^2(3)x", r"\tan^6 x"])])
def test_the_argument_of_a_function_with_a_script_may_stand_in_brackets(gold, right, wrong):
    r"""A product sign was put between a digit and a bracket, so \log_2(8) became \log_2 \cdot (8), which is nothing."""
    check_math(gold, right, wrong)


@pytest.mark.parametrize("gold, right, wrong", [
    ("12", [r"\sum_{k=1}^3(2k)", r"\sum_{k=1}^3 2k", r"\sum\limits_{k=1}^3[2k]", r"2\sum_{k=1}^3(k)",
            r"\sum_{k=1}^3\frac{4k}{2}", r"\prod_{k=3}^4(k)"], [r"\sum_{k=1}^4(2k)", r"\sum_{k=1}^3(k)"]),
    (r"\frac{n(n+1)}{2}", [r"\sum_{k=1}^n(k)", r"\sum_{k=1}^n k"], [r"\sum_{k=1}^n(k^2)"]),
    ("1", [r"\int_0^1(2x)dx", r"\int_0^1 2x\,dx", r"\int_0^1\frac{4x}{2}dx", r"\int_0^1(2x)\mathrm{d}x",
           r"\int_0^1\left(3t^2\right)dt", r"\lim_{x\to 0^+}(x+1)", r"\lim_{x\to 1}(x^2)"],
     [r"\int_0^2(2x)dx", r"\int_0^1(3x)dx", r"\int(2x)dx", r"\int_0^1(2x)", r"\lim_{x\to 0}(x+2)"]),
    (r"\int_0^1 e^{x^2}dx", [r"\int_0^1(e^{x^2})dx"], ["e"])])
def test_the_bounds_of_sums_and_integrals_may_be_single_digits(gold, right, wrong):
    r"""\int_0^1(2x)dx had the fault of \log_2(8). Without the bracket it ran out of time, to compute 100 digits."""
    check_math(gold, right, wrong)


@pytest.mark.parametrize("gold, right, wrong", [
    (r"\frac{x^2}{2}", [r"x^2\frac12", r"x^{2}\frac{1}{2}", "x^2(0.5)"], ["x^{5/2}", r"x^{2\frac12}"]),
    ("x^{5/2}", [r"x^{2\frac12}", "x^{2.5}"], [r"x^2\frac12", r"x^2\frac{1}{2}", "x^2 1/2"]),
    (r"\sqrt2", ["2^0.5", "2^{1/2}"], ["2^0", "2^{5}"]),
    ("12", ["2^2(3)", r"2^2\cdot3"], ["2^{23}", "2^{2+3}"]),
    ("3x_1", ["x_1(3)", "x_{1}(3)"], ["x_{13}", "x_1"]),
    ("10^{16}", ["10^16", "1e16"], ["10^1 6", "60"]),
    ("18", [r"3\binom{4}{2}", r"\binom{4}{2}(3)", "9[2]"], ["81"]),
    ("9", ["3^2"], [r"3\binom{4}{2}", r"\binom{4}{2}(3)", r"\binom{4}{2}\frac{6}{2}"])])
def test_a_digit_after_a_script_belongs_to_a_product(gold, right, wrong):
    r"""x^2\frac12 was read as x to the mixed number 2 1/2, and \binom{4}{2}(3) as 6 + 3."""
    check_math(gold, right, wrong)


# ---- choices with their text ----

OPTIONS = ["(C) 12", "C: 12", "C. 12", "C) 12", r"(C)\ 12", "(C)~12", "(C): 12", r"\text{C. } 12", r"\text{C: 12}",
           r"\text{(C) 12}", r"\text{(C) }12", r"\text{C}. 12", r"\textbf{(C)}\ 12", r"\textbf{C.}\ 12",
           r"\mathrm{(C)}\;12", r"(\text{C})\ 12", "**(C)** 12", r"C.\ 12", "Option C: 12",
           r"\text{The answer is (C) }12"]


@pytest.mark.parametrize("gold", ["C", "(C)", r"\text{C}", r"\text{(C)}", r"\textbf{(C)}", "12"])
def test_an_option_may_stand_with_its_letter(gold):
    r"""Only \textbf{(C)} 12 was known. The gold is the letter in some data sets, and the option's text in others."""
    check_math(gold, OPTIONS, [])


@pytest.mark.parametrize("gold", ["D", r"\text{(A)}", "13", "2"])
def test_an_option_is_no_other_option(gold):
    check_math(gold, [], OPTIONS)


@pytest.mark.parametrize("gold, right, wrong", [
    ("C", ["C)", "(C) -12", r"C: \frac{1}{2}", "C. x+1", "(C) (1,2)", r"(C) \text{twelve}", r"(C) 2\frac12"],
     ["12C", "C 12", "C(12)", "(C)(12)", r"C\cdot 12", "(C) + 12", "(C) - 12", "C-12", "C = 12", "(C) x", "Cx", "C/2",
      "C_2", "C_{12}", "C'", "C^2", "(C)^2", r"(C) \times 12", "C:12", "C, 12", "(C,D)", "5 C", "-C", "c: 12"]),
    ("C", [], ["(C), (D)", "(C) or (D)", "(C) 12, (D) 13", "C: 12 or D: 13", r"\textbf{(C)} 12, \textbf{(D)} 13",
               "C. D", r"\text{C. 12}, \text{D. 13}", r"\text{(C) is wrong}", r"\text{C. is not correct}",
               r"\text{not C}"]),
    ("C", [r"\text{C. 12}"], [r"\text{C. 12} or \text{D. 13}", r"\text{C. 12}; \text{D. 13}",
                              r"\text{C. 12}\text{D. 13}", r"\text{C: true}, \text{D: true}",
                              r"\textbf{C.} 12, \textbf{D.} 13", r"\text{C)} 12, \text{D)} 13"]),
    ("12", ["E) 12"], ["(C)(12)", "C 12", "C:12", "(C) -12", "(C) 12 or (D) 13", "C_12", "C, 12"]),
    ("-12", ["(C) -12", "C: -12"], ["(C) 12"]),
    ("C:12", ["C: 12"], ["12", "C"]), ("12C", [r"C\cdot 12"], ["12"]), ("E. coli", ["E. coli"], []),
    (["C", "12"], ["C", "(C) 12"], ["(D) 12"])])
def test_a_letter_in_an_expression_is_no_choice(gold, right, wrong):
    """C may be a variable. Two options are no choice at all."""
    check_math(gold, right, wrong)


# ---- characters ----

@pytest.mark.parametrize("gold, right, wrong", [
    ("18", ["１８", "١٨", "१८", "𝟏𝟖", "18％", "18﹪", "＋18", "x＝18", "（18）", "１８．００", "18。", "＄18",
       "18\u200b"],
     ["１９", "81", "1 8", "18½", "18²", "18₂ + 1"]),
    ("-3", ["−3", "－3", "‐3", "‑3", "‒3", "–3", "—3", "―3", "﹣3"], ["3", "＋3"]),
    ("7", ["10−3", "１０－３"], ["10–3", "10—3"]), ("2-3i", ["2−3i", "2 – 3i", "２－３i"], ["2+3i"]),
    ("2.5", ["2½", "2 ½", "２½", "5⁄2", "⁵⁄₂", "2¹⁄₂", r"\text{2½ hours}"], ["½", "21/2", "-2½", "2⅓", "2½½", "2½1"]),
    (r"\frac78", ["⅞", "⁷⁄₈", "7⁄8"], ["⅜", "8⁄7", "⅞1", "0⅞1"]), ("-2.5", ["-2½", "−2½"], ["-1.5", "2½"]),
    ("x^{12}", ["x¹²", "𝑥¹²"], ["x12", "12x", "x²", "x₁₂"]), ("x^2", ["x²"], ["x2", "2x", "x₂", "x³"]),
    ("10^{-3}", ["10⁻³", "10^−3", "0.001"], ["10³", "10-3", "103"]), ("1.5e-4", ["1.5×10⁻⁴"], ["1.5×10⁴"]),
    ("3", ["log₂(8)", "log₂8"], ["log₃8"]), (r"\sin^2 t", ["sin²(t)", "sin² t"], ["sin(t²)"]),
    ("x_1", ["x₁"], ["x1", "x"]), ("1011_2", ["1011₂"], ["1011₃"]),
    ("1080", ["1，080", "1\u202f080", "1\u00a0080", "1\u2009080"], ["1\u202f08", "10\u202f80"]),
    ("(1,2)", ["（1，2）"], ["（2，1）"]), ("1,2", ["1，2", "1、2"], ["12"]), ("x<3", ["x＜3"], ["x＞3"]),
    (r"15\text{ cm}^2", ["15 cm²", r"15\text{ cm²}", r"15\text{ cm^{2}}"], ["15 cm³"]),
    ("20^\\circ C", ["20℃"], ["21℃"]), ("9007199254740993", ["９００７１９９２５４７４０９９３"],
       ["９００７１９９２５４７４０９９２"])])
def test_math_answers_may_have_other_characters(gold, right, wrong):
    """Full-width signs, most dashes, ％ and superscripts were unknown characters, which are incorrect.

    A dash between two plain numbers stays incorrect: 10–3 is a range as well as a difference.
    """
    check_math(gold, right, wrong)


@pytest.mark.parametrize("gold, right, wrong", [
    ("18", ["１８", "١٨", "𝟏𝟖", "18％", "18﹪", "18。", "＄18", "＋18", "18 m²", "18\u00a0dollars", "18\u200b",
       "x² = 18",
            "x₁ = 18", "17½ + ½ = 18", "36⁄2", "1.8 × 10¹"],
     ["18²", "18₂", "18½", "½18", "log₂18", "18³", "１９", "1８0", "18‰", "18万", "√18", "²18", "18 × 10¹"]),
    ("2.5", ["2½", "2 ½", "２½", "$2½", "2½ hours", r"2\frac{1}{2}", "5⁄2"],
     ["½", "2⅓", "-2½", "2.5½", "22½", "2½²", "2 1/2", "2/½", r"2\frac{5}{1}"]),
    ("0.5", ["½", "1⁄2", "¹⁄₂"], ["1½", "½½", "½k"]), ("-0.5", ["-½", "−½"], ["½", "5-½"]),
    ("-10", ["−10", "－10", "—10", "‐10", "﹣10", "−$10"], ["10", "x−10", "5−10", "Total – 10"]),
    ("10", ["10"], ["20–10", "20—10", "−10", "10−"]),
    ("1080", ["1\u00a0080", "1\u2009080", "1\u202f080", r"1\,080", "1，080", "１０８０"],
     ["1 080", "1\u00a008", "10\u00a080", "1\u00a00800", "1\u00a0080\u00a05"]),
    ("100", ["10²", "10^2", "10^{2}"], ["10", "102", "10^3"]), ("0.001", ["10⁻³"], ["103", "1000"]),
    ("32", ["2⁵"], ["25"]), ("-4", ["-2²"], ["2²"]), ("4", ["2²"], ["-2²", "2^2^1"])])
def test_gsm8k_answers_may_have_other_characters(gold, right, wrong):
    check_gsm8k(gold, right, wrong)


def test_the_last_number_may_have_other_characters():
    """The last number of 2½ is not 2, and that of 18 cm² is 18."""
    for text, gold in (("It is １８", "18"), ("is －3", "-3"), ("area 18 cm²", "18"), ("１,０８０％", "1080")):
        assert grade_last_number(text, gold), text
    for text, gold in (("It is 2½", "2"), ("It is 18½", "2"), ("It is 2³", "2"), (r"\frac{36}{2}", "2")):
        assert not grade_last_number(text, gold), text


def test_long_integers_are_compared_digit_by_digit():
    """As floats, 9007199254740993 and 9007199254740992 are the same number."""
    check_math("9007199254740993", ["9007199254740993", "9,007,199,254,740,993", "9007199254740992+1"],
               ["9007199254740992", "9.00719925474099e+15", "9007199254740994"])
    check_math("12345678901234567890123", ["12345678901234567890123"], ["12345678901234567890124"])
    check_gsm8k("9007199254740993", ["9,007,199,254,740,993"], ["9007199254740992", "9.00719925474099e+15"])


# ---- markdown ----

@pytest.mark.parametrize("gold, right, wrong", [
    ("7", ["**7**", "*7*", "__7__", "_7_", "***7***", "`7`", "**$7$**", "**7**.", "x = **7**", "**x = 7**",
       "**7** dollars",
           r"\text{**7**}", "**Answer:** 7"],
     ["**8**", "2**7", "7**2", "**7**2", "7**", "*7", "3*7*", "7 **3**", "**7** or **8**", "**7** **8**"]),
    ("49", ["7**2", "7 ** 2", "(7)**2"], ["**7** 2", "7*2"]), ("x^2+y^2", ["x**2+y**2", "x ** 2 + y ** 2"],
       ["x*2+y*2"]),
    ("2x+2y", ["2*x+2*y"], ["x**2 + y**2", "x **2 + y** 2"]), ("18", ["2*9", "2*3*3"], ["2**9", "*2*9*"]),
    ("7,8", ["**7**, **8**", "**7** and **8**"], ["**78**", "**7**"]),
    (r"\text{Evelyn}", ["**Evelyn**", "*Evelyn*"], ["**Carla**"])])
def test_markdown_around_a_math_answer_does_not_count(gold, right, wrong):
    """**7** was read as a power without a base. Between two factors ** is a power still."""
    check_math(gold, right, wrong)


# ---- sentences after the answer ----

ABOUT_THE_SOLUTION = """
    I checked it in 2 ways. | I double-checked this 3 times. | I verified my answer with 2 methods. | This took 3 steps.
    It was solved in 2 different ways. | The answer was checked in 2 ways.
    The solution uses 2 equations. | See question 4. | (Rounded to 2 decimal places.)
    I rounded it to the nearest 10. | I am 100% sure. | There are 7 days in a week. | A week has 7 days.
    She had 25 eggs at first. | He started with 25 apples. | Each of the 3 friends gets the same.
    We multiplied 9 by 2 and got 18. | All 4 conditions hold. | So she has 18 apples. | The answer is 18.
    9 + 9 = 18 | I checked it in ２ ways."""

OTHER_ANSWERS = r"""
    20 | **20** | $20 | 20 eggs | = 20 | x = 20 | Answer: 20 | Answer 20 | The answer is 20.
    So the answer is 20. | It is 20. | Final answer: 20 | Therefore, she has 20 apples.
    She has 20 apples. | Janet makes 20 dollars a day. | It was 20 before. | No, 20. | Wait, it is 20.
    Actually, I get 20. | I mean 20. | Or 20. | Maybe it is 20. | It should be 20. | In total 20.
    That makes 20. | Correction: 20 | I changed it to 20. | I go with 20. | We are left with 20.
    \boxed{20} | 9 + 11 = 20 | The answer is not 18 but 20. | It is not 18. | In 20 days.
    She walks 20 miles. | Tom walks 20 steps. | -18 | It is 18.5.
    I checked it in 2 ways. The answer is 20. | I checked it in 2 ways: 20
    I checked it in 2 ways and got 20. | Profit 20 | I checked it in 2 ways and 20 is right.
    The 20 is right. | It is 18 or 20. | It is 18 million. | It is ２０. | It is 20½. | Step 2: Double it.
    It is between 18 and 20. | 答案是 20 | She had 25 at first and 20 at the end. | He started with 25 and has 20.
    She had 25 at first, 20 now. | A week has 7 days, and she needs 126. | There are 7 days in a week, 126 in all."""


def sentences(text):
    return [sentence.strip() for sentence in re.split(r" \| |\n", text) if sentence.strip()]


@pytest.mark.parametrize("sentence", sentences(ABOUT_THE_SOLUTION))
def test_a_sentence_about_the_solution_is_no_second_answer(sentence):
    """Every sentence with a number had to state the answer. So the 2 of `I checked it in 2 ways.` was a conflict."""
    check_gsm8k("18", [f"18\n{sentence}", f"18 dollars.\n\n{sentence}", f"**18**; {sentence}"], [])
    check_gsm8k("2", [], [f"18\n{sentence}"])
    assert not grade_gsm8k(f"#### 18\n{sentence}\nThe answer is 20.", "18")


@pytest.mark.parametrize("sentence", sentences(OTHER_ANSWERS))
def test_another_answer_after_the_answer_is_a_conflict(sentence):
    check_gsm8k("18", [], [f"18\n{sentence}", f"18. {sentence}", f"18\nI checked it in 2 ways.\n{sentence}"])


def test_the_number_of_a_heading_is_no_answer():
    """`#### 3. Find the cost` looks like the answer 3, so no sentence after it may have another number."""
    assert grade_gsm8k("#### 18. I checked it in 2 ways.", "18")
    assert not grade_gsm8k("#### 3. Find what he had\nHe had 25 dollars at first.", "3")


# ---- the template r1 ----

@pytest.mark.parametrize("text", [
    "I write <answer> </answer> tags. </think> <answer>18</answer>",
    "<answer>7</answer>? No. </think> <answer>18</answer>",
    r"First <answer> answer here </answer>. </think> <answer>\boxed{18}</answer>",
    "x </think> <answer>7</answer> No: <answer>18</answer>",
    "x </think> As asked, in <answer> tags: <answer>18</answer>",
    "a </think> b </think> <answer>18</answer>", r"<answer>7</answer> </think> so \boxed{18}", "x </think> <answer> 18",
    "x </think> <answer>18</answer> <answer></answer>", "<answer>18</answer>", "x </think> <answer>**18**</answer>",
    "x </think> <answer>18</answer>\nUser: And now? Assistant: <think> y </think> <answer>7</answer>"])
def test_the_last_tag_after_the_reasoning_counts(text):
    """The first tag counted, even when the reasoning only named it. Then the answer was lost, or a guess was graded."""
    assert grade(Question("", "18", [], "boxed"), text, True, "r1") == {"correct": True}
    assert grade(Question("", "7", [], "boxed"), text, True, "r1") == {"correct": False}


@pytest.mark.parametrize("text", [
    "I guess <answer>18</answer>. </think> <answer>7</answer>", r"\boxed{18} </think> so it is 7",
    r"\boxed{18} </think>", "<answer>18</answer> </think>", "x </think> 18",
    "x </think> <answer>18</answer> No: <answer>7</answer>", r"x </think> \boxed{18} <answer></answer>",
    "x </think> <answer>18 or 7</answer>"])
def test_an_answer_in_the_reasoning_does_not_count(text):
    assert grade(Question("", "18", [], "boxed"), text, True, "r1") == {"correct": False}


def test_an_answer_that_is_cut_off_has_no_value():
    """<answer> 1 may be the beginning of 18. A box shows where it ends."""
    def correct(text, gold, finished):
        return grade(Question("", gold, [], "boxed"), text, finished, "r1")["correct"]

    assert correct("x </think> <answer> 1", "1", True) and not correct("x </think> <answer> 1", "1", False)
    assert not correct("x </think> <answer>18</answer> No: <answer> 1", "1", False)
    assert correct(r"x </think> <answer> \boxed{1}", "1", False)
    assert correct("x </think> <answer>1</answer> a", "1", False)


def test_gsm8k_answers_of_the_template_stand_in_the_last_tag():
    question = Question("", "18", [])
    assert grade(question, "<answer>#### 7</answer> </think> <answer>#### 18</answer>", True, "r1")["correct"]
    assert grade(question, "7 </think> #### 18", True, "r1")["correct"]
    marks = grade(question, "#### 18 </think> <answer>#### 7</answer>", True, "r1")
    assert marks == {"correct": False, "strict": False, "last_number": False}


# ---- golds of the data sets, and answers made to break it ----

def numbers():
    names = ("eval_math500", "eval_olympiadbench", "math_lvl3to5_train")
    rows = [json.loads(line) for name in names for line in (DATA / f"{name}.jsonl").read_text().splitlines()]
    return sorted({gold for row in rows for gold in [row["answer"]] if isinstance(gold, str)
                   and re.fullmatch(r"-?[0-9]+(?:\.[0-9]+)?|-?\\frac\{[0-9]+\}\{[0-9]+\}", gold)})


@needs_data
def test_golds_in_other_characters_stay_right_and_their_neighbours_wrong():
    wide, golds = str.maketrans("0123456789-.", "０１２３４５６７８９－．"), numbers()
    assert len(golds) > 300
    for gold in golds[::5]:
        check_math(gold, [gold.translate(wide), f"**{gold}**", f"(C) {gold}", rf"\text{{C. }}{gold}", f"{gold}。"],
                   [f"C, {gold}", f"**{gold}** or **77**", f"７{gold}"])


@needs_data
def test_gsm8k_golds_may_be_followed_by_a_sentence():
    for line in (DATA / "gsm8k_test.jsonl").read_text().splitlines():
        answer = json.loads(line)["answer"]
        gold = gsm8k_gold(answer)
        assert grade_gsm8k(f"{answer}\nI checked it in 2 ways.", gold)
        assert not grade_gsm8k(f"{answer}\nSo the answer is {int(gold.replace(',', '')) + 1}.", gold)


@pytest.mark.parametrize("piece", [
    "**", "**a", "*a", "_", "½", "²", "⁻", "₁", "１", "–", "1–", "(C) ", "C: ", '"C" ', r"\text{a^{2}", r"\log_",
    r"\sin^2(", r"\int ", ", ", " or", r"\,", "~", "1\u00a0000", "× 10^2 ", "10^{", "I check ", "we check the 3 ",
    "in 2 ways ", "(2 ", "There are 7 days in a week ", "step 2 ", "it is 18 ", "2 eggs at first ", "<answer>",
    "</answer> ", "</think>"])
def test_repeated_notation_is_graded_at_once(piece):
    """No pattern may backtrack: four times the spaces took 64 times as long."""
    text, box = piece * (2000 // len(piece)), piece * (480 // len(piece))
    start = time.process_time()
    grade_math(rf"\boxed{{{box}}}", "5")
    grade_gsm8k(f"#### {text[:1990]}", "18")
    grade_gsm8k(f"#### 18\n{text[:1980]}", "18")
    grade_last_number(text, "18")
    grade(Question("", "18", []), text, True, "r1")
    assert time.process_time() - start < 0.5
