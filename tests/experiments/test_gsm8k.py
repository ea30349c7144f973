"""The two programs that read logs of GSM8K: their numbers by hand, and the kept pages are what they write."""
import json

import numpy as np
import pytest

from eval_math import wilson
from experiments import gsm8k_curves, gsm8k_pivots, gsm8k_runs
from trainer import plot
from trainer.plot import authors_curves, last_words, smooth


def test_the_logs_are_those_of_the_paper():
    """The published numbers are in them: the best of all of DEEP-GRPO, and the best to step 2,000 of GRPO."""
    curves = authors_curves()
    runs = {name: gsm8k_curves.summarize(*curves[column]) for name, column in gsm8k_curves.RUNS.items()}
    assert len(runs) == len(set(gsm8k_curves.RUNS.values())) == 16
    deep = runs["DEEP-GRPO, K = 8"]
    assert (deep["best"], deep["best step"], deep["evaluations"]) == (pytest.approx(67.70, abs=0.01), 2420, 592)
    assert runs["GRPO, N = 8"]["best to 2,000"] == pytest.approx(64.1, abs=0.05)
    assert runs["GRPO, N = 64"]["best to 2,000"] == pytest.approx(66.2, abs=0.05)


def test_the_numbers_of_a_run_by_hand():
    steps = np.arange(0, 2101, 5.0)
    values = np.where(steps % 10 == 0, 0.50, 0.52)                       # up and down by 2 points
    values[steps == 700], values[steps == 2050] = 0.9, 0.95
    run = gsm8k_curves.summarize(steps, values)
    assert run["late"] == (pytest.approx(51, abs=0.05), pytest.approx(1, abs=0.01))
    assert (run["best to 2,000"], run["best"], run["best step"]) == (90, 95, 2050)
    assert run["noise"] == pytest.approx(2 / np.sqrt(2), rel=0.01) and run["start"] == 50


def test_smoothing_is_the_mean_of_the_last_50_steps():
    steps, values = np.array([0.0, 25, 50, 75]), np.array([1.0, 2, 4, 8])
    assert smooth(steps, values).tolist() == [1, 1.5, 3, 6]              # at 50 the value of step 0 is 50 steps ago


def test_hours_are_interpolated_and_may_never_come():
    column = gsm8k_curves.RUNS["DEEP-GRPO, K = 8"]
    curves = {column: (np.array([0.0, 100, 200]), np.array([0.5, 0.61, 0.63])),
              f"hours {column}": (np.array([0.0, 200]), np.array([0.0, 4]))}
    assert gsm8k_curves.hours_to(curves) == {"DEEP-GRPO, K = 8": [2.0, 4.0, None]}


def write_run(folder, eval_data, accuracies, n=1319):
    folder.mkdir()
    about = {"settings": {"eval_data": eval_data, "group_size": 4}, "evaluation_questions": n}
    (folder / "config.json").write_text(json.dumps(about))
    lines = [json.dumps({"step": step, "eval_accuracy": accuracy}) + "\n" for step, accuracy in accuracies.items()]
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "timing.jsonl").write_text("")
    return folder


def test_a_run_is_compared_with_the_authors_at_the_same_steps(tmp_path):
    steps, values = authors_curves()[plot.THEIRS["deep_grpo"]]
    at = dict(zip(steps, values))
    late, line = last_words(write_run(tmp_path / "a", "gsm8k", {0: 0.43, 25: 0.50, 50: 0.52}))
    mine, theirs = (0.50 + 0.52) / 2, (at[25] + at[50]) / 2
    assert "over the last 1 of 3 evaluations is 0.520" in late
    assert f"at step 50 this run is at {mine:.3f} +- {1.96 * np.sqrt(mine * (1 - mine) / 1319):.3f}" in line
    spread = 1.96 * np.std([value for step, value in at.items() if 0 < step <= 50])
    assert f"the authors' deep_grpo was at {theirs:.3f} +- {spread:.3f}" in line and "the authors' grpo was at " in line
    line = last_words(write_run(tmp_path / "b", "gsm8k", {4590: 0.6}))[1]
    assert "the authors' deep_grpo ended before" in line and "the authors' grpo was at " in line
    assert len(last_words(write_run(tmp_path / "c", None, {50: 0.6}, 256))) == 1     # another test set
    copy = last_words(write_run(tmp_path / "copy", "data/test.jsonl", {0: 0.43, 25: 0.50, 50: 0.52}))
    assert copy[1].startswith(f"at step 50 this run is at {mine:.3f} +- ")
    assert last_words(write_run(tmp_path / "d", "gsm8k", {0: 0.43})) == []
    assert plot.plot_run(tmp_path / "a").read_bytes()[:4] == b"\x89PNG"


def test_a_run_like_that_of_the_authors_lies_on_their_curve_in_the_figure(tmp_path, monkeypatch):
    """It has fewer evaluations, which once made a rising curve lie above theirs."""
    steps, values = authors_curves()[plot.THEIRS["grpo"]]
    at = dict(zip(steps, values))
    monkeypatch.setattr(plot.plt, "close", lambda figure: None)
    plot.plot_run(write_run(tmp_path / "a", "gsm8k", {step: at[step] for step in range(0, 201, 25)}))
    lines = {line.get_label(): line.get_ydata() for line in plot.plt.gcf().axes[0].lines}
    monkeypatch.undo()
    plot.plt.close("all")
    assert lines["authors: grpo, smoothed"] == pytest.approx(lines["eval_accuracy, smoothed"], abs=1e-12)
    assert max(abs(lines["authors: deep_grpo, smoothed"] - lines["eval_accuracy, smoothed"])) > 0.005


def test_the_mean_is_that_of_the_last_quarter(tmp_path):
    accuracies = dict(enumerate([0.1, 0.9, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8]))
    assert "over the last 2 of 8 evaluations is 0.700" in last_words(write_run(tmp_path / "a", None, accuracies))[0]


@pytest.mark.parametrize("argv, said", [([], "name a run"), (["nowhere"], "nowhere does not hold a run")])
def test_what_cannot_be_drawn_is_one_line(argv, said, capsys):
    assert plot.main(argv) == 2
    out, err = capsys.readouterr()
    assert said in err and err.count("\n") == 1 and not out


# ---- pivots ----

def write_pivots(folder):
    """Eight pivots of two steps: deep ones fail; the questions with a correct rollout are recovered."""
    write_run(folder, "gsm8k", {})
    metrics = [{"step": 1, "w": -2.0, "b": 1.0}, {"step": 2, "w": -3.0, "b": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    rows = [(step, 100, 50, depth, right, 8, rate) for step in (1, 2)
            for depth, right, rate in ((0.2, 3, 0.25), (0.2, 0, 0.0), (0.8, 1, 0.25), (0.8, 0, 0.0))]
    text = "step,response_tokens,pivot,depth,right_branches,branches,question_rate\n"
    (folder / "pivots.csv").write_text(text + "".join(",".join(map(str, row)) + "\n" for row in rows))
    return folder


def test_every_pivot_has_the_fit_of_the_step_before(tmp_path):
    pivots = gsm8k_pivots.read_pivots(write_pivots(tmp_path / "run"))
    assert pivots["recovered"].tolist() == [1, 0, 1, 0] * 2 and pivots["rate"].tolist() == [1, 0, 1, 0] * 2
    assert np.isnan(pivots["fit"][:4]).all()                             # drawn before there was a fit
    assert pivots["fit"][4:].tolist() == pytest.approx([1 / (1 + np.exp(2 * r - 1)) for r in (0.2, 0.2, 0.8, 0.8)])
    groups = gsm8k_pivots.groups_of(pivots, pivots["depth"], [0, 0.5, 1])
    assert [(g["pivots"], g["recovered"], g["at"]) for g in groups] == [(2, 0.5, pytest.approx(0.2)),
                                                                      (2, 0.5, pytest.approx(0.8))]
    assert [g["fit"] for g in groups] == pytest.approx([1 / (1 + np.exp(2 * r - 1)) for r in (0.2, 0.8)])


def test_predictions_are_tested_on_the_later_steps(tmp_path):
    pivots = gsm8k_pivots.read_pivots(write_pivots(tmp_path / "run"))
    found = gsm8k_pivots.predictions(pivots)
    assert found["nothing: a constant"] == {"log-loss": pytest.approx(np.log(2)), "AUC": None}
    assert found["depth"]["AUC"] == 0.5 and found["the rate of the question"]["AUC"] == 1.0
    assert found["both"]["log-loss"] < found["depth"]["log-loss"]
    pivots["recovered"][4:] = 1 - pivots["recovered"][4:]                # what was fitted is now wrong
    assert gsm8k_pivots.predictions(pivots)["the rate of the question"]["AUC"] == 0.0


def test_area_by_hand():
    assert gsm8k_pivots.area(np.array([0.1, 0.4, 0.4, 0.9]), np.array([0, 1, 0, 1])) == (1 + 0.5 + 1 + 1) / 4


def leaves(tree, at=()):
    """{where: value} of all values in lists and dicts."""
    if not isinstance(tree, dict | list):
        return {at: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {key: value for name, part in items for key, value in leaves(part, (*at, name)).items()}


@pytest.mark.parametrize("program, pages", [(gsm8k_curves, ["curves"]), (gsm8k_pivots, ["recoverability"])])
def test_the_kept_numbers_are_what_the_program_writes(program, pages, tmp_path, capsys):
    program.main(["--results", str(tmp_path)])
    kept = gsm8k_pivots.KEPT.parents[1]
    for page in pages:
        assert (tmp_path / f"{page}.png").exists()
        ours, theirs = (json.loads((folder / f"{page}.json").read_text()) for folder in (tmp_path, kept))
        ours, theirs = leaves(ours), leaves(theirs)          # another CPU may round a sum differently
        assert ours.keys() == theirs.keys()
        for at, value in theirs.items():
            assert ours[at] == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else value), at
        table = [line for line in (tmp_path / f"{page}.md").read_text().splitlines() if line.startswith("|")]
        assert "\n".join(table[:9]) in (kept / f"{page}.md").read_text()


@pytest.mark.parametrize("text", [None, "step,response_tokens\n", "other\n1\n"])
def test_a_run_without_pivots_is_one_line(text, tmp_path, capsys):
    run = write_run(tmp_path / "run", "gsm8k", {1: 0.5})
    if text:
        (run / "pivots.csv").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        gsm8k_pivots.main(["--run", str(run), "--results", str(tmp_path)])
    assert "has no pivots to read" in capsys.readouterr().err


def test_the_figure_of_the_two_runs_has_their_numbers(tmp_path):
    """The page says 23.4, 25.2 and 23.6 % for DEEP-GRPO, and 29.8 and 30.8 % for GRPO."""
    metrics = {name: plot.read_metrics(gsm8k_runs.KEPT / name) for name in gsm8k_runs.RUNS}
    figure = gsm8k_runs.plot_runs(metrics)
    points = [bar.lines[0].get_ydata().round(1).tolist() for bar in figure.axes[1].containers]
    assert points == [[23.4, 25.2, 23.6], [23.4, 29.8, 30.8]]
    segment = figure.axes[1].containers[1].lines[2][0].get_segments()[2][:, 1]
    assert segment == pytest.approx([100 * bound for bound in wilson(metrics["grpo"]["eval_accuracy"][1][2], 1319)])
    plot.plt.close(figure)
    gsm8k_runs.main(["--results", str(tmp_path)])
    assert (tmp_path / "second-run.png").read_bytes()[:4] == b"\x89PNG"
