r"""The grader: every rule by hand, two case files, real golds re-written, and answers made to break it."""
import hashlib
import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from grading import (
    grade_gsm8k,
    grade_last_number,
    grade_math,
    grade_stated,
    gsm8k_gold,
    is_number,
    states_gold,
)
from grading import latex as grading_math

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"no data folder {DATA}")
MATH_FILES = ("eval_aime24", "eval_amc", "eval_math500", "eval_minerva", "eval_olympiadbench",
    "math_lvl3to5_train")


def boxed(answer):
    return rf"First $2+2=4$, so the answer is $\boxed{{{answer}}}$."


def rows(name):
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]


def math_golds():
    """Every gold alternative of the MATH sets, once."""
    answers = [row["answer"] for name in MATH_FILES for row in rows(name)]
    return sorted({gold for answer in answers for gold in ([answer] if isinstance(answer, str) else answer)})


def sampled(golds, one_in):
    """The same golds on every machine."""
    return [gold for gold in golds if hashlib.sha256(gold.encode()).digest()[0] % one_in == 0]


# ---- GSM8K ----

@pytest.mark.parametrize("rule, gold, right, wrong", [
    ("numbers", "18", ["18", "18.00", "1.8e1", "36/2", r"\frac{36}{2}", "18:00", "+18", "018"], ["17",
        "18.01", "180", "-18"]),
    ("commas", "1,080", ["1080", "1,080", "1{,}080", "1,080.00"], ["1,08", "10,80", "1 080"]),
    ("sign", "-10", ["-10", "−10", "-$10", "negative 10"], ["10", "x-10", "Total - 10"]),
    ("ignored", "18", ["**18**", r"\boxed{18}", "$18", r"\$18", "18 dollars", "18%", "18.", "`18`",
        r"\( 18 \)", "18<|im_end|>",
                       "18 cm^2", "The answer is 18", "18 ####"], ["18k", "18x", "18!", "<18", "18 million",
                           "18+"]),
    ("second number", "18", ["18 apples\nSo she has 18 apples."], ["17, 18, 19", "18 or 20", "72 (48+24)",
        "4 1/2", "10-18",
                                                                "18\nIt was 20 before."]),
    ("equations", "5", ["2+3 = 5", "x = 5", "2 + 3 = $5"], ["3 = 5", "5 = 3", "x = 5 = 6", "3 or 5 = 5"]),
    ("working", "18", ["18 (9 + 9 = 18)", "**18** eggs (9 + 9 = 18).", "2(4+5) = 18", "2*(4+5) = 18", "2 * (4+5) = 18",
                       "36 / (1+1) = 18", "Total (9+9) = 18", "(9+9) = 18"],
     ["17 (9 + 9 = 18)", "**17** (9 + 9 = 18)", "$20 (9 eggs * $2 = $18)", "x = 17 (9 + 9 = 18)", "18 (9 + 8 = 17)"]),
    ("tildes", "18", ["18~dollars", r"$18 \mathrm{~dollars}$"], ["~18"]),
    ("none", "18", [], ["", "eighteen", "eighteen 18", "#"])])
def test_gsm8k_rules(rule, gold, right, wrong):
    for text in right:
        assert grade_gsm8k(f"3 + 4 = 7, so 7 * 2 = 14.\n#### {text}", gold), text
    for text in wrong:
        assert not grade_gsm8k(f"3 + 4 = 7, so 18.\n#### {text}", gold), text


def test_gsm8k_markers():
    """The last marker counts. Markdown headings of four hashes are working; an earlier answer is not."""
    for response in ("#### 14", "####14", "##### 14", "####\n14", "a\n#### 14\n#### 14", "#### 14 ####",
        "3+4 = 7 #### 14",
                     "#### Step 1\n3+4=7\n#### Step 2\n7*2=14\n#### 14",
                     "#### Step 1: Add 3 and 4\n3+4=7\n#### Step 2: Double\n7*2=14\n#### 14",
                         "#### 1. Add\n7\n#### 2. Double\n#### 14",
                     "#### **Step 1:** Add 3 and 4\n7\n\n#### **14**",
                         "#### Solution\nShe has 3+4=7.\n#### 14"):
        assert grade_gsm8k(response, "14"), response
    for response in ("14", "", "####", "#### 7\n#### 14", "#### 14\n#### 7", "#### 7 dollars\n#### 14",
        "#### Answer: 7\n#### 14",
                     "#### 14 or 15\n#### 14", "#### The answer is 7\n#### 14", "### 14",
                         "#### 14\n" + "a" * 2000, "#### 14" * 60):
        assert not grade_gsm8k(response, "14"), response


def test_strict_is_the_rule_of_the_original_evaluation():
    assert grade_gsm8k("#### 1,080", "1080", strict=True) and grade_gsm8k("#### 18 or 20", "18", strict=True)
    assert grade_gsm8k("#### 7\n#### 18", "18", strict=True)
    for response in ("####18", "#### 18.", "#### 18.00", "#### $18", "18"):
        assert not grade_gsm8k(response, "18", strict=True)


def test_last_number_needs_no_marker():
    for response, gold in (("It costs $1,080.", "1080"), ("from 3 to -5", "-5"), ("5 or -$5.00", "-5"),
        ("10-20", "20"), ("is −3", "-3")):
        assert grade_last_number(response, gold), response
    for response in ("", "no number", "18 of 20", "-18", "1.8", "180", "x = 18 + 1"):
        assert not grade_last_number(response, "18"), response


@pytest.mark.parametrize("grade", [grade_gsm8k, grade_last_number])
@pytest.mark.parametrize("gold", ["", "x", "3 4", "1/0", "1,08"])
def test_a_gold_that_is_no_number_raises(grade, gold):
    with pytest.raises(ValueError, match="gold"):
        grade("#### 18", gold)


def test_a_gsm8k_row_without_a_gold_raises():
    assert gsm8k_gold("48/2 = 24\n#### 1,024 ") == "1,024"
    for answer in ("24", "#### ", "#### none"):
        with pytest.raises(ValueError):
            gsm8k_gold(answer)


# ---- MATH ----

RULES = [
    # rule, gold, right answers, wrong answers
    ("6 notation", r"\frac{1}{2}", [r"\frac12", r"\dfrac{1}{2}", r"\tfrac 1 2", "1/2", "½",
        r"\left(\frac{1}{2}\right)", "$\\frac{1}{2}$",
        r"\displaystyle\frac{1}{2}", r"\frac{1}{2}.", r"\frac{1}{2}\,", r"x = \frac12",
            r"\text{The answer is } \frac{1}{2}",
        r"\frac12 \approx 0.51"], [r"\frac{1}{3}", r"\frac21", "", r"\text{}", r"\frac{1}{0}",
            r"\frac{1}{23}", "1 2"]),
    ("6 braces hold digits together", r"\frac{1}{23}", [r"\frac1{23}"], [r"\frac{12}{3}", r"\frac123"]),
    ("6 Unicode", r"2\sqrt{3}+\pi", ["2√3 + π", r"2\sqrt3+\pi", "2sqrt(3)+pi"], ["2√3 − π"]),
    ("6 labels", r"5\sqrt{2}", [r"\textbf{(D)}\ 5\sqrt{2}", r"\text{(D) }5\sqrt2"], [r"\textbf{(D)}\ 5",
        r"\textbf{(D)}"]),
    ("6 names", "5", ["x=5", "x = 10/2 = 5", "n_1=5", r"\angle A = 5", "2+3=5"], ["x+1=5", "x=5=6", "7=6=5",
        "x=y", "5=x=4"]),
    ("6 names of the gold", "x=5", ["5", "x = 5"], ["y=5", "x=-5", "x=x", "0=0"]),
    ("6 functions", "f(x)=x+1", ["x+1", "f(x)=1+x"], ["f(x)=x-1", "g(x)=x-1"]),
    ("7 decimals", r"\frac13", [r"0.\overline{3}", r"\frac{2}{6}"], ["0.333333333333", "0.3", "0.33", "3"]),
    ("7 integers", "10000000000000000", ["10^{16}", "10,000,000,000,000,000", "1e16"], ["10000000000000001",
        "10^{15}"]),
    ("7 thousands", "10080", ["10,080", "10{,}080", r"10,\!080", r"10\,080", "10080.0"], ["10,80", "1,0080",
        "(10,080)", "10, 080"]),
    ("7 not thousands against a list", r"45^\circ, 135^\circ", ["45,135", "135,45"], ["45135", "45,136"]),
    ("7 not thousands", "(100,101)", ["(100, 101)"], ["100101", "(101,100)"]),
    ("7 scientific", r"1.3 \times 10^{-27}", ["1.3e-27", r"1.3\cdot10^{-27}", "1.3 × 10^{-27}", "13e-28",
        r"0.13 \times 10^{-26}"],
        ["1.3e-28", "1.3e27", "0", r"1.4 \times 10^{-27}", "1.3", "1.30001e-27"]),
    ("7 mixed", r"2\frac{1}{2}", ["5/2", "2.5", r"\frac52", "2 1/2"], [r"2\frac13", "1", r"\frac{21}{2}",
        r"-2\frac12"]),
    ("7 negative mixed", r"-15\frac{3}{5}", ["-15.6"], ["-14.4"]),
    ("7 signs", "-5", ["−5", "-5.0", r"\frac{-10}{2}", "-(5)"], ["5", "+5", "--5 5"]),
    ("7 percent", r"50\%", ["50", "0.5", r"\frac12", "50 percent"], ["5", "0.05", r"51\%"]),
    ("7 no percent asked", "50", [r"50\%"], ["0.5", r"0.5\%"]),
    ("7 hundredths", "0.5", [r"50\%"], [r"5\%", "50"]),
    ("7 money", r"\$1,250.90", ["1250.9", r"\$1250.90", r"1250.90\text{ dollars}"], ["125.09",
        r"1,250.90\text{ cents}"]),
    ("8 units", r"10\text{ cm}", ["10", r"10\mathrm{cm}", "10 cm", "10 centimeters", r"0.1\text{ m}"],
        [r"10\text{ m}", r"10\text{ cm}^2", "10m", "10x", r"10\text{ thousand}", r"10\text{ or more}",
            r"\text{not }10"]),
    ("8 squares", r"15\mbox{ cm}^2", ["15", r"15\text{ square cm}", r"15\text{ sq. centimeters}"],
        [r"15\text{ cm}^3", r"15\text{ ft}^2"]),
    ("8 time units", r"2\text{ hours}", ["2", r"120\text{ minutes}"], ["120", r"2\text{ minutes}"]),
    ("8 nouns", r"14 \text{ right triangles}", ["14", "14 triangles"], [r"14\text{ squares}", "13"]),
    ("8 degrees", r"90^\circ", ["90", "90°", r"90\text{ degrees}"], [r"\frac{\pi}{2}", r"60^\circ"]),
    ("8 degrees of an argument", r"\tan 15^\circ", [r"2-\sqrt3"], [r"\tan 15", "15"]),
    ("8 bases", "1011_2", ["1011_{2}", "1011", "(1011)_2"], ["1011_3", "11", "1010_2", "1011_{10}"]),
    ("8 letters as digits", r"\text{A5}_{11}", ["A5_{11}", "A5"], ["5A_{11}", "115"]),
    ("9 words", r"\text{Evelyn}", ["Evelyn", "evelyn.", r"\textbf{Evelyn}"], [r"\text{Carla}",
        r"\text{Evelyn or Carla}", "E"]),
    ("9 words, not factors", "CD", [r"\text{CD}"], ["DC"]),
    ("9 dates", r"\text{June 20}", ["June 20"], ["June 21", "20"]),
    ("9 counted", "5", ["five", r"\text{Five}"],
        ["six", r"\text{True}", r"5\text{ million}", r"5\text{ dozen}"]),
    ("9 choices", r"\text{(B)}", ["B", "(B)", r"\textbf{(B)}", r"\text{B}", r"\textbf{(B)}\ 12"], ["C",
        r"\text{(A) or (B)}", r"\textbf{(A)}\ 12"]),
    ("9 several choices", r"\text{A, C}", ["C,A", "A and C"], ["A", "A,B", "A,B,C"]),
    ("9 variables have case", "c", ["c"], ["C"]),
    ("9 times", "3:30", [r"3:30\text{ p.m.}", "03:30"], ["3.30", "3:03", "330"]),
    ("9 half days", r"4\!:\!30 \text{ p.m.}", ["4:30 PM", "4:30"], [r"4:30\text{ a.m.}"]),
    ("10 lists", "3,5", ["5, 3", r"3 \text{ and } 5", r"\{3,5\}", "x=3, x=5", "3;5"], ["3", "3,5,7", "3,3",
        "35", "(5,3)", "[3,5]"]),
    ("10 named lists", "19,0,1", ["x=19, y=0, z=1", "x_1=0, x_2=1, x_3=19", "0, 1, 19", "(19,0,1)"],
        ["x=1, y=0, z=19", "x=19, y=1, z=0", "x=19, y=0", "(1,0,19)"]),
    ("10 named gold", "x=3, y=2", ["y=2, x=3", "3, 2", "(3,2)"], ["2, 3", "x=2, y=3", "(2,3)"]),
    ("10 plus-minus", r"1\pm\sqrt2", [r"1-\sqrt2,1+\sqrt2", r"x = 1 \pm \sqrt{2}"], [r"1+\sqrt2",
        r"1\pm\sqrt3", r"2\pm\sqrt2"]),
    ("10 multiplicity", "-2,-2,1", ["1,-2,-2"], ["-2,1", "-2,1,1"]),
    ("10 one value", "5", [r"\{5\}"], ["5,6", r"5\pm 100", "5 or 6", "5,5"]),
    ("10 sets", r"\{1,2\}", ["1,2", r"\left\{2,1\right\}", "{1,2}"], ["(1,2)", r"\{1,3\}", r"\mathbb{R}"]),
    ("10 empty", r"\emptyset", [r"\varnothing", r"\{\}"], ["0", r"\{0\}"]),
    ("10 tuples", "(3,-1)", [r"\left(3,\,-1\right)", "3,-1", r"(\frac{6}{2}, -1)", "(x,y)=(3,-1)"], ["(-1,3)",
        "-1,3", "[3,-1]", "(3,-1,0)"]),
    ("10 intervals", "(1,5]", ["1<x\\le5", r"5\ge x>1", r"x\in(1,5]", r"\{x \mid 1<x\leq 5\}"], ["(1,5)",
        "[1,5]", "1<x<5", "(1,6]"]),
    ("10 rays", r"(-\infty,3)", ["x<3", "3>x", "(-∞,3)"], ["x>3", r"(-\infty,3]", r"x\le3", r"(\infty,3)"]),
    ("10 unions", r"(-\infty,-1)\cup(1,\infty)", [r"(1,\infty)\cup(-\infty,-1)", r"x<-1 \text{ or } x>1"],
        [r"(-\infty,-1)", r"(-\infty,-1]\cup[1,\infty)", r"(-\infty,-1),(1,\infty)"]),
    ("10 matrices", r"\begin{pmatrix} 1/2 & 2 \\ 3 & 4 \end{pmatrix}",
        [r"\begin{bmatrix}0.5&2\\3&4\end{bmatrix}",
        r"\left(\begin{array}{cc}\frac12&2\\[2pt]3&4\end{array}\right)"],
            [r"\begin{pmatrix}1/2&3\\2&4\end{pmatrix}",
        r"\begin{pmatrix}1/2&2&3&4\end{pmatrix}", r"\begin{vmatrix}1/2&2\\3&4\end{vmatrix}",
            r"\begin{pmatrix}1/2\\2\end{pmatrix}"]),
    ("11 equations", "y = 2x+3", ["2x+3", "y=3+2x", "2x-y+3=0", "y-3=2x"], ["y=2x-3", "x=2y+3", "2x+y+3=0",
        "2x+3=0"]),
    ("11 inequalities", r"s^2 \le 8r^2", [r"8r^2 \geq s^2", r"2s^2\le 16r^2"], [r"s^2\ge 8r^2", "s^2<8r^2",
        r"-s^2\le -8r^2"]),
    ("12 surds", r"\frac{\sqrt3}{3}", [r"\frac{1}{\sqrt3}", "3^{-1/2}", r"\sqrt{\frac13}"], ["0.57735",
        r"\frac{\sqrt3}{2}", r"\sqrt[3]{3}"]),
    ("12 nested surds", r"\sqrt2+\sqrt3", [r"\sqrt{5+2\sqrt6}"], ["3.14626436994197234232913506571557"]),
    ("12 polynomials", "(x+1)(x+2)", ["x^2+3x+2", "(2+x)(1+x)"], ["x^2+3x-2", "(x+1)(x-2)", "(y+1)(y+2)",
        "x2+3x+2"]),
    ("12 fractions", r"\frac{1}{x+1}", ["1/(x+1)", r"\frac{-1}{-1-x}"], ["1/x+1", "x+1"]),
    ("12 complex", r"\frac12+\frac{\sqrt3}{2}i", [r"e^{i\pi/3}", r"\frac{1+i\sqrt3}{2}"],
        [r"\frac12-\frac{\sqrt3}{2}i", "1"]),
    ("12 exact", "2^{1009}", [r"2\cdot 2^{1008}"], ["2^{1009}+1", "2^{1008}"]),
    ("12 large", "2^{4950}", [r"4 \cdot 2^{4948}", "32^{990}"], ["2^{4950}+1", "2^{4951}"]),
    ("12 decimals", "0.3x", ["0.1x+0.2x", r"\frac{3x}{10}"], ["0.30000001x", "0.3"]),
    ("12 no guess at spaces", "5", ["2+3"], ["2 3", "1 5", "5 0"]),
    ("12 logarithms", r"\frac{\log 2}{\log 2-\log 3}", [r"\frac{\ln 2}{\ln 2-\ln 3}"],
        [r"\frac{\ln 2}{\ln 3-\ln 2}"]),
    ("12 floors", r"\lfloor\sqrt{n-1}\rfloor", [r"\left\lfloor\sqrt{-1+n}\right\rfloor"],
        [r"\lfloor\sqrt{n-2}\rfloor", r"\sqrt{n-1}"]),
    ("12 functions", r"\sin 2x", [r"2\sin x\cos x"], [r"2\sin x", r"\sin 2y", r"\sin^2 x"]),
    ("12 a product, not a mixed number", "6", ["2(3)", r"3!", r"\log_2 64", r"\binom{4}{2}"], ["2 3", "2+3",
        r"\binom42 2", "3{3}"]),
    ("12 gamma", r"x\gamma+1", [r"1+\gamma x"], ["x", r"x\gamma", r"x\Gamma+1", r"x\gamma_1+1"]),
    ("12 factors before brackets", r"\gamma x+\beta\gamma", [r"\gamma(x+\beta)", r"(\beta+x)\gamma"],
        [r"\gamma(x-\beta)", r"\gamma x"]),
    ("12 a gamma function", r"\Gamma(5)", ["24", r"4\Gamma(4)"], ["120", r"\Gamma(4)"]),
    ("12 a current", "I^2R", ["RI^2", "RII"], ["IR", "-R", "i^2R"]),
    ("12 fields", r"eE_0+e", ["e(E_0+1)", "E_{0}e+e"], ["eE_1+e", "e_0E+e", "E_0+1", "e^0+e"]),
    ("12 a distance", r"d\frac{a}{b}", [r"\frac{ad}{b}", r"\frac{a}{b}\cdot d", r"da/b", r"d \times \frac ab"],
        [r"d\frac{b}{a}", "dab"]),
    ("12 a distance before a function", r"d\sin\theta+\frac{d}{d+1}", [r"d(\sin\theta+\frac{1}{1+d})"],
        [r"d\theta\sin+\frac{d}{d+1}", r"d\cos\theta+\frac{d}{d+1}"]),
    ("12 derivatives", r"2\frac{dy}{dx}+1", [r"\frac{dy}{dx}+1+\frac{dy}{dx}", "2dy/dx+1"], [r"2\frac{y}{x}+1", "1",
        r"2\frac{dx}{dy}+1", r"2\frac{d^2y}{dx^2}+1"]),
    ("12 integrals", r"\int_0^1 t\,dt", [r"\frac12", r"\int_0^1 s\,ds"], ["1", r"\int_0^2 t\,dt"]),
    ("12 the sun", r"2M_{\odot}+1", [r"1+2M_\odot"], ["2M+1", r"2M_\oplus+1"]),
]


@pytest.mark.parametrize("rule, gold, right, wrong", RULES,
                         ids=[f"{rule}: {gold}" for rule, gold, _, _ in RULES])
def test_math_rules(rule, gold, right, wrong):
    for answer in right:
        assert grade_math(boxed(answer), gold), f"{answer} is {gold}"
    for answer in wrong:
        assert not grade_math(boxed(answer), gold), f"{answer} is not {gold}"


def test_the_last_complete_box_counts():
    for response in (r"\boxed{5}", r"\boxed {5}", r"\boxed 5", r"\fbox{5}", r"\boxed{6} no, \boxed{5}",
        r"\boxed{5} or \boxed{6",
                     r"\boxed{\boxed{5}}", r"\boxed{x = \boxed{5}}", r"\{ \boxed{\{5\}}", r"} \boxed{5} {",
                         "\\boxed{\n5\n}"):
        assert grade_math(response, "5"), response
    for response in ("5", "#### 5", r"\boxed{5} and \boxed{6}", r"\boxed{5", r"\boxed{}",
        r"\boxed{5}\boxed{}", "$5$", r"\boxed"):
        assert not grade_math(response, "5"), response


def test_list_golds_are_alternatives():
    assert grade_math(boxed("0.02"), ["0.01", "0.02"]) and grade_math(boxed(r"10^{-3}"),
        [r"1 \times 10^{-3}"])
    assert not grade_math(boxed("0.01,0.02"), ["0.01", "0.02"]) and not grade_math(boxed("0.03"), ["0.01",
        "0.02"])


@pytest.mark.parametrize("gold", ["", " ", [], [""], 5, None, ["5", 5]])
def test_bad_math_golds_raise(gold):
    with pytest.raises(ValueError, match="gold"):
        grade_math(boxed("5"), gold)


# ---- the case files ----

@needs_data
def test_case_files():
    cases = [(grade_math(boxed(case["pred"]), case["gold"]), case) for case in rows("grader_cases")]
    false_positives = [case for verdict, case in cases if verdict and not case["expected"]]
    right = sum(verdict == case["expected"] for verdict, case in cases)
    assert not false_positives
    assert right >= 0.98 * len(cases), [case for verdict, case in cases if verdict != case["expected"]]
    for case in rows("gsm8k_format_cases"):
        assert grade_gsm8k(case["response"], case["gold"]) == case["expected"], case


# ---- real golds ----

@needs_data
def test_every_gsm8k_gold_is_right_and_its_neighbour_wrong():
    for row in rows("gsm8k_train") + rows("gsm8k_test"):
        gold = gsm8k_gold(row["answer"])
        assert grade_gsm8k(row["answer"], gold) and grade_gsm8k(row["answer"], gold, strict=True)
        assert grade_last_number(row["answer"], gold)
        number = int(gold.replace(",", ""))
        assert grade_gsm8k(f"#### ${number:,}.00", gold)
        for other in (number + 1, -number or 1, number * 10 + 7):
            assert not grade_gsm8k(f"#### {other}", gold)


@needs_data
def test_every_math_gold_equals_itself():
    for name in MATH_FILES:
        for row in rows(name):
            for gold in [row["answer"]] if isinstance(row["answer"], str) else row["answer"]:
                assert grade_math(boxed(gold), row["answer"]), gold


EQUAL = {
    "full stop": lambda g: g + ".",
    "dollars": lambda g: f"$ {g} $" if "$" not in g else g,
    "dfrac": lambda g: g.replace(r"\frac", r"\dfrac"),
    "slash": lambda g: re.sub(r"\\frac\{(\d+)\}\{(\d+)\}$",
        r"\1/\2", g) if not re.search(r"\d ?\\frac", g) else g,
    "unreduced": lambda g: re.sub(r"^\\frac\{(\d+)\}\{(\d+)\}$",
                                  lambda m: rf"\frac{{{3 * int(m[1])}}}{{{3 * int(m[2])}}}", g),
    "left right": lambda g: (re.sub(r"(?<!\\left)\(", r"\\left(", re.sub(r"(?<!\\right)\)", r"\\right)", g))
                             if g.count("(") == g.count(")") and "[" not in g and "]" not in g else g),
    "spaces": lambda g: re.sub(r"(?<=[-+=,])(?![!\\])",
        r"\\, ", g) if not re.search(r"\d,\d{3}|text|mbox", g) else g,
    "name": lambda g: f"x = {g}" if re.fullmatch(r"-?[\d\\{}a-z]+", g) and "x" not in g else g,
    "commas": lambda g: f"{int(g):,}" if re.fullmatch(r"\d{1,15}", g) else g,
    "decimals": lambda g: g + ".00" if re.fullmatch(r"-?\d{1,15}", g) else g,
    "exponent": lambda g: g + "e0" if re.fullmatch(r"-?\d{1,15}", g) else g,
    "unicode": lambda g: g.replace("-", "−").replace(r"\pi", "π").replace(r"\infty", "∞"),
}
BROKEN = {
    "last digit": lambda g: re.sub(r"\d(?=\D*$)", lambda m: str((int(m[0]) + 1) % 10), g),
    "first digit": lambda g: re.sub(r"\d", lambda m: str(int(m[0]) % 9 + 1), g, count=1),
    "sign": lambda g: ("-" + g if re.fullmatch(r"[\d.]*[1-9]|\\frac\{?\d+\}?\{?\d+\}?|\d*\\sqrt\{?\d+\}?", g)
                       else g),
    "plus one": lambda g: str(int(g) + 1) if re.fullmatch(r"-?\d+", g) else g,
    "swapped": lambda g: re.sub(r"^(\(|\\left\() ?([^,()]+?),([^,()]+?) ?(\)|\\right\))$", r"\1\3,\2\4", g),
    "one more": lambda g: g + ", 77" if not re.search("[a-zA-Z=]", g) else g,
}


# All golds were run once: 17,911 re-writings that keep and 12,999 that break equality; here one in eight.
@needs_data
@pytest.mark.parametrize("name", EQUAL)
def test_rewriting_a_gold_keeps_it_right(name):
    golds = [gold for gold in math_golds() if EQUAL[name](gold) != gold]
    golds = [gold for gold in golds if not re.search(r"mho|prime", gold)]
    assert len(golds) > 50
    for gold in sampled(golds, 24):
        assert grade_math(boxed(EQUAL[name](gold)), gold), f"{EQUAL[name](gold)} is {gold}"


@needs_data
@pytest.mark.parametrize("name", BROKEN)
def test_breaking_a_gold_makes_it_wrong(name):
    golds = [gold for gold in math_golds() if BROKEN[name](gold).replace(" ", "") != gold.replace(" ", "")]
    assert len(golds) > 50
    for gold in sampled(golds, 24):
        assert not grade_math(boxed(BROKEN[name](gold)), gold), f"{BROKEN[name](gold)} is not {gold}"


# ---- hostile answers ----

HOSTILE = [
    # without a limit these run for minutes or fill the memory
    r"\prod_{k=1}^{10000}(x+k)", "((((9!)!)!)!)!", r"\binom{1000000000}{500000000}", "e^{e^{e^{e^{e}}}}",
    # too big to write down, but cheap to estimate; too long; too deep; no mathematics at all
    "9**9**9", "9^{9^{9}}", "10^{10^{10}}", r"\sum_{k=1}^{100000}\frac{1}{k^k}", "(10^6)!", "x^{99999999999}",
        "(x+1)^{100000}",
    r"\int_0^1 e^{x^2}\sin(x^x)dx", "1e999999999", "10^{999999999}", "9" * 499, "(" * 40 + "6" + ")" * 40,
        "{" * 200 + "}" * 200, "(" * 250,
    r"\sqrt{" * 60 + "2" + "}" * 60, r"\frac{1}{" * 60 + "2" + "}" * 60, "2^{" * 80 + "2" + "}" * 80,
        "1," * 240, r"a\pm b," * 50, "=5" * 200,
    "x_" * 200, "<" * 400, '"' * 300, "\\" * 499, "a and " * 80, "5 cm " * 90, "\x00" * 9,
        r"\text{" * 70 + "}" * 70, "(1,2)," * 80]


@pytest.fixture
def waits(monkeypatch):
    """The seconds that grading was willing to wait for each verdict of the other process, in order.

    Seconds on the clock would count what else the machine does. So tests measure the CPU time of this process, and
    look at the longest that it would have waited.
    """
    waits, read = [], grading_math.Algebra.read

    def recorded(self, seconds):
        if self.ready:                               # else it starts, which takes a second once
            waits.append(seconds)
        return read(self, seconds)

    monkeypatch.setattr(grading_math.Algebra, "read", recorded)
    return waits


@pytest.mark.parametrize("gold", ["5", r"\{1,2,3\}", "(1,2)"])
def test_hostile_answers_are_wrong_within_three_seconds(gold, waits):
    """At most two that it waits for the other process, however many questions it has, and one of its own."""
    asked = 0
    for answer in HOSTILE:
        waits.clear()
        start = time.process_time()
        assert not grade_math(boxed(answer), gold), answer
        assert time.process_time() - start < 1, answer
        assert waits == sorted(waits, reverse=True) and max(waits, default=0) <= 2, answer       # of one deadline
        asked += bool(waits)
    assert (asked >= 3) == (gold == "5")                       # the other golds are no matter of algebra
    assert grade_math(boxed(r"\sqrt{25}"), "5")                # and it still grades


@pytest.mark.parametrize("response", [
    "{" * 100_000, "}" * 100_000, r"\boxed{" * 15_000, r"\boxed{" * 12_000 + "}" * 12_000,
        r"\boxed{" + "{" * 50_000 + "}" * 50_000 + "}",
    r"\boxed{" + "9" * 100_000 + "}", r"\boxed " * 14_000, "\\" * 100_000, "####" * 25_000,
        "#### " + "9," * 50_000, "#### 1" * 16_000,
    "#### " + "(" * 99_000, "#### 6 " + "-" * 1_900, "####" + "6 = " * 490, "9" * 100_000,
        "#### " + "a" * 1_990])
def test_long_responses_are_wrong_at_once(response):
    start = time.process_time()
    assert not grade_math(response, "5") and not grade_gsm8k(response, "5")
    assert not grade_last_number(response, "5")
    assert time.process_time() - start < 1


def test_plain_answers_take_well_under_a_millisecond():
    start = time.process_time()
    for i in range(500):
        assert grade_math(boxed(str(i)), "18") == (i == 18) == grade_gsm8k(f"#### {i}", "18")
        assert grade_math(boxed(rf"\frac{{{i}}}{{4}}"), "4.5") == (i == 18)
    assert (time.process_time() - start) / 1500 < 1e-3


def test_nothing_is_evaluated_as_python(tmp_path):
    target = tmp_path / "made_by_an_answer"
    for code in (f"__import__('os').system('touch {target}')", f"open('{target}','w')",
        rf"\text{{open('{target}','w')}}",
                 f"[open('{target}','w') for _ in (1,)]", f"exec('open(\"{target}\",\"w\")')",
                     f"x=open('{target}','w')"):
        for gold in ("5", "x+1", "f(x)=2x"):
            assert not grade_math(boxed(code), gold) and not grade_gsm8k("#### " + code, "5")
    assert not target.exists()


def test_grading_leaves_signals_alone_and_works_in_threads():
    """math-verify's own time-outs replace the SIGALRM handler and raise in every thread but the main one."""
    before, verdicts = signal.getsignal(signal.SIGALRM), {}

    def grade(i):
        verdicts[i] = grade_math(boxed(rf"\sqrt{{{i * i}}}+\sqrt{{2}}"),
            rf"\sqrt2+{i}"), grade_math(boxed(r"\sqrt{2}"), rf"\sqrt{{{i}}}")

    threads = [threading.Thread(target=grade, args=(i,)) for i in range(3, 11)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == {i: (True, False) for i in range(3, 11)}
    assert signal.getsignal(signal.SIGALRM) is before


def test_the_other_process_is_killed_when_it_cannot_be_interrupted(waits):
    assert grade_math(boxed(r"\sqrt{16}"), "4")
    stuck = grading_math._algebra.process
    os.kill(stuck.pid, signal.SIGSTOP)               # like one long multiplication in C, deaf to signals
    waits.clear()
    assert not grade_math(boxed(r"\sqrt{81}"), "9")
    assert len(waits) == 1 and 1.5 < waits[0] <= 2 and stuck.poll() is not None
    assert grade_math(boxed(r"\sqrt{81}"), "9")


def test_the_other_process_is_replaced_when_it_dies_and_not_shared_with_forks():
    assert grade_math(boxed(r"\sqrt{16}"), "4")
    grading_math._algebra.process.kill()
    grading_math._algebra.process.wait()
    assert grade_math(boxed(r"\sqrt{36}"), "6")
    used = grading_math._algebra.process.pid
    child = os.fork()
    if child == 0:                                   # the fork must not read the answers of its parent
        fine = grade_math(boxed(r"\sqrt{49}"), "7") and grading_math._algebra.process.pid != used
        grading_math._algebra.process.kill()
        os._exit(0 if fine else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert grade_math(boxed(r"\sqrt{64}"), "8") and grading_math._algebra.process.pid == used


# ---- --answer last, and what tells a reward of 0 from one of format ----

@pytest.mark.parametrize("response, right", [
    ("It is 18.", "18"), ("It is 18. #### 20", "20"), ("18 and #### none", "18"), ("It is 18 ####", "18"),
    ("#### 18 for 3 friends", None), ("#### or ## 18 for 3", None), ("so 18 for 3", "3"), ("", None)])
def test_the_marker_counts_before_the_last_number(response, right):
    for gold in ("3", "18", "20"):
        assert grade_stated(response, gold) == (gold == right)


def test_any_number_that_is_the_gold_answer_is_found():
    for response in ("first 1,234 then 7", r"\boxed{1234.00}", "7 １２３４ 8"):
        assert states_gold(response, "1234") and not states_gold(response, "123")
    assert states_gold("minus 5", "-5") and not states_gold("", "5") and not states_gold("x" * 10**6, "5")
    assert [is_number(gold) for gold in ("5", "1,234", "-1/2", "x", "1/0", "(1, 2)")] == [True] * 3 + [False] * 3


def test_a_number_at_the_beginning_of_a_long_text_keeps_its_sign():
    text = "-5 is what we get, which is below zero as the question says it has to be."
    assert grade_last_number(text, "-5") and not grade_last_number(text, "5")


@pytest.mark.parametrize("text, value, not_value", [
    (r"= 98 \text{ m}^2", "98", "2"), ("18 cm^2", "18", "2"), ("18 m2", "18", "2"), (r"$1{,}080$", "1080", "80"),
    (r"1\,080", "1080", "80"), ("18\u202f000", "18000", "0"), ("He pays $.50.", "0.5", "50"), ("So 3.50", "3.5", "50"),
    ("18 - 5 = 13", "13", "5"), ("the total is -5", "-5", "5")])
def test_the_last_number_is_read_with_its_unit_and_its_thousands(text, value, not_value):
    for response in (text, f"It was 7 before. {'x ' * 200}{text}"):
        assert grade_last_number(response, value) and not grade_last_number(response, not_value)


@pytest.mark.parametrize("answer, gold, right", [
    (r"\boxed 18", "18", True), (r"\boxed 18", "1", False),
    (r"\boxed{\pi \approx 3.14159}", r"\pi", True), (r"\boxed{\pi \approx 3.14}", "3.14", False),
    (r"\boxed{x \approx 3.14}", "3.14", True), (r"\boxed{e \approx 2.718}", "e", True),
    (r"\boxed{0.15\%}", "0.15", False), (r"\boxed{15\%}", "0.15", True), (r"\boxed{50\%}", "50", True),
    (r"\boxed{0.5}", r"50\%", True), (r"\boxed{50}", r"50\%", True),
    (r"\boxed{\left[\begin{array}{c} 1/5 \\ -18/5 \end{array}\right]}",
     r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}", True), (r"\boxed{[1]}", "1", False),
    (r"\boxed{\begin{pmatrix} 1 & -1 \\ 1 & 1 \end{pmatrix}}",
     r"\begin{pmatrix} 1 & -1 \\ 1 & \phantom -1 \end{pmatrix}", True),
    (r"\boxed{\begin{pmatrix} 1 & -1 \\ 1 & -1 \end{pmatrix}}",
     r"\begin{pmatrix} 1 & -1 \\ 1 & \phantom -1 \end{pmatrix}", False)])
def test_notations_that_were_read_as_another_value(answer, gold, right):
    assert grade_math(answer, gold) == right
