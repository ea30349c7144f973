"""The combination lock: its arithmetic against a slow twin, its tokenizer, and the shipped base models."""
import random
import re
import sys
from collections import Counter
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tasks.lock
from grading import grade_gsm8k
from pivot import sentence_ends
from tasks.lock import (
    HARD,
    LOCKS,
    Lock,
    demonstrate,
    encode_row,
    make_rows,
    make_tokenizer,
    turn_probabilities,
    write_row,
)

ALL_LOCKS = [*LOCKS.values(), Lock(turns=(4, 9), hard=3, place=(1, 4), p=0.2),
         Lock(turns=(1, 1), hard=0, place=(1, 1))]


def turns_of(row):
    return re.findall(r"^\(\w\) (\S+)$", row["question"], re.M)


def solve(question):
    """The slow twin: reads the question's text, moves the dials click by click."""
    dials = [int(d) for d in re.search(r"The dials show (\d)(\d)\.", question).groups()]
    for line in re.findall(r"^\(\w\) (\S+)$", question, re.M):
        which, clicks = line.split("+")
        for _ in range(int(clicks)):
            for i in {"L": [0], "R": [1], "both": [0, 1]}[which]:
                dials[i] = 0 if dials[i] == 9 else dials[i] + 1
    return f"{dials[0]}{dials[1]}"


@pytest.mark.parametrize("lock", ALL_LOCKS)
def test_gold_answers_are_right_and_hard_turns_in_place(lock):
    rows = make_rows(lock, 200, seed=3)
    assert rows == make_rows(lock, 200, seed=3) != make_rows(lock, 200, seed=4)
    places, lengths = Counter(), Counter()
    for row in rows:
        turns = turns_of(row)
        gold = solve(row["question"])
        assert row["answer"].endswith(f"#### {gold}") and grade_gsm8k(row["answer"], gold)
        assert turns.count(HARD) == lock.hard
        lengths[len(turns)] += 1
        places.update(len(turns) - i for i, turn in enumerate(turns) if turn == HARD)    # 1 = the last turn
    assert set(lengths) == set(range(lock.turns[0], lock.turns[1] + 1))
    assert set(places) == (set(range(lock.place[0], lock.place[1] + 1)) if lock.hard else set())


def test_row_by_hand():
    row = write_row(["L+3", "both+3", "R+9"], (3, 7), [True, True, True])
    assert row["question"] == "The dials show 37.\n(a) L+3\n(b) both+3\n(c) R+9\nWhat do they show?"
    assert row["answer"] == "(a) L+3: 37 -> 67.\n(b) both+3: 67 -> 90.\n(c) R+9: 90 -> 99.\n#### 99"
    wrong = write_row(["L+3", "both+3", "R+9"], (3, 7), [True, False, True])
    assert wrong["answer"] == "(a) L+3: 37 -> 67.\n(b) both+3: 67 -> 67.\n(c) R+9: 67 -> 66.\n#### 66"


@pytest.mark.parametrize("hard", range(1, 10))
def test_wrong_hard_turns_never_make_a_right_answer(hard):
    # A swap, or +5, has this hole: left out twice, it leaves the dials where they should be.
    turns = [HARD] * hard
    gold = write_row(turns, (4, 9), [True] * hard)["answer"][-2:]
    for wrong in range(1, hard + 1):
        right = [False] * wrong + [True] * (hard - wrong)
        assert write_row(turns, (4, 9), right)["answer"][-2:] != gold


def test_demonstrations_are_right_with_the_stated_probability():
    lock, rng, right, n = Lock(p=0.2), random.Random(0), 0, 0
    for _ in range(4000):
        row = demonstrate(lock, rng, lock.p)
        for before, after in re.findall(rf"{re.escape(HARD)}: (\d\d) -> (\d\d)", row["answer"]):
            n, right = n + 1, right + (before != after)
        easy = re.findall(r"\) ([LR])\+(\d): (\d)(\d) -> (\d)(\d)", row["answer"])
        assert all(((int(a) + int(k)) % 10, int(b)) == (int(c), int(d)) if dial == "L" else
                   (int(a), (int(b) + int(k)) % 10) == (int(c), int(d)) for dial, k, a, b, c, d in easy)
    assert n > 2000 and right / n == pytest.approx(0.2, abs=4 * (0.16 / n) ** 0.5)       # 4 standard errors


def test_the_tokenizer_is_lossless_also_after_saving(tmp_path):
    # AutoTokenizer gives a folder whose config says "qwen2" a Qwen2Tokenizer, whatever its tokenizer.json
    # holds: every letter of the questions was lost, without a warning, and training began from a policy that
    # said five tokens of nonsense.
    fresh = make_tokenizer()
    for preset in LOCKS:
        shipped = AutoTokenizer.from_pretrained(tasks.lock.ASSETS / preset)
        for row in make_rows(LOCKS[preset], 50, seed=7):
            prompt, answer = encode_row(shipped, row)
            assert (prompt, answer) == encode_row(fresh, row)
            assert fresh.unk_token_id not in prompt + answer and answer[-1] == shipped.eos_token_id
            assert shipped.decode(answer, skip_special_tokens=True) == row["answer"]
            assert row["question"] in shipped.decode(prompt)
            ends = sentence_ends(answer, partial(shipped.decode, skip_special_tokens=True))
            assert len(ends) == len(turns_of(row)) + 1       # a sentence per turn, and the final answer


@pytest.mark.parametrize("preset", LOCKS)
def test_the_shipped_base_model_is_what_the_preset_says(preset):
    folder, lock = tasks.lock.ASSETS / preset, LOCKS[preset]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    p_easy, p_hard = turn_probabilities(model, tokenizer, lock, n=512, seed=11)
    assert p_easy > 0.97
    assert lock.p * 2 / 3 < p_hard < lock.p * 4 / 3
    assert (folder / "model.safetensors").stat().st_size < 2e6
    log = (folder / "pretrain.log").read_text()
    assert log.startswith(f"python tiny.py --preset {preset} ") and f"'p': {lock.p}" in log


def test_turn_probabilities_by_hand():
    """The probability of the two dials after an arrow, from a plain forward pass over the text up to it."""
    folder, lock = tasks.lock.ASSETS / "tiny", Lock(turns=(3, 3), hard=1, place=(1, 1))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    row = make_rows(lock, 1, seed=5)[0]
    prompt, _ = encode_row(tokenizer, row)
    probabilities = []
    for arrow in re.finditer(" -> ", row["answer"]):
        ids, p = prompt + tokenizer.encode(row["answer"][:arrow.end()], add_special_tokens=False), 1.0
        for digit in row["answer"][arrow.end():arrow.end() + 2]:
            token = tokenizer.convert_tokens_to_ids(digit)
            p *= model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)[token].item()
            ids.append(token)
        probabilities.append(p)
    easy, hard = turn_probabilities(model, tokenizer, lock, n=1, seed=5)
    assert (easy, hard) == pytest.approx((sum(probabilities[:2]) / 2, probabilities[2]), rel=1e-4)


def test_the_base_model_can_be_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv",
                        ["lock.py", "--preset", "tiny", "--steps", "3", "--out", str(tmp_path / "base")])
    monkeypatch.setattr(tasks.lock, "turn_probabilities", lambda *args, n: turn_probabilities(*args, n=8))   # not 1,024
    tasks.lock.main()
    made = tmp_path / "base"
    assert {p.name for p in made.iterdir()} == {p.name for p in (tasks.lock.ASSETS / "tiny").iterdir()}
    for same in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        assert (made / same).read_text() == (tasks.lock.ASSETS / "tiny" / same).read_text()
    log = (made / "pretrain.log").read_text()
    assert log.startswith("python lock.py --preset tiny --steps 3") and "step     3  loss" in log


@pytest.mark.parametrize("name, settings", [
    ("turns", dict(turns=(5, 4))), ("turns", dict(turns=(0, 4))), ("turns", dict(turns=(2, 27))),
    ("place", dict(place=(0, 2))), ("place", dict(turns=(3, 4), place=(1, 4))),
    ("hard", dict(hard=4)), ("hard", dict(hard=-1)), ("p must", dict(p=1.5))])
def test_impossible_locks_are_named(name, settings):
    with pytest.raises(ValueError, match=name):
        Lock(**settings)


def test_short_questions_have_only_the_hard_turns_that_fit():
    assert tasks.lock.draw_turns(Lock(), random.Random(0), 1) == [HARD]
    assert tasks.lock.draw_turns(Lock(place=(3, 3)), random.Random(0), 2).count(HARD) == 0
