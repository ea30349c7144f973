"""`python deep_grpo.py` tells one step with numbers that agree with one another and with the equations."""
import re
import subprocess
import sys
from pathlib import Path

import pytest

from loss import advantages_of

ROOT = Path(__file__).parents[2]


def test_the_story_of_one_step():
    out = subprocess.run([sys.executable, "deep_grpo.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = out.stdout.splitlines()
    assert out.stderr == "" and 28 <= len(lines) <= 36 and max(map(len, lines)) <= 140
    rewards = [float(r) for r in re.search(r"rewards ([01 ]+)\.", out.stdout)[1].split()]
    states = [(float(r), float(q)) for r, q in re.findall(r"r = (\S+)   Q = (\S+)", out.stdout)]
    branches = [(float(r), float(a)) for r, a in re.findall(r"R = (\d)   A_local = (\S+)", out.stdout)]
    told = [float(a) for a in re.search(r"A_global = (.*)", out.stdout)[1].split()]
    after = [float(q) for q in re.search(r"would now be ([\d. ]+)\.\n", out.stdout)[1].split()]
    w, b = map(float, re.search(r"sigmoid\((\S+) r (\S+)\)", out.stdout).groups())

    assert len(rewards) == len(branches) == 8 and set(rewards) <= {0.0, 1.0}
    assert told == pytest.approx(advantages_of(rewards), abs=5e-3)
    assert [a for _, a in branches] == pytest.approx(advantages_of([r for r, _ in branches]), abs=5e-3)
    n = len(states)
    assert [r for r, _ in states] == pytest.approx([(i + 1) / (n + 1) for i in range(n)], abs=6e-3)
    squares = [(i + 1) ** 2 for i in range(n)]                       # P = 1 before there are outcomes
    assert [q for _, q in states] == pytest.approx([s / sum(squares) for s in squares], abs=6e-4)
    p = [1 / (1 + 2.718281828 ** -(w * (i + 1) / (n + 1) + b)) for i in range(n)]
    total = sum(s * x for s, x in zip(squares, p))
    assert after == pytest.approx([s * x / total for s, x in zip(squares, p)], abs=3e-3)
    assert out.stdout.count("<- the pivot t* that was drawn") == 1
    cut, length = map(int, re.search(r"keep the first (\d+) of its (\d+) tokens", out.stdout).groups())
    assert 0 <= cut < length
