"""The widgets without a browser: a value that is set calls what a hand on the slider would."""

import json
import shutil
from datetime import datetime

import numpy as np
import pytest
import torch
from symusic import Note, Score, Tempo, Track

from mtxlib.book import widgets
from mtxlib.music import notation
from mtxlib.music.metrics import ATTRIBUTES
from mtxlib.run import load_run

BAR = 4 * 480


@pytest.fixture
def own(run_dir, tmp_path):
    """The run of a few steps in a folder that may be written into; it notes what it is asked to decode."""
    shutil.copytree(run_dir, tmp_path / "run")
    run = load_run(tmp_path / "run", "cpu")
    run.asked = []
    decode = run.decode
    run.decode = lambda z, *a, **k: run.asked.append(z) or decode(z, *a, **k)
    return run


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few steps, and notation, which its own tests look at, only counts the notes."""
    monkeypatch.setattr(widgets, "STEPS", 5)
    monkeypatch.setattr(notation, "notation", lambda score, bars=None: f"<svg>{score.note_num()} {bars}</svg>")


def seen(studio) -> tuple:
    return bytes(studio.picture.value), studio.sound.value, bytes(studio.notation.value)


def said(studio) -> str:
    return studio.status.value.partition(">")[2].removesuffix("</span>")


def midi(bars: int, programs=(52, 53, 54, 42)) -> bytes:
    score = Score(480)
    for i, program in enumerate(programs):
        score.tracks.append(Track("", max(program, 0), program < 0))
        score.tracks[i].notes.extend([Note(bar * BAR, BAR, 72 - 7 * i + bar % 5, 80) for bar in range(bars)])
    return score.dumps_midi()


def upload(chooser, name: str, content: bytes) -> None:
    chooser.upload.value = ({"name": name, "type": "", "size": len(content), "content": memoryview(content),
                             "last_modified": datetime.now()},)


def test_the_slider_shows_what_morph_makes(own, pieces):
    m = widgets.Morph(own, pieces)
    assert bytes(m.picture.value).startswith(b"\x89PNG") and "data:audio/ogg;base64," in m.sound.value
    assert [len(z) for z in own.asked] == [1]  # what is shown; the other steps when the slider is moved, all at once
    first = seen(m)
    for alpha in (0.0, 0.25, 1.0):
        m.alpha.value = alpha
        assert seen(m)[0] != first[0]
        assert m.score == own.morph(*own.encode_windows([m.a.window, m.b.window]), alpha)
    assert [len(z) for z in own.asked[:2]] == [1, widgets.STEPS - 1]
    del own.asked[:]
    m.alpha.value = 0.5
    assert seen(m) == first and not own.asked and said(m) == ""


def test_a_change_of_what_is_mixed_decodes_what_is_shown_or_all_that_one_seed_draws(own, pieces):
    m = widgets.Morph(own, pieces)
    for widget, value, n in ((m.a.piece, list(m.a.music)[3], 1), (m.b.bars, 2, 1), (m.temperature, 1.0, widgets.STEPS),
                             (m.seed, 5, widgets.STEPS)):
        before, _ = seen(m), own.asked.clear()
        widget.value = value
        assert [len(z) for z in own.asked] == [n] and m.alpha.value == 0.5 and seen(m) != before
        m.alpha.value = 1.0
        z = own.encode_windows([m.a.window, m.b.window])
        asked = own.asked[n != widgets.STEPS]
        assert torch.equal(asked[0], z[0]) and torch.equal(asked[-1], z[1])
        m.alpha.value = 0.5


def test_bar_by_bar(own, pieces):
    m = widgets.Morph(own, pieces)
    m.mode.value = True
    assert m.alpha.layout.display == "none" and m.by_bar.layout.display == ""
    own.asked.clear()
    alphas = np.linspace(0, 1, own.n_bars).round(2).tolist()
    m.turn_to(m.bars, alphas)
    assert len(own.asked) == 1 and [dial.value for dial in m.bars] == alphas
    pair = own.encode_windows([m.a.window, m.b.window])
    assert m.score == own.morph(*pair, alphas) and f"at_{alphas[0]:.2f}_{alphas[1]:.2f}" in m.name
    m.swap(m.bars[0])
    assert m.bars[0].value == 1 and m.score == own.morph(*pair, [1.0, *alphas[1:]])
    m.mode.value = False
    assert m.name.endswith("at_0.50")


BAD = (  # name, content, how the sentence begins
    ("notes.txt", b"no music at all", "notes.txt: not MIDI"), ("a.mid", b"", "a.mid: empty"),
    ("cut.mid", midi(8)[:60], "cut.mid: broken"), ("silent.mid", Score(480).dumps_midi(), "silent.mid: no notes"),
    ("short.mid", midi(1), "short.mid: expected the"),
    ("drums.mid", midi(8, (-1,)), "drums.mid: expected the programs"),
    ("<b>.xml", b"<score-partwise/>", "&lt;b&gt;.xml: "),
)


def test_a_bad_upload_gets_one_sentence_and_costs_nothing(own, pieces):
    m = widgets.Morph(own, pieces)
    before, music, _ = seen(m), dict(m.a.music), own.asked.clear()
    for name, content, message in BAD:
        upload(m.a, name, content)
        assert said(m).startswith(message) and "\n" not in said(m) and "Traceback" not in said(m)
        assert seen(m) == before and m.a.music == music and m.a.piece.index == 0 and not own.asked
    m.alpha.value = 1.0
    assert said(m) == "" and seen(m) != before


def test_an_upload_is_chosen_and_can_be_replaced(own, pieces):
    m = widgets.Morph(own, pieces)
    m.b.piece.index = 4
    for bars in (9, 7):
        own.asked.clear()
        upload(m.b, "mine.mid", midi(bars))
        assert m.b.piece.value == "mine.mid" and len(m.b.bars.options) == bars - own.n_bars + 1
        assert m.b.window.note_num() == 4 * own.n_bars and said(m) == ""
        assert len(own.asked) == (bars == 9)  # the same window is not decoded again
    m.b.bars.index = 1
    assert m.name.startswith("morph") and f"to_mine.mid_bars_2-{own.n_bars + 1}_at_0.50" in m.name
    m.b.piece.index = 5
    assert m.b.piece.value in m.name.replace("_", " ") or "piece" in m.name


def test_saving_never_overwrites_and_says_where_or_why_not(own, pieces):
    m, samples = widgets.Morph(own, pieces), own.folder / "samples"
    for path in (samples / f"{m.name}.mid", samples / f"{m.name}_2.mid"):
        m.save(".mid")
        assert said(m) == f"Saved as {path}"
        assert Score(path).note_num() == m.score.note_num() > 0
    m.save(".musicxml")
    assert "<score-partwise" in (samples / f"{m.name}.musicxml").read_text()
    shutil.rmtree(samples)
    samples.write_text("a file in the way")
    m.save(".mid")
    assert "File exists" in said(m)


def test_a_morph_is_saved_at_a_tempo_between_those_of_its_pieces(own, pieces):
    m = widgets.Morph(own, pieces)
    for chooser, tempo in ((m.a, 60), (m.b, 180)):
        score = Score.from_midi(midi(8))
        score.tempos.append(Tempo(0, tempo))
        upload(chooser, f"{tempo}.mid", score.dumps_midi())
    m.alpha.value = 0.25
    m.save(".mid")
    [path] = (own.folder / "samples").glob("*.mid")
    assert Score(path).tempos[0].qpm == pytest.approx(90, abs=0.01)  # MIDI counts microseconds


def test_steering_moves_along_the_directions_and_measures(own, pieces):
    s = widgets.Steer(own, pieces)
    assert list(s.dials) == list(ATTRIBUTES)
    before, z = seen(s), own.encode_windows([s.piece.window])
    s.dials["register"].value = 2.0
    [score] = own.decode(own.directions().move(z, {"register": 2.0}))
    assert s.score == score and seen(s)[0] != before[0] and "register+2.00" in s.name
    assert s.measured["register"].value.endswith(f"→ {ATTRIBUTES['register'](score):.2f}")
    [reset] = [w for w in s.children[2].children if getattr(w, "description", "") == "Reset"]
    reset.click()
    assert seen(s)[0] == before[0] and s.dials["register"].value == 0


def test_composing(own, pieces):
    c = widgets.Compose(own, pieces)
    assert c.result.layout.display == "none"
    c.length.value, c.seed.value = 8, 3
    c.compose()
    assert c.score == own.generate(8, 3, 1.0, top_p=widgets.TOP_P)
    assert c.result.layout.display == "" and "seed_3" in c.name
    c.prompt.piece.index = 1
    shown = seen(c)
    c.compose()
    assert "learned prior" in said(c) and seen(c) == shown


class Broken(RuntimeError):
    """Of a kind that nobody foresaw."""


@pytest.mark.parametrize("what", ["decode", "encode_windows", "generate"])
def test_whatever_goes_wrong_is_one_sentence_and_what_was_shown_stays(own, pieces, what, caplog, monkeypatch):
    m, c = widgets.Morph(own, pieces), widgets.Compose(own, pieces)
    before = seen(m)

    def broken(*args, **kwargs):
        raise Broken("tensors of 313 and 348\nover two lines")

    monkeypatch.setattr(own, what, broken)
    m.a.piece.index = 3
    told = said(m)
    m.alpha.value = 1.0
    c.compose()
    sentence = "This went wrong: Broken: tensors of 313 and 348 over two lines"
    assert (told if what != "generate" else said(c)) == sentence and said(c) != "Composing 16 bars …"
    assert "Traceback" in caplog.text and (what == "generate" or m.a.place not in m.name)
    if what == "decode":
        assert said(m) == sentence and seen(m) == before


def test_a_key_is_chosen_when_the_page_opens(own, pieces):
    c = widgets.Compose(own, pieces)
    assert c.key.index == 0 and c.key.label == "that of the beginning, or any"


def unreachable(*args, **kwargs):
    raise OSError("no network")


def test_the_page_of_the_app_says_why_there_is_nothing(own, tmp_path, monkeypatch):
    assert isinstance(widgets.app(str(own.folder)), type(widgets.play(own, own.pieces("train"))))
    config = own.config.replace(source="jsfakes", archive="", data_dir=str(tmp_path / "data"))
    (own.folder / "config.json").write_text(json.dumps(config.to_dict()))
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    assert "jsfakes: could not download" in widgets.app(str(own.folder)).value
    (own.folder / "model.safetensors").unlink()
    assert "is not a finished run: expected model.safetensors" in widgets.app(str(own.folder)).value


def test_all_three_and_steering_when_it_is_opened(own, pieces):
    tab = widgets.play(own, pieces)
    assert tab.titles == ("Morph", "Compose", "Steer") and not (own.folder / "directions.safetensors").exists()
    tab.selected_index = 2
    assert isinstance(tab.children[2], widgets.Steer) and (own.folder / "directions.safetensors").exists()


def test_steering_that_cannot_be_says_why_and_is_tried_again_when_opened_again(own, pieces, monkeypatch):
    tab, directions = widgets.play(own, pieces), own.directions
    monkeypatch.setattr(own, "directions", unreachable)
    tab.selected_index = 2
    assert "no network" in tab.children[2].value
    monkeypatch.setattr(own, "directions", directions)
    tab.selected_index = 0
    tab.selected_index = 2
    assert isinstance(tab.children[2], widgets.Steer)


def test_pieces_shorter_than_a_window_are_not_offered(own, pieces):
    offered = [p for p in pieces if p.bars >= own.n_bars]
    assert len(widgets.Morph(own, pieces).a.music) == len(offered) < len(pieces)
    with pytest.raises(ValueError, match="expected one of"):
        widgets.Morph(own, [p for p in pieces if p not in offered])


def test_hiding_the_bars_hides_nothing_else(own, pieces):
    m = widgets.Morph(own, pieces)
    rows = [child for child in m.children if isinstance(child, widgets.widgets.HBox)]
    assert m.by_bar.layout.display == widgets.HIDDEN
    assert [child.layout.display for child in rows if child is not m.by_bar] == [None] * (len(rows) - 1)
