"""RRPO and SRPO: their constants by hand, a loss without a clip, and the step to which a failure is reset."""
import math
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import EOS, make_model
from small_policy import choose, make_policy, pivots

from deep_grpo import Config, Fork, Group, Trajectory, objective, score_groups
from trainer.policy import Policy
from variants import METHODS, rrpo
from variants.rrpo import SRPO_QUESTION

# ---- constants ----

def test_constants_by_hand():
    probe = Trajectory([5] * 7, 0.0, [Fork(3, 3 / 7, [[6] * 2, [6] * 4, [6], [6]], [1.0, 0.0, 0.0, 0.0])])
    rest = [Trajectory([5] * n, r) for n, r in ((3, 1.0), (5, 0.0), (2, 1.0), (4, 0.0))]
    groups = [Group([3], [rest[0], probe, *rest[1:]]), Group([3], [Trajectory([5], 1.0)] * 5)]
    spans = rrpo.weights(groups, Config(beta=0.5))
    assert [span.tokens for span in spans] == [3, 7, 2, 4, 1, 1, 5, 2, 4, *[1] * 5]
    assert spans[1] == (7, 0.0, 0.0, 0.0)                                      # the probe itself is not trained
    assert [spans[i].A for i in (0, 6, 7, 8)] == pytest.approx([1, -1, 1, -1], rel=1e-12)     # population std .5
    high, low = math.sqrt(3), -1 / math.sqrt(3)                                # and sqrt(3) / 4
    assert [span.A for span in spans[2:6]] == pytest.approx([high, low, low, low], rel=1e-12)
    for span in (spans[0], *spans[2:9]):
        n = 2 * 8 * span.tokens                                                # questions, sequences, tokens
        assert (span.w, span.w_kl) == pytest.approx((1 / n, 0.5 / n), rel=1e-12)
    for span in spans[9:]:
        assert span == pytest.approx((1, 0.0, 1 / (2 * 5), 0.5 / (2 * 5)), rel=1e-12)


def test_a_question_with_nothing_but_the_probe_trains_its_branches():
    lone = [Group([3], [Trajectory([5], 0.0, [Fork(0, 0.0, [[6], [7]], [1.0, 0.0])])])]
    probe, *branches = rrpo.weights(lone, Config())
    assert probe == (1, 0.0, 0.0, 0.0) and [span.w for span in branches] == [0.5, 0.5]
    assert branches[0].A == -branches[1].A == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("method", ["rrpo", "srpo"])
def test_there_is_no_clip(method):
    model, old_model = make_model(), make_model(seed=3)
    groups = [Group([3], [Trajectory([5, 6, EOS], 1.0), Trajectory([7, EOS], 0.0), Trajectory([8, EOS], 0.0)])]
    settings = {k: v for k, v in METHODS[method].settings.items() if k.startswith("clip")}
    old, *_ = score_groups(old_model, groups, Config())
    now, *_ = score_groups(model, groups, Config())
    loss, metrics = objective(model, groups, Config(beta=0.0, **settings), None, old, weights=METHODS[method].weights)
    high, low = math.sqrt(2), -1 / math.sqrt(2)                                # the population std is sqrt(2) / 3
    by_hand = sum(torch.exp(a - b).mean() * A / 3 for a, b, A in zip(now, old, (high, low, low)))
    assert loss.item() == pytest.approx(-by_hand.item(), rel=1e-10) and metrics["clip_fraction"] == 0
    clipped, metrics = objective(model, groups, Config(beta=0.0), None, old, weights=METHODS[method].weights)
    assert metrics["clip_fraction"] > 0 and abs(clipped - loss) > 1e-3


# ---- the reset ----

def three_questions():
    return [Group([3], [Trajectory([8, EOS], 1.0), Trajectory([5, 2, 6, 2, 7, EOS], 0.0), Trajectory([5, EOS], 0.0)]),
            Group([4], [Trajectory([5, EOS], 1.0)]),
            Group([4], [Trajectory([8, 9, 2, 8, 2, EOS], 0.0)])]


def test_rrpo_resets_the_first_failure_to_the_beginning_of_any_step():
    policy, seen = make_policy(), []
    for seed in range(300):
        groups = three_questions()
        chosen = choose(rrpo.choose_pivots, policy, groups, seed=seed)
        assert groups == three_questions() and [g.prompt for g in chosen] == [[3], [4], [4]]
        (_, (first,), _), _, ((second,),) = pivots(chosen)
        assert [[len(t.forks) for t in g.trajectories] for g in chosen] == [[0, 1, 0], [0], [1]]
        assert chosen[0].trajectories[1].forks[0].ratio == first / 6
        seen.append((first, second))
    for state in (0, 2, 4):
        assert 70 < sum(first == state for first, _ in seen) < 130             # 100, 8 standard deviation
    assert {second for _, second in seen} == {0, 3} and policy.generated == policy.forwarded == 0


def test_a_rollout_that_equals_the_probe_is_not_reset_with_it():
    """Short responses of a weak model are often the same; only the first of them is the probe."""
    groups = [Group([3], [Trajectory([5, EOS], 0.0), Trajectory([5, EOS], 0.0)])]
    assert pivots(choose(rrpo.choose_pivots, make_policy(), groups, seed=0)) == [[[0], []]]


class Answering(Policy):
    """A policy that answers SRPO's question with the texts it is told, and keeps what it was asked."""
    def encode(self, text):
        return [text]

    def sample(self, prefixes, k, max_new_tokens):
        self.asked.append((prefixes, k, max_new_tokens))
        return [[[self.answers.pop(0)]] for _ in prefixes]

    def text(self, ids):
        return ids[0] if ids and isinstance(ids[0], str) else super().text(ids)


def answering(*answers):
    policy = make_policy(kind=Answering)
    policy.asked, policy.answers = [], list(answers)
    return policy


QUESTIONS = [SimpleNamespace(text=name) for name in ("Why?", "How?", "Who?")]


def test_srpo_resets_to_the_step_that_the_model_names():
    policy = answering("Step 2 is wrong", "1")
    chosen = choose(rrpo.choose_named, policy, three_questions(), QUESTIONS)
    assert pivots(chosen) == [[[], [2], []], [[]], [[0]]] and chosen[0].trajectories[1].forks == [Fork(2, 2 / 6)]
    assert policy.asked == [([[SRPO_QUESTION.format(question="Why?", steps="1. w5.\n2. w6.\n3. w7")],
                              [SRPO_QUESTION.format(question="Who?", steps="1. w8 w9.\n2. w8.")]], 1, 8)]
    last = answering("3.", "2")
    assert pivots(choose(rrpo.choose_named, last, three_questions(), QUESTIONS)) == [[[], [4], []], [[]], [[3]]]


@pytest.mark.parametrize("answers", [("no idea", "12"), ("4", "0"), ("", "none")])
def test_srpo_resets_to_any_step_where_the_answer_names_none(answers):
    seen = [pivots(choose(rrpo.choose_named, answering(*answers), three_questions(), QUESTIONS, seed=seed))
            for seed in range(200)]
    firsts, seconds = [g[0][1][0] for g in seen], [g[2][0][0] for g in seen]
    assert set(firsts) == {0, 2, 4} and set(seconds) == {0, 3}
    assert all(40 < firsts.count(state) < 95 for state in (0, 2, 4))           # 67 each, 7 standard deviation
    assert 65 < seconds.count(0) < 135


def test_srpo_does_not_ask_what_does_not_fit_into_the_context():
    """The first question has 40 tokens here, the other one 20. With learned positions, a longer one would crash."""
    class Counting(Answering):
        def encode(self, text):
            return [text, *range(39 if "Why" in text else 19)]

    for context, asked in ((48, 2), (47, 1), (28, 1), (27, 0)):
        policy = make_policy(SimpleNamespace(config=SimpleNamespace(max_position_embeddings=context)), Counting)
        policy.asked, policy.answers = [], ["2"] * asked
        first, second = (groups[0] for groups in pivots(choose(rrpo.choose_named, policy, three_questions(), QUESTIONS,
                                                               seed=0))[::2])
        assert sum(len(prefixes) for prefixes, *_ in policy.asked) == asked and policy.answers == []
        assert second == ([3] if asked else second)          # what the answer names, and otherwise any step


def test_srpo_asks_nothing_where_all_rollouts_are_right():
    policy, right = answering(), [Group([3], [Trajectory([5, EOS], 1.0)])]
    assert choose(rrpo.choose_named, policy, right, QUESTIONS[:1]) == right and not policy.asked


def test_the_question_of_srpo_asks_for_one_number():
    assert re.findall(r"{(\w+)}", SRPO_QUESTION) == ["question", "steps"] and "number only" in SRPO_QUESTION
