r"""Is this MATH-style answer correct? The last complete \boxed{} of a response is compared with a gold answer in LaTeX.

As in gsm8k.py, what can be read in two ways is incorrect. Most answers are plain numbers, words, or lists of them, and
are decided here, exactly. Algebra is left to math-verify's parser, in a process that can be killed.

Start reading with `grade_math` at the end. It finds the answer with `_last_box` and rewrites it with `plain`, NOTATION
and CHOICE (rule 6). Then `_tree` parses it, `_same` compares two trees (rules 10 and 11), and `_same_leaf` compares two
leaves of them (rules 7 to 9). What these cannot decide goes to the other process through `_ask` (rule 12).

MATH: the answer is the content of the last complete \boxed{} (or \fbox{}), which has at most 500 characters.

 6 Notation does not count: \left, spacing, $, \text, \dfrac, \frac12, Unicode signs, digits of other scripts and widths
   (１２, x², ½, −, ％), markdown (**7**), a final full stop, "The answer is", and what follows \approx. A digit after ^
   or _ is a script of its own, so \log_2(8) is 3 and x^2\frac12 is a product. But 3–5 is a range, not a difference. A
   name before = does not count either (x = 5, f(x) = 2x), unless the gold has another name. In 2+3 = 5 every side must
   equal the gold. An option may stand with its letter: of (C) 12, C: 12, C. 12, C) 12 and \textbf{(C)} 12 the letter
   counts if the gold is a letter, and otherwise the text. Two options are no choice, and neither are C 12, C:12,
   (C)(12), (C) x and (C) - 12.
 7 Plain numbers (decimals, fractions, mixed numbers, 1.3e-27, 1.3 \times 10^{-27}) are equal exactly or not at all:
   0.333 is not 1/3. 1,000 is a thousand, except in brackets or against a list. 50% is 50 and 0.5, but
   0.5% is not 0.5.
 8 A unit is ignored if the other side has none. If both sides have one, known units are converted (300 m = 0.3 km) or
   differ (10 ft, 10 in), and other units must share a word. Degrees are a unit, except in sin, cos, tan, ... A base
   (1011_2) may be left out, too.
 9 Words are equal if they have the same letters and digits in the same order. Upper and lower case count only in lone
   letters that stand without \text. five is 5. (B), \text{B} and B are one choice.
10 Lists (a, b; a or b; a \pm b), sets and unions of intervals are equal if they have the same elements, in any order.
   But x = 1, y = 2 is 1, 2 in this order only, because nothing says which of two numbers without names is x. Tuples,
   intervals and matrices must have their elements in the same order, with the same brackets. A bare list may stand for
   a tuple. x < 3 is (-\infty, 3).
11 Equations and inequalities are equal if their left minus right sides differ by a constant factor only, which must be
   positive for < and \le.
12 The rest is read by math-verify's parser and compared as numbers, at random real values of the variables (i is
   imaginary), exactly or to 100 digits. Sums, products, limits and integrals with bounds are worked out before. What
   cannot be evaluated, and \lfloor, is compared by math-verify itself. All this is done by one other process. It is
   started when it is first needed, which takes about a second, once, and it is limited to 2 GB. An answer that takes it
   0.6 s of CPU time is incorrect. When that process cannot be interrupted, it is killed after 2 s and replaced. The
   process that grades sets no alarm and changes no signal handler, so any of its threads may grade.
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
import unicodedata
from fractions import Fraction
from random import Random

L = "A-Za-zÀ-ÖØ-öø-ɏ"  # Latin only: a letter of another script can be a numeral (18万 is 180,000)
DECOR = r"\s*_`$£€¥"
OTHER_VALUE = re.compile(
    rf"(?<![{L}])(?:or|nor|not|cannot|minus|negative|half|quarter|twice|double|squared|cubed|pi|sqrt|root"
    r"|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|[a-z]+teen|(?:twen|thir|for|fif|six|seven"
    r"|eigh|nine)ty|(?:hundred|thousand|million|billion|trillion|lakh|crore)s?|between|at least|at most"
    rf"|(?:than|over|under|above|below)(?=[{DECOR}]+[0-9]))(?![{L}])|n['’]t(?![{L}])", re.I)


def substitute(replacements, text: str) -> str:
    """Return `text` after every (pattern, replacement, needed text) of a list, in order.

    A pattern is not tried on a text without its needed text, which can be empty. This saves most of the time.
    """
    for pattern, new, needed in replacements:
        if needed in text:
            text = pattern.sub(new, text)
    return text


# ---- both graders: one set of characters ----

class Characters(dict):
    """A table for str.translate. It gives the plain form of a character, and it fills itself as characters come."""

    def __missing__(self, code):
        character = chr(code)
        digit, parts = unicodedata.decimal(character, None), unicodedata.normalize("NFKC", character).split("\u2044")
        if digit is not None:                                                # of any script, also full-width
            self[code] = str(digit)
        elif len(parts) == 2 and all(parts):                                 # ½, but not ⅟, which waits for a number
            self[code] = rf"\frac{{{parts[0]}}}{{{parts[1]}}}"
        elif 0xFF01 <= code <= 0xFF5D or 0xFE50 <= code <= 0xFE6B or 0x1D400 <= code <= 0x1D7FF:
            self[code] = parts[0]                                            # full-width, small, bold, in italics
        else:
            self[code] = character
        return self[code]


SAME = [("‐‑‒–—―−﹘﹣˗➖", "-"), ("⁄∕", "/"), ("﹪٪", "%"), ("º˚", "°"), ("、٬", ","), ("٫", "."), ("。｡", ". "),
        ("￥", "¥"), ("￡", "£"), ("\u200b\u200c\u200d\u2060\ufeff\u00ad\ufe0e\ufe0f", "")]  # these have no width
PLAIN = {ord(character): new for characters, new in SAME for character in characters}
HIGH, LOW = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙ"
LEVEL = str.maketrans(HIGH + LOW, 2 * "0123456789+-()n")
SCRIPTS = re.compile(rf"([{HIGH}]+)[⁄∕/]([{LOW}]+)|[{HIGH}]+|[{LOW}]+")     # ³⁄₄, x¹², x₁
TOUCHING = re.compile(r"(?<=[¼-¾⅐-⅞↉])(?=\d)")                             # ½10 is no product, nor anything else
RANGE = re.compile(r"(\W*\d[\d.,]*\s*)[‒–—―](\s*\d[\d.,]*[^\w.,]*)")       # 3–5 is no difference


def plain(text: str, table: dict) -> str:
    """Return `text` with digits and signs of other kinds in their plain form: ３ as 3, − as -, x¹² as x^{12}.

    table: Characters, with what else is to be replaced.
    """
    if text.isascii() or RANGE.fullmatch(text):
        return text
    return SCRIPTS.sub(_script, TOUCHING.sub("@", text)).translate(table)


def _script(match):
    level = match[0].translate(LEVEL)
    if match[1]:
        return r"\frac{{{}}}{{{}}}".format(*level.replace("⁄", "/").replace("∕", "/").split("/"))
    sign = "^" if match[0][0] in HIGH else "_"
    return f"{sign}{level} " if len(level) == 1 else f"{sign}{{{level}}}"


# ---- MATH, rule 6: one notation ----

LONGEST_BOX, SECONDS = 500, 2.0
WORD = r"(?:text|textbf|textit|textrm|textnormal|textsf|mathrm|mathbf|mathit|mathsf|mbox|operatorname)"
FUNCTION = r"(?:arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|csc|exp|ln|log|sqrt|pi|infty|theta|alpha|beta)"
NAME = (r'(?:(?:\\angle ?[A-Z]+|\\[a-zA-Z]+|[a-zA-Z]|[A-Z]+|[a-zA-Z]{3,}|"[^"]*")(?:_(?:\w|\{[^{}]*\}))?\'?'
        r"(?: ?\( ?[a-zA-Z](?:, ?[a-zA-Z])* ?\))?|\([a-zA-Z](?:, ?[a-zA-Z])+\))")  # x, x_1, f(x), AB, (x, y)
GROUP = r"\{(?:[^{}]|\{[^{}]*\})*\}"
SIGNS = Characters(PLAIN | str.maketrans({
    "’": "'", "′": "'", "⟨": "(", "⟩": ")", "÷": "/", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "π": r"\pi ",
    "√": r"\sqrt ", "∞": r"\infty ", "°": r"^\circ ", "º": r"^\circ ", "˚": r"^\circ ", "≠": r"\ne ",
    "≈": r"\approx ", "∪": r"\cup ", "∈": r"\in ", "±": r"\pm ", "∓": r"\mp ", "∅": r"\emptyset ",
    "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "ℝ": r"\mathbb{R}", "℃": r"^\circ C"}))
B = "\\"
NOTATION = [(re.compile(pattern), new, *(needed or [""])) for pattern, new, *needed in (
    (r"\s+", " "),
    (r"\\\\(?:\[[^\]]*\])?", "\n", B),                                       # the rows of a matrix
    (r"(?:, ?(?:\\! ?)+|\{,\})(?=\d{3}(?!\d))", "", ","),                    # 10,\!080 and 10{,}080
    (r"\\\$ ?((?:\d|,\d|\.\d)+)", r'\1 "dollar"', B),
    (r"\\(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z]) ?\.?", "", B),
    (r"\\phantom ?(?:\{[^{}]*\}|.)", "", B),                                 # is not shown
    (r"\\(?:boxed|fbox|(?:display|text)style|limits)(?![a-zA-Z])|\\!|\\?[$£€]|\\[()\[\]]", ""),
    (r"\\[,;:> ]|\\q?quad(?![a-zA-Z])|~", " "), ("  +", " ", "  "),
    (r"(\d{1,20})\.(\d{0,20})\\overline ?\{(\d{1,20})\}",                   # 0.1\overline{6} is (16 - 1)/90
     lambda m: f"({int(m[1] + m[2] + m[3]) - int(m[1] + m[2])}/{(10 ** len(m[3]) - 1) * 10 ** len(m[2])})", B),
    (r"\\[dtc]frac", r"\\frac", B), (r"\\(?:emptyset|varnothing)", r"\\{\\}", B),
    (r"\\mathbb ?(?:R|\{R\})", r"(-\\infty,\\infty)", B),
    (r"\\leq?(?:slant)?(?![a-zA-Z])|<=", "≤"), (r"\\geq?(?:slant)?(?![a-zA-Z])|>=", "≥"),
    (r"\\lt(?![a-zA-Z])", "<", B), (r"\\gt(?![a-zA-Z])", ">", B), (r"\\langle", "(", B), (r"\\rangle", ")", B),
    (rf"\\{WORD} ?\{{([^{{}}]*(?:(?:\^|\\frac\{{\d+\}})\{{[^{{}}]*\}}[^{{}}]*)*)\}}",
     r' "\1" ', B),                                                          # words stand in "" from here on
    (rf"(?<![a-zA-Z\\])(?={FUNCTION}(?![a-zA-Z]))", r"\\"),                  # 2pi, sqrt(2)
    (r"\\sqrt ?\(([^()]*)\)", r"\\sqrt{\1}", B), (r"\\sqrt ?(\d+|[a-zA-Z])", r"\\sqrt{\1}", B),
    (r"\\frac ?(\d|\\pi|[a-zA-Z])", r"\\frac{\1}", B),
    (rf"\\frac ?({GROUP}) ?(\d|\\pi|[a-zA-Z])", r"\\frac\1{\2}", B), (rf"\\frac ?({GROUP}) ", r"\\frac\1", B),
    (rf"^ *(?:(?!(?:\\pi|[ei]) ?\\approx){NAME} ?)?\\approx(?![a-z])"   # x \approx 2 leaves 2,
     r"|\\approx(?![a-z]).*", "", B),                                         # and \pi \approx 3.14 leaves \pi
    (r'\^ ?\{? ?"(?:st|nd|rd|th)" ?\}?', "", "^"), (r"(?i)(?<=[\d \"])([ap])\.m\b\.?", r"\1m"),
    (r"(?<![\w)\]}*])(?<![\d)\]}] )(?<!\b[a-zA-Z] )\*\*(?=[^\s*])([^*]*[^\s*])\*\*(?![\w(\[{\\*])",
     r"\1", "**"),                                                           # **7**, but not 2**3
    *((rf"^ ?({mark}{{1,3}})([^*`\s](?:[^*`]*[^*`_\s])?)\1(?=[ .]*$)", r"\2", mark[-1]) for mark in (r"\*", "_", "`")),
    (r"\*\*", "^", "**"), (r"\^ ?(\d)(?!\d|\.\d)", r"^{\1}", "^"), (r"_ ?(\d)(?!\d|\.\d)", r"_{\1}", "_"),
    (r"\^ ?([-+]) ?(?=\})", r"^{\1}", "^"), (r"\\log ?_ ?(1\d+)", r"\\log_{\1}", r"\log"),
    (r"\^ ?\{? ?((?:\\prime(?![a-z]) ?)+)\}?", lambda m: "'" * m[1].count("prime"), B),
    (r"\+ ?(?=\\infty)", "", B), (r"(?<=\d) ?x ?(?=10\^)", r"\\times ", "^"),
    (r"\^ ?\{?\\(?:circ|degree)(?![a-z]) ?\}?", "°", "^"), (r'(?i)"? ?\bpercent\b ?"?|\\%', "%"),
    (r"(?<![\d.^_])(\d+) ?(\\frac\{\d+\}\{\d+\})", r"(\1+\2)", B),           # mixed numbers
    (r"(?<![\d./^_])(\d+) (\d+/\d+)(?![\d.])", r"(\1+\2)", "/"),
    (r"(?<=\d)(?<![\^_]\d\d) (?=\d{3}(?!\d))", "", " "),                     # 10 080
    (r'(?<![, ])[, ]*(?<![a-zA-Z\\])"?[, ]*(?:and|or)[, ]*"?(?![a-zA-Z])', ","),
    (r'"[^"]*"', lambda m: m[0].replace(",", '","'), '"'),
    (r'(?i)^[ "]*(?:(?:the )?(?:final |correct )?answer(?: is)?[: ]*"?[: ]*'
     r'|(?:the )?(?:option|choice)[ "]+(?=\(?[A-J](?![a-z])))+', ""),
    (r"[.,;: ]+$|^ +| +(?= )", ""), (r'^"?([A-J])\)"?$', r"\1", ")"))]       # a choice: C)
# An option with its letter, as NOTATION leaves it: "(C)" 12, "C. " 12, (C) 12, C: 12, C) 12. Other answers that begin
# with a letter are products, differences, names and ratios: C 12, (C)(12), (C) x, (C) - 12, C_2, C:12.
OPERATOR = (r"[-+] |[+*/^_=<>≤≥!|&,;%°'\])}]|\\(?:cdot|times|div|[pm][pm]|cup|cap|in|to|neq?|approx|equiv|mid)(?![a-z])"
            r"|[a-z](?![a-zA-Z])|\((?!\d+\+)[^(),;]*\)")
CHOICE = re.compile(
    r'(?:[" ]*"[" ]*(?:\( ?([A-Z]) ?\)|([A-Z]) ?(?:[.:)]|" ?[.:)]))'        # "(C)", "C. ", "C" .
    rf'|\([" ]*([A-J])[" ]*\)(?=[.:"]| (?!{OPERATOR}))'                      # (C), ( "C" )
    r'|([A-J])(?:[.:](?=[ "])|\)))[ .,:]*"?[ .,:]*(?=.*\w)([^ .,:^_].*)', re.S)      # C: , C. , C)
LETTER = re.compile('[" (]*[A-Z][") ]*')
NO_CHOICE = re.compile(                                                      # (C) is wrong, (C) D, (C) 12, (D) 13
    r'[" ]*(?:is|isn|was|are|nor|but|if|can|cannot|would|should|does|doesn)\b|[("]*[A-J][")]*$'
    r'|.*(?:(?<![a-zA-Z\\])"?\([" ]*[A-Z][" ]*\)|(?<![a-zA-Z\\(])[A-J]"? ?[.:)](?=[ "])|,[" (]*[A-J](?:[") ]*$|[.:)] )'
    r'|\b(?:wrong|incorrect)\b)', re.S)


def _last_box(response):
    r"""The content of the last complete \boxed{}, or None. A box inside another one is a part of its content."""
    opened, last = [], None
    for match in re.finditer(r"\\(?:boxed|fbox)\s*\{|\\boxed (\d+)|\\.|[{}]", response, re.S):
        if match[1]:
            last = match[1]                                                  # \boxed 5
        elif match[0] == "}":
            start, is_box = opened.pop() if opened else (0, False)
            last = response[start:match.start()] if is_box else last
        elif match[0][-1] == "{" and match[0] != r"\{":
            opened.append((match.end(), len(match[0]) > 1))
    return last


# ---- MATH, rules 10 and 11: an answer as a tree of nodes (kind, label, children) ----
#
#     kind              label                                      children
#     leaf              empty                                      its text
#     list, set, union  empty                                      its elements
#     tuple             its brackets                               its elements
#     matrix            is it a determinant?, and its row lengths  its cells
#     named             the name before = or in an inequality      one node
#     relation          its signs                                  the texts of its sides

TOKEN = re.compile(r'\\[a-zA-Z]+|\\.|"[^"]*"|.', re.S)
OPEN, CLOSE = ("(", "[", "{", r"\{"), (")", "]", "}", r"\}")
MATRIX = re.compile(r"\\begin ?\{([pbvBV]?matrix|array)\}(?: ?\{[lcr|]+\})?(.*?)\n? ?\\end ?\{\1\}", re.S)
THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")
SET_OF = re.compile(rf" ?{NAME}(?: ?\\in[^|:]*?)? ?(?:\\mid|:|\|)")          # {x | x < 3}


def _split(text, separators):
    """text cut at the separators that stand outside all brackets, and the separators found."""
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
        return "matrix", ("v" in matrix[1], *map(len, rows)), [_tree(cell) for row in rows for cell in row]
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
    if len(parts) == 2 and not parts[1] and text.startswith(OPEN):  # one pair of brackets is around it all
        opening = text[:1 + (text[0] == "\\")]
        inside = parts[0][len(opening):]
        items = _split(inside, ",;")[0]
        if opening == r"\{" and SET_OF.match(inside):
            return _tree(SET_OF.sub("", inside, count=1))
        if opening == r"\{" or opening == "{" and len(items) > 1:
            return "set", "", _flat(_tree(item) for item in items if item.strip())
        if len(items) == 1 and (opening in "({" or MATRIX.fullmatch(inside.strip())):
            return _tree(inside)
        return "tuple", opening + closed[0], [_tree(item) for item in items]
    if re.search(r"\\[pm][pm](?![a-z])", text):
        return "list", "", [_tree(text.replace(r"\pm", up).replace(r"\mp", down)) for up, down in ("+-", "-+")]
    return "leaf", "", text


def _flat(nodes):
    return [item for node in nodes for item in (node[2] if node[0] == "list" else [node])]


def _relation(sides, signs):
    if set(signs) <= set(">≥"):
        sides, signs = sides[::-1], ["<" if sign == ">" else "≤" for sign in signs[::-1]]
    first, last = re.fullmatch(NAME, sides[0]), re.fullmatch(NAME, sides[-1])
    if signs[0] == "=" and first:
        return "named", _squash(sides[0]), [_relation(sides[1:], signs[1:]) if signs[1:] else _tree(sides[1])]
    if set(signs) <= set("<≤"):
        if len(sides) == 2 and (first or last):                              # x < 3 is -oo < x < 3
            sides, signs = ([r"-\infty", *sides], ["<", *signs]) if first else ([*sides, r"\infty"], [*signs, "<"])
        if len(sides) == 3 and re.fullmatch(NAME, sides[1]):
            brackets = ("(" if signs[0] == "<" else "[") + (")" if signs[1] == "<" else "]")
            return "named", _squash(sides[1]), [("tuple", brackets, [_tree(sides[0]), _tree(sides[2])])]
    return "relation", "".join(signs), sides


def _same(a, g):
    """Is the tree `a` of the answer equal to the tree `g` of the gold?"""
    kinds = a[0], g[0]
    if {*kinds} <= {"named", "relation"} and not (kinds == ("named", "named") and a[1] == g[1]):
        return _same_relation(a, g)
    if "named" in kinds:
        if "union" in kinds:
            return False
        return _same(*(node[2][0] if node[0] == "named" else node for node in (a, g)))
    if "relation" in kinds:                                                  # 2+3 = 5 against 5
        chain, leaf = (a, g) if a[0] == "relation" else (g, a)
        return leaf[0] == "leaf" and {*chain[1]} == {"="} and all(_same_leaf(side, leaf[2]) for side in chain[2])
    if kinds == ("leaf", "leaf"):
        return _same_leaf(a[2], g[2])
    if "tuple" in kinds or "matrix" in kinds:
        alike = a[:2] == g[:2] or {a[:2], g[:2]} == {("tuple", "()"), ("list", "")}
        return alike and len(a[2]) == len(g[2]) and all(map(_same, a[2], g[2]))
    left, right = ([node] if node[0] == "leaf" else list(node[2]) for node in (a, g))
    if {_named_apart(left), _named_apart(right)} == {True, False}:           # x = 1, y = 2 against 1, 2
        return len(left) == len(right) and all(map(_same, left, right))
    if len(left) != len(right) or len(left) > 40 or kinds.count("union") == 1 and not all(
            child[0] == "named" for child in (right if a[0] == "union" else left)):  # x < 1 or x > 2
        return False
    for item in right:
        match = next((i for i, other in enumerate(left) if _same(other, item)), None)
        if match is None:
            return False
        left.pop(match)
    return True


def _named_apart(nodes):
    """Have all elements of a list names, and not all one name with subscripts (x_1, x_2)?"""
    return all(node[0] == "named" for node in nodes) and len({node[1].split("_")[0] for node in nodes}) > 1


def _same_relation(a, g):
    """Are the left minus right sides of two relations multiples of each other?"""
    differences = []
    for kind, label, children in (a, g):
        if kind == "named":
            label, children = "=", [label, children[0][2] if children[0][0] == "leaf" else None]
        if len(children) != 2 or None in children:
            return False
        differences.append((label, f"({children[0]})-({children[1]})"))
    (sign, left), (other, right) = differences
    return sign == other and _ask(left, right, sign.replace("=", "~"))


# ---- MATH, rules 7 to 9: leaves ----

POWER = r"10\^(?:\{[-+]?\d{1,3}\}|[-+]?\d{1,3})"
DECIMAL = rf"[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{{1,3}}|(?:\\times|\\cdot|\*){POWER})?|{POWER})"
QUOTIENT = re.compile(rf"([-+]?)\\frac\{{({DECIMAL})\}}\{{({DECIMAL})\}}|()({DECIMAL})(?:/({DECIMAL}))?")
MIXED = re.compile(r"([-+]?)\((\d+)\+([^()]*)\)")
BASE = re.compile(r'"?(-?)\(?([\dA-F.]*\d[\dA-F.]*|[A-F]+(?=.*_\{1\d\}))\)?"?_(?:(\d)|\{(\d+)\})')
TRIG = re.compile(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)")
UNIT = re.compile(r'(?<=[\d}) i"])(?: ?(?:"[^"]*"|[°%/]|(?<=°)[CFK]|(?<=° )[CFK]|(?<![a-zA-Z\\])[a-zA-Z]{2,}\.?)'
                  r"(?: ?\^ ?(?:\d|\{-?\d\}))?)+$")
UNITS = {name: (kind, Fraction(size)) for kind, table in (
    ("length", "mm:1 millimeter:1 cm:10 centimeter:10 m:1e3 meter:1e3 km:1e6 kilometer:1e6 "
               "in:25.4 inch:25.4 inche:25.4 ft:304.8 foot:304.8 feet:304.8 yd:914.4 yard:914.4 "
               "mi:1609344 mile:1609344"),
    ("time", "s:1 sec:1 second:1 min:60 minute:60 h:3600 hr:3600 hour:3600 day:86400 week:604800"),
    ("mass", "mg:1 g:1e3 gm:1e3 gram:1e3 kg:1e6 kilogram:1e6"), ("weight", "oz:1 ounce:1 lb:16 pound:16"),
    ("volume", "ml:1 milliliter:1 l:1e3 liter:1e3"), ("money", "cent:1 dollar:100 usd:100"),
    ("angle", "°:1 degree:1 deg:1"), ("am", "am:1"), ("pm", "pm:1"), ("rate", "mph:1"), ("frequency", "hz:1"))
    for name, size in (entry.split(":") for entry in table.split())}
COUNTED = "zero one two three four five six seven eight nine ten eleven twelve".split()
PROSE = re.compile(r"""(?:[\w\s".,:;'()?]|(?<=[a-zA-Z])-(?=[a-zA-Z]))*""")
WORDS = re.compile('"|[a-zA-Z]{3}|[A-Z]{2}|:')


def _squash(text):
    """Return `text` without quotes, needless braces and needless spaces."""
    return re.sub(r"(?<!\w) | (?!\w)", "", re.sub(r"\{ ?(\w) ?\}", r"\1", text.replace('"', " ")).strip())


def _number(text):
    """The exact value of a plain number, or None."""
    if len(text) > 100 or re.search(r"\d +\d", text):
        return None
    text = re.sub(r'[ "]', "", text)
    if mixed := MIXED.fullmatch(text):
        part = _number(mixed[3])
        return part and (int(mixed[2]) + part) * (-1 if mixed[1] == "-" else 1)
    match = QUOTIENT.fullmatch(text)
    if not match:
        return None
    sign, *parts = match.groups("1")[:3] if match[2] else match.groups("1")[3:]
    parts = [re.sub(r"(?:\\times|\\cdot|\*)10\^", "e", re.sub("[{}]", "", part)) for part in parts]
    top, bottom = (Fraction(re.sub(r"^([-+]?)10\^", r"\g<1>1e", part)) for part in parts)
    return None if bottom == 0 else top / bottom * (-1 if sign == "-" else 1)


def _unit(text):
    """Return a leaf as (value, list of the words of its unit)."""
    match = UNIT.search(text)
    if not match or TRIG.search(text) or not re.search(r"\d|\\pi", text[:match.start()]):
        return text, []
    unit = match[0].lower()
    bare = re.findall(r"[a-z]{2,}", re.sub(r'"[^"]*"', "", unit))
    if OTHER_VALUE.search(unit) or "dozen" in unit or any(
            len(word) < 4 and not {word, word.rstrip("s")} & {*UNITS} for word in bare):  # 5xy is a product
        return text, []
    unit = re.sub(r"square|sq\b\.?", "^2", re.sub(r"cubic|cu\b", "^3", unit))
    words = [re.sub('[ {"]', "", word) for word in re.findall(r'° ?"? ?[cfk]\b|[a-z]+|[°%]|\^ ?\{?-?\d', unit)]
    words = [word[:-1] if word[-1] == "s" and len(word) > 2 else word for word in words]
    return text[:match.start()], [UNITS.get(word, word) for word in words]


def _scale(a, g):
    """How many of the unit g make one of the unit a. It is None when the two cannot be compared."""
    if not a or not g:
        return 1
    if len(a) == len(g) == 1 and isinstance(a[0], tuple) and isinstance(g[0], tuple):
        return a[0][1] / g[0][1] if a[0][0] == g[0][0] else None
    powers = [{word for word in unit if word[0] == "^"} for unit in (a, g)]
    return 1 if powers[0] == powers[1] and {*a} & {*g} - powers[0] else None


def _same_leaf(a, g):
    """Is a leaf `a` of the answer equal to a leaf `g` of the gold?

    They are compared as text, in their base, as numbers with a unit, and as words.
    """
    if _squash(a) == _squash(g):
        return bool(_squash(a))
    a, g = (text.strip().strip('"') if re.fullmatch(r' ?"[^"]*\d[^"]*" ?', text) else text for text in (a, g))
    bases = [BASE.fullmatch(re.sub(" ", "", text)) for text in (a, g)]
    if any(bases):
        if any(not match and re.fullmatch("[A-F]", _squash(text)) for match, text in zip(bases, (a, g), strict=True)):
            return False                                                     # a choice, not a digit of base 12 to 16
        digits = {match[1] + match[2] if match else _squash(text) for match, text in zip(bases, (a, g), strict=True)}
        return len(digits) == 1 and len({match[3] or match[4] for match in bases if match}) == 1
    if ":" in a + g:                                                         # times and ratios
        a, g = (re.sub(r"(?<!\d)0(?=\d:)", "", re.sub(" ?: ?", ":", text)) for text in (a, g))
    (a, a_unit), (g, g_unit) = _unit(a), _unit(g)
    x, y = _number(a), _number(g)
    if ("%" in a_unit) != ("%" in g_unit) and x is not None and y is not None:
        return not (a_unit and g_unit) and ((x / 100 == y or x == y and abs(y) > 1) if a_unit else x in (y, y / 100))
    scale = _scale(a_unit, g_unit)
    if scale is None:
        return False
    if x is not None and y is not None:
        return x * scale == y
    if PROSE.fullmatch(a) and PROSE.fullmatch(g) and (WORDS.search(a) or WORDS.search(g)):
        words = [re.findall(r"[^\W_]+|:", text.lower()) for text in (a, g)]
        a, g = ([str(COUNTED.index(word)) if word in COUNTED else word for word in text] for text in words)
        return a == g != []
    primes = {"".join(re.findall(r"(?<=[a-zA-Z)}])'+", text)) for text in (a, g)}        # the parser would drop them
    return scale == 1 and len(primes) == 1 and _ask(a, g, "=")


# ---- MATH, rule 12: algebra, in another process ----

class Algebra:
    """The other process. It is asked one question at a time, and killed and replaced when it misses `deadline`."""

    def __init__(self):
        self.process, self.lock, self.deadline = None, threading.RLock(), 0.0

    def start(self):
        """Start the other process. It is ready when it says so, after about a second."""
        self.process = subprocess.Popen([sys.executable, os.path.abspath(__file__)], stdin=subprocess.PIPE, bufsize=0,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
        self.ready = False

    def read(self, seconds):
        """The next line that it writes. Raises TimeoutError after so many seconds, and then replaces it."""
        if not select.select([self.process.stdout], [], [], max(0.0, seconds))[0]:
            self.process.kill()
            self.process.wait()
            self.start()  # it gets ready while the caller goes on
            raise TimeoutError
        return self.process.stdout.readline()

    def ask(self, *question):
        """Is its verdict on these arguments of _identical true? Raises TimeoutError at the deadline."""
        # poll() is not None when it is dead, or when it belongs to another process, of which this one is a fork.
        if self.process is None or self.process.poll() is not None:
            self.start()
        if not self.ready:
            began = time.monotonic()
            self.ready = self.read(60.0) == b"ready\n"
            self.deadline += time.monotonic() - began
            if not self.ready:
                raise RuntimeError("the process for algebra ended at once; is math-verify installed? "
                                   f"`{sys.executable} {__file__}` shows why")
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.process.stdin.write(json.dumps([left, *question]).encode() + b"\n")
        return self.read(left) == b"true\n"


_algebra = Algebra()


TOO_MUCH = re.compile(r'["%:;&\n]|(?<!_)\d +\d|(?<![\d^_])\d+ ?\{|\d{41}|\^\{?-?\d{6}|[^\x20-\x7e]'
                      r"|\\int(?!.*d ?(?:\\[a-z]+|[a-zA-Z])(?![a-zA-Z]))")               # an integral without dx

# A dot goes between two factors, as otherwise 2(3) is read as 2 + 3. (2{3} would be, too; it is no answer.) But
# \sin^{2}(t) and \sum_{k=1}^{3}(k) are one factor.
PRODUCT = re.compile(
    r"(\\(?:(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|exp|ln|log|lg|sum|prod|i*o?int|lim|max|min|gcd|lcm)(?![a-zA-Z])"
    rf"(?: ?[_^] ?(?:{GROUP}|[^{{\s]))+ ?(?:[(\[]|\\frac|\\[dt]?binom|\d)?)"
    r"|(?<=\d) ?(?=[(\[]|\\frac|\\[dt]?binom|\\Gamma)|(?<=\d\}) ?(?=[(\[\d]|\\frac|\\[dt]?binom|\\Gamma)")

# What gets a name of its own, because the parser takes it for something else: \gamma (a function or a constant), \beta(
# (a function), I (the imaginary unit), E_0 (a power of e), \odot (unknown to it), derivatives (they would be 0), and d,
# which would swallow what follows (d\frac{a}{b} would be d a b). \Gamma(x) is a function. The last two alternatives are
# commands and subscripts, which stay as they are.
SUBSCRIPT = rf"_ ?(?:{GROUP}|\\[a-zA-Z]+|\w)"
OWN = re.compile(
    r"(?P<letter>(?:\\(?:gamma|beta)(?![a-zA-Z])|\\Gamma(?![a-zA-Z]| ?\()|[eE](?= ?_)|I(?! ?_))"
    rf"(?: ?{SUBSCRIPT})?)|_ ?\{{?\\(?P<sign>odot|oplus)(?![a-zA-Z])\}}?"
    rf"|(?P<derived>\\frac ?(?=\{{ ?d){GROUP} ?(?=\{{ ?d ?(?:[a-zA-Z]|\\[a-z]+ ?\}})){GROUP}"
    rf"|d ?\\?[a-zA-Z]+ ?/ ?d ?\\?[a-zA-Z]+|d(?! ?_))|\\[a-zA-Z]+|{SUBSCRIPT}")
INTEGRAL = re.compile(r"\\i*o?int(?![a-z])")


def _own_name(match):
    if match["sign"]:
        return f"_{{{match['sign']}}}"
    own = match["letter"] or (None if INTEGRAL.search(match.string) else match["derived"])
    return "X_{" + re.sub(r"\\frac|[^a-zA-Z0-9]", "", own) + "}" if own else match[0]


@functools.lru_cache(maxsize=10_000)
def _ask(a, g, relation):
    """Are the expressions a and g equal (relation =), multiples of each other (~), or positive multiples (< and ≤)?"""
    a, g = _for_parser(a), _for_parser(g)
    return a is not None and g is not None and _algebra.ask(a, g, relation)


def _for_parser(text):
    """Return `text`, without decimals, as math-verify's parser reads it, or None if it is too big or no mathematics."""
    text = re.sub(r' ?"(\\?\w*)" ?', r"\1", text).replace("°", r"^\circ ").strip()
    if not text or TOO_MUCH.search(text):
        return None
    text = re.sub(r"(\d*)\.(\d+)", lambda m: rf"(\frac{{{int(m[1] + m[2])}}}{{{10 ** len(m[2])}}})", text)
    return PRODUCT.sub(lambda m: m[1] or r"\cdot ", OWN.sub(_own_name, text))


def _answer_questions():
    """What the other process does: it reads questions (JSON lines) from stdin, and writes verdicts to stdout."""
    import logging
    import resource
    import signal

    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    _identical(r"\frac{\sqrt{2}x^{2}-\sin(3t)}{2}", r"\frac{x^{2}}{\sqrt{2}}-\frac{1}{2}\sin(3t)", "=")  # to warm up
    signal.signal(signal.SIGPROF, signal.default_int_handler)  # raises KeyboardInterrupt, except in a long C call
    print("ready", flush=True)
    for line in sys.stdin:
        left, *question = json.loads(line)
        try:
            signal.setitimer(signal.ITIMER_PROF, 0.3 * left)
            verdict = _identical(*question)
        except (Exception, KeyboardInterrupt):  # it cannot be parsed, takes too long, or needs too much memory
            verdict = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(bool(verdict)), flush=True)


def _identical(a, g, relation):
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, latex2sympy
    from math_verify import verify
    from sympy import Expr, I, Integral, Limit, Product, Rational, Sum, ceiling, floor

    config = {"normalization_config": NormalizationConfig(boxed="none", malformed_operators=True),
              "conversion_config": ConversionConfig(lowercase_symbols=False, interpret_as_mixed_fractions=False)}
    a, g = (latex2sympy(text, is_real=True, convert_degrees=True, **config) for text in (a, g))
    if not (isinstance(a, Expr) and isinstance(g, Expr)):
        return False
    if a == g and relation == "=" and a.has(Integral, Limit, Product, Sum):
        return True
    a, g = (e.doit() if e.has(Integral, Limit, Product, Sum) and all(
        len(bounds) == 3 for part in e.atoms(Integral) for bounds in part.limits) else e for e in (a, g))
    a, g = (e.xreplace({symbol: I for symbol in e.free_symbols if symbol.name == "i"}) for e in (a, g))
    symbols = sorted(a.free_symbols | g.free_symbols, key=str)
    random, ratio = Random(0), None
    for point in range(5 if symbols else 1):                                 # 0.2 to 2, then up to 34, also negative
        signs = (1, -1) if point > 1 else (1,)
        values = {symbol: Rational(random.randint(20, 200) * (4 * point + 1) * random.choice(signs), 97)
                  for symbol in symbols}
        x, y, difference = (e.evalf(25, subs=values, maxn=100 if symbols else 400) for e in (a, g, a - g))
        if not difference.is_number:                                         # f(x), a derivative
            return relation == "=" and verify(a, g, timeout_seconds=None)
        if relation == "=":
            if not difference.is_finite or any(p != 0 and p._prec > 1 for p in difference.as_real_imag()):
                return False  # a precision of 1: all digits have cancelled
        elif x == 0 or y == 0 or not (x / y).is_finite or relation != "~" and not x / y > 0:
            return False
        elif ratio is not None and abs(x / y / ratio - 1) > 1e-15:
            return False
        else:
            ratio = x / y
    if symbols and a.has(floor, ceiling):
        return verify(a, g, timeout_seconds=None)
    return relation != "=" or not ((a - g).doit().is_Rational and (a - g).doit())   # 2^{4950} + 1 is not 2^{4950}


def grade_math(response: str, gold: str | list[str]) -> bool:
    r"""Is the last \boxed{} of `response` equal to `gold`, or to one of its alternatives? The rules are at the top.

    Never raises on a response. A plain answer takes a quarter of a millisecond. Algebra takes about ten milliseconds,
    and at most 2 s (rule 12). Raises ValueError when gold is not text or has no alternatives.
    """
    golds = [gold] if isinstance(gold, str) else gold
    if not isinstance(golds, list) or not golds or not all(isinstance(g, str) and g.strip() for g in golds):
        raise ValueError(f"gold must be an answer or a list of alternative answers, none of them empty, got {gold!r}")
    answer = _last_box(response)
    if answer is None or len(answer) > LONGEST_BOX:
        return False
    answer, *golds = (substitute(NOTATION, plain(text, SIGNS)) for text in (answer, *golds))
    answers = [answer]
    if (choice := CHOICE.fullmatch(answer)) and not NO_CHOICE.match(choice[5]):
        text = choice[5] if choice[5].count('"') % 2 == 0 else f'"{choice[5]}'
        answers = [next(filter(None, choice.groups()))] if any(map(LETTER.fullmatch, golds)) else [text, answer]
    with _algebra.lock:
        _algebra.deadline = time.monotonic() + SECONDS
        try:
            return any(_squash(a) == _squash(g) != "" or _same(_tree(a, tree[0] != "list"), tree)
                       for g, tree in ((g, _tree(g)) for g in golds) for a in answers)
        except (TimeoutError, BrokenPipeError, RecursionError):
            return False


if __name__ == "__main__":
    _answer_questions()
