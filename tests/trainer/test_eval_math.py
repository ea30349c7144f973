"""The evaluation: its statistics against independent ones, and the same result however it was cut up."""
import itertools
import json
import re
import zlib
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import argmax_step_by_step
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import eval_math
import resample
import tasks.lock
from eval_math import PAPER, grade, main, make_batches, pass_at, wilson
from tasks import Question, chat_prompt
from trainer.session import owned

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
ROWS, STOP = 16, range(1, 71, 7)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random Llama with the embedded task's tokenizer; its answers differ in length and some never end."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tasks.lock.make_tokenizer()
    torch.manual_seed(3)
    LlamaForCausalLM(LlamaConfig(                    # every seventh token ends an answer
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, eos_token_id=list(STOP),
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data folder with a few questions of both kinds."""
    folder = tmp_path_factory.mktemp("data")
    long, short = tasks.lock.LOCKS["tiny"], tasks.lock.Lock((2, 2), 0, (1, 1))
    rows = tasks.lock.make_rows(long, ROWS // 2, seed=5) + tasks.lock.make_rows(short, ROWS // 2, seed=6)
    (folder / "gsm8k_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in eval_math.MATH_SETS:
        asked = [{"problem": row["question"], "answer": ["1", "2"]} for row in rows[:len(name)]]
        (folder / f"eval_{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    return folder


@pytest.fixture
def graders(monkeypatch):
    """Graders that find a third of all answers right, by checksum: a random model would have none."""
    def third(name):
        return lambda response, gold, **strict: (
            zlib.crc32(f"{name} {response} {gold} {strict}".encode()) % 3 == 0)

    for name in ("grade_gsm8k", "grade_last_number"):
        monkeypatch.setattr(eval_math, name, third(name))
    for answer, name in (("hash", "grade_gsm8k"), ("last", "grade_stated"), ("boxed", "grade_math")):
        monkeypatch.setitem(eval_math.GRADERS, answer, third(name))


def run(checkpoint, data, out, sets="gsm8k,amc", **flags):
    flags = {"model": checkpoint, "sets": sets, "data_dir": data, "out": out, "max_new_tokens": 12,
             "batch_tokens": 200} | flags
    return main([text for name, value in flags.items()
                 for text in (f"--{name.replace('_', '-')}", str(value))])


SAMPLED = dict(samples=3, temperature=1.5)


def lines_of(out):
    return [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("p, n, expected", [
    (0.5, 10, (0.236593, 0.763407)),
    (0.0, 10, (0.0, 0.277533)),                      # z^2/(n+z^2)
    (1.0, 30, (0.886485, 1.0)),                      # 1 - z^2/(n+z^2)
    (0.677, 1319, (0.651266, 0.701684))])
def test_wilson_by_hand(p, n, expected):
    assert wilson(p, n) == pytest.approx(expected, abs=2e-4)
    assert wilson(p, n)[0] >= -1e-12 and wilson(p, n)[1] <= 1 + 1e-12


def test_wilson_is_the_inverted_score_test():
    # Independent: the ends are where |p - q| = z sqrt(q (1 - q) / n), the roots of a quadratic in q.
    z = 1.959964
    for n in (1, 7, 30, 1319):
        for right in range(0, n + 1, max(1, n // 7)):
            p = right / n
            roots = np.roots([1 + z * z / n, -2 * p - z * z / n, p * p])
            assert wilson(p, n) == pytest.approx(sorted(roots.real), abs=1e-9)


def test_pass_at_by_enumeration():
    for k in range(1, 7):
        for c in range(k + 1):
            for j in range(1, k + 1):
                draws = list(itertools.combinations([True] * c + [False] * (k - c), j))
                assert pass_at(j, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize("sampling", [{}, SAMPLED])
def test_the_numbers_are_those_of_the_lines(checkpoint, data, tmp_path, graders, capsys, sampling):
    assert run(checkpoint, data, tmp_path / "out", **sampling) == 0
    results, lines = json.loads((tmp_path / "out" / "results.json").read_text()), lines_of(tmp_path / "out")
    k = sampling.get("samples", 1)
    keys = {(s, i, j) for s, n in (("gsm8k", ROWS), ("amc", 3)) for i in range(n) for j in range(k)}
    assert {(x["set"], x["row"], x["sample"]) for x in lines} == keys
    assert len(lines) == (ROWS + 3) * k and 0 < sum(x["finished"] for x in lines) < len(lines)
    for name, n in (("gsm8k", ROWS), ("amc", 3)):
        own, got = [x for x in lines if x["set"] == name], results["sets"][name]
        by_sample = sorted(own, key=lambda x: x["sample"])
        table = np.array([[x["correct"] for x in by_sample if x["row"] == i] for i in range(n)])
        assert got["n"] == n and table.shape == (n, k)
        assert got["accuracy"] == pytest.approx(table.mean())
        assert got["pass"]["1"] == pytest.approx(table.mean())
        assert got["pass"][str(k)] == pytest.approx(table.any(1).mean())
        assert got["interval"] == pytest.approx(wilson(table.mean(), n))
        assert got["tokens"] == pytest.approx(np.mean([x["tokens"] for x in own]))
        assert got["truncated"] == pytest.approx(np.mean([not x["finished"] for x in own]))
    assert 0 < results["sets"]["gsm8k"]["accuracy"] < 1
    gsm8k = [x for x in lines if x["set"] == "gsm8k"]
    for column in ("strict", "last_number"):
        assert results["sets"]["gsm8k"][column] == pytest.approx(np.mean([x[column] for x in gsm8k]))
    assert not any(x["correct"] or x["strict"] or x["last_number"] for x in gsm8k if not x["finished"])
    printed = capsys.readouterr().out
    assert printed.strip().endswith((tmp_path / "out" / "results.md").read_text().strip())
    assert f"| gsm8k | {ROWS} | {100 * results['sets']['gsm8k']['accuracy']:.1f} | " in printed
    assert results["math_mean"] is None and ("pass@3 %" in printed) == (k == 3)


def test_all_five_sets_have_a_mean_beside_the_papers(checkpoint, data, tmp_path, graders, capsys):
    assert run(checkpoint, data, tmp_path / "out", ",".join(eval_math.MATH_SETS)) == 0
    results, printed = json.loads((tmp_path / "out" / "results.json").read_text()), capsys.readouterr().out
    accuracies = [results["sets"][name]["accuracy"]
                  for name in ("aime24", "amc", "math500", "minerva", "olympiadbench")]
    assert results["math_mean"] == pytest.approx(sum(accuracies) / 5) and results["math_mean"] > 0
    cells = [f"{100 * x:.1f}" for x in [*accuracies, results["math_mean"]]]
    assert printed.strip().endswith(" | ".join(cells) + " |")
    assert "| DEEP-GRPO-1.5B | 26.7 | 50.6 | 75.2 | 27.2 | 36.7 | 43.3 |" in printed
    assert "TreeRL" not in printed
    for numbers in PAPER.values():
        if "gsm8k" not in numbers:
            mean = sum(numbers[s] for s in eval_math.MATH_SETS) / 5
            assert numbers["mean"] == pytest.approx(mean, abs=6e-4)


def files_of(out):
    names = ("answers.jsonl", "results.json", "results.md", "config.json")
    return [(out / name).read_bytes() for name in names]


@pytest.mark.parametrize("sampling", [{}, SAMPLED])
def test_interrupted_at_any_batch_it_ends_the_same(checkpoint, data, tmp_path, graders, monkeypatch, capsys,
                                                   sampling):
    assert run(checkpoint, data, tmp_path / "whole", **sampling) == 0
    calls = []

    def breaks_off(*args, **kwargs):
        calls.append((out / "answers.jsonl").stat().st_size)
        if len(calls) == at:
            raise error
        return resample.sample(*args, **kwargs)

    monkeypatch.setattr(eval_math, "choose_sampler", lambda model: breaks_off)
    at, error = 10 ** 9, None
    out = tmp_path / "count"
    run(checkpoint, data, out, **sampling)
    total = len(calls)
    assert len(set(calls)) == total                  # what is done is on disk before the next batch begins
    assert total >= 5 and files_of(tmp_path / "count") == files_of(tmp_path / "whole")
    errors = [(1, KeyboardInterrupt()), (total // 2, FloatingPointError("logits")), (total, OSError("full"))]
    for at, error in errors:                         # noqa: B007 (breaks_off reads both)
        calls.clear()
        out = tmp_path / f"broken-{at}"
        capsys.readouterr()
        assert run(checkpoint, data, out, **sampling) == 1
        captured = capsys.readouterr()
        assert "the same command goes on" in captured.err.splitlines()[-1]
        assert not (out / "results.json").exists()
        assert files_of(tmp_path / "whole")[0].startswith((out / "answers.jsonl").read_bytes())
        last, at = at == total, 10 ** 9
        calls.clear()
        assert run(checkpoint, data, out, **sampling) == 0
        assert files_of(out) == files_of(tmp_path / "whole")
        assert not last or len(calls) == 1           # only what was missing was made again


@pytest.mark.parametrize("sampling", [{}, SAMPLED])
def test_a_file_torn_at_any_byte_ends_the_same(checkpoint, data, tmp_path, graders, sampling):
    out = tmp_path / "out"
    assert run(checkpoint, data, out, **sampling) == 0
    whole = files_of(out)
    ends = [m.end() for m in re.finditer(b"\n", whole[0])]
    few = [ends[0] - 1, ends[len(ends) // 2] + 30, ends[-2]]
    for size in few if sampling else [*few, 0, 1, ends[0], ends[7], ends[-2] + 5, ends[-1] - 1, ends[-1]]:
        (out / "answers.jsonl").write_bytes(whole[0][:size])
        (out / "results.json").unlink()
        assert run(checkpoint, data, out, **sampling) == 0
        assert files_of(out) == whole
    torn = whole[0][:ends[3]] + b"\0\0\0\n" + whole[0][ends[3]:]                     # a block never written
    (out / "answers.jsonl").write_bytes(torn)
    assert run(checkpoint, data, out, **sampling) == 0 and files_of(out) == whole


def test_another_seed_gives_other_samples(checkpoint, data, tmp_path):
    answers = []
    for seed in (0, 1, 0):
        assert run(checkpoint, data, tmp_path / f"{len(answers)}", seed=seed, **SAMPLED) == 0
        answers.append(files_of(tmp_path / f"{len(answers)}")[0])
    assert answers[0] == answers[2] != answers[1]
    lines = [json.loads(line) for line in answers[0].splitlines()]
    assert len({x["response"] for x in lines if x["set"] == "gsm8k" and x["row"] == 0}) > 1
    batches = [[x["response"] for x in lines if x["row"] == i] for i in range(3)]
    assert batches[0] != batches[1] != batches[2]


def test_batches_do_not_change_greedy_answers(checkpoint, data, tmp_path):
    answers = []
    for batch_tokens in (1, 200, 10 ** 6):
        assert run(checkpoint, data, tmp_path / str(batch_tokens), batch_tokens=batch_tokens) == 0
        answers.append(sorted((x["set"], x["row"], x["response"], x["tokens"], x["finished"])
                              for x in lines_of(tmp_path / str(batch_tokens))))
    assert answers[0] == answers[1] == answers[2]
    model, tokenizer = eval_math.load_model(str(checkpoint))
    for x in (x for x in lines_of(tmp_path / "200") if x["set"] == "gsm8k"):
        prompt = chat_prompt(tokenizer, x["question"] + tasks.lock.GSM8K_INSTRUCTION)
        ids = argmax_step_by_step(model, prompt, 12, STOP)
        assert (x["response"], x["tokens"]) == (tokenizer.decode(ids, skip_special_tokens=True), len(ids))
        assert x["finished"] == (ids[-1] in STOP)


def test_batches_are_filled_by_tokens_longest_first():
    questions = [Question("", "1", [1] * n) for n in (5, 90, 30, 31, 5, 60, 7)]
    batches = make_batches(questions, 2, 10, 330)
    assert batches == [[1], [5, 3], [2, 6, 0, 4]]    # 2*100 (with the next 400), 2*2*70 = 280, 4*2*40 = 320
    assert make_batches(questions, 2, 10, 1) == [[1], [5], [3], [2], [6], [0], [4]]
    assert make_batches(questions, 1, 10, 10 ** 6) == [[1, 5, 3, 2, 6, 0, 4]]
    assert make_batches([], 1, 10, 100) == []


def test_prompt_and_answer_share_the_cap(checkpoint, data, tmp_path, monkeypatch):
    assert run(checkpoint, data, tmp_path / "long", "amc,gsm8k") == 0
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    free = {(x["set"], x["row"]): x for x in lines_of(tmp_path / "long")}
    prompt = {key: len(chat_prompt(tokenizer, x["question"] + tasks.lock.GSM8K_INSTRUCTION))
              for key, x in free.items() if key[0] == "gsm8k"}
    lengths = sorted(set(prompt.values()))
    cap = lengths[1] + 3
    assert lengths[0] + 12 <= cap <= lengths[-1]     # all three cases: room for all, for 3 tokens, for none
    monkeypatch.setattr(eval_math, "TOTAL_TOKENS", cap)
    assert run(checkpoint, data, tmp_path / "again", "gsm8k") == 0
    assert [x for x in lines_of(tmp_path / "again")] == [x for x in free.values() if x["set"] == "gsm8k"]
    monkeypatch.setattr(eval_math, "MATH_SETS", ["gsm8k"])                       # the cap is one of the MATH sets
    for batch_tokens in (1, 10 ** 6):
        out = tmp_path / f"short-{batch_tokens}"
        assert run(checkpoint, data, out, "gsm8k", batch_tokens=batch_tokens) == 0
        for x in lines_of(out):
            room = cap - prompt[x["set"], x["row"]]
            whole = free[x["set"], x["row"]]
            assert x["tokens"] == max(0, min(whole["tokens"], room))
            assert whole["response"].startswith(x["response"])
            assert x["finished"] == (whole["finished"] and room >= whole["tokens"])
    assert {x["tokens"] for x in lines_of(out)} >= {0, 3}


def test_a_file_may_have_questions_of_both_kinds(checkpoint, data, tmp_path):
    path, out = tmp_path / "mixed.jsonl", tmp_path / "out"
    path.write_text('{"question": "How many?", "answer": "#### 32"}\n{"problem": "How much?", "answer": "7"}\n')
    assert run(checkpoint, data, out, path) == 0
    assert [("strict" in x) for x in sorted(lines_of(out), key=lambda x: x["row"])] == [True, False]
    result = json.loads((out / "results.json").read_text())["sets"][str(path)]
    assert result["n"] == 2 and "strict" not in result


def test_unfinished_answers_count_for_math_only():
    gsm8k, math = Question("", "18", [], "hash"), Question("", ["18", "19"], [], "boxed")
    for text, finished, expected in [
            ("#### 18", True, (True, True, True)), ("#### 18", False, (False, False, False)),
            ("#### $18.00", True, (True, False, None)), ("It is 18", True, (False, False, True))]:
        marks = grade(gsm8k, text, finished, "chat")
        for name, mark in zip(("correct", "strict", "last_number"), expected):
            assert mark in (None, marks[name])
    for finished in (True, False):
        assert grade(math, r"So \boxed{19}", finished, "chat") == {"correct": True}
        assert grade(math, r"So \boxed{20}", finished, "qwen_math") == {"correct": False}
        assert grade(math, r"So \boxed{19}", finished, "chat", math_protocol=False) == {"correct": finished}


@pytest.mark.parametrize("text, right", [
    ("x </think> <answer> 18 </answer>", True), ("x </think> <answer> \\boxed{18} </answer>", True),
    ("<answer>18</answer> User: and now? <answer>7</answer>", True),
    ("<answer>7</answer> \\boxed{18}", False), ("no tags \\boxed{18}", True), ("18", False)])
def test_r1_answers_stand_between_tags(text, right):
    assert grade(Question("", "18", [], "boxed"), text, True, "r1") == {"correct": right}


def test_r1_number_stands_between_tags():
    text = "1 </think> <answer> It is 18 </answer> User: 7"
    expected = {"correct": False, "strict": False, "last_number": True}
    assert grade(Question("", "18", []), text, True, "r1") == expected
    assert not grade(Question("", "18", []), text, True, "no")["last_number"]


@pytest.mark.parametrize("changed, name", [
    (dict(samples=2, temperature=1.0), "samples"), (dict(seed=1), "seed"), (dict(template="no"), "template"),
    (dict(max_new_tokens=13), "max_new_tokens"), (dict(batch_tokens=201), "batch_tokens"),
    (dict(sets="gsm8k"), "sets")])
def test_other_settings_do_not_mix(checkpoint, data, tmp_path, capsys, changed, name):
    assert run(checkpoint, data, tmp_path / "out") == 0
    before = files_of(tmp_path / "out")
    capsys.readouterr()
    assert run(checkpoint, data, tmp_path / "out", **changed) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and f"another evaluation: {name} is" in error
    assert "choose another --out" in error
    assert files_of(tmp_path / "out") == before


def test_other_weights_or_questions_do_not_mix(checkpoint, data, tmp_path, capsys):
    model = LlamaForCausalLM.from_pretrained(checkpoint)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    assert run(tmp_path / "model", data, tmp_path / "out", "amc") == 0
    model.lm_head.weight.data[0, 0] *= 1.001
    model.save_pretrained(tmp_path / "model")
    assert run(tmp_path / "model", data, tmp_path / "out", "amc") == 2
    assert "weights is" in capsys.readouterr().err
    (tmp_path / "eval_amc.jsonl").write_text((data / "eval_amc.jsonl").read_text().replace('"1"', '"3"'))
    assert run(checkpoint, data, tmp_path / "second", "amc") == 0
    assert run(checkpoint, tmp_path, tmp_path / "second", "amc") == 2
    assert "questions is" in capsys.readouterr().err


def test_an_evaluation_that_goes_on_has_the_date_it_began_with(checkpoint, data, tmp_path, monkeypatch):
    class Day(date):
        now = date(2024, 2, 29)

        @classmethod
        def today(cls):
            return cls.now

    LlamaForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.chat_template = "{{ strftime_now('%d') }}" + tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(eval_math.datetime, "date", Day)
    assert run(tmp_path / "model", data, tmp_path / "whole") == 0
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["date"] == "2024-02-29"
    assert run(tmp_path / "model", data, tmp_path / "out") == 0
    lines = (tmp_path / "out" / "answers.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out" / "answers.jsonl").write_text("".join(lines[:5]))
    Day.now = date(2024, 3, 1)
    assert run(tmp_path / "model", data, tmp_path / "out") == 0            # the same command, a day later
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert run(tmp_path / "model", data, tmp_path / "later") == 0
    assert json.loads((tmp_path / "later" / "config.json").read_text())["date"] == "2024-03-01"
    assert lines_of(tmp_path / "later") != lines_of(tmp_path / "whole")


@pytest.mark.parametrize("there, complaint", [
    ('{"date": null}', "holds another evaluation"), ("{}", "holds another evaluation"),
    ('{"settings": {}, "date": "2024-02-29"}', "holds another evaluation"),
    ('{"date": 5}', "one like 2026-01-31, got 5")])
def test_a_folder_of_something_else_is_refused(there, complaint, checkpoint, data, tmp_path, capsys):
    """A training run has a config.json, too."""
    (tmp_path / "config.json").write_text(there)
    assert run(checkpoint, data, tmp_path, "amc") == 2
    assert complaint in capsys.readouterr().err and (tmp_path / "config.json").read_text() == there


def test_grades_of_another_version_of_a_library_are_not_taken_over(checkpoint, data, tmp_path, monkeypatch, capsys):
    """The answers in a folder were drawn and graded with the versions in its config.json."""
    assert run(checkpoint, data, tmp_path, "amc") == 0
    before = files_of(tmp_path)
    version = eval_math.metadata.version
    monkeypatch.setattr(eval_math.metadata, "version",
                        lambda package: "0.1.2" if package == "math-verify" else version(package))
    assert run(checkpoint, data, tmp_path, "amc") == 2
    assert f"math-verify is '{version('math-verify')}' there, '0.1.2' now" in capsys.readouterr().err
    assert files_of(tmp_path) == before


def test_an_evaluation_that_began_while_this_one_was_loading_is_not_taken_over(checkpoint, data, tmp_path, monkeypatch,
                                                                               capsys):
    prepare = eval_math.prepare

    def slowly(args, today):
        prepared = prepare(args, today)
        monkeypatch.setattr(eval_math, "prepare", prepare)
        assert run(checkpoint, data, tmp_path / "out", "amc", max_new_tokens=3) == 0
        return prepared

    monkeypatch.setattr(eval_math, "prepare", slowly)
    assert run(checkpoint, data, tmp_path / "out", "amc") == 2
    assert "max_new_tokens is 3 there, 12 now" in capsys.readouterr().err


def test_another_process_in_the_same_folder_is_refused(checkpoint, data, tmp_path, capsys):
    assert run(checkpoint, data, tmp_path / "out", "amc") == 0
    before = files_of(tmp_path / "out")
    with owned(tmp_path / "out"):
        assert run(checkpoint, data, tmp_path / "out", "amc") == 2
    assert "another process writes into" in capsys.readouterr().err and files_of(tmp_path / "out") == before


@pytest.mark.parametrize("flags, complaint", [
    (dict(sets="gsm8k,aime"), "'aime' is neither a .jsonl file nor one of gsm8k_train, gsm8k, math_train, aime24"),
    (dict(sets="no/such.jsonl"), "cannot read the data file no/such.jsonl"),
    (dict(model="RUN"), "is the directory of a run: name one of the models in"),
    (dict(sets=""), "--sets: ''"), (dict(samples=0), "--samples: must be at least 1, got 0"),
    (dict(samples="two"), "--samples: invalid int"),
    (dict(samples=2), "--samples: 2 greedy answers would all be the same"),
    (dict(temperature=-1), "--temperature: must be 0"), (dict(temperature="nan"), "--temperature: must be 0"),
    (dict(max_new_tokens=0), "--max-new-tokens: must be at least 1"),
    (dict(max_new_tokens=4096), "--max-new-tokens: on amc prompt and answer have 4096 tokens together"),
    (dict(batch_tokens=0), "--batch-tokens: must be at least 1"),
    (dict(template="llama"), "--template: invalid choice"), (dict(frobnicate=1), "unrecognized arguments"),
    (dict(model="EMPTY"), "there is no config.json in it"),
    (dict(model="HALF"), "is neither a local folder with a model nor could it be loaded"),
    (dict(model="no/such-model"), "'no/such-model' is neither"),
    (dict(data_dir="/no/such"), "--data-dir /no/such is not"),
    (dict(data_dir="EMPTY"), "cannot read the data file"),
    (dict(data_dir="BAD"), "gsm8k_test.jsonl, line 1: not valid JSON"),
    (dict(out="FILE"), "Not a directory"), (dict(out="BAD"), "holds no readable config.json"),
    (dict(model="BARE"), "no chat template")])
def test_bad_input_is_one_line_and_leaves_nothing_behind(checkpoint, data, tmp_path, monkeypatch, capsys,
                                                         flags, complaint):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    places = {name: tmp_path / name for name in ("EMPTY", "HALF", "BAD", "BARE", "RUN")}
    for place in places.values():
        place.mkdir()
    (places["RUN"] / "checkpoints").mkdir()
    (places["RUN"] / "config.json").write_text("{}")
    (tmp_path / "FILE").write_text("mine")
    (places["HALF"] / "config.json").write_text("{}")
    (places["BAD"] / "gsm8k_test.jsonl").write_text("{")
    (places["BAD"] / "config.json").write_text("[]")
    if flags.get("model") == "BARE":
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        tokenizer.chat_template = None
        tokenizer.save_pretrained(places["BARE"])
        LlamaForCausalLM.from_pretrained(checkpoint).save_pretrained(places["BARE"])
    flags = {name: tmp_path / value if (tmp_path / str(value)).exists() and value else value
             for name, value in flags.items()}
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    try:
        code = run(checkpoint, data, **({"out": tmp_path / "out"} | flags))
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err.splitlines()
    assert code == 2 and len(error) == 1 and error[0].startswith("error: ") and complaint in error[0]
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "FILE").read_text() == "mine"


def test_the_command(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)                      # where runs/ is made
    assert main(["--model", str(checkpoint), "--sets", "tiny", "--max-new-tokens", "4"]) == 0
    shown = capsys.readouterr()
    assert "| tiny | 256 | 0.0 | 0.0 to 1.5 |" in shown.out and "256/256" in shown.err
    assert (tmp_path / "runs" / f"eval-{checkpoint.name}" / "results.json").exists()


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and "--samples" in shown and "Wilson" in shown and "olympiadbench" in shown


def test_a_qwen_checkpoint_on_real_questions(tmp_path):
    if not DATA.is_dir():
        pytest.skip("the data folder beside the checkout is not there")
    tokenizer = AutoTokenizer.from_pretrained(DATA / "qwen2.5_0.5b_instruct")
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=151936, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, eos_token_id=151645, bos_token_id=151643))
    model.generation_config.eos_token_id = [151645, 151643]
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    names = {"gsm8k": "gsm8k_test.jsonl"} | {name: f"eval_{name}.jsonl" for name in eval_math.MATH_SETS}
    for file in names.values():
        (tmp_path / file).write_text("".join(open(DATA / file).readlines()[:2]))
    assert run(tmp_path / "model", tmp_path, tmp_path / "out", ",".join(names), max_new_tokens=3) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["config"]["stop_ids"] == [151643, 151645] and results["config"]["dtype"] == "torch.float32"
    assert {name: r["n"] for name, r in results["sets"].items()} == dict.fromkeys(names, 2)
    assert results["math_mean"] == 0
    gold = {x["set"]: x["gold"] for x in lines_of(tmp_path / "out") if x["row"] == 0}
    assert gold["gsm8k"] == "18" and gold["aime24"] == "204" and gold["minerva"] == ["9.6"]


def test_a_boxed_answer_to_gsm8k_must_be_finished_and_one_to_math_need_not(checkpoint, data, tmp_path, graders):
    """So it is in training; the other is the protocol of the MATH table. With 3 tokens most answers are cut off."""
    assert run(checkpoint, data, tmp_path / "out", "gsm8k,amc", answer="boxed", max_new_tokens=3) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    unfinished = {name: {line["correct"] for line in lines if line["set"] == name and not line["finished"]}
                  for name in ("gsm8k", "amc")}
    assert unfinished == {"gsm8k": {False}, "amc": {False, True}}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["answer"] == "boxed"


def test_two_batches_draw_different_samples_for_the_same_question(checkpoint, data, tmp_path):
    row = (data / "gsm8k_test.jsonl").read_text().splitlines()[0]
    (tmp_path / "gsm8k_test.jsonl").write_text(f"{row}\n" * 2)
    assert run(checkpoint, tmp_path, tmp_path / "out", "gsm8k", batch_tokens=1, **SAMPLED) == 0
    responses = [[x["response"] for x in lines_of(tmp_path / "out") if x["row"] == i] for i in (0, 1)]
    assert len(responses[0]) == len(responses[1]) == 3 and responses[0] != responses[1]


def test_an_answer_that_was_cut_in_its_tag_is_not_stated():
    question = Question("", "1", [], "boxed")                            # 1 may be cut from 18
    for finished in (True, False):
        assert grade(question, "x </think> <answer> 1", finished, "r1") == {"correct": finished}


def test_a_closed_tag_of_r1_finishes_an_answer():
    def answers(text):
        tokenizer = SimpleNamespace(pad_token_id=0, decode=lambda ids, skip_special_tokens: text)
        model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=64))
        args = SimpleNamespace(max_new_tokens=4, samples=1, temperature=0.0, template="r1")
        found, = eval_math.answer_batch(args, model, lambda *_, **__: [[[5, 6, 7, 8]]], tokenizer, [1], "gsm8k",
                                        [Question("q", "18", [3])], [0])
        return found

    assert answers("x </think> <answer> #### 18 </answer>")["finished"]              # although no stop id was drawn
    assert not answers("x </think> <answer> #### 18")["finished"]


def test_prompt_and_answer_share_a_context_that_is_shorter_than_the_cap():
    asked = []
    tokenizer = SimpleNamespace(pad_token_id=0, decode=lambda ids, skip_special_tokens: "")
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=10))
    args = SimpleNamespace(max_new_tokens=12, samples=1, temperature=0.0, template="chat")

    def sampler(model, prompts, k, *, max_new_tokens, **options):
        asked.extend(max_new_tokens)
        return [[[5] * n] for n in max_new_tokens]

    list(eval_math.answer_batch(args, model, sampler, tokenizer, [1], "gsm8k", [Question("q", "18", [3] * 7)], [0]))
    assert asked == [3]


@pytest.mark.parametrize("name, right", [("math_train", True), ("math500", True), ("gsm8k", False)])
def test_the_sets_whose_unfinished_answers_count(name, right):
    tokenizer = SimpleNamespace(pad_token_id=0, decode=lambda ids, skip_special_tokens: r"\boxed{18}")
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=64))
    args = SimpleNamespace(max_new_tokens=4, samples=1, temperature=0.0, template="chat")
    answer, = eval_math.answer_batch(args, model, lambda *_, **__: [[[5, 6, 7, 8]]], tokenizer, [1], name,
                                     [Question("q", "18", [3], "boxed")], [0])
    assert not answer["finished"] and answer["correct"] == right


def test_reasoning_of_r1_may_name_the_tags_and_a_turn_of_the_user():
    text = "I end with </answer> User: and so on </think> <answer> 18 </answer>"
    assert grade(Question("", "18", [], "boxed"), text, True, "r1") == {"correct": True}


def test_template_and_answer_get_into_the_questions(checkpoint, data, tmp_path):
    args = eval_math.parse_args(["--model", str(checkpoint), "--sets", "gsm8k", "--data-dir", str(data), "--out",
                                 str(tmp_path / "out"), "--template", "no", "--answer", "last"])
    (*_, questions), _ = eval_math.prepare(args, "2026-01-31")
    assert {(q.template, q.answer) for q in questions["gsm8k"]} == {("no", "last")}


def test_a_file_of_ones_own_is_a_set(checkpoint, data, tmp_path, graders):
    """The answers and grades are those that the same rows have as a known set; the paper has no scores beside them."""
    own = data / "gsm8k_test.jsonl"
    assert run(checkpoint, data, tmp_path / "known", "gsm8k") == run(checkpoint, data, tmp_path / "own", own) == 0
    known, mine = (json.loads((tmp_path / name / "results.json").read_text())["sets"] for name in ("known", "own"))
    assert mine == {str(own): known["gsm8k"]} and 0 < known["gsm8k"]["accuracy"] < 1
    assert "GRPO, N = 8" not in (tmp_path / "own" / "results.md").read_text()


def test_samples_and_temperature_get_to_the_sampler(checkpoint, data, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(eval_math, "choose_sampler", lambda model: lambda model, prompts, k, **options: (
        seen.append((k, options["temperature"])) or resample.sample(model, prompts, k, **options)))
    assert run(checkpoint, data, tmp_path / "out", "amc", **SAMPLED) == 0
    assert set(seen) == {(3, 1.5)}


def test_the_printed_table_by_hand():
    def answer(row, sample, correct, tokens=10, finished=True):
        return {"row": row, "sample": sample, "correct": correct, "tokens": tokens, "finished": finished,
                "strict": correct and row == 0, "last_number": True}

    answers = [answer(0, 0, True), answer(0, 1, False, 30), answer(0, 2, False, 20, False),
               answer(1, 0, True), answer(1, 1, True), answer(1, 2, False)]
    numbers = eval_math.summarize(answers, 3)
    assert numbers["pass"] == pytest.approx({"1": 0.5, "2": (2 / 3 + 1) / 2, "3": 1.0})
    text = eval_math.write_table({"config": {"model": "m", "samples": 3, "temperature": 0.5, "template": "chat"},
                                  "sets": {"gsm8k": numbers}, "math_mean": None})
    low, high = wilson(0.5, 2)
    assert (f"| gsm8k | 2 | 50.0 | {100 * low:.1f} to {100 * high:.1f} | 100.0 | 15 | 16.7 | 16.7 | 100.0 |"
            in text.splitlines())
    assert ("| set | n | accuracy % | 95 % interval | pass@3 % | tokens | truncated % | strict % | "
            "last number % (fallback) |") in text.splitlines()
    for row in ("| GRPO, N = 8, Qwen2.5-0.5B-Instruct | 64.1 |", "| GRPO, N = 64, Qwen2.5-0.5B-Instruct | 66.2 |",
                "| TreeRL, Qwen2.5-0.5B-Instruct | 65.5 |", "| AttnRL, Qwen2.5-0.5B-Instruct | 67.0 |",
                "| DEEP-GRPO, Qwen2.5-0.5B-Instruct | 67.7 |"):
        assert row in text.splitlines()
