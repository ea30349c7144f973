"""FR3E: its advantages by hand, its gradient against the loss of single sequences, and where it branches."""
import math

import numpy as np
import pytest
import torch
from conftest import EOS, make_model
from small_policy import Told, choose, make_policy, pivots

from deep_grpo import Config, Fork, Group, Trajectory, objective
from packing import attention_length, pack_groups
from variants import fr3e


def test_advantages_by_hand():
    base = Trajectory([5] * 6, 0.0, [Fork(2, 1 / 3, [[6]] * 4, [1.0, 1.0, 1.0, 0.0]),
                                     Fork(4, 2 / 3, [[6]] * 4, [0.0, 0.0, 1.0, 0.0])])
    groups = [Group([3], [base, Trajectory([5, 5], 1.0)]), Group([3], [Trajectory([5], 1.0)] * 2)]
    spans = fr3e.weights(groups, Config(beta=0.5))
    root, *branches, other, right, right_too = [span.A for span in spans]
    assert (root, other, right, right_too) == (-0.5, 0.5, 0.0, 0.0)            # V_0 = 1/2, and 1 of the second question
    up, down = math.exp(-(0.75 - 0.5)), math.exp(-(0.25 - 0.75))               # V_1 = 3/4, V_2 = 1/4
    assert branches[:4] == pytest.approx([0.25 * up] * 3 + [-0.75 * up], rel=1e-12)
    assert branches[4:] == pytest.approx([-0.25 * down, -0.25 * down, 0.75 * down, -0.25 * down], rel=1e-12)
    tokens = 6 + 8 + 2 + 1 + 1
    assert all((span.w, span.w_kl) == pytest.approx((1 / tokens, 0.5 / tokens)) for span in spans)
    assert sum(span.tokens for span in spans) == tokens


def test_every_rollout_begins_at_the_value_of_the_question():
    """V_{j-1} of the first state of the second rollout is V_0, not the value of the last state of the first one."""
    def rollout(reward, rewards):
        return Trajectory([5] * 4, reward, [Fork(2, 0.5, [[6], [7]], rewards)])

    spans = fr3e.weights([Group([3], [rollout(0.0, [1.0, 1.0]), rollout(1.0, [1.0, 0.0])])], Config())
    assert [span.A for span in spans] == [-0.5, 0.0, 0.0, 0.5, 0.5, -0.5]      # V_1 = V_0 = 1/2 in the second


def test_the_gradient_is_a_mean_over_all_tokens(model, ref_model):
    groups = [Group([3, 5], [Trajectory([5, 6, 7, EOS], 0.0, [Fork(1, 0.25, [[8, EOS], [9]], [1.0, 0.0])]),
                             Trajectory([9, 9, EOS], 1.0, [Fork(2, 0.66, [[7, 7, EOS], [EOS]], [0.0, 0.0])])]),
              Group([7], [Trajectory([4, EOS], 1.0), Trajectory([6, EOS], 0.0)])]
    sequences = []                                                             # prefix, tokens, advantage
    for g in groups:
        for t, A in zip(g.trajectories, [-0.5, 0.5] if g is groups[0] else [0.5, -0.5]):
            sequences.append((g.prompt, t.response, A))
            for fork in t.forks:
                V = sum(fork.rewards) / 2
                sequences += [(g.prompt + t.response[:fork.pivot], y, (r - V) * math.exp(-(V - 0.5)))
                              for y, r in zip(fork.branches, fork.rewards)]

    def j():
        terms = []
        for prefix, y, A in sequences:
            logp, ref = (m(input_ids=torch.tensor([prefix + y])).logits[0, len(prefix) - 1:-1].log_softmax(-1)
                         .gather(-1, torch.tensor([y]).T)[:, 0] for m in (model, ref_model))
            terms.append(torch.exp(logp - logp.detach()) * A - 0.3 * (torch.exp(ref - logp) - (ref - logp) - 1))
        return torch.cat(terms).mean()

    (-j()).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss, _ = objective(model, groups, Config(beta=0.3), ref_model, None, 20, backward=True, weights=fr3e.weights)
    assert loss.item() == pytest.approx(-j().item(), rel=1e-10)
    for name, p in model.named_parameters():
        assert expected[name].abs().max() > 1e-3
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-8, atol=1e-11)


def test_it_branches_the_first_right_and_the_first_wrong_rollout_at_the_highest_entropies():
    policy, rng = make_policy(make_model()), np.random.default_rng(0)
    responses = [rng.integers(2, 23, n).tolist() + [EOS] for n in (20, 12, 9, 3)]
    groups = [Group([3, 5], [Trajectory(y, r) for y, r in zip(responses, (0.0, 0.0, 1.0, 1.0))]),
              Group([3, 5], [Trajectory(y, 0.0) for y in responses]),
              Group([3, 5], [Trajectory(y, 1.0) for y in responses]),
              Group([3, 5], [Trajectory(responses[3], 1.0), Trajectory(responses[0], 0.0)])]
    chosen = choose(fr3e.choose_pivots, policy, groups)
    assert [[len(t.forks) for t in g.trajectories] for g in chosen] == [[4, 0, 4, 0], [0] * 4, [0] * 4, [3, 4]]
    for t in (chosen[0].trajectories[0], chosen[0].trajectories[2], chosen[3].trajectories[1]):
        p = policy.model(input_ids=torch.tensor([[3, 5] + t.response])).logits[0, 1:-1].softmax(-1)
        entropy = (-(p * p.log()).sum(-1)).tolist()
        best = sorted(range(1, len(t.response)), key=lambda i: entropy[i], reverse=True)[:4]     # 0 is the question
        assert t.forks == [Fork(i, i / len(t.response)) for i in sorted(best)]
    assert [g.prompt for g in chosen] == [[3, 5]] * 4
    assert policy.forwarded == sum(len(row.ids) for row in pack_groups(groups, attention_length(policy.model)))


@pytest.mark.parametrize("rewards, forked", [
    ([0.0, 0.2, 0.4, 0.6, 1.0], [0, 1]), ([0.3, 0.0, 0.0, 1.0], [0, 1]), ([0.5, 1.0, 1.0], [])])
def test_a_rollout_with_a_part_of_the_reward_counts_as_right(rewards, forked):
    """As everywhere. Else every different reward would be a kind of its own."""
    policy = make_policy(kind=Told)
    policy.entropies = [torch.ones(3)] * len(rewards)
    (forks,) = pivots(choose(fr3e.choose_pivots, policy, [Group([3], [Trajectory([5] * 3, r) for r in rewards])]))
    assert [i for i, f in enumerate(forks) if f] == forked


def test_the_question_is_not_forked_and_the_last_token_may_be():
    """State 0 has its branches already: the 16 rollouts."""
    policy = make_policy(kind=Told)
    policy.entropies = [torch.tensor([9.0, 1.0, 5.0, 2.0, 3.0, 4.0]), torch.tensor([9.0, 1.0])]
    groups = [Group([3], [Trajectory([5] * 6, 1.0), Trajectory([5] * 2, 0.0)])]
    assert pivots(choose(fr3e.choose_pivots, policy, groups)) == [[[2, 3, 4, 5], [1]]]
