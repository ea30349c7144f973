"""The demo: its table recomputed from metrics.jsonl, its figure and caption, the runs it keeps, a run that fails."""
import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from test_runs import write_run

from experiments import demo as program
from recoverability import sigmoid
from train_gsm8k import batch_at, prepare
from trainer.checkpoint import find_checkpoints
from trainer.plot import plot_run, read_metrics
from trainer.settings import parse_args

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


@pytest.mark.slow
def test_table_by_hand(demo, tmp_path):
    out, printed = demo
    assert (out / "table.md").read_text().strip() in printed and printed.count(" ± 0 |") > 4     # one seed: no spread
    second = shutil.copytree(out / "half-0", tmp_path / "half-1")        # as if there were two
    lines = [row | {"generated_total": 2 * row["generated_total"]} for row in lines_of(second)]
    lines[-1] |= {"eval_accuracy": 0.625, "trained_tokens": 77, "step": 9}
    (second / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    runs = [lines_of(out / "half-0"), lines]
    columns = [([run[0]["eval_accuracy"] for run in runs], 3),
               ([run[-1]["eval_accuracy"] for run in runs], 3),
               ([run[-1]["step"] for run in runs], 0),
               ([run[-1]["generated_total"] for run in runs], 0),
               ([sum(row["trained_tokens"] for row in run[1:]) for run in runs], 0)]
    row = program.table({"half": [out / "half-0", second]}).splitlines()[-1]
    cells = row.removeprefix("| DEEP-GRPO, S = 1/2 | ").split(" | ")
    assert cells[:5] == [f"{statistics.mean(c):.{n}f} ± {statistics.stdev(c):.{n}f}" for c, n in columns]


@pytest.mark.slow
def test_equal_budgets(demo):
    out, _ = demo
    for method in program.ARMS:
        run = lines_of(out / f"{method}-0")          # the step that reaches the budget is the last
        assert run[-1]["generated_total"] >= 3000 > run[-2]["generated_total"]
        pivots = [row["pivots"] for row in run[1:]]
        expected = [16] if method == "grpo" else [16 + 8 * n for n in pivots]
        assert {row["sequences"] for row in run[1:]} == set(expected)
        # GRPO with G = 8 has a third of the tokens in an update, and is evaluated after three times as many.
        evaluated = [row["step"] for row in run[:-1] if "eval_accuracy" in row]
        assert evaluated == list(range(0, len(run) - 1, 12 if method == "grpo" else 4))


@pytest.mark.slow
def test_all_methods_see_the_same_questions(demo, tmp_path):
    """Nothing on which the questions of a step depend differs, and the samples show those of the step they are from."""
    out, _ = demo
    folders = [out / f"{m}-0" for m in program.ARMS]
    settings = [json.loads((folder / "config.json").read_text())["settings"] for folder in folders]
    run = prepare(parse_args(["--preset", "tiny", "--seed", "0", "--out", str(tmp_path / "run")]))
    for folder, own in zip(folders, settings):
        different = {k for k in own if own[k] != settings[0][k]}
        assert different <= {"method", "branch_share", "branches", "eval_every", "out"}, folder.name
        samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        assert samples
        for step in {row["step"] for row in samples}:
            shown = {row["question"] for row in samples if row["step"] == step}
            assert shown == {question.text for question in batch_at(run, step)}


@pytest.mark.slow
def test_figure_shows_what_the_runs_hold(demo):
    out, _ = demo
    runs = {m: [out / f"{m}-0"] for m in program.ARMS}
    figure = program.plot_demo(runs)
    assert (out / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    curves, fit, pivots = figure.axes
    for method, (name, line) in zip(runs, {line.get_label(): line for line in curves.lines
                                           if line.get_linewidth() > 2}.items()):
        metrics = lines_of(runs[method][0])
        assert name == program.NAMES[method] and curves.get_xlim()[1] == pytest.approx(line.get_xdata()[-1])
        last = line.get_xdata()[-1] * 1000
        tokens, accuracy = zip(*[(row["generated_total"], row["eval_accuracy"]) for row in metrics
                                 if row.get("eval_accuracy") is not None])
        ends = [100 * accuracy[0], 100 * np.interp(last, tokens, accuracy)]
        assert line.get_ydata()[[0, -1]].tolist() == pytest.approx(ends)
    trainers = [find_checkpoints(run)[-1][1] / "trainer.pt" for run in runs["deep_grpo"]]
    states = [torch.load(path, weights_only=False)["recoverability"] for path in trainers]
    for line, state in zip([line for line in fit.lines if len(line.get_xdata()) == 50], states):
        np.testing.assert_allclose(line.get_ydata(), 100 * sigmoid(state["w"] * line.get_xdata() + state["b"]))
    outcomes = [o for state in states for o in state["outcomes"]]
    x, y = fit.containers[0].lines[0].get_data()
    assert len(x) == len({round(10 * r) for r, _ in outcomes})
    for depth, rate in zip(x, y):
        inside = [success for r, success in outcomes if round(10 * r) == round(10 * depth)]
        assert rate == pytest.approx(100 * sum(inside) / len(inside))
    bars = pivots.patches
    halves = [sum(len(state["outcomes"]) // 2 for state in states),
              sum((len(state["outcomes"]) + 1) // 2 for state in states)]
    for half, n in zip((bars[:11], bars[11:]), halves):
        counts = [bar.get_height() / 100 * n for bar in half]                # shares of all pivots of this half
        assert sum(counts) == pytest.approx(n) and all(c == pytest.approx(round(c), abs=1e-6) for c in counts)
    plt.close(figure)


def test_the_caption_says_what_is_significant(tmp_path):
    """Three seeds of each method with these accuracies after half and after all of the tokens."""
    accuracies = {"deep_grpo": [(0.50, 0.9), (0.52, 0.8), (0.54, 0.7)], "grpo": [(0.80, 0.9), (0.81, 0.8), (0.85, 0.7)],
                  "half": [(0.20, 0.7), (0.50, 0.9), (0.53, 0.8)]}
    runs = {method: [write_run(tmp_path / f"{method}-{i}", (0.0, half, end), tokens=(100, 200, 400))
                     for i, (half, end) in enumerate(pairs)] for method, pairs in accuracies.items()}
    assert program.shared_tokens(runs) == 400 and program.accuracy_at(runs["grpo"], 200).tolist() == [0.80, 0.81, 0.85]
    half, end = program.caption(runs).splitlines()
    assert half == ("After half of the tokens the accuracy is 52 % with DEEP-GRPO, 82 % with GRPO and 41 % with "
                    "DEEP-GRPO, S = 1/2; DEEP-GRPO is significantly behind GRPO.")
    assert end == ("At the end the accuracy is 80 % with DEEP-GRPO, 80 % with GRPO and 80 % with "
                   "DEEP-GRPO, S = 1/2; with 3 seeds no difference to DEEP-GRPO is significant.")


@pytest.mark.slow
def test_finished_runs_are_kept(demo):
    out, _ = demo
    before = (out / "grpo-0" / "metrics.jsonl").stat().st_mtime_ns
    picture = (out / "comparison.png").read_bytes()
    done = subprocess.run([sys.executable, *DEMO, str(out)], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    assert "3 of 3 runs are finished" in done.stdout and (out / "comparison.png").read_bytes() == picture
    assert (out / "grpo-0" / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_failing_run_ends_the_demo_with_its_last_line(tmp_path, monkeypatch):
    """The run is a process of its own. The demo ends with one line and therefore with the exit code 1."""
    monkeypatch.setitem(program.ARMS, "deep_grpo", program.Arm("", "--method deep_grpo --beta -1"))
    with pytest.raises(SystemExit) as ended:
        program.main(["--preset", "tiny", "--seeds", "1", "--jobs", "1", "--out", str(tmp_path)])
    assert re.fullmatch(r"error: \S*deep_grpo-0 failed, its last line: .*beta must be 0 or positive.*",
                        ended.value.code)


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
