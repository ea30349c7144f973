"""The trial on GSM8K in small: four arms, their tokens, what is kept, and the table by hand."""
import json

import numpy as np
import pytest
from test_runs import run_here

from experiments import gsm8k_trial
from experiments.gsm8k_trial import ARMS, KEPT, row_of
from tasks.lock import ASSETS, Lock, make_rows

SMALL = ["--steps", "2", "--model", str(ASSETS / "tiny"), "--questions", "2", "--group-size", "4",
         "--max-new-tokens", "20", "--temperature", "1.8", "--micro-batch-tokens", "400", "--eval-rows", "4"]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows(Lock((3, 3), 1, (1, 1)), 64, 0)))
    return ["--data", str(path), "--eval-data", str(path)]


def test_four_arms_in_small(tmp_path, data, monkeypatch, capsys):
    """Each is a run of the authors' objective. Two of them generate the tokens of the first, with more questions."""
    run_here(monkeypatch)
    out, results = tmp_path / "runs", tmp_path / "results"
    flags = ["--out", str(out), "--results", str(results), *SMALL, *data]
    gsm8k_trial.main(flags)
    logs = {arm: (results / "trial" / f"{arm}-0" / "metrics.jsonl").read_text().splitlines() for arm in ARMS}
    rows = {arm: [json.loads(line) for line in log] for arm, log in logs.items()}
    settings = {arm: json.loads((out / f"{arm}-0" / "config.json").read_text())["settings"] for arm in ARMS}
    for arm in ARMS:
        assert {path.name for path in (results / "trial" / f"{arm}-0").iterdir()} == set(KEPT)
        assert [row["step"] for row in rows[arm]] == [0, 1, 2] and [row["step"] for row in rows[arm]
                                                                   if "eval_accuracy" in row] == [0, 2]
        assert settings[arm]["objective"] == "authors" and settings[arm]["answer"] == "boxed"
        assert settings[arm]["lr"] == 1e-6 and settings[arm]["beta"] == settings["deep"]["beta"]
    tokens = {arm: [row["generated_tokens"] for row in rows[arm][1:]] for arm in ARMS}
    mean = round(np.mean(tokens["deep"]))
    assert [settings[arm]["step_tokens"] for arm in ARMS] == [None, None, mean, mean]
    assert sum(tokens["more"]) >= 2 * mean > sum(tokens["grpo"])
    assert sum(row["questions"] for row in rows["more"][1:]) > 4 == sum(row["questions"] for row in rows["grpo"][1:])
    assert [settings[arm]["branch_share"] for arm in ARMS] == [1, 1, 1, 0.5]
    text = (results / "trial.md").read_text()
    for arm in ARMS.values():
        assert f"| {arm.label}, seed 0 | 0.0 | **0.0** ± 0.0 |" in text
    assert "![" not in text
    # Runs that are finished are kept, and one that is missing is made.
    times = {arm: (out / f"{arm}-0" / "metrics.jsonl").stat().st_mtime_ns for arm in ARMS}
    (out / "grpo-0" / "run.png").unlink()
    gsm8k_trial.main([*flags, "--arms", "deep,grpo,more"])
    printed = capsys.readouterr().out
    assert "grpo-0: GRPO, the same" in printed and "| GRPO, as many tokens, seed 0" in printed
    assert (out / "deep-0" / "metrics.jsonl").stat().st_mtime_ns == times["deep"]


def test_a_row_by_hand(tmp_path):
    rows = [{"step": 0, "eval_accuracy": 0.25}] + [
        {"step": step, "reward": step / 10, "dead_groups": 0.5, "dead_branch_groups": 0.8, "recovered": 0.2,
         "questions": 64, "generated_tokens": 1000 * step} for step in range(1, 8)]
    rows[-1]["eval_accuracy"], rows[3]["recovered"], rows[3]["dead_branch_groups"] = 0.36, None, None
    times = [{"step": step, "seconds_rollout": step, "seconds_resample": 2.0, "seconds_update": 3.0,
              "peak_memory_gb": 40 + step} for step in range(1, 8)]
    for name, lines in (("metrics", rows), ("timing", times)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "config.json").write_text('{"settings": {"eval_rows": 400}, "evaluation_questions": 100}')
    # sqrt(36 * 64 / 100) = 4.8; rewards of steps 1 to 5 and 3 to 7
    assert row_of(tmp_path) == ["25.0", "**36.0** ± 4.8", "0.300", "0.500", "0.500", "0.800", "0.200", "64", "4,000",
                                "4.0", "2.0", "3.0", "47"]


def test_arms_that_need_the_first_one_are_named(tmp_path, capsys):
    for flags, message in ((["--arms", "ppo"], "--arms: ppo: choose from deep, grpo"),
                           (["--arms", "more,deep"], "which must be the first arm"),
                           (["--seed", "3"], "--seed: every arm has its own"),
                           (["--method=grpo"], "--method: every arm has its own")):
        with pytest.raises(SystemExit):
            gsm8k_trial.main([*flags, "--out", str(tmp_path)])
        assert message in capsys.readouterr().err


def test_a_run_that_fails_or_ends_early_is_named(tmp_path, data, monkeypatch):
    run_here(monkeypatch)
    flags = ["--out", str(tmp_path / "runs"), "--results", str(tmp_path)]
    with pytest.raises(SystemExit, match="deep-0 is not finished, its last line: error: "):
        gsm8k_trial.main([*flags, *data, "--model", str(tmp_path)])
    with pytest.raises(SystemExit, match="deep-0 is not finished, its last line: "):
        gsm8k_trial.main([*flags, *SMALL, *data, "--max-hours", "1e-9"])
    with pytest.raises(SystemExit, match="deep-0 holds a run with steps = 2, here it is 3: delete it"):
        gsm8k_trial.main([*flags, *SMALL, *data, "--max-hours", "1e-9", "--steps", "3"])
