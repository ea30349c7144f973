r"""Is this answer right? One grader, for the reward in training and for the accuracy in evaluation.

What can be read in two ways is wrong: a false reward is learned and exploited, a missed one costs little.
Only the response is read, never the prompt, and nothing in it is evaluated as Python.

GSM8K: the answer is the one number that the text after the marker `####` states; text before it is working.
 1 Numbers are compared as exact fractions: 18 = 18.00 = 1.8e1 = 36/2 = \frac{36}{2} = 18:00. Commas must
   group thousands (1,080; never 1,08). At most 20 digits on either side of the point, 2 in an exponent.
 2 Ignored: currency signs, %, brackets, markdown, \boxed{}, \text{}, \( \), \$, special tokens, a final full
   stop, words in Latin letters (units too: cm^2, m2). 18% is 18, as in GSM8K; 2 dozen is 2.
 3 Wrong: a second number in the sentence (3 4 5; 10-20; 4 1/2; 72 (48+24); 1 080), an operator at the number
   (x-18, 18+, 18!, < 18, ±18), a word that makes it another number or none (or, not, half, million, twenty,
   18k), any character not known here.
 4 Of an equation the last side counts; nothing is evaluated: 2+3 = 5 is 5. An earlier side that reads as a
   number must be equal (3 = 5 is wrong), and so must one before a bracket with working: 17 (9 + 9 = 18) is wrong.
 5 The last marker counts (unless empty, as in `#### 18 ####`), and every sentence or line with a digit after
   it must state the same value: repeats are right, conflicts and further working are wrong. An earlier marker
   that states a value, or begins with a number, must state it, too; others are headings (`#### Add 3 and 4`,
   also `#### Step 1: Add 3`). More than 2,000 characters after the last marker are wrong: this bounds the cost.

MATH-style answers have a grader of their own, latex.py (rules 6 to 12); grade_math is imported from there.
"""
import re
from collections import deque
from fractions import Fraction

from grading.latex import DECOR, OTHER_VALUE, L, grade_math, substitute

__all__ = ["grade_gsm8k", "grade_last_number", "grade_math", "gsm8k_gold"]
LONGEST = 2000
NUMBER = re.compile(r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|[0-9]{1,20})"
                    r"(?:\.[0-9]{1,20}|:00(?![0-9]))?(?:[eE][-+]?[0-9]{1,2}(?![0-9]))?")
SIGNED = re.compile(rf"(?:([-+])[{DECOR}]*)?({NUMBER.pattern})(?:\s*/\s*({NUMBER.pattern}))?")
# What may stand around the number, one character at a time: a failing match then cannot backtrack.
TEXT = re.compile(rf"(?:[{L}{DECOR}.,:'’\"()\[\]¢%°]|(?<=[{L}])[-²³]|/(?=\s?[{L}]))*")
TOUCHES = re.compile(rf"[{L}.,)\]][\"(\[*_]*$")  # x18, .5, f(18), (x)18
MULTIPLIER = re.compile(rf"[{DECOR})\]-]*(?:[kKMBTxe]|bn|mn)(?![{L}])")  # 18k, 18x, 2e; but 18 m is metres
HEADING = re.compile(r"\W*(?:[A-Za-z]+ )?[0-9]+ ?[:.)]\W*[A-Za-z]"    # #### Step 1: ..., #### 2. ..., #### Step 1
                     r"|\W*(?i:step|part|day|case) [0-9]+\W*\Z")
WORKING = re.compile(r"([^(]*(?:\*\*\s*|[^\s0-9*(]\s*|[0-9]\s+))\([^=]*=")  # 18 (9 + 9 = 18); not 2(4 + 5) = 18
STATES = re.compile(rf"[{DECOR}(\[]*[-+]?[{DECOR}]*[0-9]")           # begins with a number
CLEAN = [(re.compile(pattern), new) for pattern, new in (
    (r"(?<=[0-9{])~", " "),                                               # 18~dollars
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
    parts = [part.strip() for part in re.split("####+", response)[1:] if re.search(r"\w", part)]
    *earlier, last = parts or [""]
    if len(last) > LONGEST or len(earlier) > 50:
        return False
    sentences = re.split(r"[.;]\s|[\r\n]", substitute(CLEAN, last))
    stated = [_sentence_value(sentence) for sentence in sentences if re.search(r"\d", sentence)]
    for part in earlier:
        line = substitute(CLEAN, re.split(r"[\r\n]", part[:LONGEST // 10])[0])
        other = _sentence_value(line)
        if not HEADING.match(line) and (other is not None or STATES.match(line)):
            stated.append(other)
    return bool(stated) and all(v == value for v in stated)


def grade_last_number(response: str, gold: str) -> bool:
    """Is the last number of `response`, wherever it stands, equal to the number `gold`?

    For the evaluation of models that were not told to write ####, reported beside grade_gsm8k; too lenient for a
    reward. Raises ValueError when gold is not a number.
    """
    value, text = _gold_value(gold), response.replace("−", "-")
    numbers = deque(NUMBER.finditer(text), maxlen=1)
    if not numbers:
        return False
    last = numbers[0]
    negative = re.search(r"(?<![\w)\]])-[$£€\\]*$", text[max(0, last.start() - 4):last.start()])
    return value == Fraction(re.sub(",|:00", "", last[0])) * (-1 if negative else 1)


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
    if stated := WORKING.match(sentence):
        earlier.append(stated[1].split("=")[-1])
    conflict = OTHER_VALUE.search(sentence) or any(_side_value(side) not in (None, value) for side in earlier)
    return None if conflict else value


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
