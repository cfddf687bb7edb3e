"""`make bench`: how fast this is, as ratios to baselines that run beside it in the same minutes.

    python benchmarks/bench.py                             everything, under six minutes on two cores
    python benchmarks/bench.py --only training dropout     some of it; the other rows of --out stay
    python benchmarks/bench.py --archive jsfakes.zip       js-fakes from a local copy

Each benchmark runs in a process of its own, so that its peak memory is its own. Rows hold medians of repeats; where
there is a baseline, it takes turns with what is measured. The baselines are small and all in this file:

- training: `Textbook`, the encoder–decoder of Vaswani 2017 as plain PyTorch has it, `nn.Transformer` with as many
  layers, heads and channels, AdamW, the same windows in random order and padded to the longest of a batch. It has no
  latent: it reads the window and writes it again. It runs with bf16 autocast, where ours does, and in fp32; the faster
  of the two counts. Model FLOPs utilisation on a CPU is against the best rate of a matmul in the same minutes.
- training beside a busy process: training alone, and both with OpenMP's own waiting policy.
- generation: `next_uncached`, which runs the model over all that is written so far, for each token.
- token dropout: `drop_one_by_one`, a loop over the tokens.

Tokens are real tokens: padding is not counted. Without js-fakes (no archive, no cache, no network) the music is the
first 100 of Bach's chorales, and the line below the table says so.
"""

import argparse
import copy
import io
import json
import multiprocessing
import os
import pickle
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mtxlib.config import EOS, MASK, N_SPECIAL, PAD, Config, ModelConfig
from mtxlib.data.store import Grammar, SlotTable, TokenDropout, TokenStore
from mtxlib.data.tokens import build_store
from mtxlib.files import atomic_text
from mtxlib.latent.decode import Place, decode, prior_latents
from mtxlib.model.optim import explain, matmul_rate
from mtxlib.model.train import Trainer
from mtxlib.model.vae import MusicVAE
from mtxlib.music.corpus import Piece, load_corpus
from mtxlib.processes import share_cores
from mtxlib.run import load_run

# Dense bf16 TFLOP/s of a GPU whose name holds the key, the first that fits: NVIDIA's data sheets, whose figures "with
# sparsity" are twice as much.
PEAKS = {"H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0,
         "A10G": 70.0, "A10": 125.0}
NEW_TOKENS, GPU_STEPS = 256, 20
QUICK, REFERENCE = {"preset": "quick"}, {"preset": "reference"}
LARGE = {"preset": "reference", "d_model": 768, "n_heads": 12, "enc_layers": 6, "dec_layers": 6, "batch_size": 256}


@dataclass
class Row:
    """A line of the table: the median of `values`, their range over it as the spread, and the ratio to the baseline's
    median. Of two aims at most one is given: `at_least` for the ratio, `at_most` for what was measured."""

    name: str
    unit: str
    values: list[float]
    baseline: list[float] = field(default_factory=list)
    at_least: float = 0.0
    at_most: float = 0.0
    note: str = ""

    def to_dict(self) -> dict:
        measured, baseline = statistics.median(self.values), statistics.median(self.baseline or [0.0])
        ratio = measured / baseline if baseline else None
        reached = (ratio >= self.at_least if self.at_least else measured <= self.at_most if self.at_most else None)
        return {**asdict(self), "measured": measured, "spread": (max(self.values) - min(self.values)) / measured,
                "ratio": ratio, "reached": reached}


@dataclass(frozen=True)
class Setting:
    """What every benchmark gets."""

    config: Config  # of the reference preset, with a store of the music that is there
    held_out: list[Piece]
    run: Path


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def take_turns(repeats: int, *calls: Callable[[], float]) -> list[list[float]]:
    """What each call returns, once a round, so that a slow minute of the machine is everybody's."""
    return [list(column) for column in zip(*([call() for call in calls] for _ in range(repeats)), strict=True)]


def peak_memory() -> float:
    """GB of this process so far, or of the largest that it has started."""
    unit = 1 if sys.platform == "darwin" else 1024
    used = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return max(used) * unit / 1e9


# -- training ---------------------------------------------------------------------------------------------------------

class Textbook(nn.Module):
    """`nn.Transformer` with its defaults (post-norm, ReLU), MLPs four times as wide, learned positions, no dropout."""

    def __init__(self, c: ModelConfig, vocab_size: int):
        super().__init__()
        self.token, self.position = nn.Embedding(vocab_size, c.d_model), nn.Embedding(c.max_tokens, c.d_model)
        self.transformer = nn.Transformer(c.d_model, c.n_heads, c.enc_layers, c.dec_layers, 4 * c.d_model, dropout=0.0,
                                          batch_first=True)
        self.head = nn.Linear(c.d_model, vocab_size)

    def embed(self, ids: Tensor) -> Tensor:
        return self.token(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> logits (B, T - 1, V) of tokens 1 … T - 1."""
        is_pad, T = ids == PAD, ids.shape[1] - 1
        is_future = torch.ones(T, T, dtype=torch.bool, device=ids.device).triu(1)
        return self.head(self.transformer(
            self.embed(ids), self.embed(ids[:, :-1]), tgt_mask=is_future, tgt_is_causal=True,
            src_key_padding_mask=is_pad, tgt_key_padding_mask=is_pad[:, :-1], memory_key_padding_mask=is_pad))


class TextbookTrainer:
    """AdamW over batches in random order."""

    def __init__(self, config: Config, store: TokenStore, device: torch.device, autocast: Callable):
        self.store, self.device, self.autocast = store, device, autocast
        self.model = Textbook(config.model, store.vocab_size).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        order = np.random.default_rng(0).permutation(store.select("train"))
        self.order = iter(order[:len(order) // config.train.batch_size * config.train.batch_size].reshape(
            -1, config.train.batch_size))

    def step(self) -> int:
        offsets, ids = self.store.offsets, self.store.ids
        windows = [torch.from_numpy(ids[offsets[i]:offsets[i + 1]].astype("int64")) for i in next(self.order)]
        batch = pad_sequence(windows, batch_first=True, padding_value=PAD).to(self.device)
        with self.autocast():
            logits = self.model(batch)
        targets = batch[:, 1:]
        F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=PAD).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return int((targets != PAD).sum())


class OurTrainer:
    """The step of `mtxlib.train`, as it is; its batches too."""

    def __init__(self, config: Config, folder: str):
        self.trainer = Trainer(config, Path(folder))
        self.batches = self.trainer.batches()
        self.lengths: list[int] = []  # tokens of each window seen

    def step(self) -> int:
        batch = next(self.batches)
        self.trainer.update(batch)
        self.trainer.step += 1
        self.lengths += (batch.ids != PAD).sum(1).tolist()
        return int((batch.ids[:, 1:] != PAD).sum())

    def flops_per_token(self) -> float:
        """Of the windows since it was last asked."""
        model, lengths, self.lengths = self.trainer.model, self.lengths, []
        done = sum(window_flops(model.config, model.vocab_size, model.bottleneck.rows, n) for n in lengths)
        return done / sum(n - 1 for n in lengths)


def tokens_per_second(step: Callable[[], int], steps: int) -> float:
    tokens = []
    took = seconds(lambda: tokens.extend(step() for _ in range(steps)))
    return sum(tokens) / took


def training(setting: Setting) -> Iterator[Row]:
    for name, dials in (("reference size", REFERENCE), ("quick size", QUICK)):
        config = Config.from_flat({**dials, "store": setting.config.data.store, "wandb": "off"})
        with tempfile.TemporaryDirectory() as folder:
            ours = OurTrainer(config, folder)
            if dials == REFERENCE:
                tokens_per_second(ours.step, 4)
                yield Row("peak memory, training alone, reference size", "GB", [peak_memory()])
            device, autocast = ours.trainer.device, ours.trainer.autocast
            dtype = torch.float32 if autocast is nullcontext else torch.bfloat16
            theirs = [TextbookTrainer(config, ours.trainer.store, device, precision)
                      for precision in dict.fromkeys((autocast, nullcontext))]
            for trainer in (ours, *theirs):
                trainer.step()
            ours.flops_per_token()
            matmul = partial(matmul_rate, device.type, dtype, 1024)
            best, rates, *baselines = take_turns(
                5, matmul, *(partial(tokens_per_second, trainer.step, 4) for trainer in (ours, *theirs)))
        baseline = max(baselines, key=statistics.median)
        kind = "bf16" if len(baselines) > 1 and baseline is baselines[0] else "fp32"
        yield Row(f"training, {name}", "tokens/s", rates, baseline, at_least=2.5,
                  note=f"nn.Transformer in {kind}, its faster precision here")
        if device.type == "cpu":
            flops = ours.flops_per_token()
            yield Row(f"CPU utilisation, {name}", "FLOP/s", [rate * flops for rate in rates], best, at_least=0.5,
                      note=f"of its own matmuls of 1024² in {dtype}".replace("torch.", ""))


# -- a shared machine -------------------------------------------------------------------------------------------------

@contextmanager
def busy_process() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def quiet_and_beside(config: Config) -> tuple[list[float], list[float]]:
    """Tokens a second of training alone, and beside one busy process."""
    with tempfile.TemporaryDirectory() as folder:
        ours = OurTrainer(config, folder)
        ours.step()

        def beside() -> float:
            with busy_process():
                return tokens_per_second(ours.step, 4)

        quiet_rates, rates = take_turns(5, lambda: tokens_per_second(ours.step, 4), beside)
    return quiet_rates, rates


def shared(setting: Setting) -> Iterator[Row]:
    """OpenMP reads its waiting policy when it is loaded, so each has a process of its own."""
    config, found = Config.from_flat({**QUICK, "store": setting.config.data.store, "wandb": "off"}), []
    ours = os.environ.get("GOMP_SPINCOUNT", "300000")
    for spins in (ours, "300000"):
        os.environ["GOMP_SPINCOUNT"] = spins
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            found.append(pool.submit(quiet_and_beside, config).result())
    os.environ["GOMP_SPINCOUNT"] = ours
    (alone, beside), (alone_before, beside_before) = found
    yield Row("training beside a busy process, to alone", "tokens/s", beside, alone, at_least=0.45,
              note=f"quick size, {os.cpu_count()} cores")
    yield Row("training beside a busy process, to OpenMP's own waiting", "tokens/s", beside, beside_before)
    yield Row("training alone, to OpenMP's own waiting", "tokens/s", alone, alone_before, at_least=0.97)


# -- flops ------------------------------------------------------------------------------------------------------------

def window_flops(c: ModelConfig, vocab_size: int, rows: int, n_tokens: int) -> int:
    """FLOPs of training on one window of `n_tokens` tokens, BOS and EOS among them, with a `rows` bottleneck of so many
    rows read both ways.

    The rule of PaLM (Chowdhery 2022, appendix B): 6 a weight and token it is applied to (two forward, four backward)
    and 12 K a channel, query and layer of attention over K keys, causal or not; embeddings, norms, softmax and the
    optimizer do not count. There every weight meets every token, 6 N; here the encoder's meet n_tokens, the
    decoder's n_tokens - 1, and those that make the memory one row of the latent each.
    """
    D, C, S, T = c.d_model, c.latent_channels, rows, n_tokens
    encoder = c.enc_layers * T * (12 * D * D + 2 * T * D)
    pool = (T + 1) * (2 * D * D + 2 * S * D) + S * D * 2 * C
    memory = S * (C * D + c.dec_layers * 2 * D * D)
    t = T - 1
    decoder = c.dec_layers * t * (14 * D * D + 2 * C * D + 2 * t * D + 2 * S * D) + t * D * vocab_size
    return 6 * (encoder + pool + memory + decoder)


def gpu(setting: Setting) -> Iterator[Row]:
    """Model FLOPs utilisation in bf16: FLOPs of real tokens a second over the dense peak of the card."""
    name = torch.cuda.get_device_name()
    peak = next((flops for key, flops in PEAKS.items() if key in name), 0.0)
    for size, dials in (("reference size", REFERENCE), ("100 M parameters", LARGE)):
        for compiled in (False, True):
            config = Config.from_flat({**dials, "store": setting.config.data.store, "wandb": "off",
                                       "precision": "bf16", "compile": compiled})
            with tempfile.TemporaryDirectory() as folder:
                ours = OurTrainer(config, folder)
                rates, flops = [], []
                for _ in range(6):
                    rates.append(tokens_per_second(ours.step, GPU_STEPS))
                    flops.append(ours.flops_per_token() * rates[-1] / 1e12)
            what = f"{size}, bf16{', compiled' if compiled else ''}"  # the first of six warms up and compiles
            yield Row(f"GPU training, {what}", "tokens/s", rates[1:], note=f"{name}, batch {config.train.batch_size}")
            yield Row(f"GPU utilisation, {what}", "TFLOP/s", flops[1:], [peak] if peak else [],
                      at_least=0.4 if peak else 0.0, note="of the card's dense peak")


# -- generation -------------------------------------------------------------------------------------------------------

class Endless(Grammar):
    """A grammar without EOS; where nothing else may follow, everything may."""

    def __init__(self, grammar: Grammar):
        self.__dict__.update(grammar.__dict__)

    def allows(self, *place) -> np.ndarray:
        allowed = super().allows(*place)
        allowed[:, EOS] = False
        allowed |= ~allowed.any(1, keepdims=True)
        allowed[:, EOS] = False
        return allowed


def prefixes(table: SlotTable, grammar: Grammar, ids: Tensor, every: int = 1) -> Iterator[tuple[Tensor, Tensor, Place]]:
    """What decoding ids (B, T) asks of a model without a cache: ids (B, t), their slots, and the place before the last
    of them, for one in `every` t."""
    slots, place = table.slots(ids), Place(table, grammar, len(ids))
    for t in range(1, ids.shape[1]):
        if t % every == every // 2:
            yield ids[:, :t], slots[:, :t], place
            place = copy.copy(place)
            place.begun = copy.deepcopy(place.begun)
        place.read(ids[:, t - 1].numpy())


@torch.no_grad()
def next_uncached(model: MusicVAE, z: Tensor, ids: Tensor, slots: Tensor, place: Place) -> Tensor:
    """Greedy: the ids (B,) after ids (B, t), from z (B, S, C) and the whole prefix."""
    place = copy.copy(place)
    place.begun = copy.deepcopy(place.begun)
    place.read(ids[:, -1].numpy())
    is_live = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device)
    logits = model.decode(ids.to(z.device), slots.to(z.device), z, is_live)[:, -1]
    forbidden = torch.from_numpy(place.forbids(logits.shape[1])).to(z.device)
    return logits.masked_fill(forbidden, -torch.inf).argmax(-1).cpu()


def generation(setting: Setting) -> Iterator[Row]:
    """Without a cache a step costs what its prefix is long, so one length in eight is run."""
    run = load_run(setting.run)
    grammar, table, every = Endless(run.codec.grammar), run.codec.table, 8
    alone = []  # tokens/s without cache at batch 1
    for batch, at_least in ((1, 10.0), (8, 0.0), (64, 0.0)):
        z = prior_latents(run.model, batch, run.mean_tokens)

        def cached(z=z):
            return decode(run.model, table, z, max_tokens=NEW_TOKENS + 1, grammar=grammar)

        asked = list(prefixes(table, grammar, torch.tensor(cached()), every))

        def uncached(z=z, asked=asked):
            return [next_uncached(run.model, z, *prefix) for prefix in asked]

        took, took_uncached = take_turns(3, lambda f=cached: seconds(f), lambda f=uncached: seconds(f))
        rates = [batch * NEW_TOKENS / t for t in took]
        baseline = [batch * NEW_TOKENS / every / t for t in took_uncached]
        alone = alone or baseline
        yield Row(f"generation, batch {batch}, to no cache", "tokens/s", rates, baseline, at_least=at_least,
                  note=f"{NEW_TOKENS} tokens, greedy, the reference run")
        if batch > 1:
            yield Row(f"generation, batch {batch}, to batch 1 without", "tokens/s", rates, alone,
                      at_least=50.0 if batch == 64 else 0.0)
    if run.prior:
        composed = take_turns(3, lambda: seconds(lambda: run.generate(64)))
        yield Row("64 bars from the learned prior", "s", *composed, note="the reference run; eight last bars are tried")


# -- tokens -----------------------------------------------------------------------------------------------------------

def drop_one_by_one(ids: Tensor, share: float, spare: Tensor) -> Tensor:
    """Token dropout as first thought of: look at each token of ids (B, T)."""
    out = ids.clone()
    for row in out:
        for t in range(len(row)):
            if row[t] >= N_SPECIAL and not spare[row[t]] and random.random() < share:
                row[t] = MASK
    return out


def drop_in_lists(ids: Tensor, share: float, spare: list[bool]) -> Tensor:
    """The same over Python's own integers, the quickest loop there is."""
    return torch.tensor([[MASK if i >= N_SPECIAL and not spare[i] and random.random() < share else i for i in row]
                         for row in ids.tolist()])


def dropout(setting: Setting) -> Iterator[Row]:
    store = TokenStore(setting.config.data.store)
    ids = torch.randint(0, store.vocab_size, (32, 384), generator=torch.Generator().manual_seed(0))
    drop, spare = TokenDropout(0.3, store.vocab_size, spare=store.is_structure), store.is_structure.tolist()
    ours, by_tensor, by_list = take_turns(5, lambda: 200 / seconds(lambda: [drop(ids) for _ in range(200)]),
                                          lambda: 1 / seconds(lambda: drop_one_by_one(ids, 0.3, store.is_structure)),
                                          lambda: 1 / seconds(lambda: drop_in_lists(ids, 0.3, spare)))
    yield Row("token dropout, 32 × 384", "batches/s", ours, by_tensor, at_least=100, note="to a loop over the tensor")
    yield Row("token dropout, to a loop over lists", "batches/s", ours, by_list)


def codec(setting: Setting) -> Iterator[Row]:
    """Windows of scores to ids and back, one core."""
    run = load_run(setting.run)
    windows = [window for piece in setting.held_out[:20] for window in run.windows(piece.path)[2]]
    sequences = run.codec.encode(windows)
    encode, back = take_turns(5, lambda: len(windows) / seconds(lambda: run.codec.encode(windows)),
                              lambda: len(windows) / seconds(lambda: [run.codec.decode(ids) for ids in sequences]))
    yield Row("encoding scores to ids", "windows/s", encode, note=f"{len(windows)} windows of 4 bars")
    yield Row("decoding ids to scores", "windows/s", back)


def corpus(setting: Setting) -> Iterator[Row]:
    """From the files to a store, nothing cached."""
    data, times = setting.config.data, []
    for _ in range(2):
        with tempfile.TemporaryDirectory() as folder, quiet():
            config = setting.config.replace(data_dir=folder)
            times.append(seconds(lambda config=config, folder=folder: build_store(config, load_corpus(
                data.source, folder, archive=data.archive, limit=data.limit, progress=False))))
    is_all = data.source == "jsfakes"
    yield Row(f"{'500 js-fakes' if is_all else f'{data.limit} chorales of Bach'} × 12 keys to a store", "s", times,
              at_most=10.0 if is_all else 0.0, note=f"{os.cpu_count()} cores")


# -- the widget -------------------------------------------------------------------------------------------------------

FIRST_SOUND = """
import time
began = time.perf_counter()
import json, pickle, sys
from mtxlib.book.widgets import Morph
from mtxlib.run import load_run
folder, pieces = pickle.load(sys.stdin.buffer)
widget = Morph(load_run(folder), pieces)
assert "audio/ogg" in widget.sound.value
times, heard = [time.perf_counter() - began], widget.sound.value
for alpha in widget.steps[1:-1]:
    if alpha != widget.alpha.value:
        began = time.perf_counter()
        widget.alpha.value = alpha
        times.append(time.perf_counter() - began)
print(json.dumps(times))
"""


def widget(setting: Setting) -> Iterator[Row]:
    """From a bare interpreter to a widget that shows and sounds, then from one place of its slider to another."""
    first, moves = [], []
    for _ in range(3):
        given = pickle.dumps((setting.run, setting.held_out))
        answer = subprocess.run([sys.executable, "-c", FIRST_SOUND], input=given, stdout=subprocess.PIPE, check=True)
        began, *rest = json.loads(answer.stdout)
        first.append(began)
        moves += rest
    yield Row("widget, to its first sound", "s", first,
              note="imports, the run, 21 steps from A to B, roll, OGG, notation")
    yield Row("widget, a move of the slider", "s", moves, at_most=0.5,
              note="roll, OGG and notation of a step not yet seen")


# -- all of it --------------------------------------------------------------------------------------------------------

BENCHES = {f.__name__: f for f in (training, shared, gpu, generation, dropout, codec, corpus, widget)}


def quiet():
    return redirect_stdout(io.StringIO())


def measured(name: str, setting: Setting) -> list[dict]:
    """The rows of one benchmark and its peak memory; called in a process of its own."""
    warnings.filterwarnings("ignore", module="torch.nn")
    rows = []
    for row in BENCHES[name](setting):
        print(f"{row.name}: {digits(statistics.median(row.values))} {row.unit}", flush=True)
        rows.append(row)
    rows.append(Row(f"peak memory, {name}", "GB", [peak_memory()]))
    if torch.cuda.is_available():
        rows.append(Row(f"peak GPU memory, {name}", "GB", [torch.cuda.max_memory_allocated() / 1e9]))
    return [{"bench": name, **row.to_dict()} for row in rows]


def machine() -> dict:
    info = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in (info.read_text() if info.exists() else "").splitlines()
              if line.startswith("model name")]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {"cpu": models[0] if models else platform.processor(), "cores": os.cpu_count(),
            "system": f"{platform.system()} {platform.machine()}",
            "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None, "python": platform.python_version(),
            "torch": torch.__version__, "threads": torch.get_num_threads(),
            "precision": explain("auto", device),
            "matmuls": {name: round(matmul_rate(device.type, dtype, 1024) / 1e9) for name, dtype in
                        (("bf16", torch.bfloat16), ("fp32", torch.float32))}}  # GFLOP/s


def is_same(machine: dict, other: dict) -> bool:
    """But for what is measured of it, which no two runs find alike."""
    a, b = ({k: v for k, v in x.items() if k not in ("precision", "matmuls")} for x in (machine, other))
    return a == b


def music(archive: str, data_dir: str) -> tuple[Config, list[Piece]]:
    """The configuration and its pieces: js-fakes or, where it cannot be had, some of Bach."""
    for changes in ({"archive": archive}, {"source": "bach", "limit": 100}):
        config = Config.from_flat({"preset": "reference", "data_dir": data_dir, **changes})
        try:
            pieces = load_corpus(config.data.source, data_dir, archive=config.data.archive, limit=config.data.limit)
            return config.replace(store=str(build_store(config, pieces).folder)), pieces
        except ConnectionError as e:
            print(e)
    raise AssertionError("Bach needs no network")


def digits(x: float) -> str:
    return f"{x:,.0f}" if x >= 1000 else f"{x:.4g}"


def table(rows: list[dict]) -> str:
    lines = [("", "measured", "spread", "baseline", "ratio", "aim", "reached")]
    for row in rows:
        aim = (f"≥ {row['at_least']:g} ×" if row["at_least"]
               else f"≤ {row['at_most']:g} {row['unit']}" if row["at_most"] else "")
        lines.append((row["name"], f"{digits(row['measured'])} {row['unit']}", f"{row['spread']:.0%}",
                      digits(statistics.median(row["baseline"])) if row["baseline"] else "",
                      f"{row['ratio']:,.3g} ×" if row["ratio"] else "", aim,
                      {True: "yes", False: "no", None: ""}[row["reached"]]))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in
                               enumerate(zip(line, widths, strict=True))).rstrip() for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/bench.py", description="Measure speed against baselines.")
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=list(BENCHES), help="these benchmarks")
    parser.add_argument("--archive", default="", help="a local copy of js-fakes, instead of a download")
    parser.add_argument("--data-dir", default="data", help="where corpora and stores are cached")
    parser.add_argument("--run", type=Path, default=Path("outputs/reference"), help="the run that decodes")
    parser.add_argument("--out", type=Path, default=Path("outputs/reference/bench.json"))
    args = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    share_cores()  # for the processes to come
    config, pieces = music(args.archive, args.data_dir)
    setting = Setting(config, [p for p in pieces if p.split == "test"], args.run)
    here, rows = {**machine(), "music": f"{len(pieces)} pieces of {config.data.source}"}, []
    if args.out.exists() and is_same(here, (before := json.loads(args.out.read_text()))["machine"]):
        rows = [row for row in before["rows"] if row["bench"] not in args.only]
    for name in args.only:
        if name == "gpu" and not torch.cuda.is_available():
            print("gpu: there is none")
            continue
        began = time.perf_counter()
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            try:
                rows += pool.submit(measured, name, setting).result()
            except ConnectionError as e:
                print(f"{name}: {e}")
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    rows.sort(key=lambda row: [*BENCHES].index(row["bench"]))
    atomic_text(args.out, json.dumps({"machine": here, "rows": rows}, indent=1, ensure_ascii=False) + "\n")
    print(f"\n{table(rows)}\n\n{json.dumps(here)}\n{args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
