"""The policy: what it draws, what it rewards, and what it counts."""
import copy
import time

import numpy as np
import pytest
import torch
from tokenizers import processors

import tasks.lock
import trainer.policy
from deep_grpo import Config, Group, Trajectory, choose_pivots, resample_failures, roll_out, score_groups
from recoverability import Recoverability
from tasks import GSM8K_INSTRUCTION, Question, chat_prompt
from trainer.model import load_model
from trainer.policy import BadReward, Clock, Policy


@pytest.fixture(scope="module")
def model_and_tokenizer():
    return load_model(str(tasks.lock.ASSETS / "tiny"))


@pytest.fixture
def make(model_and_tokenizer):
    """make(class, settings of Config) -> a policy of the embedded task."""
    def make(kind=Policy, **settings):
        model, tokenizer = model_and_tokenizer
        config = Config(**(dict(group_size=3, branches=2, max_new_tokens=20) | settings))
        return kind(model, tokenizer, [tokenizer.eos_token_id], config)

    return make


@pytest.fixture
def questions(model_and_tokenizer):
    _, tokenizer = model_and_tokenizer
    rows = tasks.lock.make_rows(tasks.lock.LOCKS["tiny"], 2, seed=0)
    return [Question(row["question"], row["answer"].split("#### ")[1],
                     chat_prompt(tokenizer, row["question"] + GSM8K_INSTRUCTION)) for row in rows]


# ---- the clock ----

@pytest.fixture
def now(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_a_phase_inside_a_phase_counts_for_itself_only(now):
    clock = Clock()
    with clock.phase("update"):
        now[0] += 1
        with clock.phase("resample"):
            now[0] += 10
            with clock.phase("score"):
                now[0] += 100
            now[0] += 1000
        with clock.phase("score"):
            now[0] += 10_000
        now[0] += 100_000
    with clock.phase("update"):
        now[0] += 1_000_000
    assert clock.seconds == {"update": 1_100_001, "resample": 1010, "score": 10_100}


def test_the_same_phase_inside_itself_is_counted_once(now):
    clock = Clock()
    with clock.phase("resample"):
        now[0] += 1
        with clock.phase("resample"):
            now[0] += 10
    assert clock.seconds == {"resample": 11}


def test_a_phase_that_fails_is_counted_and_closed(now):
    clock = Clock()
    with clock.phase("update"):
        with pytest.raises(KeyError), clock.phase("score"):
            now[0] += 1
            raise KeyError
        now[0] += 10
    assert clock.seconds == {"update": 10, "score": 1} and clock.inner == []


# ---- rewards ----

def test_an_unfinished_response_earns_nothing(make):
    policy, question = make(), Question("", "42", [])
    right, eos = policy.tokenizer.encode("#### 42", add_special_tokens=False), policy.stop[0]
    assert policy.reward(question, [*right, eos]) == 1.0
    assert policy.reward(question, right) == 0.0
    assert policy.reward(question._replace(gold="43"), [*right, eos]) == 0.0
    assert policy.rewards([(question, right), (question, [*right, eos])]) == [0.0, 1.0]


@pytest.mark.parametrize("text, right", [
    (r"So \boxed{42}. #### 43", {"hash": "43", "last": "43", "boxed": "42"}),
    (r"So \boxed{42}, or 44.", {"hash": None, "last": "44", "boxed": "42"}), ("#### 41", {"hash": "41", "last": "41"})])
def test_a_question_is_graded_by_its_way_to_state_an_answer(text, right, make, monkeypatch):
    policy = make()
    monkeypatch.setattr(policy, "text", lambda ids: text)
    for answer in ("hash", "last", "boxed"):
        for gold in ("41", "42", "43", "44"):
            question = Question("", gold, [], answer)
            assert policy.reward(question, [3, policy.stop[0]]) == (right.get(answer) == gold)
            assert policy.reward(question, [3]) == 0.0                               # unfinished
    assert policy.reward(Question("", ["41", "42"], [], "boxed"), [3, policy.stop[0]]) == (right.get("boxed") == "42")


class Odd(Policy):
    """Somebody's own reward: the sum of the token ids is odd."""

    def reward(self, question, response):
        return float(sum(response) % 2)


def test_a_subclass_has_its_own_reward_in_rollouts_and_branches(make, questions):
    policy = make(Odd)
    torch.manual_seed(0)
    groups = roll_out(policy, questions, policy.config)
    groups = choose_pivots(policy, questions, groups, policy.config, Recoverability(), np.random.default_rng(0))
    groups = resample_failures(policy, questions, groups, policy.config)
    trajectories = [t for g in groups for t in g.trajectories]
    assert {t.reward for t in trajectories} == {0.0, 1.0}
    for t in trajectories:
        assert t.reward == sum(t.response) % 2 and bool(t.forks) == (t.reward == 0)
        for fork in t.forks:                         # a branch is rewarded together with its prefix
            assert fork.rewards == [float(sum(t.response[:fork.pivot] + y) % 2) for y in fork.branches]


@pytest.mark.parametrize("reward", [-1.0, float("nan"), float("inf"), None, "1"])
def test_what_is_neither_a_failure_nor_a_success_is_refused(reward, make, questions, monkeypatch):
    """With rewards of -1 and 1, nothing would count as failed, and every pivot as recovered."""
    policy = make()
    monkeypatch.setattr(policy, "reward", lambda question, response: reward)
    with pytest.raises(BadReward, match=f"a reward must be a number, 0 .* or above; got {reward!r}"):
        policy.rewards([(questions[0], [3])])


def test_an_error_of_a_reward_is_no_full_disk_and_no_bad_update(make, questions, monkeypatch):
    policy = make()
    for error in (ConnectionError("refused"), FloatingPointError("nan")):
        def fails(question, response, error=error):
            raise error

        monkeypatch.setattr(policy, "reward", fails)
        with pytest.raises(BadReward, match=f"the reward of the question .* failed: {type(error).__name__}: {error}"):
            policy.rewards([(questions[0], [3])])


@pytest.mark.parametrize("reward", [True, 1, np.float32(1)])
def test_every_kind_of_number_is_a_reward(reward, make, questions, monkeypatch):
    policy = make()
    monkeypatch.setattr(policy, "reward", lambda question, response: reward)
    found, = policy.rewards([(questions[0], [3])])
    assert found == 1.0 and type(found) is float                         # which json can write


# ---- drawing ----

def test_samples_are_k_to_a_prefix_within_their_caps_and_counted(make, questions):
    policy = make()
    prompts = [q.prompt for q in questions]
    rollouts = policy.sample(prompts, 3, 12)
    branches = policy.sample(prompts, 2, [5, 9], expected_tokens=[4, 8])
    assert [len(drawn) for drawn in rollouts] == [3, 3] and [len(drawn) for drawn in branches] == [2, 2]
    for drawn, cap in zip([*rollouts, *branches], [12, 12, 5, 9]):
        assert all(len(y) == cap or y[-1] in policy.stop for y in drawn)
    assert policy.generated == sum(len(y) for drawn in [*rollouts, *branches] for y in drawn) > 0
    assert policy.forwarded == 0
    assert set(policy.clock.seconds) == {"rollout", "resample"} == set(policy.imbalance)      # by expected_tokens
    assert set(policy.imbalance.values()) == {1.0}                                            # one process


def test_samples_are_drawn_at_the_runs_temperature_unless_another_is_given(make, questions):
    prompts = [questions[0].prompt]
    greedy = make().sample(prompts, 1, 20, temperature=0)[0][0]
    nearly_greedy, hot = make(temperature=1e-4), make(temperature=50.0)
    assert nearly_greedy.sample(prompts, 2, 20) == [[greedy, greedy]]
    drawn = [tuple(y) for y in hot.sample(prompts, 4, 20)[0]]
    assert len(set(drawn)) == 4 and tuple(greedy) not in drawn
    assert hot.sample(prompts, 1, 20, temperature=0) == [[greedy]]


def test_text_and_encode_are_those_of_the_tokenizer(make, questions, monkeypatch):
    policy = make()
    assert policy.encode(questions[0].text + GSM8K_INSTRUCTION) == questions[0].prompt
    assert policy.text([*policy.tokenizer.encode("#### 42"), policy.stop[0]]) == "#### 42"
    monkeypatch.setattr(policy.tokenizer, "chat_template", None)         # a base model
    assert policy.encode("#### 42") == policy.tokenizer.encode("#### 42")
    tokenizer = copy.deepcopy(policy.tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<unk> $A <eos>", special_tokens=[("<unk>", tokenizer.unk_token_id), ("<eos>", policy.stop[0])])
    monkeypatch.setattr(policy, "tokenizer", tokenizer)
    assert policy.encode("#### 42") == tokenizer.encode("#### 42")[:-1]  # with BOS, without EOS


@pytest.mark.parametrize("n", [1, 2, 3])
def test_texts_that_are_kept_are_those_of_the_tokenizer(n, make):
    policy, rng = make(), np.random.default_rng(0)
    for ids in [*rng.integers(0, len(policy.tokenizer), (50, n)).tolist()] * 2:
        assert policy.text(ids) == policy.tokenizer.decode(ids, skip_special_tokens=True)


# ---- looking inside ----

def test_scores_are_those_of_score_groups_and_their_tokens_are_counted(make):
    policy = make(temperature=0.7)
    groups = [Group([3, 4, 5], [Trajectory([6, 7, 8], 1.0), Trajectory([9, 10], 0.0)])]
    logps, entropies = policy.score(groups)
    expected_logps, expected_entropies, tokens = score_groups(policy.model, groups, policy.config)
    for got, expected in ((logps, expected_logps), (entropies, expected_entropies)):
        assert len(got) == 2 and all(map(torch.equal, got, expected))
    assert policy.forwarded == tokens == 3 + 3 + 2 and policy.generated == 0


def test_each_calls_the_function_with_the_model_and_counts_its_tokens(make):
    policy = make()
    items = [([3, 4], [5, 6, 7], "a"), ([3], [8], "b")]
    results = policy.each(lambda model, prompt, response, name: (model is policy.model, prompt + response, name), items)
    assert results == [(True, [3, 4, 5, 6, 7], "a"), (True, [3, 8], "b")]
    assert policy.forwarded == 7


def test_the_imbalance_of_a_step_is_the_largest_of_its_rounds(monkeypatch):
    loads = iter([2.0, 1.5])
    monkeypatch.setattr(trainer.policy, "imbalance", lambda *_: next(loads))
    model, tokenizer = load_model(str(tasks.lock.ASSETS / "tiny"))
    policy = Policy(model, tokenizer, [tokenizer.eos_token_id], Config())
    for _ in range(2):                                       # two rounds of a step, as with --step-tokens
        policy.sample([[3, 4]], 1, 2)
    assert policy.imbalance == {"rollout": 2.0}


@pytest.mark.parametrize("answer, text, right", [
    ("boxed", "9 * 2 = 18 </think> <answer>18</answer>", 1.0),
    ("boxed", r"maybe \boxed{18}? no </think> <answer>7</answer>", 0.0),
    ("last", "9 </think> <answer>7</answer>\nUser: thanks, 18?", 0.0), ("last", "9 </think> <answer>18</answer>", 1.0)])
def test_the_reward_of_the_template_r1_reads_the_answer_tags(answer, text, right):
    """As the evaluation does. Without a stop id there is no reward, and another template has no such tags."""
    model, tokenizer = load_model(str(tasks.lock.ASSETS / "tiny"))
    policy = Policy(model, tokenizer, [1], Config())
    policy.text = lambda ids: text
    question = Question("q", "18", [3], answer, "r1")
    assert policy.reward(question, [5, 1]) == right and policy.reward(question, [5, 5]) == 0.0
    if answer == "boxed":
        assert policy.reward(question._replace(template="chat"), [5, 1]) == 1.0 - right
