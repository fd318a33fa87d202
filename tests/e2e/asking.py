"""What tests of a served demo ask, whatever it is served on."""

from __future__ import annotations

from e2e.conftest import Server
from e2e.test_demo import MODEL, items, messages
from vqserve.evaluate import sums
from vqserve.evaluate.items import LANGUAGES


def right_of_twelve(server: Server) -> int:
    """How many of twelve sums, four in each language, the model gets right."""
    right = 0
    for item in (item for language in LANGUAGES for item in items(language)[:4]):
        answer = server.client.chat.completions.create(model=MODEL, messages=messages(item))
        right += sums.is_right(item, answer.choices[0].message.content or "")
    return right
