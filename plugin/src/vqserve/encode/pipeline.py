"""`encode`: the whole way from a parent checkpoint to an encoded one, resumable at every step."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vqserve import __version__
from vqserve.encode import steps
from vqserve.encode.calibration import read_calibration
from vqserve.encode.card import Origin, model_card, parent_license
from vqserve.encode.parent import Parent
from vqserve.encode.plan import Plan, Table, byte_budget, make_plan
from vqserve.encode.steps import Job, chunk_name, load_codebooks
from vqserve.encode.work import check_work, open_work
from vqserve.encode.writer import check_free, claimed, write_checkpoint
from vqserve.format.errors import UsageError
from vqserve.format.names import codebook_name, experts_module, layer_of, parse_expert_tensor

LONGEST = 2048
"""Calibration sequences are cut to so many tokens (or the model's `index_topk`, if less)."""
FILE_SIZE = 4 * 2**30
STEPS_VERSION = 3
"""Part of the work folder's key: raised when a step's results change."""
_WORK = "work"
_TABLES = ("costs", "errors")

Step = Callable[[], None]


def encode(
    src: Path,
    dst: Path,
    *,
    bits: float,
    calibration: Path,
    seed: int = 0,
    progress: bool = True,
    workers: int | None = None,
    device: str | None = None,
    file_size: int = FILE_SIZE,
    work: Path | None = None,
    base_model: str | None = None,
    license_name: str | None = None,
) -> Plan:
    """Encodes a checkpoint.

    Args:
        src: The parent: a GLM-MoE-DSA checkpoint of sharded safetensors in a float dtype.
        dst: New or empty folder for the result, or one in which an encode was interrupted.
        bits: Bits per routed-expert weight, scales included, codebooks not.
        calibration: JSON Lines; see `calibration.read_calibration`.
        seed: Of all random choices; same inputs and seed, same bytes.
        progress: Show a progress bar on standard error.
        workers: Steps run at once on the CPU; all its cores if None.
        device: Of the computation, `cpu` or `cuda`; a GPU if there is one, if None.
        file_size: Bytes of one file of the result, at most.
        work: Folder for results of steps. It is kept and serves later encodes with other bits; if None, it lies in
            `dst` and is removed at the end.
        base_model: The parent's name for the model card; the name of its folder if None.
        license_name: The licence for the model card; that of the parent's model card if None.

    Returns:
        What was chosen.

    Raises:
        UsageError: A path, the calibration file or the number of bits cannot be used, or another encode is at work.
        CheckpointError: The parent is not a checkpoint that can be encoded.
    """
    parent = Parent(src)
    byte_budget(parent.geometry, bits)
    longest = min(LONGEST, parent.geometry.index_topk)
    tokens = read_calibration(calibration, parent.tokenizer(), longest=longest, seed=seed)
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if target.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA GPU here; leave the option out, or install a CUDA build")
    key = {
        "parent": parent.fingerprint(),
        "tokens": tokens.fingerprint(),
        "seed": seed,
        "device": target.type,
        "steps": STEPS_VERSION,
    }
    place = work or dst / _WORK
    if work and (work.resolve().is_relative_to(dst.resolve()) or dst.resolve().is_relative_to(work.resolve())):
        raise UsageError(f"--work {work}: lies in {dst}, or around it; choose a folder apart from the result")
    check_free(dst)
    check_work(place, key)
    with claimed(dst), open_work(place, key) as results:
        for path in results.discard_damaged():
            sys.stderr.write(f"vqserve: {path}: damaged; its step runs again\n")
        job = Job(parent, tokens, results, target, seed)
        _run_steps(job, workers, progress)
        costs, errors = tables(job)
        predictions = int(tokens.predicts.sum())
        plan = make_plan(parent.geometry, bits, costs, errors, predictions)
        config = parent.config | {"quantization_config": plan.config.to_dict()}
        origin = Origin(
            base_model=base_model or src.resolve().name,
            license=license_name or parent_license(src),
            calibration=calibration.name,
            tokens=len(tokens.ids),
            predictions=predictions,
            **_counts(job),
            seed=seed,
            version=__version__,
        )
        write_checkpoint(dst, src, config, model_card(plan, origin, config), file_size, _Reader(job, plan))
        if work is None:
            results.clear()
    return plan


def _run_steps(job: Job, workers: int | None, progress: bool) -> None:
    """Runs all steps whose results are not there yet."""
    work, layers, moe = job.work, job.parent.geometry.num_hidden_layers, job.parent.geometry.moe_layers
    gradients = [at for at in reversed(moe) if not work.has(f"gradient-{at}")]
    books = [d for d in steps.WIDTHS if not work.has(f"codebooks-{d}")]
    priors = [at for at in moe if not work.has(f"prior-{at}")]
    chunks = [chunk for chunk in job.chunks if not work.has(chunk_name(*chunk))]
    stages: list[tuple[str, list[Step], int | None]] = [
        ("survey", [partial(steps.survey, job, at) for at in range(steps.first_to_survey(job), layers)], 1),
        ("sensitivity", [partial(steps.gradient, job, at) for at in gradients], 1),
        ("codebooks", [partial(steps.codebooks, job, d) for d in books], workers),
        ("priors", [partial(steps.prior, job, at) for at in priors], workers),
        ("experts", [partial(steps.experts, job, *chunk) for chunk in chunks], workers),
    ]
    with (
        _one_thread_each(job.device),
        tqdm(total=sum(len(todo) for _, todo, _ in stages), unit="step", disable=not progress) as bar,
    ):
        for title, todo, at_once in stages:
            bar.set_description(title)
            _run(todo, at_once, job.device, bar)


def _run(todo: list[Step], workers: int | None, device: torch.device, bar: tqdm[Any]) -> None:
    if device.type != "cpu" or workers == 1:
        for step in todo:
            step()
            bar.update()
        return
    with ThreadPoolExecutor(workers or os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(step) for step in todo]
        try:
            for future in as_completed(futures):
                future.result()
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def _one_thread_each(device: torch.device) -> Iterator[None]:
    """One thread per step, so that results do not depend on the number of cores; it is also twice as fast."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if device.type == "cpu" else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _counts(job: Job) -> dict[str, int]:
    """What the model card says about experts that calibration or pruning left empty."""
    found = [
        (job.work.tensor(chunk_name(*chunk), "tokens"), job.work.tensor(chunk_name(*chunk), "zeros"))
        for chunk in job.chunks
    ]
    return {
        "experts": sum(len(tokens) for tokens, _ in found),
        "unseen": sum(int((tokens == 0).sum()) for tokens, _ in found),
        "zeros": sum(int(zeros.sum()) for _, zeros in found),
    }


def tables(job: Job) -> tuple[Table, Table]:
    """Costs and relative errors of every option, `[layers, experts, 3, 4]` each."""
    chunks = [job.work.load(chunk_name(*chunk)) for chunk in job.chunks]
    layers = len(job.parent.geometry.moe_layers)
    costs, errors = (torch.cat([chunk[name] for chunk in chunks]).unflatten(0, (layers, -1)) for name in _TABLES)
    return costs.numpy(), errors.numpy()


class _Reader:
    """Gives every tensor of the result: planes, codebooks and the spine from the work folder, the rest as it was."""

    def __init__(self, job: Job, plan: Plan) -> None:
        self._job = job
        self._modules = {module.name: module for module in plan.config.modules}
        self._codebooks = load_codebooks(job.work)
        self._chunks = {(layer, expert): (layer, chunk) for layer, chunk in job.chunks for expert in chunk}

    def __call__(self, name: str) -> Tensor:
        if name in self._job.parent.tensors:
            return self._job.parent.tensor(name)
        layer = layer_of(name)
        assert layer is not None, f"{name} is neither the parent's nor the encoder's"
        found = parse_expert_tensor(name)
        if found is not None:
            letter = self._modules[found.module].tiers[found.proj][found.expert]
            chunk = self._chunks[layer, found.expert]
            plane = f"{found.expert - chunk[1].start}.{found.proj}.{letter}.{found.part}"
            return self._job.work.tensor(chunk_name(*chunk), plane)
        module = experts_module(layer)
        for letter, codebook in self._codebooks.items():
            if name == codebook_name(module, letter):
                return codebook.base.clone()  # a file may not hold the same memory twice
            if name == codebook_name(module, letter, refinement=True):
                assert codebook.refinement is not None
                return codebook.refinement.clone()
        return self._job.work.tensor(f"spine-{layer}", name)
