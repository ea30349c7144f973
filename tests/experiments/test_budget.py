"""The budget: its table, signs and heat map by hand, and commands that differ in how tokens are spent alone."""
import json
from argparse import Namespace
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from experiments import budget as program
from experiments.budget import ARMS, FLAGS, LOCKS, grid, plot_budget, signs, table
from experiments.compare import settings_of
from experiments.runs import Experiment, flags_of, interval
from trainer.settings import parse_args

ROOT = Path(__file__).parents[2]


def kept_of(**accuracies):
    """One lock; arm -> mean accuracy of each of three seeds, .2 where nothing is said."""
    early = {"early_dead_groups": 0.75, "early_recovered": 0.5}
    arms = {arm: {"label": own.label, "seeds": [{"accuracy_mean": value} | early for value in values],
                  "summary": {"accuracy_mean": sum(values) / 3}}
            for arm, own in ARMS.items() for values in [accuracies.get(arm, (0.2, 0.2, 0.2))]}
    return {"a lock": {"arms": arms, "seeds": 3, "budget_tokens": 9}}


def test_differences_and_their_intervals_by_hand():
    kept = kept_of(g8=(0.2, 0.3, 0.4), s100=(0.1, 0.22, 0.3), k4=(0.1, 0.5, 0.6))
    mean, significant = grid(kept)
    rows = list(ARMS)
    of_s100, of_k4 = interval([-10, -8, -10]), interval([-10, 20, 20])
    assert mean[rows.index("s100"), 0] == pytest.approx(of_s100[0]) and significant[rows.index("s100"), 0]
    assert mean[rows.index("k4"), 0] == pytest.approx(10) and not significant[rows.index("k4"), 0]
    assert mean[0, 0] == 0 and not significant[0, 0]
    text = table(kept)
    assert "| G = 8 | 30.0 |" in text and f"| G = 8, K = 4, S = 1 | 40.0 (+10.0 \u00b1 {of_k4[1]:.1f}) |" in text
    assert "| dead groups of G = 8, first quarter | 0.75 |" in text
    figure = plot_budget(kept, "The message")
    texts = {text.get_text(): text.get_weight() for text in figure.axes[0].texts}
    assert texts["30 %"] == "normal" and texts["\u22129.3"] == "bold" and texts["+10.0"] == "normal"
    rows = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert rows[0] == "GRPO, G = 8" and rows[-1] == "DEEP-GRPO, G = 8, K = 8, S = 1"
    plt.close(figure)


def test_the_figure_has_the_message_of_the_kept_numbers_only(tmp_path, monkeypatch):
    """Another --seeds does not matter where nothing is run."""
    titles, kept = [], json.loads((ROOT / "results" / "budget.json").read_text())
    monkeypatch.setattr(program, "save_figure", lambda figure, path: titles.append(figure.get_suptitle()))
    for part in (kept, {"late error, rare": kept["late error, rare"]}):
        (tmp_path / "budget.json").write_text(json.dumps(part))
        program.main(["--redraw", "--seeds", "7", "--locks", "late error, rare", "--results", str(tmp_path)])
    assert titles == [program.MESSAGE, program.TITLE]
    plt.close("all")


def test_the_signs_are_means_over_runs_that_have_them():
    kept = kept_of()["a lock"]
    for run, dead, recovered in zip(kept["arms"]["s100"]["seeds"], (0.0, 0.1, 0.2), (0.2, None, 0.4)):
        run |= {"early_dead_groups": dead, "early_recovered": recovered}
    assert signs(kept) == pytest.approx({"dead_groups": 0.75, "recovered": 0.3})


def test_every_split_is_a_valid_command_and_budgets_are_equal():
    experiment = Experiment("", 10, 128_000, FLAGS, ARMS)
    settings = [vars(parse_args(flags_of(experiment, arm, 3, Path("x")))) for arm in ARMS]
    for name in ("step_tokens", "budget_tokens", "lr", "steps", "seed", "model", "data", "objective"):
        assert len({str(s[name]) for s in settings}) == 1, name
    spent = {(s["group_size"], s["branches"], s["branch_share"]) for s in settings}
    assert len(spent) == len(ARMS) and len(LOCKS) == 4


def test_unknown_locks_and_missing_numbers_are_named(tmp_path, capsys):
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "budget.json").write_text('{"late error, rare": {')
    with pytest.raises(SystemExit):
        program.main(["--redraw", "--results", str(tmp_path / "torn")])
    assert "budget.json is damaged (" in capsys.readouterr().err
    for flags, message in ((["--locks", "no"], "--locks: no: choose from "), (["--redraw"], "--redraw: ")):
        with pytest.raises(SystemExit):
            program.main([*flags, "--results", str(tmp_path)])
        assert message in capsys.readouterr().err


def test_fewer_seeds_are_refused_before_a_base_policy_is_made(tmp_path, monkeypatch):
    kept = {"late error, rare": kept_of()["a lock"] | {"flags": FLAGS, "first_seed": 0, "lock": {
        "turns": [12, 14], "hard": 1, "place": [1, 2], "p": 0.01}}}
    (tmp_path / "budget.json").write_text(json.dumps(kept))
    monkeypatch.setattr(program, "make_task", None)
    with pytest.raises(SystemExit, match="3 seeds are kept, here there are 2: raise --seeds"):
        program.main(["--locks", "late error, rare", "--seeds", "2", "--budget-tokens", "9", "--extend",
                      "--results", str(tmp_path)])


def test_locks_of_other_settings_do_not_come_into_one_file(tmp_path, capsys):
    """The text above the table has one number of seeds and one budget for all locks."""
    (tmp_path / "budget.json").write_text(json.dumps(kept_of()))
    with pytest.raises(SystemExit):
        program.main(["--locks", "late error, rare", "--seeds", "2", "--results", str(tmp_path)])
    assert "has seeds and tokens (3, 9), here they are (2, 128000): choose another" in capsys.readouterr().err


def test_the_kept_results_are_those_of_these_locks_and_splits():
    kept = json.loads((ROOT / "results" / "budget.json").read_text())
    assert list(kept) == list(program.LOCKS)
    for name, measured in kept.items():
        own = settings_of(Experiment("", measured["seeds"], 128_000, program.FLAGS, program.ARMS, program.LOCKS[name]))
        assert {key: measured.get(key, own[key]) for key in own} == own
        assert {arm: k["flags"] for arm, k in measured["arms"].items()} == {a: o.flags for a, o in program.ARMS.items()}
    assert program.table(kept) in (ROOT / "results" / "budget.md").read_text()


def test_the_runs_of_a_lock_have_its_base_policy(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(program, "make_task", lambda experiment, folder: f"--model {folder} {experiment.lock.p}")
    monkeypatch.setattr(program, "measure", lambda experiment, out, jobs, base, known: seen.append((out, jobs, base)))
    args = Namespace(seeds=1, budget_tokens=9, jobs=2)
    program.measure_lock(program.LOCKS["late error, rare"], tmp_path, args)
    assert seen == [(tmp_path, 2, f"--model {tmp_path / 'base'} 0.01")]
