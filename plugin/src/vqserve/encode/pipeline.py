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
from vqserve.encode.calibration import FEW_PREDICTIONS, Report, read_calibration
from vqserve.encode.card import Origin, model_card, parent_license
from vqserve.encode.code import software
from vqserve.encode.parent import Parent
from vqserve.encode.plan import Plan, Table, byte_budget, make_plan
from vqserve.encode.room import check_room
from vqserve.encode.steps import Job, batch_name, load_codebooks
from vqserve.encode.work import check_work, open_work
from vqserve.encode.writer import check_free, claimed, write_checkpoint
from vqserve.format.companions import CHAT_TEMPLATE, check_companions
from vqserve.format.errors import UsageError
from vqserve.format.files import COMPANIONS
from vqserve.format.known_answers import read_known_answers
from vqserve.format.names import codebook_name, experts_module, layer_of, parse_expert_tensor
from vqserve.model.template import check_template
from vqserve.model.weights import open_tokenizer

LONGEST = 2048
"""Calibration sequences are cut to so many tokens (or the model's `index_topk`, if less)."""
FILE_SIZE = 4 * 2**30
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
        src: The parent: a GLM-MoE-DSA checkpoint of safetensors files in a float dtype.
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
    _check_companions(parent)
    base_model = base_model or src.resolve().name
    license_name = license_name or parent_license(src)
    for what, name in (("--base-model", base_model), ("--license", license_name), ("--calibration", calibration.name)):
        if not name.isprintable():
            raise UsageError(f"{what} {name!r}: would be in the model card; name it in printable characters")
    longest = min(LONGEST, parent.geometry.index_topk)
    tokens, report = read_calibration(calibration, open_tokenizer(src), longest=longest, seed=seed)
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if target.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA GPU here; leave the option out, or install a CUDA build")
    key = {
        "parent": parent.fingerprint(),
        "tokens": tokens.fingerprint(),
        "seed": seed,
        **software(target),
    }
    place = work or dst / _WORK
    if work and (work.resolve().is_relative_to(dst.resolve()) or dst.resolve().is_relative_to(work.resolve())):
        raise UsageError(f"--work {work}: lies in {dst}, or around it; choose a folder apart from the result")
    check_free(dst)
    check_work(place, key)
    check_room(parent, len(tokens.ids), bits, dst, place)
    parent.check_left_over()
    with claimed(dst) as complete, open_work(place, key) as results, deterministic(target):
        _tell(calibration, report, progress)
        if dropped := parent.geometry.num_nextn_predict_layers:
            left_out = f"{src}: its {dropped} multi-token-prediction layers will not be in the result"
            sys.stderr.write(f"vqserve: warning: {left_out}, which cannot speculate\n")
        for path in results.discard_damaged():
            sys.stderr.write(f"vqserve: {path}: damaged; its step runs again\n")
        job = Job(parent, tokens, results, target, seed)
        _run_steps(job, workers, progress)
        costs, errors = tables(job)
        predictions = int(tokens.predicts.sum())
        plan = make_plan(parent.geometry, bits, costs, errors, predictions)
        config = {**parent.config, "quantization_config": plan.config.to_dict()}
        if dropped:
            config["num_nextn_predict_layers"] = 0
        origin = Origin(
            base_model=base_model,
            license=license_name,
            calibration=calibration.name,
            tokens=len(tokens.ids),
            predictions=predictions,
            **_counts(job),
            seed=seed,
            version=__version__,
        )
        write_checkpoint(dst, src, config, model_card(plan, origin, config), file_size, _Reader(job, plan))
        complete()
        if work is None:
            results.clear()
    return plan


def _check_companions(parent: Parent) -> None:
    """Checks what the result takes over as it is: whoever serves it checks that too, hours of work later."""
    carried = [name for name in COMPANIONS if (parent.folder / name).is_file()]
    check_companions(parent.folder, carried, parent.config, parent.geometry.vocab_size, links=True)
    check_template(parent.folder / CHAT_TEMPLATE)
    read_known_answers(parent.folder)


def _tell(calibration: Path, report: Report, progress: bool) -> None:
    """Says what the calibration file holds; that it holds little, in any case."""
    if progress:
        sys.stderr.write(f"vqserve: {calibration}: {report}\n")
    if report.predictions < FEW_PREDICTIONS:
        few = f"only {report.predictions:,} predictions count; give text with {FEW_PREDICTIONS:,} or more"
        sys.stderr.write(f"vqserve: warning: {calibration}: {few}, or expect a poorer encoding\n")


def _run_steps(job: Job, workers: int | None, progress: bool) -> None:
    """Runs all steps whose results are not there yet."""
    work, layers, moe = job.work, job.parent.geometry.num_hidden_layers, job.parent.geometry.moe_layers
    gradients = [at for at in reversed(moe) if not work.has(f"gradient-{at}")]
    books = [d for d in steps.WIDTHS if not work.has(f"codebooks-{d}")]
    priors = [at for at in moe if not work.has(f"prior-{at}")]
    batches = [batch for batch in job.batches if not work.has(batch_name(*batch))]
    stages: list[tuple[str, list[Step], int | None]] = [
        ("survey", [partial(steps.survey, job, at) for at in range(steps.first_to_survey(job), layers)], 1),
        ("sensitivity", [partial(steps.gradient, job, at) for at in gradients], 1),
        ("codebooks", [partial(steps.codebooks, job, d) for d in books], workers),
        ("priors", [partial(steps.prior, job, at) for at in priors], workers),
        ("experts", [partial(steps.encode_batch, job, *batch) for batch in batches], workers),
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
    with ThreadPoolExecutor(
        workers or len(os.sched_getaffinity(0)), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        futures = [pool.submit(step) for step in todo]
        try:
            for future in as_completed(futures):
                future.result()
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Has a GPU add in the same order every time; several of torch's kernels would not."""
    before = torch.are_deterministic_algorithms_enabled()
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


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
        (job.work.tensor(batch_name(*batch), "tokens"), job.work.tensor(batch_name(*batch), "zeros"))
        for batch in job.batches
    ]
    return {
        "experts": sum(len(tokens) for tokens, _ in found),
        "unseen": sum(int((tokens == 0).sum()) for tokens, _ in found),
        "zeros": sum(int(zeros.sum()) for _, zeros in found),
    }


def tables(job: Job) -> tuple[Table, Table]:
    """Costs and relative errors of every option, `[layers, experts, 3, 4]` each."""
    batches = [job.work.load(batch_name(*batch)) for batch in job.batches]
    layers = len(job.parent.geometry.moe_layers)
    costs, errors = (torch.cat([batch[name] for batch in batches]).unflatten(0, (layers, -1)) for name in _TABLES)
    return costs.numpy(), errors.numpy()


class _Reader:
    """Gives every tensor of the result: planes, codebooks and the spine from the work folder, the rest as it was."""

    def __init__(self, job: Job, plan: Plan) -> None:
        self._job = job
        self._modules = {module.name: module for module in plan.config.modules}
        self._codebooks = load_codebooks(job.work)
        self._batches = {(layer, expert): (layer, batch) for layer, batch in job.batches for expert in batch}

    def __call__(self, name: str) -> Tensor:
        if name in self._job.parent.tensors:
            return self._job.parent.tensor(name)
        layer = layer_of(name)
        assert layer is not None, f"{name} is neither the parent's nor the encoder's"
        found = parse_expert_tensor(name)
        if found is not None:
            letter = self._modules[found.module].tiers[found.proj][found.expert]
            batch = self._batches[layer, found.expert]
            plane = f"{found.expert - batch[1].start}.{found.proj}.{letter}.{found.part}"
            return self._job.work.tensor(batch_name(*batch), plane)
        module = experts_module(layer)
        for letter, codebook in self._codebooks.items():
            if name == codebook_name(module, letter):
                return codebook.base.clone()  # a file may not hold the same memory twice
            if name == codebook_name(module, letter, refinement=True):
                assert codebook.refinement is not None
                return codebook.refinement.clone()
        return self._job.work.tensor(f"spine-{layer}", name)
