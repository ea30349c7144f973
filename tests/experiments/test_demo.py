"""The demo: its table recomputed from metrics.jsonl, its figure, the runs it keeps, and when a run fails."""
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from experiments import demo as program
from recoverability import sigmoid
from trainer.checkpoint import find_checkpoints
from trainer.plot import plot_run, read_metrics

ROOT = Path(__file__).parents[2]
DEMO = ["-m", "experiments.demo", "--preset", "tiny", "--seeds", "1", "--budget-tokens", "3000", "--out"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    done = subprocess.run([sys.executable, *DEMO, str(out)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def lines_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_table_by_hand(demo, tmp_path):
    out, printed = demo
    assert (out / "table.md").read_text().strip() in printed and printed.count(" ± 0 |") > 4     # one seed: no spread
    second = shutil.copytree(out / "grpo-0", tmp_path / "grpo-1")            # as if there were two
    lines = [row | {"generated_total": 2 * row["generated_total"]} for row in lines_of(second)]
    lines[-1] |= {"eval_accuracy": 0.625, "trained_tokens": 77, "step": 9}
    (second / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    runs = [lines_of(out / "grpo-0"), lines]
    columns = [([run[0]["eval_accuracy"] for run in runs], 3),
               ([run[-1]["eval_accuracy"] for run in runs], 3),
               ([run[-1]["step"] for run in runs], 0),
               ([run[-1]["generated_total"] for run in runs], 0),
               ([sum(row["trained_tokens"] for row in run[1:]) for run in runs], 0)]
    row = program.table({"grpo": [out / "grpo-0", second]}).splitlines()[-1]
    cells = row.removeprefix("| GRPO, G = 24 | ").split(" | ")
    assert cells[:5] == [f"{statistics.mean(c):.{n}f} ± {statistics.stdev(c):.{n}f}" for c, n in columns]


def test_equal_budgets(demo):
    out, _ = demo
    for method in program.ARMS:
        run = lines_of(out / f"{method}-0")          # the step that reaches the budget is the last
        assert run[-1]["generated_total"] >= 3000 > run[-2]["generated_total"]
        expected = {48} if method == "grpo" else {16 + 8 * row["pivots"] for row in run[1:]}
        assert {row["sequences"] for row in run[1:]} == expected


def test_both_methods_see_the_same_questions(demo):
    out, _ = demo
    folders = [out / f"{m}-0" for m in ("grpo", "deep_grpo")]
    samples = [map(json.loads, (folder / "samples.jsonl").read_text().splitlines()) for folder in folders]
    seen = [{row["question"] for row in rows if row["step"] == 1} for rows in samples]
    settings = [json.loads((folder / "config.json").read_text())["settings"] for folder in folders]
    different = {k for k in settings[0] if settings[0][k] != settings[1][k]}
    assert different == {"method", "group_size", "branches", "out"} and seen[0] == seen[1]


def test_figure_shows_what_the_runs_hold(demo):
    out, _ = demo
    runs = {m: [out / f"{m}-0"] for m in program.ARMS}
    figure = program.draw(runs, out / "again.png")
    assert (out / "again.png").read_bytes()[:4] == b"\x89PNG" and (out / "comparison.png").exists()
    by_title = {axis.get_title(): axis for axis in figure.axes}
    fit = by_title["P(success | r): at least one of K branches right"]
    trainers = [find_checkpoints(run)[-1][1] / "trainer.pt" for run in runs["deep_grpo"]]
    states = [torch.load(path, weights_only=False)["recoverability"] for path in trainers]
    for line, state in zip([line for line in fit.lines if len(line.get_xdata()) == 50], states):
        np.testing.assert_allclose(line.get_ydata(), sigmoid(state["w"] * line.get_xdata() + state["b"]))
    outcomes = [o for state in states for o in state["outcomes"]]
    x, y = fit.containers[0].lines[0].get_data()
    assert len(x) == len({round(10 * r) for r, _ in outcomes})
    for depth, rate in zip(x, y):
        inside = [success for r, success in outcomes if round(10 * r) == round(10 * depth)]
        assert rate == pytest.approx(sum(inside) / len(inside))
    bars = by_title["where pivots were drawn"].patches
    halves = [sum(len(state["outcomes"]) // 2 for state in states),
              sum((len(state["outcomes"]) + 1) // 2 for state in states)]
    for half, n in zip((bars[:11], bars[11:]), halves):
        counts = [bar.get_height() * 0.1 * n for bar in half]                # a density: area 1
        assert sum(counts) == pytest.approx(n) and all(c == pytest.approx(round(c), abs=1e-6) for c in counts)
    plt.close(figure)


def test_finished_runs_are_kept(demo):
    out, _ = demo
    before = (out / "grpo-0" / "metrics.jsonl").stat().st_mtime_ns
    done = subprocess.run([sys.executable, *DEMO, str(out)], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    assert "2 finished runs" in done.stdout
    assert (out / "grpo-0" / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_failing_run_ends_the_demo_with_its_last_line(tmp_path):
    flags = ["--seeds", "1", "--jobs", "1", "--budget-tokens", "0", "--out", str(tmp_path)]
    command = [sys.executable, *DEMO[:-5], *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "--budget-tokens: must be at least 1" in done.stderr
    assert "Traceback" not in done.stderr


def test_read_metrics_and_the_figure_of_a_run(tmp_path):
    (tmp_path / "config.json").write_text('{"settings": {"preset": "gsm8k"}}')
    (tmp_path / "timing.jsonl").write_text('{"step": 1, "seconds_update": 2.5}\n')
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "eval_accuracy": 0.5}\n'
        '{"step": 1, "reward": 0.25, "recovered": null}\n'
        '{"step": 2, "reward": 0.5, "recovered": 1.0, "eval_accuracy": 0.75}\n')
    metrics = {name: [list(map(float, part)) for part in columns]
               for name, columns in read_metrics(tmp_path).items() if name != "step"}
    assert metrics == {
        "eval_accuracy": [[0, 2], [0.5, 0.75]], "reward": [[1, 2], [0.25, 0.5]], "recovered": [[2], [1.0]],
        "seconds_update": [[1], [2.5]]}
    assert plot_run(tmp_path).read_bytes()[:4] == b"\x89PNG"
