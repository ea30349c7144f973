"""Dr. GRPO: its constants by hand, and its gradient against the loss as its paper writes it."""
import pytest
import torch
from conftest import EOS

from deep_grpo import Config, Group, Trajectory, objective
from variants import METHODS, dr_grpo


def rollouts(prompt, *lengths_and_rewards):
    return Group(prompt, [Trajectory([5] * (n - 1) + [EOS], r) for n, r in lengths_and_rewards])


def test_constants_by_hand():
    groups = [rollouts([3], (2, 1.0), (4, 0.0), (6, 0.0), (8, 0.0)), rollouts([3], (1, 1.0), (1, 1.0))]
    spans = dr_grpo.weights(groups, Config(max_new_tokens=10, beta=0.5))
    assert [span.tokens for span in spans] == [2, 4, 6, 8, 1, 1]
    assert [span.A for span in spans] == [0.75, -0.25, -0.25, -0.25, 0.0, 0.0]
    assert [span.w for span in spans] == [1 / (2 * 4 * 10)] * 4 + [1 / (2 * 2 * 10)] * 2
    assert [span.w_kl for span in spans] == [0.5 * span.w for span in spans]


def test_a_long_wrong_answer_is_punished_as_much_per_token_as_a_short_one():
    """This is what the division by the length of a response spoils in GRPO."""
    short, long, _ = dr_grpo.weights([rollouts([3], (2, 0.0), (200, 0.0), (5, 1.0))], Config())
    assert (short.A, short.w) == (long.A, long.w) and short.A < 0


def test_the_gradient_is_that_of_the_loss_of_its_paper(model):
    groups = [rollouts([3, 5], (3, 1.0), (5, 0.0), (2, 0.0)), rollouts([7], (4, 0.0), (2, 1.0))]
    config = Config(max_new_tokens=12, **METHODS["dr_grpo"].settings)

    def j():
        total = 0.0
        for g in groups:
            mean = sum(t.reward for t in g.trajectories) / len(g.trajectories)
            for t in g.trajectories:
                logits = model(input_ids=torch.tensor([g.prompt + t.response])).logits[0, len(g.prompt) - 1:-1]
                for row, token in zip(logits.log_softmax(-1), t.response):
                    rho = torch.exp(row[token] - row[token].detach())
                    total = total + rho * (t.reward - mean) / 12 / len(g.trajectories) / len(groups)
        return total

    (-j()).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss, _ = objective(model, groups, config, None, None, 20, backward=True, weights=METHODS["dr_grpo"].weights)
    assert loss.item() == pytest.approx(-j().item(), rel=1e-10)
    for name, p in model.named_parameters():
        assert expected[name].abs().max() > 1e-3
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-8, atol=1e-11)
