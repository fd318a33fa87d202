"""Train the demo model from scratch: `python plugin/demo/train.py OUT`, about 8 minutes on one H200.

Every draw is seeded. Every minute the parent checkpoint is exported to OUT and the training state saved beside it
(safetensors, OUT/state), from which `--resume` goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data import CHUNK_TOKENS, IGNORED, Rows, curriculum, long_text, ordinary
from grade import needles, recall
from model import Model, export
from tokenizer import VOCAB_SIZE, save, stop_ids

TOKENS_PER_STEP = 131_072
PEAK_LR, WARMUP_STEPS, WEIGHT_DECAY, BALANCE_STEP = 2e-3, 100, 0.05, 1e-3
LONG_FROM, LONG_EVERY = 0.12, 8
"""Long rows begin after this share of the training; from then on every eighth step is made of them."""
ORDINARY_LENGTH, LONG_LENGTH = 256, 4096


def batches(rows: Rows, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of `TOKENS_PER_STEP` tokens."""
    loader = torch.utils.data.DataLoader(rows, batch_size=None, num_workers=workers, prefetch_factor=32)
    stream, chunks = iter(loader), TOKENS_PER_STEP // CHUNK_TOKENS
    while True:
        ids, labels = zip(*itertools.islice(stream, chunks), strict=True)
        yield torch.cat(ids), torch.cat(labels)


class Trainer:
    """Model, optimizer and schedule; `step` advances all three."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        torch.set_float32_matmul_precision("high")
        self.args, self.done, self.seconds = args, 0, 0.0
        self.model = Model().to(args.device)
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
            lr=PEAK_LR,
            betas=(0.9, 0.98),
            fused=True,
        )
        self.compiled = torch.compile(self._loss, dynamic=False) if args.device == "cuda" else self._loss

    def _loss(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.args.device, torch.bfloat16):
            logits, loads = self.model(ids)
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED), loads

    @property
    def progress(self) -> float:
        """Share of the training that is done."""
        return float(self.done / self.args.steps)

    @property
    def long(self) -> bool:
        """Whether the coming step reads long rows."""
        return self.progress >= LONG_FROM and self.done % LONG_EVERY == LONG_EVERY - 1

    def step(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """-> loss and expert loads `[MoE layers, experts]` of this step, on the device."""
        rest = 1 - self.progress
        rate = min(1.0, (self.done + 1) / WARMUP_STEPS) * (0.02 + 0.49 * (1 - math.cos(math.pi * rest)))
        for group in self.optimizer.param_groups:
            group["lr"] = PEAK_LR * rate
        loss, loads = self.compiled(*(x.to(self.args.device, torch.long, non_blocking=True) for x in (ids, labels)))
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        for moe, load in zip(self.model.moes, loads.detach(), strict=True):
            moe.gate.e_score_correction_bias += BALANCE_STEP * rest * torch.sign(load.mean() - load)
        self.done += 1
        return loss.detach(), loads.detach()

    def save(self, folder: Path) -> None:
        """Export the parent checkpoint and save the state to resume from."""
        export(self.model, folder, stop_ids())
        state = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        for i, slots in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{i}.{k}": v for k, v in slots.items()}
        (folder / "state").mkdir(exist_ok=True)
        meta = {"done": str(self.done), "seconds": str(self.seconds)}
        temporary = folder / "state" / "state.safetensors.part"
        save_file(state, temporary, meta)
        temporary.replace(folder / "state" / "state.safetensors")

    def resume(self, folder: Path) -> None:
        """Go on from the state saved in `folder`."""
        path = folder / "state" / "state.safetensors"
        if not path.is_file():
            raise SystemExit(f"{path}: nothing to resume from; train without --resume first")
        state = load_file(path, self.args.device)
        self.model.load_state_dict({k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")})
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            if key.startswith("optimizer."):
                _, i, name = key.split(".")
                slots.setdefault(int(i), {})[name] = value.cpu() if name == "step" else value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        self.done, self.seconds = int(header["__metadata__"]["done"]), float(header["__metadata__"]["seconds"])


def train(args: argparse.Namespace) -> None:
    """Train and export; writes the parent checkpoint and training.json into `args.out`."""
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    save(out)
    shutil.copyfile(Path(__file__).with_name("CARD.md"), out / "README.md")
    shutil.copyfile(Path(__file__).with_name("known_answers.json"), out / "known_answers.json")
    started = time.monotonic()
    trainer = Trainer(args)
    if args.resume:
        trainer.resume(out)
    started -= trainer.seconds
    planned, rest = args.steps * TOKENS_PER_STEP, 1 - trainer.progress
    long_tokens = int(planned * (1 - max(LONG_FROM, trainer.progress)) / LONG_EVERY)
    seed, start = f"{args.seed}/{trainer.done}", trainer.progress
    short = Rows(
        ordinary, length=ORDINARY_LENGTH, tokens=int(planned * rest) - long_tokens, start=start, seed=f"{seed}/ordinary"
    )
    far = Rows(long_text, length=LONG_LENGTH, tokens=long_tokens, start=max(LONG_FROM, start), seed=f"{seed}/long")
    streams = {False: batches(short, args.workers), True: batches(far, 2)}
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(f"{parameters / 1e6:.2f} M parameters, vocabulary {VOCAB_SIZE}, on {args.device}", flush=True)
    log, saved = [], time.monotonic()
    while trainer.progress < 1:
        long = trainer.long
        loss, loads = trainer.step(*next(streams[long]))
        trainer.seconds = time.monotonic() - started
        if trainer.done % 200 in (0, 1):
            relative = loads * loads.shape[1] / loads.sum(1, keepdim=True)
            row = {
                "step": trainer.done,
                "seconds": round(trainer.seconds, 1),
                "row tokens": LONG_LENGTH if long else ORDINARY_LENGTH,
                "loss": round(loss.item(), 4),
                "Mtok/s": round(trainer.done * TOKENS_PER_STEP / trainer.seconds / 1e6, 2),
                "expert load min/max": [round(relative.min().item(), 2), round(relative.max().item(), 2)],
            }
            log.append(row)
            print(json.dumps(row), flush=True)
        if time.monotonic() - saved > 60:
            trainer.save(out)
            saved = time.monotonic()
            found = needles(trainer.model, per_length=30)
            known = recall(trainer.model, curriculum(trainer.progress).persons)
            print(json.dumps({"saved at step": trainer.done, "look-up": found, "facts": known}), flush=True)
    trainer.save(out)
    report = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "seed": args.seed,
        "steps": trainer.done,
        "tokens": trainer.done * TOKENS_PER_STEP,
        "seconds": round(trainer.seconds, 1),
        "log": log,
    }
    (out / "training.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the parent checkpoint")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=12, help="data processes; part of the seed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", action="store_true")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
