"""Putting items to a running server through the OpenAI API, and what comes back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2
import openai
from openai.types import Model
from openai.types.chat.chat_completion import Choice
from tqdm import tqdm

from vqserve.evaluate.items import Item
from vqserve.format.errors import UsageError
from vqserve.settings import api_key

T = TypeVar("T")

TIMEOUT = 600.0
"""Seconds one answer may take; a busy server queues."""
RETRIES = 3
"""Servers close idle connections (vLLM after 5 s), at times just as the next request goes out on one."""


@dataclass(frozen=True)
class Reply:
    """One answer.

    Attributes:
        content: The answer, without its reasoning.
        reasoning: The reasoning, empty if there is none.
        ended: The model ended it; False if it ran into the token limit.
        prompt_tokens: Tokens of the prompt as the server rendered it.
        tokens: All tokens of reasoning and answer, each with the nats by which it was likelier than the next likely
            one; empty if the server was not asked for them.
    """

    content: str
    reasoning: str
    ended: bool
    prompt_tokens: int
    tokens: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible server.

    Attributes:
        url: Its base, e.g. `http://127.0.0.1:8001`; `/v1` is added if missing.
        model: Name of the model; the first one that the server lists if None.
        concurrency: Requests under way at once.
        max_tokens: Most tokens of one answer.
        gaps: Whether to ask for the tokens of an answer and how sure each was.
    """

    url: str
    model: str | None = None
    concurrency: int = 16
    max_tokens: int = 512
    gaps: bool = False

    def ask(self, items: Sequence[Item], *, thinking: bool, progress: bool = False) -> list[Reply]:
        """Greedy answers to all items, in their order. The API key, if any, is read from VLLM_API_KEY.

        Raises:
            UsageError: The server cannot be reached, or refuses.
        """
        return self._run(self._ask(items, thinking, progress))

    def context(self) -> int | None:
        """The longest prompt and answer that the server takes, in tokens, if it says so as vLLM does.

        Raises:
            UsageError: The server cannot be reached, or refuses.
        """
        return self._run(self._context())

    def _run(self, asking: Coroutine[Any, Any, T]) -> T:
        try:
            return asyncio.run(asking)
        except (openai.APIConnectionError, httpx2.InvalidURL) as cause:
            raise UsageError(f"{self.url}: cannot be reached; start a server with `vqserve serve PATH`") from cause
        except openai.AuthenticationError as cause:
            raise UsageError(f"{self.url}: asks for an API key; put it into VLLM_API_KEY") from cause
        except openai.APIStatusError as cause:
            raise UsageError(f"{self.url}: answered {cause.status_code}: {cause.message}") from cause

    def _client(self) -> openai.AsyncOpenAI:
        try:
            wrong = not 1 <= (urlsplit(self.url).port or 80) <= 65535
        except ValueError:
            wrong = True
        if wrong:
            raise UsageError(f"{self.url}: expected a URL such as http://127.0.0.1:8001")
        if self.model is not None and not self.model.isprintable():
            raise UsageError(f"--model {self.model!r}: expected a name of printable characters")
        base = self.url.rstrip("/").removesuffix("/v1") + "/v1"
        return openai.AsyncOpenAI(base_url=base, api_key=api_key() or "none", timeout=TIMEOUT, max_retries=RETRIES)

    async def _context(self) -> int | None:
        async with self._client() as client:
            found: int | None = getattr(await self._chosen(client), "max_model_len", None)
            return found

    async def _ask(self, items: Sequence[Item], thinking: bool, progress: bool) -> list[Reply]:
        slots = asyncio.Semaphore(self.concurrency)
        label = "thinking" if thinking else "direct"
        async with self._client() as client:
            model = self.model or (await self._chosen(client)).id
            with tqdm(total=len(items), desc=label, unit="item", disable=not progress) as bar:

                async def one(item: Item) -> Reply:
                    async with slots, self._understood():
                        answer = await client.chat.completions.create(
                            model=model,
                            messages=[{"role": "user", "content": item.question}],
                            temperature=0.0,
                            max_tokens=self.max_tokens,
                            logprobs=self.gaps,
                            top_logprobs=2 if self.gaps else openai.omit,
                            extra_body={"chat_template_kwargs": {"enable_thinking": thinking}},
                        )
                        choice = answer.choices[0]
                        reasoning = getattr(choice.message, "reasoning", None) or ""
                        tokens = answer.usage.prompt_tokens if answer.usage else 0
                        content, ended = choice.message.content or "", choice.finish_reason == "stop"
                        reply = Reply(content, reasoning, ended, tokens, _gaps(choice))
                    bar.update()
                    return reply

                return await asyncio.gather(*map(one, items))

    @asynccontextmanager
    async def _understood(self) -> AsyncIterator[None]:
        """Takes an answer: the client checks neither that it is JSON nor its shape, and fails somewhere."""
        try:
            yield
        except (AttributeError, LookupError, TypeError, ValueError) as cause:
            problem = f"its answer is not that of OpenAI's API ({type(cause).__name__}: {cause})"
            raise UsageError(f"{self.url}: {problem}; give the address of a server that speaks it") from cause

    async def _chosen(self, client: openai.AsyncOpenAI) -> Model:
        async with self._understood():
            models = (await client.models.list()).data
            wanted = [model for model in models if self.model in (None, model.id)]
        if not wanted:
            listed = ", ".join(model.id for model in models) or "no model"
            raise UsageError(f"{self.url}: lists {listed}; name one that it serves with --model")
        return wanted[0]


def _gaps(choice: Choice) -> tuple[tuple[str, float], ...]:
    """Each token, and by how many nats it was likelier than the likeliest other one."""
    found = choice.logprobs.content if choice.logprobs else None
    return tuple(
        (token.token, token.logprob - max(other.logprob for other in token.top_logprobs if other.token != token.token))
        for token in found or ()
    )
