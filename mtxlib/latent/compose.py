"""Long pieces: the posteriors of whole pieces as lines of rows, which the learned prior is fitted to and goes on from,
and the composing of pieces from such lines, window by window.
"""

from __future__ import annotations  # symusic.Score is no class: `Score | None` cannot be evaluated

import numpy as np
import torch
from symusic import Score
from torch import Tensor

from mtxlib.config import BOS
from mtxlib.data.tokens import Codec, cut_pieces, in_all_keys
from mtxlib.model.prior import Line
from mtxlib.model.vae import MusicVAE
from mtxlib.music.corpus import Piece
from mtxlib.music.metrics import closes, stopping
from mtxlib.music.score import KEY_NAMES, bar_starts, chain, cut, end_of, key_of

ENDINGS = 8  # last bars that are tried for a cadence
OVERLAP = 1  # bars of the window before that a window of a long piece begins with
MOST_BARS = 20_000  # of a split, that a prior or directions are learned from: js-fakes and Bach have some 7,000


def compose(run, n: int, bars: int, seed: int, temperature: float, prompt: Score | None, key: str | None,
            cadence: bool) -> list[Score]:
    """n pieces of `bars` bars from a run's learned prior, see `Run.compose`. `prompt`: music in normal form.

    Raises ValueError for a key that is none, or a prompt that leaves no bar to write.
    """
    if key not in (None, *KEY_NAMES[:-1]):
        raise ValueError(f"key: expected one of {', '.join(KEY_NAMES[:-1])}, got {key!r}")
    done = len(bar_starts(prompt, end_of(prompt))) - 1 if prompt else 0
    if done >= bars:
        raise ValueError(f"bars: expected more than the {done} bars of the prompt, got {bars}")
    per_bar, total, endings = run.prior.rows_per_bar, max(bars, run.n_bars), ENDINGS if cadence else 1
    wanted = key or (prompt and key_of(prompt))
    z = run.prior.sample(n, bars * per_bar, temperature, seed, prompt and line(run, prompt),
                         None if wanted is None else KEY_NAMES.index(wanted), cadence, endings)
    z = torch.nn.functional.pad(z, (0, 0, 0, (total - bars) * per_bar))
    pieces, spans = [[prompt] * (done > 0) for _ in range(n)], [(0, done)] * (done > 0)
    while done < bars:
        bar = min(max(0, done - OVERLAP), total - run.n_bars)
        is_last = bar + run.n_bars >= bars
        begin = [context(run, piece[-1], spans[-1][1], done - bar) if done else [BOS] for piece in pieces]
        if is_last:
            pieces, begin = ([x for x in xs for _ in range(endings)] for xs in (pieces, begin))
        rows = z[::1 if is_last else endings, bar * per_bar:(bar + run.n_bars) * per_bar]
        pieces = [[*piece, new] for piece, new in zip(pieces, run.decode(rows, begin=begin), strict=True)]
        spans.append((done - bar, min(run.n_bars, bars - bar)))
        done = bar + run.n_bars
    scores = [chain(piece, spans) for piece in pieces]
    last = stopping(scores)
    return [next((score for score in scores[i:i + endings] if closes(score, last)), scores[i])
            for i in range(0, len(scores), endings)]


def context(run, window: Score, last: int, n: int) -> list[int]:
    """Ids of the n bars of a window before its bar `last`, BOS first, for a decoder that goes on from there. Where they
    would leave less room than a window needs on average, only the first of these bars, or none."""
    lines = bar_starts(window, end_of(window))
    last = min(last, len(lines) - 1)
    first = max(0, last - n)
    for end in range(last, first, -1):
        part = cut(window, lines[:end + 1], first, end - first)
        ids = run.codec.encode([part])[0][:-1].tolist() if part.note_num() else [BOS]
        if len(ids) <= run.max_tokens - run.mean_tokens:
            return ids
    return [BOS]


@torch.no_grad()
def line(run, music: Score) -> Tensor:
    """Posterior means (T, C) of a whole piece, `rows_per_bar` rows a bar; a prior goes on from it."""
    score, bars, windows = run.windows(music)
    found = [(bar, mu, mu) for bar, mu in zip(bars, run.encode_windows(windows), strict=True)]
    return lay(found, run.n_bars)[0][:(len(bar_starts(score, end_of(score))) - 1) * run.config.model.rows_per_bar]


def sampled(pieces: list[Piece], seed: int = 0) -> list[Piece]:
    """The pieces or, where they have more than MOST_BARS bars together, some drawn at random, in their order; says how
    many are left out."""
    order = np.random.default_rng(seed).permutation(len(pieces))
    until = np.cumsum([pieces[i].bars for i in order]) <= MOST_BARS
    until[:1] = True
    if not until.all():
        print(f"{(~until).sum():,} of {len(pieces):,} pieces left out, at random: {MOST_BARS:,} bars are enough")
    return [pieces[i] for i in sorted(order[until])]


@torch.no_grad()
def lines_of(model: MusicVAE, codec: Codec, pieces: list[Piece], most: int = 0, seed: int = 0,
             batch_size: int = 256) -> list[Line]:
    """Posteriors of whole pieces, from windows laid end to end: a line each or, with `most`, one for each piece and
    key; where these are more than `most`, so many of them are drawn at random."""
    keyed = [(c.piece, shift, c.bar, ids) for c in cut_pieces(codec.tokenizer, pieces, codec.n_bars, codec.n_bars)
             for shift, ids in (in_all_keys(codec, c.ids) if most else [(0, c.ids)])]
    if most:
        there = sorted({(piece, shift) for piece, shift, *_ in keyed})
        chosen = {there[i] for i in np.random.default_rng(seed).permutation(len(there))[:most]}
        keyed = [window for window in keyed if window[:2] in chosen]
    windows = codec.pack(codec.finish([ids for *_, ids in keyed]), [(0, bar, 0, 0) for _, _, bar, _ in keyed])
    order = np.argsort(windows.lengths, kind="stable")
    lines: dict = {}
    for part in (order[i:i + batch_size] for i in range(0, len(order), batch_size)):
        posterior = model.encode(*windows.batch(part).to(next(model.parameters()).device))
        for number, mu, logvar in zip(part, posterior.mu.float().cpu(), posterior.logvar.float().cpu(), strict=True):
            piece, shift, bar, _ = keyed[number]
            lines.setdefault((piece, shift), []).append((bar, mu, logvar))
    scores = [Score(piece.path) for piece in pieces]
    last = stopping(scores)
    closing = [int(closes(score, last)) for score in scores]
    return [Line(*lay(sorted(found, key=lambda window: window[0]), codec.n_bars), transposed(pieces[i].key, shift),
                 closing[i]) for (i, shift), found in sorted(lines.items())]


def transposed(key: str, semitones: int) -> int:
    """The number in KEY_NAMES of a key that many semitones higher."""
    number = KEY_NAMES.index(key)
    return number // 12 * 12 + (number + semitones) % 12 if key else number


def lay(found: list[tuple[int, Tensor, Tensor]], n_bars: int) -> tuple[Tensor, Tensor]:
    """Windows (first bar, mu, logvar) of one piece as one line, mu and logvar (T, C); the last may lie over bars of the
    one before, and where one is missing, for want of notes, the rows are those of N(0, I)."""
    given, parts = 0, []
    for bar, mu, logvar in found:
        per_bar = len(mu) // n_bars
        gap = torch.zeros(max(0, bar - given) * per_bar, mu.shape[1])
        parts += [(gap, gap), (mu[max(0, given - bar) * per_bar:], logvar[max(0, given - bar) * per_bar:])]
        given = bar + n_bars
    mu, logvar = (torch.cat(x) for x in zip(*parts, strict=True))
    return mu, logvar
