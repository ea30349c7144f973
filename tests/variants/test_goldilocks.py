"""Goldilocks: the utility, the features, the fit and the choice by hand; and whole runs that ask what it chooses."""
import argparse
import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_model

import tasks.lock
import train_gsm8k
from deep_grpo import Group, Trajectory
from trainer.policy import Policy
from trainer.settings import TEACHER, parse_args
from variants.goldilocks import FIT_STEPS, Teacher, mean_states, squared_error, standardized, utility

FAST = ["--preset", "tiny", "--questions", "2", "--group-size", "4", "--branches", "2", "--temperature", "4",
        "--max-new-tokens", "10", "--eval-every", "0", "--seed", "3"]
SELECT = ["--select", "goldilocks"]


def teacher_of(f, **settings):
    """A teacher who predicts these utilities for questions 0, 1, ..."""
    teacher = Teacher(np.eye(len(f)), **settings)
    with torch.no_grad():
        teacher.phi[:-1] = torch.logit(2 * torch.tensor(f))
    return teacher


# ---- the utility ----

@pytest.mark.parametrize("right, y", [(0, 0), (1, 0.2421), (2, 0.3307), (4, 0.4330), (8, 0.5), (12, 0.4330), (16, 0)])
def test_the_utility_of_a_question_by_hand(right, y):
    assert utility([1.0] * right + [0.0] * (16 - right)) == pytest.approx(y, abs=5e-5)


def test_a_reward_that_is_not_0_counts_as_right():
    """A reward of one's own may have other values, as for DEEP-GRPO, whose failures have reward 0."""
    assert utility([2.5, 0.0, -1.0, 0.0]) == 0.5


def test_the_utility_of_few_rollouts_is_biased_towards_0():
    """All numbers of right rollouts of 8, with their binomial probabilities at p = .1."""
    mean = sum(math.comb(8, k) * 0.1**k * 0.9**(8 - k) * utility([1] * k + [0] * (8 - k)) for k in range(9))
    assert mean == pytest.approx(0.2095, abs=5e-5) and mean < math.sqrt(0.1 * 0.9) == pytest.approx(0.3)


@pytest.mark.parametrize("right", [0, 1, 3, 8])
def test_the_gradient_of_a_question_is_its_utility_times_the_difference_of_mean_scores(right):
    rewards = np.array([1.0] * right + [0.0] * (8 - right))
    scores = np.random.default_rng(0).normal(size=(8, 5))
    advantages = (rewards - rewards.mean()) / (rewards.std() or 1)
    difference = (scores[:right].mean(0) if right else 0) - (scores[right:].mean(0) if right < 8 else 0)
    np.testing.assert_allclose(advantages @ scores / 8, utility(rewards) * difference, atol=1e-14)


# ---- the features ----

@pytest.mark.parametrize("tokens", [1, 20, 10_000])
def test_features_are_means_over_the_tokens_of_each_prompt_alone(tokens):
    """Against one prompt at a time, without padding. Token 0 is the padding, and here also part of a prompt."""
    model, rng = make_model().train(), np.random.default_rng(0)
    prompts = [rng.integers(0, 23, n).tolist() for n in (9, 1, 4, 9, 2, 7)]
    states = mean_states(model, prompts, tokens)
    alone = [model.base_model(torch.tensor([prompt])).last_hidden_state[0].mean(0) for prompt in prompts]
    np.testing.assert_allclose(np.array(states), torch.stack(alone).detach().numpy(), rtol=1e-6, atol=1e-6)
    assert model.training and states[0].dtype == np.float32 and mean_states(model, []) == []


def test_features_are_standardized_to_a_length_of_about_1():
    states = np.random.default_rng(0).normal(size=(400, 64)) * np.logspace(-3, 3, 64) + 100
    states[:, 5] = 7
    x = standardized(states)
    assert x.dtype == np.float32 and (x[:, 5] == 0).all()
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(np.delete(x, 5, 1).var(0), 1 / 64, rtol=1e-5)
    assert np.linalg.norm(x, axis=1).mean() == pytest.approx(1, abs=0.05)


# ---- prediction and fit ----

def test_a_prediction_is_half_a_sigmoid():
    teacher = Teacher(np.zeros((3, 2)))
    assert (teacher.predict([[0, 1], [2, 0]]) == [[0.25, 0.25], [0.25, 0.25]]).all()
    with torch.no_grad():
        teacher.phi[-1] = math.log(3)
    assert teacher.predict([1]) == pytest.approx(0.375)


def test_the_loss_of_one_question_by_hand():
    logit = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    loss = squared_error(logit, torch.tensor([0.5]))
    loss.backward()
    assert (loss.item(), logit.grad.item()) == (pytest.approx(0.0625), pytest.approx(-0.0625))


def test_the_loss_of_many_questions_is_a_mean():
    rng = np.random.default_rng(0)
    logits, y = rng.normal(size=20) * 3, rng.uniform(0, 0.5, 20)
    by_hand = sum((0.5 / (1 + math.exp(-z)) - v) ** 2 for z, v in zip(logits, y)) / 20
    assert squared_error(torch.tensor(logits), torch.tensor(y)).item() == pytest.approx(by_hand, rel=1e-12)


def test_a_fit_is_adam_on_the_questions_that_were_asked_last():
    """Three fits, and a buffer of 8 that has forgotten the first questions by then."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(10, 4))
    teacher, seen = Teacher(features, window=8, lr=0.03), []
    w, b = torch.zeros(4, dtype=torch.float64, requires_grad=True), torch.zeros(1, dtype=torch.float64,
                                                                               requires_grad=True)
    adam = torch.optim.Adam([w, b], lr=0.03)
    for _ in range(3):
        for q, y in zip(rng.integers(10, size=5), rng.uniform(0, 0.5, 5)):
            teacher.observe(q, y)
            seen.append((q, y))
        teacher.fit()
        q, y = zip(*seen[-8:])
        for _ in range(FIT_STEPS):
            adam.zero_grad()
            logits = torch.tensor(features[[*q]]) @ w + b
            (logits.sigmoid() / 2 - torch.tensor(y)).square().mean().backward()
            adam.step()
        np.testing.assert_allclose(teacher.phi.detach(), torch.cat([w, b]).detach(), rtol=1e-9)


def test_a_teacher_learns_which_questions_are_useful_and_asks_them():
    """Questions are useful on one side of a plane in their features. Half of them are; of four, the best is asked."""
    rng = np.random.default_rng(0)
    features = standardized(rng.normal(size=(300, 16)))
    useful = np.where(features @ rng.normal(size=16) > 0, 0.5, 0.0)
    teacher, asked = Teacher(features), []
    for _ in range(60):
        chosen = teacher.choose(rng.integers(300, size=(8, 4)), rng)
        for q in chosen:
            teacher.observe(q, useful[q])
        teacher.fit()
        asked.append(useful[chosen].mean())
    assert np.mean(asked[:3]) < 0.4 and np.mean(asked[-20:]) > 0.44
    predicted = teacher.predict(np.arange(300))
    assert predicted[useful > 0].mean() > predicted[useful == 0].mean() + 0.15


def test_what_was_learned_is_restored_and_not_shared():
    rng = np.random.default_rng(0)
    teacher, other = (Teacher(features, window=6) for features in [rng.normal(size=(10, 4))] * 2)

    def learn(teacher, seed):
        rng = np.random.default_rng(seed)
        for q, y in zip(rng.integers(10, size=5), rng.uniform(0, 0.5, 5)):
            teacher.observe(q, y)
        teacher.fit()

    learn(teacher, 0)
    state = teacher.state_dict()
    text = str(state)
    learn(teacher, 1)
    assert str(state) == text                              # it is that of then
    other.load_state_dict(state)
    learn(other, 1)
    assert str(other.state_dict()) == str(teacher.state_dict()) and len(other.buffer) == 6
    assert torch.equal(other.phi, teacher.phi) and str(state) == text


def test_a_step_is_predicted_before_it_is_learned_from():
    """Two questions with 1 and 2 right rollouts of 4, found by their prompts."""
    groups = [Group(prompt, [Trajectory([7], float(i < right)) for i in range(4)])
              for prompt, right in (([5, 6], 1), ([3], 2))]
    teacher = teacher_of([0.1, 0.2, 0.3], prompts=[[3], [4], [5, 6]])
    metrics = teacher.learn(groups)
    assert metrics == pytest.approx({"predicted_utility": (0.3 + 0.1) / 2, "observed_utility": (3**0.5 / 4 + 0.5) / 2})
    assert [*teacher.buffer] == [(2, pytest.approx(3**0.5 / 4)), (0, 0.5)]


# ---- the choice ----

@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
def test_the_best_candidate_is_asked_unless_a_random_one_is(order):
    teacher, n = teacher_of([0.10, 0.42, 0.33], epsilon=0.1), 40_000
    chosen = teacher.choose([order] * n, np.random.default_rng(0))
    for question, share in enumerate((0.1 / 3, 0.9 + 0.1 / 3, 0.1 / 3)):                   # .0333, .9333, .0333
        assert abs((chosen == question).mean() - share) < 4 * math.sqrt(share * (1 - share) / n)


def test_the_choice_is_uniform_with_one_candidate_a_constant_teacher_or_epsilon_1():
    rng, candidates = np.random.default_rng(0), np.random.default_rng(1).permuted([[0, 1, 2, 3]] * 40_000, axis=1)
    sharp = teacher_of([0.1, 0.2, 0.3, 0.4], epsilon=0.0)
    assert (sharp.choose(candidates, rng) == 3).all()
    assert (sharp.choose(candidates[:, :1], rng) == candidates[:, 0]).all()
    constant = Teacher(np.eye(4), epsilon=0.0)
    assert (constant.choose(candidates, rng) == candidates[:, 0]).all()                    # a random one already
    sharp.epsilon = 1.0
    for position in range(4):                                                              # wherever the best one is
        assert (sharp.choose(candidates, rng) == candidates[:, position]).mean() == pytest.approx(0.25, abs=0.01)


def test_every_question_is_the_best_of_the_next_candidates_of_the_epoch():
    questions = list(range(100, 124))
    args = argparse.Namespace(questions=2, candidates=3, seed=0)
    plain = SimpleNamespace(questions=questions, teacher=None, args=argparse.Namespace(questions=6, candidates=None,
                                                                                      seed=0))
    f = np.random.default_rng(0).uniform(0.1, 0.4, 24)
    run = SimpleNamespace(questions=questions, teacher=teacher_of(f, epsilon=0.0), args=args)
    for number in range(1, 9):                             # two epochs
        of_three = np.reshape(train_gsm8k.batch_at(plain, number), (2, 3))
        assert train_gsm8k.batch_at(run, number) == [max(part, key=lambda q: f[q - 100]) for part in of_three]
    run.teacher.epsilon = 1.0                              # at random, but the same when it is asked again
    walks = [[train_gsm8k.batch_at(run, number) for number in range(1, 9)] for _ in range(2)]
    positions = {np.reshape(train_gsm8k.batch_at(plain, n + 1), (2, 3))[i].tolist().index(walks[0][n][i])
                 for n in range(8) for i in range(2)}
    assert walks[0] == walks[1] and positions == {0, 1, 2}


# ---- whole runs ----

@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few questions, and short responses of which about half are right."""
    make_rows = tasks.lock.make_rows
    monkeypatch.setattr(tasks.lock, "make_rows", lambda lock, n, seed: make_rows(lock, min(n, 32), seed))
    monkeypatch.setattr(train_gsm8k, "plot_run", lambda run_dir: None)
    monkeypatch.setattr(Policy, "reward", lambda self, question, response: float(sum(response) % 2))


def trained(out, *flags):
    assert train_gsm8k.main([*flags, *(["--out", str(out)] if "--resume" not in flags else [])]) == 0
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_with_one_candidate_a_run_is_the_run_without_selection(tmp_path):
    plain = trained(tmp_path / "plain", *FAST, "--steps", "2")
    rows = trained(tmp_path / "one", *FAST, "--steps", "2", *SELECT, "--candidates", "1")
    predicted, observed = ([row.pop(f"{name}_utility") for row in rows] for name in ("predicted", "observed"))
    assert rows == plain and predicted[0] == 0.25 != predicted[1] and min(observed) > 0
    assert (tmp_path / "plain" / "samples.jsonl").read_text() == (tmp_path / "one" / "samples.jsonl").read_text()
    again = ["--resume", str(tmp_path / "plain"), "--steps", "3"]
    assert parse_args(again).select is parse_args(again).candidates is None
    with pytest.raises(SystemExit, match="2"):
        parse_args([*again, *SELECT])                      # nor can the teacher come in later


def test_an_interrupted_run_asks_the_questions_of_one_that_was_not(tmp_path):
    """The starting model is looked into again, and what the teacher has learned is in the checkpoint."""
    flags = [*FAST, *SELECT, "--epsilon", "0.3", "--teacher-lr", "0.5", "--teacher-window", "3"]
    whole = trained(tmp_path / "whole", *flags, "--steps", "3")
    trained(tmp_path / "halves", *flags, "--steps", "1")
    trained(tmp_path / "halves", "--resume", str(tmp_path / "halves"), "--steps", "3")
    for log in ("metrics.jsonl", "pivots.csv"):
        assert (tmp_path / "halves" / log).read_text() == (tmp_path / "whole" / log).read_text()
    assert len({row["predicted_utility"] for row in whole}) == 3
    states = [torch.load(tmp_path / name / "checkpoints" / "step_3" / "trainer.pt", weights_only=False)["teacher"]
              for name in ("whole", "halves")]
    assert torch.equal(*(state["phi"] for state in states)) and str(states[0]) == str(states[1])
    assert states[0]["adam"]["state"][0]["step"] == 3 * FIT_STEPS and len(states[0]["buffer"]) == 3


# ---- flags ----

def test_defaults_are_those_of_the_teacher_and_only_with_select():
    without, chosen = (parse_args(["--preset", "tiny", *flags]) for flags in ([], SELECT))
    assert {name: getattr(without, name) for name in TEACHER} == dict.fromkeys(TEACHER)
    assert {name: getattr(chosen, name) for name in TEACHER} == TEACHER
    given = ["--candidates", "8", "--epsilon", "0", "--teacher-window", "5", "--teacher-lr", "0.5"]
    args = parse_args(["--preset", "tiny", "--method", "grpo", *SELECT, *given])
    assert [getattr(args, name) for name in TEACHER] == [8, 0.0, 5, 0.5]
    teacher = Teacher(np.eye(2))
    lr = teacher.optimizer.param_groups[0]["lr"]
    assert (teacher.epsilon, teacher.buffer.maxlen, lr) == tuple(TEACHER.values())[1:]


@pytest.mark.parametrize("flags, message", [
    (["--candidates", "4"], "--candidates: has a part only with --select goldilocks"),
    (["--epsilon", "0"], "--epsilon: has a part only with --select"),
    (["--teacher-window", "9"], "--teacher-window: has a part only with --select"),
    (["--teacher-lr", "0.1"], "--teacher-lr: has a part only with --select"),
    (["--select", "hard"], "--select: invalid choice: 'hard'"),
    ([*SELECT, "--candidates", "0"], "--candidates: must be at least 1, got 0"),
    ([*SELECT, "--teacher-window", "0"], "--teacher-window: must be at least 1, got 0"),
    ([*SELECT, "--epsilon", "-0.1"], "--epsilon: must be between 0 and 1, got -0.1"),
    ([*SELECT, "--epsilon", "1.1"], "--epsilon: must be between 0 and 1, got 1.1"),
    ([*SELECT, "--epsilon", "nan"], "--epsilon: must be between 0 and 1, got nan"),
    ([*SELECT, "--teacher-lr", "0"], "--teacher-lr: must be positive, got 0"),
    ([*SELECT, "--teacher-lr", "inf"], "--teacher-lr: must be positive, got inf")])
def test_what_cannot_be_is_refused_on_one_line(flags, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_args(["--preset", "tiny", *flags])
    error, = capsys.readouterr().err.splitlines()
    assert error.startswith("error: argument ") and message in error


def test_hidden_states_are_those_without_dropout():
    model, prompts = make_model(attention_dropout=0.5).train(), [[3, 4, 5, 6, 7], [8, 9]]
    states = mean_states(model, prompts)
    model.eval()
    for prompt, state in zip(prompts, states):
        alone = model.base_model(torch.tensor([prompt])).last_hidden_state[0].mean(0)
        torch.testing.assert_close(torch.tensor(state), alone.detach().float(), rtol=1e-6, atol=1e-6)
