"""No note is lost between scores and ids, on every piece; other keys and BPE are what MidiTok makes of them itself."""

import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from symusic import Note, Score, TimeSignature, Track

from mtxlib.config import BOS, EOS, MASK, PAD
from mtxlib.data import tokens
from mtxlib.data.store import SPLITS, TokenStore
from mtxlib.data.tokens import (
    KEYS,
    Codec,
    base_ids,
    build_store,
    in_all_keys,
    in_programs,
    load_tokenizer,
    make_tokenizer,
    programs_of,
    sample,
    store_folder,
    tokenize,
)
from mtxlib.music.corpus import load_corpus
from mtxlib.music.score import bar_starts, chain, cut, join, note_counts, window_bars

ROOT = Path(__file__).parents[2]
JSFAKES = ROOT / "../shared/data/jsfakes.zip"


def notes(score):
    return Counter((-1 if t.is_drum else t.program, n.start, n.duration, n.pitch)
                   for t in score.tracks for n in t.notes)


def metres(score):
    return [(t.time, t.numerator, t.denominator) for t in score.time_signatures]


def windows_of(score, n_bars=4, hop=4):
    starts = bar_starts(score)
    bars = window_bars(len(starts) - 1, n_bars, hop)
    return starts, bars, [cut(score, starts, bar, n_bars) for bar in bars]


def learned(codec, pieces, more=80):
    """A codec with BPE of the training pieces."""
    windows = [w for p in pieces if p.split == "train" for w in windows_of(Score(p.path))[2] if w.note_num()]
    return Codec(make_tokenizer(), 4).learn_bpe(
        [base_ids(codec.tokenizer, w) for w in windows], codec.vocab_size + more)


@pytest.fixture(scope="module")
def codec():
    return Codec(make_tokenizer(), 4)


# -- windows --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n_total, n_bars, hop, expected", [
    (8, 4, 4, [0, 4]), (9, 4, 4, [0, 4, 5]), (9, 4, 2, [0, 2, 4, 5]), (4, 4, 1, [0]), (3, 4, 1, [0]),
    (6, 4, 1, [0, 1, 2]), (7, 2, 5, [0, 5]), (1, 1, 1, [0])])
def test_windows_are_full_and_reach_the_end(n_total, n_bars, hop, expected):
    assert window_bars(n_total, n_bars, hop) == expected


def test_bar_lines_follow_the_metres(pieces):
    mixed = next(p for p in pieces if p.metre == "4/4,3/4,6/8")
    assert bar_starts(Score(mixed.path)) == [0, 1920, 3840, 5760, *range(7200, 7200 + 6 * 1440 + 1, 1440)]
    score = Score(480)
    score.tracks.append(Track("", 0, False))
    score.tracks[0].notes.append(Note(0, 1921, 60, 80))
    assert bar_starts(score) == [0, 1920, 3840], "4/4 where none is given"
    for piece in pieces:
        score = Score(piece.path)
        assert len(bar_starts(score)) - 1 == piece.bars and bar_starts(score)[-1] >= score.end()


def test_a_window_holds_the_notes_that_start_in_it_with_their_full_lengths():
    score = Score(480)
    score.time_signatures.extend([TimeSignature(0, 3, 4), TimeSignature(2880, 6, 8)])
    score.tracks.append(Track("", 52, False))
    score.tracks[0].notes.extend([Note(t, d, 60 + i, 80) for i, (t, d) in
                                  enumerate([(0, 1500), (1439, 1), (1440, 9000), (2880, 240), (4320, 240)])])
    window = cut(score, bar_starts(score), 1, 2)
    assert notes(window) == {(52, 0, 9000, 62): 1, (52, 1440, 240, 63): 1}
    assert metres(window) == [(0, 3, 4), (1440, 6, 8)]
    assert metres(cut(score, bar_starts(score), 2, 2)) == [(0, 6, 8)]


def test_joined_windows_are_the_piece_even_where_they_overlap(pieces):
    for piece in pieces:
        score = Score(piece.path)
        for n_bars, hop in ((4, 4), (3, 2), (4, 1)):
            starts, bars, windows = windows_of(score, n_bars, hop)
            assert notes(join(windows, bars, n_bars, starts)) == notes(score), piece.name


def test_where_windows_disagree_the_earlier_one_is_kept(pieces):
    piece = next(p for p in pieces if p.bars == 6)
    score = Score(piece.path)
    starts, bars, (first, second) = windows_of(score)
    assert bars == [0, 2]
    joined = join([first, second.shift_pitch(1)], bars, 4, starts)
    end = starts[4]
    assert {n for n in notes(joined) if n[1] < end} == {n for n in notes(score) if n[1] < end}
    assert {n for n in notes(joined) if n[1] >= end} == {n for n in notes(score.shift_pitch(1)) if n[1] >= end}


def test_chained_windows_keep_their_metres_and_lengths(pieces):
    by_metre = {p.metre: p for p in pieces}
    windows = [windows_of(Score(by_metre[m].path))[2][0] for m in ("3/4", "6/8", "4/4")]
    windows.insert(1, windows_of(Score(by_metre["4/4"].path), n_bars=1)[2][0])  # a short one is filled up
    score = chain(windows, [(0, 4)] * len(windows))
    lines = [0, 4 * 1440, 4 * 1440 + 4 * 1920, 8 * 1440 + 4 * 1920]
    given = sorted(note for w, t in zip(windows, lines, strict=True) for note in notes(w.shift_time(t)).elements())
    for (voice, start, duration, pitch), ours in zip(given, sorted(notes(score).elements()), strict=True):
        assert ours[0] == voice and ours[1] == start and ours[3] == pitch
        rings_on = any(v == voice and start < s < start + duration for v, s, *_ in given)
        assert ours[2] < duration if rings_on else ours[2] == duration
    assert metres(score) == [(t, *m) for t, m in zip(lines, [(3, 4), (4, 4), (6, 8), (4, 4)], strict=True)]
    assert bar_starts(score)[-1] <= lines[-1] + 4 * 1920


def test_chained_voices_sing_one_note_at_a_time():
    alto, piano = (Track("", program, False) for program in (53, 0))
    for track in (alto, piano):
        track.notes.extend([Note(0, 960, 60, 80), Note(480, 960, 62, 80), Note(1440, 480, 64, 80)])
    window = Score(480)
    window.tracks.extend([alto, piano])
    by_program = {t.program: [(n.start, n.duration, n.pitch) for n in t.notes]
                  for t in chain([window], [(0, 1)]).tracks}
    assert by_program[53] == [(0, 480, 60), (480, 960, 62), (1440, 480, 64)]
    assert by_program[0] == [(0, 960, 60), (480, 960, 62), (1440, 480, 64)], "other instruments may play chords"


# -- round trip -----------------------------------------------------------------------------------------------------

def losses(codec, pieces):
    """Windows whose notes or metres differ, and pieces that differ when joined, after a trip through ids."""
    lost, n = [], 0
    for piece in pieces:
        score = Score(piece.path)
        starts, bars, windows = windows_of(score)
        back = [codec.decode(ids) if w.note_num() else Score(480)
                for w, ids in zip(windows, codec.encode(windows), strict=True)]
        lost += [(piece.name, bar) for a, b, bar in zip(windows, back, bars, strict=True)
                 if a.note_num() and (notes(a), metres(a)) != (notes(b), metres(b))]
        if notes(join(back, bars, 4, starts)) != notes(score):
            lost.append((piece.name, "joined"))
        n += len(windows)
    return lost, n


@pytest.mark.parametrize("bpe", [False, True], ids=["base", "bpe"])
def test_round_trip(codec, bpe, pieces):
    lost, n = losses(learned(codec, pieces) if bpe else codec, pieces)
    assert lost == [] and n > 30


def test_round_trip_of_other_music():
    """Drums, other programs, x/8 metres, windows that begin with empty bars."""
    score = Score(480)
    score.time_signatures.append(TimeSignature(0, 7, 8))
    for program, is_drum, pitch in ((0, False, 60), (33, False, 30), (0, True, 36)):
        track = Track("", program, is_drum)
        track.notes.extend([Note(4000 // 120 * 120 + 120 * 7 * i, 120 * (1 + i % 9), pitch + i % 5, 80)
                            for i in range(9)])
        score.tracks.append(track)
    codec = Codec(make_tokenizer((-1, 0, 33)), 8)
    back = codec.decode(codec.encode([score])[0])
    assert (notes(back), metres(back)) == (notes(score), metres(score))


@pytest.fixture(scope="module")
def bach():
    """The whole corpus: cached in data/, or parsed now, which takes a minute."""
    return load_corpus("bach", ROOT / "data", progress=False)


def say(capsys, what, pieces, lost, n):
    with capsys.disabled():
        print(f"\n{what}: {len(lost)} of {n} windows in {len(pieces)} pieces lost something")


def test_round_trip_of_every_piece_of_bach(bach, capsys):
    lost, n = losses(Codec(make_tokenizer(), 4), bach)
    say(capsys, "bach, REMI", bach, lost, n)
    assert lost == [] and len(bach) > 350 and n > 1400


def test_bpe_of_every_piece_of_bach_expands_to_its_base_ids(bach, capsys):
    base = Codec(make_tokenizer(), 4)
    windows = [(p.split, base_ids(base.tokenizer, w)) for p in bach for w in windows_of(Score(p.path))[2]]
    codec = Codec(make_tokenizer(), 4).learn_bpe([ids for split, ids in windows if split == "train"], 600)
    merged = codec.finish([ids for _, ids in windows])
    lost = [i for i, (ids, (_, expected)) in enumerate(zip(merged, windows, strict=True))
            if codec.expand(ids) != expected.tolist()]
    say(capsys, "bach, REMI with BPE(600)", bach, lost, len(windows))
    assert lost == [] and codec.vocab_size == 600
    assert sum(map(len, merged)) < 0.65 * sum(len(ids) + 2 for _, ids in windows), "and it is shorter"


def test_round_trip_of_every_piece_of_jsfakes_and_no_tune_in_two_splits(bach, tmp_path, capsys):
    if not JSFAKES.exists():
        pytest.skip("needs ../shared/data/jsfakes.zip, a local copy of js-fakes")
    (tmp_path / "bach").symlink_to(ROOT / "data" / "bach")  # read only: the cache is there
    pieces = load_corpus("bach+jsfakes", tmp_path, archive=str(JSFAKES.resolve()), progress=False)
    fakes = [p for p in pieces if p.source == "jsfakes"]
    assert len(fakes) == 500 and len(pieces) == len(bach) + 500
    lost, n = losses(Codec(make_tokenizer(), 4), fakes)
    say(capsys, "js-fakes, REMI", fakes, lost, n)
    assert lost == []
    splits = {}
    for piece in pieces:
        splits.setdefault(piece.tune, set()).add(piece.split)
    assert all(len(s) == 1 for s in splits.values()) and len(splits) < len(pieces)
    assert {split: round(sum(s == {split} for s in splits.values()) / len(splits), 1) for split in SPLITS} == {
        "train": 0.8, "valid": 0.1, "test": 0.1}


# -- the grammar ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bpe", [False, True], ids=["base", "bpe"])
def test_the_grammar_allows_every_window(codec, bpe, pieces):
    codec = learned(codec, pieces) if bpe else codec
    windows = [w for p in pieces[::2] for w in windows_of(Score(p.path))[2] if w.note_num()]
    windows[0].time_signatures.append(TimeSignature(3 * 1920, 3, 4))  # in a bar after the last note
    windows[0].tracks = [t.clip(0, 1920) for t in windows[0].tracks]
    for ids in codec.encode(windows):
        clock, begun = codec.table.start(1), codec.grammar.start(1)
        for previous, following in zip(ids[:-1, None], ids[1:], strict=True):
            clock, _ = codec.table.advance(clock, previous)
            codec.grammar.read(begun, previous)
            allowed = codec.grammar.allows(previous, clock, begun)
            assert allowed.shape == (1, codec.vocab_size) and allowed[0, following], (
                [codec.names[i] for i in codec.expand(ids[ids != following].tolist())][-4:], int(following))


@pytest.mark.parametrize("bpe", [False, True], ids=["base", "bpe"])
def test_what_the_grammar_allows_are_whole_notes_within_the_window(codec, bpe, pieces):
    """A walk of ids drawn from all that are allowed becomes a note a pitch, forward in time, in at most four bars, and
    no note twice at one place."""
    codec, rng = learned(codec, pieces) if bpe else codec, np.random.default_rng(0)
    for _ in range(8):
        ids, clock, begun, last = [BOS], codec.table.start(1), codec.grammar.start(1), -1
        while ids[-1] != EOS and len(ids) < 400:
            clock, [slot] = codec.table.advance(clock, np.array(ids[-1:]))
            assert slot >= last
            last = int(slot)
            codec.grammar.read(begun, np.array(ids[-1:]))
            allowed = codec.grammar.allows(np.array(ids[-1:]), clock, begun)[0]
            assert allowed.any() and not allowed[[PAD, BOS, MASK]].any()
            ids.append(int(rng.choice(np.flatnonzero(allowed))))
        kinds, score = Counter(codec.names[i].split("_")[0] for i in codec.expand(ids)), codec.decode(ids)
        assert kinds["Bar"] <= 4 and max(note_counts(score).values(), default=1) == 1
        assert kinds["Pitch"] + kinds["PitchDrum"] - kinds["Duration"] in (0, 1), "1 where it was cut"
        end = [*bar_starts(score), math.inf, math.inf, math.inf, math.inf][4]
        assert all(n.start < end for t in score.tracks for n in t.notes)


def places(codec, ids):
    """(program, bar, position, pitch) of all notes that ids begin, by hand."""
    found, program, bar, position = [], None, 0, 0
    for name in (codec.names[i] for i in codec.expand(ids)):
        kind, _, value = name.partition("_")
        if kind == "Bar":
            bar, position = bar + 1, 0
        elif kind == "Position":
            position = int(value)
        elif kind == "Program":
            program = value
        elif kind in ("Pitch", "PitchDrum"):
            found.append((program, bar, position, value))
    return found


@pytest.mark.parametrize("bpe", [False, True], ids=["base", "bpe"])
def test_the_grammar_forbids_exactly_what_would_double_a_note(codec, bpe, pieces):
    codec, rng = learned(codec, pieces, 150) if bpe else codec, np.random.default_rng(1)
    forbidden = pending = 0
    for _ in range(4):
        ids, clock, begun = [BOS], codec.table.start(1), codec.grammar.start(1)
        while ids[-1] != EOS and len(ids) < 150:
            last = np.array(ids[-1:])
            clock, _ = codec.table.advance(clock, last)
            codec.grammar.read(begun, last)
            allowed = codec.grammar.allows(last, clock, begun)[0]
            free = codec.grammar.allows(last, clock, codec.grammar.start(1))[0]  # nothing begun before
            written = [places(codec, [*ids, int(i)]) for i in np.flatnonzero(free)]
            assert allowed[free].tolist() == [len(set(notes)) == len(notes) for notes in written]
            forbidden += (free & ~allowed).sum()
            pending += any(codec.kinds[codec.expansion[i][0]] == "Pitch" for i in np.flatnonzero(free & ~allowed))
            still = allowed & codec.grammar.is_still  # as many notes at one place as can be
            still[EOS] = False
            ids.append(int(rng.choice(np.flatnonzero(still if still.any() and rng.random() < 0.9 else allowed))))
    assert forbidden > 100 and pending > 20


# -- keys -----------------------------------------------------------------------------------------------------------

def test_transposed_ids_are_the_transposed_score(codec, pieces):
    """symusic's shift_pitch, then MidiTok, on every window."""
    seen = set()
    for piece in pieces:
        for window in windows_of(Score(piece.path))[2]:
            if not window.note_num():
                continue
            keyed = dict(in_all_keys(codec, base_ids(codec.tokenizer, window)))
            for shift, ids in keyed.items():
                assert np.array_equal(ids, base_ids(codec.tokenizer, window.shift_pitch(shift)))
            pitches = [n.pitch for t in window.tracks for n in t.notes]
            assert set(keyed) == {k for k in KEYS if min(pitches) + k >= 21 and max(pitches) + k <= 108}
            seen.update(keyed)
    assert seen == set(KEYS) == set(range(-5, 7))


def test_keys_beyond_the_range_are_left_out_and_drums_are_not_moved():
    score = Score(480)
    for program, is_drum, pitch in ((0, False, 23), (1, False, 105), (0, True, 40)):
        score.tracks.append(Track("", program, is_drum))
        score.tracks[-1].notes.append(Note(0, 480, pitch, 80))
    codec = Codec(make_tokenizer((-1, 0, 1)), 4)
    keyed = dict(in_all_keys(codec, base_ids(codec.tokenizer, score)))
    assert sorted(keyed) == [-2, -1, 0, 1, 2, 3]
    for shift, ids in keyed.items():
        assert {n[0]: n[3] for n in notes(codec.decode([BOS, *ids, EOS]))} == {0: 23 + shift, 1: 105 + shift, -1: 40}


# -- BPE ------------------------------------------------------------------------------------------------------------

def test_bpe_ids_are_miditoks_own(pieces):
    codec = learned(Codec(make_tokenizer(), 4), pieces)
    merged = 0
    for piece in pieces:
        windows = [w for w in windows_of(Score(piece.path))[2] if w.note_num()]
        for window, ids in zip(windows, codec.encode(windows), strict=True):
            theirs = codec.tokenizer.encode(window, encode_ids=True).ids
            theirs = [i for i in theirs if codec.expansion[i]]  # we leave out the mark of a beat that no merge took in
            assert ids.tolist() == [BOS, *theirs, EOS]
            merged += sum(len(codec.expansion[i]) > 1 for i in ids)
            assert codec.expand(ids) == base_ids(codec.tokenizer, window).tolist()
    assert merged > 100


def test_bpe_merges_never_cross_a_beat(codec, pieces):
    codec = learned(codec, pieces, more=150)
    assert sum(len(ids) > 1 for ids in codec.expansion) >= 100
    for ids in codec.expansion:
        beat = None  # not known where an id begins inside a beat
        for place, (kind, _, value) in enumerate(codec.names[i].partition("_") for i in ids):
            if kind == "Bar":
                assert place == 0, "something new begins, so nothing may stand before it"
                beat = 0
            elif kind == "Position":
                assert beat in (None, int(value) // 4)
                assert place == 0 or beat is not None or int(value) % 4, "the first position of a beat begins a word"
                beat = int(value) // 4


def test_bpe_is_learned_from_the_training_split_alone(config, pieces, tmp_path):
    def merges(pieces, name):
        store = build_store(config.replace(bpe_vocab=330, data_dir=str(tmp_path / name), transpose=False), pieces)
        return json.loads((store.folder / "tokenizer.json").read_text())["_model"]

    training = [p for p in pieces if p.split == "train"]
    others = [p for p in pieces if p.split != "train"]
    own = merges(pieces, "own")
    assert merges(training + [replace(p, path=q.path) for p, q in zip(others, training, strict=False)], "other") == own
    fewer = [replace(p, split="test") for p in training[:-3]] + training[-3:] + others
    assert merges(fewer, "fewer") != own


def test_a_vocabulary_without_room_for_merges_is_refused(config, pieces):
    with pytest.raises(ValueError, match="'bpe_vocab': expected more than the base vocabulary's 223, got 200"):
        build_store(config.replace(bpe_vocab=200), pieces)


# -- tokenizers and stores ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bpe", [False, True], ids=["base", "bpe"])
def test_a_saved_tokenizer_gives_the_same_ids(codec, bpe, pieces, tmp_path):
    codec = learned(codec, pieces) if bpe else codec
    codec.tokenizer.save(tmp_path / "tokenizer.json")
    again = Codec(load_tokenizer(tmp_path / "tokenizer.json"), 4)
    assert again.names == codec.names and again.expansion == codec.expansion
    assert (again.table.rows == codec.table.rows).all()
    windows = windows_of(Score(pieces[0].path))[2]
    for a, b in zip(codec.encode(windows), again.encode(windows), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("text", ["", "{}", "[]", "not json"])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, text):
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="tokenizer.json: expected a tokenizer saved by MidiTok"):
        load_tokenizer(path)


def test_the_store_holds_every_window_in_every_key(store, config, pieces):
    codec = Codec(load_tokenizer(store.folder / "tokenizer.json"), 4)
    expected = {}
    for number, piece in enumerate(pieces):
        is_training = piece.split == "train"
        starts, bars, windows = windows_of(Score(piece.path), 4, config.data.hop if is_training else 4)
        for bar, window in zip(bars, windows, strict=True):
            if window.note_num():
                for shift in KEYS if is_training else [0]:
                    expected[number, bar, shift, SPLITS.index(piece.split)] = window.shift_pitch(shift)
    assert {tuple(int(x) for x in w) for w in store.windows} == set(expected) and len(store) == len(expected)
    assert store.vocab_size == codec.vocab_size == 223
    assert [p["name"] for p in store.pieces] == [p.name for p in pieces]
    for i in range(0, len(store), 17):
        ids, slots = (row[0, :store.lengths[i]] for row in store.batch([i]))
        assert notes(codec.decode(ids.tolist())) == notes(expected[tuple(int(x) for x in store.windows[i])])
        assert slots.tolist() == codec.slots([ids.numpy()])[0].tolist()


def files_of(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir()}


@pytest.mark.parametrize("bpe", [330, 0])
def test_a_store_written_in_shards_is_the_one_made_at_once_in_memory(bpe, config, pieces, tmp_path, monkeypatch):
    """Every window tokenized by itself, BPE learned from all that do not overlap."""
    monkeypatch.setattr("mtxlib.data.tokens.SHARD", 20)
    config = config.replace(bpe_vocab=bpe, hop=1, data_dir=str(tmp_path), max_tokens=300)
    store, codec = build_store(config, pieces), Codec(make_tokenizer(programs_of(pieces)), 4)
    keyed = []
    for number, piece in enumerate(pieces):
        starts, bars, windows = windows_of(Score(piece.path), 4, 1 if piece.split == "train" else 4)
        keyed += [(number, bar, shift, piece.split, base_ids(codec.tokenizer, window.shift_pitch(shift)))
                  for bar, window in zip(bars, windows, strict=True) if window.note_num()
                  for shift in (KEYS if piece.split == "train" else [0])]
    if bpe:
        codec = codec.learn_bpe([k[-1] for k in keyed if k[3] == "train" and k[1] % 4 == 0], bpe)
    sequences = codec.finish([k[-1] for k in keyed])
    fits = [len(ids) <= 300 for ids in sequences]
    sequences = [ids for ids, fit in zip(sequences, fits, strict=True) if fit]
    assert store.ids.tolist() == np.concatenate(sequences).tolist() and 20 < len(store)
    assert store.slots.tolist() == np.concatenate(codec.slots(sequences)).tolist()
    assert store.offsets.tolist() == np.cumsum([0, *map(len, sequences)]).tolist()
    assert [tuple(w) for w in store.windows.tolist()] == [
        (*k[:3], SPLITS.index(k[3])) for k, fit in zip(keyed, fits, strict=True) if fit]


def test_processes_write_the_same_store(store, config, pieces, tmp_path, monkeypatch):
    monkeypatch.setattr("mtxlib.data.tokens.SHARD", 30)
    other = build_store(config.replace(data_dir=str(tmp_path)), pieces, workers=2)
    assert other.folder.name == store.folder.name and files_of(other.folder) == files_of(store.folder)
    assert list(other.folder.parent.iterdir()) == [other.folder], "nothing is left beside it"


def test_shards_that_were_written_before_it_was_stopped_stay(store, config, pieces, tmp_path, monkeypatch):
    monkeypatch.setattr("mtxlib.data.tokens.SHARD", 20)
    write, written = tokens.write_shard, []

    def until_killed(path, *args, left=3):
        if len(written) == left:
            raise RuntimeError("killed")
        written.append(path)
        return write(path, *args)

    monkeypatch.setattr("mtxlib.data.tokens.write_shard", until_killed)
    with pytest.raises(RuntimeError, match="killed"):
        build_store(config.replace(data_dir=str(tmp_path)), pieces, workers=1)
    learned = store_folder(config.replace(data_dir=str(tmp_path)), pieces).with_name(
        f".{store.folder.name}.parts") / "tokenizer.json"
    assert learned.exists()
    monkeypatch.setattr("mtxlib.data.tokens.write_shard", partial(until_killed, left=99))
    monkeypatch.setattr("mtxlib.data.tokens.programs_of", lambda *_: pytest.fail("made a tokenizer again"))
    again = build_store(config.replace(data_dir=str(tmp_path)), pieces, workers=1)
    assert len(written) == len(set(written)) > 4 and files_of(again.folder) == files_of(store.folder)


def test_a_store_that_another_process_finished_meanwhile_is_taken(store, config, pieces, tmp_path, monkeypatch):
    def meanwhile(*_):
        folder = store_folder(config.replace(data_dir=str(tmp_path)), pieces)
        shutil.copytree(store.folder, folder)
        shutil.rmtree(folder.with_name(f".{folder.name}.parts"))
        raise OSError("the shards are gone")

    monkeypatch.setattr("mtxlib.data.tokens.write_shard", meanwhile)
    other = build_store(config.replace(data_dir=str(tmp_path)), pieces, workers=1)
    assert files_of(other.folder) == files_of(store.folder)


def test_bpe_learns_from_a_bounded_sample(config, pieces, monkeypatch):
    codec = Codec(make_tokenizer(), 4)
    whole = sample(codec, pieces, config.data)
    monkeypatch.setattr("mtxlib.data.tokens.SAMPLE", 5)
    few = sample(codec, pieces, config.data)
    assert len(few) <= 5 * 12 < len(whole)
    assert {ids.tobytes() for ids in few} <= {ids.tobytes() for ids in whole}
    assert [ids.tolist() for ids in few] == [ids.tolist() for ids in sample(codec, pieces, config.data)]


def test_no_piece_is_in_two_splits_of_the_store(store):
    parts = [set(store.windows["piece"][store.select(split)].tolist()) for split in SPLITS]
    assert all(parts) and sum(map(len, parts)) == len(set.union(*parts))


def test_a_store_is_built_once_and_anew_for_other_data(store, config, pieces, monkeypatch):
    monkeypatch.setattr("mtxlib.data.tokens.cut_pieces", lambda *_: pytest.fail("tokenized again"))
    again = build_store(config, pieces)
    assert isinstance(again, TokenStore) and again.folder == store.folder
    swapped = [replace(pieces[0], path=pieces[1].path), *pieces[1:]]
    others = [store_folder(config.replace(**change), pieces) for change in (
        {"bpe_vocab": 300}, {"n_bars": 2}, {"hop": 1}, {"transpose": False}, {"max_tokens": 99})]
    others += [store_folder(config, pieces[1:]), store_folder(config, swapped)]
    assert len({store.folder, *others}) == 8
    assert store_folder(config.replace(lr=1.0, bottleneck="conv"), pieces) == store.folder


def test_windows_that_are_too_long_are_left_out_and_counted(config, pieces, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mtxlib.data.tokens.SHARD", 1)  # some shards have no window left
    monkeypatch.setattr("mtxlib.processes.cores", lambda: 1)
    shorter = build_store(config.replace(max_tokens=150, data_dir=str(tmp_path), transpose=False), pieces)
    full = build_store(config.replace(data_dir=str(tmp_path), transpose=False), pieces)
    n_long = int((full.lengths > 150).sum())
    assert 0 < n_long == len(full) - len(shorter) and shorter.lengths.max() <= 150
    assert f"{n_long} of {len(full)} windows left out: longer than max_tokens = 150" in capsys.readouterr().out


def test_a_corpus_without_validation_pieces_is_refused(config, pieces, tmp_path):
    with pytest.raises(ValueError, match="no window in the valid split of 'folder': expected at least 3 pieces"):
        build_store(config.replace(data_dir=str(tmp_path)), [p for p in pieces if p.split == "train"])


def test_tokenize_lays_windows_end_to_end(store, pieces):
    codec = Codec(load_tokenizer(store.folder / "tokenizer.json"), 4)
    valid = [p for p in pieces if p.split == "valid"]
    windows = tokenize(codec, valid)
    chosen = store.select("valid")
    assert len(windows) == len(chosen)
    for i, j in enumerate(chosen):
        assert windows.batch([i]).ids.tolist() == store.batch([j]).ids.tolist()
        assert windows.batch([i]).slots.tolist() == store.batch([j]).slots.tolist()


def test_programs_are_those_of_every_split(pieces, tmp_path):
    score = Score(480)
    for program, is_drum in ((7, False), (0, True)):
        score.tracks.append(Track("", program, is_drum))
        score.tracks[-1].notes.append(Note(0, 480, 60, 80))
    score.dump_midi(tmp_path / "x.mid")
    odd = replace(pieces[0], path=tmp_path / "x.mid", split="train")
    assert programs_of([odd, *pieces]) == {-1, 7, 42, 52, 53, 54}
    assert programs_of([replace(odd, split="test"), *pieces]) == {-1, 7, 42, 52, 53, 54}


@pytest.mark.parametrize(("programs", "known", "expected", "said"), [
    ([0, 33], {0, 33}, [0, 33], []),
    ([4], {0, 6, 8}, [6], ["program 4 becomes 6"]),  # its family first: 8 is no piano
    ([7], {0, 8}, [0], ["program 7 becomes 0"]),
    ([20], {0, 33}, [33], ["program 20 becomes 33"]),  # no relative: the nearest number
    ([0, 4], {0, 6}, [0, 6], ["program 4 becomes 6"]),
    ([0, 4], {0, -1}, [0, 0], ["program 4 becomes 0 beside a track that has it"]),
    ([-1, 4], {0}, [-1, 0], ["drums left out (1 notes)", "program 4 becomes 0"]),
    ([-1, 4], {-1}, [-1, 4], ["program 4 left out (1 notes)"]),
])
def test_unknown_programs_become_their_nearest_relatives(programs, known, expected, said):
    score = Score(480)
    for program in programs:
        score.tracks.append(Track("", max(program, 0), program < 0))
        score.tracks[-1].notes.append(Note(0, 480, 60, 80))
    out, changed = in_programs(score, known)
    assert [-1 if t.is_drum else t.program for t in out.tracks] == expected and changed == said
    assert out.note_num() == len(programs) - sum("left out" in what for what in said)
    assert [-1 if t.is_drum else t.program for t in score.tracks] == programs, "what was given stays as it was"
