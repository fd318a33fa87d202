"""Warm-up: asks the engine the checkpoint's known answers, one after the other, before anyone else's requests count.

This compiles and fills what is compiled and filled at first use, and finds an engine that answers garbage, as a wrong
attention backend does: it streams fluently, with every health check green.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from vqserve.format.known_answers import KnownAnswer

_SHOWN = 200
"""Characters of a prompt or reply that a reason repeats."""


@dataclass(frozen=True)
class Reply:
    """What the engine said.

    Attributes:
        content: The reply without its thinking.
        reasoning: The thinking.
        finish_reason: `stop`, or why it ended otherwise.
    """

    content: str
    reasoning: str
    finish_reason: str


class WarmUpError(Exception):
    """The engine answered wrongly or not at all; the text says which prompt, what was expected and what came."""


Ask = Callable[[KnownAnswer], Awaitable[Reply]]

# Without known answers: any reply will do, thinking or direct. No chat template minds an argument it does not use.
_GENERIC = tuple(
    KnownAnswer(({"role": "user", "content": "12 + 34 = ?"},), "", 16, {"enable_thinking": thinking})
    for thinking in (True, False)
)


async def warm_up(ask: Ask, answers: Sequence[KnownAnswer], progress: Callable[[int, int], None]) -> None:
    """Asks every prompt and judges every reply.

    Args:
        ask: Has the engine answer one prompt.
        answers: The known answers of the checkpoint; if there are none, the engine only has to answer something.
        progress: Told before each prompt how many are answered, and of how many.

    Raises:
        WarmUpError: A reply does not contain the known answer.
    """
    prompts = answers or _GENERIC
    for done, prompt in enumerate(prompts):
        progress(done, len(prompts))
        reply = await ask(prompt)
        if prompt.answer not in reply.content:
            raise WarmUpError(
                f"known answer {done + 1} of {len(prompts)} is wrong: to {_cut(prompt.messages[-1]['content'])} "
                f"expected {_cut(prompt.answer)}, found {_found(reply)}; the engine computes garbage, or the "
                "checkpoint's known_answers.json is wrong: try `vqserve serve --attention dense`, and "
                "`vqserve verify` on the checkpoint"
            )


def _found(reply: Reply) -> str:
    if reply.content:
        return _cut(reply.content)
    ended = f"ended by {reply.finish_reason}"
    return f"thinking alone ({ended}): {_cut(reply.reasoning)}" if reply.reasoning else f"nothing ({ended})"


def _cut(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
