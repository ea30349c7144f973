r"""RRPO and SRPO (arXiv 2605.25507): one failed rollout of a question is reset to one of its steps and continued.

Rule. Of G = 4 + 1 rollouts the first failed one is the probe. It is reset to where one of its steps begins, and 4
branches are drawn from there. RRPO draws that step uniformly; SRPO asks the model itself which step is the first wrong
one. The first number in its answer, of at most 8 tokens, is taken for the step. Where there is none, or no step has it,
the step is drawn as in RRPO. A question that does not fit into the context of the model is not asked.

Advantage. (R - mean)/std in each half: the other rollouts, and the branches of the probe. The std is that of the
population (1/n, not 1/(n - 1) as in Eq. (A)). The probe itself is not trained.

    J = E_x [ 1/n sum over the n sequences of both halves, 1/|y| sum_t rho_t A - beta k3_t ]        without a clip

Differs from deep_grpo.py in: line 2 (one failure per question, its step uniform or named by the model), the weights of
J, the std, and no clip (clip_low = 1, clip_high = 10^6). The words of SRPO's question are ours, and it is in the chat
template even where --template is another. What its answers cost is in the count of generated tokens.
"""
import re
from statistics import pstdev

from deep_grpo import Group, segment_ends
from loss import Span
from variants.treerl import fork_at, mean

SRPO_QUESTION = ("{question}\n\nHere is an attempt, by steps:\n\n{steps}\n\nIts final answer is wrong. "
                 "Which step is the first wrong one? Answer with its number only.")


def choose_pivots(policy, questions, groups, config, recoverability, rng) -> list[Group]:
    """Line 2 of RRPO: the beginning of any step of the first failed rollout."""
    def drawn(x, t):
        starts = [0, *segment_ends(t.response, config, policy.text)[:-1]]
        return starts[rng.integers(len(starts))]

    return reset_failed(groups, drawn)


def choose_named(policy, questions, groups, config, recoverability, rng) -> list[Group]:
    """Line 2 of SRPO: the beginning of the step that the model names as the first wrong one."""
    ends, prompts = {}, {}
    context = getattr(getattr(policy.model, "config", None), "max_position_embeddings", None) or float("inf")
    for x, g in enumerate(groups):
        for t in [t for t in g.trajectories if t.reward == 0][:1]:
            ends[x] = segment_ends(t.response, config, policy.text)
            steps = [policy.text(t.response[a:b]).strip() for a, b in zip([0, *ends[x]], ends[x])]
            lines = "\n".join(f"{i}. {step}" for i, step in enumerate(steps, start=1))
            prompt = policy.encode(SRPO_QUESTION.format(question=questions[x].text, steps=lines))
            if len(prompt) + 8 <= context:
                prompts[x] = prompt
    answers = policy.sample([*prompts.values()], 1, 8) if prompts else []
    named = {x: re.search(r"\d+", policy.text(y)) for x, (y,) in zip(prompts, answers)}

    def start(x, t):
        number = int(named[x].group()) if named.get(x) else 0
        if not 1 <= number <= len(ends[x]):
            number = 1 + rng.integers(len(ends[x]))
        return [0, *ends[x]][number - 1]

    return reset_failed(groups, start)


def reset_failed(groups, state) -> list[Group]:
    """The groups with a Fork of the first failed rollout of each, at state(x, trajectory) for question number x."""
    result = []
    for x, g in enumerate(groups):
        probe = next((t for t in g.trajectories if t.reward == 0), None)
        result.append(Group(g.prompt, [fork_at(t, [state(x, t)]) if t is probe else t for t in g.trajectories]))
    return result


def advantages_of(rewards) -> list[float]:
    """(R - mean) / std over one half, with the std of the population. Equal rewards give 0."""
    std = pstdev(rewards) if rewards else 0.0
    return [(r - mean(rewards)) / std if std else 0.0 for r in rewards]


def weights(groups, config) -> list[Span]:
    """The constants of J above."""
    spans = []
    for g in groups:
        others = [t for t in g.trajectories if not t.branches]
        n = len(others) + sum(len(t.branches) for t in g.trajectories)
        A_others = iter(advantages_of([t.reward for t in others]))

        def trained(y, A, n=n):
            w = 1 / (len(groups) * n * max(1, len(y)))
            return Span(len(y), A, w, config.beta * w)

        for t in g.trajectories:
            if t.branches:
                (fork,) = t.forks
                spans.append(Span(len(t.response), 0.0, 0.0, 0.0))
                spans += [trained(y, A) for y, A in zip(fork.branches, advantages_of(fork.rewards))]
            else:
                spans.append(trained(t.response, next(A_others)))
    return spans
