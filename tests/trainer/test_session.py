"""A run: when it is finished, what its configuration holds, and which texts it keeps."""
import argparse
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest

from deep_grpo import Config, Fork, Group, Trajectory
from tasks import Question, digests
from trainer import session
from trainer.session import (
    Run,
    check_empty,
    check_questions,
    ended_by,
    owned,
    pivot_lines,
    read_config,
    sample_lines,
    stop_after_this_step,
    write_config,
)
from trainer.settings import parse_args


def make_run(**known):
    """A Run of which only these parts are there."""
    empty = {f.name: None for f in fields(Run) if f.default.__class__.__name__ == "_MISSING_TYPE"}
    return Run(**(empty | known))


@pytest.mark.parametrize("steps, budget_tokens, step, generated, finished", [
    (5, None, 4, 10**9, False), (5, None, 5, 0, True), (5, 100, 4, 99, False), (5, 100, 4, 100, True)])
def test_a_run_is_finished_after_its_steps_or_its_tokens(steps, budget_tokens, step, generated, finished):
    args = argparse.Namespace(steps=steps, budget_tokens=budget_tokens)
    assert make_run(args=args, step=step, generated_total=generated).finished == finished


def test_the_configuration_holds_every_setting_and_what_the_numbers_depend_on(tmp_path, capsys):
    args = parse_args(["--preset", "tiny", "--gamma", "3", "--max-hours", "2", "--out", str(tmp_path)])
    model = SimpleNamespace(parameters=lambda: [SimpleNamespace(numel=lambda: 7)] * 3)
    asked = [Question("a", "1", [3]), Question("b", "2", [4])], [Question("c", "3", [5])]
    write_config(make_run(args=args, policy=SimpleNamespace(model=model), questions=asked[0], eval_questions=asked[1],
                          val_questions=[], skipped=4, date="2024-02-29", start={}))
    saved = json.loads((tmp_path / "config.json").read_text())
    numbers = {"training_questions": 2, "evaluation_questions": 1, "validation_questions": 0, "skipped_questions": 4,
               "parameters": 21, "device": "cpu", "ranks": 1, "date": "2024-02-29",
               "digests": {"training": digests(asked[0]), "evaluation": digests(asked[1]), "validation": digests([])}}
    assert {name: saved[name] for name in numbers} == numbers
    assert saved["versions"].keys() == {"python", "torch", "transformers", "numpy"} and "git_revision" in saved
    expected = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    for name in ("resume", "max_hours", "dry_run", "gpus"):      # a resumed run does not take these over
        del expected[name]
    assert saved["settings"] == expected and expected["gamma"] == 3.0
    assert {f.name for f in fields(Config)} <= expected.keys()
    out = capsys.readouterr().out
    assert "gamma=3.0" in out and "the chat template asks for the date: it is 2024-02-29 in all prompts" in out
    assert read_config(tmp_path) == saved


def test_a_run_that_goes_on_must_have_the_questions_and_prompts_it_began_with(tmp_path):
    asked = [[Question("a", "1", [3]), Question("b", "2", [4])], [Question("c", "3", [5])], []]
    before = {f"{name}_questions": len(part) for name, part in zip(session.LISTS, asked)}
    before["digests"] = {name: digests(part) for name, part in zip(session.LISTS, asked)}
    check_questions(tmp_path, before, asked)
    check_questions(tmp_path, {}, asked)                         # of a new run
    for i, name in enumerate(session.LISTS):
        longer = [part + [Question("d", "4", [6])] * (i == j) for j, part in enumerate(asked)]
        n = len(asked[i])
        with pytest.raises(ValueError, match=rf"began with other {name} questions \({n} then, {n + 1} now\)"):
            check_questions(tmp_path, before, longer)
    other = [[q._replace(prompt=[9]) for q in part] for part in asked]
    with pytest.raises(ValueError, match="other prompts of the same training questions: put the tokenizer"):
        check_questions(tmp_path, before, other)


# ---- the run directory ----

def test_a_new_run_needs_an_empty_folder(tmp_path):
    out = tmp_path / "run"
    check_empty(out)
    out.mkdir()
    check_empty(out)
    for left_by_a_killed_process in (".lock", "config.json.partial"):
        (out / left_by_a_killed_process).touch()
    check_empty(out)
    (out / "notes.txt").touch()
    with pytest.raises(ValueError, match="run is not empty: choose another --out"):
        check_empty(out)
    (out / "config.json").touch()
    with pytest.raises(ValueError, match=f"already holds a run: choose another --out, or --resume {out}"):
        check_empty(out)
    with pytest.raises(ValueError, match="notes.txt is a file"):
        check_empty(out / "notes.txt")


def test_a_folder_belongs_to_one_process_until_it_ends_or_is_killed(tmp_path):
    """Another process holds the folder, and is killed in the middle of it."""
    (tmp_path / "run").mkdir()
    program = ("import fcntl, sys, time; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX)\n"
               "print('mine', flush=True); time.sleep(600)")
    with subprocess.Popen([sys.executable, "-c", program, tmp_path / "run" / session.LOCK], stdout=subprocess.PIPE,
                          text=True) as other:
        try:
            assert other.stdout.readline() == "mine\n"
            with pytest.raises(ValueError, match="another process writes into .*run: wait for its end"):
                with owned(tmp_path / "run"):
                    pass
        finally:
            other.kill()
    with owned(tmp_path / "run"):
        with pytest.raises(ValueError, match="another process"), owned(tmp_path / "run"):
            pass
        with owned(tmp_path / "other"):
            pass
    with owned(tmp_path / "run"):
        pass


def test_a_disk_without_locks_is_named(tmp_path, monkeypatch, capsys):
    def no_locks(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(session.fcntl, "flock", no_locks)
    with owned(tmp_path):
        assert "cannot be locked" in capsys.readouterr().out


def test_samples_are_the_first_right_and_the_first_failed_rollout_with_a_line_for_each_fork():
    question = SimpleNamespace(text="1 + 1?", gold="2")
    first_failure = Trajectory([1, 2, 3], 0.0, [Fork(2, 0.6, [[4], [5, 6]], [1.0, 0.0]), Fork(0, 0.2, [[7]], [0.0])])
    mixed = Group([9], [first_failure, Trajectory([1], 1.0), Trajectory([2], 1.0), Trajectory([3], 0.0)])
    grpo = Group([9], [Trajectory([8], 0.0, [Fork(0, 0.5)])])            # a fork from which nothing was drawn
    run = make_run(step=7, policy=SimpleNamespace(text=lambda ids: " ".join(map(str, ids))))
    lines = list(sample_lines(run, [question, question], [mixed, grpo]))
    assert all(line["step"] == 7 and line["question"] == "1 + 1?" and line["gold"] == "2" for line in lines)
    names = ("response", "reward", "pivot", "prefix", "branches")
    assert [tuple(line[name] for name in names) for line in lines] == [
        ("1", 1.0, None, None, []),
        ("1 2 3", 0.0, 2, "1 2", [{"text": "4", "reward": 1.0}, {"text": "5 6", "reward": 0.0}]),
        ("1 2 3", 0.0, 0, "", [{"text": "7", "reward": 0.0}]),
        ("8", 0.0, None, None, [])]


def test_a_reward_between_0_and_1_is_a_success_in_samples_and_pivots():
    half = Trajectory([1], 0.5)
    group = Group([9], [half, Trajectory([2, 3], 0.0, [Fork(1, 0.6, [[4], [5]], [0.3, 0.0])]), Trajectory([6], 0.0)])
    run = make_run(step=7, policy=SimpleNamespace(text=lambda ids: " ".join(map(str, ids))))
    lines = list(sample_lines(run, [SimpleNamespace(text="1 + 1?", gold="2")], [group]))
    assert [(line["response"], line["reward"]) for line in lines] == [("1", 0.5), ("2 3", 0.0)]
    assert list(session.pivot_lines(7, [group])) == ["7,2,1,0.6000,1,2,0.3333\n"]


def test_a_reward_of_ones_own_is_told_by_the_file_that_holds_it(tmp_path):
    """The same name may hold another rule tomorrow."""
    assert session.name_of(session.Policy.reward) == "trainer.policy.Policy.reward"
    names = []
    for text in ("reward = lambda: 0.3", "reward = lambda: 0.6", "reward = lambda: 0.3"):
        (tmp_path / "mine.py").write_text(text)
        found = {"__name__": "__main__"}
        exec(compile(text, tmp_path / "mine.py", "exec"), found)
        names.append(session.name_of(found["reward"]))
    assert names[0] == names[2] != names[1] and names[0].startswith("__main__.<lambda> in mine.py, checksum ")
    typed = {"__name__": "__main__"}
    exec("reward = lambda: 0.3", typed)
    assert session.name_of(typed["reward"]) == "__main__.<lambda>"


def test_changed_code_is_dirty_and_a_run_that_goes_on_with_other_code_says_so(monkeypatch, tmp_path, capsys):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True,
                       capture_output=True)

    monkeypatch.setattr(session, "ROOT", tmp_path)
    git("init")
    (tmp_path / "code.py").write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    clean = session.git_revision()
    session.check_start(tmp_path, {"start": {}, "git_revision": clean}, {})
    assert re.fullmatch("[0-9a-f]{40}", clean) and not capsys.readouterr().out
    (tmp_path / "code.py").write_text("2")
    assert session.git_revision() == f"{clean}-dirty"
    session.check_start(tmp_path, {"start": {}, "git_revision": clean}, {})
    assert f"began with the code of {clean}, and this is {clean}-dirty" in capsys.readouterr().out
    session.check_start(tmp_path, {}, {})                                # a new run
    assert not capsys.readouterr().out


def test_a_machine_without_git_has_no_revision(monkeypatch, tmp_path):
    assert re.fullmatch("[0-9a-f]{40}(-dirty)?", session.git_revision() or "0" * 40)
    monkeypatch.setattr(session, "ROOT", tmp_path)       # no repository
    assert session.git_revision() is None
    monkeypatch.setenv("PATH", str(tmp_path))            # no git
    assert session.git_revision() is None


@pytest.mark.parametrize("max_hours, received, why", [
    (None, [], None), (None, ["SIGTERM"], "SIGTERM"), (1.0, [], None), (0.5, [], "--max-hours 0.5"),
    (0.5, ["SIGINT", "SIGTERM"], "SIGINT")])
def test_a_run_ends_by_a_signal_or_before_its_hours_are_over(max_hours, received, why, monkeypatch):
    monkeypatch.setattr(time, "perf_counter", lambda: 100.0 + 1700)      # 1,700 s so far, 200 s the longest step
    assert ended_by(argparse.Namespace(max_hours=max_hours), received, 100.0, 200.0) == why


def test_the_first_signal_is_noted_and_the_second_ends_the_process(capsys, tmp_path, monkeypatch):
    """Any more within a second of the first are the same one. The process would end where SIG_DFL is raised."""
    before, ended, now = signal.getsignal(signal.SIGUSR1), [], 100.0
    (tmp_path / "checkpoints" / "step_4").mkdir(parents=True)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    try:
        received = stop_after_this_step(make_run(args=argparse.Namespace(out=tmp_path), step=7), (signal.SIGUSR1,))
        assert received == []
        signal.raise_signal(signal.SIGUSR1)
        assert received == ["SIGUSR1"]
        assert "SIGUSR1: ending after this step; once more to end at once" in capsys.readouterr().err
        now = 101.0
        signal.raise_signal(signal.SIGUSR1)
        assert received == ["SIGUSR1"] and capsys.readouterr().err == ""
        note, now = signal.getsignal(signal.SIGUSR1), 101.1
        monkeypatch.setattr(signal, "raise_signal", lambda number: ended.append(signal.getsignal(number)))
        note(signal.SIGUSR1, None)
        assert ended == [signal.SIG_DFL]
        assert "without saving; 3 finished steps are lost, --resume goes on after step 4" in capsys.readouterr().err
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert session.ROOT == Path(__file__).parents[2]             # where the git revision is read


def test_the_rate_of_a_question_is_that_of_its_rollouts():
    fork = Fork(1, 0.5, [[4], [5]], [1.0, 0.0])
    group = Group([3], [Trajectory([6, 7], 0.0, [fork]), Trajectory([6], 1.0)])
    assert list(pivot_lines(7, [group])) == ["7,2,1,0.5000,1,2,0.5000\n"]        # the rate is that of the rollouts
