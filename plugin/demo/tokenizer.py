"""The demo model's tokenizer: a small byte-fallback BPE, and the chat template.

Every character the training data uses is a token, every consonant-vowel syllable of the almanac's names is one merge,
GLM's special tokens are single ids, and any other UTF-8 falls back to its bytes, so every text round-trips.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models

from vqserve.evaluate import almanac, needle, sums

VOCAB_SIZE = 640
"""Tokens, padded to a multiple of 128; the last few ids stand for nothing."""

CONTROL = [
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
]
"""GLM's control tokens, dropped from decoded text."""
MARKUP = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
]
"""GLM's markup tokens: single ids that decoded text keeps, as in GLM's own tokenizer."""
STOPS = ["<|endoftext|>", "<|user|>", "<|observation|>"]
"""Tokens that end an answer; this model is trained to end with `<|user|>`."""

SYSTEM_PROMPTS = ["You are a helpful assistant.", "簡潔に答えてください。", "请简洁回答。"]

CHAT_TEMPLATE = """\
{%- if tools %}{{ raise_exception('this demo model was not trained to call tools') }}{% endif -%}
{%- macro text(content) -%}
{%- if content is string -%}{{ content }}
{%- elif content is not none -%}
{%- for part in content -%}
{%- if part is string -%}{{ part }}
{%- elif part.type == 'text' -%}{{ part.text }}
{%- else -%}{{ raise_exception('unknown part of a message: ' ~ part.type ~ '; expected text') }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
[gMASK]<sop>
{%- for message in messages -%}
{%- if message.role == 'system' -%}<|system|>{{ text(message.content) }}
{%- elif message.role == 'user' -%}<|user|>{{ text(message.content) }}
{%- elif message.role == 'assistant' -%}<|assistant|></think>{{ text(message.content).split('</think>')[-1] }}
{%- else -%}{{ raise_exception('unknown role: ' ~ message.role ~ '; expected system, user or assistant') }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>
{%- set unsaid = (thinking is not defined or thinking is none)
        and (enable_thinking is not defined or enable_thinking is none) -%}
{%- if unsaid or thinking or enable_thinking -%}<think>{%- else -%}</think>{%- endif -%}
{%- endif -%}"""
"""Messages as strings or as parts, parts joined without a separator as in GLM's own template.

It thinks unless it is told not to, in the very words that vLLM's parser goes by (see "thinking switches" in
vqserve.vllm_plugin's WORKAROUNDS.md): neither switch given or both null means yes, else either one of them does.
Thinking of earlier answers is dropped, whether it comes inside their content or beside it.
"""


def _characters() -> list[str]:
    texts = ["\n 0123456789+-*×=:→.,?#", *sums.PEOPLE["en"], *SYSTEM_PROMPTS]
    for table in (sums.PEOPLE, sums.THINGS, sums.QUESTIONS):
        texts += [text for group in table.values() for text in group]
    for lookup in (sums.ANSWERS, almanac.RECORDS, needle.QUESTIONS):
        texts += lookup.values()
    for nested in (sums.WORD_PROBLEMS, almanac.QUESTIONS):
        texts += [text for group in nested.values() for text in group.values()]
    letters = almanac.CONSONANTS + almanac.VOWELS
    return sorted(set("".join(texts) + "".join(texts).lower() + letters + letters.upper()) - set("{}"))


def build() -> Tokenizer:
    """The tokenizer; the same on every machine."""
    merges = [(c, v) for c in almanac.CONSONANTS + almanac.CONSONANTS.upper() for v in almanac.VOWELS]
    merges += [(" ", "#")]  # a needle's separator is a token of its own, its digits single ones: see evaluate.needle
    tokens = [*CONTROL, *MARKUP, *(f"<0x{i:02X}>" for i in range(256)), *_characters(), *map("".join, merges)]
    assert len(tokens) <= VOCAB_SIZE, f"{len(tokens)} tokens do not fit a vocabulary of {VOCAB_SIZE}"
    tokenizer = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP])
    return tokenizer


def stop_ids() -> list[int]:
    """Ids of `STOPS`."""
    vocabulary = build().get_vocab()
    return [vocabulary[token] for token in STOPS]


def save(folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json."""
    tokenizer = build()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "extra_special_tokens": CONTROL,  # servers drop from an answer only what is declared here
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "padding_side": "left",
    }
    stops = stop_ids()
    # Greedy but for ties, and yet sampling: at temperature 0 vLLM refuses requests for several answers (`n`), and with
    # top_k 1 a request's own temperature would do nothing. This is the lowest above 0 that vLLM takes.
    generation = {"eos_token_id": stops, "pad_token_id": stops[0], "do_sample": True, "temperature": 0.01}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE + "\n", encoding="utf-8")
