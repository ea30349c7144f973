"""Eq. (Q): the paper's test vectors, exact rational arithmetic, and where sentences end."""
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from pivot import candidate_ratios, draw_pivot, fixed_ends, pivot_distribution, sentence_ends
from recoverability import Recoverability, sigmoid

QWEN = Path(__file__).parents[3] / "shared" / "data" / "qwen2.5_0.5b_instruct"


def exact_q(n, p_success, gamma):
    """Eq. (Q) in exact fractions (integer gamma): the slow twin."""
    weights = [Fraction(p) * Fraction(i + 1, n + 1) ** gamma for i, p in enumerate(p_success)]
    return [float(w / sum(weights)) for w in weights]


def test_vectors_of_the_paper():
    r = candidate_ratios(4)
    np.testing.assert_allclose(r, [0.2, 0.4, 0.6, 0.8], rtol=1e-15)
    q = pivot_distribution(r, np.ones(4), 2.0)
    np.testing.assert_allclose(q, [1 / 30, 4 / 30, 9 / 30, 16 / 30], rtol=1e-12)
    q = pivot_distribution(r, sigmoid(2 - 4 * r), 2.0)
    np.testing.assert_allclose(q, [0.0733, 0.2285, 0.3447, 0.3534], atol=5e-5)


@pytest.mark.parametrize("gamma", [-20, -1, 0, 1, 2, 3, 400])
@pytest.mark.parametrize("p", [[1, 1, 1, 1, 1], [1e-300, 1e-300, 1e-300, 1e-300, 1e-300],
                               [1e-300, 0.5, 1e-9, 0, 1], [0.9, 0.7, 0.5, 0.3, 0.1]])
def test_equals_exact_fractions(gamma, p):
    q = pivot_distribution(candidate_ratios(5), p, gamma)
    np.testing.assert_allclose(q, exact_q(5, p, gamma), rtol=1e-11, atol=1e-300)


def test_sums_to_one_and_keeps_extremes_apart():
    q = pivot_distribution(candidate_ratios(1000), np.ones(1000), -20.0)      # (1/1001)^-20 = 1e60
    assert q.sum() == pytest.approx(1, abs=1e-12)
    assert pivot_distribution([1.0], [1.0], 2.0) == [1.0]
    assert q[0] > 0.99999 and q[1] / q[0] == pytest.approx(2.0**-20, rel=1e-9)


@pytest.mark.parametrize("name, call", [
    ("ratios", lambda: pivot_distribution([], [], 2.0)),
    ("ratios", lambda: pivot_distribution([0.0, 0.5], [1, 1], 2.0)),
    ("ratios", lambda: pivot_distribution([0.5, 1.1], [1, 1], 2.0)),
    ("ratios", lambda: pivot_distribution([[0.5, 0.6]], [[1, 1]], 2.0)),
    ("p_success", lambda: pivot_distribution([0.5], [0.0], 2.0)),
    ("p_success", lambda: pivot_distribution([0.5, 0.6], [1.0, 1.1], 2.0)),
    ("p_success", lambda: pivot_distribution([0.5, 0.6], [1.0, -0.1], 2.0)),
    ("p_success", lambda: pivot_distribution([0.5, 0.6], [1.0], 2.0)),
    ("p_success", lambda: pivot_distribution([0.5], [float("nan")], 2.0)),
    ("gamma", lambda: pivot_distribution([0.5], [1.0], np.inf)),
    ("n_segments", lambda: candidate_ratios(0)), ("tokens", lambda: fixed_ends([1, 2], 0))])
def test_bad_arguments_are_named(name, call):
    with pytest.raises(ValueError, match=name):
        call()


# Where sentences end. The stand-in tokenizer splits at "|", so that each case shows its tokens; "$" is EOS.
@pytest.mark.parametrize("text, kept", [
    ("He| has| 3.|5| apples|.| So| 7|.|$", ["He has 3.5 apples.", " So 7.$"]),  # number over two tokens
    ("It| is| 3|.|5|.| Then", ["It is 3.5.", " Then"]),
    ("5| +| 3| =| 8|.\n|Next| 9|.\n|#### |9|$", ["5 + 3 = 8.\n", "Next 9.\n", "#### 9$"]),  # ".\n": one token
    ("5+3=8|\n|8+1=9|\n|#### 9|$", ["5+3=8\n", "8+1=9\n", "#### 9$"]),          # no full stop at all
    ("One|.|\n\n|Two|.|\n", ["One.\n\n", "Two.\n"]),                            # no sentence of its own
    ("\n|One| x|.| Two", ["\nOne x.", " Two"]),                                 # nor at the beginning
    ('He| said| "|no|."| Then', ['He said "no."', " Then"]),                    # closing quote in the token
    ('He| said| ("|no|.|"|)| Then', ['He said ("no.")', " Then"]),               # two, in tokens of their own
    ("So| **|18|.|**|\n|End", ["So **18.**\n", "End"]),                         # markdown in the next token
    ("Steps|:\n|1|.| Add| 3|.\n|12|.| Then| 4|.\n|So| 7|.|$",                             # numbers of a list
     ["Steps:\n", "1. Add 3.\n", "12. Then 4.\n", "So 7.$"]), ("18|.|$", ["18.$"]),
    ("One| x|.\n|2|.|$", ["One x.\n", "2.$"]),                                  # but not a number that is the answer
    ("no| end", ["no end"]), ("$", ["$"]), (".|$", [".$"]),
])
def test_sentences(text, kept):
    tokens = text.split("|")
    ends = sentence_ends([*range(len(tokens))], lambda ids: "".join(tokens[i] for i in ids).replace("$", ""))
    assert ["".join(tokens[a:b]) for a, b in zip([0, *ends], ends)] == kept
    assert ends[-1] == len(tokens)


def test_sentences_with_the_real_tokenizer():
    if not QWEN.exists():
        pytest.skip("the Qwen2.5 tokenizer is not at hand")
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(QWEN)
    text = ("Natalia sold 48/2 = 24.5 clips in May.\nShe earned $1,000.50 é — in all. That is 3.\n\n"
            "So 72\n#### 72")
    response = tokenizer.encode(text) + [tokenizer.eos_token_id]
    ends = sentence_ends(response, lambda ids: tokenizer.decode(ids, skip_special_tokens=True))
    parts = [tokenizer.decode(response[a:b], skip_special_tokens=True) for a, b in zip([0, *ends], ends)]
    assert parts == ["Natalia sold 48/2 = 24.5 clips in May.\n", "She earned $1,000.50 é — in all.",
                     " That is 3.\n\n", "So 72\n", "#### 72"]


def test_fixed_ends():
    assert fixed_ends(list(range(7)), 3) == [3, 6, 7]
    assert fixed_ends(list(range(6)), 3) == [3, 6]
    assert fixed_ends(list(range(2)), 3) == [2]


@pytest.mark.parametrize("gamma", [2.0, -1.0])
def test_pivots_are_drawn_from_q_and_never_at_the_end(gamma):
    estimate = Recoverability()
    for i in range(40):
        estimate.observe(i / 40, i % 4 < 2 and i < 30)
    estimate.fit()
    ends, n = [4, 9, 11, 20], 4000
    rng = np.random.default_rng(0)
    draws = [draw_pivot(ends, estimate, gamma, rng) for _ in range(n)]
    q = pivot_distribution([0.2, 0.4, 0.6, 0.8], estimate.predict([0.2, 0.4, 0.6, 0.8]), gamma)
    ratio_at = {0: 0.2, 4: 0.4, 9: 0.6, 11: 0.8}                 # the question, then all ends but the last
    assert all(ratio == pytest.approx(ratio_at[kept]) for kept, ratio in draws)
    counts = np.array([sum(d[0] == kept for d in draws) for kept in ratio_at])
    assert ((counts - n * q) ** 2 / (n * q)).sum() < 21.1        # chi-square, 3 dof: p = 1e-4


def test_the_given_generator_is_the_only_randomness():
    estimate, ends = Recoverability(), list(range(1, 40))
    np.random.seed(0)
    state = np.random.get_state()[1].tolist()
    a = [draw_pivot(ends, estimate, 2.0, rng) for rng in [np.random.default_rng(7)] for _ in range(20)]
    b = [draw_pivot(ends, estimate, 2.0, rng) for rng in [np.random.default_rng(7)] for _ in range(20)]
    assert a == b and len(set(a)) > 5 and np.random.get_state()[1].tolist() == state


def test_a_response_of_one_segment_is_resampled_from_the_question():
    assert draw_pivot([3], Recoverability(), 2.0, np.random.default_rng(0)) == (0, 0.5)


def test_demo_prints_a_chart_per_setting():
    out = subprocess.run([sys.executable, "pivot.py"], capture_output=True, text=True, check=True,
                         cwd=Path(__file__).parents[2]).stdout
    assert len(re.findall(r"^Q\(t\) for", out, re.M)) == 10 and out.count("#") > 500
