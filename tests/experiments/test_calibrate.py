"""The calibration: its fit against Eq. (P)'s and a slow optimiser, states and errors of real rollouts, a short run."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tasks.lock
import train_gsm8k
from deep_grpo import Config, Fork, Group, Trajectory
from experiments import calibrate
from experiments.calibrate import (
    BEFORE,
    DIFFICULTY,
    ENTROPY,
    EQ_P,
    ORACLE,
    PREDICTIONS,
    QUESTION,
    SUCCESS,
    R,
    cross_validate,
    first_error,
    fit_logistic,
    fork_everywhere,
    gain_tables,
    log_likelihood,
    observe_states,
    predictions,
    summarize_states,
)
from recoverability import Recoverability
from tasks import make_questions


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A policy is loaded with the questions of an epoch. They take longer than what most tests do with it."""
    make_rows = tasks.lock.make_rows
    monkeypatch.setattr(tasks.lock, "make_rows", lambda lock, n, seed: make_rows(lock, min(n, 64), seed))


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


def made_up_states(n=400, seed=0):
    """A table of states in which success is a matter of `before` alone."""
    rng = np.random.default_rng(seed)
    question, r, before = np.arange(n) // 8, rng.uniform(0.1, 0.9, n), rng.integers(0, 2, n)
    success = (rng.uniform(size=n) < np.where(before == 1, 0.7, 0.02)).astype(float)
    return np.column_stack([question, r, rng.uniform(size=n), rng.uniform(size=n), before, success])


def test_predictions_on_made_up_states():
    train, test = made_up_states(), made_up_states(seed=1)
    p = predictions(train, test)
    assert list(p) == PREDICTIONS and all(len(v) == len(test) and (v >= 0).all() and (v <= 1).all() for v in p.values())
    assert p["constant"][0] == pytest.approx((train[:, SUCCESS].sum() + 0.5) / 401)
    inside = train[:, BEFORE] == 1
    rate = (train[inside, SUCCESS].sum() + 0.5) / (inside.sum() + 1)
    assert p[ORACLE][test[:, BEFORE] == 1] == pytest.approx(rate)
    scores = cross_validate(train)
    assert scores[ORACLE] > scores[EQ_P] + 0.1 > scores["constant"]
    by_hand = log_likelihood(np.array([0.25, 0.25, 0.0]), np.array([1.0, 0.0, 1.0]))
    assert by_hand == pytest.approx([np.log(0.25), np.log(0.75), np.log(1e-6)])


def test_a_prediction_does_not_depend_on_the_other_states_that_are_predicted():
    """Scaled by the mean of the held-out states, a prediction would know something of them."""
    train, test = made_up_states(), made_up_states(seed=1)
    few, all_of_them = predictions(train, test[:5]), predictions(train, test)
    for name in PREDICTIONS:
        assert few[name] == pytest.approx(all_of_them[name][:5], rel=1e-12)


@pytest.mark.parametrize("column, name, other", [(ENTROPY, "r + entropy", "r + difficulty"),
                                                 (DIFFICULTY, "r + difficulty", "r + entropy")])
def test_a_feature_that_decides_is_found_by_the_predictions_that_have_it(column, name, other):
    table = made_up_states()
    table[:, SUCCESS] = table[:, column] > 0.5
    scores = cross_validate(table)
    assert min(scores[name], scores["r + both"]) > max(scores[other], scores[EQ_P]) + 0.3


def test_no_question_is_in_training_and_test_at_once(monkeypatch):
    seen, table = [], made_up_states(80)

    def spy(train, test):
        seen.append((set(train[:, QUESTION]), set(test[:, QUESTION])))
        return {name: np.full(len(test), 0.5) for name in PREDICTIONS}

    monkeypatch.setattr(calibrate, "predictions", spy)
    assert cross_validate(table) == pytest.approx(dict.fromkeys(PREDICTIONS, np.log(0.5)))
    assert len(seen) == 5 and all(not a & b and len(a | b) == 10 for a, b in seen)


def test_first_error():
    gold = "(a) L+3: 37 -> 67.\n(b) both+3: 67 -> 90.\n#### 90"
    assert first_error("(a) L+3: 37 -> 67.\n(b) both+3: 67 -> 67.\n#### 67", gold) == 1
    assert first_error("(a) L+3: 37 -> 77.\n(b) both+3: 77 -> 00.\n#### 00", gold) == 0
    assert first_error("(a) L+3: 37 -> 67.\n(b) both+3: 67 -> 90.\n#### 91", gold) == 2


def test_the_first_failures_are_forked_at_all_their_states():
    """Correct rollouts have no part in it, wherever they stand; a question without a failure keeps its place."""
    policy = SimpleNamespace(config=Config(segment_tokens=2), text=None)
    right, wrong = Trajectory([5] * 4, 1.0), [Trajectory([6] * n, 0.0) for n in (5, 2, 3)]
    groups = fork_everywhere(policy, [Group([3], [right, wrong[0], right, *wrong[1:]]), Group([4], [right])], most=2)
    assert groups == [Group([3], [Trajectory([6] * 5, 0.0, [Fork(0, 0.25), Fork(2, 0.5), Fork(4, 0.75)]),
                                  Trajectory([6] * 2, 0.0, [Fork(0, 0.5)])]), Group([4], [])]


def tiny_run(folder, *flags):
    flags = ["--preset", "tiny", "--beta", "0", *flags, "--out", str(folder)]
    return train_gsm8k.prepare(train_gsm8k.parse_args(flags))


def test_every_state_of_failed_rollouts_is_branched(tmp_path, monkeypatch):
    policy = tiny_run(tmp_path / "run", "--branches", "3").policy
    rows, seen, resample = tasks.lock.make_rows(tasks.lock.LOCKS["tiny"], 3, 5), [], calibrate.resample_failures
    monkeypatch.setattr(calibrate, "resample_failures", lambda *args: seen.append(resample(*args)) or seen[-1])
    table = observe_states(policy, rows, make_questions(rows, policy.tokenizer, 64)[0], most=1)
    for x in np.unique(table[:, QUESTION]):
        states = table[table[:, QUESTION] == x]
        n = len(states)                                                # of one rollout: n states, r = (i + 1)/(n + 1)
        assert states[:, R] == pytest.approx((np.arange(n) + 1) / (n + 1))
        turns = rows[int(x)]["answer"].count(".\n")
        assert n == turns + 1                                          # all sentences, the last is the answer
        assert (np.diff(states[:, BEFORE]) <= 0).all() and states[0, BEFORE] == 1      # before, before, ..., after
        assert (states[:, ENTROPY] >= 0).all() and len(np.unique(states[:, DIFFICULTY])) == 1
    (groups,) = seen
    assert all(len(g.trajectories) <= 1 and t.reward == 0 for g in groups for t in g.trajectories)
    states = [(x, t, fork) for x, g in enumerate(groups) for t in g.trajectories for fork in t.forks]
    assert len(states) == len(table)
    for (x, t, fork), (question, r, _, _, before, success) in zip(states, table):
        # A state comes before the error when what it keeps is the beginning of the solution.
        assert question == x and before == rows[x]["answer"].startswith(policy.text(t.response[:fork.pivot]))
        assert r == fork.ratio and len(fork.branches) == 3 and success == any(fork.rewards)
    after = table[table[:, BEFORE] == 0]
    assert len(after) and after[:, SUCCESS].mean() < 0.3               # a wrong turn is not undone


def test_entropy_is_that_of_the_step_after_the_state_and_difficulty_that_of_all_rollouts(tmp_path, monkeypatch):
    """A shift by one step would not be seen in the figure: entropies of neighbouring steps are alike."""
    policy = tiny_run(tmp_path / "run", "--branches", "2").policy
    rows, seen = tasks.lock.make_rows(tasks.lock.LOCKS["tiny"], 2, 5), {}

    def keep(name, function):
        def kept(*args):
            seen[name] = function(*args)
            return seen[name]

        monkeypatch.setattr(calibrate, name, kept)

    keep("roll_out", calibrate.roll_out)
    keep("resample_failures", calibrate.resample_failures)
    table = iter(observe_states(policy, rows, make_questions(rows, policy.tokenizer, 64)[0]))
    for drawn, g in zip(seen["roll_out"], seen["resample_failures"]):
        failed = [t for t in drawn.trajectories if t.reward == 0]
        assert [t.response for t in g.trajectories] == [t.response for t in failed[:2]]
        for t in g.trajectories:
            with torch.no_grad():
                logits = policy.model(input_ids=torch.tensor([g.prompt + t.response])).logits[0, len(g.prompt) - 1:-1]
            p = logits.double().softmax(-1)
            entropy = -(p * p.log()).sum(-1)
            for fork, end in zip(t.forks, [*(fork.pivot for fork in t.forks[1:]), len(t.response)]):
                state = next(table)
                assert state[ENTROPY] == pytest.approx(entropy[fork.pivot:end].mean().item(), abs=1e-4)
                assert state[DIFFICULTY] == len(failed) / 8
    assert next(table, None) is None


def test_every_seed_has_its_own_questions_and_its_own_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "observe_states", lambda policy, rows, questions: (rows, torch.initial_seed()))
    args = SimpleNamespace(preset="tiny", out=tmp_path)
    seen = [calibrate.observe_policy(tasks.lock.ASSETS / "tiny", seed, 3, args) for seed in (0, 7)]
    assert seen == [(tasks.lock.make_rows(tasks.lock.LOCKS["tiny"], 3, 1000 + seed), seed) for seed in (0, 7)]


def test_what_is_kept_of_a_policy_by_hand():
    """Two seeds: one rate per tenth of depth and side, every seed's fit, scores and gains over Eq. (P)."""
    seeds = [made_up_states(seed=seed) for seed in (0, 1)]
    seeds[0][0, [R, BEFORE, SUCCESS]] = 0.3, 1, 1
    kept = summarize_states(seeds)
    states = np.concatenate(seeds)
    assert (kept["states"], kept["recovered"]) == (800, int(states[:, SUCCESS].sum()))
    for name, side in (("before", 1), ("after", 0)):
        rows = states[states[:, BEFORE] == side]
        for r, n, recovered in kept["rates"][name]:
            inside = rows[np.abs(rows[:, R] - r) < 0.05]
            assert (n, recovered) == (len(inside), inside[:, SUCCESS].sum()) and n > 0
        assert sum(n for _, n, _ in kept["rates"][name]) == len(rows)
    for i, (table, fit) in enumerate(zip(seeds, kept["fits"])):
        assert [fit["w"], fit["b"]] == pytest.approx(fit_logistic(table[:, [R]], table[:, SUCCESS]), abs=1e-6)
        scores = cross_validate(table)
        assert {name: values[i] for name, values in kept["log_likelihood"].items()} == scores
        assert kept["gain"][ORACLE][i] == scores[ORACLE] - scores[EQ_P] > 0.1 and kept["gain"][EQ_P][i] == 0


def test_the_table_has_means_intervals_and_every_seed():
    scores = {name: [-0.5, -0.25] for name in PREDICTIONS} | {"constant": [-0.75, -0.75]}
    kept = {"states": 8, "recovered": 2, "fits": [{}, {}], "log_likelihood": scores,
            "gain": {name: [a + 0.5, b + 0.25] for name, (a, b) in scores.items()}}
    text = gain_tables({"settings": calibrate.SETTINGS, "policies": {"base model": kept}})
    # Student's t with one degree of freedom: 12.706 times the standard error 0.125.
    assert "| constant | -0.7500 \u00b1 0.0000 | -0.3750 \u00b1 1.5883 | -0.2500 -0.5000 |" in text
    assert "| r: Eq. (P) | -0.3750 \u00b1 1.5883 | +0.0000 \u00b1 0.0000 | +0.0000 +0.0000 |" in text
    assert "Base model: 8 states, 0.25 recovered." in text and "mean of 2 seeds" in text


def test_numbers_figure_and_table_are_written_and_the_words_of_the_page_stay(tmp_path, monkeypatch, capsys):
    observed = []

    def observe(model, seed, n, args):
        observed.append((model, seed, n))
        return made_up_states(80, seed=len(observed))

    monkeypatch.setattr(calibrate, "observe_policy", observe)
    monkeypatch.setattr(calibrate, "trained_policy", lambda seed, args: tmp_path / f"trained-{seed}")
    results, runs = tmp_path / "results", tmp_path / "runs"
    results.mkdir()
    page, numbers, picture = (results / f"calibration.{ending}" for ending in ("md", "json", "png"))
    page.write_text("# Our words\n\n<!-- measured: begin -->\nold\n<!-- measured: end -->\n\nMore words.\n")
    flags = ["--preset", "tiny", "--seeds", "2", "--questions", "3", "--steps", "1", "--out", str(runs),
             "--results", str(results)]
    calibrate.main(flags)
    base = tasks.lock.ASSETS / "tiny"
    assert observed == [(base, 0, 3), (tmp_path / "trained-0", 0, 3), (base, 1, 3), (tmp_path / "trained-1", 1, 3)]
    text = page.read_text()
    assert text.startswith("# Our words\n\n<!--") and text.endswith("-->\n\nMore words.\n") and "old" not in text
    assert "`python -m experiments.calibrate --preset tiny" in text
    assert text.count("| r: Eq. (P) |") == 2 and "**After 1 steps of DEEP-GRPO.**" in text
    assert picture.read_bytes()[:4] == b"\x89PNG"
    kept = json.loads(numbers.read_text())
    assert kept["settings"] == {"preset": "tiny", "seeds": 2, "questions": 3, "steps": 1}
    assert list(kept["policies"]) == ["base model", "after 1 steps of DEEP-GRPO"]

    calibrate.main(flags)                                              # nothing is observed twice
    assert len(observed) == 4 and page.read_text() == text and json.loads(numbers.read_text()) == kept
    drawn = picture.read_bytes()
    picture.unlink()
    calibrate.main(["--redraw", "--results", str(results)])            # from calibration.json alone
    assert picture.read_bytes() == drawn and page.read_text() == text and len(observed) == 4
    numbers.unlink()
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        calibrate.main(["--redraw", "--results", str(results)])
    assert "--redraw" in capsys.readouterr().err and not numbers.exists()


@pytest.mark.parametrize("change, message", [({}, True), ({"steps": 13}, False), ({"preset": "tiny"}, False)])
def test_the_figure_has_the_sentences_of_the_kept_result_only_where_the_settings_are_its_own(change, message):
    settings = {"preset": "tiny-deep", "seeds": 5, "questions": 24, "steps": 12} | change
    kept = summarize_states([made_up_states(80)])
    figure = calibrate.plot_calibration({"settings": settings, "policies": {"base model": kept, "trained": kept}})
    assert figure.get_suptitle() == (calibrate.MESSAGE if message else calibrate.TITLE)
    assert [bool(axis.get_title("left")) for axis in figure.axes] == [message] * 2


@pytest.mark.slow
def test_a_short_run(tmp_path, monkeypatch):
    def train_here(folder, flags):                                     # a process of its own would import torch anew
        code = train_gsm8k.main(flags)
        return SimpleNamespace(wait=lambda: code)

    monkeypatch.setattr(calibrate, "start_run", train_here)
    calibrate.main(["--preset", "tiny", "--seeds", "2", "--questions", "3", "--steps", "1", "--out",
                    str(tmp_path / "runs"), "--results", str(tmp_path / "results")])
    observed = {p.read_bytes() for p in (tmp_path / "runs").rglob("*.npy")}
    assert len(observed) == 4                                          # other questions, other draws
    assert (tmp_path / "results" / "calibration.md").read_text().count("| r: Eq. (P) |") == 2
    kept = json.loads((tmp_path / "results" / "calibration.json").read_text())
    assert all(policy["states"] > 10 for policy in kept["policies"].values())


def test_a_training_run_that_fails_is_named(tmp_path, monkeypatch):
    def start(folder, flags):
        folder.with_suffix(".log").write_text("preset tiny\nerror: no space left\n")
        return SimpleNamespace(wait=lambda: 1)

    monkeypatch.setattr(calibrate, "start_run", start)
    args = SimpleNamespace(out=tmp_path, preset="tiny", steps=3)
    with pytest.raises(SystemExit, match="deep_grpo-tiny-3-7 failed, its last line: error: no space left"):
        calibrate.trained_policy(7, args)
    (tmp_path / "deep_grpo-tiny-3-7" / "checkpoints" / "step_3").mkdir(parents=True)
    assert calibrate.trained_policy(7, args).name == "step_3"          # it is there: nothing is started
