r"""The template r1: a response reasons up to </think>, and states its answer in <answer> </answer>."""
import re


def r1_answer(text: str) -> tuple[str, bool | None]:
    """Return (answer, is its tag closed?) of a response to the template r1.

    The answer stands in the last tag after the last </think>, because the reasoning may name the tags, too. An empty
    tag is passed over. Without tags the answer is all that follows </think>, and the second value is None. If the model
    goes on with a turn of the user, then this turn and all that follows it do not count.
    """
    text = text[max(0, text.find("</think>")):]
    text = re.sub(r"</answer>\s*User:.*", "</answer>", text, flags=re.S).rpartition("</think>")[2]
    tags = [tag.partition("</answer>") for tag in text.split("<answer>")[1:]]
    if not tags:
        return text, None
    return next(((answer.strip(), bool(closed)) for answer, closed, _ in reversed(tags) if answer.strip()), ("", False))


def r1_text(text: str, answer: str, finished: bool) -> str:
    r"""What the graders read of a response to the template r1. answer: one of GRADERS.

    With "boxed", what stands in the tags counts as boxed. Of a response that is not finished, only a closed tag does,
    because 1 may be cut from 18.
    """
    stated, closed = r1_answer(text)
    if answer == "boxed" and "\\boxed" not in stated and (closed or closed is False and finished):
        return f"\\boxed{{{stated}}}"
    return stated
