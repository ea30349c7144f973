"""Is this answer right? The same graders give the reward in training and the accuracy in evaluation.

gsm8k.py compares numbers, latex.py compares MATH answers. This package imports nothing else of the repository. Start
with `grade_gsm8k`, whose file lists the rules.
"""
from grading.gsm8k import grade_gsm8k, grade_last_number, gsm8k_gold
from grading.latex import grade_math

__all__ = ["grade_gsm8k", "grade_last_number", "grade_math", "gsm8k_gold"]
