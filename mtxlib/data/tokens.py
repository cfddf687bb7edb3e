"""MidiTok at work: scores -> windows of whole bars -> ids, and back; fills the token store.

A window holds the notes that *start* in its bars, with their full lengths, so that windows laid end to end are the
piece again, without loss. Tokenization (REMI, Huang & Yang 2020) happens once a piece, in the base vocabulary; the
other eleven keys are the same ids with the pitches moved. BPE comes last, and its merges never cross a beat: a token
never belongs to two latent rows.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from functools import lru_cache
from importlib.metadata import version
from itertools import islice, pairwise, takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import symusic
from miditok import REMI, TokenizerConfig, TokSequence
from symusic import Score, Track
from tqdm.auto import tqdm

from mtxlib.config import BOS, EOS, N_SPECIAL, SPLITS, Config, DataConfig
from mtxlib.data.store import (
    ARRAYS,
    VERSION,
    Grammar,
    SlotTable,
    TokenStore,
    Windows,
    id_type,
    pad_sequences,
    write_store,
)
from mtxlib.files import atomic, brief, digest
from mtxlib.music.corpus import Piece
from mtxlib.music.score import (
    BY_LENGTH,
    GRID,
    MAX_BEATS,
    METRES,
    TEMPI,
    TEMPO,
    TPQ,
    VOICES,
    WINDOW_END,
    bar_starts,
    window_bars,
)
from mtxlib.processes import apart, cores

PITCHES = (21, 109)  # the piano's range; the upper end is excluded
KEYS = range(-5, 7)  # semitones of transposition: each of the twelve keys once
SAMPLE = 5000  # windows that BPE learns from, at most
SHARD = 500  # bars a process tokenizes at once: with twelve keys and hop 1 up to 6,000 windows
SPACE = "\u2581"  # stands before every beat in the BPE model of MidiTok


def make_tokenizer(programs: Iterable[int] = (52, 53, 54, 42), grid: int = 4, velocities: int = 0,
                   tempos: int = 0) -> REMI:
    """A MidiTok tokenizer, one stream for all voices. programs: MIDI programs to tell apart, -1 for drums; grid,
    velocities and tempos as in `music.normal.normalise`."""
    extra = {"num_velocities": velocities} if velocities else {}
    if tempos:
        extra |= {"use_tempos": True, "num_tempos": tempos, "tempo_range": TEMPI, "log_tempos": True}
    return REMI(TokenizerConfig(
        pitch_range=PITCHES, beat_res={(0, MAX_BEATS): grid}, use_velocities=velocities > 0, use_programs=True,
        one_token_stream_for_programs=True, programs=sorted(programs), use_pitchdrum_tokens=-1 in programs,
        use_time_signatures=True, time_signature_range={unit: list(beats) for unit, beats in METRES.items()},
        special_tokens=["PAD", "BOS", "EOS", "MASK"], encode_ids_split="beat", **extra))


def load_tokenizer(path: str | Path) -> REMI:
    """The tokenizer that `tokenizer.save` wrote. Raises ValueError if it is not one."""
    try:
        name = json.loads(Path(path).read_text())["tokenization"]
        if name != "REMI":
            raise ValueError(f"tokenization: expected REMI, got {name!r}")
        return REMI(params=path)
    except Exception as e:  # MidiTok and tokenizers raise of every kind on a file of another shape
        raise ValueError(f"{path}: expected a tokenizer saved by MidiTok, got something else ({brief(e)})") from e


def base_ids(tokenizer: REMI, score: Score) -> np.ndarray:
    """Ids in the base vocabulary, without BPE and without BOS and EOS."""
    return np.array(tokenizer.encode(score, encode_ids=False).ids, dtype=np.int64)


def window_ids(tokenizer: REMI, score: Score, starts: list[int], bars: list[int],
               n_bars: int) -> Iterator[tuple[int, np.ndarray]]:
    """(first bar, base ids) of the windows at `bars` that hold a note."""
    # Every bar is written as `Bar TimeSig …`, whatever stands around it; a sequence ends with its last note or, if
    # later, its last change of metre or tempo.
    ids = base_ids(tokenizer, score)
    is_length, is_tempo = (np.isin(ids, [i for name, i in tokenizer.vocab.items() if name.startswith(kind)])
                           for kind in ("Duration", "Tempo"))
    lines = np.flatnonzero(ids == tokenizer.vocab["Bar_None"])
    bounds = np.append(lines, [len(ids)] * (n_bars + len(starts)))
    for bar in bars:
        begin, end = bounds[bar], bounds[bar + n_bars]
        notes = np.flatnonzero(is_length[begin:end])
        if len(notes):
            metres = lines[bar:bar + n_bars] + 1
            changes = metres[1:][np.diff(ids[metres]) != 0]
            last = max([begin + notes[-1], *changes[-1:], *(begin + np.flatnonzero(is_tempo[begin:end])[-1:])])
            window, before = ids[begin:last + 1], np.flatnonzero(is_tempo[:begin])[-1:]
            yield bar, with_tempo(tokenizer, window, ids[before[0]]) if len(before) else window


def with_tempo(tokenizer: REMI, window: np.ndarray, tempo: int) -> np.ndarray:
    """The base ids of a window that says at its first position what tempo is in force."""
    start, at = tokenizer.vocab["Position_0"], 2  # behind `Bar TimeSig`
    if len(window) == at or window[at] != start:
        return np.insert(window, at, [start, tempo])
    is_told = tokenizer[int(window[at + 1])].startswith("Tempo")
    return window if is_told else np.insert(window, at + 1, tempo)


class Codec:
    """A tokenizer with what this project adds: BPE of many sequences at once, expansion of ids, slots.

    `names` are the base tokens, `expansion[i]` the base ids that id i stands for.
    """

    def __init__(self, tokenizer: REMI, n_bars: int):
        self.tokenizer, self.n_bars = tokenizer, n_bars
        self.names = [name for name, _ in sorted(tokenizer.vocab.items(), key=lambda item: item[1])]
        self.kinds = np.array([name.split("_")[0] for name in self.names])
        self.bytes = np.array([tokenizer._vocab_base_id_to_byte[i] for i in range(len(self.names))])
        self.grid = tokenizer.config.max_num_pos_per_beat  # positions a beat
        self.beats = np.array([beat_of(name, self.grid) for name in self.names])
        self.opens = self.kinds != "Position"
        self.expansion = self._expansion()
        self.vocab_size = len(self.expansion)
        self.table = SlotTable([slot_row([self.names[i] for i in ids], self.grid) for ids in self.expansion], n_bars)
        self.grammar = self._grammar()
        timing = np.isin(self.kinds, TIMING)
        self.is_structure = np.array([bool(ids) and all(timing[i] for i in ids) for ids in self.expansion])

    def _expansion(self) -> list[list[int]]:
        if not self.tokenizer.is_trained:
            return [[i] for i in range(len(self.names))]
        base = {byte: i for i, byte in enumerate(self.bytes)}
        learned = sorted(self.tokenizer.vocab_model.items(), key=lambda item: item[1])
        return [[base[char] for char in text if char != SPACE] for text, _ in learned]

    def _grammar(self) -> Grammar:
        note = "Velocity" if self.tokenizer.config.use_velocities else "Duration"
        follows = FOLLOWS | {"Pitch": note, "PitchDrum": note}
        kinds = list(follows)
        kind_of = [kinds.index(kind) if kind in follows else kinds.index("PAD") for kind in self.kinds]
        ends = []
        for ids in self.expansion:
            found = takewhile(lambda name: not name.startswith("TimeSig"), (self.names[i] for i in ids))
            times = [name for name in found if beat_of(name, self.grid) >= 0]
            at = [int(name[9:]) if name.startswith("Position") else -1 for name in times] or [-1]
            first, last = (kind_of[ids[0]], kind_of[ids[-1]]) if ids else [kinds.index("PAD")] * 2
            is_odd = any(position > 0 and position % 2 for position in at)  # misses the grid if an eighth beats
            ends.append([first, last, at[0], is_odd * 24 // self.grid])
        may = np.array([[b in follows[a].split() for b in kinds] for a in kinds])
        programs, pitches = ({name: i for i, name in enumerate(n for n in self.names if n.startswith(kind))}
                             for kind in ("Program_", "Pitch"))
        written = [chords_of([self.names[i] for i in ids], programs, pitches) for ids in self.expansion]
        return Grammar(ends, may, [kinds.index("Bar"), kinds.index("TimeSig")], self.table, *zip(*written, strict=True),
                       (len(programs), len(pitches)))

    def cuts(self, ids: np.ndarray) -> list[int]:
        """Where a new beat or bar begins in base ids: BPE merges stay between two cuts."""
        beats = self.beats[ids]
        marks = np.flatnonzero(beats >= 0)
        beats = beats[marks]
        is_new = self.opens[ids[marks]]
        is_new[:1] = True
        is_new[1:] |= beats[1:] != beats[:-1]
        return sorted({0, *marks[is_new].tolist(), len(ids)})

    def words(self, ids: np.ndarray) -> list[str]:
        """Base ids as the text BPE works on, a word a beat."""
        text = self.bytes[ids].tobytes().decode("utf-32")
        return [text[a:b] for a, b in pairwise(self.cuts(ids))]

    def learn_bpe(self, sequences: Iterable[np.ndarray], vocab_size: int) -> "Codec":
        """A codec whose tokenizer has merged frequent neighbours until it has `vocab_size` ids."""
        if vocab_size <= self.vocab_size:
            raise ValueError(f"parameter 'bpe_vocab': expected more than the base vocabulary's {self.vocab_size}, "
                             f"got {vocab_size}")
        self.tokenizer.train(vocab_size=vocab_size, iterator=list(map(self.words, sequences)))
        return Codec(self.tokenizer, self.n_bars)

    def finish(self, sequences: list[np.ndarray]) -> list[np.ndarray]:
        """Base ids -> ids, `BOS … EOS`, BPE applied if it has been learned: each different word is coded once; a SPACE
        that stays alone stands for nothing and is left out."""
        if not self.tokenizer.is_trained:
            return [np.concatenate([[BOS], ids, [EOS]]) for ids in sequences]
        words = list(map(self.words, sequences))
        unique = sorted({w for ws in words for w in ws})
        codes = self.tokenizer._model.encode_batch([[w] for w in unique], is_pretokenized=True)
        code = {w: [i for i in c.ids if self.expansion[i]] for w, c in zip(unique, codes, strict=True)}
        return [np.array([BOS, *(i for w in ws for i in code[w]), EOS]) for ws in words]

    def encode(self, windows: list[Score]) -> list[np.ndarray]:
        """Windows -> ids, `BOS … EOS`."""
        return self.finish([base_ids(self.tokenizer, window) for window in windows])

    def expand(self, ids: Iterable[int]) -> list[int]:
        """Ids -> base ids up to EOS, without specials."""
        ids = list(ids)
        ids = ids[:ids.index(EOS)] if EOS in ids else ids
        return [base for i in ids if i >= N_SPECIAL for base in self.expansion[i]]

    def decode(self, ids: Iterable[int]) -> Score:
        """Ids -> the window they stand for, in normal form. MidiTok skips tokens that make no note."""
        base = self.expand(ids)
        score = self.tokenizer.decode(TokSequence(ids=base, tokens=[self.names[i] for i in base])).resample(TPQ)
        if not self.tokenizer.config.use_tempos:
            score.tempos = symusic.core.TempoTickList([symusic.Tempo(0, TEMPO)])
        for track in score.tracks:
            track.name = VOICES.get(track.program, track.name)
        lines = bar_starts(score, self.n_bars * max(BY_LENGTH) * GRID)[:self.n_bars + 1]
        score.markers.append(symusic.TextMeta(lines[-1], WINDOW_END))
        return score

    def pack(self, sequences: list[np.ndarray], windows: list[tuple]) -> Windows:
        """Ids of windows, and whence these come, in memory."""
        return Windows.pack(sequences, self.slots(sequences), windows)

    def slots(self, sequences: list[np.ndarray], chunk: int = 4096) -> list[np.ndarray]:
        """Slots of many sequences, those of like length together."""
        order, out = np.argsort([len(s) for s in sequences], kind="stable"), [np.empty(0)] * len(sequences)
        for part in (order[i:i + chunk] for i in range(0, len(order), chunk)):
            slots = self.table.slots(pad_sequences([sequences[i] for i in part])).numpy()
            for i, row in zip(part, slots, strict=True):
                out[i] = row[:len(sequences[i])]
        return out


TIMING = ("Bar", "Position", "TimeSig")
FOLLOWS = {  # what may come after each kind of base token
    "BOS": "Bar", "Bar": "TimeSig", "TimeSig": "Position Bar EOS", "Position": "Tempo Program",
    "Tempo": "Program Position Bar EOS", "Program": "Pitch PitchDrum", "Pitch": "Duration", "PitchDrum": "Duration",
    "Velocity": "Duration", "Duration": "Program Position Bar EOS",
    "EOS": "EOS", "PAD": "", "MASK": "",
}


def beat_of(name: str, grid: int) -> int:
    """The beat in the bar a base token moves to; -1 where it moves nothing."""
    kind, _, value = name.partition("_")
    return int(value) // grid if kind == "Position" else 0 if kind == "Bar" else -1


def slot_row(names: list[str], grid: int) -> list[int]:
    """What base tokens, one after the other, do to the clock of `grid` positions a beat: the row of `SlotTable`."""
    bars, position, unit, length = 0, -1, -1, -1
    for kind, _, value in (name.partition("_") for name in names):
        if kind == "Bar":
            bars, position = bars + 1, 0
        elif kind == "Position":
            position = int(value)
        elif kind == "TimeSig":
            beats, denominator = map(int, value.split("/"))
            unit, length = 192 // denominator // grid, beats * 192 // denominator
    return [bars, position, unit, length]


def chords_of(names: list[str], programs: dict[str, int], pitches: dict[str, int]) -> tuple[list[list], int]:
    """The notes that base tokens begin, as `Grammar` wants them, and the program that is named last."""
    chords, program = [[]], -1
    for name in names:
        if name.startswith(("Bar", "Position")):
            chords.append([])
        elif name in programs:
            program = programs[name]
        elif name in pitches:
            chords[-1].append((program, pitches[name]))
    return chords, program


class Cut(NamedTuple):
    """A window on its way into the store."""

    piece: int
    bar: int
    split: str
    ids: np.ndarray  # base ids


def cut_pieces(tokenizer: REMI, pieces: Iterable[Piece], n_bars: int, hop: int) -> Iterator[Cut]:
    """All windows: every `hop` bars of a training piece, every `n_bars` of the others, and one that ends the piece."""
    for number, piece in enumerate(pieces):
        score = Score(piece.path)
        starts = bar_starts(score)
        bars = window_bars(len(starts) - 1, n_bars, hop if piece.split == "train" else n_bars)
        for bar, ids in window_ids(tokenizer, score, starts, bars, n_bars):
            yield Cut(number, bar, piece.split, ids)


def in_all_keys(codec: Codec, ids: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(semitones, base ids) in each key that stays within the range of pitches; drums are not moved."""
    is_pitch = codec.kinds[ids] == "Pitch"
    pitches = ids[is_pitch] - codec.names.index(f"Pitch_{PITCHES[0]}")
    for shift in KEYS:
        if len(pitches) == 0 or (pitches.min() + shift >= 0 and pitches.max() + shift < PITCHES[1] - PITCHES[0]):
            yield shift, ids + shift * is_pitch


def store_folder(config: Config, pieces: list[Piece]) -> Path:
    """Where the store of these pieces under this configuration lies; any change of either gives another folder."""
    data = config.data
    what = [VERSION, version("miditok"), data.form, data.bpe_vocab, data.n_bars, data.hop, data.transpose,
            config.model.max_tokens,
            [(p.name, p.source, p.split, digest(p.path)) for p in pieces]]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:8]
    return Path(data.data_dir) / "stores" / f"{data.source}-REMI{data.bpe_vocab or ''}-{key}"


def build_store(config: Config, pieces: list[Piece], workers: int | None = None) -> TokenStore:
    """Tokenize the pieces into a store, or open it if it is there. BPE learns from the training split only.

    `workers` processes (one a core by default) write shards of SHARD bars, which are then laid end to end: memory does
    not grow with the corpus, and a call that was stopped goes on with the shards that are missing. Raises ValueError
    when a split that training needs has no piece.
    """
    folder, data, workers = store_folder(config, pieces), config.data, workers or cores()
    if (folder / "meta.json").exists():
        return TokenStore(folder)
    for split in ("train", "valid"):
        if not any(p.split == split for p in pieces):
            raise ValueError(f"no window in the {split} split of {data.source!r}: expected at least 3 pieces with "
                             f"different tunes, got {len(pieces)}")
    parts = folder.with_name(f".{folder.name}.parts")
    parts.mkdir(parents=True, exist_ok=True)
    try:
        tokenizer = parts / "tokenizer.json"
        if not tokenizer.exists():
            codec = Codec(make_tokenizer(programs_of(pieces), data.grid, data.velocities, data.tempos), data.n_bars)
            atomic(tokenizer, (codec.learn_bpe(sample(codec, pieces, data), data.bpe_vocab) if data.bpe_vocab
                               else codec).tokenizer.save)
        shards = [(str(parts / f"{i:06}.npz"), str(tokenizer), part, data.n_bars, data.hop, data.transpose,
                   config.model.max_tokens) for i, part in enumerate(shards_of(pieces))]
        missing = [shard for shard in shards if not Path(shard[0]).exists()]
        with tqdm(total=len(pieces), desc="tokenizing", unit=" pieces") as bar:
            bar.update(len(pieces) - sum(len(shard[2]) for shard in missing))
            done = (apart("mtxlib.data.tokens:write_shard", missing, workers) if workers > 1 and len(missing) > 1
                    else ((write_shard(*shard), "") for shard in missing))
            for (n, why), shard in zip(done, missing, strict=True):
                if why:
                    raise RuntimeError(f"{shard[2][0][1]} to {shard[2][-1][1]} could not be tokenized: {why}")
                bar.update(n)
        codec = Codec(load_tokenizer(tokenizer), data.n_bars)
        meta = {"vocab_size": codec.vocab_size, "n_bars": data.n_bars, "slot_table": codec.table.rows.tolist(),
                "is_structure": codec.is_structure.tolist(),
                "pieces": [{"name": p.name, "source": p.source, "key": p.key} for p in pieces]}
        store = write_store(folder, (read_shard(shard[0]) for shard in shards), meta, save=codec.tokenizer.save)
        n_long = sum(int(np.load(shard[0])["n_long"]) for shard in shards)
        if n_long:
            print(f"{n_long} of {len(store) + n_long} windows left out: longer than max_tokens = "
                  f"{config.model.max_tokens}")
    except OSError:
        if not (folder / "meta.json").exists():  # if it is, another process was faster and has cleaned up
            raise
    shutil.rmtree(parts, ignore_errors=True)
    return TokenStore(folder)


def sample(codec: Codec, pieces: list[Piece], data: DataConfig) -> list[np.ndarray]:
    """What BPE learns from: base ids, in all keys, of windows that lie end to end, of the training pieces in a random
    order until there are SAMPLE of them."""
    training = [p for p in pieces if p.split == "train"]
    order = np.random.default_rng(0).permutation(len(training))
    cuts = islice((c for c in cut_pieces(codec.tokenizer, (training[i] for i in order), data.n_bars, data.hop)
                   if c.bar % data.n_bars == 0), SAMPLE)
    return [ids for c in cuts for _, ids in (in_all_keys(codec, c.ids) if data.transpose else [(0, c.ids)])]


def shards_of(pieces: list[Piece]) -> Iterator[list[tuple[int, str, str]]]:
    """(number, path, split) of the pieces, in lists of SHARD bars or a little more."""
    part, bars = [], 0
    for number, piece in enumerate(pieces):
        part.append((number, str(piece.path), piece.split))
        bars += piece.bars
        if bars >= SHARD or number == len(pieces) - 1:
            yield part
            part, bars = [], 0


@lru_cache(maxsize=1)
def codec_of(tokenizer: str, n_bars: int) -> Codec:
    return Codec(load_tokenizer(tokenizer), n_bars)


def write_shard(path: str, tokenizer: str, pieces: list[tuple[int, str, str]], n_bars: int, hop: int, transpose: bool,
                max_tokens: int) -> int:
    """The windows of some pieces, (number, path, split) each, in all keys if they are for training; how many pieces."""
    codec = codec_of(tokenizer, n_bars)
    few = [SimpleNamespace(path=path, split=split) for _, path, split in pieces]
    keyed = [((pieces[c.piece][0], c.bar, shift, SPLITS.index(c.split)), ids)
             for c in cut_pieces(codec.tokenizer, few, n_bars, hop) for shift, ids in
             (in_all_keys(codec, c.ids) if transpose and c.split == "train" else [(0, c.ids)])]
    sequences = codec.finish([ids for _, ids in keyed])
    fits = [(s, window) for s, (window, _) in zip(sequences, keyed, strict=True) if len(s) <= max_tokens]
    packed = codec.pack([s for s, _ in fits], [window for _, window in fits])
    arrays = {"ids": packed.ids.astype(id_type(codec.vocab_size)), "slots": packed.slots.astype(np.uint16),
              "offsets": packed.offsets, "windows": packed.windows, "n_long": len(keyed) - len(fits)}
    atomic(path, lambda p: np.savez(p, **arrays))
    return len(pieces)


def read_shard(path: str) -> Windows:
    with np.load(path) as arrays:
        return Windows(*(arrays[name] for name in ARRAYS))


def tokenize(codec: Codec, pieces: list[Piece]) -> Windows:
    """The windows of pieces, `n_bars` apart, in memory, with a tokenizer that is already there; for measuring."""
    cuts = list(cut_pieces(codec.tokenizer, pieces, codec.n_bars, codec.n_bars))
    return codec.pack(codec.finish([c.ids for c in cuts]), [(c.piece, c.bar, 0, SPLITS.index(c.split)) for c in cuts])


def programs_of(pieces: list[Piece]) -> set[int]:
    """Programs of the pieces of every split, -1 for drums: the voices the tokenizer can tell apart."""
    return {program_of(track) for piece in pieces for track in Score(piece.path).tracks}


def program_of(track: Track) -> int:
    return -1 if track.is_drum else track.program


def in_programs(score: Score, known: set[int]) -> tuple[Score, list[str]]:
    """The score in `known` programs, and what had to change, in words. A track of another program goes to its nearest
    relative, of its family of 8 and then by number, and to one that no other track has while there is any; drums
    without drums, or where only drums are known, are left out."""
    alien = [i for i, t in enumerate(score.tracks) if len(t.notes) and program_of(t) not in known]
    free, said, out = known - {-1, *map(program_of, score.tracks)}, [], score.copy()
    for i in alien:
        track, program = out.tracks[i], program_of(out.tracks[i])
        what, fits = f"program {program}" if program >= 0 else "drums", free or known - {-1}
        if program < 0 or not fits:
            said.append(f"{what} left out ({len(track.notes)} notes)")
            track.notes = type(track.notes)()
            continue
        track.program = min(fits, key=lambda other, own=program: (other // 8 != own // 8, abs(other - own), other))
        said.append(f"{what} becomes {track.program}" + " beside a track that has it" * (not free))
        free = free - {track.program}
    return out, said
