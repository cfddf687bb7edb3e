"""The token store on disk, batches from it, and token dropout. No music library is needed here.

A store is a folder of flat arrays, memory-mapped: every window is one run of ids, `BOS … EOS`, and every token has a
*slot*: the sixteenth of the window, counted 16 to the bar, at which it stands. The slot is what tells the model which
latent row a token belongs to. `SlotTable` derives slots from ids alone, one token at a time, so that generation keeps
time without knowing the tokenizer.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mtxlib.config import EOS, MASK, N_SPECIAL, PAD, SLOTS_PER_BAR, SPLITS
from mtxlib.files import writing

ARRAYS = ("ids", "slots", "offsets", "windows")  # the files of a store
VERSION = 5  # of what a store holds; raise it when that changes
# Whence a window comes: the number of its piece, its first bar, semitones of transposition, the number of its split.
WINDOW = np.dtype([("piece", np.int32), ("bar", np.int32), ("shift", np.int8), ("split", np.int8)])


class SlotTable:
    """What each id does to the clock, (V, 4) integers: bars, position, unit, length.

    bars: bars opened. position: the position in the bar it sets. unit: 48ths of a quarter that a position counts from
    here on. length: 48ths that a bar lasts from here on. The last three are -1 where nothing changes.
    """

    def __init__(self, rows: np.ndarray | list, n_bars: int):
        self.rows, self.n_slots = np.asarray(rows, dtype=np.int64), n_bars * SLOTS_PER_BAR

    def start(self, batch: int) -> np.ndarray:
        """The clock before the first token: (B, 4) bar, position, unit, length."""
        return np.array([[0, 0, 12, 192]]).repeat(batch, 0)

    def advance(self, clock: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read one id a sequence: clock (B, 4) and ids (B,) -> the next clock and the ids' slots (B,)."""
        rows, bar = self.rows[ids], clock[:, 0]
        clock = np.where(rows < 0, clock, rows)
        clock[:, 0] += bar
        in_bar = np.minimum(clock[:, 1] * clock[:, 2] // 12, SLOTS_PER_BAR - 1)
        slots = np.maximum(clock[:, 0] - 1, 0) * SLOTS_PER_BAR + in_bar
        return clock, np.minimum(slots, self.n_slots - 1)

    def slots(self, ids: Tensor) -> Tensor:
        """Slots of whole sequences, (B, T) -> (B, T)."""
        clock, columns = self.start(len(ids)), []
        for column in ids.numpy().T:
            clock, slots = self.advance(clock, column)
            columns.append(slots)
        return torch.from_numpy(np.stack(columns, 1))


@dataclass
class Begun:
    """The notes that B sequences have begun at the place in time where they are."""

    at: np.ndarray  # (B, programs, pitches + 1), the last column always False
    program: np.ndarray  # (B,) that each has named last

    def keep(self, rows: np.ndarray) -> None:
        self.at, self.program = self.at[rows], self.program[rows]


class Grammar:
    """Which ids may come next, so that sampling writes whole notes, forward in time, on the grid, within the
    window's bars, and none twice at one place.

    ends: (V, 4) integers: the kinds of an id's first and last base token, the position it sets before any other timing,
    -1 for none, and the clock's unit in which a position that it sets would miss the grid, 0 for none. follows: (K, K),
    True where a kind may come after another. fresh: kinds after which any position of the bar is still ahead. table:
    the clock's. notes: for each id the chords it writes, a list of (program, pitch) each, from 0, the program -1 for
    the one named before; the first chord where it stood, each other one where it has moved to. named: the program
    each id names last, -1 for none. sizes: how many programs and pitches.
    """

    def __init__(self, ends: np.ndarray | list, follows: np.ndarray, fresh: list[int], table: SlotTable,
                 notes: list[list[list[tuple[int, int]]]], named: list[int], sizes: tuple[int, int]):
        first, self.last, self.position, self.misses = np.asarray(ends).T
        self.after, self.is_fresh = follows[:, first], np.isin(self.last, fresh)
        self.is_still = self.position < 0
        self.most_bars = table.n_slots // SLOTS_PER_BAR - table.rows[:, 0]
        self.named, self.sizes, (n_programs, n_pitches) = np.asarray(named), sizes, sizes
        self.moves = np.array([len(chords) > 1 for chords in notes])
        width = max(len(chord) for chords in notes for chord in chords) or 1
        # Places in `Begun.at`, flat: of the first and the last chord; what is not there is the column that stays False.
        self.opens, self.leaves = np.full((2, len(notes), width), n_pitches)
        self.pending = np.full(len(notes), n_pitches)  # the pitch whose program was named before
        self.clashes = np.zeros((n_programs, len(notes)), bool)  # ids that double a note if that program was named
        for i, chords in enumerate(notes):
            for places, chord in ((self.opens, chords[0]), (self.leaves, chords[-1])):
                known = [program * (n_pitches + 1) + pitch for program, pitch in chord if program >= 0]
                places[i, :len(known)] = known
            for program, pitch in chords[0]:
                if program < 0:
                    self.pending[i] = pitch
            for program in range(n_programs if max(map(len, chords)) > 1 else 0):
                told = [[(program if p < 0 else p, pitch) for p, pitch in chord] for chord in chords]
                self.clashes[program, i] = any(len(set(chord)) < len(chord) for chord in told)

    def start(self, batch: int) -> Begun:
        return Begun(np.zeros((batch, self.sizes[0], self.sizes[1] + 1), bool), np.zeros(batch, int))

    def read(self, begun: Begun, ids: np.ndarray) -> None:
        """Take note of one id (B,) a sequence."""
        rows = np.arange(len(ids))
        begun.at[rows, begun.program, self.pending[ids]] = True
        begun.at[self.moves[ids]] = False
        begun.at.reshape(len(ids), -1)[rows[:, None], self.leaves[ids]] = True
        begun.at[..., -1] = False
        named = self.named[ids]
        begun.program = np.where(named < 0, begun.program, named)

    def allows(self, previous: np.ndarray, clock: np.ndarray, begun: Begun) -> np.ndarray:
        """Ids that may follow `previous` (B,) when the clock (B, 4) and `begun` have read it: (B, V), one of them at
        least."""
        bar, position, unit, length = clock.T[..., None]
        position = np.where(self.is_fresh[previous, None], -1, position)
        allowed = self.after[self.last[previous]] & (self.is_still | (self.position > position))
        allowed &= (self.position * unit < length) & (bar <= self.most_bars) & (self.misses != unit)
        allowed &= ~(self.clashes[begun.program] | begun.at[np.arange(len(clock)), begun.program][:, self.pending])
        allowed &= ~begun.at.reshape(len(clock), -1)[:, self.opens.T].any(1)
        allowed[:, EOS] |= ~allowed.any(1)
        return allowed


class Batch(NamedTuple):
    """Windows padded to the longest, (B, T) each."""

    ids: Tensor  # BOS … EOS, then PAD
    slots: Tensor  # the sixteenth each token stands at

    def to(self, device) -> "Batch":
        return Batch(*(x.to(device, non_blocking=True) for x in self))


class Windows:
    """Tokenized windows: flat ids and slots, where each window begins, and whence it comes (`WINDOW` records)."""

    def __init__(self, ids: np.ndarray, slots: np.ndarray, offsets: np.ndarray, windows: np.ndarray):
        self.ids, self.slots, self.offsets, self.windows = ids, slots, offsets, windows

    @classmethod
    def pack(cls, sequences: list[np.ndarray], slots: list[np.ndarray], windows: list[tuple] | np.ndarray) -> "Windows":
        """From one array a window; they stay in memory."""
        none = np.zeros(0, int)
        return cls(np.concatenate([none, *sequences]), np.concatenate([none, *slots]),
                   np.cumsum([0] + [len(s) for s in sequences]), np.array(windows, dtype=WINDOW))

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def select(self, split: str, shift: int | None = None) -> np.ndarray:
        """Indices of the windows of a split; with `shift`, only those transposed by so many semitones."""
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        chosen = self.windows["split"] == SPLITS.index(split)
        if shift is not None:
            chosen &= self.windows["shift"] == shift
        return np.flatnonzero(chosen)

    def batch(self, indices) -> Batch:
        return Batch(*(pad_sequences([array[self.offsets[i]:self.offsets[i + 1]] for i in indices])
                       for array in (self.ids, self.slots)))


class TokenStore(Windows):
    """A store on disk, memory-mapped. Raises FileNotFoundError, with what to do, when there is none, ValueError when it
    is not whole or of another version."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / "meta.json").exists():
            raise FileNotFoundError(f"no token store in {self.folder}: run notebooks/02_tokenization_and_dropout "
                                    "first, or mtxlib.data.tokens.build_store")
        meta = json.loads((self.folder / "meta.json").read_text())
        if meta.get("version") != VERSION:
            raise ValueError(f"{self.folder}: expected a token store of version {VERSION}, got {meta.get('version')}: "
                             "an earlier mtxlib wrote it; run notebooks/02_tokenization_and_dropout again")
        self.vocab_size, self.n_bars, self.pieces = meta["vocab_size"], meta["n_bars"], meta["pieces"]
        self.table = SlotTable(meta["slot_table"], self.n_bars)
        self.is_structure = torch.tensor(meta["is_structure"])
        super().__init__(*(self.load(self.folder / f"{name}.npy") for name in ARRAYS))

    def load(self, path: Path) -> np.ndarray:
        try:
            return np.load(path, mmap_mode="r")
        except (OSError, ValueError) as e:
            raise ValueError(f"{path}: expected an array of a token store, got something else ({e}): delete "
                             f"{self.folder} and build the store again") from e


def pad_sequences(sequences: list[np.ndarray]) -> Tensor:
    """Sequences of any length -> (B, T), filled up with PAD, T - 1 being the next multiple of 8: a window is read
    from all but its last token, and a GPU's matrix units like no odd sizes. One of 16 would be a tenth of padding."""
    longest = max(map(len, sequences))
    out = np.full((len(sequences), 1 + -(-(longest - 1) // 8) * 8), PAD, dtype=np.int64)
    for row, sequence in zip(out, sequences, strict=True):
        row[:len(sequence)] = sequence
    return torch.from_numpy(out)


def id_type(vocab_size: int) -> type:
    return np.uint16 if vocab_size < 2**16 else np.uint32


def write_store(folder: str | Path, parts: Iterable[Windows], meta: dict, save: Callable[[Path], None]) -> TokenStore:
    """Write a store beside `folder`, part by part, then rename: it is there whole or not at all. `save` writes
    tokenizer.json."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    tmp = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    types = id_type(meta["vocab_size"]), np.uint16, np.int64, WINDOW
    try:
        with writing(folder), ExitStack() as stack:
            files = [stack.enter_context((tmp / f"{name}.npy").open("wb")) for name in ARRAYS]
            lengths = [0] * len(files)

            def add(number: int, array: np.ndarray) -> None:
                files[number].write(array.astype(types[number], copy=False).tobytes())
                lengths[number] += len(array)

            def write_headers() -> None:  # numpy leaves room in them for the length to grow
                for file, length, dtype in zip(files, lengths, types, strict=True):
                    file.seek(0)
                    np.lib.format.write_array_header_1_0(file, {
                        "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False,
                        "shape": (length,)})

            write_headers()
            add(2, np.zeros(1))
            for part in parts:
                n_tokens = lengths[0]
                for number, array in enumerate((part.ids, part.slots, part.offsets[1:] + n_tokens, part.windows)):
                    add(number, array)
            write_headers()
            save(tmp / "tokenizer.json")
            (tmp / "meta.json").write_text(json.dumps({"version": VERSION, **meta}))
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # another process has put the same store there meanwhile
            os.replace(tmp, folder)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return TokenStore(folder)


def epoch_batches(lengths: np.ndarray, indices: np.ndarray, batch_size: int, seed: int, epoch: int,
                  pool: int = 50) -> list[np.ndarray]:
    """One epoch of batches of equal size, windows of like length together; a pure function of (seed, epoch).

    Shuffle, sort by length within pools of `pool` batches, cut, shuffle the batches. The remainder of an epoch that
    does not fill a batch is left to the next epochs' shuffles.
    """
    if len(indices) < batch_size:
        indices = np.resize(indices, batch_size)
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(indices)[:len(indices) // batch_size * batch_size]
    pools = (order[i:i + pool * batch_size] for i in range(0, len(order), pool * batch_size))
    order = np.concatenate([p[np.argsort(lengths[p], kind="stable")] for p in pools])
    batches = np.split(order, len(order) // batch_size)
    return [batches[i] for i in rng.permutation(len(batches))]


@dataclass(frozen=True)
class TokenDropout:
    """Replace a share of tokens by MASK or by random tokens, so that the decoder cannot lean on what it was given.

    Whole tokens are replaced, not dimensions of their embeddings (Bowman 2016, "word dropout"). PAD, BOS and EOS stay,
    and with `spare` (V,) True for ids that must stay, bar and position tokens as well. Slots are left alone: the
    model always knows when, not what.
    """

    share: float
    vocab_size: int
    kind: str = "mask"
    spare: Tensor | None = None

    def __call__(self, ids: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """ids (B, T) -> a new tensor (B, T); no Python loop."""
        if not self.share:
            return ids
        hit = torch.rand(ids.shape, generator=generator, device=ids.device) < self.share
        hit &= ids >= N_SPECIAL
        if self.spare is not None:
            hit &= ~self.spare.to(ids.device)[ids]
        if self.kind == "mask":
            return ids.masked_fill(hit, MASK)
        return torch.where(hit, torch.randint(N_SPECIAL, self.vocab_size, ids.shape, generator=generator,
                                              device=ids.device), ids)
