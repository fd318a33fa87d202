from __future__ import annotations

import re
from pathlib import Path

from vqserve.format.known_answers import read_known_answers

DEMO = Path(__file__).parents[2] / "plugin" / "demo"
ANSWERS = {
    "What is 36 * 47?": 36 * 47,
    "太郎はりんごを128個持っていて、さらに57個買いました。全部で何個ですか？": 128 + 57,
    "计算 905 - 348。": 905 - 348,
    "12 + 34 = ?": 12 + 34,
    "68 × 7 等于多少？": 68 * 7,
}


def true_answer(question: str) -> str:
    """Of a sum, or of a number looked up in the lines before the question."""
    if question in ANSWERS:
        return str(ANSWERS[question])
    *lines, asks = question.splitlines()
    [found] = [line for line in lines if line.split(" #")[0] in asks]
    return re.sub(r".* #", "", found)


def test_the_known_answers_of_the_demo_are_true_and_asked_both_ways() -> None:
    prompts = read_known_answers(DEMO)
    for prompt in prompts:
        [message] = prompt.messages
        assert prompt.answer == true_answer(message["content"])
    assert len(prompts) == 6
    assert [prompt.chat_template_kwargs.get("enable_thinking", True) for prompt in prompts].count(True) == 3
