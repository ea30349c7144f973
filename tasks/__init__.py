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
    filter_math,
    load_rows,
    load_set,
    make_questions,
    split_validation,
    stop_ids,
)

__all__ = ["GSM8K_INSTRUCTION", "SETS", "TEMPLATES", "Question", "chat_prompt", "filter_math", "load_rows", "load_set",
           "make_questions", "split_validation", "stop_ids"]
