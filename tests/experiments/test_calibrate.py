"""The calibration: its fit against Eq. (P)'s and a slow optimiser, states and errors of real rollouts, a short run."""
import numpy as np
import pytest
import torch

import tasks.lock
import train_gsm8k
from experiments import calibrate
from experiments.calibrate import NAMES, cross_validate, first_error, fit_logistic, log_likelihood, observe, predictions
from recoverability import Recoverability
from tasks import make_questions


def test_one_feature_is_eq_p():
    rng = np.random.default_rng(0)
    r = rng.uniform(size=200)
    y = (rng.uniform(size=200) < 1 / (1 + np.exp(5 * r - 2))).astype(float)
    estimate = Recoverability(min_observations=0)
    for ratio, success in zip(r, y):
        estimate.observe(ratio, bool(success))
    estimate.fit()
    assert fit_logistic(r[:, None], y) == pytest.approx([estimate.w, estimate.b], abs=1e-6)


def test_several_features_are_at_the_minimum():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(80, 3)), (rng.uniform(size=80) < 0.4).astype(float)
    w = torch.tensor(fit_logistic(x, y, l2=2.0), requires_grad=True)
    logits = torch.tensor(x) @ w[:3] + w[3]
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor(y), reduction="sum")
    (loss + w[:3].square().sum()).backward()                           # l2 / 2 = 1; the bias is free
    assert w.grad.abs().max() < 1e-6 < w[:3].abs().max()


def rows_of(n=400, seed=0):
    """question, r, entropy, difficulty, before, success: success is a matter of `before` alone."""
    rng = np.random.default_rng(seed)
    question, r, before = np.arange(n) // 8, rng.uniform(0.1, 0.9, n), rng.integers(0, 2, n)
    success = (rng.uniform(size=n) < np.where(before == 1, 0.7, 0.02)).astype(float)
    return np.column_stack([question, r, rng.uniform(size=n), rng.uniform(size=n), before, success])


def test_models_of_the_outcome_on_made_up_rows():
    train, test = rows_of(), rows_of(seed=1)
    p = predictions(train, test)
    assert list(p) == NAMES and all(len(v) == len(test) and (v >= 0).all() and (v <= 1).all() for v in p.values())
    assert p["constant"][0] == pytest.approx((train[:, 5].sum() + 0.5) / 401)
    inside = train[:, 4] == 1
    rate = (train[inside, 5].sum() + 0.5) / (inside.sum() + 1)
    assert p["before or after the error"][test[:, 4] == 1] == pytest.approx(rate)
    scores = cross_validate(train)
    assert scores["before or after the error"] > scores["r: Eq. (P)"] + 0.1 > scores["constant"]
    by_hand = log_likelihood(np.array([0.25, 0.25, 0.0]), np.array([1.0, 0.0, 1.0]))
    assert by_hand == pytest.approx([np.log(0.25), np.log(0.75), np.log(1e-6)])


def test_no_question_is_in_training_and_test_at_once(monkeypatch):
    seen, table = [], rows_of(80)

    def spy(train, test):
        seen.append((set(train[:, 0]), set(test[:, 0])))
        return {name: np.full(len(test), 0.5) for name in NAMES}

    monkeypatch.setattr(calibrate, "predictions", spy)
    assert cross_validate(table) == pytest.approx(dict.fromkeys(NAMES, np.log(0.5)))
    assert len(seen) == 5 and all(not a & b and len(a | b) == 10 for a, b in seen)


def test_first_error():
    gold = "(a) L+3: 37 -> 67.\n(b) both+3: 67 -> 90.\n#### 90"
    assert first_error("(a) L+3: 37 -> 67.\n(b) both+3: 67 -> 67.\n#### 67", gold) == 1
    assert first_error("(a) L+3: 37 -> 77.\n(b) both+3: 77 -> 00.\n#### 00", gold) == 0
    assert first_error("(a) L+3: 37 -> 67.\n(b) both+3: 67 -> 90.\n#### 91", gold) == 2


def test_every_state_of_failed_rollouts_is_branched(tmp_path, monkeypatch):
    run = train_gsm8k.prepare(train_gsm8k.parse_args(["--preset", "tiny", "--beta", "0", "--branches", "3",
                                                      "--out", str(tmp_path / "run")]))
    rows, seen, resample = tasks.lock.make_rows(tasks.lock.PRESETS["tiny"], 3, 5), [], calibrate.resample
    monkeypatch.setattr(calibrate, "resample", lambda *args: seen.append(resample(*args)) or seen[-1])
    table = observe(run, rows, make_questions(rows, run.tokenizer, 64)[0], most=1)
    for x in np.unique(table[:, 0]):
        states = table[table[:, 0] == x]
        n = len(states)                                                # of one rollout: n states, r = (i + 1)/(n + 1)
        assert states[:, 1] == pytest.approx((np.arange(n) + 1) / (n + 1))
        turns = rows[int(x)]["answer"].count(".\n")
        assert n == turns + 1                                          # all sentences, the last is the answer
        assert (np.diff(states[:, 4]) <= 0).all() and states[0, 4] == 1      # before, before, ..., after
        assert (states[:, 2] >= 0).all() and len(np.unique(states[:, 3])) == 1
    states = [(x, t, pivot) for x, g in enumerate(seen[0]) for t in g.trajectories for pivot in t.pivots]
    assert len(states) == len(table)
    for (x, t, pivot), (question, *_, before, _) in zip(states, table):    # before: what is kept is the solution so far
        assert question == x and before == rows[x]["answer"].startswith(run.text(t.response[:pivot]))
    after = table[table[:, 4] == 0]
    assert len(after) and after[:, 5].mean() < 0.3                     # a wrong turn is not undone


def test_a_short_run_writes_table_and_figure(tmp_path):
    flags = ["--preset", "tiny", "--seeds", "2", "--questions", "3", "--steps", "1", "--out", str(tmp_path / "runs"),
             "--results", str(tmp_path / "results")]
    calibrate.main(flags)
    text = (tmp_path / "results" / "calibration.md").read_text()
    assert text.count("| r: Eq. (P) |") == 2 and "after 1 steps of DEEP-GRPO" in text
    assert (tmp_path / "results" / "calibration.png").read_bytes()[:4] == b"\x89PNG"
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*.npy")}
    calibrate.main(flags)                                              # nothing is measured twice
    assert len(before) == 4 == len({p.read_bytes() for p in before})   # other questions, other draws
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*.npy")} == before
    assert (tmp_path / "results" / "calibration.md").read_text() == text
