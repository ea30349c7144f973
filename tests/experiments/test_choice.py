"""The choice of failures: what a rule knows and keeps, by hand, a run with a rule, commands that differ in it alone."""
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from test_compare import SHORT
from test_runs import run_here

import train_gsm8k
from deep_grpo import Fork, Group, Trajectory
from experiments import choice
from experiments.choice import ARMS, RULES, earlier_pivots, preferred, run_one
from experiments.runs import Experiment, flags_of
from tasks.lock import Lock
from trainer.session import PIVOT_COLUMNS, pivot_lines
from trainer.settings import parse_args
from variants.thin import thinned

CONFIG = SimpleNamespace(group_size=4)


def question(correct, ratios, rewards=()):
    """A group of at least 4 rollouts: right ones, failures with a fork at each of these depths, and other failures."""
    forks = [[Fork(3, ratio, [[1]] * len(rewards), list(rewards))] for ratio in ratios]
    forks += [[]] * (4 - correct - len(forks))
    return Group([1], [Trajectory([2] * 9, 1.0)] * correct + [Trajectory([2] * 9, 0.0, fork) for fork in forks])


def write_pivots(run, groups):
    (run / "pivots.csv").write_text(PIVOT_COLUMNS + "".join(pivot_lines(1, groups)))


def kept_of(rule, run, groups, share, seed=0):
    """The depths of the forks that are left, question by question."""
    choose = thinned(lambda policy, questions, groups, *rest: groups, share, partial(preferred, rule, run))
    left = choose(None, None, groups, CONFIG, None, np.random.default_rng(seed))
    assert [len(g.trajectories) for g in left] == [len(g.trajectories) for g in groups]
    return [[fork.ratio for t in g.trajectories for fork in t.forks] for g in left]


def test_earlier_pivots_are_those_of_the_log(tmp_path):
    """Living is a pivot whose branches got different rewards: neither none nor all of them correct."""
    assert earlier_pivots(tmp_path, 4)[0].shape == (0, 2) and earlier_pivots(tmp_path, 4)[1].shape == (0,)
    write_pivots(tmp_path, [question(2, [0.25, 0.5], [1.0, 0.0]), question(0, [0.75], [1.0, 1.0]),
                            question(1, [1.0], [0.0, 0.0])])
    known, living = earlier_pivots(tmp_path, 4)
    assert known == pytest.approx(np.array([[0.25, np.log(3)], [0.5, np.log(3)], [0.75, 0], [1.0, np.log(2)]]))
    assert living.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("rule, expected", [("depth", [[0.1], [0.1]]), ("rate", [[], [0.1, 0.9]])])
def test_a_rule_keeps_what_was_living_in_the_log(tmp_path, monkeypatch, rule, expected):
    """In one log shallow pivots were living, in the other those of questions with a right rollout."""
    monkeypatch.setattr(choice, "EXPLORED", 0)
    log = []
    for depth in (0.1, 0.9):
        for correct in (0, 2):
            living = depth < 0.5 if rule == "depth" else correct == 2
            log += [question(correct, [depth], [1.0, 0.0] if living else [0.0, 0.0])] * 9
    write_pivots(tmp_path, log)
    groups = [question(0, [0.1, 0.9]), question(2, [0.1, 0.9])]
    for seed in range(9):
        for own in (rule, "both"):
            assert kept_of(own, tmp_path, groups, 0.5, seed) == expected


def test_without_outcomes_of_both_kinds_the_choice_is_uniform(tmp_path):
    groups = [question(0, [0.1, 0.2, 0.3, 0.4])]
    write_pivots(tmp_path, [question(0, [0.5], [0.0, 0.0])])
    kept = [tuple(kept_of("both", tmp_path, groups, 0.5, seed)[0]) for seed in range(600)]
    assert {len(k) for k in kept} == {2}
    counts = [sum(ratio in k for k in kept) for ratio in (0.1, 0.2, 0.3, 0.4)]
    assert all(abs(n - 300) < 5 * (600 / 4) ** 0.5 for n in counts)


def test_a_tenth_is_drawn_from_all_others(tmp_path):
    """Of 20 failures 10 are kept: the best 9 always, and one of the 11 others. Each of them is as likely."""
    write_pivots(tmp_path, [question(0, [depth], [1.0, 0.0] if depth < 0.5 else [0.0, 0.0])
                            for depth in np.arange(1, 20) / 20])
    ratios = (np.arange(20) + 1) / 20
    groups = [question(0, ratios)]
    kept = [kept_of("depth", tmp_path, groups, 0.5, seed)[0] for seed in range(550)]
    assert all(len(k) == 10 and set(ratios[:9]) <= set(k) for k in kept)
    counts = np.array([sum(ratio in k for k in kept) for ratio in ratios[9:]])
    assert counts.sum() == 550 and (np.abs(counts - 50) < 5 * 50 ** 0.5).all()


def test_a_run_with_a_rule_branches_half_of_its_failures(tmp_path, monkeypatch):
    run_here(monkeypatch, Lock((3, 3), 1, (1, 1), 0.5))
    out, asked = tmp_path / "run", []
    monkeypatch.setattr(choice, "earlier_pivots", lambda run, G: asked.append((run, G)) or earlier_pivots(run, G))
    flags = [*SHORT.split(), "--method", "deep_grpo", "--branch-share", ".5", "--seed", "1", "--budget-tokens", "1500",
             "--steps", "9", "--questions", "2", "--out", str(out)]
    assert run_one("both", *flags) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    failures = sum((1 - row["reward"]) * row["questions"] * 8 for row in rows[1:])
    pivots = len((out / "pivots.csv").read_text().splitlines()) - 1
    assert len(rows) > 2 and abs(pivots - failures / 2) < len(asked) and set(asked) == {(out, 8)}
    assert train_gsm8k.thinned.__module__ == "variants.thin"


def test_commands_differ_in_the_rule_alone():
    experiment = Experiment("", 20, 128_000, "--preset tiny-deep", ARMS)
    settings = [vars(parse_args(flags_of(experiment, arm, 3, Path("x")))) for arm in ARMS]
    assert all(s == settings[0] for s in settings) and settings[0]["branch_share"] == 0.5
    assert settings[0]["questions"] > 1             # else a rule could not choose between questions
    modules = ["train_gsm8k", *(f"experiments.choice run {rule}" for rule in RULES)]
    assert [arm.module for arm in ARMS.values()] == modules


def test_a_run_without_a_rule_or_a_directory_is_named(capsys):
    for words in ((), ("depth",), ("deep", "--out", "x"), ("depth", "--seed", "1")):
        assert run_one(*words) == 2 and "needs a rule of depth, rate, both, got " in capsys.readouterr().err


def test_the_figure_has_the_message_of_the_kept_numbers_only(tmp_path, monkeypatch):
    titles, kept = [], json.loads((Path(__file__).parents[2] / "results" / "choice.json").read_text())
    monkeypatch.setattr(choice, "save_figure", lambda figure, path: titles.append(figure.get_suptitle()))
    for change in ({}, {"budget_tokens": 9}):
        (tmp_path / "choice.json").write_text(json.dumps(kept | change))
        choice.main(["--redraw", "--results", str(tmp_path)])
    assert titles == [choice.EXPERIMENT.message, choice.EXPERIMENT.title]
    plt.close("all")


def test_nothing_can_be_drawn_without_numbers(tmp_path, capsys):
    with pytest.raises(SystemExit):
        choice.main(["--redraw", "--results", str(tmp_path)])
    assert "--redraw: " in capsys.readouterr().err
