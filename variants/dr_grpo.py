r"""Dr. GRPO (arXiv 2503.20783): GRPO without its two divisions.

    J = E_x [ 1/G sum_i 1/C sum_t min(rho_t A_i, clip(rho_t) A_i) ]        A_i = R_i - mean

C is a constant, the cap of a response (3,000 tokens in the original). So a long wrong answer is not punished less per
token than a short one, and a question is not weighted by the spread of its rewards. There is no KL term (beta = 0).

Differs from deep_grpo.py in: K = 0, no line 2, and the weights of J. Left out: nothing.
"""
from loss import Span, advantages_of


def weights(groups, config) -> list[Span]:
    """The constants of J above."""
    spans = []
    for g in groups:
        w = 1 / (len(groups) * len(g.trajectories) * config.max_new_tokens)
        advantages = advantages_of([t.reward for t in g.trajectories], normalize=False)
        spans += [Span(len(t.response), A, w, config.beta * w) for t, A in zip(g.trajectories, advantages)]
    return spans
