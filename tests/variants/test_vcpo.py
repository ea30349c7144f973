"""VCPO and --lag: weights, baseline and step by hand and against a slow twin, and which batch is trained when."""
import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import make_model
from test_deep_grpo import example
from test_methods import shorten_the_task

import deep_grpo
import train_gsm8k
from deep_grpo import Config, Group, objective, score_groups
from resample import Continuation
from trainer.settings import parse_args
from variants import METHODS, vcpo

CONFIG = Config(branches=0, beta=0.0, max_grad_norm=1e9)


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


# ---- by hand ----

def test_the_weights_of_four_rollouts_by_hand():
    """w = (1, 1, 4, .5): the effective sample size is 6.5^2 / 18.25, and the third rollout weighs most in b."""
    log_w, rewards, norms = doubles([1, 1, 4, 0.5]).log(), doubles([1, 0, 0, 1]), doubles([1, 1, 2, 4])
    assert 4 * vcpo.effective_share(log_w) == pytest.approx(6.5 ** 2 / 18.25)
    assert math.sqrt(vcpo.effective_share(log_w)) == pytest.approx(0.7608, abs=5e-5)
    assert vcpo.baseline(rewards, log_w, norms) == pytest.approx(2 / 35)               # W = (1, 1, 32, 1)
    group = Group([3], [deep_grpo.Trajectory([4] * n, r) for n, r in zip((1, 2, 3, 4), rewards.tolist())])
    spans = vcpo.weights([group], CONFIG, log_w, norms)
    assert [span.A for span in spans] == pytest.approx([1.8857, -0.1143, -0.1143, 1.8857], abs=5e-5)
    assert [span.w for span in spans] == pytest.approx([1 / 4, 1 / 8, 4 / 12, 0.5 / 16])
    assert [span.tokens for span in spans] == [1, 2, 3, 4]


def test_on_the_policy_itself_the_baseline_is_that_of_the_norms():
    """The mean is .5. It is b only where all gradients are of equal length."""
    rewards, norms = doubles([1, 0, 0, 1]), doubles([1, 1, 2, 4])
    assert vcpo.effective_share(torch.zeros(4)) == 1
    assert vcpo.baseline(rewards, torch.zeros(4), norms) == pytest.approx(0.625)
    assert vcpo.baseline(rewards, torch.zeros(4), torch.full((4,), 7.0).double()) == pytest.approx(0.5)
    assert vcpo.baseline(rewards, torch.zeros(4), doubles([0, 0, 0, 0])) == pytest.approx(0.5)
    group = Group([3], [deep_grpo.Trajectory([4], r) for r in rewards.tolist()])
    spans = vcpo.weights([group], CONFIG, torch.zeros(4).double(), norms)
    assert [span.A for span in spans] == pytest.approx([0.75, -1.25, -1.25, 0.75])


def test_a_weight_is_capped_at_eight_and_may_be_too_large_for_a_float():
    log_w = doubles([2000.0, 0.0, -2000.0])
    assert vcpo.effective_share(log_w) == pytest.approx(1 / 3)
    group = Group([3], [deep_grpo.Trajectory([4], r) for r in (1.0, 0.0, 0.0)])
    spans = vcpo.weights([group], CONFIG, log_w, doubles([1, 1, 1]))
    assert [span.w for span in spans] == pytest.approx([8 / 3, 1 / 3, 0])
    assert [span.A for span in spans] == pytest.approx([0, -1 / math.sqrt(2 / 9), -1 / math.sqrt(2 / 9)])  # b = 1


# ---- the update against a slow twin ----

def perturbed(model, size=0.03):
    other = make_model()
    with torch.no_grad():
        for p, q in zip(other.parameters(), model.parameters()):
            p.copy_(q + size * torch.randn_like(q))
    return other


def drawn_by(model, groups, config=CONFIG):
    """The same groups, and every token knows what this model thought of it."""
    logps, entropies, _ = score_groups(model, groups, config)
    logps, entropies = iter(torch.cat(logps).numpy()), iter(torch.cat(entropies).numpy())

    def known(y):
        return Continuation(y, [next(logps) for _ in y], [next(entropies) for _ in y])

    def trajectory(t):
        response = known(t.response)
        return replace(t, response=response, forks=[replace(f, branches=[known(y) for y in f.branches])
                                                    for f in t.forks])

    return [Group(g.prompt, [trajectory(t) for t in g.trajectories]) for g in groups]


def rollouts_only():
    return [Group(g.prompt, [replace(t, forks=[]) for t in g.trajectories]) for g in example()[:2]] + [
        Group([7, 8], [deep_grpo.Trajectory([4, 9, 6, 5], 0.0), deep_grpo.Trajectory([5, 5], 1.0),
                       deep_grpo.Trajectory([6, 2, 9], 1.0)])]


def slow_twin(model, groups):
    """(gradient of J by name, e) from one forward of each rollout, with autograd and the formulas of the paper."""
    B, rows, gradients = sum(len(g.trajectories) for g in groups), [], {}
    for g in groups:
        for t in g.trajectories:
            ids = torch.tensor([g.prompt + list(t.response)])
            logp = model(input_ids=ids).logits[0, len(g.prompt) - 1:-1].log_softmax(-1)
            logp = logp.gather(1, ids[0, len(g.prompt):, None]).sum()
            s = torch.autograd.grad(logp, list(model.parameters()))
            rows.append((g, t, math.exp(logp.item() - t.response.logps.astype(float).sum()), s))
    e = sum(w for *_, w, _ in rows) ** 2 / sum(w ** 2 for *_, w, _ in rows) / B
    for g in groups:
        own = [(t, w, s) for h, t, w, s in rows if h is g]
        W = [w ** 2 * sum(x.square().sum().item() for x in s) for _, w, s in own]
        b = sum(x * t.reward for x, (t, *_) in zip(W, own)) / sum(W)
        mean = sum(t.reward for t, *_ in own) / len(own)
        sd = math.sqrt(sum((t.reward - mean) ** 2 for t, *_ in own) / len(own)) or 1.0
        for t, w, s in own:
            factor = min(w, 8) * (t.reward - b) / sd / len(t.response) / B
            for (name, _), x in zip(model.named_parameters(), s):
                gradients[name] = gradients.get(name, 0) + factor * x
    return gradients, e


@pytest.mark.parametrize("micro_batch_tokens, stale", [(None, False), (12, False), (None, True)])
def test_an_update_is_that_of_the_slow_twin(model, micro_batch_tokens, stale):
    """stale, as with --lag, changes nothing: w already is what the ratio of a stale batch would be."""
    torch.manual_seed(0)
    groups = drawn_by(perturbed(model), rollouts_only())
    gradients, e = slow_twin(model, groups)
    assert 0.2 < e < 0.9 and all(x.abs().max() > 1e-5 for x in gradients.values())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    metrics = vcpo.update(model, optimizer, groups, CONFIG, micro_batch_tokens=micro_batch_tokens, stale=stale)
    for name, p in model.named_parameters():
        step = 0.1 * math.sqrt(e) * gradients[name]
        torch.testing.assert_close(p.detach() - before[name], step, rtol=1e-6, atol=1e-9)       # logps are float32
    assert metrics["ess_share"] == pytest.approx(e, rel=1e-6)
    assert metrics["lr_scale"] == pytest.approx(math.sqrt(e), rel=1e-6)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_the_learning_rate_comes_back_when_the_update_fails(model):
    groups = drawn_by(perturbed(model), rollouts_only())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def broken(groups, config, **known):
        raise FloatingPointError("nan")

    with pytest.raises(FloatingPointError):
        vcpo.update(model, optimizer, groups, CONFIG, weights=broken)
    assert optimizer.param_groups[0]["lr"] == 0.1


# ---- a stale batch ----

def test_a_stale_batch_is_clipped_against_the_policy_that_drew_it(model, ref_model):
    """update() with stale gives the gradient of the objective with log pi_old as it was when the tokens were drawn."""
    config = Config(beta=0.3, max_grad_norm=1e9)
    old = perturbed(model, 0.05)
    groups = drawn_by(old, example(), config)
    loss, expected = objective(model, groups, config, ref_model, score_groups(old, groups, config)[0], backward=True)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    metrics = deep_grpo.update(model, optimizer, groups, config, ref_model, stale=True)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach() - before[name], -0.1 * gradients[name], rtol=1e-5, atol=1e-8)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5) and expected["clip_fraction"] > 0
    assert metrics["clip_fraction"] == expected["clip_fraction"]


def test_a_stale_batch_of_tokens_that_nobody_scored_is_refused(model):
    with pytest.raises(ValueError, match="log-probabilities .* 65 of 65 are not known"):
        deep_grpo.update(model, torch.optim.SGD(model.parameters()), example(), CONFIG, stale=True)


# ---- --lag ----

def flags(out, *more):
    return ["--preset", "tiny", "--questions", "2", "--group-size", "4", "--max-new-tokens", "48", "--temperature",
            "1.8", "--eval-every", "0", "--out", str(out), *more]


def test_with_lag_the_batch_of_k_steps_ago_is_trained(tmp_path, monkeypatch):
    shorten_the_task(monkeypatch)
    drawn, trained = [], []
    real = METHODS["grpo"].update

    def update(model, optimizer, groups, *args, stale, **options):
        trained.append(groups)
        assert stale
        return real(model, optimizer, groups, *args, stale=stale, **options)

    monkeypatch.setitem(METHODS, "grpo", replace(METHODS["grpo"], update=update))
    run = train_gsm8k.prepare(parse_args(flags(tmp_path / "run", "--method", "grpo", "--lag", "2")))
    weights = [p.detach().clone() for p in run.policy.model.parameters()]
    for step in range(4):
        metrics, _, _, groups = train_gsm8k.train_step(run)
        drawn.append(groups)
        assert run.waiting == drawn[-2:]
        if step < 2:                                     # nothing is old enough yet
            assert metrics["optimizer_steps"] == metrics["forwarded_tokens"] == 0
            assert all(torch.equal(p, q) for p, q in zip(run.policy.model.parameters(), weights))
    assert trained == [[], [], drawn[0], drawn[1]]
    assert any(t.reward for g in drawn[0] + drawn[1] for t in g.trajectories)
    assert not all(torch.equal(p, q) for p, q in zip(run.policy.model.parameters(), weights))


@pytest.mark.parametrize("more", [
    ("--method", "vcpo", "--prob-mask", "0.9999"),
    pytest.param(("--method", "train_prefix", "--branches", "2", "--updates", "2", "--stapo"), marks=pytest.mark.slow)])
def test_a_resumed_run_trains_the_batches_that_waited(more, tmp_path, monkeypatch):
    shorten_the_task(monkeypatch)
    monkeypatch.setattr(train_gsm8k, "plot_run", lambda run_dir: None)                 # the figure takes a second
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert train_gsm8k.main(flags(whole, "--lag", "2", "--steps", "5", *more)) == 0
    assert train_gsm8k.main(flags(halves, "--lag", "2", "--steps", "3", *more)) == 0
    assert train_gsm8k.main(["--resume", str(halves), "--steps", "5"]) == 0
    lines = [(run / "metrics.jsonl").read_text() for run in (whole, halves)]
    assert lines[0] == lines[1]
    rows = [json.loads(line) for line in lines[0].splitlines()]
    assert [row["optimizer_steps"] > 0 for row in rows][:2] == [False, False] and rows[-1]["trained_tokens"] > 0


def test_a_lag_is_not_negative(capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_args(["--preset", "tiny", "--lag", "-1"])
    assert "--lag: must be 0 or more, got -1" in capsys.readouterr().err


def test_both_updates_on_a_stale_batch_are_clipped_against_the_policy_that_drew_it():
    config = Config(beta=0.0, max_grad_norm=1e9)
    model, once = make_model(), make_model()
    groups = drawn_by(perturbed(model, 0.05), example(), config)
    deep_grpo.update(model, torch.optim.SGD(model.parameters(), lr=0.1), groups, replace(config, updates=2), stale=True)
    for _ in range(2):
        deep_grpo.update(once, torch.optim.SGD(once.parameters(), lr=0.1), groups, config, stale=True)
    for p, q in zip(model.parameters(), once.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_a_lag_after_which_nothing_is_trained_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_args(["--preset", "tiny", "--steps", "4", "--lag", "4"])
    assert "--lag: none of the 4 steps would train anything, got 4" in capsys.readouterr().err
    assert parse_args(["--preset", "tiny", "--steps", "5", "--lag", "4"]).lag == 4
