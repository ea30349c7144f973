r"""Is this answer right? One grader, for the reward in training and for the accuracy in evaluation.

What can be read in two ways is wrong: a false reward is learned and exploited, a missed one costs little. Only the
response is read, never the prompt; nothing in it is evaluated as Python.

GSM8K: the answer is the one number that the text after the marker `####` states; text before it is working.

1. Numbers are compared as exact fractions: 18 = 18.00 = 1.8e1 = 36/2 = \frac{36}{2} = 18:00. Commas must group
   thousands (1,080; never 1,08). At most 20 digits on either side of the point, 2 in an exponent.
2. Ignored: currency signs, %, brackets, markdown, \boxed{}, \text{}, \( \), \$, special tokens, a final full
   stop, words in Latin letters (units too: cm^2, m2). 18% is 18, as in GSM8K; 2 dozen is 2.
3. Wrong: a second number in the sentence (3 4 5; 10-20; 4 1/2; 72 (48+24); 1 080), an operator at the number
   (x-18, 18+, 18!, < 18, ±18), a word that makes it another number or none (or, not, half, million, twenty,
   18k), any character not known here.
4. Of an equation the last side counts; nothing is evaluated: 2+3 = 5 is 5. An earlier side that reads as a
   number must be equal (3 = 5 is wrong); it may be an expression otherwise, but not a list of numbers.
5. The last marker counts (an empty one, as in `#### 18 ####`, does not), and every sentence or line with a digit
   after it must state the same value: repeats are right; conflicts, and working with other numbers, are wrong. An
   earlier marker conflicts when its line begins with another number (`#### 7`); as a heading (`#### Step 1: ...`)
   it is working. More than 2,000 characters after the last marker are wrong: this bounds the cost.

MATH: the answer is the content of the last complete \boxed{} (or \fbox{}), at most 500 characters.

6. Notation does not count: \left, spacing, $, \text, \dfrac, \frac12, Unicode signs, a final full stop, "The answer
   is", a label before the answer (\textbf{(A)} 5), and name = before it (x = 5, f(x) = 2x) unless the gold has another
   name. Of an equation whose sides are all equal to the gold (2+3 = 5) any number of sides may stand.
7. Plain numbers (decimals, fractions, mixed, 1.3e-27, 1.3 \times 10^{-27}) are equal exactly or not at all: 0.333 is
   not 1/3. 1,000 is a thousand unless in brackets, where , separates. 50% is 50 or 0.5.
8. A unit only one side has is ignored; two known ones are converted (300 m = 0.3 km) or differ (10 ft, 10 in); others
   must share a word. Degrees are a unit, except after sin, cos, tan, ... The base of 1011_2 likewise, never converted.
9. Words: same letters and digits in the same order, case ignored from two letters on. five is 5. (B), \text{B}, B. are B.
10. Lists (a, b; a or b; a \pm b), sets and unions: the same elements in any order. Tuples, intervals, matrices: in
   order, same brackets; a bare list may stand for a tuple in the same order. {1,2} is not (1,2). x < 3 is (-oo, 3).
11. Equations and inequalities: both sides' difference may differ by a constant factor (positive for < and <=).
12. The rest is parsed by math-verify's parser and compared as numbers, at random points when there are variables
   (real, i is imaginary): equal to 60 digits (1,000 without variables). What it cannot evaluate, math-verify decides.
   This runs in one other process, started when first needed (1 s), with 2 GB of memory, and killed when the
   answer takes over 2 s: the answer is wrong then. No signals, so any thread may grade (one at a time).
"""
import functools
import json
import os
import re
import select
import subprocess
import sys
import threading
import time
from fractions import Fraction
from random import Random

LONGEST, LONGEST_BOX, SECONDS = 2000, 500, 1.5
L = "A-Za-zÀ-ÖØ-öø-ɏ"  # Latin letters only: one of another script can be a numeral (18万 is 180,000)
DECOR = r"\s*_`$£€¥"
NUMBER = re.compile(r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|[0-9]{1,20})"
                    r"(?:\.[0-9]{1,20}|:00(?![0-9]))?(?:[eE][-+]?[0-9]{1,2}(?![0-9]))?")
SIGNED = re.compile(rf"(?:([-+])[{DECOR}]*)?({NUMBER.pattern})(?:\s*/\s*({NUMBER.pattern}))?")
# What may stand around the number, one character at a time: a failing match then cannot backtrack.
TEXT = re.compile(rf"(?:[{L}{DECOR}.,:'’\"()\[\]¢%°]|(?<=[{L}])[-²³]|/(?=\s?[{L}]))*")
EXPRESSION = re.compile(rf"[{L}{DECOR}0-9.,:'’\"()\[\]¢%°²³+/×÷^-]*")
BETWEEN_OPERANDS = re.compile(r"[^,]*(?:[-+*/×÷^]|\bx\b|\btimes\b)[^,]*")
TOUCHES = re.compile(rf"[{L}.,)\]][\"(\[*_]*$")  # x18, .5, f(18), (x)18
MULTIPLIER = re.compile(rf"[{DECOR})\]-]*(?:[kKMBTxe]|bn|mn)(?![{L}])")  # 18k, 18x, 2e; but 18 m is metres
OTHER_VALUE = re.compile(
    rf"(?<![{L}])(?:or|nor|not|cannot|minus|negative|half|quarter|twice|double|squared|cubed|pi|sqrt|root"
    r"|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|[a-z]+teen|(?:twen|thir|for|fif|six|seven"
    r"|eigh|nine)ty|(?:hundred|thousand|million|billion|trillion|lakh|crore)s?|between|at least|at most"
    rf"|(?:than|over|under|above|below)(?=[{DECOR}]+[0-9]))(?![{L}])|n['’]t(?![{L}])", re.I)
HEADING = re.compile(r"\W*(?:[A-Za-z]+ )?[0-9]+ ?[:.)]\W*[A-Za-z]")  # #### Step 1: ..., #### 2. ...
STATES = re.compile(rf"[{DECOR}(\[]*[-+]?[{DECOR}]*[0-9]")           # begins with a number
CLEAN = [(re.compile(pattern), new) for pattern, new in (
    (r"<[^<>0-9\s]{1,30}>", " "),                                         # <|im_end|>, </s>, <b>
    ("[−–]", "-"),
    (r"(?i)\b(?:minus|negative) (?=\$?[0-9])", "-"),
    (r"\{,\}|,\\!", ","),                                                 # LaTeX thousands: 1{,}080
    (r"\\[dt]?frac\{(-?[0-9]+)\}\{([0-9]+)\}", r" \1/\2 "),               # so that 4\frac{1}{2} is not 41/2
    (r"\\(?:times|cdot|div)(?![a-z])", "×"),
    (r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}", r" \1 "),
    (rf"(?<=[{L}])\s?\^\s?(?:[23]|\{{[23]\}})(?![0-9])|(?<=m)[23](?![0-9.,])", ""),  # cm^2, m^{3}, m2
    (r"\\[()\[\],;: ]", " "),
    (r"\\(?=[$%£])", ""),
    (r"\\boxed(?=\{)|[{}]", "*"))]  # * parts digits, but not a sign from its number


def gsm8k_gold(answer: str) -> str:
    """The final answer of a GSM8K row: what follows the last `####` of its field `answer`, commas kept.

    Raises ValueError when there is no marker or no number after it.
    """
    _, marker, gold = answer.rpartition("####")
    if not marker:
        raise ValueError(f"no #### marker in the GSM8K answer ...{answer[-60:]!r}")
    _gold_value(gold)
    return gold.strip()


def grade_gsm8k(response: str, gold: str, strict: bool = False) -> bool:
    """Is the final answer of `response` equal to the number `gold` ('18', '1,234', '07')? Rules: top of file.

    strict: the rule of the original evaluation instead (openai/grade-school-math, dataset.py), to compare with
    published numbers: the number one space after `####`, commas removed, must be the string gold; of several
    markers the last, where the original takes the first. It accepts `#### 18 or 20` and refuses `#### 18.`
    Never raises on a response. Raises ValueError when gold is not a number.
    """
    value = _gold_value(gold)
    if strict:
        found = re.findall(r"#### (-?[0-9.,]+)", response)
        return bool(found) and found[-1].replace(",", "") == gold.strip().replace(",", "")
    *earlier, last = [part.strip() for part in re.split("####+", response)[1:] if re.search(r"\w", part)] or [""]
    if len(last) > LONGEST or len(earlier) > 50:
        return False
    stated = [_sentence_value(s) for s in re.split(r"[.;]\s|[\r\n]", _substitute(CLEAN, last)) if re.search(r"\d", s)]
    for part in earlier:
        line = _substitute(CLEAN, re.split(r"[\r\n]", part[:LONGEST // 10])[0])
        other = _sentence_value(line)
        if not HEADING.match(line) and (other is not None or STATES.match(line)):
            stated.append(other)
    return bool(stated) and all(v == value for v in stated)


def grade_last_number(response: str, gold: str) -> bool:
    """Is the last number of `response`, wherever it stands, equal to the number `gold`?

    For the evaluation of models that were not told to write ####, reported beside grade_gsm8k; too lenient for a
    reward. Raises ValueError when gold is not a number.
    """
    value, text, last = _gold_value(gold), response.replace("−", "-"), None
    for last in NUMBER.finditer(text):
        pass
    if last is None:
        return False
    negative = re.search(r"(?<![\w)\]])-[$£€\\]*$", text[max(0, last.start() - 4):last.start()])
    return value == Fraction(re.sub(",|:00", "", last[0])) * (-1 if negative else 1)


def _substitute(replacements, text):
    for pattern, new in replacements:
        text = pattern.sub(new, text)
    return text


def _gold_value(gold):
    match = SIGNED.fullmatch(gold.strip())
    value = match and _fraction(match)
    if value is None:
        raise ValueError(f"the gold answer must be a number, got {gold!r}")
    return value


def _sentence_value(sentence):
    """The value that a sentence states, as a Fraction; None when there is none, or several, or doubt."""
    *earlier, last = sentence.split("=")
    value = _side_value(last)
    sound = value is not None and not OTHER_VALUE.search(sentence)
    return value if sound and all(_side_fits(side, value) for side in earlier) else None


def _side_fits(side, value):
    """May `side` stand before the = of an answer: words, an expression, or the same number?"""
    own = _side_value(side)
    operators = all(BETWEEN_OPERANDS.fullmatch(gap) for gap in NUMBER.split(side)[1:-1])
    return own == value if own is not None else bool(EXPRESSION.fullmatch(side)) and operators


def _side_value(side):
    """The one number of `side`, with only harmless text around it, or None."""
    found = list(SIGNED.finditer(side))
    if len(found) != 1:
        return None
    match, before, after = found[0], side[:found[0].start()], side[found[0].end():]
    if match[1] and match[0][1].isspace() and re.search(f"[{L}]", before):  # Total - 18: a dash or a sign?
        return None
    harmless = TEXT.fullmatch(before) and TEXT.fullmatch(after)
    return _fraction(match) if harmless and not (TOUCHES.search(before) or MULTIPLIER.match(after)) else None


def _fraction(match):
    """The value of a match of SIGNED; None when it divides by zero."""
    top, bottom = (Fraction(re.sub(",|:00", "", text or "1")) for text in match.group(2, 3))
    return None if bottom == 0 else (-top if match[1] == "-" else top) / bottom


# ---- MATH: rule 6, one notation ----

WORD = r"(?:text|textbf|textit|textrm|textnormal|textsf|mathrm|mathbf|mathit|mathsf|mbox|operatorname)"
FUNCTION = r"(?:arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|csc|exp|ln|log|sqrt|pi|infty|theta|alpha|beta)"
TRIG = re.compile(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)")
NAME = (r'(?:(?:\\angle ?[A-Z]+|\\[a-zA-Z]+|[a-zA-Z]|[A-Z]+|[a-zA-Z]{3,}|"[^"]*")(?:_(?:\w|\{[^{}]*\}))?\'?'
        r"(?: ?\( ?[a-zA-Z](?:, ?[a-zA-Z])* ?\))?|\([a-zA-Z](?:, ?[a-zA-Z])+\))")
GROUP = r"\{(?:[^{}]|\{[^{}]*\})*\}"
SIGNS = str.maketrans({
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "π": r"\pi ", "√": r"\sqrt ",
    "∞": r"\infty ", "°": r"^\circ ", "≠": r"\ne ", "≈": r"\approx ", "∪": r"\cup ", "∈": r"\in ", "±": r"\pm ", "∓": r"\mp ", "∅": r"\emptyset ",
    "ℝ": r"\mathbb{R}", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "²": "^2 ", "³": "^3 ", "½": r"\frac{1}{2}",
    "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⟨": "(", "⟩": ")", "’": "'", "′": "'"})
NOTATION = [(re.compile(pattern), new) for pattern, new in (
    (r"\s+", " "),
    (r"\\\\(?:\[[^\]]*\])?", "\n"),                                          # the rows of a matrix
    (r"(?:, ?(?:\\! ?)+|\{,\})(?=\d{3}(?!\d))", ""),                         # 10,\!080 and 10{,}080
    (r"\\\$ ?((?:\d|,\d|\.\d)+)", r'\1 "dollar"'),
    (r"\\(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z]) ?\.?", ""),
    (r"\\(?:boxed|fbox|(?:display|text)style|limits|phantom)(?![a-zA-Z])|\\!|\\?[$£€]|\\[()\[\]]", ""),
    (r"\\[,;:> ]|\\q?quad(?![a-zA-Z])|~", " "),
    (r"(\d{1,20})\.(\d{0,20})\\overline ?\{(\d{1,20})\}", lambda m: "\\frac{%d}{%d}" % (                 # 0.1\overline{6}
        int(m[1] + m[2] + m[3]) - int(m[1] + m[2]), (10 ** len(m[3]) - 1) * 10 ** len(m[2]))),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\leq?(?:slant)?(?![a-zA-Z])|<=", "≤"), (r"\\geq?(?:slant)?(?![a-zA-Z])|>=", "≥"),
    (r"\\lt(?![a-zA-Z])", "<"), (r"\\gt(?![a-zA-Z])", ">"),
    (r"\\mathbb ?(?:R|\{R\})", r"(-\\infty,\\infty)"),
    (r"\\(?:emptyset|varnothing)", r"\\{\\}"),
    (r"\\[lr]angle", lambda m: "()"[m[0] == r"\rangle"]),
    (rf"\\{WORD} ?\{{([^{{}}]*)\}}", r' "\1" '),                             # words stand in "" from here on
    (rf"(?<![a-zA-Z\\])(?={FUNCTION}(?![a-zA-Z]))", r"\\"),                  # 2pi, sqrt(2)
    (r"\\sqrt ?\(([^()]*)\)", r"\\sqrt{\1}"), (r"\\sqrt ?(\d+|[a-zA-Z])", r"\\sqrt{\1}"),
    (r"\\frac ?(\d|\\pi|[a-zA-Z])", r"\\frac{\1}"),
    (rf"\\frac ?({GROUP}) ?(\d|\\pi|[a-zA-Z])", r"\\frac\1{\2}"), (rf"\\frac ?({GROUP}) ", r"\\frac\1"),
    (rf"^ *(?:{NAME} ?)?\\approx(?![a-z])|\\approx(?![a-z]).*", ""),                       # 2/3 \approx 0.67: the exact value counts
    (r'\^ ?\{? ?"(?:st|nd|rd|th)" ?\}?', ""), (r"(?i)(?<=[\d \"])([ap])\.m\b\.?", r"\1m"),
    (r"\*\*", "^"), (r"\+ ?(?=\\infty)", ""), (r"(?<=\d) ?x ?(?=10\^)", r"\\times "), (r"\^ ?\{?\\(?:circ|degree)(?![a-z]) ?\}?", "°"),
    (r'(?i)"? ?\bpercent\b ?"?|\\%', "%"),
    (r"(?<![\d.])(\d+) ?(\\frac\{\d+\}\{\d+\})", r"(\1+\2)"),                # mixed numbers
    (r"(?<![\d./])(\d+) (\d+/\d+)(?![\d.])", r"(\1+\2)"),
    (r"(?<=\d) (?=\d{3}(?!\d))", ""),                                        # 10 080
    (r'[, ]*(?<![a-zA-Z\\])"?[, ]*(?:and|or)[, ]*"?(?![a-zA-Z])', ","),
    (r'(?i)^[ "]*(?:the )?(?:final |correct )?answer(?: is)?[: ]*"?[: ]*', ""),
    (r'"[^"]*"', lambda m: m[0].replace(",", '","')),
    (r"[.,;: ]+$|^ +| +(?= )", ""))]


def _last_box(response):
    r"""The content of the last complete \boxed{} or \fbox{}, nested ones inside it; None when there is none."""
    opened, last = [], None
    for match in re.finditer(r"\\(?:boxed|fbox)\s*\{|\\boxed (\d)|\\.|[{}]", response, re.S):
        if match[1]:
            last = match[1]                                                  # \boxed 5
        elif match[0] == "}":
            start, is_box = opened.pop() if opened else (0, False)
            last = response[start:match.start()] if is_box else last
        elif match[0][-1] == "{" and match[0] != r"\{":
            opened.append((match.end(), len(match[0]) > 1))
    return last


# ---- MATH: rule 10, the structure: a tree of (kind, label, children) with leaves (leaf, "", text) ----

TOKEN = re.compile(r'\\[a-zA-Z]+|\\.|"[^"]*"|.', re.S)
OPEN, CLOSE = ("(", "[", "{", r"\{"), (")", "]", "}", r"\}")
MATRIX = re.compile(r"\\begin ?\{([pbvBV]?matrix|array)\}(?: ?\{[lcr|]+\})?(.*?)\n? ?\\end ?\{\1\}", re.S)
THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")


def _split(text, separators):
    """text cut at the separators outside all brackets, and the separators found."""
    parts, found, depth = [""], [], 0
    for token in TOKEN.findall(text):
        depth += (token in OPEN) - (token in CLOSE)
        if depth == 0 and token in separators:
            parts.append("")
            found.append(token)
        else:
            parts[-1] += token
    return parts, found


def _tree(text, thousands=True):
    text = text.strip()
    if thousands and not re.search(r"[(\[]|\\\{", text):
        text = THOUSANDS.sub(lambda m: m[0].replace(",", ""), text)
    if matrix := MATRIX.fullmatch(text):
        rows = [row.split("&") for row in matrix[2].split("\n")]
        return "matrix", ("v" in matrix[1], [len(row) for row in rows]), [_tree(cell) for row in rows for cell in row]
    for kind, separators in (("list", ",;"), ("union", (r"\cup",))):
        parts = [part for part in _split(text, separators)[0] if part.strip()]
        if len(parts) > 1:
            return kind, "", _flat(_tree(part, thousands) for part in parts)
    if member := re.match(rf"({NAME}) ?\\in(?![a-zA-Z])", text):
        return "named", _squash(member[1]), [_tree(text[member.end():])]
    sides, signs = _split(text, "=<>≤≥")
    if signs:
        return _relation([side.strip() for side in sides], signs)
    parts, closed = _split(text, CLOSE)
    if len(parts) == 2 and not parts[1] and text.startswith(OPEN):
        opening = text[:2] if text[0] == "\\" else text[0]
        inside = parts[0][len(opening):]
        items = _split(inside, ",;")[0]
        if opening == r"\{" or opening == "{" and len(items) > 1:
            if builder := re.match(rf" ?{NAME}(?: ?\\in[^|:]*?)? ?(?:\\mid|:|\|)", inside):    # {x | x < 3}
                return _tree(inside[builder.end():])
            return "set", "", _flat(_tree(item) for item in items if item.strip())
        if len(items) == 1 and opening in "({":
            return _tree(inside)
        return "tuple", opening + closed[0], [_tree(item) for item in items]
    if r"\pm" in text or r"\mp" in text:
        up, down = text.replace(r"\pm", "+").replace(r"\mp", "-"), text.replace(r"\pm", "-").replace(r"\mp", "+")
        return "list", "", [_tree(up), _tree(down)]
    return "leaf", "", text


def _flat(nodes):
    return [item for node in nodes for item in (node[2] if node[0] == "list" else [node])]


def _relation(sides, signs):
    """name = value and name < bound become (named, name, [value or interval])."""
    if len(set(signs)) > 1 and not set(signs) <= set("<≤") and not set(signs) <= set(">≥"):
        return "leaf", "", "".join(a + b for a, b in zip(sides, [*signs, ""]))
    if signs[0] in ">≥":
        sides, signs = sides[::-1], [{">": "<", "≥": "≤"}[sign] for sign in signs[::-1]]
    names = [bool(re.fullmatch(NAME, side)) for side in sides]
    if signs[0] == "=":
        if names[0]:
            rest = _relation(sides[1:], signs[1:]) if len(sides) > 2 else _tree(sides[1])
            return "named", _squash(sides[0]), [rest]
    elif len(sides) == 3 and names[1]:
        ends = "(" if signs[0] == "<" else "[", ")" if signs[1] == "<" else "]"
        return "named", _squash(sides[1]), [("tuple", "".join(ends), [_tree(sides[0]), _tree(sides[2])])]
    elif len(sides) == 2 and any(names):
        low = ("[" if signs[0] == "≤" else "(") + ")", [_tree(sides[0]), ("leaf", "", r"\infty")]
        high = "(" + ("]" if signs[0] == "≤" else ")"), [("leaf", "", r"-\infty"), _tree(sides[1])]
        return "named", _squash(sides[not names[0]]), [("tuple", *(high if names[0] else low))]
    return "relation", signs[0], sides


def _same(a, g):
    """Is the tree of the answer that of the gold?"""
    relations = ("named", "relation")
    if a[0] in relations and g[0] in relations and not a[0] == g[0] == "named" or a[0] == g[0] == "named" and a[1] != g[1]:
        return _same_relation(a, g)
    a, g = (node[2][0] if node[0] == "named" else node for node in (a, g))
    if "relation" in (a[0], g[0]):                                           # 2+3 = 5 against 5
        chain, other = (a, g) if a[0] == "relation" else (g, a)
        return other[0] == "leaf" and chain[1] == "=" and all(_same_leaf(side, other[2]) for side in chain[2])
    if a[0] == g[0] == "leaf":
        return _same_leaf(a[2], g[2])
    if a[0] == g[0] in ("tuple", "matrix") or {(a[0], a[1]), (g[0], g[1])} == {("tuple", "()"), ("list", "")}:
        return len(a[2]) == len(g[2]) and (a[0] != g[0] or a[1] == g[1]) and all(map(_same, a[2], g[2]))
    if "tuple" in (a[0], g[0]) or "matrix" in (a[0], g[0]):
        return False
    if (a[0] == "union") != (g[0] == "union") and not all(n[0] == "named" for n in (a if g[0] == "union" else g)[2]):
        return False
    left = [a] if a[0] == "leaf" else list(a[2])
    right = [g] if g[0] == "leaf" else g[2]
    if len(left) != len(right) or len(left) > 40:
        return False
    for item in right:                                                       # the same elements, each as often
        match = next((i for i, other in enumerate(left) if _same(other, item)), None)
        if match is None:
            return False
        left.pop(match)
    return True


def _same_relation(a, g):
    """Do two equations or inequalities differ by a constant factor only?"""
    texts = []
    for kind, label, children in (a, g):
        if kind == "named" and children[0][0] == "leaf":
            texts.append(("=", f"({label})-({children[0][2]})"))
        elif kind == "relation" and len(children) == 2:
            texts.append((label, f"({children[0]})-({children[1]})"))
        else:
            return False
    return texts[0][0] == texts[1][0] and _ask(texts[0][1], texts[1][1], texts[0][0].replace("=", "~"))


# ---- MATH: rules 7 to 9, the leaves ----

POWER = r"10\^(?:\{[-+]?\d{1,3}\}|[-+]?\d{1,3})"
DECIMAL = rf"[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{{1,3}}|(?:\\times|\\cdot|\*){POWER})?|{POWER})"
QUOTIENT = re.compile(rf"([-+]?)\\frac\{{({DECIMAL})\}}\{{({DECIMAL})\}}|()({DECIMAL})(?:/({DECIMAL}))?")
BASE = re.compile(r'"?(-?)\(?([\dA-F.]*\d[\dA-F.]*|[A-F]+(?=.*_\{1\d\}))\)?"?_(?:(\d)|\{(\d+)\})')
TRIG = re.compile(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)")
UNIT = re.compile(r'(?<=[\d}) i"])(?: ?(?:"[^"]*"|[°%/]|(?<=°)[CFK]|(?<=° )[CFK]|(?<![a-zA-Z\\])[a-zA-Z]{2,}\.?)'
                  r"(?: ?\^ ?(?:\d|\{-?\d\}))?)+$")
UNITS = {name: (kind, Fraction(size)) for kind, table in (
    ("length", "mm:1 millimeter:1 cm:10 centimeter:10 m:1e3 meter:1e3 km:1e6 kilometer:1e6 in:25.4 inch:25.4 inche:25.4 "
               "ft:304.8 foot:304.8 feet:304.8 yd:914.4 yard:914.4 mi:1609344 mile:1609344"),
    ("time", "s:1 sec:1 second:1 min:60 minute:60 h:3600 hr:3600 hour:3600 day:86400 week:604800"),
    ("mass", "mg:1 g:1e3 gm:1e3 gram:1e3 kg:1e6 kilogram:1e6"), ("weight", "oz:1 ounce:1 lb:16 pound:16"),
    ("volume", "ml:1 milliliter:1 l:1e3 liter:1e3"), ("money", "cent:1 dollar:100 usd:100"),
    ("angle", "°:1 degree:1 deg:1"), ("am", "am:1"), ("pm", "pm:1"), ("rate", "mph:1"), ("frequency", "hz:1"))
    for name, size in (entry.split(":") for entry in table.split())}
COUNTED = "zero one two three four five six seven eight nine ten eleven twelve".split()
PROSE = re.compile(r"""(?:[\w\s".,:;'()?]|(?<=[a-zA-Z])-(?=[a-zA-Z]))*""")


def _squash(text):
    """text without quotes, needless braces and needless spaces."""
    return re.sub(r"(?<!\w) | (?!\w)", "", re.sub(r"\{ ?(\w) ?\}", r"\1", text.replace('"', " ")).strip())


def _number(text):
    """The exact value of a plain number, or None."""
    if len(text) > 100 or re.search(r"\d +\d", text):
        return None
    text = re.sub(r'[ "]', "", text)
    if mixed := re.fullmatch(r"([-+]?)\((\d+)\+([^()]*)\)", text):
        part = _number(mixed[3])
        return part and (int(mixed[2]) + part) * (-1 if mixed[1] == "-" else 1)
    match = QUOTIENT.fullmatch(text)
    if not match:
        return None
    sign, top, bottom = match.groups("1")[:3] if match[2] else match.groups("1")[3:]
    top, bottom = (Fraction(re.sub(r"(^[-+]?)?(?:\\times|\\cdot|\*)?10\^\{?([^{}]*)\}?", lambda m: (
        (m[1] + "1e" if m[1] is not None else "e") + m[2]), number)) for number in (top, bottom))
    return None if bottom == 0 else top / bottom * (-1 if sign == "-" else 1)


def _unit(text):
    """A leaf as (value, words of the unit); no words when there is no unit."""
    match = UNIT.search(text)
    if not match or TRIG.search(text) or OTHER_VALUE.search(match[0]) or "dozen" in match[0] or not re.search(r"\d|\\pi", text[:match.start()]):
        return text, []
    unit = re.sub(r"square|sq\b\.?", "^2", re.sub(r"cubic|cu\b", "^3", match[0].lower()))
    words = [word[:-1] if word[-1] == "s" and len(word) > 2 else word for word in re.findall(r'° ?"? ?[cfk]\b|[a-z]+|[°%]|\^ ?\{?-?\d', unit)]
    bare = [word for word in re.findall(r"[a-z]+", re.sub(r'"[^"]*"', "", match[0].lower())) if len(word) in (2, 3)]
    if any(word not in UNITS and word.rstrip("s") not in UNITS for word in bare):    # 5xy is a product
        return text, []
    return text[:match.start()], [UNITS.get(word, re.sub('[ {"]', "", word)) for word in words]


def _scale(a, g):
    """How many of the unit g make one of the unit a (lists of words); None when they do not compare."""
    if not a or not g or "unit" in (*a, *g):
        return 1
    if len(a) == len(g) == 1 and isinstance(a[0], tuple) and isinstance(g[0], tuple):
        return a[0][1] / g[0][1] if a[0][0] == g[0][0] else None
    powers = [{word for word in unit if word[0] == "^"} for unit in (a, g)]
    return 1 if powers[0] == powers[1] and {*a} & {*g} - powers[0] else None


def _same_leaf(a, g):
    """Is the text a of the answer equal to g of the gold: as text, in its base, with its unit, as number, as words?"""
    if _squash(a) == _squash(g):
        return bool(_squash(a))
    a, g = (text.strip().strip('"') if re.fullmatch(r' ?"[^"]*\d[^"]*" ?', text) else text for text in (a, g))
    bases = [BASE.fullmatch(re.sub(" ", "", text)) for text in (a, g)]
    if any(bases):
        digits = [match[1] + match[2] if match else _squash(text) for match, text in zip(bases, (a, g))]
        base = [match and (match[3] or match[4]) for match in bases]
        return digits[0] == digits[1] and (None in base or base[0] == base[1])
    if ":" in a + g:                                                         # times and ratios
        a, g = (re.sub(r"(?<!\d)0(?=\d:)", "", re.sub(" ?: ?", ":", text)) for text in (a, g))
    (a, a_unit), (g, g_unit) = _unit(a), _unit(g)
    x, y = _number(a), _number(g)
    if ("%" in a_unit) != ("%" in g_unit) and x is not None and y is not None:
        return not (a_unit and g_unit) and (x == y or (x / 100 == y if a_unit else x == y / 100))
    scale = _scale(a_unit, g_unit)
    if scale is None:
        return False
    if x is not None and y is not None:
        return x * scale == y
    if PROSE.fullmatch(a) and PROSE.fullmatch(g) and any(re.search('"|[a-zA-Z]{3}|[A-Z]{2}|:', text) for text in (a, g)):
        words = [[str(COUNTED.index(word)) if word in COUNTED else word for word in re.findall(r"[^\W_]+|:", text.lower())]
                 for text in (a, g)]
        return words[0] == words[1] != []
    return scale == 1 and _ask(a, g, "=")


# ---- MATH: rule 12, algebra in another process ----

def _for_parser(text):
    """text as math-verify's parser reads it rightly, or None when it is too big or no mathematics."""
    text = re.sub(r' ?"(\\?\w*)" ?', r"\1", text).replace("°", r"^\circ ").strip()
    depth = longest = 0
    for token in TOKEN.findall(text):
        depth += (token in OPEN) - (token in CLOSE)
        longest = max(longest, depth)
    if not text or longest > 10 or re.search(
            r'["%:;&\n]|(?<!_)\d +\d|\d{41}|\^\{?-?\d{6}|[^\x20-\x7e]', text):
        return None
    text = re.sub(r"(\d*)\.(\d+)", lambda m: rf"(\frac{{{int(m[1] + m[2])}}}{{{10 ** len(m[2])}}})", text)  # no floats
    return re.sub(r"(?<=\d) ?(?=\(|\\frac)", r"\\cdot ", text)


class Algebra:
    """The other process: asked one question at a time, killed (and replaced) when it does not answer before `deadline`."""

    def __init__(self):
        self.process, self.owner, self.lock, self.deadline = None, None, threading.RLock(), 0.0

    def start(self):
        self.process = subprocess.Popen([sys.executable, os.path.abspath(__file__)], stdin=subprocess.PIPE, bufsize=0,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
        self.owner, self.ready = os.getpid(), False                          # a fork of this process starts its own

    def read(self, seconds):
        """The next line, or TimeoutError after `seconds`."""
        if not select.select([self.process.stdout], [], [], max(0.0, seconds))[0]:
            self.process.kill()
            self.process.wait()
            self.start()                                                     # ready again by the time it is needed
            raise TimeoutError
        return self.process.stdout.readline()

    def ask(self, *question):
        if self.owner != os.getpid() or self.process.poll() is not None:
            self.start()
        if not self.ready:
            waited = time.monotonic()
            self.ready = bool(self.read(60.0))
            self.deadline += time.monotonic() - waited
            if not self.ready:
                raise RuntimeError(f"grading: {sys.executable} {__file__} ended at once; run it by hand to see why "
                                   "(is math-verify installed?)")
        self.process.stdin.write(json.dumps(question).encode() + b"\n")
        return self.read(self.deadline - time.monotonic()) == b"true\n"


_algebra = Algebra()


@functools.lru_cache(maxsize=10_000)
def _ask(a, g, relation):
    """Are the expressions a and g equal (relation =), or multiples of each other (~), positive ones (< and <=)?"""
    a, g = _for_parser(a), _for_parser(g)
    return a is not None and g is not None and _algebra.ask(a, g, relation)


def _answer_questions():
    """The other process: questions as JSON lines on standard input, verdicts on standard output, until the input ends."""
    import logging
    import resource

    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    _identical(r"\sqrt{2}", r"\frac{2}{\sqrt{2}}", "=")                      # imports and warms up
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            verdict = _identical(*json.loads(line))
        except Exception:                                                    # what cannot be parsed is not equal
            verdict = False
        print(json.dumps(bool(verdict)), flush=True)


def _identical(a, g, relation):
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, latex2sympy
    from math_verify import verify
    from sympy import Expr, I, Rational

    a, g = (latex2sympy(text, is_real=True, convert_degrees=True, normalization_config=NormalizationConfig(
        boxed="none", malformed_operators=True), conversion_config=ConversionConfig(
            lowercase_symbols=False, interpret_as_mixed_fractions=False)) for text in (a, g))
    if not (isinstance(a, Expr) and isinstance(g, Expr)):
        return False
    a, g = (e.xreplace({symbol: I for symbol in e.free_symbols if symbol.name == "i"}) for e in (a, g))
    symbols = sorted(a.free_symbols | g.free_symbols, key=str)
    random, ratio = Random(0), None
    for point in range(5 if symbols else 1):
        values = {symbol: Rational(random.randint(20, 200) * (4 * point + 1) * random.choice((1, -1) if point > 1 else (1,)), 97)
                  for symbol in symbols}
        x, y, difference = (e.evalf(25, subs=values, maxn=100 if symbols else 1500) for e in (a, g, a - g))
        if not difference.is_number:                                         # f(x), a derivative, a variable sum
            return relation == "=" and verify(a, g, timeout_seconds=None)
        if relation != "=":
            if x == 0 or y == 0 or not (x / y).is_finite or ratio and abs(x / y / ratio - 1) > 1e-15 or relation != "~" and not x / y > 0:
                return False
            ratio = x / y
        elif not difference.is_finite or any(p != 0 and p._prec > 1 for p in difference.as_real_imag()):  # 1 bit: all cancelled
            return False
    return True


def grade_math(response: str, gold: str | list[str]) -> bool:
    r"""Is the last \boxed{} of `response` equal to `gold`, or to one of its alternatives? Rules: top of file.

    Never raises on a response and takes at most 2 s (once 1 s more, to start the other process of rule 12); plain numbers
    take microseconds. Raises ValueError when gold is not text or has no alternatives.
    """
    golds = [gold] if isinstance(gold, str) else gold
    if not isinstance(golds, list) or not golds or not all(isinstance(g, str) and g.strip() for g in golds):
        raise ValueError(f"gold must be an answer or a list of alternative answers, none of them empty, got {gold!r}")
    answer = _last_box(response)
    if answer is None or len(answer) > LONGEST_BOX:
        return False
    if label := re.fullmatch(r" *\\(?:text|textbf|mathrm|mathbf)\{ *\(([A-Z])\) *\}[\\, ]*(.*[^\\,. }].*)", answer):
        answer = label[1] if any(re.fullmatch(r"\W*(?:text\w*\W*)?[A-Z]\W*", g) for g in golds) else label[2]
    with _algebra.lock:
        _algebra.deadline = time.monotonic() + SECONDS
        try:
            answer, *golds = (_substitute(NOTATION, text.translate(SIGNS)) for text in (answer, *golds))
            return any(_squash(answer) == _squash(g) != "" or _same(_tree(answer, tree[0] != "list"), tree)
                       for g, tree in ((g, _tree(g)) for g in golds))
        except (TimeoutError, RecursionError):
            return False


if __name__ == "__main__":
    _answer_questions()
