"""A prior over the rows of the latent, learned from frozen posteriors, for pieces of any length.

N(0, I) knows no order: windows drawn from it have nothing to do with each other, and the rows of one window are only
as related as the KL made them. Here a small causal transformer says how the next row follows from the rows before,
as a mixture of diagonal Gaussians. It reads one row a beat on the time line of a whole piece, how long the piece has
lasted and how much of it is left, so that it can open and close.

B pieces, T rows, C latent channels, K components of the mixture.
"""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from .corpus import Piece
from .data import Windows
from .files import atomic
from .layers import Cache, DecoderBlock
from .model import MusicVAE
from .tokens import Codec, cut_pieces, in_all_keys

EDGE = 16  # bars from the beginning, and to the end, that are told apart
CONTEXT = 64  # rows that are looked back to, as in training
SIGMA_RANGE = (-4.0, 1.5)  # of log sigma


class Line(NamedTuple):
    """The rows of one piece in time: mu, logvar (T, C)."""

    mu: Tensor
    logvar: Tensor


class RowPrior(nn.Module):
    def __init__(self, channels: int, rows_per_bar: int, d_model: int = 96, n_layers: int = 2, n_heads: int = 4,
                 components: int = 8):
        super().__init__()
        self.settings = {"channels": channels, "rows_per_bar": rows_per_bar, "d_model": d_model,
                         "n_layers": n_layers, "n_heads": n_heads, "components": components}
        self.channels, self.rows_per_bar, self.components, self.n_heads = channels, rows_per_bar, components, n_heads
        self.row = nn.Linear(channels, d_model)
        self.opening = nn.Parameter(0.02 * torch.randn(d_model))  # stands for the row before the first
        self.place = nn.Embedding(rows_per_bar, d_model)
        self.since, self.left = nn.Embedding(EDGE + 1, d_model), nn.Embedding(EDGE + 1, d_model)
        self.blocks = nn.ModuleList(DecoderBlock(d_model, n_heads, cross=False) for _ in range(n_layers))
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, components * (1 + 2 * channels))
        for embedding in (self.place, self.since, self.left):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, before: Tensor, at: Tensor, n_rows: Tensor, caches: list[Cache] | None = None) -> Tensor:
        """Parameters of the mixture (B, T, K * (1 + 2C)) of the rows numbered `at` (B, T) in pieces of `n_rows` (B,),
        from the rows before each of them (B, T, C)."""
        x = torch.where((at == 0)[..., None], self.opening, self.row(before))                    # (B, T, D)
        bar, last = at // self.rows_per_bar, (n_rows[:, None] - 1) // self.rows_per_bar
        x = (x + self.place(at % self.rows_per_bar) + self.since(bar.clamp(max=EDGE))
             + self.left((last - bar).clamp(0, EDGE)))
        for i, block in enumerate(self.blocks):
            x = block(x, cache=caches and caches[i])
        return self.head(self.norm(x))

    def split(self, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log weights (..., K), means and log sigmas (..., K, C)."""
        weights, rest = out.split((self.components, 2 * self.components * self.channels), dim=-1)
        mean, log_sigma = rest.unflatten(-1, (self.components, 2 * self.channels)).chunk(2, dim=-1)
        return weights.log_softmax(-1), mean, log_sigma.clamp(*SIGMA_RANGE)

    def log_prob(self, z: Tensor, out: Tensor) -> Tensor:
        """Nats of rows z (..., C) under the mixture `out`: (...)."""
        weights, mean, log_sigma = self.split(out)
        parts = -0.5 * ((z[..., None, :] - mean) * (-log_sigma).exp()).square() - log_sigma
        return torch.logsumexp(weights + (parts - 0.5 * np.log(2 * np.pi)).sum(-1), -1)

    def draw(self, out: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
        """One row (B, C) of each mixture (B, ...); the temperature narrows weights and Gaussians alike."""
        weights, mean, log_sigma = self.split(out)
        chosen = torch.multinomial((weights / max(temperature, 1e-3)).softmax(-1), 1, generator=generator)[..., None]
        pick = chosen.expand(-1, -1, self.channels)
        noise = torch.randn(len(out), self.channels, generator=generator)
        return (mean.gather(1, pick)[:, 0] + temperature * noise * log_sigma.gather(1, pick)[:, 0].exp())

    @torch.no_grad()
    def sample(self, n: int, n_rows: int, temperature: float = 1.0, seed: int = 0,
               begin: Tensor | None = None) -> Tensor:
        """n pieces of n_rows rows, (n, n_rows, C), on the CPU; with `begin` (T, C) they all go on from there.

        A bar at a time, looking back CONTEXT rows.
        """
        generator = torch.Generator().manual_seed(seed)
        z = torch.zeros(n, n_rows + 1, self.channels)  # z[:, t + 1] is row t
        done = 0 if begin is None else len(begin)
        if done:
            z[:, 1:done + 1] = begin
        lengths = torch.full((n,), n_rows)
        while done < n_rows:
            until = min(n_rows, done + self.rows_per_bar)
            first = max(0, until - CONTEXT)
            like = self.head.weight
            caches = [Cache(n, self.n_heads, until - first, like.shape[1] // self.n_heads, like) for _ in self.blocks]
            at = torch.arange(first, until).expand(n, -1)
            read = slice(0, done - first + 1)
            while done < until:
                out = self(z[:, first:][:, read], at[:, read], lengths, caches)[:, -1]
                done += 1
                z[:, done] = self.draw(out, temperature, generator)
                read = slice(done - first, done - first + 1)
        return z[:, 1:]


@torch.no_grad()
def lines_of(model: MusicVAE, codec: Codec, pieces: list[Piece], all_keys: bool = False,
             batch_size: int = 256) -> list[Line]:
    """Posteriors of whole pieces, a line each, or one for each piece and key; from windows laid end to end."""
    keyed = [(c.piece, shift, c.bar, ids) for c in cut_pieces(codec.tokenizer, pieces, codec.n_bars, codec.n_bars)
             for shift, ids in (in_all_keys(codec, c.ids) if all_keys else [(0, c.ids)])]
    sequences = codec.finish([ids for *_, ids in keyed])
    windows = Windows.pack(sequences, codec.slots(sequences), [(0, bar, 0, 0) for _, _, bar, _ in keyed])
    order = np.argsort(windows.lengths, kind="stable")
    lines: dict = {}
    for part in (order[i:i + batch_size] for i in range(0, len(order), batch_size)):
        posterior = model.encode(*windows.batch(part).to(next(model.parameters()).device))
        for number, mu, logvar in zip(part, posterior.mu.float().cpu(), posterior.logvar.float().cpu(), strict=True):
            piece, shift, bar, _ = keyed[number]
            lines.setdefault((piece, shift), []).append((bar, mu, logvar))
    return [lay(sorted(found, key=lambda window: window[0]), codec.n_bars) for _, found in sorted(lines.items())]


def lay(found: list[tuple[int, Tensor, Tensor]], n_bars: int) -> Line:
    """Windows (first bar, mu, logvar) of one piece as one line; the last may lie over bars of the one before, and where
    one is missing, for want of notes, the rows are the prior's."""
    given, parts = 0, []
    for bar, mu, logvar in found:
        per_bar = len(mu) // n_bars
        gap = torch.zeros(max(0, bar - given) * per_bar, mu.shape[1])
        parts += [(gap, gap), (mu[max(0, given - bar) * per_bar:], logvar[max(0, given - bar) * per_bar:])]
        given = bar + n_bars
    return Line(*(torch.cat(x) for x in zip(*parts, strict=True)))


def batch_of(lines: list[Line], rng: np.random.Generator, generator: torch.Generator, size: int,
             rows_per_bar: int) -> tuple[Tensor, ...]:
    """Random stretches of CONTEXT rows: z (B, T + 1, C), the row before in front; at (B, T), n_rows (B,), is_there."""
    z = torch.zeros(size, CONTEXT + 1, lines[0].mu.shape[1])
    at, n_rows, is_there = (torch.zeros(size, CONTEXT, dtype=torch.long), torch.zeros(size, dtype=torch.long),
                            torch.zeros(size, CONTEXT, dtype=torch.bool))
    for i, number in enumerate(rng.integers(len(lines), size=size)):
        line = lines[number]
        n = len(line.mu)
        start = int(rng.integers(0, max(1, (n - CONTEXT) // rows_per_bar + 1))) * rows_per_bar
        rows = slice(max(0, start - 1), min(n, start + CONTEXT))
        drawn = line.mu[rows] + torch.randn(line.mu[rows].shape, generator=generator) * (0.5 * line.logvar[rows]).exp()
        z[i, (start == 0):(start == 0) + len(drawn)] = drawn
        at[i], n_rows[i] = torch.arange(start, start + CONTEXT), n
        is_there[i, :min(n - start, CONTEXT)] = True
    return z, at, n_rows, is_there


def fit(lines: list[Line], held_out: list[Line], rows_per_bar: int, *, steps: int = 1500, batch_size: int = 64,
        lr: float = 2e-3, seed: int = 0, **sizes) -> tuple[RowPrior, dict[str, float]]:
    """Learn a prior from posteriors; returns it and its figures on held-out pieces, see `rates`."""
    torch.manual_seed(seed)
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    prior = RowPrior(lines[0].mu.shape[1], rows_per_bar, **sizes)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    bar = tqdm(range(steps), desc="prior over rows", mininterval=1.0)
    for _ in bar:
        z, at, n_rows, is_there = batch_of(lines, rng, generator, batch_size, rows_per_bar)
        loss = -prior.log_prob(z[:, 1:], prior(z[:, :-1], at, n_rows))[is_there].mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(nats_a_row=f"{loss.item():.2f}")
    return prior.eval(), rates(prior, held_out, rows_per_bar)


@torch.no_grad()
def rates(prior: RowPrior, lines: list[Line], rows_per_bar: int, seed: int = 0) -> dict[str, float]:
    """What a row costs, in nats, under N(0, I) and under the learned prior: KL(q || p), one sample a row."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    under = {"normal": 0.0, "learned": 0.0, "rows": 0}
    for line in lines:
        z, at, n_rows, is_there = batch_of([line], rng, generator, 1, rows_per_bar)
        first = int(at[0, 0])
        logvar = line.logvar[first:first + CONTEXT]
        entropy = 0.5 * (logvar + 1 + np.log(2 * np.pi)).sum()
        here = z[:, 1:][is_there]
        under["learned"] += float(-prior.log_prob(z[:, 1:], prior(z[:, :-1], at, n_rows))[is_there].sum() - entropy)
        under["normal"] += float(0.5 * (here.square() + np.log(2 * np.pi)).sum() - entropy)
        under["rows"] += len(here)
    return {name: under[name] / under["rows"] for name in ("normal", "learned")}


def save_prior(prior: RowPrior, path: Path, weights: Path) -> None:
    """In half precision, for it is shipped; marked with the `weights` whose posteriors it learned from."""
    tensors = {name: x.half().contiguous() for name, x in prior.state_dict().items()}
    metadata = {"format": "mtxlib prior", "settings": json.dumps(prior.settings), "weights": digest(weights)}
    atomic(path, lambda p: save_file(tensors, str(p), metadata=metadata))


def load_prior(path: Path, weights: Path) -> RowPrior | None:
    """None where there is no such file, or where it belongs to other weights. Raises ValueError if it is no prior."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata() or {}
        if metadata.get("format") != "mtxlib prior":
            raise ValueError("no mark of mtxlib.prior in it")
        if metadata["weights"] != digest(weights):
            print(f"{path} was learned from other weights and is not used: call fit_prior() again")
            return None
        prior = RowPrior(**json.loads(metadata["settings"]))
        load_model(prior, path)
    except (KeyError, RuntimeError, SafetensorError, TypeError, ValueError) as e:
        raise ValueError(f"{path}: expected a prior saved by mtxlib.prior, got something else ({e})") from e
    return prior.eval()


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
