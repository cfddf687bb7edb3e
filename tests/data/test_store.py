"""The store and its batches, slots against a slow count over the decoded notes, token dropout by its statistics."""

from collections import Counter

import numpy as np
import pytest
import torch

from mtxlib.config import BOS, EOS, MASK, N_SPECIAL, PAD, SLOTS_PER_BAR
from mtxlib.data.store import SlotTable, TokenDropout, TokenStore, Windows, epoch_batches, pad_sequences, write_store

# -- batches --------------------------------------------------------------------------------------------------------

LENGTHS = np.random.default_rng(0).integers(20, 400, 1003)
INDICES = np.arange(3, 1003)  # a split; 1000 windows are 31 batches of 32 and 8 over


def batches(seed=0, epoch=0, size=32, **kwargs):
    return epoch_batches(LENGTHS, INDICES, size, seed, epoch, **kwargs)


def test_an_epoch_is_a_function_of_seed_and_epoch():
    a, b = batches(1, 2), batches(1, 2)
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    for other in (batches(1, 3), batches(2, 2)):
        assert [x.tolist() for x in a] != [x.tolist() for x in other]


def test_each_window_comes_at_most_once_an_epoch():
    for epoch in range(3):
        flat = np.concatenate(batches(epoch=epoch))
        assert len(flat) == len(set(flat.tolist())) == 31 * 32 and set(flat.tolist()) <= set(INDICES.tolist())
        assert all(len(b) == 32 for b in batches(epoch=epoch))


@pytest.mark.parametrize("pool", [4, 50])
def test_what_an_epoch_leaves_out_is_chance_not_length(pool):
    left = [i for epoch in range(60) for i in set(INDICES) - set(np.concatenate(batches(epoch=epoch, pool=pool)))]
    assert len(set(left)) > 300, "other windows every time"
    standard_error = LENGTHS.std() / len(left) ** 0.5
    assert abs(LENGTHS[left].mean() - LENGTHS[INDICES].mean()) < 4 * standard_error


def test_windows_of_like_length_come_together():
    spread = np.mean([np.ptp(LENGTHS[b]) for b in batches()])
    shuffled = np.random.default_rng(0).permutation(INDICES)[:31 * 32].reshape(31, 32)
    assert spread < 0.1 * np.mean([np.ptp(LENGTHS[b]) for b in shuffled])
    means = [LENGTHS[b].mean() for b in batches()]
    assert means != sorted(means), "but not in order of length"


def test_fewer_windows_than_a_batch_are_repeated():
    [batch] = epoch_batches(LENGTHS, INDICES[:5], 8, 0, 0)
    assert len(batch) == 8 and set(batch) == set(INDICES[:5])


# -- the store ------------------------------------------------------------------------------------------------------

SEQUENCES = [np.array([BOS, *range(5, 5 + n), EOS]) for n in (3, 1, 6)]
META = {"vocab_size": 20, "n_bars": 1, "slot_table": [[0, -1, -1, -1]] * 20, "is_structure": [False] * 20,
        "pieces": [{"name": "a"}, {"name": "b"}]}


def hand_made(folder, meta=META, save=lambda path: path.write_text("{}")):
    windows = Windows.pack(SEQUENCES, [s % 16 for s in SEQUENCES], [(0, 0, 0, 0), (0, 2, -5, 0), (1, 0, 0, 1)])
    return write_store(folder, [windows], meta, save)


def test_store_round_trip(tmp_path):
    hand_made(tmp_path / "store")
    store = TokenStore(tmp_path / "store")
    assert isinstance(store.ids, np.memmap) and isinstance(store.slots, np.memmap) and store.ids.dtype == np.uint16
    assert len(store) == 3 and store.lengths.tolist() == [5, 3, 8] and store.pieces == META["pieces"]
    batch = store.batch([2, 1])
    assert batch.ids.tolist() == [[1, 5, 6, 7, 8, 9, 10, 2] + [PAD], [1, 5, 2] + 6 * [PAD]]
    assert batch.slots[0].tolist() == batch.ids[0].tolist() and batch.ids.dtype == torch.long
    assert store.select("train").tolist() == [0, 1] and store.select("train", shift=-5).tolist() == [1]
    assert store.select("valid").tolist() == [2] and store.select("test").tolist() == []
    assert (tmp_path / "store" / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("lengths, size", [([2], 9), ([9], 9), ([10], 17), ([5, 33, 1], 33), ([34, 40], 41)])
def test_all_but_one_of_the_positions_are_a_multiple_of_8(lengths, size):
    """And not more of them than that takes; what was there before stays."""
    sequences = [np.arange(1, 1 + n) for n in lengths]
    padded = pad_sequences(sequences)
    assert padded.shape == (len(lengths), size) and padded.dtype == torch.long
    for row, sequence in zip(padded.tolist(), sequences, strict=True):
        assert row == sequence.tolist() + (size - len(sequence)) * [PAD]


def test_a_large_vocabulary_fits(tmp_path):
    assert hand_made(tmp_path / "store", {**META, "vocab_size": 70_000}).ids.dtype == np.uint32


def test_a_store_is_replaced_whole_or_left_alone(tmp_path):
    hand_made(tmp_path / "store")
    hand_made(tmp_path / "store", {**META, "n_bars": 2})
    assert TokenStore(tmp_path / "store").n_bars == 2 and [p.name for p in tmp_path.iterdir()] == ["store"]

    def fail(path):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        hand_made(tmp_path / "store", {**META, "n_bars": 3}, save=fail)
    assert TokenStore(tmp_path / "store").n_bars == 2


def test_what_is_missing_or_misspelt_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no token store in .*nowhere: run notebooks/02"):
        TokenStore(tmp_path / "nowhere")
    meta = hand_made(tmp_path / "old").folder / "meta.json"
    meta.write_text(meta.read_text().replace('"version": ', '"was": '))
    with pytest.raises(ValueError, match=r"old: expected a token store of version \d, got None: .* run notebooks/02"):
        TokenStore(tmp_path / "old")
    with pytest.raises(ValueError, match="split: expected one of train, valid, test, got 'dev'"):
        hand_made(tmp_path / "store").select("dev")


# -- slots ----------------------------------------------------------------------------------------------------------

ROWS = [[0, -1, -1, -1]] * 4 + [  # the special tokens, then:
    [1, 0, -1, -1],   # 4: a bar
    [0, 4, -1, -1],   # 5: position 4
    [0, 0, 6, 144],   # 6: 6/8 and position 0
    [0, 20, -1, -1],  # 7: position 20
    [1, 6, 12, 192],  # 8: a bar in 4/4 and position 6, merged by BPE
    [0, -1, -1, -1]]  # 9: a note


def test_slots_of_a_window_written_by_hand():
    """Bars and positions; a position of 6/8 is a 32nd; what comes after the window's last slot stays on it."""
    ids, slots = zip((BOS, 0), (4, 0), (5, 4), (9, 4), (4, 16), (6, 16), (9, 16), (5, 18), (7, 26), (8, 31), (4, 31),
                     (7, 31), (EOS, 31), strict=True)
    assert SlotTable(ROWS, n_bars=2).slots(torch.tensor([ids])).tolist() == [list(slots)]
    ids, slots = zip((BOS, 0), (8, 6), (9, 6), (4, 16), (7, 31), (EOS, 31), strict=True)
    assert SlotTable(ROWS, n_bars=2).slots(torch.tensor([ids])).tolist() == [list(slots)]


def expected_slots(score, n_bars):
    """(program, pitch, slot) of each note: bars counted by hand, 16 slots to the bar whatever its metre."""
    lines, metre, changes = [0], (4, 4), {t.time: (t.numerator, t.denominator) for t in score.time_signatures}
    while lines[-1] <= score.end():
        metre = changes.get(lines[-1], metre)
        lines.append(lines[-1] + 1920 * metre[0] // metre[1])
    found = Counter()
    for track in score.tracks:
        for note in track.notes:
            bar = max(i for i, line in enumerate(lines) if line <= note.start)
            slot = min(bar * 16 + min((note.start - lines[bar]) // 120, 15), n_bars * 16 - 1)
            found[-1 if track.is_drum else track.program, note.pitch, slot] += 1
    return found


def slots_of_tokens(codec, ids, slots):
    """(program, pitch, slot of the id that holds the pitch)."""
    found, program = Counter(), None
    for i, slot in zip(ids, slots, strict=True):
        for base in codec.expansion[i] if i >= N_SPECIAL else []:
            kind, _, value = codec.names[base].partition("_")
            program = int(value) if kind == "Program" else program
            if kind in ("Pitch", "PitchDrum"):
                found[program, int(value), int(slot)] += 1
    return found


@pytest.mark.parametrize("bpe", [0, 60], ids=["base", "bpe"])
def test_slots_are_the_onsets_of_the_notes(bpe, pieces):
    """With BPE an id may hold the notes of one beat: then its slot lies in the beat of each of them."""
    from symusic import Score

    from mtxlib.data.tokens import Codec, make_tokenizer
    from mtxlib.music.score import bar_starts, cut, window_bars

    def to_beat(counts):
        return Counter((program, pitch, slot // 4) for (program, pitch, slot), n in counts.items() for _ in range(n))

    codec, windows = Codec(make_tokenizer(), 4), []
    for piece in pieces:
        score = Score(piece.path)
        starts = bar_starts(score)
        windows += [cut(score, starts, bar, 4) for bar in window_bars(len(starts) - 1, 4, 3)]
    metres = {(t.numerator, t.denominator) for w in windows for t in w.time_signatures}
    assert metres == {(4, 4), (3, 4), (6, 8)} and any(len(w.time_signatures) > 1 for w in windows)
    if bpe:
        codec = codec.learn_bpe([ids[1:-1] for ids in codec.encode(windows)], codec.vocab_size + bpe)
    sequences = codec.encode(windows)
    assert not bpe or any(len(codec.expansion[i]) > 1 for ids in sequences for i in ids)
    for window, ids, slots in zip(windows, sequences, codec.slots(sequences), strict=True):
        if not window.note_num():
            continue
        ours, theirs = slots_of_tokens(codec, ids, slots), expected_slots(window, 4)
        assert to_beat(ours) == to_beat(theirs) if bpe else ours == theirs
        assert expected_slots(codec.decode(ids), 4) == theirs, "of the decoded notes too"


def test_slots_of_long_bars_and_of_drums():
    """What a bar of 12/8 has beyond 16 sixteenths stays on the bar's last slot."""
    from symusic import Note, Score, TimeSignature, Track

    from mtxlib.data.tokens import Codec, make_tokenizer

    score = Score(480)
    score.time_signatures.append(TimeSignature(0, 12, 8))
    for program, is_drum, pitch in ((0, False, 60), (0, True, 40)):
        track = Track("", program, is_drum)
        track.notes.extend([Note(240 * i, 240, pitch + i % 3, 80) for i in range(30)])
        score.tracks.append(track)
    codec = Codec(make_tokenizer((-1, 0)), 3)
    [ids] = codec.encode([score])
    assert slots_of_tokens(codec, ids, codec.slots([ids])[0]) == expected_slots(score, 3)


def test_slots_are_told_token_by_token(store):
    """Generation advances the clock one id at a time and must agree with the store."""
    indices = store.select("valid")[:4]
    batch = store.batch(indices)
    clock, columns = store.table.start(len(batch.ids)), []
    for column in batch.ids.numpy().T:
        clock, slots = store.table.advance(clock, column)
        columns.append(slots)
    is_real = batch.ids != PAD
    assert (torch.from_numpy(np.stack(columns, 1))[is_real] == batch.slots[is_real]).all()
    assert int(batch.slots.max()) < store.n_bars * SLOTS_PER_BAR


# -- token dropout --------------------------------------------------------------------------------------------------

V = 50
SPARE = torch.arange(V) % 5 == 0


@pytest.fixture(scope="module")
def ids():
    return torch.randint(V, (500, 400), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["mask", "random"])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.9])
@pytest.mark.parametrize("spare", [None, SPARE], ids=["all", "spare"])
def test_token_dropout_replaces_its_share(ids, share, kind, spare):
    before = ids.clone()
    out = TokenDropout(share, V, kind, spare)(ids, torch.Generator().manual_seed(1))
    assert torch.equal(ids, before) and out.shape == ids.shape and out.dtype == ids.dtype
    may_change = (ids >= N_SPECIAL) & ~(torch.zeros(V, dtype=torch.bool) if spare is None else spare)[ids]
    changed = out != ids
    assert not changed[~may_change].any()
    n = int(may_change.sum())
    p = share if kind == "mask" else share * (1 - 1 / (V - N_SPECIAL))  # a random token may be the one it replaces
    assert abs(int(changed.sum()) - n * p) < 5 * (n * p * (1 - p)) ** 0.5
    if kind == "mask":
        assert (out[changed] == MASK).all()
    else:
        counts = torch.bincount(out[changed], minlength=V)[N_SPECIAL:]
        assert out[changed].min() >= N_SPECIAL and (counts > 0).all() and counts.max() < 2 * counts.min()


def test_token_dropout_hits_every_position_and_sequence_alike(ids):
    hit = TokenDropout(0.5, V)(ids, torch.Generator().manual_seed(2)) != ids
    free = ids >= N_SPECIAL
    for dim in (0, 1):
        share = hit.sum(dim) / free.sum(dim)
        assert share.min() > 0.3 and share.max() < 0.7


@pytest.mark.parametrize("kind", ["mask", "random"])
def test_token_dropout_is_deterministic_with_a_generator(ids, kind):
    drop = TokenDropout(0.3, V, kind)
    a, b, c = (drop(ids, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_no_token_dropout_at_0(ids):
    state = torch.get_rng_state()
    assert torch.equal(TokenDropout(0.0, V, "random")(ids), ids)
    assert torch.equal(torch.get_rng_state(), state)


def test_spared_structure_is_bars_positions_and_metres(store):
    from mtxlib.data.tokens import Codec, load_tokenizer

    codec = Codec(load_tokenizer(store.folder / "tokenizer.json"), store.n_bars)
    spared = {codec.names[i].split("_")[0] for i in torch.nonzero(store.is_structure)[:, 0]}
    assert spared == {"Bar", "Position", "TimeSig"}
    batch = store.batch(store.select("valid")[:4])
    out = TokenDropout(0.99, store.vocab_size, spare=store.is_structure)(batch.ids)
    structure = store.is_structure[batch.ids] | (batch.ids < N_SPECIAL)
    assert torch.equal(out[structure], batch.ids[structure]) and (out[~structure] == MASK).float().mean() > 0.9
