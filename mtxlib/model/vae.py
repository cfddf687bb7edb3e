"""The model, in the order the data flows: Encoder, Bottleneck, Decoder, MusicVAE.

What is unusual: the latent is a matrix z (B, S, C) whose rows are aligned with the music where the bottleneck is
`rows`, and the decoder may read it in two ways. `cross` attends over a memory made of all rows. `in` adds, before every
layer, a projection of the row a token belongs to and of the next row, as in the in-attention of MuseMorphose (Wu & Yang
2021): the token that opens a row is predicted while its input still lies in the row before.

B batch, T tokens, D width (d_model), S latent rows, C latent channels, V vocabulary. Masks are predicates: `is_pad`
(B, T), `is_live` (B, S) for latent rows that belong to the window. Padding changes no number.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtxlib.config import PAD, SLOTS_PER_BAR, ModelConfig
from mtxlib.model.layers import Cache, DecoderBlock, EncoderBlock, angles, attend, split_heads
from mtxlib.model.prior import RowPrior

LOGVAR_RANGE = (-8.0, 4.0)  # keeps exp(logvar) sane in bf16; a posterior this narrow costs 3.5 nats a dimension


class Posterior(NamedTuple):
    mu: Tensor  # (B, S, C)
    logvar: Tensor  # (B, S, C)
    is_live: Tensor  # (B, S)


class Output(NamedTuple):
    logits: Tensor  # (B, T - 1, V), of tokens 1 … T - 1
    posterior: Posterior
    z: Tensor  # (B, S, C)
    prior_nats: Tensor | None = None  # (B, S), -log p(z) of each row given those before it; only with a joint prior
    prior_loss: Tensor | None = None  # the same, of which only the prior hears


class Embedding(nn.Module):
    """Token plus slot: what it is and when it stands."""

    def __init__(self, vocab_size: int, n_slots: int, d_model: int):
        super().__init__()
        self.token, self.slot = nn.Embedding(vocab_size, d_model), nn.Embedding(n_slots, d_model)

    def forward(self, ids: Tensor, slots: Tensor) -> Tensor:
        return self.token(ids) + self.slot(slots)


class Encoder(nn.Module):
    def __init__(self, config: ModelConfig, vocab_size: int, n_slots: int):
        super().__init__()
        self.embedding = Embedding(vocab_size, n_slots, config.d_model)
        self.blocks = nn.ModuleList(EncoderBlock(config.d_model, config.n_heads, config.dropout)
                                    for _ in range(config.enc_layers))
        self.norm = nn.LayerNorm(config.d_model)

    def forward(self, ids: Tensor, slots: Tensor, is_pad: Tensor) -> Tensor:
        """ids, slots, is_pad (B, T) -> (B, T, D)."""
        may_attend = ~is_pad[:, None, None, :]
        x = self.embedding(ids, slots)
        for block in self.blocks:
            x = block(x, may_attend)
        return self.norm(x)


class Bottleneck(nn.Module):
    """Encoder states -> posterior; z -> memory. Each kind has a `pool`: h (B, T, D), slots, is_pad (B, T) -> a state a
    row (B, S, D), is_live (B, S)."""

    stride = 2**62  # tokens a row: all of a window

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head = nn.Linear(config.d_model, 2 * config.latent_channels)
        self.to_memory = nn.Linear(config.latent_channels, config.d_model) if config.condition != "in" else None

    def row_of(self, slots: Tensor, start: int = 0) -> Tensor:
        """The latent row of each token, (B, T); `start` is the index of the first of them in its window."""
        index = torch.arange(start, start + slots.shape[1], device=slots.device)
        return (index // self.stride).expand(slots.shape)

    def n_rows(self, n_tokens: int) -> int:
        """Latent rows of a window of so many tokens."""
        return -(-n_tokens // self.stride)

    def live_rows(self, z: Tensor) -> Tensor:
        """Which rows (B, S) of a latent that was filled up with zero rows to a common S carry music."""
        return torch.ones(z.shape[:2], dtype=torch.bool, device=z.device)

    def forward(self, h: Tensor, slots: Tensor, is_pad: Tensor) -> Posterior:
        pooled, is_live = self.pool(h, slots, is_pad)
        mu, logvar = self.head(pooled).float().chunk(2, dim=-1)
        return Posterior(mu.masked_fill(~is_live[..., None], 0.0), logvar.clamp(*LOGVAR_RANGE), is_live)

    def memory(self, z: Tensor, is_live: Tensor) -> tuple[Tensor, Tensor]:
        """z (B, S, C) -> what cross attention looks at (B, K, D), and which of it is there (B, K)."""
        return self.to_memory(z), is_live


class Rows(Bottleneck):
    """One row a bar, half bar or beat: attention pooling over the tokens that stand in it. The query of a row is that
    of its place; beside the row's tokens it may look at one learned null token, so that a row without onsets, such as
    those beyond a shorter metre, is coded as such. What a longer bar has beyond 16 sixteenths goes to its last row.
    """

    def __init__(self, config: ModelConfig, n_slots: int):
        super().__init__(config)
        self.slots_per_row = SLOTS_PER_BAR // config.rows_per_bar
        self.rows, self.n_heads = n_slots // self.slots_per_row, config.n_heads
        self.query = nn.Parameter(0.02 * torch.randn(self.rows, config.d_model))
        self.null = nn.Parameter(0.02 * torch.randn(config.d_model))
        self.kv = nn.Linear(config.d_model, 2 * config.d_model, bias=False)
        self.norm = nn.LayerNorm(config.d_model)

    def row_of(self, slots: Tensor, start: int = 0) -> Tensor:
        return slots // self.slots_per_row

    def n_rows(self, n_tokens: int) -> int:
        return self.rows

    def pool(self, h: Tensor, slots: Tensor, is_pad: Tensor) -> tuple[Tensor, Tensor]:
        B = h.shape[0]
        row = self.row_of(slots).masked_fill(is_pad, -1)
        may_attend = row[:, None, :] == torch.arange(self.rows, device=h.device)[:, None]        # (B, S, T)
        may_attend = F.pad(may_attend, (1, 0), value=True)[:, None]                              # (B, 1, S, 1 + T)
        h = torch.cat([self.null.to(h.dtype).expand(B, 1, -1), h], dim=1)                        # (B, 1 + T, D)
        k, v = split_heads(self.kv(h), 2 * self.n_heads).chunk(2, dim=1)                         # (B, H, 1 + T, D / H)
        q = split_heads(self.query.to(k.dtype).expand(B, -1, -1), self.n_heads)                  # (B, H, S, D / H)
        pooled = self.norm(attend(q, k, v, may_attend))                                          # (B, S, D)
        return pooled, torch.ones(B, self.rows, dtype=torch.bool, device=h.device)


class Conv(Bottleneck):
    """Strided convolutions over time to a matrix and back: ceil(T / stride) rows, any length, no weight depends on it.
    With stride 1 there are none: a row a token, the widest latent, an upper bound for all others. Padding is zeroed
    before every convolution, so what lies beyond the last token looks like the edge."""

    def __init__(self, config: ModelConfig, stride: int):
        super().__init__(config)
        self.stride, D = stride, config.d_model
        halvings = int(math.log2(stride))
        self.down = nn.ModuleList(nn.Conv1d(D, D, kernel_size=4, stride=2, padding=1) for _ in range(halvings))
        self.up = nn.ModuleList(nn.ConvTranspose1d(D, D, kernel_size=4, stride=2, padding=1)
                                for _ in range(halvings if self.to_memory else 0))

    def live_rows(self, z: Tensor) -> Tensor:
        return (z != 0).any(-1)

    def pool(self, h: Tensor, slots: Tensor, is_pad: Tensor) -> tuple[Tensor, Tensor]:
        extra = -h.shape[1] % self.stride
        x, is_live = F.pad(h, (0, 0, 0, extra)).transpose(1, 2), F.pad(~is_pad, (0, extra))      # (B, D, T'), (B, T')
        x = x * is_live[:, None]
        for conv in self.down:
            is_live = is_live[:, ::2] | is_live[:, 1::2]
            x = F.gelu(conv(x)) * is_live[:, None]
        return x.transpose(1, 2), is_live

    def memory(self, z: Tensor, is_live: Tensor) -> tuple[Tensor, Tensor]:
        x = (self.to_memory(z) * is_live[..., None]).transpose(1, 2)
        for conv in self.up:
            is_live = is_live.repeat_interleave(2, dim=1)
            x = F.gelu(conv(x)) * is_live[:, None]
        return x.transpose(1, 2), is_live


class Linear1d(Bottleneck):
    """The whole window to one vector: a linear map over the concatenated states of all positions up to max_tokens."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.max_tokens, narrow = config.max_tokens, 8
        self.narrow = nn.Linear(config.d_model, narrow)
        self.flat = nn.Linear(config.max_tokens * narrow, config.d_model)

    def pool(self, h: Tensor, slots: Tensor, is_pad: Tensor) -> tuple[Tensor, Tensor]:
        if h.shape[1] > self.max_tokens and not is_pad[:, self.max_tokens:].all():
            raise ValueError(f"linear1d: expected at most max_tokens = {self.max_tokens} tokens, got {h.shape[1]}")
        h, is_pad = h[:, :self.max_tokens], is_pad[:, :self.max_tokens]
        x = self.narrow(h).masked_fill(is_pad[..., None], 0.0)                                   # (B, T, 8)
        x = F.pad(x, (0, 0, 0, self.max_tokens - x.shape[1])).flatten(1)                         # (B, max_tokens * 8)
        return F.gelu(self.flat(x))[:, None], torch.ones(len(h), 1, dtype=torch.bool, device=h.device)


def make_bottleneck(config: ModelConfig, n_slots: int) -> Bottleneck:
    if config.bottleneck == "rows":
        return Rows(config, n_slots)
    if config.bottleneck == "linear1d":
        return Linear1d(config)
    return Conv(config, stride=config.conv_stride if config.bottleneck == "conv" else 1)


class Decoder(nn.Module):
    """Causal, told of z by cross attention and by rows added at every layer; without a latent, a language model."""

    def __init__(self, config: ModelConfig, vocab_size: int, n_slots: int):
        super().__init__()
        condition = "nothing" if config.bottleneck == "none" else config.condition
        cross = condition in ("cross", "both")
        self.embedding = Embedding(vocab_size, n_slots, config.d_model)
        self.blocks = nn.ModuleList(DecoderBlock(config.d_model, config.n_heads, config.dropout, cross)
                                    for _ in range(config.dec_layers))
        self.add_rows = nn.ModuleList(nn.Linear(2 * config.latent_channels, config.d_model, bias=False)
                                      for _ in range(config.dec_layers if condition in ("in", "both") else 0))
        self.norm = nn.LayerNorm(config.d_model)
        self.head = nn.Linear(config.d_model, vocab_size, bias=False)
        if config.tie_weights:
            self.head.weight = self.embedding.token.weight

    def forward(self, ids: Tensor, slots: Tensor, added: list[Tensor], memory: list,
                may_attend: Tensor | None) -> Tensor:
        """ids, slots (B, T), what each layer adds of z (B, T, D) and its keys and values -> logits (B, T, V) of the
        tokens that follow."""
        x = self.embedding(ids, slots)                                                           # (B, T, D)
        for i, block in enumerate(self.blocks):
            if added:
                x = x + added[i]                                                                 # (B, T, D)
            x = block(x, memory[i], may_attend)
        return self.head(self.norm(x))                                                           # (B, T, V)


class MusicVAE(nn.Module):
    share = (0, 1)  # rank and number of the processes that train on parts of a batch: each draws the noise of the whole

    def __init__(self, config: ModelConfig, vocab_size: int, n_bars: int):
        super().__init__()
        self.config, self.vocab_size, self.n_bars = config, vocab_size, n_bars
        n_slots = n_bars * SLOTS_PER_BAR
        has_latent = config.bottleneck != "none"
        self.encoder = Encoder(config, vocab_size, n_slots) if has_latent else None
        self.bottleneck = make_bottleneck(config, n_slots) if has_latent else None
        self.decoder = Decoder(config, vocab_size, n_slots)
        self.apply(init_weights)
        for name, p in self.named_parameters():
            if name.endswith(("out.weight", "mlp.down.weight")):  # residual branches start small (GPT-2)
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.dec_layers))
        self.prior = RowPrior(config.latent_channels, config.rows_per_bar) if config.prior == "joint" else None

    def encode(self, ids: Tensor, slots: Tensor) -> Posterior:
        """ids, slots (B, T) -> the posterior of z, (B, S, C); without a bottleneck S is 0."""
        if self.encoder is None:
            empty = torch.zeros(len(ids), 0, self.config.latent_channels, device=ids.device)
            return Posterior(empty, empty, empty.any(-1))
        is_pad = ids == PAD
        return self.bottleneck(self.encoder(ids, slots, is_pad), slots, is_pad)

    def reparameterize(self, posterior: Posterior, generator: torch.Generator | None = None) -> Tensor:
        """One sample of the posterior (Kingma 2013); a plain autoencoder has none and takes the mean."""
        if not self.config.variational:
            return posterior.mu
        rank, world = self.share if self.training else (0, 1)
        noise = posterior.mu.new_empty(world, *posterior.mu.shape).normal_(generator=generator)[rank]
        return posterior.mu + noise * (0.5 * posterior.logvar).exp()

    def decode(self, ids: Tensor, slots: Tensor, z: Tensor, is_live: Tensor) -> Tensor:
        """Teacher forcing: ids, slots (B, T) -> logits (B, T, V) of the tokens that follow."""
        z, memory, may_attend = self.tell(z, is_live)
        rows = self.rows_at(z, slots) if self.decoder.add_rows else None
        added = [project(rows) for project in self.decoder.add_rows]
        return self.decoder(ids, slots, added, memory, may_attend)

    def forward(self, ids: Tensor, slots: Tensor, enc_ids: Tensor | None = None,
                dec_ids: Tensor | None = None) -> Output:
        """ids, slots (B, T); `enc_ids`, `dec_ids` are the same with token dropout, where it is on."""
        enc_ids, dec_ids = ids if enc_ids is None else enc_ids, ids if dec_ids is None else dec_ids
        posterior = self.encode(enc_ids, slots)                                                  # (B, S, C)
        z = self.reparameterize(posterior)                                                       # (B, S, C)
        logits = self.decode(dec_ids[:, :-1], slots[:, :-1], z, posterior.is_live)               # (B, T - 1, V)
        nats = [] if self.prior is None else map(self.prior.window_nats, (z, z.detach()))
        return Output(logits, posterior, z, *nats)

    def sample_prior(self, n: int, n_rows: int, generator: torch.Generator) -> Tensor:
        """n latents (n, S, C) from the prior that the model was trained with."""
        if self.prior is not None:
            return self.prior.sample_windows(n, n_rows, generator)
        device = next(self.parameters()).device
        return torch.randn(n, n_rows, self.config.latent_channels, generator=generator, device=device)

    def tell(self, z: Tensor, is_live: Tensor) -> tuple[Tensor, list, Tensor | None]:
        """z (B, S, C) as the decoder reads it: the rows, and each layer's keys and values for cross attention with what
        may be looked at of them."""
        # No noise from beyond a window's end, or its last token would hear it.
        z = z.masked_fill(~is_live[..., None], 0.0).to(self.decoder.head.weight.dtype)
        blocks = self.decoder.blocks
        if blocks[0].cross is None:
            return z, [None] * len(blocks), None
        memory, is_there = self.bottleneck.memory(z, is_live)
        memory = memory + sinusoid(memory.shape[1], memory.shape[2], memory)
        return z, [block.cross.keys_values(memory) for block in blocks], is_there[:, None, None, :]

    def begin(self, z: Tensor, is_live: Tensor, size: int) -> Cache:
        """Ready to write at most `size` tokens from each z (B, S, C): it is projected for the decoder once."""
        z, memory, may_attend = self.tell(z, is_live)
        told = [project(with_next(z)) for project in self.decoder.add_rows]
        may_attend = None if may_attend is None or may_attend.all() else may_attend  # no mask is faster
        return Cache(self.decoder.blocks, len(z), size, memory, may_attend, torch.cat(told, -1) if told else None)

    def proceed(self, ids: Tensor, slots: Tensor, cache: Cache) -> Tensor:
        """Logits (B, V) after ids (B, T), which continue what was read before: all at once at the beginning, then one
        by one."""
        added = None
        if cache.told is not None:
            rows = take_rows(cache.told, self.bottleneck.row_of(slots, cache.length))
            added = rows.flatten(0, 1).split(self.config.d_model, dim=-1)
        x = cache.read(self.decoder.embedding(ids, slots), added)[:, -1]
        return self.decoder.head(self.decoder.norm(x))

    def rows_at(self, z: Tensor, slots: Tensor) -> Tensor:
        """Each token's own row of z and the next, zeros after the last: (B, T, 2C)."""
        return take_rows(with_next(z), self.bottleneck.row_of(slots))

    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())


def with_next(z: Tensor) -> Tensor:
    """Each row of z (B, S, C) and the one after it, zeros where there is none: (B, S + 1, 2C)."""
    z = F.pad(z, (0, 0, 0, 2))
    return torch.cat([z[:, :-1], z[:, 1:]], dim=-1)


def take_rows(rows: Tensor, at: Tensor) -> Tensor:
    """rows (B, S, C), at (B, T) -> (B, T, C); the last of them for all beyond."""
    return rows.gather(1, at.clamp(max=rows.shape[1] - 1)[..., None].expand(-1, -1, rows.shape[2]))


def init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02 if isinstance(module, nn.Embedding) else module.weight.shape[1] ** -0.5)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def sinusoid(length: int, d_model: int, like: Tensor) -> Tensor:
    """Sines and cosines of positions 0 … length - 1 (Vaswani 2017), (length, D)."""
    angle = angles(length, d_model, like.device)
    return torch.cat([angle.sin(), angle.cos()], dim=-1).to(like.dtype)
