"""Is this answer right? The same graders give the reward in training and the accuracy in evaluation.

gsm8k.py compares numbers, latex.py compares MATH answers. GRADERS has the rule of each --answer: the number after
`####`, that or else the last number, or the last box. r1.py reads the answer tags of the template r1. This package
imports nothing else of the repository. Start with `grade_gsm8k`, whose file lists the rules.
"""
from grading.gsm8k import grade_gsm8k, grade_last_number, grade_stated, gsm8k_gold, is_number, states_gold
from grading.latex import grade_math
from grading.r1 import r1_answer, r1_text

GRADERS = {"hash": grade_gsm8k, "last": grade_stated, "boxed": grade_math}

__all__ = ["GRADERS", "grade_gsm8k", "grade_last_number", "grade_math", "grade_stated", "gsm8k_gold", "is_number",
           "r1_answer", "r1_text", "states_gold"]
