"""`python deep_grpo.py` tells one step with numbers that agree with one another and with the equations."""
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

import tasks.lock
import trainer.settings
from loss import advantages_of
from tasks.lock import Lock

ROOT = Path(__file__).parents[2]


@pytest.mark.filterwarnings("error::UserWarning", "error::FutureWarning",          # a process would print them
                            "ignore::pytest.PytestUnraisableExceptionWarning")     # these are of earlier tests
def test_the_story_of_a_small_step(monkeypatch, capfd):
    """deep_grpo.py runs as a program in this process, with two short questions in place of six."""
    parse_args, make_rows = trainer.settings.parse_args, tasks.lock.make_rows
    small = ["--questions", "2", "--seed", "7"]                        # with correct rollouts and a recovered failure
    monkeypatch.setattr(trainer.settings, "parse_args", lambda argv: parse_args([*argv, *small]))
    monkeypatch.setattr(tasks.lock, "make_rows", lambda lock, n, seed: make_rows(Lock((6, 6)), min(n, 64), seed))
    monkeypatch.delitem(sys.modules, "experiments.one_step", raising=False)        # it is a program here, too
    transformers.logging.set_verbosity_warning()                       # as in a new process
    transformers.logging.enable_progress_bar()
    runpy.run_path(str(ROOT / "deep_grpo.py"), run_name="__main__")
    check_story(*capfd.readouterr())


@pytest.mark.slow
def test_the_story_of_one_step():
    told = subprocess.run([sys.executable, "deep_grpo.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    check_story(told.stdout, told.stderr)


def check_story(out, err):
    """The numbers of the story agree with one another and with the equations."""
    lines = out.splitlines()
    assert err == "" and 28 <= len(lines) <= 36 and max(map(len, lines)) <= 140
    rewards = [float(r) for r in re.search(r"rewards ([01 ]+)\.", out)[1].split()]
    states = [(float(r), float(q)) for r, q in re.findall(r"r = (\S+)   Q = (\S+)", out)]
    branches = [(float(r), float(a)) for r, a in re.findall(r"R = (\d)   A_local = (\S+)", out)]
    told = [float(a) for a in re.search(r"A_global = (.*)", out)[1].split()]
    after = [float(q) for q in re.search(r"would now be ([\d. ]+)\.\n", out)[1].split()]
    w, b = map(float, re.search(r"sigmoid\((\S+) r (\S+)\)", out).groups())

    assert len(rewards) == len(branches) == 8 and set(rewards) == {r for r, _ in branches} == {0.0, 1.0}
    assert told == pytest.approx(advantages_of(rewards), abs=5e-3)
    assert [a for _, a in branches] == pytest.approx(advantages_of([r for r, _ in branches]), abs=5e-3)
    n = len(states)
    assert [r for r, _ in states] == pytest.approx([(i + 1) / (n + 1) for i in range(n)], abs=6e-3)
    squares = [(i + 1) ** 2 for i in range(n)]                       # P = 1 before there are outcomes
    assert [q for _, q in states] == pytest.approx([s / sum(squares) for s in squares], abs=6e-4)
    p = [1 / (1 + 2.718281828 ** -(w * (i + 1) / (n + 1) + b)) for i in range(n)]
    total = sum(s * x for s, x in zip(squares, p))
    assert after == pytest.approx([s * x / total for s, x in zip(squares, p)], abs=3e-3)
    assert out.count("<- the pivot t* that was drawn") == 1
    cut, length = map(int, re.search(r"keep the first (\d+) of its (\d+) tokens", out).groups())
    assert 0 <= cut < length
