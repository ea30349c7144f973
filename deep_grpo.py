r"""Deep Dense Exploration for LLM Reinforcement Learning via Pivot-Driven Resampling   (arXiv 2602.14169v2)

DEEP-GRPO is one function, `step`, at the end of this file: one step on a batch of questions x. Its lines are

    1  draw G responses tau^i to each x, and reward them: R_i = 1 if right and finished, else 0
    2  for every failed tau^i draw one pivot t* from Q(t), which is proportional to
       P_phi(success | t/T) (t/T)^gamma                                                               pivot.py
    3  draw K continuations y^{i,k} of the prefix s_{<t*}, and reward prefix + suffix               resample.py
    4  y = 1 if any of the K is right: add (r_t*, y) to the buffer M, fit P_phi again         recoverability.py
    5  A_global from the G rewards of x, A_local from the K rewards of a pivot                          loss.py
    6  J = E_x [ 1/G sum_i L_main(tau^i) + lambda/|T_fail| sum_{i in T_fail} 1/K sum_k L_aux(tau^{i,k}) ]  loss.py
    7  the prefix of a branch carries no loss: it was judged once already, in L_main                 packing.py
    8  one clipped AdamW step on -J; with config.updates > 1 several, on the same batch

GRPO is K = 0: lines 2 to 4 vanish, and the first half of J is left. The methods that the paper compares itself with
are other functions in the place of line 2 or of the weights of J (variants/).

Departures from the paper: a step t is a sentence or a line of a response, at the depth t/(T + 1) (pivot.py). phi is the
exact L2-regularised fit to the last 10,000 outcomes, and P is 1 until there are enough of them (recoverability.py). A
response that does not end within the cap has reward 0, and a branch has the room that its prefix left. The form of the
authors' code is Config.objective = "authors" (loss.py).

    python deep_grpo.py        # runs one step on the embedded task and tells what happens
"""
import math
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from loss import clipped_surrogate, k3_kl, loss_table, sequence_weights
from packing import Alone, attention_length, batch_costs, micro_batches, pack_groups
from pivot import draw_pivot, fixed_ends, sentence_ends


@dataclass
class Fork:
    """A state of a rollout from which branches were drawn: the pivot of DEEP-GRPO; tree methods have several."""
    pivot: int                                   # the length of the prefix s_{<t*} in response tokens; t* counts steps
    ratio: float                                 # r_t*: relative depth of that state
    branches: list[list[int]] = field(default_factory=list)      # K suffixes y^{i,k}, token ids
    rewards: list[float] = field(default_factory=list)           # of prefix + suffix


@dataclass
class Trajectory:
    """One root rollout tau^i: its token ids, its reward, and its forks (DEEP-GRPO: none, or one for a failure)."""
    response: list[int]
    reward: float
    forks: list[Fork] = field(default_factory=list)

    @property
    def branches(self) -> list[tuple[int, list[int]]]:
        """(pivot, suffix) of every branch, fork by fork."""
        return [(fork.pivot, y) for fork in self.forks for y in fork.branches]

    @property
    def sequences(self) -> list[list[int]]:
        """What carries loss, in the order of the loss table: the response, then the suffix of every branch."""
        return [self.response, *(y for _, y in self.branches)]


@dataclass
class Group:
    """A question x, as the token ids of its prompt, and its G rollouts."""
    prompt: list[int]
    trajectories: list[Trajectory]


@dataclass(frozen=True)
class Config:
    """Hyper-parameters, with the paper's letters. The defaults are those of the authors' GSM8K script.

    Two defaults differ from that script: there the objective is "authors", and max_new_tokens is what the prompt
    leaves of 1024. Impossible values raise ValueError.
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
    max_new_tokens: int = 768    # cap of a response, prefix and branch together
    updates: int = 1             # optimizer steps on one batch
    max_grad_norm: float = 1.0

    def __post_init__(self):
        least = {"group_size": 1, "branches": 0, "segment_tokens": 0, "max_new_tokens": 1, "updates": 1}
        for name, low in least.items():
            if not isinstance(getattr(self, name), int) or getattr(self, name) < low:
                raise ValueError(f"{name} must be an integer of at least {low}, got {getattr(self, name)}")
        for name in ("lam", "beta", "clip_low", "clip_high"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or positive, got {getattr(self, name)}")
        for name in ("temperature", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not abs(self.gamma) <= 1e6:
            raise ValueError(f"gamma must be a number from -1e6 to 1e6, got {self.gamma}")
        if self.objective not in ("paper", "authors"):
            raise ValueError(f"objective must be 'paper' or 'authors', got {self.objective!r}")


ALONE = Alone()                                  # one process; the trainer passes trainer.model.Ranks instead


# ---- Lines 1 to 4: exploration ----


def roll_out(policy, questions, config) -> list[Group]:
    """Line 1: G responses to every question, rewarded."""
    responses = policy.sample([q.prompt for q in questions], config.group_size, config.max_new_tokens)
    rewards = iter(policy.rewards([(q, y) for q, drawn in zip(questions, responses) for y in drawn]))
    return [Group(q.prompt, [Trajectory(y, next(rewards)) for y in drawn]) for q, drawn in zip(questions, responses)]


def segment_ends(response, config, decode) -> list[int]:
    """The ends of the steps of a response, as numbers of tokens. decode: ids -> text, without special tokens."""
    return fixed_ends(response, config.segment_tokens) if config.segment_tokens else sentence_ends(response, decode)


def choose_pivots(policy, questions, groups, config, recoverability, rng) -> list[Group]:
    """Line 2: the same groups, with a Fork at one pivot t* of every failed rollout, drawn from Q(t) by the numpy
    Generator rng."""
    def with_pivot(tau):
        if tau.reward != 0 or config.branches == 0:
            return tau
        ends = segment_ends(tau.response, config, policy.text)
        return replace(tau, forks=[Fork(*draw_pivot(ends, recoverability, config.gamma, rng))])

    return [Group(g.prompt, [with_pivot(tau) for tau in g.trajectories]) for g in groups]


def resample_failures(policy, questions, groups, config) -> list[Group]:
    """Line 3: the same groups, with K rewarded branches on every Fork. All are drawn in one call."""
    forked = [(q, g, tau, fork) for q, g in zip(questions, groups) for tau in g.trajectories for fork in tau.forks]
    if not forked or config.branches == 0:
        return groups
    drawn = policy.sample([g.prompt + tau.response[:fork.pivot] for _, g, tau, fork in forked], config.branches,
                          [config.max_new_tokens - fork.pivot for *_, fork in forked],      # what the prefix left
                          [len(tau.response) - fork.pivot for *_, tau, fork in forked])   # by which ranks share them
    rewards = iter(policy.rewards([(q, tau.response[:fork.pivot] + y)
                                   for (q, _, tau, fork), branches in zip(forked, drawn) for y in branches]))
    drawn = iter(drawn)

    def branched(fork):
        branches = next(drawn)
        return replace(fork, branches=branches, rewards=[next(rewards) for _ in branches])

    return [Group(g.prompt, [replace(tau, forks=[branched(fork) for fork in tau.forks]) for tau in g.trajectories])
            for g in groups]


def learn_recoverability(groups, recoverability) -> None:
    """Line 4: one outcome per pivot into the buffer M, then the fit of Eq. (P). None: the method has no such fit."""
    if recoverability is None:
        return
    for fork in (fork for g in groups for tau in g.trajectories for fork in tau.forks if fork.branches):
        recoverability.observe(fork.ratio, any(fork.rewards))
    recoverability.fit()


# ---- Lines 5 to 8: learning ----


@torch.no_grad()
def score_groups(model, groups, config, micro_batch_tokens=None, ranks=ALONE):
    """(log-probabilities, entropies, tokens that went through the model) of all loss tokens under the policy, in nats.

    The first two are lists with a tensor per rollout, [response | branch 1 | ... | branch K], fp64 on the CPU.
    """
    rows = pack_groups(groups, attention_length(model), micro_batch_tokens or math.inf)
    sizes = [len(row.targets) for row in rows]
    scores = torch.zeros(2, sum(sizes), dtype=torch.float64, device=model.device)    # log pi, entropy of loss tokens
    of_row = scores.split(sizes, dim=1)                                  # views of it
    for batch in ranks.mine(micro_batches(rows, micro_batch_tokens, ranks.size, ranks.multiple)):
        both = torch.stack(ranks.score(model, [rows[i] for i in batch], config.temperature))             # (2, n)
        for i, part in zip(batch, both.split([sizes[i] for i in batch], dim=1)):
            of_row[i].copy_(part)
    lengths = [sum(map(len, tau.sequences)) for g in groups for tau in g.trajectories]
    logps, entropies = ranks.total(scores).cpu()
    return list(logps.split(lengths)), list(entropies.split(lengths)), sum(len(row.ids) for row in rows)


def objective(model, groups, config, ref_model=None, old_logps=None, micro_batch_tokens=None, backward=False,
              weights=sequence_weights, surrogate=None, reweigh=None, ranks=ALONE):
    """Lines 5 to 7: (loss, metrics), where loss = -J over all groups is a scalar.

    ref_model: pi_ref; None leaves the KL term out. old_logps: log pi_old, the first of what score_groups() returns;
    None means that pi_old is the current policy (rho = 1). micro_batch_tokens changes memory, never the result. With
    backward, the gradient of the loss is added to the parameters' .grad one micro-batch at a time, and the returned
    loss is detached. ranks: which micro-batches this process computes; loss and metrics are those of all processes.

    Other methods replace weights(groups, config), which gives the Spans of loss.py, or surrogate(logp, old_logp, A),
    the clipped part of Eq. (L). reweigh(table, logp, entropy) gives a changed table of loss tokens, from their
    log-probabilities and entropies under the policy.

    A sequence is not computed when its advantage is 0 and no KL term acts on it.
    metrics: kl, the mean k3 over the tokens of rollouts that are computed, in nats (None: there are none);
    clip_fraction, the share of all computed loss tokens that the clip holds; trained_tokens (neither A nor w is 0);
    sampler_gap and sampler_gap_max, the mean and largest |log pi - log pi when it was sampled| over trained tokens
    (None where it is not known: resample.Continuation); and the batch_costs of packing.py.
    """
    table = loss_table(groups, weights(groups, config) if groups else [], old_logps)   # A, w, w_kl, main, log pi_old
    scored = 0
    if reweigh is not None:
        logps, entropies, scored = score_groups(model, groups, config, micro_batch_tokens, ranks)
        table = reweigh(table, *(torch.cat([table[:0, 0], *parts]) for parts in (logps, entropies)))
    has_kl = ref_model is not None and config.beta > 0
    needed, tokens = needed_sequences(groups, table, has_kl)
    table, sampled = table[tokens], sampled_logps(groups)[tokens]
    rows = pack_groups(groups, attention_length(model), micro_batch_tokens or math.inf, needed)
    batches = micro_batches(rows, micro_batch_tokens, ranks.size, ranks.multiple)
    index, constants = torch.arange(len(table), device=model.device), table.to(model.device)
    of_row = index.split([len(row.targets) for row in rows])
    clip = (config.clip_low, config.clip_high) if surrogate is None else None
    surrogate = surrogate or partial(clipped_surrogate, clip_low=config.clip_low, clip_high=config.clip_high)

    # All numbers stay on the device until the end, because reading one would make the device wait for the host.
    loss, scores = constants.new_zeros(()), constants.new_zeros(2, len(table))       # of every token log pi, log pi_ref
    for batch in ranks.mine(batches):
        batch_rows, ref = [rows[i] for i in batch], None
        at = torch.cat([index[:0], *(of_row[i] for i in batch)])     # its n loss tokens; a process without rows has 0
        if has_kl:
            with torch.no_grad():                    # before the policy's own pass, whose activations take this room
                ref, _ = ranks.score(ref_model, batch_rows, config.temperature, entropies=False)
        logp, _ = ranks.score(model, batch_rows, config.temperature, entropies=False)          # (n,)
        A, w, w_kl, _, old = constants[at].to(logp).T
        old = logp.detach() if old_logps is None else old

        # Eq. (J): over these tokens, the sum of w min(rho A, clip(rho) A) - w_kl k3
        J = (w * surrogate(logp, old, A)).sum()
        if ref is not None:
            J = J - (w_kl * k3_kl(logp, ref)).sum()
        if backward:
            (-J).backward()
            J = J.detach()
        loss = loss.to(J) - J
        scores[:, at] = torch.stack([logp.detach(), logp.detach() if ref is None else ref]).to(scores)

    logp, ref = ranks.total(scores).cpu()            # each token was scored by one process
    costs = batch_costs(rows, batches, ranks.size, ranks.multiple)
    costs["forwarded_tokens"] += scored
    old = logp if old_logps is None else table[:, 4]
    return ranks.total(loss), objective_metrics(table, logp, ref, old, sampled, clip) | costs


def needed_sequences(groups, table, has_kl) -> tuple[list[list[bool]], torch.Tensor]:
    """Which sequences have a weight: for every rollout a bool for its response and each branch, and a mask of their
    tokens, [N]."""
    A, w, w_kl, *_ = table.T
    weighs = A * w != 0
    if has_kl:
        weighs |= w_kl != 0
    of_rollout = [[len(y) for y in tau.sequences] for g in groups for tau in g.trajectories]
    lengths = torch.tensor([n for sizes in of_rollout for n in sizes], dtype=torch.long)
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    needed = torch.cat([ends[:1], weighs.cumsum(0)])[ends].diff() > 0    # has any of its tokens a weight?
    return [part.tolist() for part in needed.split([len(sizes) for sizes in of_rollout])], \
        needed.repeat_interleave(lengths)


def sampled_logps(groups) -> torch.Tensor:
    """log pi of all tokens under the policy that drew them, [N], in the order of the table; nan: not known."""
    parts = [np.zeros(0)]
    for y in (y for g in groups for tau in g.trajectories for y in tau.sequences):
        logps = getattr(y, "logps", None)                # those of resample.Continuation
        parts.append(np.full(len(y), math.nan) if logps is None else logps)
    return torch.from_numpy(np.concatenate(parts))


def known_logps(groups) -> torch.Tensor:
    """sampled_logps(groups), all of which must be known. Raises ValueError where one is not."""
    logps = sampled_logps(groups)
    if logps.isnan().any():
        raise ValueError("the log-probabilities with which tokens were drawn are needed, as resample.sample returns "
                         f"them: {int(logps.isnan().sum())} of {len(logps)} are not known")
    return logps


def objective_metrics(table, logp, ref, old, sampled, clip) -> dict:
    """The metrics of objective() but for the batch_costs.

    logp, ref, old, sampled: of every loss token, log pi, log pi_ref, log pi_old and the sampled_logps, [N]. clip:
    (clip_low, clip_high); None: the surrogate has no clip.
    """
    A, w, _, main, _ = table.T
    n_main, trained = main.sum().item(), (A != 0) & (w != 0)
    held, rho = torch.zeros_like(trained), torch.exp(logp - old)
    if clip is not None:
        held = (A > 0) & (rho > 1 + clip[1]) | (A < 0) & (rho < 1 - clip[0])
    gap = (logp - sampled).abs()[trained & ~sampled.isnan()]
    return {"kl": (k3_kl(logp, ref) * main).sum().item() / n_main if n_main else None,
            "clip_fraction": held.sum().item() / max(1, len(table)), "trained_tokens": int(trained.sum()),
            "sampler_gap": gap.mean().item() if len(gap) else None,
            "sampler_gap_max": gap.max().item() if len(gap) else None}


def clip_gradient(model, max_norm) -> torch.Tensor:
    """Clip the gradient to a Euclidean norm of max_norm; returns the norm before, of all shards together."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def update(model, optimizer, groups, config, ref_model=None, micro_batch_tokens=None, ranks=ALONE, stale=False,
           **options) -> dict:
    """Line 8: config.updates clipped optimizer steps on -J, all on the same batch. options: those of objective().

    stale: the batch was drawn by an earlier policy. pi_old is then that policy, and log pi_old was kept when it
    drew the tokens (known_logps).

    Returns the metrics of the last one, with loss, grad_norm (before clipping), optimizer_steps, all tokens that were
    forwarded, and the sampler_gap of the first: later, the policy is another one. Where no sequence has a weight there
    is no gradient, and no step either. Raises FloatingPointError when the loss or the gradient is not finite; the
    weights are then those of before that optimizer step.
    """
    old_logps, gaps, forwarded, steps = None, None, 0, 0     # pi_old of a fresh batch is the current policy
    if stale:
        old_logps = [known_logps(groups)]
    elif config.updates > 1:
        old_logps, _, forwarded = score_groups(model, groups, config, micro_batch_tokens, ranks)
    for _ in range(config.updates):
        optimizer.zero_grad()
        loss, metrics = objective(model, groups, config, ref_model, old_logps, micro_batch_tokens, backward=True,
                                  ranks=ranks, **options)
        forwarded += metrics["forwarded_tokens"]
        gaps = gaps or {name: metrics[name] for name in ("sampler_gap", "sampler_gap_max")}
        norm = clip_gradient(model, config.max_grad_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(f"loss {loss.item()}, gradient norm {norm.item()}")
        steps += any(p.grad is not None for p in model.parameters())
        optimizer.step()                             # leaves parameters without a gradient as they are
        torch.clear_autocast_cache()                 # it holds bf16 copies of the weights as they were before
    optimizer.zero_grad()                            # no gradients are kept while the next batch is generated
    return {"loss": loss.item(), "grad_norm": norm.item(), **metrics, **gaps,
            "forwarded_tokens": forwarded, "optimizer_steps": steps}


# ---- The algorithm ----


def step(policy, batches, config, recoverability, rng, optimizer, ref_model=None,
         choose_pivots=choose_pivots, update=update, **options):
    """One step of DEEP-GRPO; returns (groups, metrics). The model learns in place, and so does the fit of Eq. (P).

    policy: draws and grades (trainer.policy.Policy). batches: an iterable of lists of questions, nearly always one
    list; several share one update. rng: numpy Generator of the pivots. options: those of update() and objective().
    Another method is another function in the place of choose_pivots, or among the options.
    """
    groups = []
    for questions in batches:
        # 1    G responses to every question, rewarded
        drawn = roll_out(policy, questions, config)
        # 2    one pivot t* from Q(t) for every failure
        drawn = choose_pivots(policy, questions, drawn, config, recoverability, rng)
        # 3    K continuations from each pivot, rewarded
        drawn = resample_failures(policy, questions, drawn, config)
        # 4    outcomes into the buffer, fit P(success | r) again
        learn_recoverability(drawn, recoverability)
        groups += drawn
    # 5-8  advantages per stream, J without the prefixes of branches, one clipped AdamW step
    metrics = update(policy.model, optimizer, groups, config, ref_model, **options)
    return groups, metrics


if __name__ == "__main__":
    import runpy  # the story needs a trainer, and this file imports none

    runpy.run_module("experiments.one_step", run_name="__main__")
