"""A prior over the rows of the latent, learned from frozen posteriors, for pieces of any length.

N(0, I) knows no order: windows drawn from it have nothing to do with each other, and the rows of one window are only
as related as the KL made them. Here a small causal transformer says how the next row follows from the rows before. It
is told the bar of the piece, how many are left, the key, and whether the piece is to close with a cadence. What is
unusual is its head: the channels of a row come one after the other, each a mixture of Gaussians given those before it,
as in RNADE (Uria 2013); a mixture over whole rows cannot say which of many chords comes next.

B pieces, T rows, C latent channels, H hidden units of a channel, K components of its mixture.
"""

import copy
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from mtxlib.config import TrainConfig
from mtxlib.files import atomic, digest
from mtxlib.model.layers import Cache, DecoderBlock, without_onednn
from mtxlib.model.losses import entropy
from mtxlib.model.optim import autocast_for, make_optimizers

N_KEYS = 25  # twelve major, twelve minor, unknown
EDGE = 4  # bars from the beginning, and to the end, that are told apart
CONTEXT = 64  # rows of a stretch in training; as many are looked back to, or half of them at least
SIGMA_RANGE = (-4.0, 1.5)  # of log sigma


class Line(NamedTuple):
    """The rows of one piece in time, and what the prior is told of it."""

    mu: Tensor  # (T, C)
    logvar: Tensor  # (T, C)
    key: int = N_KEYS - 1  # its number in `music.score.KEY_NAMES`
    closes: int = 0  # 1 where it ends with a cadence, see `music.metrics.closes`


class RowPrior(nn.Module):
    def __init__(self, channels: int, rows_per_bar: int, d_model: int = 80, n_layers: int = 2, n_heads: int = 4,
                 hidden: int = 48, components: int = 6):
        super().__init__()
        self.settings = {"channels": channels, "rows_per_bar": rows_per_bar, "d_model": d_model,
                         "n_layers": n_layers, "n_heads": n_heads, "hidden": hidden, "components": components}
        self.channels, self.rows_per_bar = channels, rows_per_bar
        self.register_buffer("keys", torch.ones(N_KEYS))  # the share of each in training
        self.row = nn.Linear(channels, d_model)
        self.opening = nn.Parameter(0.02 * torch.randn(d_model))  # stands for the row before the first
        self.place, self.key = nn.Embedding(rows_per_bar, d_model), nn.Embedding(N_KEYS, d_model)
        self.since, self.left = nn.Embedding(EDGE + 1, d_model), nn.Embedding(2 * (EDGE + 1), d_model)
        self.blocks = nn.ModuleList(DecoderBlock(d_model, n_heads, cross=False) for _ in range(n_layers))
        self.norm = nn.LayerNorm(d_model)
        self.to_hidden = nn.Linear(d_model, channels * hidden)
        self.from_row = nn.Parameter(0.1 * torch.randn(hidden, channels, channels))  # [:, i, j]: what j hears of i < j
        self.to_mixture = nn.Parameter(hidden ** -0.5 * torch.randn(channels, hidden, 3 * components))
        self.bias = nn.Parameter(torch.zeros(channels, 3 * components))
        with torch.no_grad():
            self.bias[:, components:2 * components] = torch.linspace(-1.5, 1.5, components)
        for embedding in (self.place, self.key, self.since, self.left):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, before: Tensor, at: Tensor, n_rows: Tensor, key: Tensor, closes: Tensor) -> Tensor:
        """States (B, T, D) that say all that is known of the rows numbered `at` (B, T), from the rows before each of
        them (B, T, C), in pieces of `n_rows` rows, `key` and `closes` (B,). What all pieces share has a B of 1."""
        x = self.embed(before, at, n_rows, key, closes)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def embed(self, before: Tensor, at: Tensor, n_rows: Tensor, key: Tensor, closes: Tensor) -> Tensor:
        bar, last = at // self.rows_per_bar, (n_rows[:, None] - 1) // self.rows_per_bar
        left = 2 * (last - bar).clamp(0, EDGE) + closes[:, None]
        x = torch.where((at == 0)[..., None], self.opening, self.row(before))                    # (B, T, D)
        x = x + self.place(at % self.rows_per_bar) + self.since(bar.clamp(max=EDGE)) + self.left(left)
        return x + self.key(key)[:, None]

    def mixture(self, state: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log weights, means and log sigmas (..., C, K) from states (..., D) and rows z (..., C), of which each channel
        is told those before it."""
        hidden = self.to_hidden(state).unflatten(-1, (self.channels, -1))                        # (..., C, H)
        hidden = F.gelu(hidden + torch.einsum("...i,hic->...ch", z, self.from_row.triu(1)))
        out = torch.einsum("...ch,cho->...co", hidden, self.to_mixture) + self.bias              # (..., C, 3K)
        weights, mean, log_sigma = out.float().chunk(3, dim=-1)
        return weights.log_softmax(-1), mean, log_sigma.clamp(*SIGMA_RANGE)

    def log_prob(self, z: Tensor, state: Tensor) -> Tensor:
        """Nats of rows z (..., C) under what the states (..., D) say: (...)."""
        weights, mean, log_sigma = self.mixture(state, z)
        parts = weights - 0.5 * ((z[..., None] - mean) * (-log_sigma).exp()).square() - log_sigma
        return (parts.logsumexp(-1) - 0.5 * math.log(2 * math.pi)).sum(-1)

    def draw(self, state: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
        """One row (B, C) for each state (B, D); the temperature narrows weights and Gaussians alike."""
        hidden, drawn = self.to_hidden(state).unflatten(-1, (self.channels, -1)), []             # (B, C, H)
        tells = self.from_row.permute(1, 2, 0)                                                   # (C, C, H)
        noise = temperature * torch.randn(len(state), self.channels, 1, generator=generator, device=state.device)
        uniform = torch.rand(*noise.shape[:2], self.bias.shape[1] // 3, generator=generator, device=state.device)
        gumbel = -max(temperature, 1e-3) * (-uniform.clamp(min=1e-20).log()).log()  # the largest of logits + these
        for c in range(self.channels):                                              # is one by its probability
            out = torch.addmm(self.bias[c], F.gelu(hidden[:, c]), self.to_mixture[c])
            weights, mean, log_sigma = out.chunk(3, dim=-1)
            chosen = (weights + gumbel[:, c]).argmax(-1, keepdim=True)
            sigma = log_sigma.gather(1, chosen).clamp(*SIGMA_RANGE).exp()
            drawn.append(torch.addcmul(mean.gather(1, chosen), noise[:, c], sigma))              # (B, 1)
            hidden = torch.addcmul(hidden, drawn[-1][..., None], tells[c])  # what is done already is read no more
        return torch.cat(drawn, dim=1)

    def of_windows(self, before: Tensor) -> Tensor:
        """States (B, T, D) of the rows of windows from somewhere within a piece, of which nothing else is known: a
        joint prior learns these. before (B, T, C): the row before each, 0 where it lies in front of the window."""
        n, edge, device = before.shape[1], (EDGE + 1) * self.rows_per_bar, before.device
        told = (torch.full((1,), x, device=device) for x in (2 * edge + n, N_KEYS - 1, 0))
        return self(before, torch.arange(edge, edge + n, device=device)[None], *told)

    def window_nats(self, z: Tensor) -> Tensor:
        """-log p of each row of windows z (B, S, C) given the rows before it, (B, S)."""
        return -self.log_prob(z, self.of_windows(F.pad(z[:, :-1], (0, 0, 1, 0))))

    @torch.no_grad()
    def sample_windows(self, n: int, n_rows: int, generator: torch.Generator) -> Tensor:
        """n windows (n, n_rows, C), on the device of the generator."""
        z = torch.zeros(n, n_rows + 1, self.channels, device=generator.device)
        for row in range(n_rows):
            z[:, row + 1] = self.draw(self.of_windows(z[:, :row + 1])[:, -1], 1.0, generator)
        return z[:, 1:]

    @torch.no_grad()
    @without_onednn()
    def sample(self, n: int, n_rows: int, temperature: float = 1.0, seed: int = 0, begin: Tensor | None = None,
               key: int | None = None, closes: bool = True, endings: int = 1) -> Tensor:
        """n pieces of n_rows rows, (n * endings, n_rows, C), on the CPU; with `begin` (T, C) they all go on from there.
        Without the number of a `key` each has its own, drawn as often as it was met in training. Each piece has
        `endings` versions, one after the other, that differ in their last bar."""
        generator = torch.Generator().manual_seed(seed)
        keys = (torch.multinomial(self.keys, n, replacement=True, generator=generator) if key is None
                else torch.full((n,), key))
        begin = torch.zeros(0, self.channels) if begin is None else begin
        z, given, cache = torch.zeros(n, n_rows + 1, self.channels), len(begin), None
        z[:, 1:given + 1] = begin
        length, closes = torch.tensor([[n_rows], [closes]])
        for row in range(given, n_rows):  # z[:, row] is the row before
            if row == max(given, n_rows - self.rows_per_bar):
                z, keys = z.repeat_interleave(endings, 0), keys.repeat_interleave(endings)
                cache = cache and cache.keep(torch.arange(n).repeat_interleave(endings))
            first = row
            if cache is None or cache.length == CONTEXT:  # from here on with what a stretch in training begins with
                cache, first = Cache(self.blocks, len(z), CONTEXT), max(0, row + 1 - CONTEXT // 2)
            x = self.embed(z[:, first:row + 1], torch.arange(first, row + 1)[None], length, keys, closes)
            z[:, row + 1] = self.draw(self.norm(cache.read(x)[:, -1]), temperature, generator)
        return z[:, 1:]


class Stretches(NamedTuple):
    """CONTEXT rows of each of B pieces, drawn from their posteriors; T = CONTEXT."""

    z: Tensor  # (B, 1 + T, C), the row before them in front
    logvar: Tensor  # (B, T, C), 0 beyond the end
    is_there: Tensor  # (B, T)
    at: Tensor  # (B, T), the number of each row in its piece
    n_rows: Tensor  # (B,), and what else a prior is told of the pieces
    key: Tensor
    closes: Tensor

    def nats(self, prior: RowPrior) -> Tensor:
        """-log p of each row that is there, one after the other."""
        state = prior(self.z[:, :-1], self.at, self.n_rows, self.key, self.closes)
        return -prior.log_prob(self.z[:, 1:][self.is_there], state[self.is_there])


def stretches(lines: list[Line], rows_per_bar: int, generator: torch.Generator) -> Stretches:
    """One of each line, from a random bar on."""
    parts = []
    for mu, logvar, *told in lines:
        later = max(0, len(mu) - CONTEXT) // rows_per_bar
        start = int(torch.randint(later + 1, (), generator=generator)) * rows_per_bar
        at = torch.arange(start, start + CONTEXT)
        z = mu + torch.randn(mu.shape, generator=generator) * (0.5 * logvar).exp()
        parts.append((F.pad(z, (0, 0, 1, CONTEXT))[start:start + CONTEXT + 1],
                      F.pad(logvar, (0, 0, 0, CONTEXT))[start:start + CONTEXT],
                      at < len(mu), at, *map(torch.tensor, (len(mu), *told))))
    return Stretches(*(torch.stack(x) for x in zip(*parts, strict=True)))


def fit(lines: list[Line], held_out: list[Line], rows_per_bar: int, *, steps: int = 1500, batch_size: int = 64,
        lr: float = 5e-3, seed: int = 0, joint: RowPrior | None = None, **sizes) -> tuple[RowPrior, dict[str, float]]:
    """Learn a prior from posteriors, or go on from a `joint` one; returns it and its `rates` on held-out pieces."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    prior = copy.deepcopy(joint).train() if joint else RowPrior(lines[0].mu.shape[1], rows_per_bar, **sizes)
    prior.keys = torch.bincount(torch.tensor([line.key for line in lines]), minlength=N_KEYS) / len(lines)
    optimizers, autocast = make_optimizers(prior, TrainConfig(lr=lr)), autocast_for("auto", torch.device("cpu"))
    schedules = [torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1,
                                                     cycle_momentum=False) for optimizer in optimizers]
    bar = tqdm(range(steps), desc="prior over rows", mininterval=1.0)
    for _ in bar:
        drawn = torch.randint(len(lines), (batch_size,), generator=generator).tolist()
        batch = stretches([lines[i] for i in drawn], rows_per_bar, generator)
        with autocast():
            loss = batch.nats(prior).mean()
        prior.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
        for step in (*optimizers, *schedules):
            step.step()
        bar.set_postfix(nats_a_row=f"{loss.item():.2f}", refresh=False)
    return prior.eval(), rates(prior, held_out, rows_per_bar)


@torch.no_grad()
def rates(prior: RowPrior, lines: list[Line], rows_per_bar: int, seed: int = 0) -> dict[str, float]:
    """What a row costs, in nats, under N(0, I) and under the learned prior: KL(q || p), one sample a row."""
    drawn = stretches(lines, rows_per_bar, torch.Generator().manual_seed(seed))
    normal = 0.5 * (drawn.z[:, 1:].square() + math.log(2 * math.pi)).sum(-1)[drawn.is_there]
    own = entropy(drawn.logvar)[drawn.is_there]
    return {"normal": float((normal - own).mean()), "learned": float((drawn.nats(prior) - own).mean())}


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
