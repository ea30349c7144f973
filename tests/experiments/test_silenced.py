"""Where STAPO acts: the counts of a batch by hand, and rollouts of a base model that are drawn and graded."""
import numpy as np
import pytest

from deep_grpo import Group, Trajectory
from experiments.silenced import TEMPERATURES, count_tokens, draw, tables
from resample import Continuation


def rollout(probabilities, entropies, reward):
    return Trajectory(Continuation(range(len(probabilities)), np.log(probabilities), entropies), reward)


def test_the_counts_of_a_batch_by_hand():
    """Four improbable tokens of two correct responses have the entropies .1, .5, 1 and 2: three are below 1.25."""
    groups = [Group([3], [rollout([0.001, 0.001, 0.5], [0.1, 0.5, 0.2], 1.0),
                          rollout([0.0015, 0.0019], [1.0, 2.0], 1.0),
                          rollout([0.001, 0.9, 0.9], [0.1, 0.1, 0.1], 0.0), rollout([0.9], [0.1], 1.0)]),
              Group([4], [rollout([0.001], [0.1], 1.0)] * 4)]                      # dead: no advantage
    found = count_tokens(groups)
    assert found.pop("in_wrong") == pytest.approx(1000 / 3)
    assert found == {"correct": 7 / 8, "tokens": 3 + 2 + 1 + 4, "improbable": 4, "silenced": 3, "touched": 2 / 7}
    found["in_wrong"] = 1000 / 3
    row = tables({("tiny", 1.5): found}).splitlines()[-1]
    assert row == "| tiny | 1.5 | 87.5 % | 10 | 4 | 400.00 | 333.33 | 3 | 29 % |"


@pytest.mark.parametrize("temperature", [TEMPERATURES[-1]])
def test_rollouts_are_those_of_the_policy_at_this_temperature(temperature):
    groups = draw("tiny", temperature, questions=2, group_size=3)
    rollouts = [t for g in groups for t in g.trajectories]
    assert [len(g.trajectories) for g in groups] == [3, 3] and {t.reward for t in rollouts} <= {0.0, 1.0}
    assert all(len(t.response.logps) == len(t.response.entropies) == len(t.response) for t in rollouts)
    cold = draw("tiny", 0.5, questions=2, group_size=3)
    assert np.mean([t.response.entropies.mean() for g in cold for t in g.trajectories]) < np.mean(
        [t.response.entropies.mean() for t in rollouts])
