"""Prompts character by character, stop ids, and every set from local files and through `datasets`."""
import copy
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from jinja2 import TemplateError
from tokenizers import processors
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

import tasks
import tasks.lock
from grading import grade_math
from tasks import (
    SETS,
    Question,
    chat_prompt,
    digests,
    filter_math,
    fix_date,
    load_rows,
    load_set,
    make_questions,
    split_validation,
    stop_ids,
)
from tasks.datasets import SUBJECTS, last_boxed

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the data folder beside the checkout is not there")
GSM8K_ROW = {"question": "What is 1 + 1?", "answer": "1 + 1 = 2\n#### 2"}
MATH_ROW = {"problem": "What is $1 + 1$?", "answer": "2"}
TYPED = {   # from the files of sail-sg/understand-r1-zero, typed again
    "qwen_math": "<|im_start|>system\n"
                 "Please reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
                 "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n",
    "r1": "A conversation between User and Assistant. The User asks a question, and the Assistant solves "
          "it. The Assistant first thinks about the reasoning process in the mind and then provides the "
          "User with the answer. The reasoning process is enclosed within <think> </think> and answer is "
          "enclosed within <answer> </answer> tags, respectively, i.e., <think> reasoning process here "
          "</think> <answer> answer here </answer>.\nUser: Q\nAssistant: <think>",
    "no": "Q"}


@pytest.fixture(params=["instruct", "math"])
def qwen(request, tmp_path):
    """(which, tokenizer, model with the configurations of the real checkpoint and no weights)."""
    if not DATA.is_dir():
        pytest.skip("the data folder beside the checkout is not there")
    folder = DATA / "qwen2.5_0.5b_instruct"
    if request.param == "math":                      # the vocabulary is the same and stored once
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(folder / name, tmp_path)
        for path in (DATA / "qwen2.5_math_1.5b").glob("*.json"):
            shutil.copy(path, tmp_path)
        folder = tmp_path
    model = SimpleNamespace(config=AutoConfig.from_pretrained(folder),
                            generation_config=GenerationConfig.from_pretrained(folder))
    return request.param, AutoTokenizer.from_pretrained(folder), model


def test_real_prompts_character_by_character(qwen):
    which, tokenizer, _ = qwen
    system = {"instruct": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
              "math": "Please reason step by step, and put your final answer within \\boxed{}."}[which]
    chat = (f"<|im_start|>system\n{system}<|im_end|>\n"
            "<|im_start|>user\nUSER<|im_end|>\n<|im_start|>assistant\n")
    user = {"gsm8k": 'What is 1 + 1? Let\'s think step by step and output the final answer after "####".',
            "math": "What is $1 + 1$? Let's think step by step and output the final answer within \\boxed{}."}
    (gsm8k, math), skipped = make_questions([GSM8K_ROW, MATH_ROW], tokenizer, 512)
    assert tokenizer.decode(gsm8k.prompt) == chat.replace("USER", user["gsm8k"])
    assert tokenizer.decode(math.prompt) == chat.replace("USER", user["math"])
    assert (gsm8k.text, gsm8k.gold, gsm8k.answer) == ("What is 1 + 1?", "2", "hash") and skipped == []
    assert (math.text, math.gold, math.answer) == ("What is $1 + 1$?", "2", "boxed")
    assert gsm8k.prompt[0] == 151644 and gsm8k.prompt.count(151645) == 2            # control tokens, not text
    for template, text in TYPED.items():
        (question,), _ = make_questions([MATH_ROW], tokenizer, 512, template)
        assert tokenizer.decode(question.prompt) == text.replace("Q", MATH_ROW["problem"])
        assert question.prompt.count(151644) == (3 if template == "qwen_math" else 0)


@pytest.mark.parametrize("template", TYPED)
def test_templates_of_base_models(template):
    before, after = tasks.TEMPLATES[template]
    assert before + "Q" + after == TYPED[template]


def test_real_stop_ids(qwen):
    _, tokenizer, model = qwen
    assert stop_ids(tokenizer, model) == [151643, 151645]
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    tokenizer.eos_token = "<|endoftext|>"
    assert stop_ids(tokenizer, model) == [151643, 151645]                           # 151645: the template's
    tokenizer.chat_template = None
    assert stop_ids(tokenizer, model) == [151643]


def test_stop_ids_of_the_embedded_task_and_of_nothing():
    tokenizer = tasks.lock.make_tokenizer()
    config = SimpleNamespace(eos_token_id=[7, 9])
    model = SimpleNamespace(config=config, generation_config=GenerationConfig())
    assert stop_ids(tokenizer, model) == [1, 7, 9]
    tokenizer.eos_token = None
    nothing = SimpleNamespace(config=SimpleNamespace(), generation_config=GenerationConfig())
    with pytest.raises(ValueError, match="end-of-sequence"):
        stop_ids(tokenizer, nothing)


def test_make_questions_skips_and_complains():
    tokenizer = tasks.lock.make_tokenizer()
    rows = tasks.lock.make_rows(tasks.lock.Lock(), 8, 0)
    lengths = [len(q.prompt) for q in make_questions(rows, tokenizer, 512)[0]]
    questions, skipped = make_questions(rows, tokenizer, min(lengths))
    assert len(questions) == lengths.count(min(lengths))
    assert len(questions) + len(skipped) == 8 and skipped[0] in rows
    with pytest.raises(ValueError, match="template must be one of chat, qwen_math, r1, no, got 'llama'"):
        make_questions(rows, tokenizer, 512, "llama")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        make_questions(rows, tokenizer, 512)
    assert make_questions(rows, tokenizer, 512, "no")[0][0].text == rows[0]["question"]


@needs_data
@pytest.mark.parametrize("name, rows", [
    ("gsm8k_train", 7473), ("gsm8k", 1319), ("math_train", 8886), ("aime24", 30), ("amc", 83),
    ("math500", 500), ("minerva", 272), ("olympiadbench", 675)])
def test_real_files(name, rows, capsys):
    loaded = load_set(name, DATA)
    assert len(loaded) == rows and capsys.readouterr().out == ""                    # known count: no warning
    raw = [json.loads(line) for line in (DATA / SETS[name].file).read_text().splitlines()]
    changed = [(new["answer"], old["answer"]) for new, old in zip(loaded, raw) if new != old]
    assert len(changed) == (4 if name == "math_train" else 0)
    assert all(new == old.lstrip("0") for new, old in changed)
    tokenizer = tasks.lock.make_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    questions, _ = make_questions(loaded[:50], tokenizer, 10 ** 6)
    gold = {"gsm8k_train": "72", "gsm8k": "18", "minerva": ["9.6"], "olympiadbench": ["2"], "aime24": "204",
            "amc": "142"}
    assert questions[0].gold == gold.get(name, questions[0].gold)
    assert questions[0].answer == ("hash" if name.startswith("gsm8k") else "boxed")


def test_a_different_count_is_a_warning(tmp_path, capsys):
    (tmp_path / "eval_olympiadbench.jsonl").write_text((json.dumps(MATH_ROW) + "\n") * 3)
    assert len(load_set("olympiadbench", tmp_path)) == 3
    assert capsys.readouterr().out == (f"warning: {tmp_path / 'eval_olympiadbench.jsonl'} has 3 rows, "
                                       "olympiadbench is known with 674 or 675\n")


@pytest.mark.parametrize("name, line, complaint", [
    ("gsm8k", '{"question": "a"}',
     "line 2: a row needs the text fields 'question' and 'answer', it has question"),
    ("gsm8k", '{"problem": "a", "answer": "#### 3"}', "it has problem, answer"),
    ("gsm8k", '{"question": "a", "answer": "no marker"}', "line 2: no #### marker"),
    ("gsm8k", '{"question": "a", "ans', "line 2: not valid JSON"),
    ("gsm8k", '["a"]', "line 2: a row must be an object with named fields, got list"),
    ("math500", '{"question": "a"}', "line 2: a row needs the text 'problem' .* it has question"),
    ("math500", '{"problem": "a", "answer": []}', "line 2: a row needs"),
    ("math500", '{"problem": "a", "answer": ["1", 2, null]}', "line 2: a row needs"),
    ("math500", "{}", "it has no fields"),
    ("math500", '{"problem": "", "answer": "1"}', "line 2: a row needs"),
    ("math500", '{"problem": "a", "solution": "no box"}', "line 2: a row needs")])
def test_bad_rows_are_named(tmp_path, name, line, complaint):
    good = GSM8K_ROW if name == "gsm8k" else MATH_ROW
    path = tmp_path / SETS[name].file
    path.write_text(json.dumps(good) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=complaint) as caught:
        load_set(name, tmp_path)
    assert str(path) in str(caught.value)


def test_missing_and_unknown():
    with pytest.raises(ValueError, match="cannot read the data file .*eval_amc.jsonl"):
        load_set("amc", "/no/such/folder")
    with pytest.raises(ValueError, match="name must be one of gsm8k_train, gsm8k, .* got 'amc23'"):
        load_set("amc23")


def hub_of(contents, monkeypatch):
    """datasets.load_dataset with `contents` {(name, config, split): rows}; returns the list of calls."""
    calls = []

    def load_dataset(name, config=None, split=None):
        calls.append((name, config, split))
        return datasets.Dataset.from_list(contents[name, config, split])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def as_on_the_hub(name, row):
    """A local row with the fields that the hub's data set has."""
    gold = row["answer"] if isinstance(row["answer"], str) else row["answer"][0]
    problem = row["problem"]
    return {"aime24": {"id": 60, "problem": problem, "solution": "...", "answer": gold.zfill(3), "url": "",
                       "year": "2024"},
            "amc": {"id": 1, "problem": problem, "answer": float(gold) if name == "amc" else 0.0, "url": ""},
            "math500": {"problem": problem, "solution": "...", "answer": gold, "subject": "Algebra",
                        "level": 2, "unique_id": "test/algebra/1.json"},
            "minerva": {"question": problem, "answer": gold},
            "olympiadbench": {"id": 1606, "question": problem, "solution": ["..."], "final_answer": [gold],
                              "context": None, "subfield": "Algebra", "unit": None}}[name]


@needs_data
@pytest.mark.parametrize("name, where", [
    ("aime24", ("HuggingFaceH4/aime_2024", None, "train")),
    ("amc", ("AI-MO/aimo-validation-amc", None, "train")),
    ("math500", ("HuggingFaceH4/MATH-500", None, "test")),
    ("minerva", ("math-ai/minervamath", None, "test")),
    ("olympiadbench", ("math-ai/olympiadbench", None, "test"))])
def test_the_hub_gives_the_questions_of_the_files(name, where, monkeypatch, capsys):
    local = load_set(name, DATA)
    calls = hub_of({where: [as_on_the_hub(name, row) for row in local]}, monkeypatch)
    hub = load_set(name)
    assert calls == [where] and capsys.readouterr().out == ""
    assert [row["problem"] for row in hub] == [row["problem"] for row in local]
    for a, b in zip(hub, local):
        first = b["answer"] if isinstance(b["answer"], str) else b["answer"][0]
        assert a["answer"] == ([first] if name == "olympiadbench" else first)


def test_gsm8k_from_the_hub(monkeypatch, capsys):
    rows = {("openai/gsm8k", "main", "train"): [GSM8K_ROW] * 7473,
            ("openai/gsm8k", "main", "test"): [GSM8K_ROW] * 1319}
    calls = hub_of(rows, monkeypatch)
    assert load_set("gsm8k_train")[0] == GSM8K_ROW and len(load_set("gsm8k")) == 1319
    assert load_rows("openai/gsm8k", "test") == [GSM8K_ROW] * 1319
    assert [split for _, _, split in calls] == ["train", "test", "test"] and capsys.readouterr().out == ""
    hub_of({("me/mine", None, "train"): [{"question": "a", "answer": "#### x"}]}, monkeypatch)
    with pytest.raises(ValueError, match="me/mine, train, row 0: the gold answer must be a number"):
        load_rows("me/mine", "train")


def test_what_the_hub_refuses_is_one_line(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise RuntimeError("no connection\nand a long story")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    complaint = "'AI-MO/aimo-validation-amc' is neither .* hub load it: no connection$"
    for load in (lambda: load_set("amc"), lambda: load_rows("AI-MO/aimo-validation-amc", "train")):
        with pytest.raises(ValueError, match=complaint):
            load()


def test_math_from_the_hub_keeps_levels_3_to_5_without_math500(monkeypatch, capsys):
    def row(problem, level, answer=r"\frac{1}{2}"):
        return {"problem": problem, "level": level, "type": "Algebra",
                "solution": f"First \\boxed{{9}}, so \\boxed{{{answer}}}."}

    contents = {("EleutherAI/hendrycks_math", subject, split):
                [row(f"{subject} {split} {level}", f"Level {level}") for level in "12345?"]
                for subject in SUBJECTS for split in ("train", "test")}
    contents["EleutherAI/hendrycks_math", "geometry", "test"].append(
        row("Find  $x$\nin the  figure.", "Level 5"))
    contents["HuggingFaceH4/MATH-500", None, "test"] = [
        {"problem": "Find $x$ in the figure. ", "answer": "3"}, {"problem": "algebra test 4", "answer": "3"},
        {"problem": "not there", "answer": "1"}]
    calls = hub_of(contents, monkeypatch)
    rows = load_set("math_train")
    wanted = {f"{subject} {split} {level}"
              for subject in SUBJECTS for split in ("train", "test") for level in "345"}
    assert {r["problem"] for r in rows} == wanted - {"algebra test 4"} and len(rows) == 41
    assert all(r["answer"] == r"\frac{1}{2}" for r in rows)                         # the last box, complete
    assert len(calls) == 15 and len(set(calls)) == 15
    error = capsys.readouterr().out
    assert "EleutherAI/hendrycks_math: 41 of 85 rows are left, levels 3-5 without MATH500\n" in error
    assert "has 41 rows, math_train is known with 8,523 or 8,886 or 8,888" in error


@needs_data
def test_the_math_filter_agrees_with_the_real_file():
    train, test = load_set("math_train", DATA), load_set("math500", DATA)
    assert filter_math(train, test) == train                                        # made by another filter
    assert len(filter_math(train + test, test)) == len(train)
    assert len(filter_math(train + test, [])) == len(train) + sum(row["level"] >= 3 for row in test)


@needs_data
def test_the_validation_rows_of_math_have_all_subjects():
    rows = load_set("math_train", DATA)
    shares = [Counter(row["subject"] for row in part) for part in (rows, split_validation(rows)[1])]
    assert len(shares[0]) == 7 == len(shares[1])
    for subject, n in shares[0].items():
        expected = 256 * n / len(rows)
        assert abs(shares[1][subject] - expected) < 4 * expected**0.5


@pytest.mark.parametrize("solution, box", [
    (r"so \boxed{3} and \boxed{\frac{1}{\sqrt{2}}}.", r"\frac{1}{\sqrt{2}}"), (r"$\boxed 7$.", "7"),
    (r"\fbox{4}", "4"), (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."), (r"\boxed{1} \boxed{2", None),
    ("no box", None), ("", None), ("a { b", None), (r"\boxed{}", "")])
def test_last_boxed(solution, box):
    assert last_boxed(solution) == box


def test_rows_of_both_kinds_from_one_loader(tmp_path):
    path = tmp_path / "mine.jsonl"
    text = json.dumps(GSM8K_ROW, ensure_ascii=False) + "\n\n" + json.dumps(MATH_ROW) + "\r\n"
    path.write_text(text, encoding="utf-8")
    assert load_rows(str(path), "train") == [GSM8K_ROW, MATH_ROW]
    odd = GSM8K_ROW | {"question": "a\u2028b\x85c"}                                 # not line ends here
    path.write_text(json.dumps(odd, ensure_ascii=False), encoding="utf-8")
    assert load_rows(path, "train") == [odd]
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no rows"):
        load_rows(path, "train")
    path.write_text(json.dumps(GSM8K_ROW | {"problem": None}))                       # a column that is empty
    assert load_rows(path, "train") == [GSM8K_ROW | {"problem": None}]
    assert make_questions(load_rows(path, "train"), CHARACTERS, 512)[0][0].gold == "2"
    path.write_text(json.dumps({"problem": "What is 1 + 1?", "answer": "#### 2"}))
    with pytest.raises(ValueError, match="is one of a GSM8K row, whose question has the field 'question'"):
        load_rows(path, "train")


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    path, row = tmp_path / "mine.jsonl", b"\xef\xbb\xbf" + json.dumps(GSM8K_ROW).encode()
    path.write_bytes(row)
    assert load_rows(path, "train") == [GSM8K_ROW]
    path.write_bytes(row + b"\n" + row)                                             # two files that were joined
    assert load_rows(path, "train") == [GSM8K_ROW] * 2


@pytest.mark.parametrize("eos", [-1, True, 1.0, "x", [1, -2], [[1]]])
def test_a_stop_id_that_is_no_token_id_is_refused(eos):
    model = SimpleNamespace(config=SimpleNamespace(eos_token_id=1), generation_config=SimpleNamespace(eos_token_id=eos))
    with pytest.raises(ValueError, match="a stop id must be a token id, an integer of at least 0, got"):
        stop_ids(tasks.lock.make_tokenizer(), model)


@pytest.mark.parametrize("answer, shown", [
    ("18", "answer (18)"), ("null", "answer (null)"), ("true", "answer (true)"), ("[18]", "answer ([18])"),
    ('" "', "answer (blank)"), ('"\\n"', "answer (blank)")])
def test_an_answer_of_another_type_is_named_in_a_gsm8k_row(answer, shown, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"id": 7, "question": "Why?", "answer": ' + answer + "}")
    with pytest.raises(ValueError, match=re.escape(f"line 1: a row needs the text fields 'question' and 'answer', it "
                                                   f"has id, question, {shown}")):
        load_rows(path, "train")


@pytest.mark.parametrize("answer, shown", [
    ('" "', "answer (blank)"), ('""', "answer (blank)"), ("NaN", "answer (NaN)"), ("Infinity", "answer (Infinity)"),
    ("true", "answer (true)"), ("null", "answer (null)"), ("[]", "answer ([])"), ('["1", " "]', 'answer (["1", " "])'),
    ("[true]", "answer ([true])"), ("[null]", "answer ([null])"), ("{}", "answer ({})"),
    ('"\\ud800"', "answer (no valid UTF-8)"), ("1e401", 'answer ("1E+401")')])
def test_an_answer_that_is_none_is_refused_in_a_math_row(answer, shown, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"problem": "Why?", "answer": ' + answer + "}")
    with pytest.raises(ValueError, match=re.escape(f"list of these; it has problem, {shown}")):
        load_rows(path, "train")


@pytest.mark.parametrize("answer, gold", [
    ("9007199254740993", "9007199254740993"), ("-123456789012345678901234567890", "-123456789012345678901234567890"),
    ("142.0", "142"), ("0.1", "0.1"), ("-2.50", "-2.5"), ("[3, 4.0]", ["3", "4"]), ("1e3", "1000"), ("7", "7"),
    ("4503599627370497.0", "4503599627370497"), ("9007199254740993.0", "9007199254740993"), ("-0.0", "0"),
    ("4503599627370497.5", "4503599627370497.5"), ("0.12345678901234567890", "0.1234567890123456789"),
    ("1e-30", "0.000000000000000000000000000001")])
def test_a_gold_number_keeps_all_its_digits(answer, gold, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"problem": "Why?", "answer": ' + answer + "}")
    assert load_rows(path, "train")[0]["answer"] == gold


def test_floats_of_the_hub_keep_their_digits_and_are_refused_where_they_may_be_rounded(monkeypatch):
    def gold(value):
        hub_of({("me/mine", None, "test"): [{"problem": "Why?", "answer": value}]}, monkeypatch)
        return tasks.datasets._read_hub("me/mine", None, "test", math=True)[0]["answer"]

    assert [gold(value) for value in (142.0, 0.1, -2.5, 1e-7, 9007199254740991.0)] == [
        "142", "0.1", "-2.5", "0.0000001", "9007199254740991"]
    for value in (9007199254740992.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="me/mine, test, row 0: .* it has problem, answer"):
            gold(value)


@pytest.mark.parametrize("answer", ["$", ".", "{5", "5}", r"\;", "\u200b"])
def test_an_answer_that_no_response_can_equal_is_refused(answer, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"problem": "Why?", "answer": ["5", answer]}))
    with pytest.raises(ValueError, match="line 1: no response can equal the answer .* the grader cannot read it"):
        load_rows(path, "train")


@pytest.mark.parametrize("line", ['{"question": "Why?", "answer": ' + "1" * 5000 + "}",
                                  '{"question": "Why?", "answer": ' + "[" * 100_000])
def test_a_line_that_is_too_much_for_the_parser_is_named(line, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(GSM8K_ROW) + "\n" + line)
    with pytest.raises(ValueError, match="mine.jsonl, line 2: not valid JSON"):
        load_rows(path, "train")


def test_a_long_integer_is_graded_by_its_last_digit(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"problem": "Why?", "answer": 9007199254740993}')
    gold = load_rows(path, "train")[0]["answer"]
    right = [n for n in range(9007199254740990, 9007199254740997) if grade_math(f"\\boxed{{{n}}}", gold)]
    assert right == [9007199254740993] and not grade_math("\\boxed{9.00719925474099e+15}", gold)


# ---- prompts that tokenizers and templates change ----

def with_post_processor(template):
    """The tokenizer of the embedded task with tokens around every text, as `template` says; A is the text."""
    tokenizer = copy.deepcopy(tasks.lock.make_tokenizer())
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<eos>", tokenizer.eos_token_id), ("<unk>", tokenizer.unk_token_id)])
    return tokenizer


@pytest.mark.parametrize("template, before", [("<unk> $A <eos>", 1), ("$A <eos>", 0), ("<unk> <unk> $A <eos> <eos>", 2),
                                              ("<unk> $A", 1), ("$A", 0)])
@pytest.mark.parametrize("name", ["no", "r1", "qwen_math"])
def test_a_prompt_keeps_bos_and_does_not_end_in_eos(template, before, name):
    plain, tokenizer = with_post_processor("$A"), with_post_processor(template)
    row = {"question": "The dials show 37.\n(a) L+3", "answer": "#### 67"}
    ((bare,), _), ((question,), _) = (make_questions([row], t, 500, name) for t in (plain, tokenizer))
    assert question.prompt == [tokenizer.unk_token_id] * before + bare.prompt


def test_an_eos_in_the_question_itself_stays():
    tokenizer = with_post_processor("<unk> $A <eos>")
    ((question,), _) = make_questions([{"question": "37<eos>", "answer": "#### 67"}], tokenizer, 500, "no")
    assert question.prompt == tokenizer("37<eos>")["input_ids"][:-1] and question.prompt[-1] == tokenizer.eos_token_id


DATED = ("{%- if strftime_now is defined %}{%- set today = strftime_now('%d %b %Y') %}{%- endif %}Today: {{ today }}"
         "{{ strftime_now( \"%H:%M\" ) }}{{ strftime_now\n(\"%d '%b'\") }}"
         "{% for m in messages %}{{ m.content }}{% endfor %}")


def test_a_template_with_a_date_gets_the_one_it_is_given():
    tokenizer = tasks.lock.make_tokenizer()
    tokenizer.chat_template = DATED
    assert fix_date(tokenizer, "2024-02-29") == "2024-02-29"
    text = tokenizer.apply_chat_template([{"role": "user", "content": "37"}], tokenize=False)
    assert text == "Today: 29 Feb 202400:0029 'Feb'37"
    assert fix_date(tokenizer, "2025-01-01") is None                             # it stays, in checkpoints too
    assert chat_prompt(tokenizer, "37") == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_template_without_a_date_is_not_touched():
    tokenizer = tasks.lock.make_tokenizer()
    before = tokenizer.chat_template
    assert fix_date(tokenizer, "2024-02-29") is None and tokenizer.chat_template == before
    tokenizer.chat_template = None
    assert fix_date(tokenizer, "2024-02-29") is None


@pytest.mark.parametrize("template", [
    "{% set f = '%d' %}{{ strftime_now(f) }}", "{% set now = strftime_now %}{{ now('%d') }}",
    "{{ strftime_now('%Y' ~ '-%m') }}", "{{ strftime_now('%Y' '-%m') }}", r"{{ strftime_now('%I o\'clock') }}",
    "{{ strftime_now('%d',) }}"])
def test_a_template_whose_date_cannot_be_replaced_is_refused(template):
    tokenizer = tasks.lock.make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="today's date in a way that cannot be replaced"):
        fix_date(tokenizer, "2024-02-29")


@pytest.mark.parametrize("given", ["yesterday", "", 5, None])
def test_what_is_no_date_is_named(given):
    with pytest.raises(ValueError, match=re.escape(f"must be one like 2026-01-31, got {given!r}")):
        fix_date(tasks.lock.make_tokenizer(), given)


def test_checksums_tell_questions_from_prompts():
    one = [Question("a", "1", [3, 4]), Question("b", ["1", "2"], [5], "boxed")]
    base = digests(one)
    assert digests(list(one)) == base
    for i, changed in ((0, one[0]._replace(gold="2")), (0, one[0]._replace(text="A")),
                       (1, one[1]._replace(answer="last"))):
        other = digests([changed if j == i else q for j, q in enumerate(one)])
        assert other["rows"] != base["rows"] and other["prompts"] == base["prompts"]
    other = digests([one[0]._replace(prompt=[3, 5]), one[1]])
    assert other["rows"] == base["rows"] and other["prompts"] != base["prompts"]
    assert digests(one[::-1])["rows"] != base["rows"] and digests(one[:1])["prompts"] != base["prompts"]


def test_validation_is_drawn_and_always_the_same():
    rows = list(range(1000))
    train, validation = split_validation(rows)
    assert len(validation) == 256 and sorted(train + validation) == rows
    assert train == sorted(train) and validation == sorted(validation)                  # in the order of the file
    assert validation[:4] == [1, 3, 4, 7] and split_validation(rows) == (train, validation)      # and on any machine
    quarters = [sum(row // 250 == quarter for row in validation) for quarter in range(4)]
    assert all(45 < n < 85 for n in quarters)                                           # 64 each, 6 standard deviation
    assert [len(part) for part in split_validation(rows, 10)] == [990, 10]
    for n in (0, 1000, -1):
        with pytest.raises(ValueError, match=f"{n} of the 1000 training rows .* hold out 1 to 999 "):
            split_validation(rows, n)


# ---- --answer ----

class Characters:
    """A tokenizer whose tokens are characters, with the plainest of chat templates."""
    chat_template = "{{ content }}"

    def apply_chat_template(self, turns, **_):
        return [ord(c) for c in turns[0]["content"]]

    def decode(self, ids):
        return "".join(map(chr, ids))


CHARACTERS = Characters()

def test_each_way_to_answer_has_its_instruction():
    for row, golds in ((GSM8K_ROW, {"hash": "2", "last": "2", "boxed": "2", None: "2"}),
                       (MATH_ROW, {"hash": "2", "last": "2", "boxed": "2", None: "2"})):
        for answer, gold in golds.items():
            (question,), _ = make_questions([row], CHARACTERS, 512, answer=answer)
            how = answer or ("hash" if row is GSM8K_ROW else "boxed")
            assert (question.answer, question.gold) == (how, gold)
            text = CHARACTERS.decode(question.prompt)
            assert ("boxed{}" in text) == (how == "boxed") and ('after "####"' in text) == (how != "boxed")


def test_an_answer_of_two_numbers_cannot_be_the_last_one():
    row = GSM8K_ROW | {"answer": "#### 1/2"}
    assert make_questions([row], CHARACTERS, 512)[0][0].gold == "1/2"
    with pytest.raises(ValueError, match="'1/2', which is more than one number: .* so use 'hash'"):
        make_questions([row], CHARACTERS, 512, answer="last")


def test_chat_templates_that_make_no_prompt_are_refused():
    class Fails(Characters):
        def apply_chat_template(self, *args, **kwargs):
            raise TemplateError("only two messages")

    class Empty(Characters):
        def apply_chat_template(self, *args, **kwargs):
            return []

    with pytest.raises(ValueError, match="the chat template of the tokenizer cannot be used: only two messages"):
        make_questions([GSM8K_ROW], Fails(), 512)
    with pytest.raises(ValueError, match="the prompt of the question 'What is 1 . 1.' is empty"):
        make_questions([GSM8K_ROW], Empty(), 512)


@pytest.mark.parametrize("gold", [r"\frac{1}{2}x", ["2", "3"], "(1, 2)"])
def test_an_answer_that_is_no_number_can_only_be_boxed(gold):
    row = MATH_ROW | {"answer": gold}
    (question,), _ = make_questions([row], CHARACTERS, 512, answer="boxed")
    assert question.gold == gold
    for answer in ("hash", "last"):
        with pytest.raises(ValueError, match="is not a number: with answer .* so use 'boxed'"):
            make_questions([row], CHARACTERS, 512, answer=answer)
    with pytest.raises(ValueError, match="answer must be one of hash, last, boxed, got 'box'"):
        make_questions([row], CHARACTERS, 512, answer="box")


def test_checksums_see_the_gold_answer_and_how_it_is_read():
    """The same text with another gold answer, or another way to answer, is another question; prompts are apart."""
    question = Question("a", "1", [3])
    for change in ({"text": "b"}, {"gold": "2"}, {"gold": ["1"]}, {"answer": "last"}):
        assert digests([question._replace(**change)])["rows"] != digests([question])["rows"]
    moved = digests([question._replace(prompt=[4])])
    assert moved["rows"] == digests([question])["rows"] and moved["prompts"] != digests([question])["prompts"]
