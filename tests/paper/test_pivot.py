"""Eq. (Q): the paper's test vectors, exact rational arithmetic, and where sentences end."""
import json
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pivot import candidate_ratios, draw_pivot, fixed_ends, pivot_distribution, sentence_ends, text_and_bounds
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
    ("gamma", lambda: pivot_distribution([0.5], [1.0], np.nan)),
    ("gamma", lambda: pivot_distribution([0.01, 0.5], [1.0, 1.0], -1e308)),
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
    ("One| x|.\n|100|.| Then| 4|.$", ["One x.\n", "100.", " Then 4.$"]),         # a number of three digits is none
    ("One| x|\n|=| |12|.\n|Two|$", ["One x\n", "= 12.\n", "Two$"]),           # nor one that has a line of its own
    ("One| x|.\n|2|.|$", ["One x.\n", "2.$"]),                                  # but not a number that is the answer
    ("no| end", ["no end"]), ("$", ["$"]), (".|$", [".$"]),
])
def test_sentences(text, kept):
    tokens = text.split("|")
    ends = sentence_ends([*range(len(tokens))], lambda ids: "".join(tokens[i] for i in ids).replace("$", ""))
    assert ["".join(tokens[a:b]) for a, b in zip([0, *ends], ends)] == kept
    assert ends[-1] == len(tokens)


def test_an_empty_response_is_one_sentence():
    assert sentence_ends([], lambda ids: "") == [0]


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


LINES = ["He has 3 apples. He buys 4 more. Now he has 7.\n#### 7", "Über 5 Äpfel. Dann 6. \U0001f34e So 7.", "No end"]


def make_tokenizer(kind):
    """A small fast tokenizer whose tokens lose something when they are decoded alone. Returns (encode, decode)."""
    special = ["<unk>", "</s>"]
    if kind == "word pieces":                                    # "." and "##s" join what stands before them
        tokenizer = Tokenizer(models.WordPiece({}, unk_token="<unk>"))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=60, special_tokens=special, show_progress=False)
    elif kind == "byte level":                                   # Qwen, Llama 3
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    elif kind == "unigram":                                      # T5 and others of sentencepiece
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False)
    else:                                                        # Llama 2, Mistral, Phi-3
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(),
                                               decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        special += [f"<0x{i:02X}>" for i in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, show_progress=False, limit_alphabet=30)
    tokenizer.train_from_iterator(["he has 3 apples. now 7", *LINES[:1]], trainer)
    if kind == "llama":                                          # the bytes are tokens like others, not special ones
        state = json.loads(tokenizer.to_str())
        state["added_tokens"] = state["added_tokens"][:2]
        tokenizer = Tokenizer.from_str(json.dumps(state))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    return fast.encode, lambda ids: fast.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["llama", "unigram", "word pieces", "byte level"])
def test_sentences_on_one_line_are_found_with_every_kind_of_tokenizer(kind):
    encode, decode = make_tokenizer(kind)
    text = "he has 3 apples. he has 7. now 4. he has"
    response = encode(text)
    ends = sentence_ends(response, decode)
    assert [decode(response[:end]).rstrip() for end in ends] == [
        "he has 3 apples.", "he has 3 apples. he has 7.", "he has 3 apples. he has 7. now 4.", text]


@pytest.mark.parametrize("kind", ["llama", "unigram", "word pieces", "byte level"])
def test_the_text_of_every_token_is_that_of_growing_prefixes(kind):
    """Also with characters of several tokens, with special tokens in between, and with bytes that are no character."""
    encode, decode = make_tokenizer(kind)
    rng = np.random.default_rng(0)
    responses = [encode(line) for line in LINES]
    responses += [[*responses[0][:5], 1, *responses[0][5:], 1, 1], [], rng.integers(2, 60, 80).tolist()]
    for response in responses:
        text, bounds = text_and_bounds(response, decode)
        assert text == decode(response) and len(bounds) == len(response)
        for i, bound in enumerate(bounds):
            prefix = decode(response[:i + 1])
            complete = prefix.rstrip("\ufffd")
            if text.startswith(prefix) or text.startswith(complete):     # else what follows has changed the prefix
                assert len(complete) <= bound <= len(prefix)


def test_where_a_token_changes_what_stands_before_it_every_prefix_is_decoded():
    words = ["a", "'", "b.", "c"]
    text, bounds = text_and_bounds([0, 1, 2, 3], lambda ids: " ".join(words[i] for i in ids).replace(" ' ", "'"))
    assert text == "a'b. c" and bounds == [1, 3, 4, 6]


def test_a_wait_for_a_character_that_never_comes_has_an_end():
    """Of 4,000 stray bytes each is decoded with a few others, not with all of them."""
    encode, decode = make_tokenizer("llama")
    stray, lengths = encode("\U0001f34e")[1:2], []

    def watched(ids):
        lengths.append(len(ids))
        return decode(ids)

    text, bounds = text_and_bounds(stray * 4000, watched)
    assert text == "\ufffd" * 4000 and bounds[-1] == 4000 and sorted(bounds) == bounds
    assert sum(lengths) < 100_000


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
