"""Calibration files: what is read, what counts, and what is refused with file and line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from vqserve.encode.calibration import read_calibration
from vqserve.format.errors import UsageError
from vqserve.model.tokens import BATCH_TOKENS, Tokens
from vqserve.model.weights import open_tokenizer


@pytest.fixture
def tokenizer(random_parent: Path) -> PreTrainedTokenizerBase:
    return open_tokenizer(random_parent)


@pytest.fixture
def demo_tokenizer(demo_parent: Path) -> PreTrainedTokenizerBase:
    return open_tokenizer(demo_parent)


def write(folder: Path, *lines: object) -> Path:
    path = folder / "calibration.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def read(path: Path, tokenizer: PreTrainedTokenizerBase, longest: int = 2048) -> Tokens:
    return read_calibration(path, tokenizer, longest=longest, seed=0)[0]


def counted(tokens: Tokens, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text whose prediction counts."""
    return str(tokenizer.decode(tokens.ids[1:][tokens.predicts[:-1]]))


CHAT: list[dict[str, str]] = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "それは2です。"}]


def test_every_token_of_a_text_counts_but_the_first(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = read(write(tmp_path, {"text": "[gMASK]<sop><|user|>三加四？"}), tokenizer)
    assert tokenizer.decode(tokens.ids) == "[gMASK]<sop><|user|>三加四？"
    assert tokens.predicts.tolist() == [True] * (len(tokens.ids) - 1) + [False]


def test_only_the_completion_counts_after_a_prompt(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    record = {"prompt": "<|user|>三加四？<|assistant|></think>", "completion": "七。<|user|>"}
    tokens = read(write(tmp_path, record), tokenizer)
    assert tokenizer.decode(tokens.ids) == record["prompt"] + record["completion"]
    assert counted(tokens, tokenizer) == record["completion"]


def test_chats_go_through_the_chat_template_and_only_the_answer_counts(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}</think>{% endif %}{{ m.content }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{{ '<think>' if enable_thinking else '</think>' }}{% endif %}"
    )
    record = {"messages": CHAT, "chat_template_kwargs": {"enable_thinking": False}}
    tokens = read(write(tmp_path, record), tokenizer)
    assert tokenizer.decode(tokens.ids) == "<|user|>1+1?<|assistant|></think>それは2です。"
    assert counted(tokens, tokenizer) == "それは2です。"
    # Of a chat without thinking the template asks for an answer without, whatever its default is.
    assert read(write(tmp_path, {"messages": CHAT}), tokenizer).fingerprint() == tokens.fingerprint()
    with pytest.raises(UsageError, match=r"line 1: the chat template asks for an answer with .*<think>', and renders"):
        read(write(tmp_path, {"messages": CHAT, "chat_template_kwargs": {"enable_thinking": True}}), tokenizer)


@pytest.mark.parametrize(
    "answer",
    [
        {"content": "2", "reasoning_content": "one more than 1"},
        {"content": "2", "reasoning": "one more than 1"},
        {"content": "<think>one more than 1</think>2"},
        {"content": "\n<think>one more than 1</think>2"},
        {"content": [{"type": "text", "text": "one more than 1</think>2"}]},
    ],
)
def test_thinking_counts_wherever_the_row_has_it_and_though_the_template_drops_it(
    answer: dict[str, Any], tmp_path: Path, demo_tokenizer: PreTrainedTokenizerBase
) -> None:
    record = {"messages": [CHAT[0], {"role": "assistant", **answer}]}
    tokens = read(write(tmp_path, record), demo_tokenizer)
    assert demo_tokenizer.decode(tokens.ids) == "[gMASK]<sop><|user|>1+1?<|assistant|><think>one more than 1</think>2"
    assert counted(tokens, demo_tokenizer) == "one more than 1</think>2"


def test_text_parts_are_the_string_that_they_make(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, demo_tokenizer: PreTrainedTokenizerBase
) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "1+1?"}]}, CHAT[1]]
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}" + PROMPT
    for each in (tokenizer, demo_tokenizer):  # one template takes strings only, the other both
        string, list_ = (read(write(tmp_path, {"messages": chat}), each) for chat in (CHAT, parts))
        assert string.fingerprint() == list_.fingerprint()


PROMPT = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


def test_tool_calls_are_rendered_as_the_server_renders_them(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = (
        "{% if tools %}{{ tools[0].function.name }};{% endif %}"
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}:"
        "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }},{% endfor %}"
        "{% endfor %}{% endfor %}" + PROMPT
    )
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
    asks = {"role": "assistant", "content": None, "tool_calls": [call]}
    messages = [CHAT[0], asks, {"role": "tool", "content": "3"}, {"role": "assistant", "content": "3."}]
    tokens = read(write(tmp_path, {"messages": messages, "tools": TOOLS}), tokenizer)
    assert tokenizer.decode(tokens.ids) == "add;<|user|>1+1?<|assistant|>add:a=1,b=2,<|tool|>3<|assistant|>3."
    assert counted(tokens, tokenizer) == "3."
    tokens = read(write(tmp_path, {"messages": messages[:2], "tools": TOOLS}), tokenizer)
    assert counted(tokens, tokenizer) == "add:a=1,b=2,"


GLM = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>{% if m.role != 'assistant' %}{{ m.content }}{% else %}"
    "{% set thinking, content = m.reasoning_content or '', m.content %}"
    "{% if not thinking and '</think>' in content %}"
    "{% set thinking = content.split('</think>')[0].split('<think>')[-1] %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<think>' + thinking.strip() if thinking }}</think>{{ content.strip() }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}"
    "{% for k, v in c.function.arguments.items() %}<arg_key>{{ k }}</arg_key><arg_value>{{ v }}</arg_value>{% endfor %}"
    "</tool_call>{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{{ '<think>' if enable_thinking is not defined or enable_thinking else '</think>' }}{% endif %}"
)
"""As GLM's own: thinking and content lose the whitespace around them, calls follow."""


def calling(arguments: Any, **answer: Any) -> dict[str, Any]:
    """A chat that ends with a call."""
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    return {"messages": [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [call], **answer}]}


@pytest.mark.parametrize(
    ("answer", "counts"),
    [
        ({"reasoning": "\nhmm\n"}, "hmm</think>"),
        ({"reasoning_content": "hmm", "content": " so\n"}, "hmm</think>so"),
        ({"content": "<think>\nhmm\n</think>\nso"}, "hmm</think>so"),
        ({}, ""),
    ],
)
def test_thinking_content_and_tool_calls_of_an_answer_count_together(
    answer: dict[str, Any], counts: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = GLM
    tokens = read(write(tmp_path, calling('{"a": 1}', **answer)), tokenizer)
    call = "<tool_call>add<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>"
    assert counted(tokens, tokenizer) == counts + call


@pytest.mark.parametrize("instead", ["''", "'<think>'"])
def test_tool_calls_count_though_the_template_drops_the_thinking(
    instead: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = GLM.replace("'<think>' + thinking.strip() if thinking", instead)
    tokens = read(write(tmp_path, calling({}, reasoning="hmm", content="so")), tokenizer)
    assert counted(tokens, tokenizer) == "hmm</think>so<tool_call>add</tool_call>"


@pytest.mark.parametrize(
    ("drops", "instead", "answer", "part"),
    [
        ("{{ c.function.name }}", "", {}, "tool calls"),
        ("{{ c.function.name }}", "", {"reasoning": "hmm"}, "tool calls"),
        ("<arg_key>{{ k }}</arg_key><arg_value>{{ v }}</arg_value>", "", {"reasoning": "hmm"}, "tool calls"),
        ("{{ content.strip() }}", "", {"content": "so"}, "content"),
        ("{{ content.strip() }}", "", {"content": "so", "reasoning": "so"}, "content"),
        ("thinking.strip()", "thinking[:2]", {"reasoning": "hmm"}, "thinking"),
    ],
)
def test_what_the_template_leaves_out_of_an_answer_is_refused(
    drops: str,
    instead: str,
    answer: dict[str, Any],
    part: str,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer.chat_template = GLM.replace(drops, instead)
    with pytest.raises(UsageError, match=f"line 1: the chat template leaves out or alters the {part} of the answer"):
        read(write(tmp_path, calling({"a": 1}, **answer)), tokenizer)


def test_thinking_that_the_row_rules_out_is_refused_though_the_content_repeats_it(
    tmp_path: Path, demo_tokenizer: PreTrainedTokenizerBase
) -> None:
    messages = [CHAT[0], {"role": "assistant", "reasoning": "2", "content": "2"}]
    record = {"messages": messages, "chat_template_kwargs": {"enable_thinking": False}}
    with pytest.raises(UsageError, match="line 1: the chat template leaves out or alters the"):
        read(write(tmp_path, record), demo_tokenizer)


@pytest.mark.parametrize(
    "first_only",
    [
        GLM.replace("in m.tool_calls or []", "in (m.tool_calls or [])[:1]"),
        GLM.replace("in c.function.arguments.items()", "in (c.function.arguments if loop.first else {}).items()"),
    ],
)
def test_every_tool_call_has_to_be_rendered(
    first_only: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    record = calling({"a": 1})
    record["messages"][1]["tool_calls"] *= 2
    tokenizer.chat_template = GLM
    call = "<tool_call>add<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>"
    assert counted(read(write(tmp_path, record), tokenizer), tokenizer) == 2 * call
    tokenizer.chat_template = first_only
    with pytest.raises(UsageError, match="leaves out or alters the tool calls of the answer"):
        read(write(tmp_path, record), tokenizer)


@pytest.mark.parametrize("answer", [{}, {"reasoning": "hmm"}, {"content": "<think>hmm</think>so"}])
def test_tool_calls_that_the_demo_cannot_make_are_refused(
    answer: dict[str, Any], tmp_path: Path, demo_tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(UsageError, match="leaves out or alters the tool calls of the answer"):
        read(write(tmp_path, calling("{}", **answer)), demo_tokenizer)


@pytest.mark.parametrize("nothing", [None, "", "null", {}])
def test_tool_calls_without_arguments_have_an_empty_object_of_them(
    nothing: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = GLM
    tokens = read(write(tmp_path, calling(nothing)), tokenizer)
    assert counted(tokens, tokenizer) == "<tool_call>add</tool_call>"


@pytest.mark.parametrize(
    "arguments", ["{not json", "[" * 100_000, '{"a": 1, "a": 2}', '{"a": NaN}', "[1]", [1], 7, '{"a": "\ud800"}']
)
def test_arguments_that_are_no_object_are_refused(
    arguments: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = GLM
    path = tmp_path / "calibration.jsonl"
    path.write_text(json.dumps(calling(arguments)))
    with pytest.raises(UsageError, match=r"line 1, arguments of a tool call: expected .*; correct them") as caught:
        read(path, tokenizer)
    assert "\n" not in str(caught.value)


def test_thinking_that_was_cut_off_counts_as_it_was_written(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, demo_tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = GLM
    record: dict[str, Any] = {"messages": [CHAT[0], {"role": "assistant", "content": "<think>\nhmm"}]}
    for each in (tokenizer, demo_tokenizer):
        tokens = read(write(tmp_path, record), each)
        assert each.decode(tokens.ids) == "[gMASK]<sop><|user|>1+1?<|assistant|><think>\nhmm"
        assert counted(tokens, each) == "\nhmm"
        for change in ({"chat_template_kwargs": {"enable_thinking": False}}, calling({}, content="<think>hmm")):
            with pytest.raises(UsageError, match="line 1: <think> of the answer has no </think>"):
                read(write(tmp_path, {**record, **change}), each)


def test_thinking_in_two_fields_is_refused_if_they_differ(
    tmp_path: Path, demo_tokenizer: PreTrainedTokenizerBase
) -> None:
    answer = {"role": "assistant", "content": "2", "reasoning": "hmm", "reasoning_content": "hmm"}
    tokens = read(write(tmp_path, {"messages": [CHAT[0], answer]}), demo_tokenizer)
    assert counted(tokens, demo_tokenizer) == "hmm</think>2"
    with pytest.raises(UsageError, match='line 1: "reasoning" and "reasoning_content" of a message differ'):
        read(write(tmp_path, {"messages": [CHAT[0], {**answer, "reasoning": "well"}]}), demo_tokenizer)
    tokens = read(write(tmp_path, {"messages": [CHAT[0], {**answer, "reasoning_content": None}]}), demo_tokenizer)
    assert counted(tokens, demo_tokenizer) == "hmm</think>2"
    without = {"role": "assistant", "content": "2", "reasoning_content": None}
    assert counted(read(write(tmp_path, {"messages": [CHAT[0], without]}), demo_tokenizer), demo_tokenizer) == "2"


def test_a_chat_without_an_answer_is_read_and_counts_for_none(
    tmp_path: Path, demo_tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write(tmp_path, {"messages": CHAT[:1]}, {"messages": CHAT})
    tokens, report = read_calibration(path, demo_tokenizer, longest=2048, seed=0)
    assert "<|user|>1+1?<|assistant|><think>" in demo_tokenizer.decode(tokens.ids)
    assert (report.rows, report.short, report.silent) == (2, 0, 1)
    assert report.predictions == len(demo_tokenizer.encode(CHAT[1]["content"], add_special_tokens=False))
    with pytest.raises(UsageError, match=r"no token of an answer .*; end chats with an answer"):
        read(write(tmp_path, {"messages": CHAT[:1]}), demo_tokenizer)


@pytest.mark.parametrize(
    "name", ["add_generation_prompt", "chat_template", "conversation", "messages", "padding", "return_dict", "tokenize"]
)
def test_chat_template_kwargs_may_not_set_what_the_encoder_sets(
    name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write(
        tmp_path, {"text": "fine"}, {"messages": CHAT, "chat_template_kwargs": {name: True, "thinking": False}}
    )
    with pytest.raises(UsageError, match=rf"line 2: chat_template_kwargs may not set '{name}'; .*enable_thinking$"):
        read(path, tokenizer)


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "a b", "text": "c d"}',
        '{"messages": [{"role": "user", "role": "assistant", "content": "a"}]}',
    ],
)
def test_a_key_twice_is_refused(line: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UsageError, match=r"line 2: .*key '(text|role)' occurs 2 times; give one JSON object per line"):
        read(write(tmp_path, {"text": "fine"}, line), tokenizer)


def test_what_became_of_the_lines_is_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    asked = {"prompt": "x" * 150, "completion": "y"}  # its answer lies behind the cut
    path = write(tmp_path, {"text": "a" * 500}, {"text": "b" * 7}, {"text": "c"}, asked)
    tokens, report = read_calibration(path, tokenizer, longest=100, seed=0)
    assert (report.rows, report.short, report.cut, report.silent) == (4, 1, 2, 1)
    assert (report.tokens, report.dropped) == (207, 451)
    assert report.predictions == int(tokens.predicts.sum()) == 99 + 6
    assert "2 lines cut to 100 tokens (451 tokens lost); 1 lines without an answer" in str(report)


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "calibration.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one two"}\n')
    assert tokenizer.decode(read(path, tokenizer).ids) == "one two"


def test_long_sequences_are_cut_and_blank_lines_skipped(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = read(write(tmp_path, {"text": "a" * 500}, "", {"text": "b" * 7}), tokenizer, longest=100)
    assert sorted(tokens.lengths) == [7, 100]


def test_batches_hold_every_token_once_and_padding_is_marked(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, seed: int
) -> None:
    tokens = read(write(tmp_path, *({"text": "x" * (2 + (seed + 37 * n) % 300)} for n in range(200))), tokenizer)
    places = []
    for batch in tokens.batches():
        assert batch.index.numel() <= BATCH_TOKENS or len(batch.index) == 1
        assert batch.valid[:, 0].all()
        assert (batch.valid.sum(1).diff() <= 0).all()
        places += batch.index[batch.valid].tolist()
    assert sorted(places) == list(range(len(tokens.ids)))


def test_the_head_is_made_of_whole_leading_sequences(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = read(write(tmp_path, *({"text": "x" * length} for length in (50, 60, 70))), tokenizer)
    head = tokens.head(130)
    assert head.lengths == tokens.lengths[: len(head.lengths)]
    assert sum(head.lengths) == len(head.ids) == len(head.predicts) <= 130
    assert tokens.head(1).lengths == tokens.lengths[:1], "one sequence at least"


def test_order_depends_on_the_seed_alone(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write(tmp_path, *({"text": f"number {n}"} for n in range(30)))
    one, same, other = (read_calibration(path, tokenizer, longest=99, seed=seed)[0] for seed in (1, 1, 2))
    assert one.ids.tolist() == same.ids.tolist() != other.ids.tolist()


@pytest.mark.parametrize(
    "bad",
    [
        "not json",
        '"a string"',
        {},
        {"text": 3},
        {"text": "a", "prompt": "b"},
        {"prompt": "a"},
        {"messages": []},
        {"messages": "hello"},
        {"messages": [{"content": "no role"}]},
        {"messages": CHAT, "chat_template_kwargs": ["no", "object"]},
        {"messages": CHAT, "tools": "none"},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [{"role": "user", "content": 3}]},
        {"messages": [{"role": "assistant", "content": "a", "reasoning": ["b"]}]},
        {"messages": [{"role": "assistant", "content": "a", "tool_calls": ["b"]}]},
        {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{"function": {"arguments": {}}}]}]},
        "[" * 100_000,
        '{"text": NaN}',
    ],
)
def test_a_bad_line_is_refused_with_file_and_line(
    bad: object, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write(tmp_path, {"text": "fine"}, bad)
    with pytest.raises(UsageError, match=rf"{re.escape(str(path))}, line 2: ") as caught:
        read(path, tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "record",
    [
        {"text": "fine until \ud800 here"},
        {"prompt": "a", "completion": "\udfff"},
        {"messages": [{"role": "user", "content": "\ude00\ud83d"}]},
    ],
)
def test_half_a_surrogate_pair_is_refused_with_file_and_line(
    record: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / "calibration.jsonl"
    path.write_text(json.dumps({"text": "\U0001f600 is whole"}) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(UsageError, match=re.escape(f"{path}, line 2: \\u") + "d[8-f].. without its other half"):
        read(path, tokenizer)


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{{ raise_exception('no such role') }}", "TemplateError: no such role"),
        ("{{ raise_exception('no such\\nrole') }}", r"TemplateError: no such\\nrole"),
        ("{{ 1 // 0 }}", "ZeroDivisionError: "),
        ("{{ messages[9:][0].role.x }}", "UndefinedError: "),
        ("{{ 1 + 'a' }}", "TypeError: "),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError: "),
        ("{% for", "TemplateSyntaxError: "),
    ],
)
def test_messages_that_the_chat_template_fails_on_are_named(
    template: str, error: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(UsageError, match=rf"line 1: the chat template refuses these messages \({error}") as caught:
        read(write(tmp_path, {"messages": CHAT}), tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n'])
def test_a_file_without_text_is_refused(content: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"empty\.jsonl: no line with text"):
        read(path, tokenizer)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_file_that_is_missing_or_not_text_is_refused(
    content: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / "calibration.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"calibration\.jsonl: cannot be read as UTF-8 text"):
        read(path, tokenizer)


def test_a_file_without_a_token_to_predict_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write(tmp_path, {"prompt": "all prompt, no answer", "completion": ""})
    with pytest.raises(UsageError, match="no token of an answer"):
        read(path, tokenizer)


def test_a_line_may_hold_what_python_takes_for_a_line_break(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write(tmp_path, {"text": "one\u2028two\u0085three\x0cfour"})
    assert read(path, tokenizer).lengths == (len(tokenizer.encode("one\u2028two\u0085three\x0cfour")),)


def test_the_fingerprint_follows_what_is_read_not_how_it_is_written(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    text, other = {"text": "one two three"}, {"text": "one two seven"}
    answer = {"prompt": "one two ", "completion": "three"}
    files = ([text], ["", text, ""], [other], [answer])
    prints = [read(write(tmp_path, *lines), tokenizer).fingerprint() for lines in files]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
