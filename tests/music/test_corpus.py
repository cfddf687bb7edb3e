"""Sources on small data made here: what is kept, cached, split, and told."""

import hashlib
import json
import random
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from scores import Q, broken_files, melody, metres_of, notes_of, quarters, score_of
from symusic import Score

from mtxlib.music import corpus, readers
from mtxlib.music.corpus import Piece, load_corpus, split_by_tune
from mtxlib.music.normal import normalise
from mtxlib.music.readers import read_score

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"


def manifest(folder):
    return {e["name"]: e for e in json.loads((folder / "manifest.json").read_text())}


def test_splits_are_a_function_of_the_tune():
    tunes = [hashlib.sha256(str(i).encode()).hexdigest()[:12] for i in range(2000)]
    splits = split_by_tune(tunes, {})
    assert split_by_tune(reversed(tunes[:1000]), {}) == {t: splits[t] for t in tunes[:1000]}
    shares = {s: n / 2000 for s, n in Counter(splits.values()).items()}
    assert shares == pytest.approx({"train": 0.8, "valid": 0.1, "test": 0.1}, abs=0.02)
    of_twelve = "test train train train train train test train test train train train"
    assert [splits[t] for t in tunes[:12]] == of_twelve.split(), "splits of earlier runs must not change"


def test_no_split_is_empty_from_three_tunes_on():
    tunes = [f"{i:012x}" for i in range(40)]
    for start in range(0, 39, 3):
        assert set(split_by_tune(tunes[start:start + 3], {}).values()) == set(corpus.SPLITS)
    assert split_by_tune(tunes[:3], dict.fromkeys(tunes[:3], "train")) == dict.fromkeys(tunes[:3], "train")
    assert len(split_by_tune(tunes[:2], {})) == 2


def test_folder_with_broken_files_keeps_the_good_ones(tmp_path, capsys, monkeypatch):
    tree = tmp_path / "tree"
    (tree / "sub" / "deep").mkdir(parents=True)
    broken = broken_files(tree)
    score_of(*[(0, melody(i)) for i in range(4)], metres=[(0, 3, 4)]).dump_midi(tree / "waltz.mid")
    score_of(*[(0, melody(i)) for i in range(20)], (-1, [(0, 1, 40)])).dump_midi(tree / "sub" / "band, ü=1.MID")
    score_of((5, melody(7)), metres=[(0, 6, 8)]).dump_midi(tree / "sub" / "deep" / "jig.midi")
    pieces = load_corpus("folder", tmp_path / "data", archive=str(tree), workers=2, progress=False)
    line = capsys.readouterr().out
    assert {p.name: (p.metre, p.voices, p.bars) for p in pieces} == {
        "waltz.mid": ("3/4", 4, 6), "sub/band, ü=1.MID": ("4/4", 21, 4), "sub/deep/jig.midi": ("6/8", 1, 6)}
    folder = pieces[0].path.parent
    entries = manifest(folder)
    assert {name: e["skipped"] for name, e in entries.items() if "skipped" in e}.keys() == broken.keys()
    for name, why in broken.items():
        assert entries[name]["skipped"].startswith(why), entries[name]
    assert line.count("\n") == 1 and f"3 pieces (1 train, 1 valid, 1 test), {len(broken)} skipped" in line
    assert "1 empty" in line and f"{sum(w == 'broken' for w in broken.values())} broken" in line
    for p in pieces:
        assert notes_of(Score(p.path)) == notes_of(read_score(tree / p.name)) and isinstance(p, Piece)
        assert p.licence == "as given by you" and p.source == "folder"

    monkeypatch.setattr(corpus, "read_apart", lambda *a: pytest.fail("read again"))
    assert load_corpus("folder", tmp_path / "data", archive=str(tree)) == pieces
    monkeypatch.undo()
    pieces[0].path.unlink()  # a file is missing
    assert load_corpus("folder", tmp_path / "data", archive=str(tree), progress=False) == pieces
    assert pieces[0].path.exists()
    (tree / "waltz.mid").unlink()  # the tree changed
    assert len(load_corpus("folder", tmp_path / "data", archive=str(tree), progress=False)) == 2
    assert len(list(folder.glob("*.mid"))) == 2
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="no usable piece, 1 skipped .1 not MIDI or MusicXML"):
        load_corpus("folder", tmp_path / "data", archive=str(tmp_path / "other"), progress=False)


def test_a_file_that_hangs_or_crashes_its_reader_costs_itself_only(tmp_path, monkeypatch):
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("a", "crash", "hang", "z"):
        score_of((0, melody(name))).dump_midi(tree / f"{name}.mid")
        (tree / f"{name}.mid").write_bytes((tree / f"{name}.mid").read_bytes() + name.encode())
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time\nfrom mtxlib.music import readers\nreal = readers.parse_midi\ndef parse(data):\n"
        "    os._exit(9) if data.endswith(b'crash') else time.sleep(60 * data.endswith(b'hang'))\n"
        "    print('noise on stdout')\n    return real(data)\nreaders.parse_midi = parse\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(readers.SECONDS, "midi", 2)
    pieces = load_corpus("folder", tmp_path / "data", archive=str(tree), workers=1, progress=False)
    assert [p.name for p in pieces] == ["a.mid", "z.mid"]
    entries = manifest(pieces[0].path.parent)
    assert entries["crash.mid"]["skipped"] == "crashed its process: 9"
    assert entries["hang.mid"]["skipped"] == "timed out: 2 s"


def test_what_was_read_before_it_was_stopped_is_not_read_again(tmp_path, monkeypatch):
    tree, read = tmp_path / "tree", []
    tree.mkdir()
    for i in range(8):
        score_of((0, melody(i))).dump_midi(tree / f"{i}.mid")
    (tree / "3.mid").write_bytes(b"")
    whole = load_corpus("folder", tmp_path / "whole", archive=str(tree), workers=1, progress=False)

    def until_killed(tasks, workers, left=5):
        for task in tasks[:left]:
            read.append(task[0])
            yield readers.prepare(*task)
        if len(tasks) > left:
            raise RuntimeError("killed")

    monkeypatch.setattr(corpus, "read_apart", until_killed)
    with pytest.raises(RuntimeError, match="killed"):
        load_corpus("folder", tmp_path / "data", archive=str(tree), progress=False)
    [notes] = tmp_path.glob("data/*/*.part")
    notes.write_bytes(notes.read_bytes()[:-30])  # killed while it wrote the fifth
    pieces = load_corpus("folder", tmp_path / "data", archive=str(tree), progress=False)
    assert read == [f"{i}.mid" for i in (0, 1, 2, 3, 4, 4, 5, 6, 7)]
    assert [(p.name, p.tune, p.split) for p in pieces] == [(p.name, p.tune, p.split) for p in whole]
    folder = pieces[0].path.parent
    assert manifest(folder) == manifest(whole[0].path.parent) and not list(folder.glob("*.part"))

    with pytest.raises(RuntimeError, match="killed"):
        load_corpus("folder", tmp_path / "other", archive=str(tree), progress=False)
    (tree / "0.mid").write_bytes(b"other")  # the tree is another one now
    read.clear()
    with pytest.raises(RuntimeError, match="killed"):
        load_corpus("folder", tmp_path / "other", archive=str(tree), progress=False)
    assert read[0] == "0.mid"


def test_links_to_folders_are_followed_and_loops_end(tmp_path, capsys):
    elsewhere, tree = tmp_path / "elsewhere", tmp_path / "tree"
    for i in range(13):
        folder = elsewhere / "abc"[i % 3] / "deep" if i > 1 else tree
        folder.mkdir(parents=True, exist_ok=True)
        score_of((0, melody(i))).dump_midi(folder / f"{i}.mid")
    for name in "ab":
        (tree / name).symlink_to(elsewhere / name)
    (tree / "b" / "deep" / "back").symlink_to(tree)
    (tree / "a" / "self").symlink_to(tree / "a")
    (tree / "c").mkdir()
    for file in (elsewhere / "c" / "deep").iterdir():
        (tree / "c" / file.name).symlink_to(file)
    pieces = load_corpus("folder", tmp_path / "data", archive=str(tree), workers=2, progress=False)
    assert len(pieces) == 13 and "13 pieces" in capsys.readouterr().out
    (tree / "c" / "gone.mid").symlink_to(elsewhere / "nowhere.mid")
    score_of((0, melody(99))).dump_midi(elsewhere / "a" / "new.mid")
    assert len(load_corpus("folder", tmp_path / "data", archive=str(tree), progress=False)) == 14, "the source changed"
    assert ", 1 skipped (1 broken)" in capsys.readouterr().out


def test_music_that_is_off_the_grid_of_its_file_is_named(tmp_path, capsys):
    tree, r = tmp_path / "tree", random.Random(0)
    tree.mkdir()
    played = [(60 * r.random(), 1, 60 + i % 12) for i in range(200)]
    kinds = {"played": played, "shifted": [(t + 0.08, d, p) for t, d, p in melody(0)], "straight": melody(1),
             "swing": [(i / 2 + (i % 2) / 6, 0.5, 60 + i % 7) for i in range(40)],
             "fast": [(i / 8, 0.125, 60 + i % 7) for i in range(40)]}
    for name, notes in kinds.items():
        score_of((0, notes)).dump_midi(tree / f"{name}.mid")
    pieces = load_corpus("folder", tmp_path / "data", archive=str(tree), workers=1, progress=False)
    assert ("2 not on the grid of their quarters (under 60% of the onsets on their 32nds or triplets: "
            "played.mid, shifted.mid)") in capsys.readouterr().out
    assert {p.name: p.losses["notes"] for p in pieces} == {f"{name}.mid": len(notes) for name, notes in kinds.items()}


def test_every_form_has_a_cache_of_its_own(tmp_path):
    tree = tmp_path / "tree"
    tree.mkdir()
    for i in range(3):
        score_of((0, [(j / 3, 1 / 3, 60 + (i + j * j) % 12) for j in range(24)])).dump_midi(tree / f"{i}.mid")
    form = {"grid": 12, "velocities": 8, "tempos": 0, "pedal": True}
    fine = load_corpus("folder", tmp_path / "data", archive=str(tree), form=form, workers=1, progress=False)
    plain = load_corpus("folder", tmp_path / "data", archive=str(tree), workers=1, progress=False)
    default = load_corpus("folder", tmp_path / "data", archive=str(tree), form={"grid": 4, "velocities": 0})
    assert plain == default and plain[0].path.parent.name + "-grid12-pedal1-velocities8" == fine[0].path.parent.name
    assert [p.losses["moved"] for p in fine] == [0] * 3 and all(p.losses["moved"] for p in plain)
    assert {n.time % 160 for p in fine for n in Score(p.path).tracks[0].notes} == {0}


def test_two_processes_that_build_one_cache_lose_nothing_when_both_are_killed(tmp_path):
    tree, data = tmp_path / "tree", tmp_path / "data"
    tree.mkdir()
    for i in range(400):
        score_of((0, melody(i))).dump_midi(tree / f"{i:03}.mid")
    code = (f"from mtxlib.music.corpus import load_corpus\n"
            f"load_corpus('folder', {str(data)!r}, archive={str(tree)!r}, workers=1, progress=False)")

    def start():
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)

    processes, n_lines = [start(), start()], 0
    while n_lines < 100:
        time.sleep(0.01)
        assert all(p.poll() is None for p in processes), "they had time to end: nothing is shown"
        n_lines = sum(part.read_text().count("\n") for part in data.glob("*/*.part"))
    for p in processes:
        p.send_signal(signal.SIGKILL)
    said = [p.communicate()[0] for p in processes]
    assert sum("waiting for another process that reads folder" in text for text in said) == 1
    processes = [start(), start()]
    assert ["400 pieces" in p.communicate()[0] for p in processes] == [True, True]
    pieces = load_corpus("folder", data, archive=str(tree), progress=False)
    assert [p.name for p in pieces] == [f"{i:03}.mid" for i in range(400)]
    for p in pieces[::20]:
        assert notes_of(Score(p.path)) == notes_of(read_score(tree / p.name))


@pytest.fixture
def jsfakes(tmp_path, monkeypatch):
    """A zip like GitHub's with three chorales; its content is the expected one."""
    files = {str(i): score_of(*[(0, melody(4 * i + v, low=80 - 12 * v)) for v in range(4)]).dumps_midi()
             for i in (0, 2, 10)}
    path = tmp_path / "fakes.zip"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("js-fakes-68b476d/README.md", "x")
        z.writestr("js-fakes-68b476d/jsf-extended/0.mid", b"other")
        for name, data in files.items():
            z.writestr(f"js-fakes-68b476d/midi/{name}.mid", data)
    content = b"".join(name.encode() + files[name] for name in sorted(files))
    monkeypatch.setattr(corpus, "JSFAKES_SHA256", hashlib.sha256(content).hexdigest())
    return path


def test_jsfakes_by_download_zip_and_folder(tmp_path, jsfakes, monkeypatch, capsys):
    monkeypatch.setattr(corpus, "JSFAKES_URL", jsfakes.as_uri())
    pieces = load_corpus("jsfakes", tmp_path / "a", workers=1, progress=False)
    assert [p.name for p in pieces] == ["jsfakes-000", "jsfakes-002", "jsfakes-010"]
    assert pieces[0].path == tmp_path / "a" / "jsfakes" / "jsfakes-000.mid" and "CC BY 4.0" in pieces[0].licence
    zipfile.ZipFile(jsfakes).extractall(tmp_path / "tree")
    other = load_corpus("jsfakes", tmp_path / "b", archive=str(tmp_path / "tree"), workers=1, progress=False)
    assert [(p.name, p.tune, p.split) for p in other] == [(p.name, p.tune, p.split) for p in pieces]
    assert capsys.readouterr().out.count("\n") == 2
    part = load_corpus("jsfakes", tmp_path / "a", archive=str(jsfakes), limit=2, workers=1, progress=False)
    assert [p.path.parent.name for p in part] == ["jsfakes-limit2"] * 2 and len(manifest(part[0].path.parent)) == 2
    monkeypatch.setattr(corpus, "read_apart", lambda *a: pytest.fail("read again"))
    assert load_corpus("jsfakes", tmp_path / "b") == other  # cached: the archive is not needed any more


def test_download_errors_say_what_to_do(tmp_path, jsfakes, monkeypatch):
    monkeypatch.setattr(corpus, "JSFAKES_URL", jsfakes.as_uri())
    monkeypatch.setattr(corpus, "JSFAKES_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="fakes.zip .* 3 files, SHA-256 .* expected 500 and 000.*archive"):
        load_corpus("jsfakes", tmp_path / "a", progress=False)
    monkeypatch.setattr(corpus, "JSB_URL", (tmp_path / "gone.json").as_uri())
    with pytest.raises(ConnectionError, match="gone.json: .*as archive .jsb=PATH"):
        load_corpus("jsb", tmp_path / "a", progress=False)
    assert not list((tmp_path / "a").glob("*/manifest.json"))
    (tmp_path / "bad.json").write_text('{"train": []}')
    for source, expected in (("jsb", "JSON with lists"), ("jsfakes", "a zip of")):
        with pytest.raises(ValueError, match=f"bad.json: expected {expected}"):
            load_corpus(source, tmp_path / "a", archive=str(tmp_path / "bad.json"), progress=False)


def test_jsb_keeps_its_splits_and_the_others_follow(tmp_path, jsfakes):
    fake = Score.from_midi(zipfile.ZipFile(jsfakes).read("js-fakes-68b476d/midi/2.mid"))
    tune = [[n.pitch + 3, 55, 50, -1] for n in fake.tracks[0].notes for _ in range(4)]
    held = [[60, 55, 50, 45]] * 4 + [[62, -1, 50, 45]] * 4 + [[62, 55, 50, 45]] * 12
    data = {"train": [held, tune], "valid": [held[::-1]], "test": [tune]}
    file = tmp_path / "jsb.json"
    file.write_text(json.dumps(data))
    pieces = load_corpus("jsb", tmp_path, archive=str(file), workers=1, progress=False)
    assert {p.name: p.split for p in pieces} == {
        "jsb-train-000": "train", "jsb-train-001": "train", "jsb-valid-000": "valid", "jsb-test-000": "test"}
    first = Score(next(p.path for p in pieces if p.name == "jsb-train-000"))
    assert quarters(first) == [(3, 1, 60), (4, 4, 62)]  # 20 steps: a pickup of one quarter, then a bar
    assert quarters(first, 1) == [(3, 1, 55), (5, 3, 55)]
    both = load_corpus("jsfakes+jsb", tmp_path, archive=f"jsb={file},jsfakes={jsfakes}", workers=1, progress=False)
    follower = next(p for p in both if p.name == "jsfakes-002")
    assert follower.tune == next(p for p in pieces if p.name == "jsb-test-000").tune and follower.split == "test"
    assert [p for p in both if p.source == "jsb"] == pieces


@pytest.mark.parametrize("source, archive, message", [
    ("bahc", "", "expected bach, jsfakes, jsb, folder"), ("bach+bach", "", "different ones"), ("bach", "x.zip", "none"),
    ("folder", "", "'folder': archive '' does not exist"), ("jsb", "no.json", "'no.json' does not exist"),
    ("jsfakes+jsb", "x.zip", "for several write"), ("bach+jsb", "jsfakes=x.zip", "expected a path for .'jsb'")])
def test_sources_and_archives_that_make_no_sense(source, archive, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_corpus(source, tmp_path, archive=archive)


# ---- Bach


def in_bar(file):
    """(position in the bar, pitch) of the notes in full measures, as music21 has them; whether there is a pickup."""
    from music21 import converter

    found, measures = Counter(), None
    for part in converter.parse(file, forceSource=True).parts:
        measures = list(part.getElementsByClass("Measure"))
        for m in measures:
            if m.duration.quarterLength == m.barDuration.quarterLength:
                found.update((float(n.offset), n.pitch.midi) for n in m.notes
                             if not (n.tie and n.tie.type in ("stop", "continue")))
    return found, measures[0].duration.quarterLength < measures[0].barDuration.quarterLength


def test_bach_pickups_land_before_the_bar_line(tmp_path, capsys):
    pieces = load_corpus("bach", tmp_path, limit=3, workers=2, progress=False)
    assert len(pieces) == 3 and pieces[0].path.parent.name == "bach-limit3"
    assert "3 pieces (1 train, 1 valid, 1 test), 1 skipped (1 not 4 parts)" in capsys.readouterr().out
    import music21

    pickups = 0
    for p in pieces:
        expected, pickup = in_bar(Path(music21.__file__).parent / "corpus" / "bach" / f"{p.name}.mxl")
        score = Score(p.path)
        bar = 4 * score.time_signatures[0].numerator / score.time_signatures[0].denominator
        got = Counter((n.time / Q % bar, n.pitch) for t in score.tracks for n in t.notes)
        assert len(score.time_signatures) == 1 and not expected - got and expected.total() > 0.7 * got.total()
        assert (min(t.start() for t in score.tracks) > 0) == pickup
        pickups += pickup
        assert [t.name for t in score.tracks] == ["Soprano", "Alto", "Tenor", "Bass"] and p.key
    assert pickups, "the first three chorales have none: the test shows nothing"


@pytest.mark.skipif(not (ROOT / "data" / "bach" / "manifest.json").exists(), reason="data/bach is not there yet")
def test_bach_whole():
    pieces = load_corpus("bach", ROOT / "data", progress=False)
    assert len(pieces) == 365 and not any(p.name.endswith(".krn") for p in pieces)
    shares = {s: n / 365 for s, n in Counter(p.split for p in pieces).items()}
    assert shares == pytest.approx({"train": 0.8, "valid": 0.1, "test": 0.1}, abs=0.02)
    tunes = {s: {p.tune for p in pieces if p.split == s} for s in shares}
    assert not tunes["train"] & tunes["valid"] | tunes["train"] & tunes["test"] | tunes["valid"] & tunes["test"]
    scores = [Score(p.path) for p in pieces]
    assert all(n.time % 120 == 0 == n.duration % 120 for s in scores for t in s.tracks for n in t.notes)
    assert all([t.program for t in s.tracks] == [52, 53, 54, 42] for s in scores)
    # 84,909 notes by music21, grace notes and ends of ties not counted; one tie of bwv362 ends where none began
    assert sum(s.note_num() for s in scores) == 84910


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is not there")
def test_the_real_js_fakes_have_the_expected_checksum_and_jsb_its_sizes(capsys):
    tasks = corpus.jsfakes_tasks(str(SHARED / "jsfakes.zip"))
    assert capsys.readouterr().out == "" and len(tasks) == 500
    scores = [normalise(readers.READERS[kind](given)[0]) for _, kind, given, _ in tasks[:50]]
    assert {metre for s in scores for metre in metres_of(s)} == {(0, 4, 4)}
    jsb = corpus.jsb_tasks(str(SHARED / "Jsb16thSeparated.json"))
    assert Counter(split for *_, split in jsb) == {"train": 229, "valid": 76, "test": 77}
    assert {split for *_, split in jsb[:8]} == {"train", "valid", "test"}
