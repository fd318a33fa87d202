"""Engines and checkpoints that the tests of the vLLM plugin share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from transformers import AutoTokenizer

from encode.mortal import FEW_VECTORS
from random_checkpoint import make_random_checkpoint, read_tensors
from random_parent import make_random_parent, write_weights
from vllm_plugin.engine_process import WITHOUT_AVX512, Answer, EngineProcess, Question
from vllm_plugin.plain import write_plain
from vqserve.encode import steps
from vqserve.encode.pipeline import encode
from vqserve.format.manifest import write_manifest

TWO_RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}


@pytest.fixture(scope="session")
def engines() -> Iterator[EngineProcess]:
    """A process that starts engines on one rank."""
    process = EngineProcess()
    yield process
    process.stop()


@pytest.fixture(scope="session")
def engines_of_two_ranks() -> Iterator[EngineProcess]:
    """A process that starts engines on two ranks, a core each."""
    process = EngineProcess(**TWO_RANKS)
    yield process
    process.stop()


@pytest.fixture(scope="session")
def engines_without_avx512() -> Iterator[EngineProcess]:
    """A process that starts engines, on two ranks if asked, that take this CPU for one without AVX-512."""
    process = EngineProcess(**TWO_RANKS, **WITHOUT_AVX512)
    yield process
    process.stop()


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Random text of three lengths: shorter than a block of the KV cache, of several blocks, of many.

    With this seed no token's choice of experts is closer than 2e-4 (random_parent) and 3e-4 (experts_only), measured
    in fp32, so that no rounding error swaps two experts: logits would jump.
    """
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(20, 276, (length,), generator=generator).tolist() for length in (5, 40, 100)]


@pytest.fixture(scope="session")
def sums_to_do(demo_parent: Path) -> list[list[int]]:
    """A sum per language, as the demo model is asked."""
    tokenizer = AutoTokenizer.from_pretrained(demo_parent)
    questions = (
        "What is 123 + 456?",
        "太郎はりんごを12個持っていて、さらに30個買いました。全部で何個ですか？",
        "78 × 9 等于多少？",
    )
    chats = ([{"role": "user", "content": text}] for text in questions)
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    return [tokenizer.encode(str(prompt), add_special_tokens=False) for prompt in prompts]


@pytest.fixture(scope="session")
def experts_only(random_parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random codes whose spine is not quantized, so that it can be served in fp32."""
    return make_random_checkpoint(random_parent, tmp_path_factory.mktemp("experts-only") / "checkpoint", spine=False)


@pytest.fixture(scope="session")
def other_codes(experts_only: Path) -> Path:
    """`experts_only` with every code 255 minus itself, and nothing else changed."""
    folder = shutil.copytree(experts_only, experts_only.parent / "other-codes")
    tensors = read_tensors(folder)
    for name in tensors:
        if name.endswith(".codes"):
            tensors[name] = 255 - tensors[name]
    write_weights(folder, tensors, 2)
    write_manifest(folder)
    return folder


@pytest.fixture(scope="session")
def experts_only_plain(experts_only: Path) -> Path:
    """The weights that `experts_only` stands for."""
    return write_plain(experts_only, experts_only.parent / "plain")


@pytest.fixture(scope="session")
def plain_answers(engines: EngineProcess, experts_only_plain: Path, prompts: list[list[int]]) -> list[Answer]:
    """What vLLM's own unquantized path makes of the weights of `experts_only`."""
    return engines.ask(Question(experts_only_plain, prompts))[0]


@pytest.fixture(scope="session")
def unrouted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a 4-bit spine and as many experts as each token takes.

    In half precision a rounding error may swap two experts of almost equal rank, and logits jump. Here none can.
    """
    folder = tmp_path_factory.mktemp("unrouted")
    parent = make_random_parent(folder / "parent", n_routed_experts=4)
    return make_random_checkpoint(parent, folder / "checkpoint")


@pytest.fixture(scope="session")
def encoded(unrouted: Path) -> Path:
    """What the encoder makes of the parent of `unrouted`."""
    folder, calibration = unrouted.parent / "encoded", unrouted.parent / "calibration.jsonl"
    texts = [" ".join(str(i * n) for i in range(2, 22)) for n in range(40)]
    calibration.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    with patch.object(steps, "CODEBOOK_VECTORS", FEW_VECTORS):
        encode(unrouted.parent / "parent", folder, bits=2.25, calibration=calibration, progress=False)
    return folder


@pytest.fixture(scope="session")
def unrouted_plain(unrouted: Path) -> Path:
    """The weights that `unrouted` stands for."""
    return write_plain(unrouted, unrouted.parent / "plain")
