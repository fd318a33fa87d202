"""Requests of all kinds that metrics tell apart, more of them at once and then fewer."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from openai import OpenAI

MODEL = "glm-5.2"
LOOP = "1 1 1 1 1"
"""What the demo goes on repeating, unless it is kept from it."""
TOGETHER = (1, 4, 16, 40, 8, 2)
"""Requests at once, in one round after another."""
_SOME_TOKEN = 20


def asked(client: OpenAI, limit: int, seconds: float, seed: int) -> None:
    """Asks a server for a while, by turns one request at a time and many.

    Args:
        client: Of the demo's server, with both safety nets.
        limit: The longest context that it serves, in tokens.
        seconds: How long, by a round more or less; every kind is asked once, however short.
        seed: Of the choice.
    """
    end, chance, rounds = time.monotonic() + seconds, random.Random(seed), 0
    for kind in KINDS:
        kind(client, limit, chance.random())
    while time.monotonic() < end:
        together = TOGETHER[rounds % len(TOGETHER)]
        rounds += 1
        with ThreadPoolExecutor(together) as threads:
            answers = [
                threads.submit(kind, client, limit, chance.random())
                for kind in chance.choices(list(KINDS), list(KINDS.values()), k=together + 2)
            ]
        for answer in answers:
            answer.result()


def _thought(client: OpenAI, limit: int, share: float) -> None:
    """A sum; its thinking is longer than the server's budget."""
    _sum(client, share)


def _answered(client: OpenAI, limit: int, share: float) -> None:
    _sum(client, share, chat_template_kwargs={"enable_thinking": False})


def _streamed(client: OpenAI, limit: int, share: float) -> None:
    body = {"min_tokens": 100, "vllm_xargs": {"anti_repetition": 0.0}}
    for _ in client.completions.create(model=MODEL, prompt="12 + 34", max_tokens=400, stream=True, extra_body=body):
        pass


def _long(client: OpenAI, limit: int, share: float) -> None:
    client.completions.create(model=MODEL, prompt=_tokens(share, 1 + int(share * limit / 2)), max_tokens=16)


def _cut_off(client: OpenAI, limit: int, share: float) -> None:
    body = {"ignore_eos": True}
    client.completions.create(model=MODEL, prompt=_tokens(share, limit - 8), max_tokens=8, extra_body=body)


def _repeated(client: OpenAI, limit: int, share: float) -> None:
    """Goes on for long enough to be kept from repeating itself."""
    client.completions.create(model=MODEL, prompt=LOOP, max_tokens=300, temperature=0, extra_body={"ignore_eos": True})


def _aborted(client: OpenAI, limit: int, share: float) -> None:
    body = {"ignore_eos": True}
    with client.completions.create(
        model=MODEL, prompt=LOOP, max_tokens=limit // 2, stream=True, extra_body=body
    ) as stream:
        next(iter(stream))


def _too_long(client: OpenAI, limit: int, share: float) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.completions.create(model=MODEL, prompt=_tokens(share, limit + 1), max_tokens=1)


def _invalid(client: OpenAI, limit: int, share: float) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model=MODEL, prompt="1", temperature=-1)


KINDS: dict[Callable[[OpenAI, int, float], None], float] = {
    _thought: 6,
    _answered: 6,
    _streamed: 8,
    _long: 3,
    _cut_off: 0.3,  # seconds of reading
    _repeated: 2,
    _aborted: 1,
    _too_long: 1,
    _invalid: 1,
}
"""Kinds of requests, and how often each is chosen."""


def _sum(client: OpenAI, share: float, **body: object) -> None:
    question = f"What is {int(10 + 90 * share)} * 47?"
    client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": question}], temperature=0, extra_body=body
    )


def _tokens(share: float, most: int) -> list[int]:
    """Of a prompt, a share of which the prefix cache may have from another."""
    if most <= 0:
        return []
    head = [_SOME_TOKEN] * (most // 2)
    return head + [_SOME_TOKEN + int(share * 9)] * (most - len(head))
