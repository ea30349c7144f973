"""The training command: it learns, repeats itself, says what is wrong; and GSM8K's own rows go through it."""
import argparse
import itertools
import json
import math
import os
import re
import resource
import subprocess
import sys
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import resample
import tasks.lock
import train_gsm8k
from deep_grpo import Group, Trajectory, update
from grading import grade_gsm8k
from packing import pack, score_rows
from recoverability import Recoverability
from resample import sample
from tasks import GSM8K_INSTRUCTION, Question, chat_prompt
from trainer import compiling, decoding
from trainer.checkpoint import find_checkpoints
from trainer.compiling import compiled_rows, plain_rows, stopwatch
from trainer.model import load_model
from trainer.policy import Policy
from trainer.session import owned, why_nothing_is_right
from trainer.settings import parse_args

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
FAST = ["--preset", "tiny", "--questions", "2", "--group-size", "4", "--branches", "2", "--eval-rows", "8",
        "--eval-every", "2"]
SHORT = [*FAST, "--max-new-tokens", "16"]                          # where no answer needs to be right


def train(*argv):
    """The exit code of the command, run in this process."""
    try:
        return train_gsm8k.main([str(a) for a in argv])
    except SystemExit as stop:                                     # argparse
        return stop.code


def read(run_dir, name="metrics.jsonl"):
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def load(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def weights(run_dir, step):
    return load(run_dir / "checkpoints" / f"step_{step}")[0].state_dict()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The rows of an epoch and the figure are most of the time of a short run. `short_run` has them all the same."""
    make_rows = tasks.lock.make_rows
    monkeypatch.setattr(tasks.lock, "make_rows", lambda lock, n, seed: make_rows(lock, min(n, 64), seed))
    monkeypatch.setattr(train_gsm8k, "plot_run", lambda run_dir: None)


def test_learns_most_of_the_tiny_task_in_eight_large_steps(tmp_path):
    """Seeds 0, 1 and 2 end at .84, .75 and .56; the whole run of the preset is test_learns_the_tiny_task."""
    out = tmp_path / "run"
    assert train("--preset", "tiny", "--lr", "2e-4", "--steps", 8, "--eval-every", 8, "--eval-rows", 32,
                 "--out", out) == 0
    rows = read(out)
    assert rows[0]["eval_accuracy"] < 0.1 and rows[-1]["eval_accuracy"] > 0.4
    assert rows[-1]["w"] != 0 and any(row["recovered"] for row in rows[1:])


@pytest.mark.slow
def test_learns_the_tiny_task(tmp_path, monkeypatch):
    """From under .2 to over .8 in the preset's 40 steps. (Seeds 0 to 5 end at .91 .95 .96 .99 .96 .89.)"""
    monkeypatch.undo()
    out = tmp_path / "run"
    assert train("--preset", "tiny", "--eval-every", 40, "--eval-rows", 64, "--out", out) == 0
    rows = read(out)
    assert [row["step"] for row in rows] == list(range(41))
    assert rows[0]["eval_accuracy"] < 0.2 and rows[-1]["eval_accuracy"] > 0.8


def test_the_same_seed_gives_the_same_run(tmp_path):
    for name, seed, steps in (("a", 5, 2), ("b", 5, 2), ("c", 6, 1)):
        assert train(*FAST, "--steps", steps, "--seed", seed, "--out", tmp_path / name) == 0
    for log in ("metrics.jsonl", "samples.jsonl"):
        a, b, c = ((tmp_path / name / log).read_text() for name in "abc")
        assert a == b and a.splitlines()[1] != c.splitlines()[1]   # beyond the evaluation of the same start
    first, second = weights(tmp_path / "a", 2), weights(tmp_path / "b", 2)
    assert all(torch.equal(p, second[name]) for name, p in first.items())


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert train(*FAST, "--branches", 4, "--steps", 3, "--out", out, "--eval-every", 3, "--updates", 2) == 0
    return out


def test_a_run_leaves_its_settings_logs_checkpoints_and_figure(short_run):
    assert {path.name for path in short_run.iterdir()} == {
        "config.json", "metrics.jsonl", "samples.jsonl", "timing.jsonl", "pivots.csv", "checkpoints", "run.png",
        ".lock"}
    saved = json.loads((short_run / "config.json").read_text())
    assert saved["settings"]["gamma"] == 2.0 and saved["versions"]["torch"] == torch.__version__
    assert saved["training_questions"] == 4096 and [row["step"] for row in read(short_run)] == [0, 1, 2, 3]


def test_metrics_of_the_run_by_hand(short_run):
    """Those that tests/paper/test_deep_grpo.py does not recompute: totals, speed, the fit, the accuracy."""
    rows, clock = read(short_run), read(short_run, "timing.jsonl")
    total = 0
    for row, timing in zip(rows[1:], clock[1:]):
        total += row["generated_tokens"]
        seconds = sum(timing[f"seconds_{part}"] for part in ("rollout", "resample", "score", "update"))
        assert row["generated_total"] == total
        assert timing["tokens_per_second"] == pytest.approx(row["generated_tokens"] / seconds)
        assert row["sequences"] == 2 * 4 + 4 * row["pivots"] and row["pivots"] == round((1 - row["reward"]) * 8)
        assert timing["step"] == row["step"] and timing["peak_memory_gb"] > 0.1
        assert math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])
    parts = torch.load(short_run / "checkpoints" / "step_3" / "trainer.pt", weights_only=False)
    again = Recoverability()
    for ratio, success in parts["recoverability"]["outcomes"]:
        again.observe(ratio, success)
    again.fit()
    assert len(again.outcomes) == sum(row["pivots"] for row in rows[1:])
    assert (rows[-1]["w"], rows[-1]["b"]) == (again.w, again.b)

    model, tokenizer = load(short_run / "checkpoints" / "step_3")
    right = 0                                                      # greedily, one token and one question at a time
    for row in tasks.lock.make_rows(tasks.lock.LOCKS["tiny"], 8, seed=0):
        prompt = chat_prompt(tokenizer, row["question"] + GSM8K_INSTRUCTION)
        ids = list(prompt)
        while len(ids) < len(prompt) + 96 and ids[-1] != tokenizer.eos_token_id:
            ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
        text = tokenizer.decode(ids[len(prompt):], skip_special_tokens=True)
        right += grade_gsm8k(text, row["answer"].split("#### ")[1]) and ids[-1] == tokenizer.eos_token_id
    assert rows[-1]["eval_accuracy"] == right / 8


def prepared(tmp_path, *flags):
    return train_gsm8k.prepare(train_gsm8k.parse_args([*FAST, *flags, "--out", str(tmp_path / "run")]))


@pytest.mark.parametrize("flags, best", [([], 2), (["--select-on-test"], 3)])
def test_the_best_checkpoint_is_the_first_of_the_best_on_the_validation_rows_unless_asked(flags, best, tmp_path):
    for name, n in (("train", 8), ("test", 5)):
        rows = tasks.lock.make_rows(tasks.lock.LOCKS["tiny"], n, seed=3)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = prepared(tmp_path, "--data", str(tmp_path / "train.jsonl"), "--eval-data", str(tmp_path / "test.jsonl"),
                   "--val-rows", "4", *flags)
    assert (len(run.questions), len(run.eval_questions), len(run.val_questions)) == (4, 5, 4)
    right = {}                                       # step -> number of correct (evaluation, validation) answers
    tests, vals = ([q.text for q in part] for part in (run.eval_questions, run.val_questions))

    def rewards(pairs):
        assert [q.text for q, _ in pairs] == tests + vals
        n_test, n_val = right[run.step]
        return [float(i < n_test) for i in range(5)] + [float(i < n_val) for i in range(4)]

    run.policy.rewards = rewards
    run.policy.sample = lambda prompts, k, max_new_tokens, temperature: [[[1]] for _ in prompts]
    # Step 0 is no checkpoint, and the last step is as good as the best one before.
    for run.step, right[run.step] in enumerate([(5, 4), (2, 1), (1, 3), (4, 2), (4, 3)]):
        metrics, _ = train_gsm8k.evaluate(run)
        n_test, n_val = right[run.step]
        assert (metrics["eval_accuracy"], metrics["val_accuracy"]) == (n_test / 5, n_val / 4)
    assert run.best_step == best


def test_the_reference_is_the_start_and_the_policy_is_sampled_at_its_temperature(tmp_path, monkeypatch):
    run = prepared(tmp_path, "--temperature", "1.5", "--lr", "1e-3", "--beta", "0.1", "--branches", "4")
    temperatures = []
    run.policy.sampler = lambda *args, temperature, **more: (temperatures.append(temperature)
                                                             or sample(*args, temperature=temperature, **more))
    run.policy.rewards = lambda pairs: [float(i % 2) for i in range(len(pairs))]
    first, second = (train_gsm8k.train_step(run)[0] for _ in range(2))
    assert first["grad_norm"] > 0 and abs(first["kl"]) < 1e-6 < 1e-4 < second["kl"]
    assert set(temperatures) == {1.5} and len(temperatures) >= 4
    train_gsm8k.evaluate(run)
    assert temperatures[-1] == 0


def clock(monkeypatch):
    """Stop the clock. taking(seconds, function) is a function during which it goes on by so many seconds."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def taking(seconds, function):
        def slow(*args, **kwargs):
            now[0] += seconds
            return function(*args, **kwargs)
        return slow

    return taking


def test_the_seconds_of_a_step_are_counted_once(tmp_path, monkeypatch):
    run, taking = prepared(tmp_path, "--beta", "0"), clock(monkeypatch)
    method = train_gsm8k.METHODS["deep_grpo"]
    monkeypatch.setitem(train_gsm8k.METHODS, "deep_grpo", replace(
        method, choose_pivots=taking(1000, method.choose_pivots), update=taking(10_000, method.update)))
    run.policy.sampler = taking(100, sample)
    run.policy.reward = taking(1, lambda question, response: 0.0)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=3 * 2**20))     # in kB
    for _ in range(2):                                             # each step has a clock of its own
        _, timing, _, _ = train_gsm8k.train_step(run)
        seconds = [timing[f"seconds_{part}"] for part in ("rollout", "resample", "score", "update")]
        assert seconds == [100, 1100, 2 * 4 + 2 * 4 * 2, 10_000]   # 8 rollouts fail, and each has 2 branches
        assert timing["peak_memory_gb"] == 3.0


def test_samples_hold_text_pivots_and_branches(short_run):
    samples = read(short_run, "samples.jsonl")
    failed = [s for s in samples if s["reward"] == 0]
    assert failed and {s["step"] for s in samples} == {1, 3}
    for s in failed:
        assert s["response"].startswith(s["prefix"]) and s["prefix"] != s["response"] and len(s["branches"]) == 4
        assert s["prefix"] == "" or s["prefix"].endswith(".\n")
        for branch in s["branches"]:
            assert branch["reward"] == float(grade_gsm8k(s["prefix"] + branch["text"], s["gold"]))


@pytest.mark.parametrize("flags, times", [([], 1), (["--gradient-checkpointing"], 2)])
def test_gradient_checkpointing_computes_each_layer_again(flags, times, tmp_path):
    """The flag once did nothing: transformers checkpoints in training mode only, and the model was in eval mode."""
    run = prepared(tmp_path, *flags, "--beta", "0")
    model, forwards, batches = run.policy.model, [], []
    model.base_model.register_forward_hook(lambda *_: batches.append(1))
    model.base_model.layers[1].self_attn.register_forward_hook(lambda *_: forwards.append(1))
    groups = [Group([3, 4], [Trajectory([5, 6], 1.0), Trajectory([6, 7, 8], 0.0)])]
    run.policy.sample([[3, 4]], 2, 4)                # sampling leaves the mode as it was
    forwards.clear(), batches.clear()
    update(model, run.optimizer, groups, run.policy.config, micro_batch_tokens=5)
    assert len(forwards) == times * len(batches) > 0


def llama(vocabulary):
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, attention_dropout=0.5))


def gpt2(vocabulary):
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=vocabulary, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, attn_pdrop=0.5,
        resid_pdrop=0.5, embd_pdrop=0.5))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_checkpoint_with_dropout_is_scored_without_it_in_training_mode(make, tmp_path):
    """Gradient checkpointing needs training mode, and dropout would then score another policy than the sampled one."""
    tokenizer = tasks.lock.make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    make(len(tokenizer)).save_pretrained(tmp_path)
    rows = [pack([3, 4, 5], [6, 7, 8, 9, 10])]
    for from_file, equal in ((lambda: AutoModelForCausalLM.from_pretrained(tmp_path), False),
                             (lambda: load_model(str(tmp_path))[0], True)):
        model = from_file().train()
        first, second = (score_rows(model, rows)[0] for _ in range(2))
        assert torch.equal(first, second) == equal


def test_the_optimizer_is_adamw_with_the_settings_of_the_authors_scripts(tmp_path):
    """Two steps of it by hand: betas and the bias correction of Adam show from the second step on."""
    run = prepared(tmp_path, "--lr", "1e-3")
    group, = run.optimizer.param_groups
    settings = dict(lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01, eps=1e-8, amsgrad=False, maximize=False)
    assert type(run.optimizer) is torch.optim.AdamW and {name: group[name] for name in settings} == settings
    assert [id(p) for p in group["params"]] == [id(p) for p in run.policy.model.parameters()]

    weight = max(run.policy.model.parameters(), key=lambda p: p.numel())
    w, g1, g2 = weight.detach().double(), torch.randn_like(weight), torch.randn_like(weight)
    for g in (g1, g2):
        weight.grad = g
        run.optimizer.step()
    g1, g2 = g1.double(), g2.double()
    w = w * (1 - 1e-3 * 0.01) - 1e-3 * g1 / (g1.abs() + 1e-8)
    m, v = (0.9 * 0.1 * g1 + 0.1 * g2) / (1 - 0.9 ** 2), (0.999 * 0.001 * g1 ** 2 + 0.001 * g2 ** 2) / (1 - 0.999 ** 2)
    w = w * (1 - 1e-3 * 0.01) - 1e-3 * m / (v.sqrt() + 1e-8)
    torch.testing.assert_close(weight.detach().double(), w, rtol=0, atol=3e-7)           # decay moves up to 2e-5 |w|


def test_grpo_is_the_same_code_without_branches(tmp_path):
    out = tmp_path / "run"
    flags = ["--preset", "tiny", "--method", "grpo", "--group-size", 4, "--steps", 1, "--eval-every", 0]
    assert train(*flags, "--out", out) == 0
    row = read(tmp_path / "run")[0]
    assert row["sequences"] == 8 and row["pivots"] == 0 and row["recovered"] is None
    assert json.loads((tmp_path / "run" / "config.json").read_text())["settings"]["branches"] == 0


def test_budget_tokens_end_the_run_after_the_step_that_reaches_them(tmp_path):
    assert train(*FAST, "--steps", 50, "--budget-tokens", 1500, "--eval-every", 0, "--out", tmp_path / "run") == 0
    totals = [row["generated_total"] for row in read(tmp_path / "run")]
    assert totals[-1] >= 1500 > totals[-2]
    assert (tmp_path / "run" / "checkpoints" / f"step_{len(totals)}" / "trainer.pt").exists()


def test_every_epoch_walks_through_all_questions():
    run = argparse.Namespace(questions=list(range(7)), teacher=None,
                             args=argparse.Namespace(questions=3, candidates=None, seed=0))
    walk = [q for step in range(1, 15) for q in train_gsm8k.batch_at(run, step)]
    epochs = [walk[i:i + 7] for i in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 3
    run.args.seed = 1
    assert walk[:21] != [q for step in range(1, 8) for q in train_gsm8k.batch_at(run, step)]


# ---- real rows, the real tokenizer ----

def test_gsm8k_rows_with_the_qwen_tokenizer(tmp_path, capsys):
    """Everything but the weights is real. The model has memorised two answers: some rollouts are right, some fail."""
    if not DATA.exists():
        pytest.skip(f"needs GSM8K rows and the Qwen2.5 tokenizer in {DATA}")
    tokenizer = AutoTokenizer.from_pretrained(DATA / "qwen2.5_0.5b_instruct")
    rows = [json.loads(line) for line in open(DATA / "gsm8k_train.jsonl")][:4]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=151936, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, eos_token_id=[151645, 151643], pad_token_id=151643,
        bos_token_id=None))
    optimizer, loss = torch.optim.Adam(model.parameters(), lr=0.03), torch.tensor(torch.inf)
    while loss > 0.4:                                              # about 40 steps; 1 of 10 answers is then right
        loss = torch.zeros(())
        for row in rows[:2]:
            prompt = chat_prompt(tokenizer, row["question"] + GSM8K_INSTRUCTION)
            gold = row["answer"].split("#### ")[1]
            answer = tokenizer.encode(f"So it is {gold}.\n#### {gold}") + [151645]
            out = model(input_ids=torch.tensor([prompt + answer]), logits_to_keep=len(answer) + 1)
            loss = loss + torch.nn.functional.cross_entropy(out.logits[0, :-1], torch.tensor(answer))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")

    assert train("--preset", "gsm8k", "--model", tmp_path / "model", "--data", data, "--eval-data", data,
                 "--eval-rows", 2, "--val-rows", 0, "--eval-every", 1, "--questions", 4, "--group-size", 4,
                 "--branches", 2, "--max-new-tokens", 16, "--steps", 1, "--lr", "1e-4", "--micro-batch-tokens", 1000,
                 "--out", tmp_path / "run") == 0
    metrics = read(tmp_path / "run")
    for row in metrics[1:]:
        assert row["pivots"] and 0 < row["recovered"] < 1 and row["grad_norm"] > 0 and row["reward"] < 1
    assert metrics[0]["eval_accuracy"] >= 0.5                      # greedy, on the two memorised rows
    samples = read(tmp_path / "run", "samples.jsonl")
    assert {s["question"] for s in samples} <= {row["question"] for row in rows} and any(s["reward"] for s in samples)
    assert any(s["prefix"].endswith(".\n") for s in samples if s["branches"])
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "checkpoints" / "step_1").decode(
        tokenizer.encode("é 1,080")) == "é 1,080"
    assert "4 training and 2 evaluation questions" in capsys.readouterr().out


# ---- bad input: one clear line, exit code 2, no traceback, no half-made run directory ----

GOOD_ROW = {"question": "The dials show 37.\n(a) L+3\nWhat do they show?",
            "answer": "(a) L+3: 37 -> 67.\n#### 67"}
LONG_ROW = GOOD_ROW | {"question": GOOD_ROW["question"].replace("(a) L+3\n", "(a) L+3\n(b) R+1\n(c) R+1\n(d) R+1\n")}


def bad_inputs(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("")
    for name, lines in {"torn": [json.dumps(GOOD_ROW), '{"question": "a'], "list": ["[1]"], "nothing": [],
                        "no_answer": [json.dumps(GOOD_ROW), "", json.dumps({"question": "Why?", "answer": "Because."})],
                        "words": [json.dumps({"question": "Why?", "answer": "#### many"})],
                        "field": [json.dumps({"text": "1+1", "answer": "#### 2"})],
                        "one": [json.dumps(GOOD_ROW)], "three": [json.dumps(GOOD_ROW)] * 3,
                        "long_last": [json.dumps(GOOD_ROW), json.dumps(LONG_ROW)]}.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return {
        "no such file": (["--data", tmp_path / "none.jsonl"], "cannot read the data file .*none.jsonl"),
        "torn line": (["--data", tmp_path / "torn.jsonl"], "torn.jsonl, line 2: not valid JSON"),
        "not an object": (["--data", tmp_path / "list.jsonl"], "list.jsonl, line 1: a row must be an object"),
        "no rows": (["--data", tmp_path / "nothing.jsonl"], "nothing.jsonl holds no rows"),
        "no final answer": (["--data", tmp_path / "no_answer.jsonl"], "no_answer.jsonl, line 3: no #### marker"),
        "answer of words": (["--data", tmp_path / "words.jsonl"], "words.jsonl, line 1: .*must be a number.*many"),
        "missing field": (["--data", tmp_path / "field.jsonl"], "field.jsonl, line 1: .*'question' and 'answer'"),
        "nothing to hold out": (["--data", tmp_path / "one.jsonl"], "one.jsonl has 1 row: at least 2"),
        "all too long": (["--max-prompt-tokens", 3], "all are longer than --max-prompt-tokens 3"),
        "folder without a model": (["--model", tmp_path / "folder"], "folder does not hold a model"),
        "broken model": (["--model", tmp_path / "broken"], "broken' is neither a local folder with a model nor"),
        "a method of no name": (["--method", "ppo"], "--method: invalid choice: 'ppo'"),
        "unknown flag": (["--group", "4"], "unrecognized arguments: --group 4"),
        "not a number": (["--lr", "fast"], "--lr: invalid float value: 'fast'"),
        "negative rate": (["--lr", -1], "--lr: must be positive"),
        "no steps": (["--steps", 0], "--steps: must be at least 1"),
        "negative seed": (["--seed", -1], "--seed: must be 0 or more"),
        "no rollouts": (["--group-size", 0], "group_size must be an integer of at least 1"),
        "negative beta": (["--beta", -1], "beta must be 0 or positive"),
        "temperature 0": (["--temperature", 0], "temperature must be positive"),
        "infinite gamma": (["--gamma", "inf"], "gamma must be a number from -1e6 to 1e6"),
        "offload without ranks": (["--offload-optimizer"], "--offload-optimizer: .*torchrun"),
        "grpo with branches": (["--method", "grpo", "--branches", 8], "--method grpo is K = 0, got 8"),
        "one branch": (["--branches", 1], "--branches: one branch has no siblings"),
        "one rollout": (["--method", "grpo", "--branches", 0, "--group-size", 1],
                        "--group-size: one rollout has no others"),
        "deep without branches": (["--branches", 0], "K = 0 is GRPO, ask for it with --method grpo"),
        "output is a file": (["--out", tmp_path / "file"], "file is a file"),
        "output is not empty": (["--out", tmp_path / "broken"], "broken already holds a run"),
        "output has something in it": (["--out", tmp_path], "is not empty: choose another --out"),
        "resume from nothing": (["--resume", tmp_path / "folder"], "folder does not hold a run"),
        "validation without a test set": (["--val-rows", 8], "--val-rows: only with --eval-data"),
        "selection without a test set": (["--select-on-test"], "--select-on-test: only with --eval-data"),
        "more to hold out than there is": (["--data", tmp_path / "three.jsonl", "--eval-data", tmp_path / "three.jsonl",
                                            "--val-rows", 256], "256 of the 3 training rows are to be held out"),
        "no validation left": (["--data", tmp_path / "long_last.jsonl", "--eval-data", tmp_path / "three.jsonl",
                                "--val-rows", 1, "--max-prompt-tokens", 14], "all are longer than"),
    }


@pytest.mark.parametrize("case", bad_inputs(Path(__import__("tempfile").mkdtemp())))
def test_bad_input_is_one_clear_line(case, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    flags, message = bad_inputs(tmp_path)[case]
    out = tmp_path / "run"
    before = sorted(tmp_path.rglob("*"))
    assert train(*FAST, "--steps", 1, "--out", out, *flags) == 2
    err = capsys.readouterr().err
    line = [text for text in err.splitlines() if text.startswith("error:")]
    assert len(line) == 1 and re.search(message, line[0]), err
    assert "Traceback" not in err and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("flags, message", [
    (["--lr", "0.5"], "--lr: the run that goes on has 0.0001, not 0.5"), (["--out", "elsewhere"], "--out: the run"),
    (["--stapo"], "--stapo: the run that goes on has False, not True"), (["--max-hours", -1], "--max-hours: must be")])
def test_a_resumed_run_keeps_its_settings(flags, message, short_run, capsys):
    before = {p: p.stat().st_mtime_ns for p in short_run.rglob("*")}
    assert train("--resume", short_run, *flags) == 2
    assert message in capsys.readouterr().err and {p: p.stat().st_mtime_ns for p in short_run.rglob("*")} == before


def test_full_memory_is_one_line_that_says_what_to_lower(tmp_path, capsys, monkeypatch):
    def full(run, start):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nand more")

    monkeypatch.setattr(train_gsm8k, "train", full)
    assert train(*FAST, "--steps", 1, "--micro-batch-tokens", 777, "--out", tmp_path / "run") == 1
    line, = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error:")]
    assert "Tried to allocate 20.00 GiB. Lower --micro-batch-tokens (it is 777)" in line
    assert f"--resume {tmp_path / 'run'}" in line


def test_full_memory_before_the_first_step_is_one_line(tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nand more")

    monkeypatch.setattr(train_gsm8k, "place", full)
    assert train(*FAST, "--steps", 1, "--out", tmp_path / "run") == 1
    line, = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error:")]
    assert "Tried to allocate 20.00 GiB. --dry-run says what fits" in line and not (tmp_path / "run").exists()


def test_an_output_directory_that_holds_a_run_is_left_alone(short_run, capsys):
    before = {p: p.stat().st_mtime_ns for p in short_run.rglob("*")}
    assert train(*FAST, "--steps", 1, "--out", short_run) == 2
    assert f"--resume {short_run}" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in short_run.rglob("*")} == before


def test_a_run_directory_that_another_process_has_is_left_alone(short_run, tmp_path, capsys, monkeypatch):
    """The other process may be one that nobody sees any more, after a lost connection."""
    with owned(short_run):
        before = {p: p.stat().st_mtime_ns for p in short_run.rglob("*")}
        assert train("--resume", short_run, "--steps", 4) == 2
        assert f"another process writes into {short_run}" in capsys.readouterr().err
        assert {p: p.stat().st_mtime_ns for p in short_run.rglob("*")} == before

    def begun_meanwhile(args):
        args.out.mkdir()
        (args.out / "config.json").touch()
        return run

    args = parse_args([*SHORT, "--out", str(tmp_path / "run")])
    run = train_gsm8k.prepare(args)                                # it is still free
    monkeypatch.setattr(train_gsm8k, "prepare", begun_meanwhile)
    assert train(*SHORT, "--out", tmp_path / "run") == 2
    assert "already holds a run" in capsys.readouterr().err


# ---- questions and prompts of a run that goes on ----

def tiny_rows(n):
    return [json.dumps(row) for row in tasks.lock.make_rows(tasks.lock.LOCKS["tiny"], n, seed=3)]


@pytest.fixture
def own_data(tmp_path):
    """Flags of a short run on files of 20 training and 6 evaluation questions."""
    (tmp_path / "train.jsonl").write_text("\n".join(tiny_rows(20)))
    (tmp_path / "test.jsonl").write_text("\n".join(tiny_rows(26)[20:]))
    return [*SHORT, "--data", tmp_path / "train.jsonl", "--eval-data", tmp_path / "test.jsonl", "--val-rows", 5]


@pytest.mark.parametrize("file, name, n", [("train", "training", 15), ("test", "evaluation", 6)])
def test_a_data_file_that_was_replaced_is_named_when_the_run_goes_on(file, name, n, own_data, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(*own_data, "--steps", 1, "--out", out) == 0
    path = tmp_path / f"{file}.jsonl"
    rows = path.read_text().splitlines()
    path.write_text("\n".join([*rows[:-1], rows[0]]))
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    assert train("--resume", out, "--steps", 2) == 2
    assert re.search(f"run began with other {name} questions \\({n} then, {n} now\\)", capsys.readouterr().err)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()} == before
    path.write_text("\n".join(rows))
    assert train("--resume", out, "--steps", 2) == 0


def test_a_run_goes_on_where_its_model_and_its_data_have_moved(own_data, tmp_path, capsys):
    """They must be the same ones: checksums say so. A run that began with another reward is refused."""
    load_model(str(ROOT / "assets" / "tiny"))[0].save_pretrained(tmp_path / "model")
    load_model(str(ROOT / "assets" / "tiny"))[1].save_pretrained(tmp_path / "model")
    out = tmp_path / "run"
    assert train(*own_data, "--model", tmp_path / "model", "--steps", 1, "--out", out) == 0
    moved = []
    for flag, name in (("--model", "model"), ("--data", "train.jsonl"), ("--eval-data", "test.jsonl")):
        moved += [flag, (tmp_path / name).rename(tmp_path / f"moved-{name}")]
    assert train("--resume", out, "--steps", 2, *moved) == 0
    assert train("--resume", out, "--steps", 3) == 0                # from where they are now
    about = json.loads((out / "config.json").read_text())
    about["start"]["reward"] = "my_reward.reward"
    (out / "config.json").write_text(json.dumps(about))
    capsys.readouterr()
    assert train("--resume", out, "--steps", 4) == 2
    assert "the reward was my_reward.reward then and is trainer.policy.Policy.reward now" in capsys.readouterr().err


def test_a_bad_reward_in_the_middle_of_a_run_is_one_line(tmp_path, monkeypatch, capsys):
    rewards = itertools.chain([0.0] * 20, itertools.repeat(None))
    monkeypatch.setattr(Policy, "reward", lambda self, question, response: next(rewards))
    assert train(*SHORT, "--eval-every", 0, "--steps", 3, "--out", tmp_path / "run") == 1
    line, = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("error: a reward must be a number, ") and f"is a new run: remove {tmp_path}" in line


def test_words_that_the_tokenizer_does_not_know_are_said(tmp_path, capsys):
    """The tokenizer of the embedded task knows no word but its own, and the logs show the question as it was."""
    rows = [{"question": text, "answer": "#### 4"} for text in ("R+5", "two and two", "R+5", "L+2")]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = load_model(str(ROOT / "assets" / "tiny"))[1]
    args = parse_args([*map(str, SHORT), "--data", str(data)])
    train_gsm8k.encode_questions(args, (rows, rows, []), tokenizer)
    said = capsys.readouterr().out
    assert "no token for a part of 1 of 4 training prompts: the model sees <unk> there" in said
    train_gsm8k.encode_questions(args, (rows[:1], rows[:1], []), tokenizer)
    assert "no token" not in capsys.readouterr().out


def test_a_longer_test_set_than_eval_rows_is_said_to_be_cut(own_data, capsys):
    args = parse_args([*map(str, own_data), "--eval-rows", "4"])
    train_rows, test, val = train_gsm8k.load_questions(args)
    assert (len(train_rows), len(test), len(val)) == (15, 4, 5)
    assert "evaluations have the first 4 of 6 rows of " in capsys.readouterr().out


@pytest.mark.parametrize("change", ["weights", "stop_ids"])
def test_a_starting_model_that_was_replaced_is_named_when_the_run_goes_on(change, tmp_path, capsys):
    """It is the reference of the KL term, and its stop ids end every response."""
    model, tokenizer = load_model(str(ROOT / "assets" / "tiny"))
    tokenizer.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    out = tmp_path / "run"
    assert train(*SHORT, "--model", tmp_path / "model", "--steps", 1, "--out", out) == 0
    if change == "weights":
        model.lm_head.weight.data *= 1.05
    else:
        model.generation_config.eos_token_id = [1, 7]
    model.save_pretrained(tmp_path / "model")
    assert train("--resume", out, "--steps", 2) == 2
    assert f"{change} of the starting model was" in capsys.readouterr().err


def test_a_date_in_the_chat_template_is_that_of_the_first_day(tmp_path, capsys, monkeypatch):
    class Day(date):
        now = date(2024, 2, 29)

        @classmethod
        def today(cls):
            return cls.now

    model, tokenizer = load_model(str(ROOT / "assets" / "tiny"))
    model.save_pretrained(tmp_path / "model")
    tokenizer.chat_template = "{{ strftime_now('%d') }}" + tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(train_gsm8k.datetime, "date", Day)
    out = tmp_path / "run"
    assert train(*SHORT, "--model", tmp_path / "model", "--steps", 1, "--out", out) == 0
    assert "the chat template asks for the date: it is 2024-02-29" in capsys.readouterr().out
    Day.now = date(2024, 3, 1)
    assert train("--resume", out, "--steps", 2) == 0
    assert json.loads((out / "config.json").read_text())["date"] == "2024-02-29"
    question = tasks.lock.make_rows(tasks.lock.LOCKS["tiny"], 1, seed=0)[0]["question"]
    in_checkpoint = chat_prompt(AutoTokenizer.from_pretrained(out / "checkpoints" / "step_2"), question)
    assert in_checkpoint == tokenizer.encode("29") + chat_prompt(load(ROOT / "assets" / "tiny")[1], question)


def test_long_questions_are_named_counted_and_skipped(tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [LONG_ROW, GOOD_ROW, GOOD_ROW, GOOD_ROW]))
    assert train(*FAST, "--data", data, "--steps", 1, "--max-prompt-tokens", 14, "--out", tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert "skipped, longer than 14 prompt tokens: 'The dials show 37.\\n(a) L+3\\n(b) R+1" in out
    assert "skipped 1 of 2 training and 0 of 2 evaluation questions" in out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["skipped_questions"] == 1


def test_a_non_finite_gradient_leaves_the_last_good_state(tmp_path, capsys, monkeypatch):
    good, bad, calls = tmp_path / "good", tmp_path / "bad", []
    flags = [*SHORT, "--eval-every", 0]                            # nothing is saved before the end
    assert train(*flags, "--steps", 2, "--out", good) == 0
    clip = torch.nn.utils.clip_grad_norm_

    def explode_late(parameters, *args):
        calls.append(1)
        return clip(parameters, *args) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", explode_late)
    assert train(*flags, "--steps", 5, "--out", bad) == 1
    err = capsys.readouterr().err
    assert "stopped at step 3: loss" in err and "gradient norm nan" in err and "Traceback" not in err
    first, second = weights(good, 2), weights(bad, 2)
    assert all(torch.equal(p, second[name]) for name, p in first.items())
    assert [row["step"] for row in read(bad)] == [1, 2]
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    assert train("--resume", bad, "--steps", 3) == 0               # and goes on from there


def test_a_non_finite_later_update_on_a_batch_saves_nothing(tmp_path, capsys, monkeypatch):
    """After the first of two updates the weights are those of no step's end."""
    out, calls = tmp_path / "run", []
    clip = torch.nn.utils.clip_grad_norm_

    def explode_in_between(parameters, *args):
        calls.append(1)
        return clip(parameters, *args) * (float("nan") if len(calls) == 6 else 1)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", explode_in_between)
    flags = [*SHORT, "--updates", 2, "--eval-every", 0, "--save-every", 1]
    assert train(*flags, "--steps", 5, "--out", out) == 1
    assert "stopped at step 3: loss" in capsys.readouterr().err
    assert [p.name for p in sorted((out / "checkpoints").iterdir())] == ["step_1", "step_2"]
    unsaved = tmp_path / "unsaved"
    calls.clear()
    assert train(*flags[:-2], "--steps", 5, "--out", unsaved) == 1
    assert not (unsaved / "checkpoints").exists()                  # not "step_2" with the weights of half a step 3
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    assert train("--resume", out, "--steps", 3) == 0 and train("--resume", unsaved, "--steps", 3) == 0
    assert all(torch.equal(p, q) for p, q in zip(weights(out, 3).values(), weights(unsaved, 3).values()))


def test_weights_that_an_update_made_infinite_are_neither_evaluated_nor_saved(tmp_path, capsys, monkeypatch):
    step, calls = torch.optim.AdamW.step, []

    def explode(optimizer, *args):
        step(optimizer, *args)
        calls.append(1)
        if len(calls) == 2:
            optimizer.param_groups[0]["params"][0].data[0, 0] = float("inf")

    monkeypatch.setattr(torch.optim.AdamW, "step", explode)
    out = tmp_path / "run"
    assert train(*SHORT, "--steps", 4, "--save-every", 1, "--eval-every", 1, "--out", out) == 1
    err = capsys.readouterr().err
    assert "stopped at step 2: the update made weights that are not finite" in err and "Traceback" not in err
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_1"]
    assert [row["step"] for row in read(out)] == [0, 1]


def test_logits_that_are_not_finite_in_an_evaluation_end_the_run_in_one_line(tmp_path, capsys, monkeypatch):
    """The weights are finite, but a greedy answer cannot be drawn. The step is not logged, and no state is saved."""
    evaluate, calls = train_gsm8k.evaluate, []

    def broken(run):
        calls.append(run.step)
        if run.step == 2:
            raise FloatingPointError("the policy's logits are not finite")
        return evaluate(run)

    monkeypatch.setattr(train_gsm8k, "evaluate", broken)
    out = tmp_path / "run"
    assert train(*SHORT, "--steps", 4, "--save-every", 1, "--eval-every", 1, "--out", out) == 1
    err = capsys.readouterr().err
    assert "stopped at step 2: the policy's logits are not finite. " in err and "Traceback" not in err
    assert f"--model {out / 'checkpoints' / 'step_1'} it goes on from the last good weights" in err
    assert calls == [0, 1, 2] and [row["step"] for row in read(out)] == [0, 1]
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_1"]


def test_an_evaluation_in_parts_gives_what_it_gives_as_a_whole(tmp_path, monkeypatch):
    """With 16 at a time, 40 questions are drawn as 16, 16 and 8."""
    sizes = []

    def watched(model, prefixes, ks, **options):
        sizes.append((sum(ks), options["temperature"]))
        return sample(model, prefixes, ks, **options)

    monkeypatch.setattr(train_gsm8k, "choose_sampler", lambda model: watched)
    monkeypatch.setattr(train_gsm8k, "evaluated_at_once", lambda args: 16)
    flags = [*SHORT, "--steps", 1, "--eval-rows", 40, "--eval-every", 1]
    assert train(*flags, "--out", tmp_path / "parts") == 0
    assert [n for n, temperature in sizes if temperature == 0] == [16, 16, 8] * 2
    monkeypatch.setattr(train_gsm8k, "evaluated_at_once", lambda args: 10**6)
    assert train(*flags, "--out", tmp_path / "whole") == 0
    assert (tmp_path / "parts" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_a_generation_config_that_cannot_be_saved_does_not_end_the_run(tmp_path, capsys, monkeypatch):
    """transformers 5.17 to 5.22 loads a temperature without do_sample, and refuses to save it."""
    load(ROOT / "assets" / "tiny")[0].save_pretrained(tmp_path / "model")
    load(ROOT / "assets" / "tiny")[1].save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_sample": False, "temperature": 0.9}))
    save = GenerationConfig.save_pretrained

    def save_as_older_versions(self, *args, **kwargs):
        self.validate(strict=True)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(GenerationConfig, "save_pretrained", save_as_older_versions)
    out = tmp_path / "run"
    assert train(*SHORT, "--model", tmp_path / "model", "--steps", 1, "--out", out) == 0
    assert "checkpoints leave out temperature" in capsys.readouterr().out
    assert train("--resume", out, "--steps", 2) == 0
    saved = json.loads((out / "checkpoints" / "step_2" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == json.loads(path.read_text())["eos_token_id"] and "temperature" not in saved


def test_a_backend_that_is_not_there_does_not_matter():
    """A shell that was started from a notebook has such a one in its environment."""
    modules = [f.stem for f in (ROOT / "experiments").glob("*.py")]
    own = [path for folder in ("experiments", "trainer", ".") for path in (ROOT / folder).glob("*.py")
           if re.search(r"^(import|from) matplotlib", path.read_text(), re.M)]
    assert [path.name for path in own] == ["plot.py"] and "figures" in modules      # which the others import it from
    subprocess.run([sys.executable, "-c", "import experiments.figures"], cwd=ROOT, check=True,
                   env=os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"})


def test_a_policy_that_blew_up_is_named_before_it_is_sampled(tmp_path, capsys):
    flags = [*FAST, "--steps", 4, "--lr", "1e30", "--eval-every", 0]
    assert train(*flags, "--out", tmp_path / "run") == 1
    err = capsys.readouterr().err
    assert re.search(r"error: stopped at step \d", err) and "smaller --lr" in err and "Traceback" not in err


# ---- reading a run ----

def test_every_pivot_of_a_run_is_in_pivots_csv(short_run):
    """One line per fork, whatever the evaluations: together they give the metrics of each step."""
    header, *lines = (short_run / "pivots.csv").read_text().splitlines()
    assert header == "step,response_tokens,pivot,depth,right_branches,branches,question_rate"
    rows = [[float(x) for x in line.split(",")] for line in lines]
    for metrics in read(short_run)[1:]:
        mine = [row[1:] for row in rows if row[0] == metrics["step"]]
        assert len(mine) == metrics["pivots"]
        assert sum(depth for *_, depth, _, _, _ in mine) / len(mine) == pytest.approx(metrics["pivot_depth"], abs=1e-4)
        assert sum(right > 0 for *_, right, _, _ in mine) / len(mine) == pytest.approx(metrics["recovered"])
        assert all(pivot < tokens and k == 4 and 0 <= rate < 1 for tokens, pivot, _, _, k, rate in mine)


def test_when_nothing_is_right_a_run_says_what_the_responses_look_like(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Policy, "reward", lambda self, question, response: 0.0)
    texts = itertools.cycle([r"so \boxed{4}", "#### 18", "it is 4 then 5", "nothing"])
    monkeypatch.setattr(Policy, "text", lambda self, ids: next(texts) if len(ids) > 2 else "")
    rows = [{"question": f"2 + 2? {i}", "answer": "#### 4"} for i in range(8)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [*FAST, "--data", data, "--eval-every", 0, "--steps", 3, "--out", tmp_path / "run"]
    assert train(*flags) == 0
    line, = [line for line in capsys.readouterr().out.splitlines() if "no response of the first two steps" in line]
    for said in ("0 % of them were cut off", "25 % contain ####", "25 % a box", "in 50 % some number",
                 "0 % with --answer hash", "25 % with --answer last", "25 % with --answer boxed"):
        assert said in line
    samples = read(tmp_path / "run", "samples.jsonl")
    assert {line["step"] for line in samples} == {1, 3}                  # although nothing is evaluated


def test_what_nothing_right_means_is_read_from_the_answer_tags_of_the_template_r1():
    """The same text is right by the last box in the form r1, and only there, because no box is written in it."""
    policy = SimpleNamespace(stop=[2], text=lambda ids: "I guess 5 </think> <answer> 4 </answer>")
    groups = {t: Group([1], [Trajectory([2], 0.0)]) for t in ("r1", "chat")}
    found = {t: why_nothing_is_right(SimpleNamespace(policy=policy), [(Question("2 + 2?", "4", [1], template=t), g)])
             for t, g in groups.items()}
    assert "100 % with --answer boxed" in found["r1"] and ", 0 % with --answer boxed" in found["chat"]


def test_only_a_box_is_tried_on_answers_that_are_no_numbers():
    policy = SimpleNamespace(stop=[2], text=lambda ids: r"so \boxed{\frac12}")
    asked = [(Question("1 / 2?", r"\frac{1}{2}", [1], "boxed"), Group([1], [Trajectory([5], 0.0)]))]
    said = why_nothing_is_right(SimpleNamespace(policy=policy), asked)
    assert said.endswith("these would be right: 100 % with --answer boxed") and "100 % of them were cut off" in said


def test_the_end_of_a_run_reports_a_mean_that_is_no_maximum(tmp_path, monkeypatch, capsys):
    accuracies = iter([0.5, 0.9, 0.1, 0.2, 0.4])
    evaluate = train_gsm8k.evaluate

    def fixed(run):
        metrics, timing = evaluate(run)
        return metrics | {"eval_accuracy": next(accuracies)}, timing

    monkeypatch.setattr(train_gsm8k, "evaluate", fixed)
    assert train(*FAST, "--steps", 4, "--eval-every", 1, "--eval-rows", 4, "--out", tmp_path / "run") == 0
    assert "over the last 1 of 5 evaluations is 0.400" in capsys.readouterr().out


# ---- the sampler and the update ----

def test_a_sampler_that_is_not_the_policy_is_named_once(tmp_path, capsys, monkeypatch):
    step, gaps = train_gsm8k.train_step, iter([None, 0.02, 0.04, 0.05])

    def with_gap(run):
        metrics, *others = step(run)
        return metrics | {"sampler_gap": next(gaps)}, *others

    monkeypatch.setattr(train_gsm8k, "train_step", with_gap)
    assert train(*SHORT, "--steps", 4, "--out", tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert out.count("what is sampled is not what is trained") == 1 and "by 0.040 nats" in out


def test_the_seconds_of_compilation_are_those_of_the_step(tmp_path, monkeypatch):
    run, method = prepared(tmp_path), train_gsm8k.METHODS["deep_grpo"]

    def update(*args, **options):
        stopwatch.seconds += 5.0
        return method.update(*args, **options)

    monkeypatch.setattr(stopwatch, "seconds", 100.0)
    monkeypatch.setitem(train_gsm8k.METHODS, "deep_grpo", replace(method, update=update))
    assert [train_gsm8k.train_step(run)[1]["seconds_compile"] for _ in range(2)] == [5.0, 5.0]


@pytest.mark.parametrize("flag", ["--compile", "--no-compile"])
@pytest.mark.parametrize("loop", [resample, decoding])
def test_what_is_compiled_of_a_run(tmp_path, monkeypatch, capsys, flag, loop):
    monkeypatch.setattr(compiling, "compiled", lambda function: function)
    monkeypatch.setattr(train_gsm8k, "choose_sampler", lambda model: loop.sample)
    run, method, seen = prepared(tmp_path, "--beta", "0.1", flag), train_gsm8k.METHODS["deep_grpo"], []

    def update(*args, **options):
        seen.extend("forward" in model.model.layers[-1].__dict__ for model in (run.policy.model, run.ref_model))
        return method.update(*args, **options)

    monkeypatch.setitem(train_gsm8k.METHODS, "deep_grpo", replace(method, update=update))
    before = torch.get_rng_state()
    train_gsm8k.train_step(run)
    on, out, sampler = flag == "--compile", capsys.readouterr().out, run.policy.sampler
    assert seen == [on, on] and run.score is (compiled_rows if on else plain_rows)
    assert "forward" not in run.policy.model.model.layers[-1].__dict__
    assert ("the update: compiled in" in out) == on and ("sampling: compiled in" in out) == (on and loop is decoding)
    if on and loop is decoding:
        assert sampler.func is decoding.sample and sampler.keywords == {"compile_layers": True}
    else:
        assert sampler is loop.sample
    torch.manual_seed(run.args.seed)
    assert torch.equal(before, torch.get_rng_state())                    # compilation has drawn nothing of the run's


def test_what_cannot_be_compiled_is_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_gsm8k, "choose_sampler", lambda model: decoding.sample)
    monkeypatch.setattr(compiling, "warm_up", lambda *args: "no compiler")
    monkeypatch.setattr(decoding, "warm_up", lambda *args: "none either")
    run, out = prepared(tmp_path, "--compile"), capsys.readouterr().out
    assert run.score is plain_rows and run.policy.sampler is resample.sample         # not even the draw
    assert "the update: not compiled: no compiler" in out and "sampling: not compiled: none either" in out
    assert "the draw: not compiled: none either" in out
    monkeypatch.setattr(decoding, "warm_up", lambda model, layers: "no layers" if layers else None)
    for flag in ("--compile", "--no-compile"):
        assert prepared(tmp_path, flag).policy.sampler is decoding.sample


def test_the_best_checkpoint_is_written_without_save_every(tmp_path, monkeypatch):
    def evaluate(run):
        if run.step == 1:
            run.best_step, run.best_accuracy = 1, 0.9
        return {"eval_accuracy": 0.9 if run.step == 1 else 0.1}, {"seconds_eval": 0.0}

    monkeypatch.setattr(train_gsm8k, "evaluate", evaluate)
    assert train(*SHORT, "--steps", 3, "--eval-every", 1, "--out", tmp_path / "run") == 0        # no --save-every
    assert [step for step, _ in find_checkpoints(tmp_path / "run")] == [1, 3]


def test_a_run_that_is_stopped_is_saved_without_save_every(tmp_path, monkeypatch):
    why = iter([None, None, "SIGTERM"])                      # before steps 1, 2 and 3
    monkeypatch.setattr(train_gsm8k, "ended_by", lambda *_: next(why))
    assert train(*SHORT, "--eval-every", 0, "--steps", 5, "--out", tmp_path / "run") == 1        # no --save-every
    assert [step for step, _ in find_checkpoints(tmp_path / "run")] == [2]


def test_only_tokens_that_had_a_weight_are_silenced():
    def doubles(values):
        return torch.tensor(values, dtype=torch.float64)

    args = SimpleNamespace(method="grpo", micro_batch_tokens=None, prob_mask=None, maspo=False, stapo=True)
    silenced = []
    options = train_gsm8k.loss_options(SimpleNamespace(args=args, score=None), silenced)
    table = doubles([[1.0, 0.1, 0, 1, 0]] * 2 + [[1.0, 0.0, 0, 1, 0]])   # the third has no weight in any case
    options["reweigh"](table, doubles([0.001] * 3).log(), doubles([1.0, 2.0, 1.0]))
    assert silenced == [1]


@pytest.mark.parametrize("seed", [0, 1])
def test_evaluation_questions_are_not_among_the_training_questions(seed):
    args = parse_args(["--preset", "tiny", "--seed", str(seed)])
    rows, evaluation, _ = train_gsm8k.load_questions(args)
    assert evaluation == tasks.lock.make_rows(tasks.lock.LOCKS["tiny"], args.eval_rows, 0)       # for every --seed
    texts = {row["question"] for row in rows}
    assert sum(row["question"] in texts for row in evaluation) < 0.1 * len(evaluation)


def test_the_last_good_state_has_the_queue_of_its_own_step(tmp_path, monkeypatch):
    flags = [*SHORT, "--eval-every", 0, "--lag", 1]
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def explode_late(parameters, *args):
        calls.append(1)
        return clip(parameters, *args) * (float("nan") if len(calls) == 3 else 1)

    assert train(*flags, "--steps", 2, "--out", tmp_path / "good") == 0
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", explode_late)
    assert train(*flags, "--steps", 5, "--out", tmp_path / "bad") == 1
    good, bad = (torch.load(tmp_path / name / "checkpoints" / "step_2" / "trainer.pt", weights_only=False)
                 for name in ("good", "bad"))
    assert len(good["waiting"]) == 1 and bad["waiting"] == good["waiting"]       # not those of step 3


def test_a_resumed_run_asks_the_next_questions_where_a_step_has_several_batches(tmp_path, monkeypatch):
    flags = [*SHORT, "--questions", 1, "--eval-every", 0, "--step-tokens", 400]      # several batches in a step
    assert train(*flags, "--steps", 2, "--out", tmp_path / "whole") == 0
    assert train(*flags, "--steps", 1, "--out", tmp_path / "halves") == 0
    assert train("--resume", tmp_path / "halves", "--steps", 2) == 0
    rows = read(tmp_path / "whole")
    assert rows[0]["questions"] > 1 and rows == read(tmp_path / "halves")


def test_pivots_and_training_rows_follow_the_seed(tmp_path):
    assert prepared(tmp_path, "--seed", "7").pivot_rng.random() == np.random.default_rng(7).random()
    rows = [train_gsm8k.load_questions(parse_args([*FAST, "--seed", seed]))[0] for seed in "01"]
    assert rows[0] != rows[1]


def test_what_a_step_drew_too_much_the_next_ones_draw_less(tmp_path):
    """A question has 120 tokens, so 3, 5, 8 and 10 of them reach 300, 600, 900 and 1,200 tokens."""
    run = prepared(tmp_path, "--method", "grpo", "--branches", "0", "--questions", "1", "--beta", "0",
                   "--step-tokens", "300")

    def draw(prompts, k, *_):
        run.policy.generated += 30 * k * len(prompts)
        return [[[5] * 30] * k for _ in prompts]

    run.policy.sample, run.policy.rewards = draw, lambda pairs: [0.0] * len(pairs)
    assert [train_gsm8k.train_step(run)[0]["questions"] for _ in range(4)] == [3, 2, 3, 2]


def test_a_run_is_evaluated_after_its_last_step(tmp_path):
    assert train(*SHORT, "--steps", 3, "--eval-every", 2, "--out", tmp_path / "run") == 0
    assert [row["step"] for row in read(tmp_path / "run") if "eval_accuracy" in row] == [0, 2, 3]


def test_flags_of_prompts_and_of_the_update_get_there(tmp_path):
    run = prepared(tmp_path, "--template", "no", "--answer", "last", "--micro-batch-tokens", "60")
    asked = run.questions + run.eval_questions
    assert {q.template for q in asked} == {"no"} and {q.answer for q in asked} == {"last"}
    run.score = object()
    options = train_gsm8k.loss_options(run, [])
    assert options["micro_batch_tokens"] == 60 and options["ranks"].score_rows is run.score


def test_max_hours_reckons_with_the_longest_step_and_checkpoint(tmp_path, monkeypatch):
    seen, taking = [], clock(monkeypatch)
    method = train_gsm8k.METHODS["deep_grpo"]
    monkeypatch.setitem(train_gsm8k.METHODS, "deep_grpo", replace(method, update=taking(10, method.update)))
    monkeypatch.setattr(train_gsm8k, "save_run", taking(4, train_gsm8k.save_run))
    monkeypatch.setattr(train_gsm8k, "ended_by", lambda args, received, start, longest: seen.append(longest))
    assert train(*SHORT, "--steps", 3, "--save-every", 1, "--eval-every", 0, "--out", tmp_path / "run") == 0
    assert seen == [0, 14, 14]
