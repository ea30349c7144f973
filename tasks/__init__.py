"""What is asked: questions, gold answers and prompts.

datasets.py reads GSM8K, MATH and the evaluation sets. lock.py is the embedded task, a combination lock that two CPU
cores can learn in a minute. This package imports only grading/. Start with `datasets.Question`.
"""
from tasks.datasets import (
    GSM8K_INSTRUCTION,
    SETS,
    TEMPLATES,
    Question,
    chat_prompt,
    digests,
    filter_math,
    fix_date,
    load_rows,
    load_set,
    make_questions,
    plain_prompt,
    split_validation,
    stop_ids,
)

__all__ = ["GSM8K_INSTRUCTION", "SETS", "TEMPLATES", "Question", "chat_prompt", "digests", "filter_math", "fix_date",
           "load_rows", "load_set", "make_questions", "plain_prompt", "split_validation", "stop_ids"]
