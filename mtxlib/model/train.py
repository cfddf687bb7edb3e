"""The training loop: `train(config, run_dir)`, or `python -m mtxlib.train outputs/<run>/config.json`.

A run folder gets metrics.jsonl (the truth), model.safetensors (the best weights by the validation objective at the
final beta or rate, so that the ramp does not decide) and state.pt (everything to go on from). The order of batches is a
function of (seed, epoch) and the random state is saved, so a resumed run on the CPU repeats the losses of an
uninterrupted one bit for bit.

`torchrun --nproc-per-node N -m mtxlib.train …` trains on N GPUs (or on CPUs) what one process would. Each takes its
part of a batch, with its part of the same noise, and all look at the terms of all windows before the objective is
formed: free bits and |KL - C| are not linear in them. So losses agree but for rounding; with `dropout` in the blocks
they do not, since its masks are drawn for a part alone.
"""

import argparse
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_model
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from mtxlib.config import PAD, Config
from mtxlib.data.store import Batch, TokenDropout, TokenStore, epoch_batches
from mtxlib.files import append, atomic, atomic_text, brief, locked
from mtxlib.model import losses
from mtxlib.model.likelihood import Measured, measure
from mtxlib.model.optim import autocast_for, explain, make_optimizers
from mtxlib.model.vae import MusicVAE

LOG_EVERY = 10  # steps a line of metrics.jsonl is the mean of
PROGRESS = ("step", "best", "bad", "seconds", "sums", "steered")  # what state.pt keeps beside weights and randomness


def train(config: Config, run_dir: str | Path, device: str = "",
          on_validate: Callable[[], None] = lambda: None) -> Path:
    """Train, or go on from run_dir/state.pt; returns the path of the best weights. `on_validate` is called after each
    validation, when metrics.jsonl is up to date. Raises FileNotFoundError without a token store, FloatingPointError
    when the loss is no longer a number, ValueError when run_dir holds another configuration's checkpoint.
    """
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    with locked(Path(run_dir) / ".lock") if is_first else nullcontext():
        return Trainer(config, Path(run_dir), device, on_validate).run()


class Trainer:
    def __init__(self, config: Config, run_dir: Path, device: str = "", on_validate: Callable[[], None] = lambda: None):
        self.config, self.run_dir, self.c, self.on_validate = config, run_dir, config.train, on_validate
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.writes = self.rank == 0  # of several processes one
        if self.c.batch_size % (self.c.accumulate * self.world):
            raise ValueError(f"parameter 'batch_size': expected a multiple of accumulate {self.c.accumulate} x "
                             f"{self.world} processes, got {self.c.batch_size}")
        run_dir.mkdir(parents=True, exist_ok=True)
        if self.c.threads:
            torch.set_num_threads(self.c.threads)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.store = TokenStore(config.data.store)
        self.autocast, self.precision = (f(self.c.precision, self.device) for f in (autocast_for, explain))
        torch.manual_seed(self.c.seed)
        self.model = MusicVAE(config.model, self.store.vocab_size, self.store.n_bars).to(self.device)
        self.average = (AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(self.c.ema), use_buffers=True)
                        if self.c.ema else None)
        self.model.share = self.rank, self.world
        self.forward = torch.compile(self.model, dynamic=True) if self.c.compile else self.model
        if self.world > 1:
            self.forward = nn.parallel.DistributedDataParallel(self.forward)
        self.optimizers = make_optimizers(self.model, self.c)
        self.clipped = [[p for name, p in self.model.named_parameters() if name.startswith("prior.") == is_prior]
                        for is_prior in (False, True)]  # each by itself
        drop = partial(TokenDropout, vocab_size=self.store.vocab_size, kind=self.c.dropout_kind,
                       spare=self.store.is_structure.to(self.device) if self.c.spare_structure else None)
        self.drop_enc, self.drop_dec = drop(self.c.enc_token_dropout), drop(self.c.dec_token_dropout)
        self.train_indices, valid = map(self.store.select, ("train", "valid"))
        self.valid_indices = np.sort(np.random.default_rng(self.c.seed).permutation(valid)[:self.c.eval_windows])
        # The optimiser sees nats per token of an average window: gradient clipping then means the same everywhere.
        self.loss_scale = 1.0 / float(self.store.lengths[self.train_indices].mean())
        self.step, self.best, self.bad, self.seconds = 0, math.inf, 0, 0.0
        self.steered = torch.tensor(0.01, device=self.device)  # beta of the next step under schedule `rate`
        self.sums: dict = {}  # of what `update` gave since the last line of metrics.jsonl

    # -- one step -----------------------------------------------------------------------------------------------------

    def batches(self) -> Iterator[Batch]:
        """Batches from `self.step` on, without end."""
        per_epoch = max(1, len(self.train_indices) // self.c.batch_size)
        epoch, start = divmod(self.step, per_epoch)
        while True:
            order = epoch_batches(self.store.lengths, self.train_indices, self.c.batch_size, self.c.seed, epoch)
            for indices in order[start:]:
                self.current = indices
                yield self.store.batch(indices)
            epoch, start = epoch + 1, 0

    def terms(self, batch: Batch) -> losses.Terms:
        """The objective of a (micro-)batch at this step. Gradients flow into this process's part of it only."""
        inputs = batch.ids, batch.slots, self.drop_enc(batch.ids), self.drop_dec(batch.ids)
        ids, *others = (x.chunk(self.world)[self.rank] for x in inputs)
        with self.autocast():
            out = self.forward(ids, *others)
        recon = self.of_all(losses.reconstruction(out.logits, ids[:, 1:], ids[:, 1:] == PAD))
        kl = self.of_all(losses.kl_per_dim(*out.posterior))                                      # (B, S, C)
        beta, share = self.beta(self.step), losses.normal_share(self.step, self.c.beta_warmup)
        if self.model.prior is not None:
            to_prior = self.of_all(out.prior_nats - losses.entropy(out.posterior.logvar))[..., None]
            kl = share * kl.sum(-1, keepdim=True) + (1 - share) * to_prior                       # (B, S, 1)
        terms = self.objective(recon, kl, beta, 0.0 if self.steers else self.rate(self.step),
                               (batch.ids[:, 1:] != PAD).sum(1))
        if self.model.prior is not None:
            # Through the KL the prior hears beta * (1 - share) of its own loss; it learns best from all of it.
            rest = (1 - beta * (1 - share)) * self.of_all(out.prior_loss).sum(1).mean()
            terms = terms._replace(loss=terms.loss + rest, kl=to_prior.mean(0).sum())
        return terms

    def objective(self, recon: torch.Tensor, kl: torch.Tensor, beta: float | torch.Tensor, target_rate: float,
                  n_tokens: torch.Tensor) -> losses.Terms:
        return losses.objective(recon, kl * self.config.model.variational, beta, free_bits=self.c.free_bits,
                                target_rate=target_rate, recon_scale=self.c.recon_scale, n_tokens=n_tokens)

    def of_all(self, part: torch.Tensor) -> torch.Tensor:
        """A tensor (B, …) of the whole batch from each process's part."""
        if self.world == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.world)]
        dist.all_gather(parts, part.detach())
        parts[self.rank] = part
        return torch.cat(parts)

    def most(self, value: float) -> float:
        """The largest of all processes, so that they decide alike."""
        if self.world > 1:
            value = torch.tensor(value, dtype=torch.float64)
            dist.all_reduce(value, dist.ReduceOp.MAX)
        return float(value)

    @property
    def steers(self) -> bool:
        return self.c.beta_schedule == "rate"

    def beta(self, step: int) -> float | torch.Tensor:
        c = self.c
        return self.steered if self.steers else losses.beta_at(step, c.beta_schedule, c.beta_max, c.beta_warmup)

    def rate(self, step: int) -> float:
        return losses.rate_at(step, self.c.target_rate, self.c.target_start, self.c.beta_warmup)

    def update(self, batch: Batch) -> dict[str, torch.Tensor]:
        """One optimiser step over a batch in `accumulate` parts; returns the means over the parts."""
        scale = 1.0 if self.c.recon_scale == "token" else self.loss_scale
        sums = torch.zeros(4, device=self.device)
        for part in zip(*(x.chunk(self.c.accumulate) for x in batch), strict=True):
            terms = self.terms(Batch(*part).to(self.device))
            (terms.loss * scale * self.world / self.c.accumulate).backward()  # DDP takes the mean over the processes
            sums += torch.stack([x.detach().float() for x in terms]) / self.c.accumulate
        norm, *_ = (nn.utils.clip_grad_norm_(part, self.c.grad_clip) for part in self.clipped)
        values = {**dict(zip(losses.Terms._fields, sums, strict=True)), "grad_norm": norm}
        if self.device.type == "cpu":  # on a GPU this would wait for it at every step: there each line is checked
            self.check_finite({k: float(v) for k, v in values.items()}, self.step + 1)
        if self.steers:
            self.steered = losses.steer(self.steered, values["kl"], self.rate(self.step), self.c.beta_max)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.c.lr * losses.lr_at(self.step, self.c.steps, self.c.lr_warmup)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.average:
            self.average.update_parameters(self.model)
        return {**values, "steps": 1}

    # -- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> Path:
        self.resume()
        if self.writes:
            forget_after(self.run_dir / "metrics.jsonl", self.step)
            atomic_text(self.run_dir / "config.json", json.dumps(self.config.to_dict(), indent=1) + "\n")
            atomic(self.run_dir / "tokenizer.json", lambda p: shutil.copy(self.store.folder / "tokenizer.json", p))
            print(f"precision: {self.precision}")
        wandb_run = start_wandb(self.config, self.run_dir) if self.writes else None
        try:
            self.loop(wandb_run)
        finally:
            if wandb_run:
                wandb_run.finish()
        return self.run_dir / "model.safetensors"

    def loop(self, wandb_run) -> None:
        """Steps, lines of metrics.jsonl and validations until the end, a signal, or no more progress."""
        log, batches = self.run_dir / "metrics.jsonl", self.batches()
        n_tokens, began = 0, time.perf_counter()
        with interrupted() as signals, tqdm(total=self.c.steps, initial=self.step, desc="training", unit="step",
                                            mininterval=1.0, disable=not self.writes) as bar:
            while self.step < self.c.steps and not self.most(len(signals)) and not 0 < self.c.patience <= self.bad:
                batch = next(batches)
                values = self.update(batch)
                self.step += 1
                n_tokens += int((batch.ids[:, 1:] != PAD).sum())
                self.sums = {k: self.sums.get(k, 0) + v for k, v in values.items()}
                is_eval = self.step % self.c.eval_every == 0 or self.step == self.c.steps
                if self.step % LOG_EVERY == 0 or is_eval:
                    line = self.line(n_tokens, time.perf_counter() - began)
                    if self.writes:
                        write_lines(log, wandb_run, [line])
                    self.sums, n_tokens, began = {}, 0, time.perf_counter()
                    bar.set_postfix(recon=f"{line['recon']:.1f}", rate=f"{line['kl']:.1f}", beta=f"{line['beta']:.2f}")
                bar.update()
                if is_eval:
                    line = self.validate()
                    if self.writes:
                        write_lines(log, wandb_run, [line])
                        self.save_state()  # after its lines: those that a checkpoint lacks are dropped on resume
                        self.on_validate()
                    began = time.perf_counter()
        if self.most(len(signals)):
            self.means()  # weights that are no numbers must not replace the last good checkpoint
            if self.writes:
                self.save_state()
                print(f"stopped at step {self.step} of {self.c.steps}; run the same command again to go on")
            self.most(0.0)  # the others wait: torchrun ends all when one does
            raise KeyboardInterrupt

    def means(self) -> dict[str, float]:
        """Of the steps since the last line. Raises FloatingPointError if they are not numbers."""
        means = {k: float(v) / float(self.sums["steps"]) for k, v in self.sums.items() if k != "steps"}
        self.check_finite(means, self.step)
        return means

    def line(self, n_tokens: int, seconds: float) -> dict:
        self.seconds += seconds
        c, last = self.c, self.step - 1
        return {"step": self.step, "split": "train", **self.means(), "beta": float(self.beta(last)),
                "target_rate": self.rate(last), "lr": c.lr * losses.lr_at(last, c.steps, c.lr_warmup),
                "tokens_per_s": n_tokens / seconds, "seconds": self.seconds}

    def check_finite(self, values: dict[str, float], step: int) -> None:
        if not all(map(math.isfinite, values.values())):
            pieces = sorted({self.store.pieces[p]["name"] for p in self.store.windows["piece"][self.current]})
            good = self.run_dir / "state.pt"
            raise FloatingPointError(
                f"the loss is not a number at step {step} ({', '.join(f'{k} {v:g}' for k, v in values.items())});"
                f" the last batch held {', '.join(pieces[:8])}; the last good checkpoint is "
                f"{good if good.exists() else 'none'}: lower lr or grad_clip, or set precision to fp32")

    def validate(self) -> dict:
        """Measure the validation windows; keep the weights if they are the best so far."""
        model = self.average.module if self.average else self.model
        m = measure(model, self.store, self.valid_indices, autocast=self.autocast, seed=self.c.seed)
        score = self.most(self.final_objective(m))
        self.check_finite({"validation objective": score}, self.step)
        self.bad += 1
        if score < self.best:
            self.best, self.bad = score, 0
            if self.writes:
                save_weights(model, self.run_dir / "model.safetensors", self.config, self.store.lengths)
        return {"step": self.step, "split": "valid", **m.summary(), "objective": score, "seconds": self.seconds,
                "precision": self.precision}

    def final_objective(self, m: Measured) -> float:
        """The training objective on validation windows, at the beta and rate of the end of the schedule. Where beta is
        steered: nats of reconstruction, plus those by which the KL misses the target from above."""
        c = self.c
        if self.steers:
            return float(m.recon.mean() + (m.rate.mean() - c.target_rate).clamp(min=0))
        kl = m.kl if self.model.prior is None else m.rate[:, None, None]
        return float(self.objective(m.recon, kl, c.beta_max, c.target_rate, m.n_tokens).loss)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save_state(self) -> None:
        state = {**{k: getattr(self, k) for k in PROGRESS},
                 "config": json.dumps(self.config.to_dict()), "model": self.model.state_dict(),
                 "optimizers": [optimizer.state_dict() for optimizer in self.optimizers], "rng": torch.get_rng_state(),
                 "average": self.average.state_dict() if self.average else None,
                 "rng_cuda": torch.cuda.get_rng_state() if self.device.type == "cuda" else None}
        atomic(self.run_dir / "state.pt", lambda path: torch.save(state, path))

    def resume(self) -> None:
        path = self.run_dir / "state.pt"
        if not path.exists():
            return
        start_again = "choose another run folder (mtx run --out …), or delete this one to start again"
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            optimizers = state["optimizers"]
        except Exception as e:  # whatever torch makes of a file that is none of its own
            raise ValueError(f"{path}: expected a checkpoint of this version of mtxlib.train, got something else "
                             f"({brief(e)}): {start_again}") from e
        ours, theirs = self.config.flat(), Config.from_dict(json.loads(state["config"])).flat()
        for k in ours:
            if ours[k] != theirs[k] and k not in ("steps", "threads", "wandb", "data_dir"):
                raise ValueError(f"{path} was trained with {k} = {theirs[k]!r}, now it is {ours[k]!r}: {start_again}")
        if state["step"] > self.c.steps:
            raise ValueError(f"{path} is at step {state['step']}, beyond steps = {self.c.steps}: {start_again}")
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, optimizers, strict=True):
            optimizer.load_state_dict(saved)
        if self.average:
            self.average.load_state_dict(state["average"])
        torch.set_rng_state(state["rng"].cpu())
        if state["rng_cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng_cuda"].cpu())
        for k in PROGRESS:
            setattr(self, k, state[k])
        if self.writes:
            print(f"going on from step {self.step} of {self.c.steps} in {path}")


def save_weights(model: MusicVAE, path: Path, config: Config, lengths: np.ndarray) -> None:
    """Weights as safetensors; the metadata says whose they are and how long the windows were, in tokens."""
    metadata = {"format": "mtxlib", "config": json.dumps(config.to_dict()), "vocab_size": str(model.vocab_size),
                "n_bars": str(model.n_bars), "mean_tokens": str(int(lengths.mean())),
                "most_tokens": str(int(lengths.max()))}
    atomic(path, lambda p: save_model(model, str(p), metadata=metadata))


def write_lines(path: Path, wandb_run, lines: list[dict]) -> None:
    append(path, map(json.dumps, lines))
    for line in lines if wandb_run else []:
        wandb_run.log({f"{line['split']}/{k}": v for k, v in line.items() if k not in ("step", "split")},
                      step=line["step"])


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl that a killed run wrote after its last checkpoint."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        atomic_text(path, "".join(x for x in lines if x.endswith("}\n") and json.loads(x)["step"] <= step))


def start_wandb(config: Config, run_dir: Path):
    """A W&B run with the names of metrics.jsonl, or None. Offline it needs no account."""
    if config.train.wandb == "off":
        return None
    try:
        import wandb
    except ImportError:
        if config.train.wandb == "online":
            raise
        print("wandb is not installed: metrics.jsonl alone records this run")
        return None
    try:
        return wandb.init(project="mtx", name=run_dir.name, dir=str(run_dir), mode=config.train.wandb,
                          config=config.flat(), settings=wandb.Settings(silent=True, console="off"))
    except wandb.errors.UsageError as e:  # online without a login
        raise ValueError(f"parameter 'wandb': {e} Or set wandb to offline.") from e


@contextmanager
def interrupted():
    """Within it, Ctrl-C and SIGTERM only join the list it gives, so that a step is finished and the state saved."""
    came, before = [], {}
    with suppress(ValueError):  # not the main thread: signals are somebody else's
        before = {s: signal.signal(s, lambda s, frame: came.append(s)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for s, old in before.items():
            signal.signal(s, old)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mtxlib.train", description="Train a run from its config.json.")
    parser.add_argument("config", type=Path, help="outputs/<run>/config.json; the run folder is where it lies")
    parser.add_argument("--device", default="", help="cpu, cuda, cuda:1 …; the GPU if there is one")
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: expected a GPU that torch can use, found none")
    if "LOCAL_RANK" in os.environ:  # torchrun
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        weights = train(Config.load(args.config), args.config.parent, args.device)
        if os.environ.get("RANK", "0") == "0":
            print(weights)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, FloatingPointError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0
