"""The training command: it learns, repeats itself, says what is wrong; and GSM8K's own rows go through it."""
import argparse
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import tasks.lock
import train_gsm8k
from deep_grpo import Group, Trajectory, update
from grading import grade_gsm8k
from recoverability import Recoverability
from tasks import GSM8K_INSTRUCTION, chat_prompt

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
FAST = ["--preset", "tiny", "--questions", "2", "--group-size", "4", "--branches", "2", "--eval-rows", "8",
        "--eval-every", "2"]


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


def test_learns_the_tiny_task(tmp_path):
    """From under .2 to over .8 in the preset's 40 steps. (Seeds 0 to 5 end at .91 .95 .96 .99 .96 .89.)"""
    out = tmp_path / "run"
    assert train("--preset", "tiny", "--eval-every", 40, "--eval-rows", 64, "--out", out) == 0
    rows = read(out)
    assert [row["step"] for row in rows] == list(range(41))
    assert rows[0]["eval_accuracy"] < 0.2 and rows[-1]["eval_accuracy"] > 0.8
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "config.json", "metrics.jsonl", "samples.jsonl", "timing.jsonl", "checkpoints", "run.png"}
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["settings"]["gamma"] == 2.0 and saved["versions"]["torch"] == torch.__version__


def test_the_same_seed_gives_the_same_run(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        assert train(*FAST, "--steps", 2, "--seed", seed, "--out", tmp_path / name) == 0
    for log in ("metrics.jsonl", "samples.jsonl"):
        a, b, c = ((tmp_path / name / log).read_bytes() for name in "abc")
        assert a == b != c
    first, second = weights(tmp_path / "a", 2), weights(tmp_path / "b", 2)
    assert all(torch.equal(p, second[name]) for name, p in first.items())


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert train(*FAST, "--branches", 4, "--steps", 3, "--out", out, "--eval-every", 3, "--updates", 2) == 0
    return out


def test_metrics_of_the_run_by_hand(short_run):
    """Those that tests/test_deep_grpo.py does not recompute: totals, speed, the fit, the accuracy."""
    rows, clock = read(short_run), read(short_run, "timing.jsonl")
    total = 0
    for row, timing in zip(rows[1:], clock[1:]):
        total += row["generated_tokens"]
        seconds = sum(timing[f"seconds_{part}"] for part in ("rollout", "resample", "score", "update"))
        assert row["generated_total"] == total
        assert timing["tokens_per_second"] == pytest.approx(row["generated_tokens"] / seconds)
        assert row["sequences"] == 2 * 4 + 4 * row["pivots"] and row["pivots"] == round((1 - row["reward"]) * 8)
        assert timing["step"] == row["step"] and timing["peak_memory_gb"] > 0.1
        assert math.isfinite(row["loss"]) and row["grad_norm"] >= 0
    parts = torch.load(short_run / "checkpoints" / "step_3" / "trainer.pt", weights_only=False)
    again = Recoverability()
    for ratio, success in parts["recoverability"]["outcomes"]:
        again.observe(ratio, success)
    again.fit()
    assert len(again.outcomes) == sum(row["pivots"] for row in rows[1:])
    assert (rows[-1]["w"], rows[-1]["b"]) == (again.w, again.b)

    model, tokenizer = load(short_run / "checkpoints" / "step_3")
    right = 0                                                      # greedily, one token and one question at a time
    for row in tasks.lock.make_rows(tasks.lock.PRESETS["tiny"], 8, seed=0):
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
def test_the_best_checkpoint_is_the_one_of_the_validation_rows_unless_asked(flags, best, tmp_path, monkeypatch):
    for name, n in (("train", 8), ("test", 5)):
        rows = tasks.lock.make_rows(tasks.lock.PRESETS["tiny"], n, seed=3)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = prepared(tmp_path, "--data", str(tmp_path / "train.jsonl"), "--eval-data", str(tmp_path / "test.jsonl"),
                   "--val-rows", "4", *flags)
    assert (len(run.questions), len(run.eval_questions), len(run.val_questions)) == (4, 5, 4)
    right = {}                                       # step -> right answers of (evaluation, validation)
    tests, vals = ([q.text for q in part] for part in (run.eval_questions, run.val_questions))

    def rewards(pairs):
        assert [q.text for q, _ in pairs] == tests + vals
        n_test, n_val = right[run.step]
        return [float(i < n_test) for i in range(5)] + [float(i < n_val) for i in range(4)]

    run.rewards = rewards
    run.draw = lambda prompts, k, *, max_new_tokens, temperature: [[[1]] for _ in prompts]
    for run.step, right[run.step] in enumerate([(5, 4), (2, 1), (1, 3), (4, 2)]):     # the start is no checkpoint
        metrics, _ = train_gsm8k.evaluate(run)
        n_test, n_val = right[run.step]
        assert (metrics["eval_accuracy"], metrics["val_accuracy"]) == (n_test / 5, n_val / 4)
    assert run.best_step == best


def test_the_reference_is_the_start_and_the_policy_is_sampled_at_its_temperature(tmp_path, monkeypatch):
    temperatures, sample = [], train_gsm8k.sample
    monkeypatch.setattr(train_gsm8k, "sample", lambda *args, temperature, **more: temperatures.append(temperature)
                        or sample(*args, temperature=temperature, **more))
    run = prepared(tmp_path, "--temperature", "1.5", "--lr", "1e-3", "--beta", "0.1", "--branches", "4")
    run.rewards = lambda pairs: [float(i % 2) for i in range(len(pairs))]
    first, second = (train_gsm8k.train_step(run)[0] for _ in range(2))
    assert first["grad_norm"] > 0 and abs(first["kl"]) < 1e-6 < 1e-4 < second["kl"]
    assert set(temperatures) == {1.5} and len(temperatures) >= 4
    train_gsm8k.evaluate(run)
    assert temperatures[-1] == 0


def test_the_seconds_of_a_step_are_counted_once(tmp_path, monkeypatch):
    run, now = prepared(tmp_path, "--beta", "0"), [0.0]
    monkeypatch.setattr(train_gsm8k.time, "perf_counter", lambda: now[0])

    def taking(seconds, function):
        def slow(*args, **kwargs):
            now[0] += seconds
            return function(*args, **kwargs)
        return slow

    run.draw, run.rewards = taking(1, run.draw), taking(10, lambda pairs: [0.0 for _ in pairs])
    monkeypatch.setattr(train_gsm8k, "update", taking(100, train_gsm8k.update))
    _, timing, _, _ = train_gsm8k.train_step(run)
    assert [timing[f"seconds_{part}"] for part in ("rollout", "resample", "score", "update")] == [1, 1, 20, 100]


def test_samples_hold_text_pivots_and_branches(short_run):
    samples = read(short_run, "samples.jsonl")
    failed = [s for s in samples if s["reward"] == 0]
    assert failed and {s["step"] for s in samples} == {3}
    for s in failed:
        assert s["response"].startswith(s["prefix"]) and s["prefix"] != s["response"] and len(s["branches"]) == 4
        assert s["prefix"] == "" or s["prefix"].endswith(".\n")
        for branch in s["branches"]:
            assert branch["reward"] == float(grade_gsm8k(s["prefix"] + branch["text"], s["gold"]))


def test_an_unfinished_response_earns_nothing(tmp_path):
    args = train_gsm8k.parse_args([*FAST, "--out", str(tmp_path / "run")])
    run = train_gsm8k.prepare(args)
    right = run.tokenizer.encode("#### 42", add_special_tokens=False)
    question = run.questions[0]._replace(gold="42")
    assert run.reward(question, [*right, run.tokenizer.eos_token_id]) == 1.0
    assert run.reward(question, right) == 0.0
    assert run.reward(question._replace(gold="43"), [*right, run.tokenizer.eos_token_id]) == 0.0


@pytest.mark.parametrize("flags, times", [([], 1), (["--gradient-checkpointing"], 2)])
def test_gradient_checkpointing_computes_each_layer_again(flags, times, tmp_path):
    """The flag once did nothing: transformers checkpoints in training mode only, and the model was in eval mode."""
    run = train_gsm8k.prepare(train_gsm8k.parse_args([*FAST, *flags, "--beta", "0", "--out", str(tmp_path / "run")]))
    assert all(m.p == 0 for m in run.model.modules() if isinstance(m, torch.nn.Dropout))
    forwards, batches = [], []
    run.model.base_model.register_forward_hook(lambda *_: batches.append(1))
    run.model.base_model.layers[1].self_attn.register_forward_hook(lambda *_: forwards.append(1))
    groups = [Group([3, 4], [Trajectory([5, 6], 1.0), Trajectory([6, 7, 8], 0.0)])]
    run.draw([[3, 4]], 2, max_new_tokens=4)          # sampling leaves the mode as it was
    forwards.clear(), batches.clear()
    update(run.model, run.optimizer, groups, run.config, micro_batch_tokens=5)
    assert len(forwards) == times * len(batches) > 0


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
    run = argparse.Namespace(questions=list(range(7)), args=argparse.Namespace(questions=3, seed=0))
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
        "infinite gamma": (["--gamma", "inf"], "gamma must be a finite number"),
        "offload without ranks": (["--offload-optimizer"], "--offload-optimizer: .*torchrun"),
        "grpo with branches": (["--method", "grpo", "--branches", 8], "--method grpo is K = 0, got 8"),
        "deep without branches": (["--branches", 0], "K = 0 is GRPO, ask for it with --method grpo"),
        "output is a file": (["--out", tmp_path / "file"], "file already holds a run"),
        "resume from nothing": (["--resume", tmp_path / "folder"], "folder does not hold a run"),
        "validation without a test set": (["--val-rows", 8], "--val-rows: only with --eval-data"),
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


def test_an_output_directory_that_holds_a_run_is_left_alone(short_run, capsys):
    before = {p: p.stat().st_mtime_ns for p in short_run.rglob("*")}
    assert train(*FAST, "--steps", 1, "--out", short_run) == 2
    assert f"--resume {short_run}" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in short_run.rglob("*")} == before


def test_long_questions_are_named_counted_and_skipped(tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [GOOD_ROW, LONG_ROW, GOOD_ROW, GOOD_ROW]))
    assert train(*FAST, "--data", data, "--steps", 1, "--max-prompt-tokens", 14, "--out", tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert "skipped, longer than 14 prompt tokens: 'The dials show 37.\\n(a) L+3\\n(b) R+1" in out
    assert "skipped 1 of 2 training and 0 of 2 evaluation questions" in out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["skipped_questions"] == 1


def test_a_non_finite_gradient_leaves_the_last_good_state(tmp_path, capsys, monkeypatch):
    good, bad, calls = tmp_path / "good", tmp_path / "bad", []
    assert train(*FAST, "--steps", 2, "--out", good) == 0
    clip = torch.nn.utils.clip_grad_norm_

    def explode_late(parameters, *args):
        calls.append(1)
        return clip(parameters, *args) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", explode_late)
    assert train(*FAST, "--steps", 5, "--out", bad) == 1
    err = capsys.readouterr().err
    assert "stopped at step 3: loss" in err and "gradient norm nan" in err and "Traceback" not in err
    first, second = weights(good, 2), weights(bad, 2)
    assert all(torch.equal(p, second[name]) for name, p in first.items())
    assert [row["step"] for row in read(bad)] == [0, 1, 2]
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    assert train("--resume", bad, "--steps", 3) == 0               # and goes on from there


def test_a_policy_that_blew_up_is_named_before_it_is_sampled(tmp_path, capsys):
    flags = [*FAST, "--steps", 4, "--beta", 0, "--lr", "1e30", "--eval-every", 0]
    assert train(*flags, "--out", tmp_path / "run") == 1
    err = capsys.readouterr().err
    assert re.search(r"error: stopped at step \d", err) and "smaller --lr" in err and "Traceback" not in err


# ---- the command line ----

@pytest.mark.parametrize("gpu, preset, why", [(False, "tiny", "no GPU is here"), (True, "gsm8k", "a GPU is here")])
def test_without_flags_the_machine_decides_and_the_first_line_says_so(gpu, preset, why, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    args = train_gsm8k.parse_args([])
    first = capsys.readouterr().out.splitlines()[0]
    assert args.preset == preset and first.startswith(f"preset {preset}: {why}")


def test_the_gsm8k_preset_is_the_authors_script():
    args = train_gsm8k.parse_args(["--preset", "gsm8k"])
    expected = dict(questions=64, group_size=8, branches=8, gamma=2.0, lam=1.0, lr=1e-6, beta=1e-4, clip_low=0.2,
                    clip_high=0.2, temperature=1.0, max_prompt_tokens=512, max_new_tokens=768, eval_every=5, updates=1,
                    max_grad_norm=1.0, model="Qwen/Qwen2.5-0.5B-Instruct", data="gsm8k_train", eval_data="gsm8k",
                    eval_rows=1319, val_rows=256)
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize("flags, expected", [
    ("--data my.jsonl", (None, 0, 256)), ("--data my.jsonl --eval-data mine.jsonl", ("mine.jsonl", 256, 1319)),
    ("--data gsm8k_train", ("gsm8k", 256, 1319)), ("--data my.jsonl --eval-rows 50", (None, 0, 50))])
def test_data_of_your_own_is_not_evaluated_on_gsm8k(flags, expected):
    args = train_gsm8k.parse_args(["--preset", "gsm8k", *flags.split()])
    assert (args.eval_data, args.val_rows, args.eval_rows) == expected


def test_help_names_every_flag_and_the_command_can_be_typed():
    command = [sys.executable, "train_gsm8k.py", "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0
    for flag in ("preset", "method", "model", "data", "steps", "out", "seed", "resume", "save-every", "eval-every",
                 "budget-tokens", "gamma", "lam", "beta", "objective", "micro-batch-tokens"):
        assert f"--{flag} " in shown.stdout
