"""The metrics of rollouts and branches, by hand."""
import pytest

from deep_grpo import Fork, Group, Trajectory
from resample import Continuation
from trainer.metrics import summarize

EOS = 1


def test_summary_by_hand():
    known = Continuation([5, 6, 7, 8], [-1.0] * 4, [1.0, 2.0, 3.0, 4.0])
    failed = Trajectory(known, 0.0, [Fork(2, 0.4, [[5, EOS], [6, 7, EOS]], [1.0, 0.0])])
    deeper = Trajectory([5, 6, EOS], 0.0, [Fork(1, 0.8, [[EOS], [5, EOS]], [0.0, 0.0])])
    groups = [Group([3], [failed, deeper]), Group([4], [Trajectory([5, EOS], 1.0),
                                                    Trajectory(Continuation([EOS], [-1.0], [10.0]), 1.0)])]
    assert summarize(groups, [EOS]) == pytest.approx({
        "reward": 2 / 4, "branch_reward": 1 / 4, "dead_groups": 2 / 2, "dead_branch_groups": 1 / 2, "pivots": 2,
        "live_branches": 2,
        "pivot_depth": 0.6, "recovered": 1 / 2, "entropy": 20 / 5, "response_length": 10 / 4, "branch_length": 8 / 4,
        "truncated": 1 / 4, "sequences": 8, "generated_tokens": 18})


def test_what_there_is_nothing_of_is_none():
    metrics = summarize([Group([3], [Trajectory([5, EOS], 1.0), Trajectory([6], 0.0, [Fork(0, 0.5)])])], [EOS])
    missing = {name for name, value in metrics.items() if value is None}
    assert missing == {"branch_reward", "dead_branch_groups", "pivot_depth", "recovered", "branch_length", "entropy"}
    assert metrics["pivots"] == 0 and metrics["dead_groups"] == 0


def test_branches_that_are_all_right_are_dead():
    forks = [Fork(1, 0.5, [[4], [5]], rewards) for rewards in ([1.0, 1.0], [1.0, 0.0], [0.0, 0.0])]
    groups = [Group([3], [Trajectory([6, 7], 0.0, [fork]) for fork in forks])]
    metrics = summarize(groups, [EOS])
    assert metrics["live_branches"] == 2 and metrics["dead_branch_groups"] == pytest.approx(2 / 3)


def test_a_pivot_is_recovered_by_a_reward_between_0_and_1():
    forked = Group([3], [Trajectory([5, EOS], 0.0, [Fork(1, 0.5, [[4], [5]], [0.0, 0.5])])])
    assert summarize([forked], [EOS])["recovered"] == 1
