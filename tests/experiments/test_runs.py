"""Runs of an experiment: what is read from their directories, Student's t against its tables, bases, pages."""
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import tasks.lock
import train_gsm8k
from experiments import runs
from experiments.runs import (
    BEGIN,
    END,
    Experiment,
    accuracy_curve,
    holm,
    interval,
    make_base,
    make_task,
    read_run,
    seconds_of,
    t_tail,
    write_page,
)
from tasks.lock import Lock
from trainer.plot import read_metrics

ROOT = Path(__file__).parents[2]


class FinishedRun:
    """What start_run() gets here in place of a process: the training run has ended before it is returned."""

    def __init__(self, command, stdout, stderr, env):
        python, option, module, *flags = command
        assert (python, option, module) == (sys.executable, "-m", "train_gsm8k")
        assert Path(env["PYTHONPATH"]) == ROOT and env["OMP_NUM_THREADS"] == "1"
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            try:
                self.returncode = train_gsm8k.main(flags)
            except SystemExit as end:
                self.returncode = end.code

    def poll(self):
        return self.returncode

    wait = poll

    def kill(self):
        self.returncode = -9


def run_here(monkeypatch, lock=None):
    """Let training runs go on in this process, with few questions and an empty figure, and measure bases on few rows.

    A process would import torch anew. To draw and encode an epoch of questions and to draw the figure takes longer than
    a short run. lock: the difficulty of the questions; None leaves it to the run.
    """
    make_rows, probabilities = tasks.lock.make_rows, runs.turn_probabilities
    for module in (tasks.lock, runs):
        monkeypatch.setattr(module, "make_rows", lambda own, n, seed: make_rows(lock or own, min(n, 16), seed))
    monkeypatch.setattr(runs, "turn_probabilities", lambda *args, n: probabilities(*args, n=8))
    monkeypatch.setattr(runs, "subprocess", SimpleNamespace(Popen=FinishedRun))
    monkeypatch.setattr(train_gsm8k, "plot_run", lambda run_dir: (run_dir / "run.png").touch())


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


def test_p_values_corrected_by_hand():
    """The smallest times 3, the next one times 2 but not below it, and none above 1."""
    assert holm([0.04, 0.01, 0.6]) == pytest.approx([0.08, 0.03, 0.6])
    assert holm([0.02, 0.02, 0.01]) == pytest.approx([0.04, 0.04, 0.03])
    assert holm([0.02, 0.015, 0.6]) == pytest.approx([0.045, 0.045, 0.6]) and holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


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
    assert np.interp(200, *accuracy_curve(metrics)) == pytest.approx(0.4)
    assert [x.tolist() for x in accuracy_curve(metrics)] == [[0, 300, 400], [0.0, 0.6, 0.8]]
    assert seconds_of(metrics).tolist() == [2.0, 2.0, 2.0]
    got = read_run(run)
    assert (got["accuracy_half"], got["accuracy_end"]) == (pytest.approx(0.4), pytest.approx(0.8))
    assert got["accuracy_mean"] == pytest.approx((300 * 0.3 + 100 * 0.7) / 400, abs=5e-3)
    # The first of three updates: 6 rollouts, 2 branches, 100 tokens.
    assert got["correct_per_1000_tokens"] == pytest.approx(1000 * (0.25 * 6 + 0.5 * 2) / 100)
    assert got["tokens_to_first_correct"] == 100
    assert got["seconds"] == 6.0 and got["dead_groups"] == pytest.approx(0.5)          # without those of evaluation
    expected = {"questions": 6, "sequences": 48, "generated_tokens": 400, "forwarded_tokens": 3000,
                "trained_tokens": 30, "optimizer_steps": 3}
    assert {name: got[name] for name in expected} == expected
    assert json.loads(json.dumps(got)) == got


def test_the_first_correct_answer_may_be_a_branch_or_never_come(tmp_path):
    """No rollout is correct; branches, of which there are some from the second update on, are from the third on."""
    run = write_run(tmp_path / "run", (0.0, 0.0, 0.0))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for third, first in ((0.5, 400), (0.0, None)):
        for row, share in zip(rows[1:], (None, 0.0, third)):
            row |= {"reward": 0.0, "branch_reward": share}
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert read_run(run)["tokens_to_first_correct"] == first and read_run(run)["correct_per_1000_tokens"] == 0


def test_silenced_tokens_are_summed_and_0_without_stapo(tmp_path):
    run = write_run(tmp_path / "run", (0.0, 0.6, 0.8))
    assert read_run(run)["silenced_tokens"] == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row, silenced in zip(rows[1:], (3, 0, 2)):
        row["silenced_tokens"] = silenced
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_run(run)["silenced_tokens"] == 5


def test_early_is_the_first_quarter_of_the_updates(tmp_path):
    """One of three updates, two of eight. A step without a pivot has no value, and later ones do not take its place."""
    run = write_run(tmp_path / "run", (0.0, 0.6, 0.8))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert read_run(run)["early_dead_groups"] == 0.25 and read_run(run)["early_recovered"] is None
    rows += [rows[3] | {"step": step, "generated_total": 100 * step} for step in range(4, 9)]
    rows[1]["recovered"], rows[2]["recovered"], rows[3]["recovered"] = 0.2, None, 1.0
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_run(run)["early_dead_groups"] == pytest.approx((0.25 + 0.5) / 2)
    assert read_run(run)["early_recovered"] == 0.2


def test_a_base_policy_is_made_once_and_of_one_lock_only(tmp_path, monkeypatch):
    probabilities = runs.turn_probabilities
    monkeypatch.setattr(runs, "turn_probabilities", lambda *args, n: probabilities(*args, n=8))    # 1,024 take seconds
    lock, folder = Lock((2, 2), 1, (1, 1), 0.9), tmp_path / "cell" / "base"
    base = make_base(lock, folder, steps=2)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert (base["easy"], base["hard"]) == pytest.approx(probabilities(model, tokenizer, lock, n=8))
    for name, n, seed in (("train", 4096, 1), ("eval", 128, 0)):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        assert rows == tasks.lock.make_rows(lock, n, seed)
    monkeypatch.setattr(runs, "pretrain", None)                        # it is there: not made again
    assert make_base(lock, folder, steps=2) == base
    for other in ((lock, folder, 3), (Lock((2, 2), 1, (1, 1), 0.8), folder, 2)):
        with pytest.raises(SystemExit, match="holds the base policy of another lock or number of steps: delete .*cell"):
            make_base(*other)


def test_questions_of_a_mixture_differ_by_turns(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "make_base", lambda lock, folder: folder.mkdir())
    lock = Lock((4, 5), 3, (1, 4), 0.1)
    flags = make_task(Experiment("", 1, 9, "", {}, lock, hard=(1, 3)), tmp_path / "base").split()
    for name, n, seed in (("train", 4096, 1), ("eval", 128, 0)):
        path = tmp_path / "base" / f"mixed-{name}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert str(path) in flags and len(rows) == n
        assert [row["question"].count(tasks.lock.HARD) for row in rows] == [1, 3] * (n // 2)
        assert rows[1] == tasks.lock.make_rows(lock, n // 2, seed)[0]
    assert flags[:2] == ["--model", str(tmp_path / "base")]


def asleep(folder, *_):
    """A run that prints nothing and does not end by itself."""
    runs.log_of(folder).touch()
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])


@pytest.mark.parametrize("how", [KeyboardInterrupt, "SIGTERM"])
def test_no_run_goes_on_when_the_program_has_ended(how, tmp_path, monkeypatch):
    """Otherwise the next start would find its directories locked."""
    started = []

    def start(*arguments):
        started.append(asleep(*arguments))
        return started[-1]

    def end(_):
        if how == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            raise how

    monkeypatch.setattr(runs, "start_run", start)
    monkeypatch.setattr(runs.time, "sleep", end)
    before = signal.getsignal(signal.SIGTERM)
    arms = {name: runs.Arm("", "") for name in "ab"}
    with pytest.raises(SystemExit if how == "SIGTERM" else how):
        runs.run_all(Experiment("", 1, 9, "--preset tiny", arms), tmp_path)
    assert len(started) == 2 and all(process.poll() is not None for process in started)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_that_was_killed_before_it_printed_is_named(tmp_path, monkeypatch):
    def killed(folder, *_):
        process = asleep(folder)
        process.kill()
        process.wait()
        return process

    monkeypatch.setattr(runs, "start_run", killed)
    with pytest.raises(SystemExit, match=r"a-0 failed, its last line: \(it printed nothing\)"):
        runs.run_all(Experiment("", 1, 9, "--preset tiny", {"a": runs.Arm("", "")}), tmp_path)


def test_every_run_has_a_log_of_its_own():
    assert runs.log_of(Path("out/grpo-1.6e-4-100")) == Path("out/grpo-1.6e-4-100.log")


def test_the_task_of_an_experiment_is_made_only_where_it_has_a_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "make_base", lambda lock, folder: folder.mkdir())
    experiment = Experiment("", 1, 9, "", {})
    assert make_task(experiment, tmp_path / "base") == "" and not (tmp_path / "base").exists()
    flags = make_task(experiment._replace(lock=Lock((4, 5), 3, (1, 4), 0.1)), tmp_path / "base").split()
    assert str(tmp_path / "base" / "train.jsonl") in flags and not list((tmp_path / "base").iterdir())


def test_a_page_keeps_what_people_wrote(tmp_path):
    page = tmp_path / "results" / "name.md"
    write_page(page, "A title", "name.png", "| 1 |\n")
    assert page.read_text() == f"# A title\n\n![A title](name.png)\n\n{BEGIN}\n| 1 |\n{END}\n"
    page.write_text(f"# By hand\n\nBefore.\n\n{BEGIN}\n| 1 |\n{END}\n\nAfter.\n")
    for text in ("| 2 |\n\n| 3 |", "| 4 |"):
        write_page(page, "A title", "name.png", text)
        assert page.read_text() == f"# By hand\n\nBefore.\n\n{BEGIN}\n{text}\n{END}\n\nAfter.\n"
    page.write_text("# By hand\n\nNo markers.\n")
    write_page(page, "A title", "name.png", "| 5 |")
    assert page.read_text() == f"# By hand\n\nNo markers.\n\n{BEGIN}\n| 5 |\n{END}\n"
    for broken in (f"{BEGIN} text", f"{END} text {BEGIN}", f"{BEGIN} {END} {BEGIN} {END}", END, f"{END} {BEGIN} {END}"):
        page.write_text(broken)
        with pytest.raises(ValueError, match="once each and in this order, or neither"):
            write_page(page, "A title", "name.png", "| 6 |")
        assert page.read_text() == broken


def test_correct_answers_are_those_of_the_first_third_of_the_updates(tmp_path):
    run = write_run(tmp_path / "run", (0.0, 0.6, 0.8))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows += [rows[3] | {"step": step, "generated_total": 100 * step} for step in (4, 5)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # Two of five updates: 6 rollouts and 2 branches in 100 tokens, 12 rollouts in 200.
    assert read_run(run)["correct_per_1000_tokens"] == pytest.approx(
        1000 * (0.25 * 6 + 0.5 * 2 + 0.5 * 12) / 300, rel=1e-12)


def test_the_mean_accuracy_is_an_area(tmp_path):
    assert read_run(write_run(tmp_path / "run", (0.0, 0.6, 0.8)))["accuracy_mean"] == pytest.approx(0.4, rel=1e-9)
