"""Thinning keeps the forks of a share of the failures, drawn at random, and nothing else changes."""
import numpy as np
import pytest
from test_methods import shorten_the_task

import train_gsm8k
from deep_grpo import Config, Fork, Group, Trajectory
from loss import paper_weights
from trainer.settings import parse_args
from variants.thin import light_weights, thinned


def forked(policy, questions, groups, config, recoverability, rng):
    """In the place of line 2: a fork on every failure, and a draw of its own."""
    rng.random()
    return [Group(g.prompt, [Trajectory(t.response, t.reward, [] if t.reward else [Fork(i, 0.5)])
                             for i, t in enumerate(g.trajectories)]) for g in groups]


def groups(failures=(3, 0, 5, 1), G=6):
    return [Group([x], [Trajectory([x, i], float(i >= n)) for i in range(G)]) for x, n in enumerate(failures)]


@pytest.mark.parametrize("share", [0.125, 0.25, 0.5, 0.9])
def test_each_failure_is_kept_as_often_as_the_share_says(share):
    rng, counts, totals = np.random.default_rng(0), np.zeros((4, 6)), []
    for _ in range(4000):
        chosen = thinned(forked, share)(None, None, groups(), None, None, rng)
        kept = np.array([[bool(t.forks) for t in g.trajectories] for g in chosen])
        counts += kept
        totals.append(kept.sum())
        assert all(t.forks[0].pivot == i for g in chosen for i, t in enumerate(g.trajectories) if t.forks)
    failed = np.array([[t.reward == 0 for t in g.trajectories] for g in groups()])
    assert (counts[~failed] == 0).all()
    assert np.abs(counts[failed] / 4000 - share).max() < 4 * np.sqrt(share * (1 - share) / 4000)
    assert set(totals) <= {int(9 * share), int(9 * share) + 1} and np.mean(totals) == pytest.approx(9 * share, abs=0.05)


def test_a_share_of_one_is_the_paper_to_the_last_random_number():
    assert thinned(forked, 1) is forked


def test_the_branches_that_are_left_weigh_more():
    """T_fail are the failures that are branched: with one of two, its branches weigh twice as much."""
    def spans(n):
        forks = [[Fork(1, 0.5, [[7], [8]], [1.0, 0.0])] * (i < n) for i in range(2)]
        return paper_weights([Group([3], [Trajectory([4, 5], 0.0, fork) for fork in forks])], Config())

    assert spans(1)[1].w == 2 * spans(2)[1].w and spans(1)[0].w == spans(2)[0].w


def test_light_branches_weigh_what_they_weigh_without_thinning():
    """Two questions, one with two failures of three, one with none: Eq. (J) with |T_fail| = 2 by hand."""
    def groups(branched):
        forks = [[Fork(1, 0.5, [[7], [8, 9]], [1.0, 0.0])] * (i in branched) for i in range(3)]
        rollouts = [Trajectory([4, 5], float(i == 2), fork) for i, fork in enumerate(forks)]
        return [Group([3], rollouts), Group([3], [Trajectory([4], 1.0), Trajectory([5], 0.0)])]

    config = Config(lam=3.0, beta=0.5)
    both = light_weights(groups({0, 1}), config), paper_weights(groups({0, 1}), config)
    assert np.array(both[0]) == pytest.approx(np.array(both[1]))
    one = light_weights(groups({1}), config)
    branches, rollouts = one[2:4], [*one[:2], *one[4:]]
    assert [span.w for span in branches] == pytest.approx([3 / (2 * 2 * 2 * 1), 3 / (2 * 2 * 2 * 2)])
    assert [span.w for span in rollouts] == pytest.approx([1 / (2 * 3 * 2)] * 3 + [1 / (2 * 2)] * 2)
    assert [span.w_kl for span in one] == pytest.approx([0.5 * span.w for span in one])
    assert [span.A for span in one] == [span.A for span in paper_weights(groups({1}), config)]


def test_a_run_branches_a_share_and_asks_more_questions(tmp_path, monkeypatch):
    """At equal tokens per step: fewer pivots per failure, and more questions."""
    shorten_the_task(monkeypatch)
    found = {}
    for share in ("1", "0.25"):
        flags = ["--preset", "tiny", "--eval-every", "0", "--step-tokens", "2000", "--temperature", "2.5",
                 "--max-new-tokens", "24", "--questions", "2", "--branch-share", share, "--out", str(tmp_path / share)]
        run = train_gsm8k.prepare(parse_args(flags))
        steps = [train_gsm8k.train_step(run)[0]]
        failures = sum(round((1 - step["reward"]) * 8 * step["questions"]) for step in steps)
        found[share] = sum(step["pivots"] for step in steps) / failures, sum(step["questions"] for step in steps)
    assert found["1"][0] == 1 and 0.1 < found["0.25"][0] < 0.4
    assert found["0.25"][1] > 1.3 * found["1"][1]


@pytest.mark.parametrize("share", ["0", "-1", "1.1", "nan", "x"])
def test_an_impossible_share_is_refused(share, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_args(["--preset", "tiny", "--branch-share", share])
    assert "--branch-share" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["grpo", "dr_grpo", "vcpo", "spo_chain", "spo_tree"])
def test_methods_without_branches_or_that_need_all_of_them_are_not_thinned(method, capsys):
    """SPO needs the branches of every state, because they are how it knows the value of the state."""
    with pytest.raises(SystemExit, match="2"):
        parse_args(["--preset", "tiny", "--method", method, "--branch-share", "0.5"])
    assert f"--branch-share: has no part in --method {method}, only in deep_grpo, treerl" in capsys.readouterr().err
