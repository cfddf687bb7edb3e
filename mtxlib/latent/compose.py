"""Long pieces: the posteriors of whole pieces as lines of rows, which the learned prior is fitted to and goes on from.
"""

import numpy as np
import torch
from symusic import Score
from torch import Tensor

from mtxlib.data.store import Windows
from mtxlib.data.tokens import Codec, cut_pieces, in_all_keys
from mtxlib.model.prior import Line
from mtxlib.model.vae import MusicVAE
from mtxlib.music.corpus import Piece
from mtxlib.music.metrics import closes, stopping
from mtxlib.music.score import KEY_NAMES


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
