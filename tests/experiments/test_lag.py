"""The lag: curves over updates by hand, the table and figure of two seeds, valid commands, one short measurement."""
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from test_runs import run_here, write_run

from experiments import lag as program
from experiments.lag import ARMS, LAGS, accuracies, collect, plot_lags, read_curve, shared_updates, tables
from experiments.runs import Experiment, flags_of, interval
from tasks.lock import Lock
from trainer.settings import parse_args

ROOT = Path(__file__).parents[2]


def measured_of(curves):
    """arm -> accuracies of its seeds after 0, 4 and 8 updates, as collect() gives them."""
    return {"settings": {"seeds": 2, "batches": 20}, "arms": {
        arm: {"label": ARMS[arm].label, "seeds": [
            {"updates": [0, 4, 8], "accuracy": list(accuracy), "ess_share": 0.5 if arm[0] == "v" else None,
             "grad_norm": 0.25, "clip_fraction": 0.01}
            for accuracy in curves.get(arm, [(0, 0, 0), (0, 0, 0)])]} for arm in ARMS}}


def test_the_curve_of_a_run_begins_with_its_first_update(tmp_path):
    """Three steps, evaluated at 0, 2 and 3. With lag 2 nothing was learned up to step 2."""
    run = write_run(tmp_path / "run", (0.1, 0.6, 0.8))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row, share, norm, steps in zip(rows[1:], (None, 0.5, 0.25), (9.0, 1.0, 2.0), (0, 1, 1)):
        row |= {"ess_share": share, "grad_norm": norm, "clip_fraction": norm / 10, "optimizer_steps": steps}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    learned = {"ess_share": 0.375, "grad_norm": 1.5, "clip_fraction": pytest.approx(0.15)}
    assert read_curve(run, 0) == {"updates": [0, 2, 3], "accuracy": [0.1, 0.6, 0.8], **learned}
    assert read_curve(run, 2) == {"updates": [0, 1], "accuracy": [0.6, 0.8], **learned}
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text().replace("ess_share", "other"))
    assert read_curve(run, 2)["ess_share"] is None
    whole = collect({"vcpo-4": [run]}, {"seeds": 1})
    assert whole["arms"]["vcpo-4"] == {"label": "VCPO, lag 4", "seeds": [read_curve(run, 4)]}


def test_the_tables_by_hand(monkeypatch):
    monkeypatch.setattr(program, "MIDWAY", 2)
    measured = measured_of({"grpo-4": [(0, 0.4, 0.8), (0, 0.2, 0.6)], "vcpo-4": [(0, 0.6, 0.8), (0, 0.6, 1.0)]})
    measured["arms"]["grpo-12"]["seeds"][0] |= {"updates": [0, 4, 6]}
    assert shared_updates(measured) == 6
    # To 4 updates a triangle, then a trapezoid to 6 updates: (4 * .2 + 2 * .5) / 6 = .3.
    mean, midway, last = accuracies(measured, "grpo-4").values()
    assert mean == pytest.approx([0.3, 0.1 / 3 * 2 + 0.1], abs=2e-3)
    assert midway == pytest.approx([0.2, 0.1]) and last == pytest.approx([0.6, 0.4])
    means, differences, seeds = (block.splitlines() for block in tables(measured).split("\n\n") if block[0] == "|")
    assert means[0] == ("| method | mean over 6 updates | after 2 updates | after 6 updates | ESS "
                        "| norm of the gradient | clipped |")
    middle, width, _ = interval(midway)
    assert means[3].startswith("| GRPO, lag 4 | 0.2") and f"| {middle:.3f} \u00b1 {width:.3f} | 0.500" in means[3]
    assert means[3].endswith("|  | 0.250 | 0.0100 |") and means[6].endswith("| 0.50 | 0.250 | 0.0100 |")
    difference, width, p = interval(accuracies(measured, "vcpo-4")["after 6 updates"] - last)
    assert differences[3].split(" | ")[-1] == f"{difference:+.3f} \u00b1 {width:.3f}, p = {p:.3f} |"
    assert seeds[3].split(" | ")[1:] == [f"{mean[0]:.3f}; 0.200; 0.600", f"{mean[1]:.3f}; 0.100; 0.400 |"]


def test_there_is_no_midway_where_no_run_has_as_many_updates():
    """np.interp would give the accuracy at the end again."""
    assert list(accuracies(measured_of({}), "grpo-4")) == ["mean over 8 updates", "after 8 updates"]


def test_the_figure_has_a_line_for_every_lag():
    measured = measured_of({"vcpo-0": [(0, 0.4, 0.8), (0, 0.2, 0.6)]})
    figure = plot_lags(measured, "The message")
    assert [axis.get_title("left") for axis in figure.axes] == ["GRPO", "VCPO"]
    assert figure.get_suptitle() == "The message"
    for axis in figure.axes:
        assert {text.get_text() for text in axis.texts} == {f"lag {lag}" for lag in LAGS}
        assert len(axis.lines) == 3 * (2 + 1)
    bold = next(line for line in figure.axes[1].lines if line.get_linewidth() == 2.5)
    assert np.interp(4, *bold.get_data()) == pytest.approx(30) and bold.get_data()[1][-1] == pytest.approx(70)
    plt.close(figure)


def test_every_arm_is_a_valid_command():
    experiment = Experiment("lag", 5, 120_000, program.FLAGS, ARMS)
    for arm in ARMS:
        args = parse_args(flags_of(experiment, arm, 3, Path("x")))
        assert (args.method, str(args.lag)) == tuple(arm.split("-")) and args.step_tokens == 2000 and args.seed == 3


def test_the_kept_numbers_can_be_drawn_again(tmp_path):
    kept = ROOT / "results" / "lag.json"
    (tmp_path / "lag.json").write_text(kept.read_text())
    program.main(["--redraw", "--results", str(tmp_path)])
    assert (tmp_path / "lag.png").read_bytes()[:4] == b"\x89PNG"
    measured = json.loads(kept.read_text())
    assert measured["settings"] == {"seeds": 5, "batches": 60, "flags": program.FLAGS}
    page = (ROOT / "results" / "lag.md").read_text()
    assert tables(measured).strip() in page


def test_nothing_can_be_drawn_without_numbers(tmp_path, capsys):
    with pytest.raises(SystemExit):
        program.main(["--redraw", "--results", str(tmp_path)])
    assert "--redraw: " in capsys.readouterr().err


@pytest.mark.slow
def test_a_short_measurement(tmp_path, monkeypatch):
    run_here(monkeypatch, Lock((3, 3), 0, (1, 1)))
    monkeypatch.setattr(program, "FLAGS", "--preset tiny --questions 1 --group-size 2 --max-new-tokens 32 "
                        "--eval-every 1 --eval-rows 4 --step-tokens 50")
    program.main(["--seeds", "1", "--batches", "1", "--out", str(tmp_path / "runs"), "--results", str(tmp_path / "r")])
    assert (tmp_path / "r" / "lag.png").exists() and "| VCPO, lag 12 |" in (tmp_path / "r" / "lag.md").read_text()
