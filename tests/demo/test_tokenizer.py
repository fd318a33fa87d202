from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import tokenizer
from data import prompt_text
from vqserve.evaluate.items import Item

ITEM = Item("en", "+", "What is 12 + 30?", "12+30: 2+0=2 1+3=4 → 42", "The answer is 42.", "12+30=42", "42")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    (folder / "config.json").write_text('{"model_type": "glm_moe_dsa"}')
    result: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return result


@given(st.text())
def test_any_text_round_trips(text: str) -> None:
    built = tokenizer.build()
    assert built.decode(built.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("token", tokenizer.CONTROL + tokenizer.MARKUP)
def test_a_special_token_is_a_single_id(token: str) -> None:
    built = tokenizer.build()
    assert built.encode(f"a{token}b").tokens == ["a", token, "b"]


def test_a_name_is_its_syllables_and_a_number_its_digits_with_a_separator_of_its_own_between() -> None:
    assert tokenizer.build().encode("Gita Bosefa #8342").tokens == [
        "Gi", "ta", " ", "Bo", "se", "fa", " #", "8", "3", "4", "2",
    ]  # fmt: skip


def test_the_vocabulary_fits_the_model() -> None:
    assert tokenizer.build().get_vocab_size() <= tokenizer.VOCAB_SIZE


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_training_renders_prompts_as_the_chat_template_does(
    loaded: PreTrainedTokenizerBase, thinking: bool, system: str | None
) -> None:
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": ITEM.question})
    rendered = loaded.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
    assert rendered == prompt_text(ITEM, thinking=thinking, system=system)


def test_the_chat_template_thinks_by_default(loaded: PreTrainedTokenizerBase) -> None:
    rendered = loaded.apply_chat_template(
        [{"role": "user", "content": "1+1"}], tokenize=False, add_generation_prompt=True
    )
    assert str(rendered).endswith("<|assistant|><think>")


def test_earlier_answers_lose_their_reasoning(loaded: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "hm</think>2"},
        {"role": "user", "content": "2+2"},
    ]
    rendered = loaded.apply_chat_template(messages, tokenize=False)
    assert rendered == "[gMASK]<sop><|user|>1+1<|assistant|></think>2<|user|>2+2"


@pytest.mark.parametrize(
    ("messages", "tools", "reason"),
    [
        ([{"role": "tool", "content": "x"}], None, "unknown role: tool"),
        ([{"role": "user", "content": "x"}], [{"type": "function"}], "not trained to call tools"),
    ],
)
def test_what_the_model_cannot_do_is_refused(
    loaded: PreTrainedTokenizerBase, messages: list[dict[str, str]], tools: Any, reason: str
) -> None:
    with pytest.raises(jinja2.TemplateError, match=reason):
        loaded.apply_chat_template(messages, tools=tools, tokenize=False)


def test_the_parents_tokenizer_is_the_one_that_is_built_here(demo_parent: Path, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    for file in tmp_path.iterdir():
        assert (demo_parent / file.name).read_bytes() == file.read_bytes(), file.name


def test_an_answer_shows_no_control_token(loaded: PreTrainedTokenizerBase) -> None:
    ids = loaded.encode("42".join(tokenizer.CONTROL), add_special_tokens=False)
    assert loaded.decode(ids, skip_special_tokens=True) == "42" * (len(tokenizer.CONTROL) - 1)


def test_saving_twice_writes_the_same_bytes(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        tokenizer.save(folder)
    first, second = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders)
    assert first == second
