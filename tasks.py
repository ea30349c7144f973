r"""Questions and prompts: GSM8K rows from the hub or from a local file, through the model's own chat template.

A row has `question` and `answer`, the answer ending in `#### <number>`. The user's message is the question and one sentence of
instruction (the prompt of the authors' scripts, arXiv 2602.14169).
"""
import json
from pathlib import Path
from typing import NamedTuple

from grading import gsm8k_gold

GSM8K_INSTRUCTION = ' Let\'s think step by step and output the final answer after "####".'


class Question(NamedTuple):
    """A question as the policy sees it: text and gold answer for people, prompt (token ids) for the model."""
    text: str
    gold: str
    prompt: list[int]


def chat_prompt(tokenizer, text):
    """Token ids of one user message `text` in the tokenizer's own chat template, ready for the assistant's answer."""
    return tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True,
                                         return_dict=False)


def load_rows(source, split):
    """Rows {question, answer} from a local .jsonl (then split is not used) or from a data set of the hub.

    ValueError names the file and the line, or the data set, and what is wrong.
    """
    if str(source).endswith((".jsonl", ".json")) or Path(source).exists():
        return _read_jsonl(Path(source))
    from datasets import load_dataset                # slow to import, and not needed for local files
    try:
        rows = load_dataset(source, *(["main"] if source.endswith("gsm8k") else []), split=split)
    except Exception as error:                       # the hub raises many types; the person needs one line
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"data set {source!r} is neither a local .jsonl nor could it be loaded from the hub: {reason}") from error
    return [_check_row(row, f"{source}, {split}, row {i}") for i, row in enumerate(rows)]


def _read_jsonl(path):
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the data file {path}: {error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error.msg})") from error
        rows.append(_check_row(row, f"{path}, line {number}"))
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return rows


def _check_row(row, where):
    """The row, if it has a question and an answer ending in a number; ValueError otherwise."""
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) and row[name] for name in ("question", "answer")):
        raise ValueError(f"{where}: a row needs the text fields 'question' and 'answer'")
    try:
        gsm8k_gold(row["answer"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return row


def make_questions(rows, tokenizer, max_prompt_tokens):
    """(questions, skipped): a Question per row, and the rows whose prompt is longer than max_prompt_tokens."""
    questions, skipped = [], []
    for row in rows:
        prompt = chat_prompt(tokenizer, row["question"] + GSM8K_INSTRUCTION)
        if len(prompt) > max_prompt_tokens:
            skipped.append(row)
        else:
            questions.append(Question(row["question"], gsm8k_gold(row["answer"]), prompt))
    return questions, skipped
