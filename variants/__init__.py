r"""The methods that the paper compares with, or that are close to it, as branching rules in one trainer.

What they share is a tree under every question: G rollouts, and branches that leave a rollout at some of its states.
They differ in which states are branched (`states`, line 2 of deep_grpo.py), into how many branches, in the advantage,
in what is trained, and in the normaliser (`weights`, in place of Eq. (J)). Everything else is the same code.

    method       first  states branched                           K   advantage              trained  normaliser
    grpo             8  -                                         -   (R - mean)/std         all      1/G 1/|y|
    dr_grpo          8  -                                         -   R - mean               all      1/G 1/cap
    deep_grpo        8  one per failed rollout, from Q(t)         8   of its own siblings    suffix   two streams
    treerl           6  the 2 least likely tokens of a rollout    2   of a node, below       paths    1/tokens
    attnrl           6  the 2 earliest of the influential steps   2   of a node, below       paths    1/tokens
    fr3e            16  the 4 highest entropies of 2 rollouts    16   (R - V_j) e^-(dV)      suffix   1/tokens
    rrpo, srpo     4+1  one of the first failed rollout           4   (R - mean)/std         suffix   1/n 1/|y|

A state is a number of response tokens that are kept. GRPO (arXiv 2402.03300) is Eq. (J) without branches. Left out of
the originals: more than one expansion of TreeRL's trees; AttnRL's filter and its batch sizes that follow past steps;
FR3E's rejection of dead questions and its wider upper clip (inert with one update per batch); all learning rates.
"""
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from deep_grpo import Group, choose_pivots, score_groups, segment_ends
from loss import Weights, advantages_of, branch_groups, sequence_weights
from pivot import sentence_ends
from trainer.model import as_forward
from trainer.ranks import first, share

BLANK_LINE = re.compile(r"\n[^\S\n]*\n")


def mean(values):
    """Of a list that is not empty."""
    return sum(values) / len(values)


def branch_at(trajectory, pivots):
    """The trajectory with these pivots, in order of depth; their ratio is the share of tokens that they keep."""
    if not pivots:
        return trajectory
    return replace(trajectory, pivot=sorted(pivots), ratio=[p / len(trajectory.response) for p in sorted(pivots)])


# ---- GRPO, Dr. GRPO ----

def dr_grpo_weights(groups, config):
    """Dr. GRPO (arXiv 2503.20783): J = 1/G sum_i 1/C sum_t rho_t A_i, A = R - mean, C a constant.

    C is the cap of a response, as there (3000 tokens): a long wrong answer is then not punished less per token.
    """
    weights = []
    for g in groups:
        w = 1 / (len(groups) * len(g.trajectories) * config.max_new_tokens)
        advantages = advantages_of([t.reward for t in g.trajectories], normalize=False)
        weights.append([[Weights(len(t.response), a, w, config.beta * w)] for t, a in zip(g.trajectories, advantages)])
    return weights


# ---- DEEP-GRPO ----

def deep_grpo_states(run, groups, questions):
    """Eq. (Q) for every failed rollout: deep_grpo.choose_pivots.

    One rank draws for all: a difference in a last digit would be another step on each.
    """
    return first(lambda: choose_pivots(groups, run.config, run.recoverability, run.text, run.pivot_rng)), 0


# ---- TreeRL, AttnRL ----

def treerl_states(run, groups, questions):
    """TreeRL (arXiv 2506.11902): the 2 tokens of every rollout with the largest -log pi; each is sampled anew.

    Not of the first 5 % nor the last 10 tokens. The forked token belongs to the suffix.
    """
    logps, _, forwarded = score_groups(run.model, groups, run.config, run.args.micro_batch_tokens)
    logps = iter(logps)

    def forked(t):
        logp, n = next(logps), len(t.response)
        return branch_at(t, sorted(range(math.ceil(0.05 * n), n - 10), key=lambda i: logp[i].item())[:2])

    return [Group(g.prompt, [forked(t) for t in g.trajectories]) for g in groups], forwarded


def attnrl_states(run, groups, questions):
    """AttnRL (arXiv 2509.26628): the 2 earliest steps among the top 20 % by influence (below); sampled anew.

    Of round(6 exp(-accuracy)) of 6 rollouts, G in place of 6: all when all fail, 2 when none does. Steps are split
    at blank lines, or, where a response has none, as DEEP-GRPO's.
    """
    trees, items = [], []
    for x, g in enumerate(groups):
        accuracy = mean([t.reward for t in g.trajectories])
        for i, t in enumerate(g.trajectories[:round(len(g.trajectories) * math.exp(-accuracy))]):
            ends = sentence_ends(t.response, run.text, BLANK_LINE)
            ends = ends if len(ends) > 1 else segment_ends(t.response, run.config, run.text)
            trees.append((x, i))
            items.append((g.prompt, t.response, ends))
    influences = share(items, lambda part: [forward_context_influence(run.model, *item) for item in part])

    def earliest(ends, influence):
        top = sorted(range(len(ends)), key=lambda k: -influence[k])[:math.ceil(0.2 * len(ends))]
        return [[0, *ends][k] for k in sorted(k for k in top if influence[k] > 0)[:2]]

    pivots = {tree: earliest(ends, y) for tree, (*_, ends), y in zip(trees, items, influences)}
    return [Group(g.prompt, [branch_at(t, pivots.get((x, i), [])) for i, t in enumerate(g.trajectories)])
            for x, g in enumerate(groups)], sum(len(prompt) + len(response) for prompt, response, _ in items)


def tree_weights(groups, config):
    """TreeRL, also AttnRL: every node s of the tree has A(s) = [(V(s) - V_root) + (V(s) - V(parent))] / sqrt(n(s)).

    V(s): share of right leaves below s; n(s) their number; V_root: over all leaves of the question, of all its
    rollouts. Trained are the paths to all leaves, a token mean: a token of s counts n(s) times.
    """
    paths = sum(len(t.response) + sum(pivot + len(y) for pivot, part in branch_groups(t) for y in t.branches[part])
                for g in groups for t in g.trajectories)                     # tokens of all paths
    weights = []
    for g in groups:
        v_root = mean([r for t in g.trajectories for r in (t.reward, *t.branch_rewards)])

        def node(tokens, leaves, v_parent, v_root=v_root):
            v, n = mean(leaves), len(leaves)
            return Weights(tokens, (v - v_root + v - v_parent) / math.sqrt(n), n / paths, config.beta * n / paths)

        weights.append([])
        for t in g.trajectories:
            nodes, suffixes, v_parent, start = [], [], v_root, 0
            for pivot, part in branch_groups(t):                             # by depth
                leaves = [t.reward, *t.branch_rewards[part.start:]]          # those of this pivot and of deeper ones
                nodes.append(node(pivot - start, leaves, v_parent))
                v_parent, start = mean(leaves) if pivot else v_root, pivot   # at 0: the parent is the question
                suffixes += [node(len(y), [r], v_parent) for y, r in zip(t.branches[part], t.branch_rewards[part])]
            weights[-1].append([*nodes, node(len(t.response) - start, [t.reward], v_parent), *suffixes])
    return weights


@torch.no_grad()
def forward_context_influence(model, prompt, response, ends, gap=4) -> list[float]:
    """AttnRL's FCI of every step of a response: FCI_k = max over layers and heads of sum_{j >= k + gap} alpha[j, k].

    alpha[j, k]: mean attention of the tokens of step j on those of step k, [steps, steps] for each layer and head.
    ends: numbers of response tokens up to the end of each step. One forward with eager attention, the only one that
    has weights; they are pooled as each layer makes them, and gone: memory is that of one layer.
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
        as_forward(model, backbone)(ids)
    finally:
        model.set_attn_implementation("sdpa")
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return torch.stack(found).amax(0).tolist()


def backbone(model, ids):
    """The model without its head."""
    return model.base_model(input_ids=ids, use_cache=False)


# ---- FR3E ----

def fr3e_states(run, groups, questions):
    """FR3E (arXiv 2507.07017): of questions with right and wrong rollouts the first of either kind, at the 4 positions
    where the policy's entropy is highest; the token there is sampled anew. The root's branches are the G rollouts."""
    _, entropies, forwarded = score_groups(run.model, groups, run.config, run.args.micro_batch_tokens)
    entropies, result = iter(entropies), []
    for g in groups:
        rewards = [t.reward for t in g.trajectories]
        bases = {rewards.index(r) for r in rewards} if len(set(rewards)) > 1 else {}
        result.append(Group(g.prompt, []))
        for i, (t, entropy) in enumerate(zip(g.trajectories, entropies)):
            by_entropy = sorted(range(1, len(t.response)), key=lambda j: -entropy[j].item())
            result[-1].trajectories.append(branch_at(t, by_entropy[:4]) if i in bases else t)
    return result, forwarded


def fr3e_weights(groups, config):
    """FR3E: A = (R - V_j) exp(-(V_j - V_{j-1})) for the branches of state j of a rollout, V_j their mean reward.

    State 0 is the question, V_0 the mean reward of its G rollouts, whose A is R - V_0. Where the value rises along
    the rollout, it is pressed less on, where it falls, more. Trained are suffixes; a token mean.
    """
    w = 1 / sum(len(y) for g in groups for t in g.trajectories for y in (t.response, *t.branches))
    weights = []
    for g in groups:
        v_root = mean([t.reward for t in g.trajectories])
        weights.append([])
        for t in g.trajectories:
            row, before = [Weights(len(t.response), t.reward - v_root, w, config.beta * w)], v_root
            for _, part in branch_groups(t):
                v = mean(t.branch_rewards[part])
                row += [Weights(len(y), (r - v) * math.exp(before - v), w, config.beta * w)
                        for y, r in zip(t.branches[part], t.branch_rewards[part])]
                before = v
            weights[-1].append(row)
    return weights


# ---- RRPO, SRPO ----

def rrpo_states(run, groups, questions):
    """RRPO (arXiv 2605.25507): the first failed rollout is reset to where one of its steps begins, all alike."""
    def drawn(t):
        starts = [0, *segment_ends(t.response, run.config, run.text)[:-1]]
        return starts[run.pivot_rng.integers(len(starts))]

    return first(lambda: reset_failed(groups, lambda x, t: drawn(t))), 0


SRPO_QUESTION = ("{question}\n\nHere is an attempt, by steps:\n\n{steps}\n\nIts final answer is wrong. "
                 "Which step is the first wrong one? Answer with its number only.")


def srpo_states(run, groups, questions):
    """SRPO (arXiv 2605.25507): it is reset to where the step begins that the model itself names as the wrong one.

    Where the answer is no number of a step, the step is drawn as in RRPO. What the answers cost is in the count of
    generated tokens. The words of the question are ours.
    """
    ends, prompts = {}, []
    for x, g in enumerate(groups):
        for t in [t for t in g.trajectories if t.reward == 0][:1]:
            ends[x] = segment_ends(t.response, run.config, run.text)
            steps = [run.text(t.response[a:b]).strip() for a, b in zip([0, *ends[x]], ends[x])]
            lines = "\n".join(f"{i}. {step}" for i, step in enumerate(steps, start=1))
            prompts.append(run.encode(SRPO_QUESTION.format(question=questions[x].text, steps=lines)))
    answers = iter(run.draw(prompts, 1, max_new_tokens=8) if prompts else [])
    named = {x: re.search(r"\d+", run.text(y)) for x, (y,) in zip(ends, answers)}

    def start(x, t):
        number = int(named[x].group()) if named[x] else 0
        if not 1 <= number <= len(ends[x]):
            number = 1 + run.pivot_rng.integers(len(ends[x]))
        return [0, *ends[x]][number - 1]

    return first(lambda: reset_failed(groups, start)), 0


def reset_failed(groups, state):
    """The groups with a pivot on the first failed rollout of each: state(x, trajectory) of question x."""
    result = []
    for x, g in enumerate(groups):
        probe = next((t for t in g.trajectories if t.reward == 0), None)
        result.append(Group(g.prompt, [branch_at(t, [state(x, t)]) if t is probe else t for t in g.trajectories]))
    return result


def reset_weights(groups, config):
    """RRPO, SRPO: two halves of n sequences, (R - mean)/std in each: the other rollouts, and the branches of the
    failed one, which is not trained itself. J = mean over x of 1/n sum 1/|y| sum_t rho_t A, without a clip."""
    weights = []
    for g in groups:
        rest = [t for t in g.trajectories if not t.branches]
        n = len(rest) + sum(len(t.branches) for t in g.trajectories)
        a_rest = iter(advantages_of([t.reward for t in rest], config.std) if rest else [])
        weights.append([])

        def trained(y, a, n=n):
            w = 1 / (len(groups) * n * max(1, len(y)))
            return Weights(len(y), a, w, config.beta * w)

        for t in g.trajectories:
            if t.branches:
                branches = zip(t.branches, advantages_of(t.branch_rewards, config.std))
                weights[-1].append([Weights(len(t.response), 0.0, 0.0, 0.0), *(trained(y, a) for y, a in branches)])
            else:
                weights[-1].append([trained(t.response, next(a_rest))])
    return weights


class Method(NamedTuple):
    """settings: of deep_grpo.Config, where they differ from its defaults. states(run, groups, questions): (groups
    with pivots, tokens that went through the model for it); None: nothing is branched. weights(groups, config)."""
    settings: dict
    states: Callable | None
    weights: Callable


NO_CLIP = dict(clip_low=1.0, clip_high=1e6)
METHODS = {
    "grpo": Method(dict(branches=0), None, sequence_weights),
    "dr_grpo": Method(dict(branches=0, beta=0.0), None, dr_grpo_weights),
    "deep_grpo": Method({}, deep_grpo_states, sequence_weights),
    "treerl": Method(dict(group_size=6, branches=2), treerl_states, tree_weights),
    "attnrl": Method(dict(group_size=6, branches=2), attnrl_states, tree_weights),
    "fr3e": Method(dict(group_size=16, branches=16), fr3e_states, fr3e_weights),
    "rrpo": Method(dict(group_size=5, branches=4, **NO_CLIP), rrpo_states, reset_weights),
    "srpo": Method(dict(group_size=5, branches=4, **NO_CLIP), srpo_states, reset_weights),
}
