"""The comparison: what it computes from run directories, its tests against tables of Student's t, a short run."""
import json
import statistics
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

import tasks.lock
from experiments import compare
from experiments.compare import EXPERIMENTS, curve, draw, flags_of, interval, read_run, t_tail, tables
from tasks.lock import Lock
from trainer.plot import read_metrics
from trainer.settings import parse_args

SHORT = "--preset tiny --eval-every 1 --eval-rows 4 --step-tokens 1500 --max-new-tokens 80"


@pytest.mark.parametrize("t, df, p", [(12.706, 1, 0.05), (4.303, 2, 0.05), (2.776, 4, 0.05), (4.604, 4, 0.01),
                                      (2.262, 9, 0.05), (1.984, 100, 0.05), (0.0, 4, 1.0)])
def test_tails_of_students_t_as_in_its_tables(t, df, p):
    assert t_tail(t, df) == pytest.approx(p, rel=1e-3)


def test_intervals_by_hand():
    values = [0.5, 0.7, 0.6, 0.9, 0.8]
    mean, width, p = interval(values)
    error = statistics.stdev(values) / 5 ** 0.5
    assert mean == pytest.approx(0.7) and width == pytest.approx(2.7764 * error, rel=1e-4)
    assert p == pytest.approx(t_tail(0.7 / error, 4)) and interval([-v for v in values])[2] == pytest.approx(p)
    assert interval([0.5]) == (0.5, np.inf, 1.0)
    assert interval([0.2, 0.2]) == (0.2, 0.0, 0.0) and interval([0.0, 0.0]) == (0.0, 0.0, 1.0)


def write_run(folder, accuracy, tokens=(100, 300, 400), seconds=1.0):
    """A run of three updates that was evaluated before, after the second and after the third."""
    folder.mkdir(parents=True)
    rows, times = [{"step": 0, "generated_total": 0, "eval_accuracy": accuracy[0]}], [{"step": 0, "seconds_eval": 9.0}]
    for step, total in enumerate(tokens, start=1):
        rows.append({"step": step, "generated_total": total, "generated_tokens": total - rows[-1]["generated_total"],
                     "questions": step, "sequences": 8 * step, "forwarded_tokens": 1000, "trained_tokens": 10,
                     "optimizer_steps": 1, "dead_groups": step / 4, "grad_norm": 1.0, "reward": 0.25 * step,
                     "branch_reward": None if step == 2 else 0.5})
        times.append({"step": step, "seconds_rollout": seconds, "seconds_resample": 0.0, "seconds_score": 0.5 * seconds,
                      "seconds_update": 0.5 * seconds})
    rows[2]["eval_accuracy"], rows[3]["eval_accuracy"] = accuracy[1:]
    (folder / "config.json").write_text('{"settings": {"group_size": 6}}')
    for name, lines in (("metrics.jsonl", rows), ("timing.jsonl", times)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_one_run_by_hand(tmp_path):
    run = write_run(tmp_path / "run", (0.0, 0.6, 0.8))
    # Linear from 0 at 0 to .6 at 300 tokens, to .8 at 400.
    metrics = read_metrics(run)
    assert np.interp(200, *curve(metrics, "generated_total")) == pytest.approx(0.4)
    assert [x.tolist() for x in curve(metrics, None)] == [[0, 2, 3], [0.0, 0.6, 0.8]]
    assert curve(metrics, "seconds")[0].tolist() == [0.0, 4.0, 6.0]
    got = read_run(run)
    assert (got["half"], got["all"]) == (pytest.approx(0.4), pytest.approx(0.8))
    assert got["mean"] == pytest.approx((300 * 0.3 + 100 * 0.7) / 400, abs=5e-3)
    # The first of three updates: 6 rollouts, 2 branches, 100 tokens.
    assert got["right"] == pytest.approx(1000 * (0.25 * 6 + 0.5 * 2) / 100) and got["first"] == 100
    assert got["seconds"] == 6.0 and got["dead_groups"] == pytest.approx(0.5)          # without those of evaluation
    expected = {"questions": 6, "sequences": 48, "generated_tokens": 400, "forwarded_tokens": 3000,
                "trained_tokens": 30, "optimizer_steps": 3}
    assert {name: got[name] for name in expected} == expected


def test_the_first_right_answer_may_be_a_branch_or_never_come(tmp_path):
    """No rollout is right; branches, of which there are some from the second update on, are from the third on."""
    run = write_run(tmp_path / "run", (0.0, 0.0, 0.0))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for third, first in ((0.5, 400), (0.0, np.inf)):
        for row, share in zip(rows[1:], (None, 0.0, third)):
            row |= {"reward": 0.0, "branch_reward": share}
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert read_run(run)["first"] == first and read_run(run)["right"] == 0


def test_tables_and_curves_by_hand(tmp_path):
    accuracies = {"grpo": [(0.0, 0.4, 0.6), (0.0, 0.2, 0.6)], "treerl": [(0.0, 0.6, 0.8), (0.0, 0.5, 0.9)]}
    directories = {arm: [write_run(tmp_path / f"{arm}-{i}", a, seconds=1.0 + (arm == "treerl"))
                         for i, a in enumerate(runs)] for arm, runs in accuracies.items()}
    experiment = EXPERIMENTS["methods"]
    experiment = experiment._replace(seeds=2, arms={arm: experiment.arms[arm] for arm in accuracies})
    text = tables(experiment, directories)
    first, costs, seeds = (block.splitlines() for block in text.split("\n\n") if block.startswith("|"))
    means = {arm: [read_run(d)["mean"] for d in runs] for arm, runs in directories.items()}
    differences = [b - a for a, b in zip(means["grpo"], means["treerl"])]
    mean, width, p = interval(differences)
    assert first[3].split(" | ")[-2:] == [f"{mean:+.3f} ± {width:.3f}", f"{p:.3f} |"]
    assert first[2].startswith("| GRPO, G = 8 | 0.200 ± ") and first[2].endswith("|  |  |")
    assert costs[3] == "| TreeRL, 6 trees | 3 | 6 | 48 | 400 | 3,000 | 30 | 25 | 100 | 0.50 | 2.00 |"
    assert seeds[2] == f"| GRPO, G = 8 | {means['grpo'][0]:.3f} | {means['grpo'][1]:.3f} |"

    figure = draw(experiment, directories, tmp_path / "figure.png")
    by_label = {axis.get_xlabel(): {line.get_label(): line for line in axis.lines} for axis in figure.axes}
    assert set(by_label) == {"generated tokens", "updates", "time (GRPO, G = 8 = 1)"}
    tokens, updates, time = (by_label[name]["TreeRL, 6 trees"] for name in by_label)
    assert (tokens.get_xdata()[-1], updates.get_xdata()[-1], time.get_xdata()[-1]) == pytest.approx((400, 3, 2))
    assert tokens.get_ydata()[[0, -1]].tolist() == pytest.approx([0, 0.85])
    middle = np.interp(300, tokens.get_xdata(), tokens.get_ydata())
    assert middle == pytest.approx(0.55, abs=0.02) == pytest.approx(np.interp(2, *updates.get_data()), abs=0.02)
    plt.close(figure)


def test_every_arm_is_a_valid_command_and_budgets_are_equal():
    for experiment in EXPERIMENTS.values():
        settings = {arm: vars(parse_args(flags_of(experiment, arm, 3, Path("x")))) for arm in experiment.arms}
        assert experiment.seeds >= 5
        for name in ("step_tokens", "budget_tokens", "lr", "steps", "seed", "model", "data", "eval_rows"):
            assert len({str(s[name]) for s in settings.values()}) == 1, name
            assert all(s[name] is not None for s in settings.values())


def test_a_short_comparison_of_two_methods(tmp_path, monkeypatch, capsys):
    """make compare in small: equal tokens, kept and interrupted runs, other settings are refused."""
    out, results = tmp_path / "runs", tmp_path / "results"
    monkeypatch.setitem(EXPERIMENTS, "methods", EXPERIMENTS["methods"]._replace(flags=SHORT))
    flags = ["--arms", "grpo,rrpo", "--seeds", "2", "--budget-tokens", "3000", "--out", str(out),
             "--results", str(results)]
    compare.main(flags)
    capsys.readouterr()
    text = (results / "methods.md").read_text()
    assert (results / "methods.png").read_bytes()[:4] == b"\x89PNG"
    assert f"python compare.py {' '.join(flags)}" in text and "| RRPO, 5 + 4 |" in text
    runs = {arm: [(out / f"{arm}-{seed}" / "metrics.jsonl").read_text() for seed in range(2)]
            for arm in ("grpo", "rrpo")}
    rows = {arm: [[json.loads(line) for line in run.splitlines()] for run in both] for arm, both in runs.items()}
    for run in (run for both in rows.values() for run in both):
        assert run[-1]["generated_total"] >= 3000 > run[-2]["generated_total"]
    # One was interrupted; it goes on, and the others are not run again.
    (out / "rrpo-1" / "run.png").unlink()
    cut = runs["rrpo"][1].splitlines(keepends=True)[:-1]
    (out / "rrpo-1" / "metrics.jsonl").write_text("".join(cut))
    for folder in (out / "rrpo-1" / "checkpoints").iterdir():
        if folder.name == f"step_{rows['rrpo'][1][-1]['step']}":
            folder.rename(folder.with_name("later"))
    before = (out / "grpo-0" / "metrics.jsonl").stat().st_mtime_ns
    compare.main(flags)
    assert "3 finished runs" in capsys.readouterr().out
    assert (out / "grpo-0" / "metrics.jsonl").stat().st_mtime_ns == before
    assert (out / "rrpo-1" / "metrics.jsonl").read_text() == runs["rrpo"][1]
    with pytest.raises(SystemExit, match="grpo-0 holds a run with budget_tokens = 3000, here it is 4000: delete it"):
        compare.main([*flags[:5], "4000", *flags[6:]])
    with pytest.raises(SystemExit):
        compare.main(["--arms", "grpo,ppo"])
    assert "--arms: ppo: choose from grpo, " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compare.main(["--seeds", "0"])
    assert "--seeds: must be at least 1, got 0" in capsys.readouterr().err


def test_an_experiment_with_a_lock_makes_its_base_policy_first(tmp_path, monkeypatch):
    out, lock = tmp_path / "runs", Lock((2, 2), 1, (1, 1), 0.9)
    monkeypatch.setattr(compare, "make_base", partial(compare.make_base, steps=2))
    monkeypatch.setitem(EXPERIMENTS, "rare", EXPERIMENTS["rare"]._replace(flags=SHORT, lock=lock))
    compare.main(["--experiment", "rare", "--arms", "grpo", "--seeds", "1", "--budget-tokens", "1500",
                  "--out", str(out), "--results", str(tmp_path / "results")])
    settings = json.loads((out / "rare" / "grpo-0" / "config.json").read_text())["settings"]
    assert settings["model"] == str(out / "rare" / "base") and settings["eval_rows"] == 128
    rows = [json.loads(line) for line in (out / "rare" / "base" / "train.jsonl").read_text().splitlines()]
    assert rows == tasks.lock.make_rows(lock, 4096, 1) and (tmp_path / "results" / "rare.md").exists()
