r"""Eq. (Q): which state of a failed rollout should be resampled?   (arXiv 2602.14169)

    Q(t)  is proportional to  P_phi(success | r_t) * r_t^gamma,      r_t = t / T

Deep states (large r_t) are those that sampling from the question rarely reaches. Recoverable states (large P) are those
from which a correct answer is still possible. The paper has gamma = 2. With gamma = 0 only recoverability counts, and a
large negative gamma resamples from the question.

States. A response is cut into T segments, which are sentences or a fixed number of tokens. A full stop or a line break
ends a sentence; "?" and "!" do not. The states t = 1 ... T are the question itself and the end of every segment but the
last. As in the authors' code, r_t is t/(T+1). The question therefore has the ratio 1/(T+1), never 0, and the end of the
response is never a candidate. The paper leaves open what a "step" is. The authors stop generation at the single token
".". Real tokenizers write most sentence ends as other tokens (".\n"), so we look at the text instead.

    python pivot.py        # draws Q(t) for several gamma and P
"""
import re
from bisect import bisect_right
from itertools import accumulate

import numpy as np

# A line break, or a full stop before white space, so that 3.5 is not cut. Closing quotes, brackets and markdown may
# stand between the full stop and the white space.
SENTENCE_END = re.compile(r"\.[^\w\s]{0,3}(?=\s|\Z)|\n")
# "2." begins a segment and is not one itself, unless its line ends there.
LIST_NUMBER = re.compile(r"\W*\d{1,2}\.[^\w\n]*")


def sentence_ends(response: list[int], decode, pattern=SENTENCE_END) -> list[int]:
    """The number of response tokens up to the end of each sentence. The last one is len(response).

    response: token ids. decode: list of ids -> text, without special tokens. A segment without a letter or digit (a
    second line break, EOS) belongs to the sentence before it. The number of a list item belongs to the sentence after
    it. "Dr." and "e.g." end a sentence, as in the authors' code.
    """
    if not response:
        return [0]
    text, bounds = text_and_bounds(response, decode)
    ends, start = [], 0
    cuts = [bisect_right(bounds, match.end() - 1) + 1 for match in pattern.finditer(text)]
    for end in [*cuts, len(response)]:                       # the token with the full stop ends the sentence
        segment = text[bounds[start - 1] if start else 0:bounds[end - 1]]
        if end < len(response) and LIST_NUMBER.fullmatch(segment):
            continue
        if any(c.isalnum() for c in segment):
            ends.append(end)
        elif ends:
            ends[-1] = max(end, start)
        start = max(end, start)
    return ends or [len(response)]


def text_and_bounds(response: list[int], decode) -> tuple[str, list[int]]:
    """The text of a response, and for every token the number of characters up to its end.

    A token alone does not show what it adds. Many tokenizers (those of Llama 2, Mistral and Phi-3) drop the space
    before a token that is decoded alone, and a character may be spread over several tokens. So each token is decoded
    after the last one that has text, and a character that is not complete waits for the next token. Where these pieces
    do not make up the text, every beginning of the response is decoded instead, which is exact and slow.
    """
    text, found, bounds = decode(response), "", []
    context, pending = [], []
    for i, token in enumerate(response):
        pending = [*pending, token]
        added = decode(context + pending)[len(decode(context)):]
        complete = added != "" and added[-1] != "\N{REPLACEMENT CHARACTER}"
        if complete or i == len(response) - 1 or len(pending) == 8:      # no character is spread over more tokens
            found += added
            context, pending = pending, []
        bounds.append(len(found))
    if found != text:
        bounds = list(accumulate((len(decode(response[:i + 1])) for i in range(len(response))), max))
    return text, bounds


def fixed_ends(response: list[int], tokens: int) -> list[int]:
    """Like sentence_ends, for segments of a fixed number of tokens. The last one may be shorter."""
    if tokens < 1:
        raise ValueError(f"tokens per segment must be at least 1, got {tokens}")
    return [*range(tokens, len(response), tokens), len(response)]


def candidate_ratios(n_segments: int) -> np.ndarray:
    """r_t of the n states of a response with n segments: (i+1)/(n+1), i = 0..n-1. i = 0 is the question."""
    if n_segments < 1:
        raise ValueError(f"n_segments must be at least 1, got {n_segments}")
    return np.arange(1, n_segments + 1) / (n_segments + 1)


def pivot_distribution(ratios, p_success, gamma: float) -> np.ndarray:
    """Eq. (Q) over the candidate states: float64 [n], which sums to 1.

    ratios: r_t in (0, 1], [n]. p_success: P_phi(success | r_t) in [0, 1], [n], not all 0. gamma: from -1e6 to 1e6. Q is
    computed in log space, where 0.01^-20 and P = 1e-300 neither overflow nor vanish beside each other. Raises
    ValueError for any other arguments.
    """
    ratios, p_success = np.asarray(ratios, dtype=float), np.asarray(p_success, dtype=float)
    if ratios.ndim != 1 or ratios.size == 0 or not (np.all(ratios > 0) and np.all(ratios <= 1)):
        raise ValueError(f"ratios must be a non-empty list of depths in (0, 1], got {ratios}")
    if p_success.shape != ratios.shape or not (
            np.all(p_success >= 0) and np.all(p_success <= 1) and np.any(p_success > 0)):
        raise ValueError(f"p_success must be one probability per ratio, not all 0, got {p_success}")
    if not abs(gamma) <= 1e6:                                # beyond that only the deepest or the first state is drawn
        raise ValueError(f"gamma must be a number from -1e6 to 1e6, got {gamma}")
    with np.errstate(divide="ignore"):                       # log 0 = -inf is correct: never drawn
        log_q = np.log(p_success) + gamma * np.log(ratios)
    q = np.exp(log_q - log_q.max())
    return q / q.sum()


def draw_pivot(ends: list[int], recoverability, gamma: float, rng: np.random.Generator) -> tuple[int, float]:
    """Draw t* ~ Q for a response whose segments end at `ends`. Returns (number of response tokens kept, r_t*).

    recoverability: a Recoverability. rng: numpy Generator, the only source of randomness.
    """
    states = [0, *ends[:-1]]                                 # the question, then every end but the last
    ratios = candidate_ratios(len(states))
    q = pivot_distribution(ratios, recoverability.predict(ratios), gamma)
    i = rng.choice(len(states), p=q)
    return states[i], float(ratios[i])


if __name__ == "__main__":
    r = candidate_ratios(9)
    for name, p in {"P = 1": np.ones(9), "P = sigmoid(2 - 4r)": 1 / (1 + np.exp(4 * r - 2))}.items():
        for gamma in (-20.0, 0.0, 1.0, 2.0, 5.0):
            q = pivot_distribution(r, p, gamma)
            print(f"\nQ(t) for {name}, gamma {gamma:g}")
            for ratio, share in zip(r, q):
                print(f"  r = {ratio:.1f}  {share:.3f}  {'#' * round(60 * share)}")
