"""Seeing and hearing a score: piano roll, notation and sound, all offline.

Every function takes a `symusic.Score` in ticks and leaves it as it was. What is unusual:
- The four choral voices are known by their programs (VOICES), so they keep name, colour and order however the tracks
  are sorted.
- Notation works on the 16th grid. Notes are cut here, at bars and beats: music21 cuts at bars only.
- symusic's synthesizer plays most programs of the soundfont out of tune, by up to two octaves (its issue 55), and hangs
  or crashes on some, so all voices sound as one program that was measured; it stops notes dead, so a room is added.
music21, verovio and soundfile are imported where they are used: music21 alone takes a second.
"""

import base64
import importlib.util
import io
import re
from functools import cache
from html import escape
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import symusic
from IPython import get_ipython
from IPython.display import SVG, Audio
from matplotlib_inline.backend_inline import set_matplotlib_formats

from mtxlib.files import atomic

from .corpus import VOICES

PALETTE = [sns.color_palette("colorblind")[i] for i in (0, 1, 2, 4, 3, 5, 6, 7, 8, 9)]  # four that differ first
GAP = 0.06  # quarters left free after a rectangle of the piano roll
PIANO = 5  # electric piano: in tune from C2 to C6, speaks at once, holds its level
RATE = 22050  # samples a second
OVERSAMPLING = 4  # the synthesizer rounds loops to samples: at 88 kHz C2 to C6 lie within 10 cents, at 22 kHz within 40
NOTATED = 16  # bars of a long score that a page notates
ROOM = 1.0  # seconds in which the echo falls by 60 dB; the sound ends this long after the last note


def set_style() -> None:
    """The look of every figure; a notebook calls it once."""
    sns.set_theme(style="ticks", palette=PALETTE, rc={"axes.spines.top": False, "axes.spines.right": False})
    if get_ipython():  # music21 sets this when it is imported: here it holds for all figures from the start
        set_matplotlib_formats("retina")


def voice_colours(n: int) -> list[tuple[float, float, float]]:
    """n distinct colours: the palette as far as it goes, evenly spaced hues beyond."""
    return list(PALETTE[:n] if n <= len(PALETTE) else sns.husl_palette(n))


def _is_choral(score) -> bool:
    programs = [t.program for t in score.tracks]
    return {42} != set(programs) <= set(VOICES) and len(set(programs)) == len(programs)  # 42 alone is a cello


def _voices(score) -> list[tuple[str, tuple, symusic.Track]]:
    """(name, colour, track) of each track that has notes; the choral voices from the top, whatever their order."""
    voices = [(t.name or ("Drums" if t.is_drum else f"Track {i}"), colour, t) for i, (t, colour) in
              enumerate(zip(score.tracks, voice_colours(len(score.tracks)), strict=True), 1)]
    if _is_choral(score):
        tracks = {t.program: t for t in score.tracks}
        voices = [(VOICES[p], PALETTE[i], tracks[p]) for i, p in enumerate(VOICES) if p in tracks]
    return [v for v in voices if v[2].notes]


def _bars(score) -> list[tuple[int, int, tuple[int, int]]]:
    """(start, end, (beats, unit)) of every bar in ticks; 4/4 until told otherwise; an empty score has one bar."""
    metres = {m.time: (m.numerator, m.denominator) for m in score.time_signatures}
    bars, start, metre = [], 0, (4, 4)
    while start < score.end() or not bars:
        metre = metres.get(start, metre)
        full = start + max(1, 4 * score.tpq * metre[0] // metre[1])
        end = min([full, *(t for t in metres if start < t < full)])  # a metre that changes inside a bar ends it
        bars.append((start, end, metre))
        start = end
    return bars


def _draw(ax, score, title, bars=None) -> tuple[int, int]:
    """Draw the notes and the bars; return the lowest and the highest pitch."""
    grid, quarter, pitches = _bars(score), score.tpq, []
    first, last = bars if isinstance(bars, tuple) else (1, bars or len(grid))
    shown = grid[first - 1:last]
    if first < 1 or not shown:
        raise ValueError(f"bars: expected bars between 1 and {len(grid)}, got {bars}")
    for name, colour, track in _voices(score):
        notes = [n for n in track.notes if n.start < shown[-1][1] and n.end > shown[0][0]]
        widths = [n.duration / quarter - min(GAP, n.duration / quarter / 4) for n in notes]
        ax.barh([n.pitch for n in notes], widths, left=[n.start / quarter for n in notes], height=0.8, color=colour,
                alpha=0.85, linewidth=0, zorder=2, label=name)
        pitches += [n.pitch for n in notes]
    if not pitches:
        ax.text(0.5, 0.5, "no notes", transform=ax.transAxes, ha="center", va="center")
    lines, step = [bar[0] / quarter for bar in shown], -(-len(shown) // 16)
    ax.set_xticks(lines, minor=True)
    ax.set_xticks(lines[::step], range(first, first + len(shown), step))
    ax.grid(which="both", color="0.85")
    ax.tick_params(axis="x", which="both", length=0)
    ax.set(xlim=(lines[0], shown[-1][1] / quarter), xlabel="bar", ylabel="pitch")
    ax.set_title(title, loc="left")
    return min(pitches, default=48), max(pitches, default=72)


def _pitch_axis(ax, low: int, high: int) -> None:
    named = {0: "C", 4: "E", 7: "G"} if high - low <= 40 else {0: "C"}
    ticks = [p for p in range(low - 2, high + 3) if p % 12 in named]
    ax.set_yticks(ticks, [f"{named[p % 12]}{p // 12 - 1}" for p in ticks])
    ax.set_ylim(low - 2.5, high + 2.5)


def piano_roll(score, ax=None, title: str = "", bars: int | tuple[int, int] | None = None) -> plt.Axes:
    """One rectangle a note, one colour a voice; time in bars counted from 1, pitch by name (C4 is middle C).

    bars: how many bars to show from the start, or (first, last), both included; None shows all. Raises ValueError if
    the score has no such bar.
    """
    ax = ax or plt.subplots(figsize=(10, 3.6))[1]
    _pitch_axis(ax, *_draw(ax, score, title, bars))
    if ax.patches:
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return ax


def piano_rolls(scores, titles, columns: int = 3, bars: int | None = None) -> plt.Figure:
    """A grid of piano rolls on one pitch axis, `bars` of each. The figure is closed in pyplot, so that a cell shows it
    only once."""
    columns = min(columns, len(scores))
    fig, axes = plt.subplots(-(-len(scores) // columns), columns, sharey=True, squeeze=False, layout="constrained")
    fig.set_size_inches(4.2 * columns + 1, 2.8 * len(axes))
    ranges = [_draw(ax, *pair, bars) for ax, pair in zip(axes.flat, zip(scores, titles, strict=True), strict=False)]
    _pitch_axis(axes[0, 0], min(r[0] for r in ranges), max(r[1] for r in ranges))
    handles = {name: h for ax in axes.flat for h, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    if handles:
        fig.legend(handles.values(), handles, loc="outside right upper", frameon=False)
    for ax in axes[:, 1:].flat:
        ax.set_ylabel("")
    for ax in axes.flat[len(scores):]:
        ax.set_axis_off()
    plt.close(fig)
    return fig


def redraw(fig: plt.Figure, number: int, score, title: str, bars: int | None = None) -> None:
    """Put another score into one of `piano_rolls`, in half the time of a new figure. The pitch axis grows where it must
    and never shrinks."""
    if fig.get_layout_engine():
        fig.draw_without_rendering()  # lays it out, once and for all
        fig.set_layout_engine("none")
    ax, (low, high) = fig.axes[number], fig.axes[0].get_ylim()
    label = ax.get_ylabel()
    ax.clear()
    lowest, highest = _draw(ax, score, title, bars)
    ax.set_ylabel(label)
    _pitch_axis(fig.axes[0], min(lowest, round(low + 2.5)), max(highest, round(high - 2.5)))


def png(fig: plt.Figure, dpi: int = 130) -> bytes:
    """The figure as PNG with a palette, a third of the size of the same in true colour."""
    from PIL import Image

    buffer, small = io.BytesIO(), io.BytesIO()
    fig.savefig(buffer, dpi=dpi)
    Image.open(buffer).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(small, "PNG")
    return small.getvalue()


def _lines(notes) -> list[list[tuple[int, int, list[int]]]]:
    """Notes as lines of (start, end, pitches): equal spans form a chord, overlapping ones go to a further line."""
    chords, lines = {}, []
    for n in notes:
        chords.setdefault((n.start, n.end), set()).add(n.pitch)
    for (start, end), pitches in sorted(chords.items(), key=lambda c: (c[0][0], -max(c[1]))):
        line = next((x for x in lines if x[-1][1] <= start), [])
        if not line:
            lines.append(line)
        line.append((start, end, sorted(pitches)))
    return lines


def _staves(score) -> list[tuple[list[str], bool, list]]:
    """(names, drums?, lines) of each staff: S A and T B for just four monophonic voices, else one staff a track."""
    parts = [([name], track.is_drum, _lines(track.notes)) for name, _, track in _voices(score)]
    if len(parts) == 4 and all(len(lines) == 1 and not drums for _, drums, lines in parts):
        return [(a[0] + b[0], False, a[2] + b[2]) for a, b in (parts[:2], parts[2:])]
    return parts or [([""], False, [[]])]


def _split(at: int, length: int, metre: tuple[int, int]):
    """Lengths in 16ths that make up a note or rest at this place of the bar, each one writable and fair to the beat."""
    unit = max(1, 16 // metre[1])
    beat = 3 * unit if metre[0] % 3 == 0 and metre[1] >= 8 else min(4, unit)
    while length:
        off = at % beat
        syncopated = length == beat == 2 * off == 4  # a quarter between two beats stays whole
        room = min(length, beat - off) if off and not syncopated else length
        part = max(v for v in (1, 2, 3, 4, 6, 8, 12, 16, 24)
                   if v <= room and (off or room < beat or v % beat == 0 or v == room and beat % 3))
        yield part
        at, length = at + part, length - part


def _spell(pitch: int, fifths: int) -> dict:
    """Step, accidental and octave of a MIDI pitch, as music21 takes them.

    The twelve names are those from two fifths below the scale of the key to four above it. Given the key music21 finds,
    this names 99.95 % of the 12,984 notes of 56 chorales of its corpus as printed.
    """
    place = fifths - 2 + (7 * pitch - fifths + 2) % 12  # on the line of fifths, C = 0
    alter = (place + 1) // 7
    return {"step": "FCGDAEB"[(place + 1) % 7], "accidental": alter, "octave": (pitch - alter) // 12 - 1}


def _fill(line, bar, make):
    """What a line has in this bar, as music21 elements in order: notes, cut and tied where needed, and rests."""
    from music21 import note, tie

    (start, end, metre), at = bar, bar[0]
    for begin, stop, pitches in [*(c for c in line if c[0] < end and c[1] > start), (end, end, [])]:
        yield from (note.Rest(quarterLength=x / 4) for x in _split(at - start, max(begin, at) - at, metre))
        at = max(begin, at)
        for length in _split(at - start, min(stop, end) - at, metre):
            element = make(pitches)
            element.quarterLength = length / 4
            if begin < at or at + length < stop:
                element.tie = tie.Tie("start" if at == begin else "stop" if at + length == stop else "continue")
            yield element
            at += length


def _accidentals(measure, signature) -> None:
    """Print an accidental where a pitch departs from the key, or from the last note on its line in this bar."""
    seen = {}
    for n in sorted(measure.recurse().notes, key=lambda n: n.offset):
        tied = n.tie is not None and n.tie.type != "start"
        for p in n.pitches:
            usual = signature.accidentalByStep(p.step)
            before = seen.get((p.step, p.octave), usual.alter if usual else 0)
            p.accidental.displayStatus = not tied and p.alter != before
            if not tied:
                seen[p.step, p.octave] = p.alter


def _part(names, drums, lines, bars, fifths):
    """One staff as a music21 part, bar by bar."""
    from music21 import chord, clef, key, meter, note, percussion, pitch, stream

    def make(pitches):
        if drums:  # shifted so that the bass drum lies in the lowest space
            heads = [note.Unpitched("{step}{octave}".format(**_spell(p + 29, 0))) for p in pitches]
            return percussion.PercussionChord(heads) if len(heads) > 1 else heads[0]
        heads = [note.Note(pitch.Pitch(**_spell(p, fifths))) for p in pitches]
        return chord.Chord(heads) if len(heads) > 1 else heads[0]

    mean = np.mean([p for line in lines for c in line for p in c[2]] or [60])
    part, signature = stream.Part(), key.KeySignature(0 if drums else fifths)
    for i, bar in enumerate(bars):
        measure, rests = stream.Measure(number=i + 1), set()
        if i == 0:
            measure.clef = clef.PercussionClef() if drums else clef.TrebleClef() if mean >= 60 else clef.BassClef()
            measure.keySignature = signature
        if i == 0 or bar[2] != bars[i - 1][2]:
            measure.timeSignature = meter.TimeSignature(f"{bar[2][0]}/{bar[2][1]}")
        for k, line in enumerate(lines):
            measure.insert(0, voice := stream.Voice(id=str(k + 1)))
            for x in _fill(line, bar, make):
                voice.append(x)
                if not x.isRest and len(names) == 2:
                    x.stemDirection = "down" if k else "up"
                elif x.isRest and k:  # a rest of two voices is printed once; inside a track the upper line has them
                    x.style.hideObjectOnPrint = len(names) == 1 or (x.offset, x.quarterLength) in rests
                rests |= {(x.offset, x.quarterLength)} if x.isRest else set()
        _accidentals(measure, signature)
        part.append(measure)
    measure.rightBarline = "final"
    return part.makeBeams(setStemDirections=False)


def musicxml(score) -> str:
    """The score as MusicXML on the 16th grid (finer rhythm is rounded), key signature and spelling guessed."""
    from music21 import instrument, layout, note, stream
    from music21.musicxml.m21ToXml import ScoreExporter

    score, fifths, whole = score.resample(4, 1), 0, stream.Score()
    pitched = [n for t in score.tracks if not t.is_drum for n in t.notes]
    if pitched:
        found = stream.Stream([note.Note(n.pitch, quarterLength=n.duration / 4) for n in pitched]).analyze("key")
        fifths = (found.sharps + 5) % 12 - 5
    staves = _staves(score)
    for i, staff in enumerate(staves, 1):
        whole.insert(0, part := _part(*staff, _bars(score), fifths))
        part.insert(0, player := instrument.Instrument())
        player.partId, part.partName = f"P{i}", staff[0][0] if len(staff[0]) == 1 < len(staves) else ""
    if len(staves[0][0]) == 2:
        whole.insert(0, layout.StaffGroup(list(whole.parts), symbol="brace", barTogether=True))
    root = ScoreExporter(whole, makeNotation=False).parse()
    for tag in ("movement-title", "identification"):  # music21's placeholders
        root.remove(root.find(tag))
    return ElementTree.tostring(root, encoding="unicode")


@cache
def _engraver():
    import verovio

    verovio.enableLog(verovio.LOG_ERROR)
    toolkit = verovio.toolkit()
    toolkit.setOptions({
        "header": "none", "footer": "none", "scale": 45, "pageWidth": 2100, "pageHeight": 60000, "pageMarginTop": 20,
        "adjustPageHeight": True, "spacingStaff": 14, "staffLineWidth": 0.2, "xmlIdChecksum": True,
        "svgCss": "svg {background: white}",  # also in a dark notebook
    })
    return toolkit


def notation(score, bars: int | None = None) -> str:
    """The score, or its first `bars`, as one SVG image 945 pixels wide: two staves for four voices, else one staff a
    track.

    The page ends after 27,000 pixels, some 500 bars of a chorale: cut longer music into pieces.
    """
    score = score.clip(0, _bars(score)[:bars][-1][1], clip_end=True) if bars else score
    engraver = _engraver()
    engraver.loadData(musicxml(score))
    return engraver.renderToSVG(1)


def show_notation(score) -> SVG:
    return SVG(notation(score))


@cache
def _synthesizer():
    folder = importlib.util.find_spec("pretty_midi").submodule_search_locations[0]  # found, not imported
    return symusic.Synthesizer(Path(folder) / "TimGM6mb.sf2", OVERSAMPLING * RATE, 4)


def waveform(score) -> tuple[np.ndarray, int]:
    """(samples, rate): the score as float32 mono, peak 0.9, ending ROOM seconds after the last note.

    Every pitched track sounds as the same electric piano, velocities are ignored, notes above C8 are silent. A score
    without notes gives a second of silence.
    """
    if not any(t.notes for t in score.tracks):
        return np.zeros(RATE, np.float32), RATE
    score = score.copy()
    for track in score.tracks:
        track.program = 0 if track.is_drum else PIANO
    dry = _synthesizer().render(score, stereo=False)[0]
    time = np.arange(int(ROOM * RATE)) / RATE
    room = np.random.default_rng(0).standard_normal(len(time)) * 10 ** (-3 * time / ROOM)  # decaying noise
    room *= 0.3 / np.linalg.norm(room)
    room[0] += 1
    length = len(dry) // OVERSAMPLING + len(room)
    size = 1 << length.bit_length()
    spectrum = np.fft.rfft(dry, OVERSAMPLING * size)[:size // 2 + 1]  # the lower part of the band: back to RATE
    wet = np.fft.irfft(spectrum * np.fft.rfft(room, size))[:length]
    return (0.9 / (np.abs(wet).max() or 1) * wet).astype(np.float32), RATE


def _ogg(samples: np.ndarray, rate: int) -> bytes:
    import soundfile

    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", rate, 1, format="OGG", subtype="VORBIS") as file:
        for i in range(0, len(samples), rate):  # libsndfile's Vorbis encoder crashes on a single write of two minutes
            file.write(samples[i:i + rate])
    return buffer.getvalue()


def save(score, path: str | Path) -> None:
    """Write MusicXML where the name ends in .musicxml, else MIDI; atomic."""
    is_xml = Path(path).suffix == ".musicxml"
    atomic(path, (lambda p: p.write_text(musicxml(score))) if is_xml else score.dump_midi)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
:root {{color-scheme: light dark}}
body {{font: 16px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2rem auto; padding: 0 1rem}}
h1, h2 {{font-weight: 600; line-height: 1.2}}
h2 {{margin-top: 2.5rem; padding-top: 1rem; border-top: 1px solid #8884}}
figure {{margin: 1.5rem 0 2rem}}
figcaption {{display: flex; flex-wrap: wrap; gap: .3rem 1rem; align-items: center}}
figcaption b {{flex: 1 1 14rem}}
audio {{height: 36px; width: 320px}}
img {{display: block; max-width: 100%; margin-top: .5rem; background: white; border-radius: 4px}}
@media (prefers-color-scheme: dark) {{img {{filter: invert(.88) hue-rotate(180deg)}}}}
</style></head><body><h1>{title}</h1><p>{intro}</p>
{body}</body></html>
"""


def page(path: str | Path, title: str, intro: str, sections: dict[str, list[tuple[str, symusic.Score]]]) -> None:
    """Write one HTML file that needs no kernel and no network: for each (caption, score) of each section a player, the
    piano roll, the notation and a link that saves its MIDI, all inside the file. Atomic.

    Only the first NOTATED bars of a score are notated: they take 20 KB each.
    """
    body = []
    for heading, items in sections.items():
        body.append(f"<h2>{escape(heading)}</h2>")
        for caption, score in items:
            figure = piano_rolls([score], [""])
            figure.set_size_inches(9.6, 2.4)
            name = re.sub(r"[^\w.,=+-]+", "_", caption)
            body.append(
                f"<figure><figcaption><b>{escape(caption)}</b>{player(score)}"
                f'<a download="{name}.mid" href="{_uri("audio/midi", score.dumps_midi())}">MIDI</a></figcaption>'
                f'<img alt="piano roll" src="{_uri("image/png", png(figure, 100))}">'
                f'<img alt="notation" src="{_uri("image/svg+xml", notation(score, NOTATED).encode())}"></figure>')
    text = PAGE.format(title=escape(title), intro=escape(intro), body="\n".join(body))
    atomic(path, lambda p: p.write_text(text))


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def save_ogg(score, path: str | Path) -> Path:
    """Write the sound of the score as OGG Vorbis, about 6 KB a second; atomic."""
    data = _ogg(*waveform(score))
    atomic(path, lambda p: p.write_bytes(data))
    return Path(path)


def player(score, autoplay: bool = False) -> str:
    """An <audio> element with the sound inside."""
    return f'<audio controls{" autoplay" * autoplay} src="{_uri("audio/ogg", _ogg(*waveform(score)))}"></audio>'


def audio(score) -> Audio:
    """A player with the sound inside the notebook."""
    player = Audio(_ogg(*waveform(score)))
    player.mimetype = "audio/ogg"
    return player
