r"""AttnRL (arXiv 2509.26628): rollouts are branched where the steps begin that later steps attend to most.

Rule. Of 6 rollouts round(6 exp(-accuracy)) are branched (G in place of 6): all when all fail, 2 when none does. The
minority comes first: the wrong ones when at least half are right, else the right ones. Steps are split at blank lines,
or, where a response has none, as DEEP-GRPO's. With alpha[j, k] = mean attention of the tokens of step j on those of
step k, the influence of a step is

    FCI_k = max over layers and heads of sum_{j >= k+4} alpha[j, k],    and 0 for the first step

Of the 20 % of steps with the largest FCI, the 2 earliest are sampled anew, from where they begin, with 2 branches each.
The question itself is never branched, because the first step has no influence.

Advantage and normaliser are those of TreeRL (treerl.py).

Differs from deep_grpo.py in: line 2, and the weights of J (TreeRL's). Left out: the filter of questions, batch sizes
that follow past steps, the least distance of 512 tokens between two branched steps, and the steps that fill up where
fewer than two have an influence. Among rollouts of one class the first are taken, where the authors' code draws them.
"""
import math
import re

import torch

from deep_grpo import Group, segment_ends
from pivot import sentence_ends
from variants.treerl import fork_at, mean

BLANK_LINE = re.compile(r"\n[^\S\n]*\n")


def choose_pivots(policy, questions, groups, config, recoverability, rng) -> list[Group]:
    """Line 2: the beginnings of the 2 earliest of the influential steps."""
    trees, items = [], []                            # (question, rollout), and what its influences are computed from
    for x, g in enumerate(groups):
        for i in branched_first([t.reward for t in g.trajectories]):
            t = g.trajectories[i]
            ends = sentence_ends(t.response, policy.text, BLANK_LINE)
            ends = ends if len(ends) > 1 else segment_ends(t.response, config, policy.text)
            trees.append((x, i))
            items.append((g.prompt, t.response, ends))
    influences = policy.each(forward_context_influence, items)
    pivots = {tree: earliest_influential(ends, fci) for tree, (*_, ends), fci in zip(trees, items, influences)}
    return [Group(g.prompt, [fork_at(t, pivots.get((x, i), [])) for i, t in enumerate(g.trajectories)])
            for x, g in enumerate(groups)]


def branched_first(rewards) -> list[int]:
    """Which rollouts of a question are branched: round(G exp(-accuracy)) of them, those of the minority first."""
    right = [r > 0 for r in rewards]
    accuracy = mean(right)
    minority = accuracy < 0.5                        # the right ones, else the wrong ones
    order = sorted(range(len(right)), key=lambda i: right[i] != minority)                        # stable
    return order[:round(len(right) * math.exp(-accuracy))]


def earliest_influential(ends, influences) -> list[int]:
    """Where the 2 earliest of the top 20 % of the steps begin; steps without any influence do not count."""
    top = sorted(range(len(ends)), key=lambda k: -influences[k])[:math.ceil(0.2 * len(ends))]
    return [[0, *ends][k] for k in sorted(k for k in top if influences[k] > 0)[:2]]


@torch.no_grad()
def forward_context_influence(model, prompt, response, ends, gap=4) -> list[float]:
    """FCI of every step of a response, 0 for the first. ends: numbers of response tokens up to the end of each step.

    One forward with eager attention, the only one that has weights. They are pooled as each layer makes them, so memory
    is that of one layer.
    """
    ids = torch.tensor([prompt + response], device=model.device)
    pool = torch.zeros(len(ends), ids.shape[1], device=model.device)                          # (n, T)
    for k, (start, end) in enumerate(zip([0, *ends], ends)):
        pool[k, len(prompt) + start:len(prompt) + end] = 1 / (end - start)
    found = []

    def influence_of(module, args, output):
        alpha = pool @ output[1][0].to(pool.dtype) @ pool.T                                   # (heads, n, n)
        found.append(alpha.tril(-gap).sum(-2).amax(0))                                        # over j, then heads: (n,)

    hooks = [layer.self_attn.register_forward_hook(influence_of) for layer in model.base_model.layers]
    was_training = model.training
    model.eval()
    model.set_attn_implementation("eager")
    try:
        model.base_model(input_ids=ids, use_cache=False)
    finally:
        model.set_attn_implementation("sdpa")
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return [0.0, *torch.stack(found).amax(0)[1:].tolist()]
