r"""Deep Dense Exploration for LLM Reinforcement Learning via Pivot-Driven Resampling   (arXiv 2602.14169)

The algorithm, DEEP-GRPO: one step on a batch of questions x with verifiable answers.

     1  draw G responses tau^i to each x, and reward them: R_i = 1 if right and finished, else 0      roll_out
     2  for every failed tau^i draw one pivot t* ~ Q(t), Q ~ P_phi(success | t/T) (t/T)^gamma    choose_pivots
     3  draw K continuations y^{i,k} of the prefix s_{<t*}, and reward prefix + suffix                resample
     4  y = 1 if any of the K is right: add (r_t*, y) to the buffer M, fit P_phi again    learn_recoverability
     5  A_global from the G rewards of x, A_local from the K rewards of a pivot; never mixed  sequence_weights
     6  J = mean over x of 1/G sum_i L_main(tau^i) + lambda/|T_fail| sum_i 1/K sum_k L_aux(y^{i,k})  objective
     7  (the prefix of a branch carries no loss: it was already judged, once, in L_main)
     8  one clipped AdamW step on -J; with config.updates > 1 several, on the same batch                update
     9  GRPO is K = 0: lines 2-4 vanish, and of J the first half is left
    10  repeat; the budget is G + |T_fail| K sequences per question, the second kind suffixes only

Departures from the paper: steps t are the sentences of a response (pivot.py); phi is the exact L2-regularised
fit (recoverability.py); a response that does not end within the cap has reward 0, and a branch has the room
that its prefix left. Departures from the authors' code: Config.objective = "paper" is the default (loss.py
says how "authors" differs); answers are compared as numbers, and the prompt is never graded (grading.py).

The methods that it is compared with put another rule in line 2 and other weights in lines 5-7 (baselines.py).
"""
import math
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch.distributed.tensor import DTensor

from loss import branch_groups, k3_kl, per_token, sequence_weights, silence_spurious, weighted_objective
from packing import attention_length, micro_batches, pack, pack_or_split, score_rows
from pivot import draw_pivots, fixed_ends, sentence_ends
from recoverability import Recoverability
from trainer.model import as_forward
from trainer.ranks import gather, rank, world_size

IDLE = pack([0], [0])                                # a row of weight 0, for a rank without rows (ranks.py)


@dataclass
class Trajectory:
    """One root rollout tau^i and, when it was branched, its pivot and K suffixes; token ids throughout."""
    response: list[int]
    reward: float
    pivot: int | list[int] | None = None         # t*: number of response tokens that the branches keep
    branches: list[list[int]] = field(default_factory=list)
    branch_rewards: list[float] = field(default_factory=list)
    ratio: float | list[float] | None = None     # r_t*: relative depth of the pivot

    @property
    def pivots(self) -> list[int]:
        """All of them: most baselines have several, with K branches of the first, K of the second, and so on."""
        return [] if self.pivot is None else self.pivot if isinstance(self.pivot, list) else [self.pivot]

    @property
    def ratios(self) -> list[float]:
        """Those of the pivots."""
        return [] if self.ratio is None else self.ratio if isinstance(self.ratio, list) else [self.ratio]


@dataclass
class Group:
    """A question x, as the token ids of its prompt, and its G rollouts."""
    prompt: list[int]
    trajectories: list[Trajectory]


@dataclass(frozen=True)
class Config:
    """Hyper-parameters, with the paper's letters; the defaults are those of the authors' GSM8K script.

    But for objective and std, theirs are "authors" and False, and max_new_tokens: theirs is what the prompt leaves
    of 1024. Impossible values raise ValueError.
    """
    group_size: int = 8          # G
    branches: int = 8            # K; 0 is GRPO
    gamma: float = 2.0           # exponent of depth in Eq. (Q)
    lam: float = 1.0             # lambda: weight of the branch stream in Eq. (J)
    beta: float = 1e-4           # weight of k3 in Eq. (L)
    clip_low: float = 0.2        # eps_low
    clip_high: float = 0.2       # eps_high
    temperature: float = 1.0     # T of the policy softmax(logits / T), in sampling and in the loss alike
    objective: str = "paper"     # or "authors": see loss.py
    segment_tokens: int = 0      # states of a response: 0 = its sentences, n = every n tokens
    max_new_tokens: int = 768    # cap of a response, pivot and branch together
    updates: int = 1             # optimizer steps on one batch
    max_grad_norm: float = 1.0
    # Ablations, and options that compose with every method.
    std: bool = True             # False: A = R - mean
    pivots: int = 1              # different states per failed rollout, K branches each
    uniform_pivot: bool = False  # Q(t) the same for all t
    branch_all: bool = False     # right rollouts, too
    train_prefix: bool = False   # the prefix of a branch carries its loss, too: no gradient masking
    one_stream: bool = False     # one group of all rewards, one mean: loss.one_stream_weights
    stapo: bool = False          # without spurious tokens: loss.silence_spurious
    maspo: bool = False          # a soft trust region instead of the clip: loss.soft_surrogate

    def __post_init__(self):
        least = {"group_size": 1, "branches": 0, "segment_tokens": 0, "max_new_tokens": 1, "updates": 1,
                 "pivots": 1}
        for name, low in least.items():
            if not isinstance(getattr(self, name), int) or getattr(self, name) < low:
                raise ValueError(f"{name} must be an integer of at least {low}, got {getattr(self, name)}")
        for name in ("lam", "beta", "clip_low", "clip_high"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or positive, got {getattr(self, name)}")
        for name in ("temperature", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not math.isfinite(self.gamma):
            raise ValueError(f"gamma must be a finite number, got {self.gamma}")
        if self.objective not in ("paper", "authors"):
            raise ValueError(f"objective must be 'paper' or 'authors', got {self.objective!r}")
        if self.one_stream and self.objective == "authors":
            raise ValueError("one_stream is an ablation of objective 'paper', got 'authors'")


def roll_out(draw, prompts, reward, config) -> list[Group]:
    """Line 1. draw(prefixes, k, max_new_tokens=...) is resample.sample with its model filled in; reward grades
    a list of (x, response), x the index of the question in prompts, response token ids."""
    responses = draw(prompts, config.group_size, max_new_tokens=config.max_new_tokens)
    rewards = iter(reward([(x, y) for x, drawn in enumerate(responses) for y in drawn]))
    return [Group(prompt, [Trajectory(y, next(rewards)) for y in drawn])
            for prompt, drawn in zip(prompts, responses)]


def segment_ends(response, config, decode) -> list[int]:
    """The ends of the steps of a response, as numbers of tokens; decode: ids -> text, without special tokens."""
    return fixed_ends(response, config.segment_tokens) if config.segment_tokens else sentence_ends(response, decode)


def choose_pivots(groups, config, recoverability, decode, rng) -> list[Group]:
    """Line 2: the same groups with pivot and ratio of every failed trajectory.

    decode: ids -> text, without special tokens; rng: numpy Generator.
    """
    # Without outcomes P = 1: with gamma = 0 all states are alike.
    estimate, gamma = (Recoverability(), 0.0) if config.uniform_pivot else (recoverability, config.gamma)

    def with_pivot(t):
        if t.reward != 0 and not config.branch_all:
            return t
        drawn = draw_pivots(segment_ends(t.response, config, decode), estimate, gamma, rng, config.pivots)
        pivot, ratio = drawn[0] if config.pivots == 1 else map(list, zip(*drawn))
        return replace(t, pivot=pivot, ratio=ratio)

    return [Group(g.prompt, [with_pivot(t) for t in g.trajectories]) for g in groups]


def resample(draw, groups, reward, config) -> list[Group]:
    """Line 3: the same groups with K branches on every pivot, all drawn in one call.

    draw is also told expected_tokens=, a length per state: that of the rest that failed, by which ranks.py divides
    the work. (resample.sample has no use for it, and no such argument.)
    """
    states = [(x, g, t, pivot) for x, g in enumerate(groups) for t in g.trajectories for pivot in t.pivots]
    if not states or not config.branches:
        return groups
    drawn = draw([g.prompt + t.response[:pivot] for _, g, t, pivot in states], config.branches,
                 max_new_tokens=[config.max_new_tokens - pivot for *_, pivot in states],   # cut there: reward 0
                 expected_tokens=[len(t.response) - pivot for *_, t, pivot in states])
    rewards = iter(reward([(x, t.response[:pivot] + y)
                           for (x, _, t, pivot), branches in zip(states, drawn) for y in branches]))
    drawn = iter(drawn)

    def branched(t):
        branches = [y for _ in t.pivots for y in next(drawn)]
        return replace(t, branches=branches, branch_rewards=[next(rewards) for _ in branches])

    return [Group(g.prompt, [branched(t) if t.pivots else t for t in g.trajectories]) for g in groups]


def learn_recoverability(groups, recoverability) -> None:
    """Line 4: one outcome per pivot into the buffer M, then the fit of Eq. (P)."""
    for t in (t for g in groups for t in g.trajectories):
        for ratio, (_, siblings) in zip(t.ratios, branch_groups(t)):
            recoverability.observe(ratio, any(t.branch_rewards[siblings]))
    recoverability.fit()


def unmask_prefix(groups, config) -> list[Group]:
    """The groups as they are trained: with config.train_prefix every branch is a sequence from the question on.

    That is L_aux over prefix and suffix, exactly; the prefix is then computed K + 1 times.
    """
    if not config.train_prefix:
        return groups

    def unmasked(t):
        branches = [t.response[:pivot] + y for pivot, siblings in branch_groups(t) for y in t.branches[siblings]]
        return replace(t, pivot=[0 for _ in t.pivots], branches=branches)

    return [Group(g.prompt, [unmasked(t) if t.branches else t for t in g.trajectories]) for g in groups]


def pack_groups(model, groups, micro_batch_tokens=None):
    """Packed Rows in the order of the groups: one per trajectory, or more where that is cheaper.

    The G responses of a question without branches (all of them with GRPO) are branches of the question itself.
    """
    a, limit = attention_length(model), micro_batch_tokens or math.inf
    trees = []                                       # prompt, response, pivot, branches
    for g in groups:
        if any(t.branches for t in g.trajectories):
            trees += [(g.prompt, t.response, t.pivots, t.branches) for t in g.trajectories]
        else:
            trees.append((g.prompt, g.trajectories[0].response, 0, [t.response for t in g.trajectories[1:]]))
    return [row for tree in trees for row in pack_or_split(*tree, a, limit)]


@torch.no_grad()
def score_groups(model, groups, config, micro_batch_tokens=None) -> tuple[list[torch.Tensor], list[torch.Tensor], int]:
    """(log pi, entropies, tokens that went through the model): what the policy thinks of all loss tokens, in nats.

    A tensor per trajectory, [response | branch 1 | ... | branch K], on the CPU.
    """
    groups = unmask_prefix(groups, config)
    rows = pack_groups(model, groups, micro_batch_tokens)
    batches, rows, scores = micro_batches(rows, micro_batch_tokens, world_size()), [*rows, IDLE], {}
    for batch in batches[rank()::world_size()]:
        batch = batch or [len(rows) - 1]
        both = torch.stack(as_forward(model, score_rows)([rows[i] for i in batch], config.temperature))     # (2, N)
        parts = both.cpu().split([len(rows[i].targets) for i in batch], dim=1)
        scores.update((i, part.clone()) for i, part in zip(batch, parts))    # a view is pickled with the whole
    scores = {i: both for part in gather(lambda: scores) for i, both in part.items()}
    sizes = [sum(map(len, [t.response, *t.branches])) for g in groups for t in g.trajectories]
    logps, entropies = torch.cat([scores[i] for i in range(len(rows) - 1)], dim=1)
    return list(logps.split(sizes)), list(entropies.split(sizes)), sum(len(row.ids) for row in rows[:-1])


def objective(model, groups, config, ref_model=None, old_logps=None, micro_batch_tokens=None, backward=False,
              weights=sequence_weights):
    """Lines 5-6: (loss, metrics), loss = -J of Eq. (J) over all groups (or the authors' form), a scalar.

    ref_model: pi_ref; None leaves the KL term out. old_logps: log pi_old, the first of what score_groups()
    returns; None means that pi_old is the current policy (rho = 1). micro_batch_tokens changes memory, never the
    result; with backward the gradient of the loss is added to the parameters' .grad one micro-batch at a
    time, and the returned loss is detached. weights: those of another method than Eq. (J) (baselines.py).
    metrics, over tokens of root responses unless said: entropy, kl (k3), both in nats; clip_fraction (all
    loss tokens); trained_tokens (neither A nor weight 0), forwarded_tokens (of the packed rows), padding (share of
    what went through the model besides), imbalance (of the ranks' micro-batches, most tokens over mean).
    With several ranks (ranks.py) all have the same groups, each does a part of the micro-batches, and the
    results are those of the whole: loss and metrics summed here, detached, gradients by FSDP.
    """
    groups = unmask_prefix(groups, config)
    rows = pack_groups(model, groups, micro_batch_tokens)
    batches = micro_batches(rows, micro_batch_tokens, world_size())
    metrics, sizes = batch_metrics(rows, batches), [len(row.targets) for row in rows]
    n_main = sum(len(t.response) for g in groups for t in g.trajectories)
    weighted = [row for group in weights(groups, config) for row in group]               # of every trajectory
    factors, counts = token_factors(model, groups, config, weighted, micro_batch_tokens)
    metrics["forwarded_tokens"] += counts.pop("forwarded_tokens")
    factors = None if factors is None else [*factors.split(sizes), torch.zeros(1)]
    if old_logps is not None:
        old_logps = [*torch.cat(old_logps).split(sizes), torch.zeros(1)]
    rows, runs = [*rows, IDLE], [*row_weights(groups, weighted, rows), [(1.0, 0.0, 0.0, 0.0, 0.0)]]
    total, sums = 0.0, {"entropy": 0.0, "kl": 0.0, "clip_fraction": 0.0}
    for batch in batches[rank()::world_size()]:
        batch = batch or [len(rows) - 1]             # nothing left for this rank: it joins in the collectives
        part, ref = [rows[i] for i in batch], None
        if ref_model is not None and config.beta > 0:
            with torch.no_grad():                    # first: its logits need room that is free only now
                ref, _ = as_forward(ref_model, score_rows)(part, config.temperature)
        logp, entropy = as_forward(model, score_rows)(part, config.temperature)          # (N,) loss tokens
        spans = logp.new_tensor([w for i in batch for w in runs[i]]).view(-1, 5)
        advantage, policy, kl, main = spans[:, 1:].repeat_interleave(spans[:, 0].long(), dim=0).T
        if factors is not None:
            kept = torch.cat([factors[i] for i in batch]).to(logp)
            policy, kl = policy * kept, kl * kept
        old = logp.detach() if old_logps is None else torch.cat([old_logps[i] for i in batch]).to(logp)
        loss = -weighted_objective(logp, old, ref, advantage, policy, kl, config.clip_low, config.clip_high,
                                   config.maspo)
        if backward:
            loss.backward()
            loss = loss.detach()
        total = total + loss
        with torch.no_grad():
            ratio = torch.exp(logp - old)
            clipped = (((advantage > 0) & (ratio > 1 + config.clip_high))
                       | ((advantage < 0) & (ratio < 1 - config.clip_low)))
            sums["entropy"] += (entropy * main).sum().item()
            sums["clip_fraction"] += 0 if config.maspo else clipped.sum().item()
            sums["kl"] += (k3_kl(logp, ref) * main).sum().item() if ref is not None else 0.0
    if world_size() > 1:
        everyone = gather(lambda: (total.item(), sums))
        total = total.new_tensor(sum(part for part, _ in everyone))
        sums = {name: sum(part[name] for _, part in everyone) for name in sums}
    return total, {"entropy": sums["entropy"] / n_main, "kl": sums["kl"] / n_main,
                   "clip_fraction": sums["clip_fraction"] / sum(sizes), **counts, **metrics}


def token_factors(model, groups, config, weighted, micro_batch_tokens):
    """(factors of STAPO [loss tokens], or None without it; {trained_tokens, forwarded_tokens for it})."""
    flat, factors, forwarded = per_token([w for row in weighted for w in row]), None, 0                  # (tokens, 3)
    if config.stapo:
        logps, entropies, forwarded = score_groups(model, groups, config, micro_batch_tokens)
        factors = silence_spurious(flat, torch.cat(logps), torch.cat(entropies))
        flat[:, 1] *= factors
    trained = int(((flat[:, 0] != 0) & (flat[:, 1] != 0)).sum())
    return factors, {"trained_tokens": trained, "forwarded_tokens": forwarded}


def row_weights(groups, weighted, rows) -> list[list[tuple]]:
    """The Weights of every packed row, from those of every trajectory; a last number says if the tokens are those of
    a root response (1) or of a branch (0)."""
    runs, result = [], []
    for t, row in zip((t for g in groups for t in g.trajectories), weighted):
        starts = accumulate((w.tokens for w in row), initial=0)
        runs += [(*w, float(start < len(t.response))) for w, start in zip(row, starts)]
    runs = iter(runs)
    for row in rows:
        result.append([])
        while sum(w[0] for w in result[-1]) < len(row.targets):
            result[-1].append(next(runs))
    return result


def batch_metrics(rows, batches) -> dict:
    """forwarded_tokens, padding and imbalance of objective(): what the micro-batches cost."""
    forwarded = sum(len(row.ids) for row in rows)
    loads = [len(batch) * len(rows[batch[0]].ids) if batch else 0 for batch in batches]      # longest first
    rounds = [loads[i:i + world_size()] for i in range(0, len(loads), world_size())]         # one batch per rank
    return {"forwarded_tokens": forwarded, "padding": 1 - forwarded / sum(loads),
            "imbalance": sum(map(max, rounds)) * world_size() / sum(loads)}


def update(model, optimizer, groups, config, ref_model=None, micro_batch_tokens=None,
           weights=sequence_weights) -> dict:
    """Line 8: config.updates optimizer steps on -J.

    Returns the metrics of the last one, with loss, grad_norm (before clipping), optimizer_steps, and all tokens
    forwarded. FloatingPointError when loss or gradient are not finite; the weights are then those of before that
    step.
    """
    old_logps, forwarded = None, 0
    if config.updates > 1:
        old_logps, _, forwarded = score_groups(model, groups, config, micro_batch_tokens)
    for _ in range(config.updates):
        optimizer.zero_grad()
        loss, metrics = objective(model, groups, config, ref_model, old_logps, micro_batch_tokens,
                                  backward=True, weights=weights)
        forwarded += metrics["forwarded_tokens"]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm                 # sharded: of all ranks
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(f"loss {loss.item()}, gradient norm {norm.item()}")
        optimizer.step()
        torch.clear_autocast_cache()                 # bf16 copies of the weights, as they were before
    optimizer.zero_grad()                            # no gradients are kept while the next batch is generated
    return {"loss": loss.item(), "grad_norm": norm.item(), **metrics,
            "forwarded_tokens": forwarded, "optimizer_steps": config.updates}


def summarize(groups, eos_token_ids) -> dict:
    """What lines 1-3 produced, as metrics; shares are of root rollouts unless said, lengths in tokens."""
    roots = [t for g in groups for t in g.trajectories]
    branches = [y for t in roots for y in t.branches]
    siblings = [t.branch_rewards[part] for t in roots for _, part in branch_groups(t)]         # of a pivot each
    depths = [r for t in roots if t.branches for r in t.ratios]
    mean = lambda values: sum(values) / len(values) if values else None    # noqa: E731 (None: of nothing)
    return {
        "reward": mean([t.reward for t in roots]),
        "branch_reward": mean([r for t in roots for r in t.branch_rewards]),
        "dead_groups": mean([len({t.reward for t in g.trajectories}) == 1 for g in groups]),   # of questions
        "dead_branch_groups": mean([len(set(rewards)) == 1 for rewards in siblings]),          # of pivots
        "pivots": len(siblings),
        "pivot_depth": mean(depths),
        "recovered": mean([any(rewards) for rewards in siblings]),                             # of pivots
        "response_length": mean([len(t.response) for t in roots]),
        "branch_length": mean([len(y) for y in branches]),
        "truncated": mean([t.response[-1] not in eos_token_ids for t in roots]),
        "sequences": len(roots) + len(branches),
        "generated_tokens": sum(map(len, branches)) + sum(len(t.response) for t in roots),
    }
