"""The whole algorithm against slow twins that follow the paper line by line, one sequence at a time."""
import copy
import math
from dataclasses import fields, replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import EOS, make_model

import deep_grpo
from deep_grpo import (
    Config,
    Fork,
    Group,
    Trajectory,
    choose_pivots,
    learn_recoverability,
    objective,
    resample_failures,
    roll_out,
    score_groups,
    step,
    update,
)
from loss import Span, loss_table, sequence_weights
from packing import Alone, attention_length, pack_groups
from recoverability import Recoverability
from resample import Continuation

BETA = 0.3            # large enough that a wrong KL term shows


def example():
    """Three questions: failures with mixed and with equal siblings; none failed; all failed."""
    return [
        Group([3, 4, 5], [Trajectory([6, 7, 8, 9, EOS], 1.0),
                          Trajectory([6, 6, 2, 9, 3, EOS], 0.0,
                                     [Fork(3, 0.6, [[5, EOS], [7, 7, 4], [9, EOS]], [1.0, 0.0, 0.0])]),
                          Trajectory([9, 2, EOS], 0.0,
                                     [Fork(0, 0.2, [[5, 5, EOS], [4, EOS], [3, 3, 3, 3, 3, 3]], [0.0, 0.0, 0.0])])]),
        Group([2, 9], [Trajectory([5, EOS], 1.0),
                       Trajectory([8, EOS], 1.0),
                       Trajectory([8, 8, 4, EOS], 1.0)]),
        Group([7], [Trajectory([4, 5, 6, 7], 0.0, [Fork(2, 0.5, [[EOS], [6, 8, EOS], [2, 2]], [0.0, 1.0, 1.0])]),
                    Trajectory([4, EOS], 0.0, [Fork(1, 0.7, [[EOS], [EOS], [4, EOS]], [0.0, 0.0, 1.0])]),
                    Trajectory([3, EOS], 0.0, [Fork(0, 0.5, [[2, EOS], [4, EOS], [4, 4, EOS]], [0.0, 1.0, 0.0])])]),
    ]


def forest():
    """Failures with two forks, the deeper one first, beside one with one fork and one with none."""
    return [
        Group([3, 4], [Trajectory([6, 6, 2, 9, 3, EOS], 0.0,
                                  [Fork(3, 0.6, [[5, EOS], [7]], [1.0, 0.0]),
                                   Fork(1, 0.2, [[9, EOS], [4, 4, EOS]], [0.0, 1.0])]),
                       Trajectory([5, EOS], 1.0),
                       Trajectory([5, 8, EOS], 0.0, [Fork(2, 0.5, [[EOS], [3, EOS]], [1.0, 0.0])])]),
        Group([7], [Trajectory([4, 5], 0.0, [Fork(0, 0.3, [[8], [8, EOS]], [0.0, 0.0]),
                                             Fork(1, 0.6, [[2, 2, EOS], [6]], [0.0, 1.0])]),
                    Trajectory([9, EOS], 1.0)]),
    ]


def suffix_logps(model, prefix, tail, temperature):
    """log pi of the tokens of tail after prefix, [len(tail)], through the whole model alone."""
    logits = model(input_ids=torch.tensor([prefix + tail])).logits[0, len(prefix) - 1:-1] / temperature
    return logits.log_softmax(-1)[torch.arange(len(tail)), torch.tensor(tail)]


def spread(rewards, eps=1e-6):
    mean = sum(rewards) / len(rewards)
    return math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1)) + eps


def token_terms(model, ref_model, old_model, prefix, tail, advantage, config):
    """(sum of clipped surrogates, sum of k3) over tail, Eq. (L) token by token."""
    logp, old, ref = (suffix_logps(m, prefix, tail, config.temperature)
                      for m in (model, old_model, ref_model))
    surrogate, kl = 0.0, 0.0
    for t in range(len(tail)):
        rho = torch.exp(logp[t] - old[t].detach())
        clipped = torch.clamp(rho, 1 - config.clip_low, 1 + config.clip_high)
        surrogate = surrogate + torch.min(rho * advantage, clipped * advantage)
        kl = kl + torch.exp(ref[t] - logp[t]) - (ref[t] - logp[t]) - 1
    return surrogate, kl


def papers_j(model, ref_model, old_model, groups, config):
    """Eq. (J), (L), (A) as the paper writes them."""
    total = 0.0
    for g in groups:
        rewards = [t.reward for t in g.trajectories]
        failed = [t for t in g.trajectories if t.reward == 0]
        for t in g.trajectories:
            advantage = (t.reward - sum(rewards) / len(rewards)) / spread(rewards)
            surrogate, kl = token_terms(model, ref_model, old_model, g.prompt, t.response, advantage, config)
            total = total + (surrogate - config.beta * kl) / len(t.response) / len(g.trajectories)
        for t in failed:
            n_branches = sum(len(fork.branches) for fork in t.forks)
            for fork in t.forks:                                         # siblings are those of one fork
                for y, reward in zip(fork.branches, fork.rewards):
                    advantage = (reward - sum(fork.rewards) / len(fork.rewards)) / spread(fork.rewards)
                    prefix = g.prompt + t.response[:fork.pivot]
                    surrogate, kl = token_terms(model, ref_model, old_model, prefix, y, advantage, config)
                    total = total + config.lam * (surrogate - config.beta * kl) / len(y) / n_branches / len(failed)
    return total / len(groups)


def authors_j(model, ref_model, old_model, groups, config):
    """The authors' code: dead sequences leave, then two global token means, KL without lambda."""
    streams = {"main": [], "branch": []}
    for g in groups:
        rewards = [t.reward for t in g.trajectories]
        for t in g.trajectories:
            streams["main"].append((g.prompt, t.response, t.reward - sum(rewards) / len(rewards)))
            for fork in t.forks:
                for y, reward in zip(fork.branches, fork.rewards):
                    advantage = reward - sum(fork.rewards) / len(fork.rewards)
                    streams["branch"].append((g.prompt + t.response[:fork.pivot], y, advantage))
    total = 0.0
    for name, weight in (("main", 1.0), ("branch", config.lam)):
        alive = [s for s in streams[name] if abs(s[2]) >= 1e-8]
        tokens = sum(len(tail) for _, tail, _ in alive)
        for prefix, tail, advantage in alive:
            surrogate, kl = token_terms(model, ref_model, old_model, prefix, tail, advantage, config)
            total = total + (weight * surrogate - config.beta * kl) / tokens
    return total


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_gradients(model, expected, atol=1e-11):
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-8, atol=atol)


def moved(model, distance):
    """A copy of the model with noise on its weights: another policy."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p += distance * torch.randn_like(p)
    return other


class Case(NamedTuple):
    """Groups that are packed into `rows` rows when the attention length is `a` (None: that of the model)."""
    groups: object
    rows: int
    a: float | None = None
    temperature: float = 0.8
    lam: float = 0.4


CASES = {"whole": Case(example, 7, temperature=1.0, lam=1.0), "some split": Case(example, 10, 25.0),
         "all split": Case(example, 24, 1e-9), "several forks": Case(forest, 5), "forks split": Case(forest, 15, 1e-9)}


@pytest.mark.parametrize("twin, name", [(papers_j, "paper"), (authors_j, "authors")])
@pytest.mark.parametrize("same_policy", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_objective_equals_the_slow_twin(model, ref_model, twin, name, same_policy, case, monkeypatch):
    case = CASES[case]
    if case.a is not None:                                           # some trajectories, or all, as separate rows
        monkeypatch.setattr(deep_grpo, "attention_length", lambda model: case.a)
    groups = case.groups()
    assert len(pack_groups(groups, deep_grpo.attention_length(model))) == case.rows
    config = Config(lam=case.lam, beta=BETA, temperature=case.temperature, objective=name, clip_low=0.1, clip_high=0.25)
    old_model = moved(model, 0.0 if same_policy else 0.02)           # an older policy, so that the clip acts
    expected = -twin(model, ref_model, old_model, groups, config)
    expected.backward()
    grads = gradients(model)
    old = None if same_policy else score_groups(old_model, groups, config)[0]
    for micro_batch_tokens in (None, 30, 1)[:2 if case.a else 3]:    # all rows, some, one at a time
        model.zero_grad()
        loss, metrics = objective(model, groups, config, ref_model, old, micro_batch_tokens, backward=True)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-10) and not loss.requires_grad
        assert (metrics["clip_fraction"] > 0) != same_policy
        for key, p in model.named_parameters():
            assert grads[key].abs().max() > 1e-3, key
            torch.testing.assert_close(p.grad, grads[key], rtol=1e-8, atol=1e-11)
    model.zero_grad()
    loss, _ = objective(model, groups, config, ref_model, old)       # no backward: the graph is the caller's
    assert all(p.grad is None for p in model.parameters())
    loss.backward()
    assert_gradients(model, grads)


def test_without_branches_the_objective_is_grpo(model, ref_model):
    groups = [Group(g.prompt, [Trajectory(t.response, t.reward) for t in g.trajectories]) for g in example()]
    config = Config(branches=0, beta=BETA)
    full, _ = objective(model, example(), replace(config, lam=0.0), ref_model)
    grpo, metrics = objective(model, groups, config, ref_model)
    assert grpo.item() == pytest.approx(full.item(), rel=1e-12)
    tokens = sum(len(g.prompt) + sum(len(t.response) for t in g.trajectories) for g in groups)
    assert metrics["forwarded_tokens"] == tokens


def test_rows_without_a_loss_token(model, ref_model):
    """sample() never draws an empty sequence; one that is given counts for nothing, alone in a micro-batch, too."""
    groups = [Group([3, 4], [Trajectory([], 0.0), Trajectory([4], 1.0)]),
              Group([3], [Trajectory([4, 5], 0.0, [Fork(1, 0.5, [[], [7]], [1.0, 0.0])]), Trajectory([4], 1.0)])]
    whole, _ = objective(model, groups, Config(beta=BETA), ref_model)
    whole.backward()
    grads = gradients(model)
    model.zero_grad()
    loss, _ = objective(model, groups, Config(beta=BETA), ref_model, micro_batch_tokens=1, backward=True)
    assert loss.item() == pytest.approx(whole.item(), rel=1e-10)
    assert_gradients(model, grads)


@pytest.mark.parametrize("a, rows", [(1e9, 5), (1e-9, 15)])
def test_scores_of_all_loss_tokens_are_those_of_each_sequence_alone(model, a, rows, monkeypatch):
    monkeypatch.setattr(deep_grpo, "attention_length", lambda model: a)
    groups, config = forest(), Config(temperature=0.7)
    for micro_batch_tokens in (None, 12):
        logps, entropies, forwarded = score_groups(model, groups, config, micro_batch_tokens)
        packed = pack_groups(groups, a, micro_batch_tokens or math.inf)
        assert forwarded == sum(len(row.ids) for row in packed)
        assert len(packed) == rows or micro_batch_tokens
        trajectories = [(g.prompt, t) for g in groups for t in g.trajectories]
        assert len(logps) == len(entropies) == len(trajectories)
        for (prompt, t), logp, entropy in zip(trajectories, logps, entropies):
            sequences = [(prompt, t.response)]
            sequences += [(prompt + t.response[:fork.pivot], y) for fork in t.forks for y in fork.branches]
            slow = torch.cat([suffix_logps(model, prefix, y, 0.7) for prefix, y in sequences])
            p = torch.cat([model(input_ids=torch.tensor([prefix + y])).logits[0, len(prefix) - 1:-1] / 0.7
                           for prefix, y in sequences]).softmax(-1)
            torch.testing.assert_close(logp, slow.detach(), rtol=0, atol=1e-10)
            torch.testing.assert_close(entropy, -(p * p.log()).sum(-1).detach(), rtol=0, atol=1e-10)
            assert not logp.requires_grad and not entropy.requires_grad


REFERENCE = object()


class Given(Alone):
    """Instead of a model's, these log-probabilities: of the policy, and of REFERENCE."""

    def __init__(self, logp, ref_logp):
        self.logp, self.ref_logp = logp, ref_logp

    def score(self, model, rows, temperature, entropies=True):
        return (self.ref_logp if model is REFERENCE else self.logp), torch.zeros_like(self.logp)


def test_the_objective_by_hand(model):
    """Three loss tokens with log-probabilities, advantages and weights that fit on a line."""
    logp = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-1.2, -2.0, -3.3], dtype=torch.float64)
    old = [torch.tensor([-1.0, -2.1], dtype=torch.float64), torch.tensor([-2.5], dtype=torch.float64)]
    groups = [Group([3], [Trajectory([4, 5], 1.0), Trajectory([6], 0.0)])]
    spans = [Span(1, 1.0, 0.5, 0.01), Span(1, 1.0, 0.25, 0.02), Span(1, -2.0, 0.1, 0.03)]
    terms = [0.5 * 1.0, 0.25 * math.exp(0.1), 0.1 * -2 * 0.8]      # ratios 1, e^.1, e^-.5 -> clipped at .8
    k3 = [math.exp(-0.2) + 0.2 - 1, 0.0, math.exp(-0.3) + 0.3 - 1]
    settings = dict(old_logps=old, weights=lambda groups, config: spans, ranks=Given(logp, ref))
    loss, metrics = objective(model, groups, Config(beta=1.0), REFERENCE, **settings)
    assert loss.item() == pytest.approx(-(sum(terms) - 0.01 * k3[0] - 0.03 * k3[2]), rel=1e-12)
    assert metrics["clip_fraction"] == 1 / 3 and metrics["kl"] == pytest.approx(sum(k3) / 3, rel=1e-12)
    loss.backward()
    assert logp.grad.tolist() == pytest.approx([-0.5 + 0.01 * (1 - math.exp(-0.2)), -0.25 * math.exp(0.1),
                                                0.03 * (1 - math.exp(-0.3))], rel=1e-12)
    without, _ = objective(model, groups, Config(beta=1.0), None, **settings)
    assert without.item() == pytest.approx(-sum(terms), rel=1e-12)
    # Another surrogate in the place of the clipped one: nothing is clipped then.
    other, metrics = objective(model, groups, Config(beta=1.0), None, **settings,
                               surrogate=lambda logp, old_logp, A: A * (logp - 2 * old_logp))
    assert other.item() == pytest.approx(-(0.5 * (-1 + 2) + 0.25 * (-2 + 4.2) + 0.1 * -2 * (-3 + 5)), rel=1e-12)
    assert metrics["clip_fraction"] == 0


def test_a_second_update_in_half_precision_is_that_of_the_new_weights():
    # autocast keeps its copies of the weights for as long as it is on: those of before the first update.
    results = []
    for cached in (True, False):
        model = make_model(dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cached):
            metrics = update(model, torch.optim.SGD(model.parameters(), lr=0.05), example(), Config(beta=0, updates=2))
        results.append((metrics, list(model.parameters())))
    assert results[0][0] == results[1][0] and results[0][0]["clip_fraction"] > 0
    assert all(torch.equal(p, q) for p, q in zip(results[0][1], results[1][1]))


def test_the_prefix_of_a_branch_carries_no_loss(model):
    """With equal root rewards only suffixes push: nothing else is in this expression by hand."""
    prefix_token = 20
    group = Group([3], [Trajectory([prefix_token, 5, EOS], 0.0,
                                    [Fork(1, 0.5, [[6, EOS], [7, EOS]], [1.0, 0.0])]),
                        Trajectory([9, EOS], 0.0)])
    loss, _ = objective(model, [group], Config(beta=0.0))
    by_hand = 0.0
    for y, sign in (([6, EOS], 1), ([7, EOS], -1)):                     # R - mean = +-.5, std sqrt(.5)
        logp = suffix_logps(model, [3, prefix_token], y, 1.0)
        by_hand = by_hand - sign * 0.5 / (math.sqrt(0.5) + 1e-6) * torch.exp(logp - logp.detach()).mean() / 2
    got, expected = (torch.autograd.grad(value, list(model.parameters())) for value in (loss, by_hand))
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def nothing_right():
    groups = example()
    for g in groups:
        for t in g.trajectories:
            t.reward = 0.0
            for fork in t.forks:
                fork.rewards = [0.0] * len(fork.branches)
    return groups


@pytest.mark.parametrize("config", [Config(beta=0.0), Config(beta=BETA, objective="authors")])
def test_a_batch_of_equal_rewards_makes_no_step(model, ref_model, config):
    """Not even one of weight decay, or of the moments of earlier steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    update(model, optimizer, example(), config, ref_model)
    before = copy.deepcopy(model.state_dict())
    metrics = update(model, optimizer, nothing_right(), config, ref_model)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    nothing = {"loss": 0.0, "grad_norm": 0.0, "optimizer_steps": 0, "trained_tokens": 0, "forwarded_tokens": 0,
               "kl": None, "clip_fraction": 0.0, "sampler_gap": None, "sampler_gap_max": None}
    assert {name: metrics[name] for name in nothing} == nothing


def test_with_a_kl_term_equal_rewards_still_make_a_step(model, ref_model):
    metrics = update(model, torch.optim.AdamW(model.parameters()), nothing_right(), Config(beta=BETA), ref_model)
    assert metrics["optimizer_steps"] == 1 and metrics["grad_norm"] > 0 and metrics["trained_tokens"] == 0


@pytest.mark.parametrize("groups", [example, forest])
@pytest.mark.parametrize("config", [Config(beta=0.0), Config(beta=BETA, objective="authors"), Config(beta=BETA)])
def test_sequences_without_a_weight_are_not_computed_and_not_missed(model, ref_model, groups, config, monkeypatch):
    old, *_ = score_groups(ref_model, groups(), config)
    results = []
    for micro_batch_tokens in (None, 30):
        model.zero_grad()
        loss, metrics = objective(model, groups(), config, ref_model, old, micro_batch_tokens, backward=True)
        results.append((loss.item(), metrics, gradients(model)))
    model.zero_grad()
    monkeypatch.setattr(deep_grpo, "needed_sequences", lambda groups, table, has_kl: (None, slice(None)))
    loss, metrics = objective(model, groups(), config, ref_model, old, backward=True)
    for less_loss, less, grads in results:
        assert less_loss == pytest.approx(loss.item(), rel=1e-12)
        assert less["trained_tokens"] == metrics["trained_tokens"]
        assert (less["forwarded_tokens"] < metrics["forwarded_tokens"]) == (config != Config(beta=BETA))
        assert_gradients(model, grads)


def test_what_is_left_of_a_batch_without_weights_by_hand(model, ref_model):
    """The second pivot of the first question is dead, and so are the other questions; of the last the branches live."""
    # [3 | 5 | .], [3 | 6 | 2 3 2] and [3 | 3]; nothing; [1 + 2 | 1 | 3 | 2], [1 + 1 | 1 | 1 | 2] and [1 | 2 | 2 | 3]
    expected = (8 + 16 + 6) + 0 + (9 + 6 + 8)
    for config in (Config(beta=0.0), Config(beta=BETA, objective="authors")):
        _, metrics = objective(model, example(), config, ref_model)
        assert metrics["forwarded_tokens"] == expected


def test_at_the_first_update_the_ratio_is_one_and_the_gradient_is_not_zero(model):
    explicit, *_ = score_groups(model, example(), Config())
    results = []
    for old in (None, explicit):
        model.zero_grad()
        loss, metrics = objective(model, example(), Config(beta=0.0), old_logps=old, backward=True)
        assert metrics["clip_fraction"] == 0
        results.append((loss.item(), gradients(model)))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-12)
    for name, grad in results[0][1].items():
        torch.testing.assert_close(grad, results[1][1][name], rtol=1e-8, atol=1e-12)
        assert grad.abs().max() > 1e-3


def test_how_far_the_sampler_is_from_the_update_by_hand(model, ref_model):
    """The policy thought .25 more of all tokens of question 1, and 2 more of one, when it drew them; and that of no
    other question is known. Only tokens that are trained count, in the first update of a batch."""
    groups = example()
    logps, _, _ = score_groups(model, groups, Config())
    trained, scores = [], iter(logps)
    for g in groups[:1]:
        for t in g.trajectories:
            parts = next(scores).split([len(t.response), *(len(y) for _, y in t.branches)])
            t.response = Continuation(t.response, (parts[0] + 0.25).numpy())
            t.response.logps[0] += 1.75
            trained += [2.0] + [0.25] * (len(t.response) - 1)
            parts = iter(parts[1:])
            for fork in t.forks:
                fork.branches = [Continuation(y, (next(parts) + 0.25).numpy()) for y in fork.branches]
                if len(set(fork.rewards)) > 1:
                    trained += [0.25 for y in fork.branches for _ in y]
    assert len(trained) == (5 + 6 + 3) + (2 + 3 + 2)                                     # and a dead pivot
    for config in (Config(beta=BETA), Config(beta=0.0), Config(objective="authors")):
        _, metrics = objective(model, groups, config, ref_model, micro_batch_tokens=25)
        assert metrics["sampler_gap"] == pytest.approx(sum(trained) / len(trained), abs=1e-6)
        assert metrics["sampler_gap_max"] == pytest.approx(2.0, abs=1e-6)
    assert objective(model, example(), Config())[1]["sampler_gap"] is None               # plain lists of tokens
    metrics = update(model, torch.optim.AdamW(model.parameters(), lr=0.01), groups, Config(updates=3), ref_model)
    assert metrics["sampler_gap"] == pytest.approx(sum(trained) / len(trained), abs=1e-6)


def test_the_gap_of_branches_without_a_weight_is_not_counted(model, ref_model):
    groups = example()[:1]
    logps = iter(score_groups(model, groups, Config())[0])
    for t in groups[0].trajectories:
        parts = iter(next(logps).split([len(t.response), *(len(y) for _, y in t.branches)]))
        t.response = Continuation(t.response, (next(parts) + 0.5).numpy())
        for fork in t.forks:
            fork.branches = [Continuation(y, (next(parts) + 2.0).numpy()) for y in fork.branches]
    _, metrics = objective(model, groups, Config(beta=BETA, objective="authors", lam=0.0), ref_model)
    assert [metrics["sampler_gap"], metrics["sampler_gap_max"]] == pytest.approx([0.5, 0.5], abs=1e-6)


def test_metrics_of_the_objective_by_hand(model, ref_model):
    groups = example()
    _, metrics = objective(model, groups, Config(beta=BETA), ref_model, micro_batch_tokens=25)
    k3 = []
    for g in groups:
        for t in g.trajectories:
            ref, logp = (suffix_logps(m, g.prompt, t.response, 1.0) for m in (ref_model, model))
            d = ref - logp
            k3 += (d.exp() - d - 1).tolist()
    assert metrics["kl"] == pytest.approx(sum(k3) / len(k3), rel=1e-9)
    # A != 0: the rollouts of question 1 (5+6+3), its mixed siblings (2+3+2), all siblings of question 3.
    assert metrics["trained_tokens"] == (5 + 6 + 3) + (2 + 3 + 2) + (1 + 3 + 2) + (1 + 1 + 2) + (2 + 2 + 3)
    rollouts_only = objective(model, groups, Config(beta=BETA, lam=0.0))[1]          # w = 0 trains nothing, too
    assert rollouts_only["trained_tokens"] == (5 + 6 + 3)
    # The prompt of question 2, where nothing failed, is computed once for its three rollouts.
    prompts, responses = 3 * 3 + 2 * 1 + 1 * 3, (5 + 6 + 3) + (2 + 2 + 4) + (4 + 2 + 2)
    branches = (7 + 11) + (6 + 4 + 7)
    assert metrics["forwarded_tokens"] == prompts + responses + branches
    # Rows in micro-batches of 25: [17] [16] [11 10] [10 8] [7], of which 1 + 2 are padding.
    assert metrics["padding"] == pytest.approx(3 / 82, rel=1e-12)
    assert objective(model, groups, Config(beta=BETA))[1]["kl"] == 0           # no reference model, no KL
    ref_model.register_forward_pre_hook(lambda *_: pytest.fail("a pass of the reference that nobody needs"))
    assert objective(model, groups, Config(beta=0.0), ref_model)[1]["kl"] == 0


def test_the_reference_gets_no_gradient(model, ref_model):
    objective(model, example(), Config(beta=BETA), ref_model.requires_grad_(True), backward=True)
    assert all(p.grad is None for p in ref_model.parameters())


def test_clip_fraction_by_hand(model):
    failed = Trajectory([7, 8, 9, EOS], 0.0, [Fork(1, 0.5, [[4, EOS], [EOS]], [1.0, 0.0])])
    groups = [Group([3], [Trajectory([5, 6, EOS], 1.0), failed])]
    config = Config(beta=0.0, clip_low=0.3, clip_high=0.2)   # A > 0, rho > 1.2; A < 0, rho < .7
    now, *_ = score_groups(model, groups, config)
    shift = [torch.tensor([0.5, -0.5, 0.4]),                      # log rho, A > 0: two
             torch.tensor([0.5, -0.5, -0.1, -0.3,                 # A < 0: one
                           0.3, 0.1, -0.9])]                      # a branch with A > 0: one; with A < 0: one
    _, metrics = objective(model, groups, config, old_logps=[a - b for a, b in zip(now, shift)])
    assert metrics["clip_fraction"] == pytest.approx(5 / 10)


def test_update_is_adamw_on_the_clipped_gradient(model, ref_model):
    config, twin, widest = Config(beta=BETA, max_grad_norm=0.05), copy.deepcopy(model), []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: widest.append(kwargs["input_ids"].numel()), with_kwargs=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)                               # what others left behind does not count
    metrics = update(model, torch.optim.AdamW(model.parameters(), lr=1e-2), example(), config, ref_model, 30)
    hook.remove()
    assert len(widest) > 1 and max(widest) <= 30 and all(p.grad is None for p in model.parameters())
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    loss = -papers_j(twin, ref_model, copy.deepcopy(twin), example(), config)
    loss.backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in twin.parameters()))
    for p in twin.parameters():
        p.grad *= 0.05 / norm
    optimizer.step()
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-8) and norm > 0.05
    assert metrics["loss"] == pytest.approx(loss.item())
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)       # clip_grad_norm_ divides by norm + 1e-6


@pytest.mark.parametrize("updates", [2, 3])
def test_several_updates_keep_the_old_log_probabilities(model, ref_model, updates):
    config = Config(beta=BETA, updates=updates, max_grad_norm=1e9)
    twin, rollout_policy = copy.deepcopy(model), copy.deepcopy(model)
    metrics = update(model, torch.optim.SGD(model.parameters(), lr=0.05), example(), config, ref_model)
    for _ in range(updates):
        twin.zero_grad()
        (-papers_j(twin, ref_model, rollout_policy, example(), config)).backward()
        with torch.no_grad():
            for p in twin.parameters():
                p -= 0.05 * p.grad
    assert metrics["clip_fraction"] > 0                           # the policy has moved: rho is not 1
    tokens = sum(len(row.ids) for row in pack_groups(example(), attention_length(model)))
    assert metrics["forwarded_tokens"] == (updates + 1) * tokens and metrics["optimizer_steps"] == updates   # and once
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)


@pytest.mark.parametrize("broken, message", [
    ("loss", "loss nan"), ("gradient", "gradient norm"), ("loss alone", "loss nan")])
def test_non_finite_stops_before_the_weights_change(model, broken, message):
    before, options = copy.deepcopy(model.state_dict()), {}
    if broken == "gradient":
        model.model.norm.weight.register_hook(lambda grad: grad * float("inf"))
    elif broken == "loss":
        model.get_output_embeddings().register_forward_hook(lambda module, args, out: out * float("nan"))
    else:                                                         # the gradient of the model is 0, and finite
        options["ranks"] = Given(torch.full((38,), float("nan"), requires_grad=True), None)
    with pytest.raises(FloatingPointError, match=message):
        update(model, torch.optim.AdamW(model.parameters()), example(), Config(beta=0.0), **options)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


class OneOfTwo(Alone):
    """One of two processes. others: what the other one has put into its sums, in order; None: they are its own."""
    size = 2

    def __init__(self, number=0, others=None):
        self.number, self.others, self.scored, self.own = number, others, 0, []

    def mine(self, batches):
        assert len(batches) % 2 == 0
        return batches[self.number::2]

    def total(self, value):
        self.own.append(value.detach())
        return value if self.others is None else value + self.others[len(self.own) - 1]

    def score(self, model, rows, temperature, entropies=True):
        self.scored += 1
        return super().score(model, rows, temperature, entropies)


@pytest.mark.parametrize("micro_batch_tokens", [None, 30])
def test_the_parts_of_two_processes_add_up(model, ref_model, micro_batch_tokens):
    """Each computes its own micro-batches. Loss, metrics, scores and gradients are sums over both."""
    def parts(call):
        alone = [OneOfTwo(number) for number in range(2)]
        for each in alone:
            call(each)
        assert all(each.scored for each in alone)
        assert all((own != 0).any() for each in alone for own in each.own)         # a sum that is forgotten shows
        return [call(OneOfTwo(number, alone[1 - number].own)) for number in range(2)]

    config = Config(beta=BETA, clip_low=0.1, clip_high=0.25)
    old, _, forwarded = score_groups(moved(model, 0.02), example(), config)
    whole = score_groups(model, example(), config)
    for part in parts(lambda ranks: score_groups(model, example(), config, micro_batch_tokens, ranks)):
        for got, expected in zip(part[:2], whole):
            torch.testing.assert_close(torch.cat(got), torch.cat(expected), rtol=0, atol=1e-10)
        assert part[2] == forwarded

    loss, metrics = objective(model, example(), config, ref_model, old, backward=True)
    grads = gradients(model)

    for their_loss, theirs in parts(lambda ranks: objective(
            model, example(), config, ref_model, old, micro_batch_tokens, ranks=ranks)):
        assert their_loss.item() == pytest.approx(loss.item(), rel=1e-10)
        for name in ("kl", "clip_fraction", "trained_tokens", "forwarded_tokens"):
            assert theirs[name] == pytest.approx(metrics[name], rel=1e-10) and theirs[name] > 0
        assert theirs["imbalance"] > 1 == metrics["imbalance"]

    model.zero_grad()
    for number in range(2):                                               # the gradients of both add up
        objective(model, example(), config, ref_model, old, micro_batch_tokens, backward=True, ranks=OneOfTwo(number))
    assert_gradients(model, grads)


def test_a_packed_row_that_is_longer_than_a_micro_batch_is_split(model):
    """The longest packed row has 17 tokens, the longest single sequence 9: what is computed at once fits into 12."""
    assert max(len(row.ids) for row in pack_groups(example(), math.inf)) == 17
    sizes = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True)
    for call in (score_groups, lambda *args, micro_batch_tokens: objective(*args, None, None, micro_batch_tokens)):
        sizes.clear()
        call(model, example(), Config(beta=0.0), micro_batch_tokens=12)
        assert len(sizes) > 5 and max(sizes) <= 12


def test_an_update_is_shared_out_as_it_is_told(model):
    ranks, config = OneOfTwo(), Config(beta=0.0, updates=2)
    update(model, torch.optim.SGD(model.parameters(), lr=0.05), example(), config, ranks=ranks,
           reweigh=lambda table, logp, entropy: table)
    # log pi_old, then for each of two steps the scores for reweigh and one micro-batch of the objective.
    assert (ranks.scored, len(ranks.own)) == (1 + 2 * 2, 1 + 2 * (1 + 2))


def test_reweigh_changes_the_table_by_what_the_policy_thinks(model, ref_model):
    seen, config = [], Config(beta=BETA)

    def halve(table, logp, entropy):
        seen.append((table, logp, entropy))
        return table * torch.tensor([1.0, 0.5, 0.5, 1.0, 1.0])

    plain, before = objective(model, example(), config, ref_model)
    loss, metrics = objective(model, example(), config, ref_model, micro_batch_tokens=30, reweigh=halve)
    assert loss.item() == pytest.approx(plain.item() / 2, rel=1e-10)
    assert metrics["trained_tokens"] == before["trained_tokens"]
    (table, logp, entropy), = seen
    logps, entropies, forwarded = score_groups(model, example(), config)
    assert torch.equal(table, loss_table(example(), sequence_weights(example(), config)))
    torch.testing.assert_close(logp, torch.cat(logps), rtol=0, atol=1e-10)
    torch.testing.assert_close(entropy, torch.cat(entropies), rtol=0, atol=1e-10)
    assert metrics["forwarded_tokens"] == before["forwarded_tokens"] + forwarded


# ---- Lines 1 to 4, with a policy that says what it was asked ----

def word(ids):
    return "".join({2: ".\n", EOS: ""}.get(i, f" w{i}") for i in ids)      # token 2 ends a sentence


class Question(NamedTuple):
    name: str
    prompt: list[int]


A, B = Question("A", [3, 4]), Question("B", [5])


class Scripted:
    """A policy that draws what it is told, grades by a rule, and writes into `events` what it was asked."""
    text = staticmethod(word)

    def __init__(self, *draws, right=lambda question, response: False, model=None):
        self.draws, self.right, self.model, self.events = iter(draws), right, model, []

    def sample(self, prefixes, k, max_new_tokens, expected_tokens=None):
        self.events.append(("sample", prefixes, k, max_new_tokens, expected_tokens))
        return next(self.draws)

    def rewards(self, pairs):
        self.events.append(("rewards", pairs))
        return [float(self.right(question, response)) for question, response in pairs]


def test_roll_out_grades_every_response_with_its_own_question():
    drawn = [[[10 * x + i, EOS] for i in range(3)] for x in range(2)]
    policy = Scripted(drawn, right=lambda question, y: question is B and y == [11, EOS])
    groups = roll_out(policy, [A, B], Config(group_size=3, max_new_tokens=20))
    assert policy.events == [("sample", [[3, 4], [5]], 3, 20, None),
                             ("rewards", [(A, [0, EOS]), (A, [1, EOS]), (A, [2, EOS]),
                                          (B, [10, EOS]), (B, [11, EOS]), (B, [12, EOS])])]
    assert groups == [Group([3, 4], [Trajectory([0, EOS], 0.0), Trajectory([1, EOS], 0.0), Trajectory([2, EOS], 0.0)]),
                      Group([5], [Trajectory([10, EOS], 0.0), Trajectory([11, EOS], 1.0), Trajectory([12, EOS], 0.0)])]


def three_sentences():
    return [Group([3, 4], [Trajectory([5, 2, 6, 2, 7, EOS], 0.0), Trajectory([5, EOS], 1.0)]),
            Group([5], [Trajectory([8, 9, 2, 8, 2, EOS], 0.0)])]


def pivots_of(groups):
    """One (pivot, ratio) per rollout that has a fork; DEEP-GRPO has no more."""
    assert all(len(t.forks) <= 1 and not t.branches for g in groups for t in g.trajectories)
    return [(f.pivot, round(f.ratio, 6)) for g in groups for t in g.trajectories for f in t.forks]


def test_one_pivot_for_every_failure_at_ends_of_sentences():
    groups, estimate, policy = three_sentences(), Recoverability(), Scripted()

    def chosen(config, seed):
        return choose_pivots(policy, [A, B], groups, config, estimate, np.random.default_rng(seed))

    drawn = [chosen(Config(), seed) for seed in range(200)]
    assert all(g[0].trajectories[1] == groups[0].trajectories[1] for g in drawn)           # the right one has none
    first, second = zip(*map(pivots_of, drawn))
    assert set(first) == {(0, 0.25), (2, 0.5), (4, 0.75)}
    assert set(second) == {(0, 0.333333), (3, 0.666667)}           # the last sentence ends with the response
    assert groups == three_sentences()                             # the argument is left alone
    assert {pivots_of(chosen(Config(segment_tokens=4), seed))[0][0] for seed in range(50)} == {0, 4}
    for seed in range(50):                                         # gamma = -20 resamples from the question
        assert pivots_of(chosen(Config(gamma=-20.0), seed)) == [(0, 0.25), (0, 0.333333)]
    assert chosen(Config(branches=0), 0) == groups                 # GRPO has no use for a pivot
    estimate.w, estimate.b, estimate.fitted = -40.0, 20.0, True    # P falls from 1 to 0 at r = .5
    assert {pivots_of(chosen(Config(), seed))[0][0] for seed in range(50)} == {0, 2}


def test_branches_continue_the_exact_prefix_within_the_room_that_is_left():
    groups = three_sentences()
    groups[0].trajectories[0].forks = [Fork(4, 0.75)]
    groups[1].trajectories[0].forks = [Fork(3, 0.5)]
    before = copy.deepcopy(groups)
    policy = Scripted([[[7] * 6, [6, EOS]], [[7] * 6 + [EOS], [9, EOS]]], right=lambda _, y: y[-2:] == [6, EOS])
    branched = resample_failures(policy, [A, B], groups, Config(branches=2, max_new_tokens=10))
    # One call; 10 less what each pivot keeps; the rest of each failed response, 6 - 4 and 6 - 3 tokens.
    assert policy.events == [("sample", [[3, 4, 5, 2, 6, 2], [5, 8, 9, 2]], 2, [6, 7], [2, 3]),
                             ("rewards", [(A, [5, 2, 6, 2] + [7] * 6), (A, [5, 2, 6, 2, 6, EOS]),
                                          (B, [8, 9, 2] + [7] * 6 + [EOS]), (B, [8, 9, 2, 9, EOS])])]
    assert branched == [
        Group([3, 4], [Trajectory([5, 2, 6, 2, 7, EOS], 0.0, [Fork(4, 0.75, [[7] * 6, [6, EOS]], [0.0, 1.0])]),
                       Trajectory([5, EOS], 1.0)]),
        Group([5], [Trajectory([8, 9, 2, 8, 2, EOS], 0.0, [Fork(3, 0.5, [[7] * 6 + [EOS], [9, EOS]], [0.0, 0.0])])])]
    assert groups == before                                             # the argument is left alone

    estimate = Recoverability(min_observations=1)
    learn_recoverability(branched, estimate)
    assert list(estimate.outcomes) == [(0.75, True), (0.5, False)]      # y = 1: at least one is right
    assert estimate.fitted and estimate.w > 0                           # and P has learned from them


def test_several_forks_of_a_rollout_are_resampled_in_order_and_learned_from_one_by_one():
    groups = three_sentences()
    groups[0].trajectories[0].forks = [Fork(4, 0.75), Fork(2, 0.5)]
    groups[1].trajectories[0].forks = [Fork(3, 0.6)]
    policy = Scripted([[[10 * n], [10 * n + 1]] for n in range(3)], right=lambda _, y: y[-1] in (11, 20))
    branched = resample_failures(policy, [A, B], groups, Config(branches=2, max_new_tokens=10))
    assert policy.events[0] == ("sample", [[3, 4, 5, 2, 6, 2], [3, 4, 5, 2], [5, 8, 9, 2]], 2, [6, 8, 7], [2, 4, 3])
    assert branched[0].trajectories[0].forks == [Fork(4, 0.75, [[0], [1]], [0.0, 0.0]),
                                                 Fork(2, 0.5, [[10], [11]], [0.0, 1.0])]
    assert branched[1].trajectories[0].forks == [Fork(3, 0.6, [[20], [21]], [1.0, 0.0])]
    estimate = Recoverability()
    learn_recoverability(branched, estimate)
    assert list(estimate.outcomes) == [(0.75, False), (0.5, True), (0.6, True)]
    learn_recoverability(branched, None)                                # a method without a fit of Eq. (P)


def test_without_failures_or_branches_nothing_is_resampled():
    groups = [Group([3], [Trajectory([5, EOS], 1.0)])]
    assert resample_failures(None, [A], groups, Config()) == groups
    groups = [Group([3], [Trajectory([5, EOS], 0.0, [Fork(1, 0.5)])])]
    assert resample_failures(None, [A], groups, Config(branches=0)) == groups


# ---- step() ----

class Watched(Recoverability):
    """Writes its calls into the events of a policy."""

    def __init__(self, events, **options):
        super().__init__(**options)
        self.events = events

    def observe(self, ratio, success):
        self.events.append(("observe", round(ratio, 6), success))
        super().observe(ratio, success)

    def fit(self):
        self.events.append(("fit",))
        super().fit()


class Step:
    """Ingredients of step(): A with two failures and a right rollout, B with right rollouts only.

    A rollout is right when it holds token 9. gamma = 400 makes the deepest state nearly certain.
    """
    config = Config(group_size=3, branches=2, gamma=400.0, max_new_tokens=10, beta=BETA, max_grad_norm=1e9)
    rollouts = [[[6, 2, 7, 2, 8, EOS], [9, EOS], [6, 2, 6, EOS]], [[7, 9, EOS], [9, EOS], [8, 9, EOS]]]
    branches = [[[9, EOS], [6, EOS]], [[6, EOS], [6] * 8]]
    groups = [
        Group([3, 4], [Trajectory([6, 2, 7, 2, 8, EOS], 0.0, [Fork(4, 3 / 4, [[9, EOS], [6, EOS]], [1.0, 0.0])]),
                       Trajectory([9, EOS], 1.0),
                       Trajectory([6, 2, 6, EOS], 0.0, [Fork(2, 2 / 3, [[6, EOS], [6] * 8], [0.0, 0.0])])]),
        Group([5], [Trajectory([7, 9, EOS], 1.0), Trajectory([9, EOS], 1.0), Trajectory([8, 9, EOS], 1.0)])]
    explored = [
        ("sample", [[3, 4], [5]], 3, 10, None),
        ("rewards", [(A, rollouts[0][0]), (A, rollouts[0][1]), (A, rollouts[0][2]),
                     (B, rollouts[1][0]), (B, rollouts[1][1]), (B, rollouts[1][2])]),
        ("sample", [[3, 4, 6, 2, 7, 2], [3, 4, 6, 2]], 2, [10 - 4, 10 - 2], [6 - 4, 4 - 2]),
        ("rewards", [(A, [6, 2, 7, 2, 9, EOS]), (A, [6, 2, 7, 2, 6, EOS]), (A, [6, 2, 6, EOS]), (A, [6, 2] + [6] * 8)]),
        ("observe", 0.75, True), ("observe", 0.666667, False), ("fit",)]

    def __init__(self, model, *draws, config=config):
        self.policy = Scripted(*(draws or (self.rollouts, self.branches)), right=lambda _, y: 9 in y, model=model)
        self.config, self.events = config, self.policy.events
        self.recoverability = Watched(self.events)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def take(self, batches, recoverability=..., **options):
        recoverability = self.recoverability if recoverability is ... else recoverability
        return step(self.policy, batches, self.config, recoverability, np.random.default_rng(0), self.optimizer,
                    **options)

    def update(self, *args, **options):
        """A stand-in for update()."""
        self.events.append(("update", *args, options))
        return {"loss": 12.5}


def test_a_step_is_the_lines_of_the_algorithm_in_order(model, ref_model):
    taken = Step(model)
    groups, metrics = taken.take([[A, B]], ref_model=ref_model, update=taken.update, micro_batch_tokens=30)
    assert taken.events[:-1] == taken.explored
    # One Fork per failure, none for right rollouts.
    assert groups == taken.groups and metrics == {"loss": 12.5}
    name, its_model, optimizer, its_groups, config, its_ref_model, options = taken.events[-1]
    assert (name, its_groups, options) == ("update", groups, {"micro_batch_tokens": 30})
    assert (its_model, optimizer, config, its_ref_model) == (model, taken.optimizer, taken.config, ref_model)


@pytest.mark.parametrize("form", ["paper", "authors"])
def test_a_step_follows_the_gradient_of_the_objective_on_its_groups(model, ref_model, form):
    config, twin = replace(Step.config, objective=form), copy.deepcopy(model)
    groups, metrics = Step(model, config=config).take([[A, B]], ref_model=ref_model, micro_batch_tokens=30)
    loss, expected = objective(twin, groups, config, ref_model, backward=True)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-10) and metrics["kl"] == pytest.approx(expected["kl"])
    for p, q in zip(model.parameters(), twin.parameters()):
        assert q.grad.abs().max() > 1e-3
        torch.testing.assert_close(p, q - 0.05 * q.grad, rtol=0, atol=1e-10)


def test_with_k_0_a_step_samples_once_and_learns_nothing_of_depth(model):
    taken = Step(model, Step.rollouts, config=replace(Step.config, branches=0))
    groups, metrics = taken.take([[A, B]])
    assert [event for event in taken.events if event != ("fit",)] == taken.explored[:2]
    assert not any(t.forks for g in groups for t in g.trajectories)
    assert not taken.recoverability.outcomes and not taken.recoverability.fitted
    assert metrics["trained_tokens"] == 6 + 2 + 4 and metrics["grad_norm"] > 1e-3               # the rollouts of A


def test_several_batches_share_one_update_and_each_learns_from_the_last(model):
    """The second batch is asked for only when the first is done, and its pivots follow what the first has shown."""
    hopeless = [[[[6, 2, 7, 2, 8, EOS]] * 3], [[[6, EOS]] * 2] * 3]              # no branch of a deep pivot is right
    easy = [[[[7, 2, 7, 2, 8, EOS]] * 3], [[[9, EOS]] * 2] * 3]
    taken = Step(model, *hopeless, *easy, config=replace(Step.config, gamma=0.0))
    taken.recoverability = Watched(taken.events, min_observations=3)
    for ratio in (0.2, 0.22, 0.24):
        Recoverability.observe(taken.recoverability, ratio, True)
    predictions = []

    def certain(policy, questions, groups, config, recoverability, rng):
        predictions.append((questions, recoverability.predict(np.array([0.25, 0.5, 0.75])).tolist()))
        return choose_pivots(policy, questions, groups, replace(config, gamma=400.0), recoverability, rng)

    def batches():
        for question in (A, B):
            taken.events.append(("batch", question.name))
            yield [question]

    groups, _ = taken.take(batches(), choose_pivots=certain, update=taken.update)
    assert [event[0] for event in taken.events] == [
        *["batch", "sample", "rewards", "sample", "rewards", "observe", "observe", "observe", "fit"] * 2, "update"]
    assert [event[1:] for event in taken.events if event[0] == "observe"] == [(0.75, False)] * 3 + [(0.75, True)] * 3
    assert [g.prompt for g in groups] == [[3, 4], [5]] and taken.events[-1][3] == groups
    (first, unfitted), (second, fitted) = predictions
    assert 0.9 > fitted[0] > fitted[1] > fitted[2]
    assert (first, second) == ([A], [B]) and unfitted == [1.0] * 3


def test_another_method_takes_the_place_of_line_2_and_of_the_weights(model):
    def at_the_question(policy, questions, groups, config, recoverability, rng):
        return [Group(g.prompt, [replace(t, forks=[Fork(0, 0.1)]) for t in g.trajectories[:1]] + g.trajectories[1:])
                for g in groups]

    def weights(groups, config):
        seen.append(groups)
        return sequence_weights(groups, replace(config, lam=0.0))

    seen, twin, taken = [], copy.deepcopy(model), Step(model)
    groups, metrics = taken.take([[A, B]], recoverability=None, choose_pivots=at_the_question, weights=weights)
    assert taken.events[2][:4] == ("sample", [[3, 4], [5]], 2, [10, 10]) and len(taken.events) == 4
    assert [[len(t.forks) for t in g.trajectories] for g in groups] == [[1, 0, 0], [1, 0, 0]] and seen == [groups]
    loss, _ = objective(twin, groups, replace(Step.config, lam=0.0))
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-10)


def test_defaults_are_those_of_the_authors_script():
    settings = dict(group_size=8, branches=8, gamma=2.0, lam=1.0, beta=1e-4, clip_low=0.2, clip_high=0.2,
                    temperature=1.0, objective="paper", segment_tokens=0, max_new_tokens=768, updates=1,
                    max_grad_norm=1.0)
    assert Config() == Config(**settings) and {field.name for field in fields(Config)} == set(settings)
    assert Config(branches=0, lam=0.0, beta=0.0, clip_low=0.0, clip_high=0.0)      # off, not impossible


@pytest.mark.parametrize("name, value", [
    ("group_size", 0), ("branches", -1), ("lam", -0.1), ("beta", float("nan")), ("temperature", 0.0),
    ("objective", "ppo"), ("gamma", float("inf")), ("max_new_tokens", 0), ("updates", 0), ("clip_low", -1.0),
    ("segment_tokens", 1.5), ("segment_tokens", -1), ("clip_high", -0.1), ("lam", float("inf")),
    ("max_grad_norm", 0.0)])
def test_impossible_settings_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        Config(**{name: value})


def test_a_fork_without_branches_is_as_if_it_were_not_there(model):
    """It once counted as a failed outcome in the buffer, and the weights of J ended in a ValueError."""
    estimate, bare = Recoverability(), Trajectory([5, EOS], 0.0, [Fork(0, 0.5)])
    learn_recoverability([Group([3], [bare])], estimate)
    assert not estimate.outcomes
    for config in (Config(), Config(objective="authors")):
        without = sequence_weights([Group([3], [Trajectory([5, EOS], 0.0), Trajectory([6, EOS], 1.0)])], config)
        assert sequence_weights([Group([3], [bare, Trajectory([6, EOS], 1.0)])], config) == without


def test_a_reward_between_0_and_1_is_a_success():
    """Whatever is above 0 is a success: it is not branched, and its pivot is recovered."""
    groups = three_sentences()
    groups[0].trajectories[1].reward = 0.5
    chosen = choose_pivots(Scripted(), [A, B], groups, Config(), Recoverability(), np.random.default_rng(0))
    assert [[len(t.forks) for t in g.trajectories] for g in chosen] == [[1, 0], [1]]
    forked = Group([3], [Trajectory([5, EOS], 0.0, [Fork(1, 0.5, [[4], [5]], [0.0, 0.5])])])
    estimate = Recoverability()
    learn_recoverability([forked], estimate)
    assert list(estimate.outcomes) == [(0.5, True)]


def test_the_clip_fraction_is_of_all_computed_tokens(model):
    """Also of those whose advantage is 0, on which the KL term acts."""
    logp = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64)
    old = [torch.tensor([-1.0, -2.0], dtype=torch.float64), torch.tensor([-2.5], dtype=torch.float64)]
    groups = [Group([3], [Trajectory([4, 5], 1.0), Trajectory([6], 0.0)])]
    spans = [Span(1, 1.0, 0.5, 0.01), Span(1, 0.0, 0.25, 0.02), Span(1, -2.0, 0.1, 0.03)]
    _, metrics = objective(model, groups, Config(beta=1.0), REFERENCE, old_logps=old,
                           weights=lambda groups, config: spans, ranks=Given(logp, logp - 0.1))
    assert metrics["clip_fraction"] == pytest.approx(1 / 3, rel=1e-12) and metrics["trained_tokens"] == 2


def test_trained_tokens_have_an_advantage_and_a_weight(model, ref_model):
    """With lambda = 0 the branches have advantages and no weight."""
    _, metrics = objective(model, example()[:1], Config(beta=BETA, objective="authors", lam=0.0), ref_model)
    assert metrics["trained_tokens"] == 5 + 6 + 3
