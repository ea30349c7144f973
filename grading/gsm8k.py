r"""Is this answer correct? The same grader gives the reward in training and the accuracy in evaluation.

What can be read in two ways is incorrect, because a false reward is learned and exploited, while a missed one costs
little. Only the response is read, never the prompt, and nothing in it is evaluated as Python.

Start reading with `grade_gsm8k`, which finds the markers (rule 5). It calls `_sentence_value`, which takes equations
apart (rule 4). That calls `_side_value`, which reads one number (rules 1 to 3). `_answers` tells which of the sentences
after the answer count (rule 5).

GSM8K: the answer is the one number that the text after the marker `####` states. The text before the marker is working.

 1 Numbers are compared as exact fractions: 18 = 18.00 = 1.8e1 = 1.8 × 10^1 = 36/2 = \frac{36}{2} = 18:00, 100 = 10²,
   2½ = 5/2. Commas must group thousands (1,080, never 1,08), and so must non-breaking and thin spaces. A number has at
   most 20 digits on either side of the point, and 2 in an exponent. Digits and signs may be those of other scripts and
   widths (１８, −18, 18％).
 2 Some text is ignored: currency signs, %, brackets, markdown, \boxed{}, \text{}, \( \), \$, special tokens, a final
   full stop, and words in Latin letters (also units: cm^2, m2, m²). So 18% is 18, as in GSM8K, and 2 dozen is 2.
 3 An answer is incorrect if it has one of these: a second number in the sentence (3 4 5; 10-20; 4 1/2; 72 (48+24);
   1 080), an operator at the number (x-18, 18+, 18!, < 18, ±18), a word that makes it another number or none (or, not,
   half, million, twenty, 18k), or any character that is not known here.
 4 The last side of an equation counts, and nothing else is evaluated: 2+3 = 5 is 5. An earlier side that reads as a
   number must be equal to it, so 3 = 5 is incorrect. A number before a bracket with working must be equal to it, too,
   so 17 (9 + 9 = 18) is incorrect.
 5 The last marker counts, unless it is empty, as in `#### 18 ####`. The first sentence or line with a digit after it
   states the answer. All later ones with a digit must state the same value, so conflicts and further working are
   incorrect. But a later sentence does not count when it talks about the solution (I checked it in 2 ways; see step 2)
   or about a number of the question (the 3 friends; he had 25 at first; a week has 7 days). In doubt it counts. An
   earlier marker that states a value, or begins with a number, must state that value, too. Other earlier markers are
   headings (`#### Add 3 and 4`, also `#### Step 1: Add 3`). An answer with more than 2,000 characters after the last
   marker is incorrect, which bounds the cost.

MATH-style answers have a grader of their own in latex.py (rules 6 to 12). grade_math is imported from there.
"""
import re
from collections import deque
from fractions import Fraction
from itertools import islice

from grading.latex import DECOR, HIGH, OTHER_VALUE, PLAIN, Characters, L, grade_math, plain, substitute

__all__ = ["grade_gsm8k", "grade_last_number", "grade_math", "grade_stated", "gsm8k_gold", "is_number", "states_gold"]
LONGEST = 2000
SIGNS = Characters(PLAIN | {ord("℃"): "°C"})
NUMBER = re.compile(r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|[0-9]{1,20})"
                    r"(?:\.[0-9]{1,20}|:00(?![0-9]))?(?:[eE][-+]?[0-9]{1,2}(?![0-9]))?")
POWER = r"(?:\^([-+]?[0-9]{1,2})(?![0-9]))?"
SIGNED = re.compile(rf"(?:([-+])[{DECOR}]*)?({NUMBER.pattern}){POWER}(?:\s*/\s*({NUMBER.pattern}){POWER})?")
# What may stand around the number, one character at a time. A match that fails then cannot backtrack.
TEXT = re.compile(rf"(?:[{L}{DECOR}.,:'’\"()\[\]¢%°]|(?<=[{L}])-|/(?=\s?[{L}]))*")
TOUCHES = re.compile(rf"[{L}.,)\]][\"(\[*_]*$")  # x18, .5, f(18), (x)18
MULTIPLIER = re.compile(rf"[{DECOR})\]-]*(?:[kKMBTxe]|bn|mn)(?![{L}])")  # 18k, 18x, 2e, but not 18 m (metres)
HEADING = re.compile(r"\W*(?:[A-Za-z]+ )?[0-9]+ ?[:.)]\W*[A-Za-z]"    # #### Step 1: ..., #### 2. ..., #### Step 1
                     r"|\W*(?i:step|part|day|case) [0-9]+\W*\Z")
TITLED = re.compile(r"\W*[0-9]+\.\W*(?:I|We|My|This|It|The|There|Note|A|An|All|Checked|Verified)\b")  # 18. I checked it
WORKING = re.compile(r"([^(]*(?:\*\*\s*|[^\s0-9*(]\s*|[0-9]\s+))\([^=]*=")  # 18 (9 + 9 = 18), but not 2(4 + 5) = 18
STATES = re.compile(rf"[{DECOR}(\[]*[-+]?[{DECOR}]*[0-9]")           # begins with a number
# What a sentence after the answer may be: it talks about the solution (I checked it in 2 ways; see step 2), or about a
# number of the question (the 3 friends; he had 25 at first; a week has 7 days). Any other one states an answer.
ANSWERS = re.compile(
    rf"[=≈→⇒×÷+<>]|(?<![0-9]):[{DECOR}(\[]*[-+]?[0-9]|\b(?:so|thus|hence|therefore|actually|wait|sorry|or|instead|rather"
    r"|alternatively|otherwise|maybe|perhaps|should|could|must|mistake|wrong|correct\w*|chang\w+|final\w*|total\w*"
    r"|(?:go|goes|going|went|ends?|ended|left|stay|stick) (?:up )?with)\b", re.I)
TALK = re.compile(
    r"(?=.*\b(?:I|we|my|our|let me|let's)\b|\W*(?:double-)?(?:checked|verified|confirmed|tested|rounded|solved)\b)"
    r".*\b(?:check|verif|confirm|test|round|solv|comput|calculat|multipl|divid|subtract|add|simplif|explain)", re.I)
USED = re.compile(
    r"\b(?:in|with|by|from|after|before|during|within|using|for|on|of|used?|checked|verified|did|took|added|multiplied"
    rf"|divided|subtracted|rounded|solved|tried)[{DECOR}]*$")
COUNTED = re.compile(
    rf"[{DECOR}]*(?:[a-z]+ )?(?:ways?|methods?|approach(?:es)?|steps?|equations?|calculations?|operations?|formulas?"
    r"|facts?|assumptions?|checks?|decimals?|digits?|variables?|places)\b|%? (?:sure|certain|confident)\b")
COUNTS = re.compile(
    r"\b(?:in|with|by|using|rounded to|checked|verified|there are)\W*$"
    r"|\b(?:it|this|that|i|we|solution|answer|problem|question)\b.*\b(?:took|takes|used?|uses|needs|needed|has|have|tried|did"
    r"|is|am)\W*$|^\W*(?:took|used)\W*$", re.I)
NAMED = re.compile(rf"\b(?i:step|part|question|problem|exercise|example|equation|rule|method)[{DECOR}]*$")
THE = re.compile(rf"(?<!\bis )(?<!\bwas )(?<!\bare )\b(?i:the|these|those|all|other|both|nearest)[{DECOR}]*$")
UNITS = r"(?:second|minute|hour|day|week|month|year|dozen|inch|foot|feet|yard|mile|cent|dollar|pound|ounce)"
GIVEN = re.compile(
    r"\b(?:at first|initially|originally|start(?:s|ed)?|beg[ai]n|in the (?:question|problem|beginning))\b"
    rf"|\b[Tt]here are [0-9]+ {UNITS}s? in an? {UNITS}\b|\b(?i:an?|one) {UNITS} (?:is|has|contains) (?=[0-9])")
IS = re.compile(rf"[%{DECOR}]*(?:is|was|are|were)\b")
IT_IS = re.compile(rf"\b(?i:it|this|that|which|answer|result)(?:'s| [a-z]+)[{DECOR}]*$")
MARKUP = re.compile(r"[\\{}^~<\u00a0\u2007\u2009\u202f]")               # without it only two rules of CLEAN can match
CLEAN = [(re.compile(pattern), new, "") for pattern, new in (
    (r"(?<=[0-9])(?:[\u00a0\u2007\u2009\u202f~]|\\,)(?=[0-9]{3}(?![0-9]))", ","),  # thousands: 1\,080, not 1 080
    (r"(?<=[0-9{])~", " "),                                               # 18~dollars
    (r"<[^<>0-9\s]{1,30}>", " "),                                         # <|im_end|>, </s>, <b>
    (r"(?i)\b(?:minus|negative) (?=\$?[0-9])", "-"),
    (r"\{,\}|,\\!", ","),                                                 # LaTeX thousands: 1{,}080
    (r"(?<![0-9.,/^_}])([0-9]{1,9})\s?\\[dt]?frac\{([0-9]{1,9})\}\{([0-9]{1,9})\}",
     lambda m: f"{int(m[1]) * int(m[3]) + int(m[2])}/{m[3]} " if int(m[2]) < int(m[3]) else f"{m[1]} {m[2]}/{m[3]}"),
    (r"\\[dt]?frac\{(-?[0-9]+)\}\{([0-9]+)\}", r" \1/\2 "),
    (r"\\(?:times|cdot|div)(?![a-z])", "×"),
    (r"(?<=[0-9])\s?\^\s?\{\s?(-?[0-9]{1,2})\s?\}(?![0-9])", r"^\1"),     # 10^{-3}
    (r"(?<![0-9.,/])(?<!/ )([0-9][0-9.,]{0,30})\s?[×*]\s?10\^(-?[0-9]{1,2})(?![0-9])", r"\1e\2"),    # 1.8 × 10^1
    (r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}", r" \1 "),
    (rf"(?<=[{L}])\s?\^\s?(?:[23]|\{{[23]\}})(?![0-9])", ""), ("(?<=m)[23](?![0-9.,])", ""),  # cm^2, m^{3}, m2
    (r"\\[()\[\],;: ]", " "),
    (r"\\(?=[$%£])", ""),
    (r"\\boxed(?=\{)|[{}]", "*"))]  # * separates digits, but not a sign from its number
TAIL = [*(rule for rule in CLEAN if any(part in rule[0].pattern for part in ("u2007", "{,", "textbf", "[23]"))),
        (re.compile(r"(?<![\w.])\.(?=[0-9])"), "0.", "")]                    # thousands, \text{}, cm^2, .50
WORDS = [rule for rule in CLEAN if "negative" in rule[0].pattern or "(?<=m)" in rule[0].pattern]


def gsm8k_gold(answer: str) -> str:
    """Return the final answer of a GSM8K row: what follows the last `####` of its field `answer`, with its commas.

    Raises ValueError when there is no marker or no number after it.
    """
    _, marker, gold = answer.rpartition("####")
    if not marker:
        raise ValueError(f"no #### marker in the GSM8K answer ...{answer[-60:]!r}: write '#### 5', or give a row "
                         "without it the field 'problem' in the place of 'question'")
    _gold_value(gold)
    return gold.strip()


def grade_gsm8k(response: str, gold: str, strict: bool = False) -> bool:
    """Is the final answer of `response` equal to the number `gold` ('18', '1,234', '07')? The rules are those above.

    strict: use the rule of the original evaluation instead (openai/grade-school-math, dataset.py), to compare with
    published numbers. There the number one space after `####`, with its commas removed, must be the string gold. Of
    several markers the last counts, where the original takes the first. The strict rule accepts `#### 18 or 20` and
    refuses `#### 18.` Never raises on a response. Raises ValueError when gold is not a number.
    """
    value = _gold_value(gold)
    if strict:
        found = re.findall(r"#### (-?[0-9.,]+)", response)
        return bool(found) and found[-1].replace(",", "") == gold.strip().replace(",", "")
    parts = [part.strip() for part in re.split("####+", response)[1:] if re.search(r"\w", part)]
    *earlier, last = parts or [""]
    if len(last) > LONGEST or len(earlier) > 50:
        return False
    text = _clean(last)
    sentences = [sentence for sentence in re.split(r"[.;]\s|[\r\n]", text) if re.search(r"\d", sentence)]
    heading = HEADING.match(text) and not TITLED.match(text)
    stated = [_sentence_value(sentence) for i, sentence in enumerate(sentences)
              if i == 0 or heading or _answers(sentence, value)]
    for part in earlier:
        line = _clean(re.split(r"[\r\n]", part[:LONGEST // 10])[0])
        other = _sentence_value(line)
        if not HEADING.match(line) and (other is not None or STATES.match(line)):
            stated.append(other)
    return bool(stated) and all(v == value for v in stated)


def grade_last_number(response: str, gold: str) -> bool:
    """Is the last number of `response`, wherever it stands, equal to the number `gold`?

    The exponent of a unit is no number (98 m^2), and 1{,}080 and .50 are one each. This is for models that were not
    told to write ####. It is reported beside grade_gsm8k. As a reward it is lenient: a response is right whose last
    number is, whatever it says of it. Raises ValueError when gold is not a number.
    """
    value, text = _gold_value(gold), response if response.isascii() else response.translate(SIGNS)
    if not (last := _last_number(text)):
        return False
    cleaned = substitute(TAIL, text[max(0, last.start() - 100):][:LONGEST])      # 98 m^2 has the last number 98
    if found := _last_number(cleaned):
        last, text = found, cleaned
    before, after = text[max(0, last.start() - 30):last.start()], text[last.end():last.end() + 1]
    if after and after in HIGH or before.endswith("{") and re.search(r"frac\{[0-9]+\}\{$", before):
        return False                                                        # 2³ and 2½ are not 2
    negative = re.search(r"(?<![\w)\]])-[$£€\\]*$", before[-4:])
    return value == Fraction(re.sub(",|:00", "", last[0])) * (-1 if negative else 1)


def _last_number(text):
    """The last match of NUMBER in a text, or None."""
    numbers = deque(NUMBER.finditer(text), maxlen=1)
    return numbers[0] if numbers else None


def is_number(gold: str) -> bool:
    """Is this gold answer a number that grade_gsm8k can read?"""
    match = SIGNED.fullmatch(gold.strip())
    return bool(match) and _fraction(match) is not None


def grade_stated(response: str, gold: str) -> bool:
    """grade_gsm8k if `response` has a digit after a marker `####`, else grade_last_number: for models that forget it.

    Raises ValueError when gold is not a number.
    """
    return (grade_gsm8k if re.search(r"####.*\d", response, re.S) else grade_last_number)(response, gold)


def states_gold(response: str, gold: str) -> bool:
    """Does any number of `response` equal the number `gold`, but for its sign? A reward of 0 may be one of format."""
    value = _gold_value(gold)
    numbers = islice(NUMBER.finditer(response if response.isascii() else response.translate(SIGNS)), 10_000)
    return any(Fraction(re.sub(",|:00", "", number[0])) == abs(value) for number in numbers)


def _gold_value(gold):
    if not is_number(gold):
        raise ValueError(f"the gold answer must be a number, got {gold!r}")
    return _fraction(SIGNED.fullmatch(gold.strip()))


def _clean(text):
    """Return `text` in the notation that the patterns above expect."""
    text = plain(text, SIGNS)
    return substitute(CLEAN if MARKUP.search(text) else WORDS, text)


def _sentence_value(sentence):
    """The value that a sentence states, as a Fraction. It is None when there is no value, or several, or doubt."""
    *earlier, last = sentence.split("=")
    value = _side_value(last)
    if stated := WORKING.match(sentence):
        earlier.append(stated[1].split("=")[-1])
    conflict = OTHER_VALUE.search(sentence) or any(_side_value(side) not in (None, value) for side in earlier)
    return None if conflict else value


def _answers(sentence, value):
    """Does a sentence with a number, after the answer `value`, state an answer itself? In doubt, it does."""
    if ANSWERS.search(sentence) or HEADING.match(sentence):
        return True
    talk, given = TALK.match(sentence), GIVEN.search(sentence)
    for number in SIGNED.finditer(sentence):
        before, after = sentence[max(0, number.start() - 60):number.start()], sentence[number.end():]
        if not re.search(f"[{L}]", before) or before.endswith("*") and after.startswith("*"):    # 20 eggs, \boxed{20}
            return True
        same = _fraction(number) == value and not (MULTIPLIER.match(after) or re.match(r"\s*[-/^!]", after)
                                                   or OTHER_VALUE.search(f"{before[-8:]}#{after[:12]}"))
        named = NAMED.search(before) or COUNTED.match(after) and COUNTS.search(before)
        used = THE.search(before) or talk and (USED.search(before) or re.fullmatch(r"\W*times\W*", after))
        known = given and not IT_IS.search(before) and len(before.split()) > 1
        if not (same or named or (used or known) and not IS.match(after)):
            return True
        if not (same or named or used):
            given = None                                 # it was said of this number, and not of those after it
    return False


def _side_value(side):
    """The one number of `side`, if there is only harmless text around it. Otherwise None."""
    found = list(SIGNED.finditer(side))
    if len(found) != 1:
        return None
    match, before, after = found[0], side[:found[0].start()], side[found[0].end():]
    if match[1] and match[0][1].isspace() and re.search(f"[{L}]", before):  # is Total - 18 a dash or a sign?
        return None
    harmless = TEXT.fullmatch(before) and TEXT.fullmatch(after)
    return _fraction(match) if harmless and not (TOUCHES.search(before) or MULTIPLIER.match(after)) else None


def _fraction(match):
    """The value of a match of SIGNED. It is None when it divides by zero."""
    top, bottom = (Fraction(re.sub(",|:00", "", text or "1")) for text in match.group(2, 4))
    if top == 0 and "-" in (match[3] or "") or bottom == 0:
        return None
    top = top if match[3] is None else top ** int(match[3])
    bottom = bottom if match[5] is None else bottom ** int(match[5])
    return (-top if match[1] == "-" else top) / bottom
