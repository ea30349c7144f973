r"""Questions and prompts: GSM8K, MATH and the five evaluation sets, from the hub or from local files.

There are two kinds of rows. A GSM8K row has a `question` and an `answer` that ends in `#### <number>`. A MATH row has a
`problem` and an `answer`, which is LaTeX or a list of accepted alternatives. Whatever the hub calls these fields, a
loader returns these names.

A prompt is the model's own chat template around the question and one sentence of instruction, as in the authors'
scripts (arXiv 2602.14169). For base models it may instead be one of the templates of Dr. GRPO (arXiv 2503.20783,
sail-sg/understand-r1-zero): `qwen_math`, `r1` and `no`. These stand around the bare question, so the model is then not
told to write `####` before the answer to a GSM8K question.
"""
import datetime
import hashlib
import json
import re
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jinja2 import TemplateError

from grading import GRADERS, grade_last_number, grade_math, gsm8k_gold

GSM8K_INSTRUCTION = ' Let\'s think step by step and output the final answer after "####".'
MATH_INSTRUCTION = r" Let's think step by step and output the final answer within \boxed{}."
INSTRUCTIONS = {"hash": GSM8K_INSTRUCTION, "last": GSM8K_INSTRUCTION, "boxed": MATH_INSTRUCTION}     # by --answer
TEMPLATES = {                                        # the text before and after the question
    "chat": None,
    "qwen_math": ("<|im_start|>system\n"
                  "Please reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
                  "<|im_start|>user\n",
                  "<|im_end|>\n<|im_start|>assistant\n"),
    "r1": ("A conversation between User and Assistant. The User asks a question, and the Assistant solves "
           "it. The Assistant first thinks about the reasoning process in the mind and then provides the "
           "User with the answer. The reasoning process is enclosed within <think> </think> and answer is "
           "enclosed within <answer> </answer> tags, respectively, i.e., <think> reasoning process here "
           "</think> <answer> answer here </answer>.\nUser: ",
           "\nAssistant: <think>"),
    "no": ("", ""),
}
# A chat template asks for today's date by strftime_now("%d %b %Y"), and may first ask whether it can.
TODAY = re.compile(r"""strftime_now\s*\(\s*(["'])((?:(?!\1)[^\\])*)\1\s*\)""")
CAN_ASK = re.compile(r"strftime_now\s+is\s+(?:not\s+)?defined")
SUBJECTS = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory",
            "prealgebra", "precalculus")


class Source(NamedTuple):
    """Where a set comes from: its file in --data-dir, its hub name, configs and splits, and its known row counts."""
    file: str
    hub: str
    configs: tuple
    splits: tuple
    counts: tuple


# OlympiadBench has 675 rows in the suite of Dr. GRPO, and 674 on the hub. MATH levels 3 to 5 without MATH500 has 8,523
# rows in Dr. GRPO, and 8,886 in the file that other projects share. The hub's full set should leave about as many.
SETS = {
    "gsm8k_train": Source("gsm8k_train.jsonl", "openai/gsm8k", ("main",), ("train",), (7473,)),
    "gsm8k": Source("gsm8k_test.jsonl", "openai/gsm8k", ("main",), ("test",), (1319,)),
    "math_train": Source("math_lvl3to5_train.jsonl", "EleutherAI/hendrycks_math", SUBJECTS, ("train", "test"),
                         (8523, 8886, 8888)),
    "aime24": Source("eval_aime24.jsonl", "HuggingFaceH4/aime_2024", (None,), ("train",), (30,)),
    "amc": Source("eval_amc.jsonl", "AI-MO/aimo-validation-amc", (None,), ("train",), (83,)),
    "math500": Source("eval_math500.jsonl", "HuggingFaceH4/MATH-500", (None,), ("test",), (500,)),
    "minerva": Source("eval_minerva.jsonl", "math-ai/minervamath", (None,), ("test",), (272,)),
    "olympiadbench": Source("eval_olympiadbench.jsonl", "math-ai/olympiadbench", (None,), ("test",),
                            (674, 675)),
}


class Question(NamedTuple):
    """A question as the policy sees it. Text and gold answer are for people, the prompt (token ids) is for the model.

    answer: how a response states its answer, one of grading.GRADERS. Only with "boxed" may gold be a list of
    alternatives. template: that of the prompt, one of TEMPLATES.
    """
    text: str
    gold: str | list[str]
    prompt: list[int]
    answer: str = "hash"
    template: str = "chat"


def fix_date(tokenizer, date: str) -> str | None:
    """Put this date, such as 2026-01-31, into a chat template that asks for today's, for example that of Llama 3.2.

    Prompts would otherwise change from day to day. Returns the date, or None if the template does not ask for one.
    Raises ValueError when it does so in a way that cannot be replaced, and for anything else than a date.
    """
    try:
        day = datetime.date.fromisoformat(date)
    except (TypeError, ValueError):
        raise ValueError(f"the date of the prompts must be one like 2026-01-31, got {date!r}") from None
    if tokenizer.chat_template is None:
        return None
    template = tokenizer.get_chat_template()
    fixed = TODAY.sub(lambda call: json.dumps(day.strftime(call[2])), template)
    if "strftime_now" in CAN_ASK.sub("", fixed):
        raise ValueError("the chat template asks for today's date in a way that cannot be replaced by a fixed one, so "
                         "prompts would change from day to day: give the tokenizer another template")
    if fixed == template:
        return None
    tokenizer.chat_template = fixed
    return date


def digests(questions) -> dict[str, str]:
    """Checksums of what is asked and what counts as right (rows), and of the prompts as token ids (prompts)."""
    parts = {"rows": [[q.text, q.gold, q.answer] for q in questions], "prompts": [q.prompt for q in questions]}
    return {name: hashlib.sha256(json.dumps(part).encode()).hexdigest()[:16] for name, part in parts.items()}


def chat_prompt(tokenizer, text):
    """Token ids of one user message `text` in the tokenizer's chat template, up to where the answer begins."""
    turns = [{"role": "user", "content": text}]
    try:
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
    except TemplateError as error:
        raise ValueError(f"the chat template of the tokenizer cannot be used: {error}") from error


def plain_prompt(tokenizer, text):
    """Token ids of a text that the model goes on with: with BOS if the tokenizer puts it first, without EOS at the end.

    Raises ValueError for a tokenizer that writes the text itself in another way when it adds such tokens.
    """
    ids, bare = (list(tokenizer(text, add_special_tokens=added)["input_ids"]) for added in (True, False))
    for start in range(len(ids) - len(bare) + 1):
        if ids[start:start + len(bare)] == bare:
            return ids[:start + len(bare)]
    raise ValueError("the tokenizer writes a prompt differently with and without special tokens: use --template chat")


def make_questions(rows, tokenizer, max_prompt_tokens, template="chat", answer=None):
    """Return (questions, skipped): a Question per row, and the rows whose prompt is longer than max_prompt_tokens.

    template: one of TEMPLATES. answer: one of grading.GRADERS, or None for what the rows come with: "hash" for those of
    GSM8K, "boxed" for those of MATH. Raises ValueError for any other template or answer, for "chat" if the tokenizer
    has no chat template, and for a gold answer that a response cannot state in this way.
    """
    if answer is not None and answer not in GRADERS:
        raise ValueError(f"answer must be one of {', '.join(GRADERS)}, got {answer!r}")
    if template not in TEMPLATES:
        raise ValueError(f"template must be one of {', '.join(TEMPLATES)}, got {template!r}")
    if template == "chat" and tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template, and template is 'chat': "
                         "use qwen_math, r1 or no")
    questions, skipped = [], []
    for row in rows:
        math = row.get("problem") is not None
        text, gold = (row["problem"], row["answer"]) if math else (row["question"], gsm8k_gold(row["answer"]))
        how = answer or ("boxed" if math else "hash")
        if math and how != "boxed":
            gold = number_of(gold, text, how)
        if how == "last" and not grade_last_number(gold, gold):
            raise ValueError(f"the question {text[:40]!r} has the answer {gold[:40]!r}, which is more than one number: "
                             "with answer 'last' only the last one can be read, so use 'hash'")
        if template == "chat":
            prompt = chat_prompt(tokenizer, text + INSTRUCTIONS[how])
        else:
            before, after = TEMPLATES[template]
            prompt = plain_prompt(tokenizer, before + text + after)
        if not prompt:
            raise ValueError(f"the prompt of the question {text[:40]!r} is empty: does the chat template hold the "
                             "messages?")
        if len(prompt) > max_prompt_tokens:
            skipped.append(row)
        else:
            questions.append(Question(text, gold, prompt, how, template))
    return questions, skipped


def number_of(gold, text, how) -> str:
    """The gold answer of a MATH row, for --answer `how`. Raises ValueError if it is not one number."""
    try:
        return gsm8k_gold(f"#### {gold}")
    except ValueError:
        raise ValueError(f"the question {text[:40]!r} has the answer {str(gold)[:40]!r}, which is not a number: with "
                         f"answer {how!r} only numbers can be read, so use 'boxed'") from None


def stop_ids(tokenizer, model):
    """The ids that end an answer, sorted: the eos of the checkpoint, and what its chat template ends turns with.

    Both are needed. The eos of a base Qwen2.5 is 151643, but inside a chat the base Math models write <|im_end|>
    (151645). Raises ValueError when there is no such id, or one that is no token id.
    """
    found = [tokenizer.eos_token_id]
    for config in (model.config, model.generation_config):
        eos = getattr(config, "eos_token_id", None)
        found += eos if isinstance(eos, (list, tuple)) else [eos]
    if tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        _, _, end = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("answer")
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        found += special & set(tokenizer.encode(end, add_special_tokens=False))
    found = [i for i in found if i is not None]
    if wrong := [i for i in found if type(i) is not int or i < 0]:
        raise ValueError(f"a stop id must be a token id, an integer of at least 0, got {wrong[0]!r} from the config, "
                         "the generation config or the tokenizer of the model")
    if not found:
        raise ValueError("neither the tokenizer nor the model names an end-of-sequence token, "
                         "so no answer could end")
    return sorted(set(found))


def split_validation(rows, n=256):
    """Return (train, validation): n rows are held out to choose the best checkpoint. Both keep the order of the rows.

    They are drawn at random, and are the same ones for every seed of a run. The last rows of a file would be no such
    sample: those of MATH are all from one subject.
    """
    if not 1 <= n < len(rows):
        raise ValueError(f"{n} of the {len(rows)} training rows are to be held out to choose the best checkpoint: hold "
                         f"out 1 to {len(rows) - 1} (--val-rows), or give more rows")
    held_out = set(np.random.default_rng(0).permutation(len(rows))[-n:].tolist())
    return ([row for i, row in enumerate(rows) if i not in held_out],
            [row for i, row in enumerate(rows) if i in held_out])


def load_set(name, data_dir=None):
    """Return the rows of one of SETS, from its file in the folder data_dir, or from the hub.

    Prints a warning when there are more or fewer rows than known. Raises ValueError, which names the file and line or
    the data set and row, and says what is wrong.
    """
    if name not in SETS:
        raise ValueError(f"name must be one of {', '.join(SETS)}, got {name!r}")
    source, math = SETS[name], not name.startswith("gsm8k")
    if data_dir is not None:
        where = Path(data_dir) / source.file
        rows = _read_jsonl(where, math)
    else:
        where = source.hub
        parts = [(config, split) for config in source.configs for split in source.splits]
        rows = [row for config, split in parts for row in _read_hub(where, config, split, math)]
        if name == "math_train":
            everything, rows = len(rows), filter_math(rows, load_set("math500"))
            print(f"{where}: {len(rows)} of {everything} rows are left, levels 3-5 without MATH500")
    if len(rows) not in source.counts:
        known = " or ".join(f"{count:,}" for count in source.counts)
        print(f"warning: {where} has {len(rows):,} rows, {name} is known with {known}")
    return rows


def load_rows(source, split):
    """Return rows of either kind from a local .jsonl, or GSM8K rows from a data set of the hub.

    split: of the data set; it is not used for a local file. Raises ValueError, which names the file and the line, or
    the data set, and says what is wrong.
    """
    if str(source).endswith((".jsonl", ".json")) or Path(source).exists():
        return _read_jsonl(Path(source))
    return _read_hub(source, "main" if source.endswith("gsm8k") else None, split, math=False)


def filter_math(rows, test_rows):
    """The MATH rows of levels 3 to 5 whose problem is not in test_rows. White space is normalised before comparing."""
    def words(row):
        return " ".join(row["problem"].split())

    test = {words(row) for row in test_rows}
    return [row for row in rows if re.search("[345]$", str(row.get("level"))) and words(row) not in test]


def last_boxed(solution):
    r"""What the last \boxed{..} or \fbox{..} of a MATH solution holds, or None. \boxed 2 holds what is before a $."""
    rest = solution[max(solution.rfind(r"\boxed"), solution.rfind(r"\fbox"), 0):]
    match = re.match(r"\\(?:boxed|fbox)\s*", rest)
    rest = rest[match.end():] if match else ""
    if not rest.startswith("{"):
        return rest.split("$")[0].strip() or None
    depth = 0
    for part in re.finditer(r"\\.|[{}]", rest):      # \{ and \} do not count
        depth += (part[0] == "{") - (part[0] == "}")
        if depth == 0:
            return rest[1:part.start()]


def _read_hub(name, config, split, math):
    from datasets import load_dataset  # slow to import, and not needed for local files

    try:
        rows = load_dataset(name, *([config] if config else []), split=split)
    except Exception as error:                       # it may have many types, and the user needs one line
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"data set {name!r} is neither a local .jsonl nor can the hub load it: "
                         f"{reason}") from error
    place = ", ".join(filter(None, (name, config, split)))
    return [_check_row(row, f"{place}, row {i}", math) for i, row in enumerate(rows)]


def _read_jsonl(path, math=None):
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")     # splitlines would also split at \u2028
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the data file {path}: {error}") from error
    rows = []
    for number, line in enumerate((line.lstrip("\ufeff") for line in lines), start=1):      # files may be joined
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_float=Decimal)                 # a float would not keep all digits
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", None) or str(error)
            raise ValueError(f"{path}, line {number}: not valid JSON ({reason}); every line must be one object"
                             ) from error
        rows.append(_check_row(row, f"{path}, line {number}", math))
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return rows


def _check_row(row, where, math=None):
    """Return the row under the names of the module's docstring. Raises ValueError when it lacks something.

    math: whether it is a MATH row. None means that its fields decide.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row must be an object with named fields, got {type(row).__name__}")
    if math or math is None and row.get("problem") is not None:
        return _check_math_row(row, where)
    if not all(is_text(row.get(name)) for name in ("question", "answer")):
        raise ValueError(f"{where}: a row needs the text fields 'question' and 'answer', it has "
                         f"{kinds(row, ('question', 'answer'))}")
    try:
        gsm8k_gold(row["answer"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return row


def is_text(value) -> bool:
    """Is it a text with something in it, which can be written as UTF-8?"""
    return isinstance(value, str) and value.strip() != "" and not re.search("[\ud800-\udfff]", value)


def number_text(value):
    """A number as text, with all its digits, and 142.0 as 142. Anything else stays as it is.

    A number of a file is an int or a Decimal, and that of a data set of the hub may be a float. Those from 2^53 on stay
    as they are, because they may have been rounded, and so do nan, inf and numbers of more than 400 digits.
    """
    if isinstance(value, float) and abs(value) < 2**53:
        value = Decimal(repr(value))
    if isinstance(value, Decimal) and abs(value.adjusted()) <= 400:
        digits = f"{value:f}"
        return (digits.rstrip("0").rstrip(".") if "." in digits else digits) if value else "0"
    return str(value) if type(value) is int else value


def kinds(row, names) -> str:
    """The fields of a row for a message: what `names` hold where it is no text, and the names alone of the others."""
    def kind(name):
        value = row[name]
        if name not in names or is_text(value):
            return name
        if isinstance(value, str):
            return f"{name} (blank)" if not value.strip() else f"{name} (no valid UTF-8)"
        return f"{name} ({json.dumps(value, default=str)[:40]})"

    return ", ".join(map(kind, row)) or "no fields"


def _check_math_row(row, where):
    """Return a MATH row with `problem` and `answer`. Raises ValueError when it lacks something.

    The problem comes from `problem` or `question`. The answer comes from `answer`, `final_answer` or the box of
    `solution`. Answers of AMC are floats, and answers of AIME have leading zeros.
    """
    problem = row.get("problem") or row.get("question")
    answer = row["answer"] if row.get("answer") is not None else row.get("final_answer")
    if answer is None and isinstance(row.get("solution"), str):
        answer = last_boxed(row["solution"])
    golds = [number_text(gold) for gold in (answer if isinstance(answer, list) else [answer])]
    if not golds or not all(is_text(text) for text in [problem, *golds]):
        found = kinds(row, ("problem", "question", "answer", "final_answer"))
        raise ValueError(f"{where}: a row needs the text 'problem' (or 'question') and an 'answer' (or "
                         "'final_answer', or a 'solution' with a \\boxed{}), which is text, a finite number or a "
                         f"list of these; it has {found}")
    golds = [re.sub(r"^0+(?=\d+$)", "", gold) for gold in golds]
    if marked := [gold for gold in golds if "####" in gold]:
        raise ValueError(f"{where}: the answer {marked[0][-40:]!r} is one of a GSM8K row, whose question has the field "
                         "'question' and not 'problem'")
    for gold in golds:                               # a lone sign, or braces that do not match
        odd = not any(c.isalnum() for c in gold) or gold.count("{") != gold.count("}")
        if odd and not grade_math(rf"\boxed{{{gold}}}", gold):
            raise ValueError(f"{where}: no response can equal the answer {gold!r}, because the grader cannot read it")
    return row | {"problem": problem, "answer": golds if isinstance(answer, list) else golds[0]}
