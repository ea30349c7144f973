"""The whole algorithm against slow twins that follow the paper line by line, one sequence at a time."""
import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import EOS, make_model

import deep_grpo
from deep_grpo import (
    Config,
    Group,
    Trajectory,
    choose_pivots,
    learn_recoverability,
    objective,
    resample,
    roll_out,
    score_groups,
    summarize,
    update,
)
from loss import per_token, sequence_weights, silence_spurious
from recoverability import Recoverability

BETA = 0.3            # large enough that a wrong KL term shows


def example():
    """Three questions: failures with mixed and with equal siblings; none failed; all failed."""
    return [
        Group([3, 4, 5], [Trajectory([6, 7, 8, 9, EOS], 1.0),
                          Trajectory([6, 6, 2, 9, 3, EOS], 0.0, 3,
                                     [[5, EOS], [7, 7, 4], [9, EOS]], [1.0, 0.0, 0.0], 0.6),
                          Trajectory([9, 2, EOS], 0.0, 0,
                                     [[5, 5, EOS], [4, EOS], [3, 3, 3, 3, 3, 3]], [0.0, 0.0, 0.0], 0.2)]),
        Group([2, 9], [Trajectory([5, EOS], 1.0),
                       Trajectory([8, EOS], 1.0),
                       Trajectory([8, 8, 4, EOS], 1.0)]),
        Group([7], [Trajectory([4, 5, 6, 7], 0.0, 2, [[EOS], [6, 8, EOS], [2, 2]], [0.0, 1.0, 1.0], 0.5),
                    Trajectory([4, EOS], 0.0, 1, [[EOS], [EOS], [4, EOS]], [0.0, 0.0, 1.0], 0.7),
                    Trajectory([3, EOS], 0.0, 0, [[2, EOS], [4, EOS], [4, 4, EOS]], [0.0, 1.0, 0.0], 0.5)]),
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
            k = len(t.branches) // len(t.pivots)                         # siblings: those of one pivot
            for j, (y, reward) in enumerate(zip(t.branches, t.branch_rewards)):
                siblings, kept = t.branch_rewards[j // k * k:j // k * k + k], t.response[:t.pivots[j // k]]
                advantage = (reward - sum(siblings) / k) / spread(siblings)
                prefix, trained = (g.prompt, kept + y) if config.train_prefix else (g.prompt + kept, y)
                surrogate, kl = token_terms(model, ref_model, old_model, prefix, trained, advantage, config)
                l_aux = (surrogate - config.beta * kl) / len(trained)
                total = total + config.lam * l_aux / len(t.branches) / len(failed)
    return total / len(groups)


def authors_j(model, ref_model, old_model, groups, config):
    """The authors' code: dead sequences leave, then two global token means, KL without lambda."""
    streams = {"main": [], "branch": []}
    for g in groups:
        rewards = [t.reward for t in g.trajectories]
        for t in g.trajectories:
            streams["main"].append((g.prompt, t.response, t.reward - sum(rewards) / len(rewards)))
            for y, reward in zip(t.branches, t.branch_rewards):
                advantage = reward - sum(t.branch_rewards) / len(t.branches)
                streams["branch"].append((g.prompt + t.response[:t.pivot], y, advantage))
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


@pytest.mark.parametrize("twin, name", [(papers_j, "paper"), (authors_j, "authors")])
@pytest.mark.parametrize("same_policy", [True, False])
@pytest.mark.parametrize("temperature, lam, a, rows", [(1.0, 1.0, None, 7), (0.8, 0.4, 25.0, 10), (0.8, 0.4, 1e-9, 24)])
def test_objective_equals_the_slow_twin(model, ref_model, twin, name, same_policy, temperature, lam, a, rows,
                                        monkeypatch):
    if a is not None:                                                # some trajectories, or all, as separate rows
        monkeypatch.setattr(deep_grpo, "attention_length", lambda model: a)
    assert len(deep_grpo.pack_groups(model, example())) == rows
    config = Config(lam=lam, beta=BETA, temperature=temperature, objective=name, clip_low=0.1, clip_high=0.25)
    old_model = copy.deepcopy(model)
    if not same_policy:                                              # an older policy, so that the clip acts
        with torch.no_grad():
            for p in old_model.parameters():
                p += 0.02 * torch.randn_like(p)
    expected = -twin(model, ref_model, old_model, example(), config)
    expected.backward()
    grads = gradients(model)
    old = None if same_policy else score_groups(old_model, example(), config)[0]
    for micro_batch_tokens in (None, 30, 1):                         # all rows, some, one at a time
        model.zero_grad()
        loss, metrics = objective(model, example(), config, ref_model, old, micro_batch_tokens, backward=True)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-10) and not loss.requires_grad
        assert (metrics["clip_fraction"] > 0) != same_policy
        for key, p in model.named_parameters():
            assert grads[key].abs().max() > 1e-3, key
            torch.testing.assert_close(p.grad, grads[key], rtol=1e-8, atol=1e-11)
    model.zero_grad()
    loss, _ = objective(model, example(), config, ref_model, old)    # no backward: the graph is the caller's
    assert all(p.grad is None for p in model.parameters())
    loss.backward()
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[key], rtol=1e-8, atol=1e-11)


def test_without_branches_the_objective_is_grpo(model, ref_model):
    groups = [Group(g.prompt, [Trajectory(t.response, t.reward) for t in g.trajectories]) for g in example()]
    config = Config(branches=0, beta=BETA)
    full, _ = objective(model, example(), replace(config, lam=0.0), ref_model)
    grpo, metrics = objective(model, groups, config, ref_model)
    assert grpo.item() == pytest.approx(full.item(), rel=1e-12)
    tokens = sum(len(g.prompt) + sum(len(t.response) for t in g.trajectories) for g in groups)
    assert metrics["forwarded_tokens"] == tokens


def test_the_unmasked_prefix_carries_the_loss_of_every_branch(model, ref_model):
    """The ablation: L_aux over prefix and suffix, with two pivots and with one."""
    groups = example()
    groups[0].trajectories[1].pivot = [3, 1]
    groups[0].trajectories[1].branches.append([8])
    groups[0].trajectories[1].branch_rewards.append(1.0)                 # siblings 1 0 | 0 1
    config, old_model = Config(lam=0.4, beta=BETA, train_prefix=True), copy.deepcopy(model)
    with torch.no_grad():
        for p in old_model.parameters():
            p += 0.02 * torch.randn_like(p)
    expected = -papers_j(model, ref_model, old_model, groups, config)
    expected.backward()
    grads = gradients(model)
    old, _, forwarded = score_groups(old_model, groups, config)
    for micro_batch_tokens in (None, 30):
        model.zero_grad()
        loss, metrics = objective(model, groups, config, ref_model, old, micro_batch_tokens, backward=True)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
        for key, p in model.named_parameters():
            torch.testing.assert_close(p.grad, grads[key], rtol=1e-8, atol=1e-11)
    masked, _ = objective(model, groups, replace(config, train_prefix=False), ref_model)
    assert abs(masked.item() - loss.item()) > 1e-3 and forwarded == metrics["forwarded_tokens"]


def test_rows_without_a_loss_token(model, ref_model):
    """sample() never draws an empty sequence; one that is given counts for nothing, alone in a micro-batch, too."""
    groups = [Group([3, 4], [Trajectory([], 0.0), Trajectory([4], 1.0)]),
              Group([3], [Trajectory([4, 5], 0.0, 1, [[], [7]], [1.0, 0.0]), Trajectory([4], 1.0)])]
    whole, _ = objective(model, groups, Config(beta=BETA), ref_model)
    whole.backward()
    grads = gradients(model)
    model.zero_grad()
    loss, _ = objective(model, groups, Config(beta=BETA), ref_model, micro_batch_tokens=1, backward=True)
    assert loss.item() == pytest.approx(whole.item(), rel=1e-10)
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[key], rtol=1e-8, atol=1e-11)


def test_a_trained_prefix_is_a_smaller_lambda_in_the_authors_form(model):
    """Siblings share the prefix, their advantages sum to 0 and all tokens weigh the same: at rho = 1 the prefix has no
    gradient. What is left is the larger T_branch, which counts prefix tokens."""
    alive = [(len(y), t.pivot) for g in example() for t in g.trajectories if len(set(t.branch_rewards)) > 1
             for y in t.branches]
    smaller = sum(n for n, _ in alive) / sum(n + pivot for n, pivot in alive)
    results = []
    for settings in (dict(train_prefix=True, lam=1.0), dict(lam=smaller), dict(lam=1.0)):
        model.zero_grad()
        objective(model, example(), Config(beta=0.0, objective="authors", **settings), backward=True)
        results.append(gradients(model))
    for name, grad in results[0].items():
        torch.testing.assert_close(grad, results[1][name], rtol=1e-8, atol=1e-11)
    assert any((results[0][name] - grad).abs().max() > 1e-3 for name, grad in results[2].items()) and smaller < 0.9


def test_two_pivots_in_one_row_and_in_separate_rows(model, monkeypatch):
    failed = Trajectory([6, 6, 2, 9, 3, EOS], 0.0, [3, 1], [[5, EOS], [7], [9, EOS], [4, 4, EOS]], [1.0, 0.0, 1.0, 0.0],
                        [0.6, 0.2])
    groups = [Group([3, 4], [failed, Trajectory([5, EOS], 1.0)])]
    slow = torch.cat([suffix_logps(model, [3, 4] + failed.response[:kept], y, 1.0) for kept, y in
                      [(0, failed.response), *zip([3, 3, 1, 1], failed.branches)]])
    for a, rows in ((1e9, 2), (1e-9, 6)):
        monkeypatch.setattr(deep_grpo, "attention_length", lambda model, a=a: a)
        assert len(deep_grpo.pack_groups(model, groups)) == rows
        (logp, _), _, forwarded = score_groups(model, groups, Config())
        torch.testing.assert_close(logp, slow.detach(), rtol=0, atol=1e-10)
        assert forwarded == sum(len(row.ids) for row in deep_grpo.pack_groups(model, groups))


def test_stapo_in_the_objective(model, ref_model):
    config = Config(beta=BETA, stapo=True, temperature=0.4)
    logps, entropies, forwarded = score_groups(model, example(), config)
    flat = per_token([w for group in sequence_weights(example(), config) for row in group for w in row])
    factors = silence_spurious(flat, torch.cat(logps), torch.cat(entropies))
    assert 0 < (factors == 0).sum() < 10                                 # some tokens of this model are that unlikely
    refs, *_ = score_groups(ref_model, example(), config)
    d = torch.cat(refs) - torch.cat(logps)
    by_hand = -(factors * (flat[:, 1] * flat[:, 0] - flat[:, 2] * (d.exp() - d - 1))).sum().item()       # rho = 1
    plain, before = objective(model, example(), replace(config, stapo=False), ref_model)
    for micro_batch_tokens in (None, 30):
        loss, metrics = objective(model, example(), config, ref_model, None, micro_batch_tokens)
        assert loss.item() == pytest.approx(by_hand, rel=1e-10) and abs(loss - plain) > 1e-3
        assert metrics["trained_tokens"] == ((factors != 0) & (flat[:, 0] != 0)).sum() < before["trained_tokens"]
    assert metrics["forwarded_tokens"] == before["forwarded_tokens"] + forwarded


def test_maspo_in_the_update_acts_from_the_second_step_on(model):
    twin, metrics = copy.deepcopy(model), {}
    for m, config in ((model, Config(beta=0.0, updates=1, maspo=True)), (twin, Config(beta=0.0, updates=1))):
        metrics[config.maspo] = update(m, torch.optim.SGD(m.parameters(), lr=0.05), example(), config)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters()))
    for m, config in ((model, Config(beta=0.0, updates=2, maspo=True)), (twin, Config(beta=0.0, updates=2))):
        metrics[config.maspo] = update(m, torch.optim.SGD(m.parameters(), lr=0.05), example(), config)
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters()))
    assert metrics[True]["clip_fraction"] == 0 < metrics[False]["clip_fraction"]


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
    group = Group([3], [Trajectory([prefix_token, 5, EOS], 0.0, 1, [[6, EOS], [7, EOS]], [1.0, 0.0], 0.5),
                        Trajectory([9, EOS], 0.0)])
    loss, _ = objective(model, [group], Config(beta=0.0))
    by_hand = 0.0
    for y, sign in (([6, EOS], 1), ([7, EOS], -1)):                     # R - mean = +-.5, std sqrt(.5)
        logp = suffix_logps(model, [3, prefix_token], y, 1.0)
        by_hand = by_hand - sign * 0.5 / (math.sqrt(0.5) + 1e-6) * torch.exp(logp - logp.detach()).mean() / 2
    got, expected = (torch.autograd.grad(value, list(model.parameters())) for value in (loss, by_hand))
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_equal_rewards_have_exactly_no_gradient(model):
    groups = example()
    for g in groups:
        for t in g.trajectories:
            t.reward, t.branch_rewards = 0.0, [0.0] * len(t.branches)
    loss, metrics = objective(model, groups, Config(beta=0.0), backward=True)
    assert loss.item() == 0 and all((p.grad == 0).all() for p in model.parameters())
    assert metrics["trained_tokens"] == 0


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


def test_metrics_of_the_objective_by_hand(model, ref_model):
    groups = example()
    _, metrics = objective(model, groups, Config(beta=BETA), ref_model, micro_batch_tokens=25)
    entropies, k3 = [], []
    for g in groups:
        for t in g.trajectories:
            logits = model(input_ids=torch.tensor([g.prompt + t.response])).logits[0, len(g.prompt) - 1:-1]
            p = logits.softmax(-1)
            entropies += (-(p * p.log()).sum(-1)).tolist()
            ref, logp = (suffix_logps(m, g.prompt, t.response, 1.0) for m in (ref_model, model))
            d = ref - logp
            k3 += (d.exp() - d - 1).tolist()
    assert metrics["entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-9)
    assert metrics["kl"] == pytest.approx(sum(k3) / len(k3), rel=1e-9)
    # A != 0: the rollouts of question 1 (5+6+3), its mixed siblings (2+3+2), all siblings of question 3.
    assert metrics["trained_tokens"] == (5 + 6 + 3) + (2 + 3 + 2) + (1 + 3 + 2) + (1 + 1 + 2) + (2 + 2 + 3)
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
    failed = Trajectory([7, 8, 9, EOS], 0.0, 1, [[4, EOS], [EOS]], [1.0, 0.0], 0.5)
    groups = [Group([3], [Trajectory([5, 6, EOS], 1.0), failed])]
    config = Config(beta=0.0, clip_low=0.3, clip_high=0.2)   # A > 0, rho > 1.2; A < 0, rho < .7
    now, *_ = score_groups(model, groups, config)
    shift = [torch.tensor([0.5, -0.5, 0.25]),                     # log rho, A > 0: two
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
    tokens = sum(len(row.ids) for row in deep_grpo.pack_groups(model, example()))
    assert metrics["forwarded_tokens"] == (updates + 1) * tokens and metrics["optimizer_steps"] == updates   # and once
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_non_finite_stops_before_the_weights_change(model, broken):
    before = copy.deepcopy(model.state_dict())
    if broken == "gradient":
        model.model.norm.weight.register_hook(lambda grad: grad * float("inf"))
    else:
        model.register_forward_pre_hook(lambda *_: None)
        model.get_output_embeddings().register_forward_hook(lambda module, args, out: out * float("nan"))
    with pytest.raises(FloatingPointError, match="loss nan" if broken == "loss" else "gradient norm"):
        update(model, torch.optim.AdamW(model.parameters()), example(), Config(beta=0.0))
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


# ---- rollouts, pivots, branches: with a `draw` that says what it was asked ----

def word(ids):
    return "".join({2: ".\n", EOS: ""}.get(i, f" w{i}") for i in ids)      # token 2 ends a sentence


def test_roll_out_scores_every_response_with_its_own_question():
    asked = []

    def draw(prefixes, k, *, max_new_tokens):
        asked.append((prefixes, k, max_new_tokens))
        return [[[10 * x + i, EOS] for i in range(k)] for x in range(len(prefixes))]

    groups = roll_out(draw, [[3, 4], [5]], lambda pairs: [float(x == 1 and y == [11, EOS]) for x, y in pairs],
                      Config(group_size=3, max_new_tokens=20))
    assert asked == [([[3, 4], [5]], 3, 20)]
    assert [[(t.response, t.reward) for t in g.trajectories] for g in groups] == [
        [([0, EOS], 0.0), ([1, EOS], 0.0), ([2, EOS], 0.0)],
        [([10, EOS], 0.0), ([11, EOS], 1.0), ([12, EOS], 0.0)]]


def three_sentences():
    return [Group([3], [Trajectory([5, 2, 6, 2, 7, EOS], 0.0), Trajectory([5, EOS], 1.0)]),
            Group([4], [Trajectory([8, 9, 2, 8, 2, EOS], 0.0)])]


def test_pivots_of_failures_only_at_ends_of_sentences():
    groups, estimate = three_sentences(), Recoverability()
    seen = set()
    for seed in range(200):
        chosen = choose_pivots(groups, Config(), estimate, word, np.random.default_rng(seed))
        assert chosen[0].trajectories[1] == groups[0].trajectories[1]
        seen.add((chosen[0].trajectories[0].pivot, round(chosen[0].trajectories[0].ratio, 6)))
        assert chosen[1].trajectories[0].pivot in (0, 3)           # the last sentence ends with the response
    assert seen == {(0, 0.25), (2, 0.5), (4, 0.75)}
    assert groups == three_sentences()                             # the argument is left alone
    fixed = {choose_pivots(groups, Config(segment_tokens=4), estimate, word,
                           np.random.default_rng(seed))[0].trajectories[0].pivot for seed in range(50)}
    assert fixed == {0, 4}
    for seed in range(50):                                      # gamma = -20 resamples from the question
        chosen = choose_pivots(groups, Config(gamma=-20.0), estimate, word, np.random.default_rng(seed))
        assert chosen[0].trajectories[0].pivot == chosen[1].trajectories[0].pivot == 0


def test_ablations_of_the_pivot():
    groups, estimate = three_sentences(), Recoverability()
    rngs = [np.random.default_rng(seed) for seed in range(300)]
    right = [choose_pivots(groups, Config(branch_all=True), estimate, word, rng)[0].trajectories[1] for rng in rngs]
    assert {(t.pivot, t.ratio) for t in right} == {(0, 0.5)}        # a right rollout of one sentence: its question
    for i in range(40):
        estimate.observe(i / 40, i < 10)                                 # P falls steeply
    estimate.fit()
    drawn = [choose_pivots(groups, Config(uniform_pivot=True), estimate, word, rng)[0].trajectories[0].pivot
             for rng in rngs]
    assert all(75 < drawn.count(kept) < 125 for kept in (0, 2, 4))       # 100 each, 8 standard deviation
    two = [choose_pivots(groups, Config(pivots=2), estimate, word, rng) for rng in rngs]
    first = [g[0].trajectories[0] for g in two]
    assert {tuple(sorted(t.pivot)) for t in first} == {(0, 2), (0, 4), (2, 4)}
    assert all([{0: 0.25, 2: 0.5, 4: 0.75}[kept] for kept in t.pivot] == t.ratio for t in first)
    short = Group([4], [Trajectory([8, EOS], 0.0)])
    assert choose_pivots([short], Config(pivots=2), estimate, word, rngs[0])[0].trajectories[0].pivot == [0]


def test_resample_two_pivots_and_learn_from_each():
    groups = three_sentences()
    groups[0].trajectories[0] = replace(groups[0].trajectories[0], pivot=[4, 2], ratio=[0.75, 0.5])
    groups[1].trajectories[0] = replace(groups[1].trajectories[0], pivot=[3], ratio=[0.6])
    asked = []

    def draw(prefixes, k, *, max_new_tokens, expected_tokens):
        asked.append((prefixes, k, max_new_tokens, expected_tokens))
        return [[[10 * s + j] for j in range(k)] for s in range(len(prefixes))]

    branched = resample(draw, groups, lambda pairs: [float(y[-1] in (11, 20)) for _, y in pairs],
                        Config(branches=2, max_new_tokens=10))
    assert asked == [([[3, 5, 2, 6, 2], [3, 5, 2], [4, 8, 9, 2]], 2, [6, 8, 7], [2, 4, 3])]
    first, second = branched[0].trajectories[0], branched[1].trajectories[0]
    assert first.branches == [[0], [1], [10], [11]] and first.branch_rewards == [0.0, 0.0, 0.0, 1.0]
    assert second.branches == [[20], [21]] and second.branch_rewards == [1.0, 0.0]
    estimate = Recoverability()
    learn_recoverability(branched, estimate)
    assert list(estimate.outcomes) == [(0.75, False), (0.5, True), (0.6, True)]
    got = summarize(branched, [EOS])
    assert (got["pivots"], got["recovered"], got["dead_branch_groups"]) == (3, 2 / 3, 1 / 3)
    assert got["pivot_depth"] == pytest.approx((0.75 + 0.5 + 0.6) / 3)


def test_resample_continues_the_exact_prefix_within_the_room_that_is_left():
    groups, asked, graded = three_sentences(), [], []
    groups[0].trajectories[0] = replace(groups[0].trajectories[0], pivot=4, ratio=0.75)
    groups[1].trajectories[0] = replace(groups[1].trajectories[0], pivot=3, ratio=0.5)

    def draw(prefixes, k, *, max_new_tokens, expected_tokens):
        asked.append((prefixes, k, max_new_tokens, expected_tokens))
        return [[[7] * 6, [6, EOS]], [[7] * 6 + [EOS], [9, EOS]]]

    def reward(pairs):
        graded.extend(pairs)
        return [float(response[-2:] == [6, EOS]) for _, response in pairs]

    branched = resample(draw, groups, reward, Config(branches=2, max_new_tokens=10))
    # One call; 10 less what each pivot keeps; the rest of each failed response, 6 - 4 and 6 - 3 tokens.
    assert asked == [([[3, 5, 2, 6, 2], [4, 8, 9, 2]], 2, [6, 7], [2, 3])]
    deep, shallow = branched[0].trajectories[0], branched[1].trajectories[0]
    assert deep.branches == [[7] * 6, [6, EOS]]
    assert deep.branch_rewards == [0.0, 1.0]
    assert shallow.branches == [[7] * 6 + [EOS], [9, EOS]] and shallow.branch_rewards == [0.0, 0.0]
    assert graded == [(0, [5, 2, 6, 2] + [7] * 6), (0, [5, 2, 6, 2, 6, EOS]),
                      (1, [8, 9, 2] + [7] * 6 + [EOS]), (1, [8, 9, 2, 9, EOS])]
    assert branched[0].trajectories[1].branches == [] and groups[0].trajectories[0].branches == []

    estimate = Recoverability(min_observations=1)
    learn_recoverability(branched, estimate)
    assert list(estimate.outcomes) == [(0.75, True), (0.5, False)]      # y = 1: at least one is right
    assert estimate.fitted and estimate.w > 0                           # and P has learned from them


def test_resample_without_failures_draws_nothing():
    groups = [Group([3], [Trajectory([5, EOS], 1.0)])]
    assert resample(None, groups, None, Config()) == groups
    groups = [Group([3], [Trajectory([5, EOS], 0.0, pivot=1)])]
    assert resample(None, groups, None, Config(branches=0)) == groups


def test_summary_by_hand():
    got = summarize(example(), [EOS])
    assert got == pytest.approx({
        "reward": 4 / 9, "branch_reward": 5 / 15, "dead_groups": 2 / 3, "dead_branch_groups": 1 / 5,
        "pivots": 5, "pivot_depth": (0.6 + 0.2 + 0.5 + 0.7 + 0.5) / 5, "recovered": 4 / 5,
        "response_length": 30 / 9, "branch_length": 35 / 15,
        "truncated": 1 / 9, "sequences": 24, "generated_tokens": 65})
    easy = Trajectory([5, EOS], 0.0, 0, [[6, EOS], [7, EOS]], [1.0, 1.0], 0.5)   # all right
    assert summarize([Group([3], [easy])], [EOS])["dead_branch_groups"] == 1
    grpo = summarize([Group([3], [Trajectory([5, EOS], 1.0), Trajectory([6, EOS], 0.0)])], [EOS])
    assert grpo["pivots"] == 0 and grpo["pivot_depth"] is None and grpo["recovered"] is None


def test_defaults_are_those_of_the_authors_script():
    assert Config() == Config(group_size=8, branches=8, gamma=2.0, lam=1.0, beta=1e-4, clip_low=0.2,
                              clip_high=0.2, temperature=1.0, objective="paper", segment_tokens=0,
                              max_new_tokens=768, updates=1, max_grad_norm=1.0, std=True, pivots=1,
                              uniform_pivot=False, branch_all=False, train_prefix=False, one_stream=False,
                              stapo=False, maspo=False)
    assert Config(branches=0, lam=0.0, beta=0.0, clip_low=0.0, clip_high=0.0)      # off, not impossible


@pytest.mark.parametrize("name, value", [
    ("group_size", 0), ("branches", -1), ("lam", -0.1), ("beta", float("nan")), ("temperature", 0.0),
    ("objective", "ppo"), ("gamma", float("inf")), ("max_new_tokens", 0), ("updates", 0), ("clip_low", -1.0),
    ("segment_tokens", 1.5), ("segment_tokens", -1), ("clip_high", -0.1), ("lam", float("inf")),
    ("max_grad_norm", 0.0), ("pivots", 0)])
def test_impossible_settings_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        Config(**{name: value})
