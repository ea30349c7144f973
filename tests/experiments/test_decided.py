"""D(r): the identity behind it by enumeration, and its estimate from run directories that were written by hand."""
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from experiments.decided import KEPT, decided, first_quarter, main, measured_of, shares_of, tables

RESULTS = Path(__file__).parents[2] / "results"


@pytest.mark.parametrize("depth", range(6))
def test_a_branch_of_a_failure_is_correct_with_probability_v_times_1_minus_d(depth):
    """All rollouts of five random binary decisions; a leaf is correct or not, and a state's V is exact."""
    rng, turns = np.random.default_rng(0), 5
    split = {(): Fraction(1)}                        # state -> the probability that a rollout comes through it
    for length in range(turns):
        for state in [s for s in split if len(s) == length]:
            left = Fraction(int(rng.integers(1, 10)), 10)
            split |= {(*state, 0): split[state] * left, (*state, 1): split[state] * (1 - left)}
    leaves = {s: int(rng.random() < 0.4) for s in split if len(s) == turns}
    V = {s: sum(split[y] * R for y, R in leaves.items() if y[:len(s)] == s) / split[s] for s in split}
    V_x, states = V[()], [s for s in split if len(s) == depth]
    D = sum(split[s] * (V[s] - V_x) ** 2 for s in states) / (V_x * (1 - V_x))
    assert 0 < V_x < 1 and (depth > 0) == (D > 0)
    # A rollout fails, and a branch is drawn from its state at this depth.
    failed = {y: p for y, p in split.items() if len(y) == turns and not leaves[y]}
    assert sum(p * V[y[:depth]] for y, p in failed.items()) / sum(failed.values()) == V_x * (1 - D)


def write_run(folder, pivots, lengths, method="deep_grpo", G=2):
    """A run directory. pivots: lines of pivots.csv. lengths: (response_length, branch_length) of each step."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"settings": {"method": method, "group_size": G}}))
    header = "step,response_tokens,pivot,depth,right_branches,branches,question_rate"
    (folder / "pivots.csv").write_text("\n".join([header, *pivots]) + "\n")
    rows = [{"step": step, "w": 0.0, "b": 0.0, "response_length": r, "branch_length": b}
            for step, (r, b) in enumerate(lengths, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "timing.jsonl").write_text("")
    return folder


# One question with V = 1/2, two rollouts, all four outcomes once: four failures, two of them with a correct other. In
# this lock the outcome is decided at half of the tokens: before it half of the branches are correct, after it none.
LOCK = ["1,100,25,0.2,1,2,0", "1,100,75,0.7,0,2,0", "1,100,25,0.2,1,2,0.5", "1,100,75,0.7,0,2,0.5"]


def test_d_is_0_before_the_outcome_is_decided_and_1_after_it(tmp_path):
    early, late, whole = decided([shares_of(write_run(tmp_path / "run", LOCK, [(100, 50)]))])
    assert (early["low"], late["low"], whole["low"], whole["high"]) == (0.2, 0.6, 0, 1)
    assert (early["D"], late["D"], whole["D"]) == (0, 1, 0.5)
    # A branch costs 3/4 of a rollout before, and 1/4 after it; 1/2 in the mean.
    assert [row["cost"] for row in (early, late, whole)] == [0.75, 0.25, 0.5]
    assert early["per_token"] == pytest.approx(4 / 3) and (late["per_token"], whole["per_token"]) == (0, 1)
    assert [row["pivots"] for row in (early, late, whole)] == [2, 2, 4]
    assert (whole["recovered"], whole["answered"]) == (0.5, 0.5)


def test_the_tokens_that_branches_really_had_are_their_cost(tmp_path):
    """Here branches are twice as long as what they replace, in a run whose rollouts have 80 tokens in the mean."""
    shares = shares_of(write_run(tmp_path / "run", LOCK, [(80, 100)]))
    assert shares["cost"].tolist() == pytest.approx([150 / 80, 50 / 80, 150 / 80, 50 / 80])


def test_several_runs_are_one_source_and_the_interval_comes_from_their_steps(tmp_path):
    """In the second run no branch is correct. D over both is the mean, and a resample may have either run twice."""
    none = [line.replace(",1,2,", ",0,2,") for line in LOCK]
    runs = [shares_of(write_run(tmp_path / name, lines, [(100, 50)])) for name, lines in (("a", LOCK), ("b", none))]
    early = decided(runs)[0]
    assert early["D"] == 0.5 and early["D_interval"] == [0, 1]
    assert early["per_token_interval"] == pytest.approx([0, 4 / 3])


def test_a_depth_without_a_correct_rollout_has_no_row(tmp_path):
    rows = decided([shares_of(write_run(tmp_path / "run", [*LOCK, "1,100,95,0.9,0,2,0"], [(100, 50)]))])
    assert [row["low"] for row in rows] == [0.2, 0.6, 0]


def test_the_first_quarter_of_the_steps_has_a_row_of_its_own(tmp_path):
    """In the first of four steps no branch is correct."""
    none = [line.replace(",1,2,", ",0,2,") for line in LOCK]
    later = [f"{step}{line[1:]}" for step in (2, 3, 4) for line in LOCK]
    run = shares_of(write_run(tmp_path / "run", none + later, [(100, 50)] * 4))
    assert decided([first_quarter(run)])[-1]["D"] == 1 and decided([run])[-1]["D"] == pytest.approx(1 - 0.375 / 0.5 / 2)


def test_a_method_that_branches_other_rollouts_is_refused(tmp_path):
    with pytest.raises(ValueError, match="treerl"):
        shares_of(write_run(tmp_path / "run", LOCK, [(100, 50)], method="treerl"))


def test_the_page_and_the_figure_are_written_and_a_lock_without_runs_keeps_its_numbers(tmp_path, capsys):
    runs = tmp_path / "runs"
    (runs / "late-error-rare").mkdir(parents=True)
    write_run(runs / "late-error-rare" / "s100-0", LOCK, [(100, 50)])
    main(["--out", str(runs), "--results", str(tmp_path)])
    kept = json.loads((tmp_path / "decided.json").read_text())
    assert list(kept) == ["GSM8K", "late error, rare", "late error, both"]
    assert (tmp_path / "decided.png").stat().st_size > 10_000
    main(["--out", str(tmp_path / "none"), "--results", str(tmp_path)])
    assert json.loads((tmp_path / "decided.json").read_text()) == kept
    assert "| late error, rare | 4 | 0.50 | 0.50 | 25.0 % | 50.0 % |" in (tmp_path / "decided.md").read_text()


def test_the_tables_of_a_run_of_ones_own_are_printed_and_nothing_is_written(tmp_path, capsys):
    run = write_run(tmp_path / "run", LOCK, [(100, 50)])
    before = sorted(tmp_path.rglob("*"))
    main(["--run", str(run), "--results", str(tmp_path)])
    out = capsys.readouterr().out
    assert f"| {run} | 4 | 0.50 | 0.50 | 25.0 % | 50.0 % |" in out and "of fewer than 5 steps they mean nothing" in out
    assert sorted(tmp_path.rglob("*")) == before
    dead = [line for line in LOCK if line.endswith(",0")]                # of a question without a correct rollout
    grpo, hopeless = (write_run(tmp_path / name, lines, [(9, 5)]) for name, lines in (("grpo", []), ("dead", dead)))
    for bad in (tmp_path, grpo, hopeless):
        with pytest.raises(SystemExit):
            main(["--run", str(bad)])
        line, = capsys.readouterr().err.splitlines()
        assert line.startswith("error: argument --run: ") and "cannot be measured" in line


def test_a_first_quarter_without_a_correct_rollout_is_left_open(tmp_path, capsys):
    lines = [line for line in LOCK if line.endswith(",0")] + [f"5{line[1:]}" for line in LOCK]
    main(["--run", str(write_run(tmp_path / "run", lines, [(100, 50)] * 5))])
    assert capsys.readouterr().out.splitlines()[2].endswith(" | - |")


def test_the_page_has_the_kept_numbers_and_those_of_gsm8k_can_be_made_again():
    kept = json.loads((RESULTS / "decided.json").read_text())
    assert tables(kept) in (RESULTS / "decided.md").read_text()
    again = measured_of([shares_of(KEPT)])
    for row, before in zip([*again["depths"], again["early"]], [*kept["GSM8K"]["depths"], kept["GSM8K"]["early"]]):
        assert row.keys() == before.keys()
        for name, value in row.items():
            assert value == pytest.approx(before[name], rel=1e-9)
