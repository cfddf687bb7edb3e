"""A score seen and heard: piano roll, sound, and the page of samples, all offline. No function changes its score.

A track is known by its program (`named_voices`), so it keeps name, colour and order however the tracks are sorted.
Sound comes from `midirenderer`, always at 48 kHz: symusic's synthesizer plays most programs out of tune, by up to two
octaves (its issue 55), and hangs or crashes on some.
"""

import base64
import importlib.util
import io
import re
import wave
from collections import ChainMap
from functools import cache
from html import escape
from pathlib import Path

import matplotlib.pyplot as plt
import midirenderer
import numpy as np
import seaborn as sns
import symusic
from IPython import get_ipython
from IPython.display import HTML, SVG
from matplotlib_inline.backend_inline import set_matplotlib_formats

from mtxlib.files import atomic
from mtxlib.music.notation import bars_of, musicxml, named_voices, notation, short

PALETTE = [sns.color_palette("colorblind")[i] for i in (0, 1, 2, 4, 3, 5, 6, 7, 8, 9)]  # four that differ first
DARKER = sns.husl_palette(120, l=0.4)  # for what has more than ten tracks
COLOURS = [*PALETTE, *(DARKER[47 * i % 120] for i in range(120))]  # 47: neighbours lie far apart on the circle
BAND = 0.22  # share of a piano roll's height for the drums, where there are any
GAP = 0.06  # quarters left free after a rectangle of the piano roll
RATE = 24000  # samples a second, half of what the renderer makes
HALF_BAND = np.sinc(np.arange(-15, 16) / 2) * np.hamming(31) / 2  # low-pass filter before every second sample goes
CHANNELS = 15  # of MIDI's 16 one is the drums'
LOUDNESS = 0.1  # root mean square of what sounds
TAIL = 1.0  # seconds in which the last notes fade
NOTATED = 16  # bars of a long score that a page notates


def set_style() -> None:
    """The look of every figure; a notebook calls it once."""
    sns.set_theme(style="ticks", palette=PALETTE, rc={"axes.spines.top": False, "axes.spines.right": False})
    if get_ipython():  # music21 sets this when it is imported: here it holds for all figures from the start
        set_matplotlib_formats("retina")


def voice_colours(n: int) -> list[tuple[float, float, float]]:
    """n distinct colours, 130 at most: the palette as far as it goes, then darker ones."""
    return COLOURS[:n]


def _draw(ax, score, voices, title, bars) -> dict[int, tuple]:
    """Draw the notes and the bars; return (handle, name) for the legend by place."""
    grid, quarter, entries = bars_of(score), score.tpq, {}
    first, last = bars if isinstance(bars, tuple) else (1, bars or len(grid))
    shown = grid[first - 1:last]
    if first < 1 or not shown:
        raise ValueError(f"bars: expected bars between 1 and {len(grid)}, got {bars}")
    for name, place, track in voices:
        notes = [n for n in track.notes if n.start < shown[-1][1] and n.end > shown[0][0]]
        times, pitches = [n.start / quarter for n in notes], [n.pitch for n in notes]
        if notes and track.is_drum:
            rows = sorted(set(pitches))
            ax.fill_between([0, 1], 0, BAND, color="0.94", linewidth=0, zorder=0, transform=ax.transAxes)
            handle, = ax.plot(times, [BAND * (rows.index(p) + 0.5) / len(rows) for p in pitches], "x", ms=3,
                              color=COLOURS[place], transform=ax.get_xaxis_transform())
        elif notes:
            widths = [n.duration / quarter - min(GAP, n.duration / quarter / 4) for n in notes]
            handle = ax.barh(pitches, widths, left=times, height=0.8, color=COLOURS[place], alpha=0.85, linewidth=0,
                             zorder=2)
        if notes:
            entries[place] = handle, short(name)
    if not entries:
        ax.text(0.5, 0.5, "no notes", transform=ax.transAxes, ha="center", va="center")
    lines, step = [bar[0] / quarter for bar in shown], -(-len(shown) // 16)
    ax.set_xticks(lines, minor=True)
    ax.set_xticks(lines[::step], range(first, first + len(shown), step))
    ax.grid(which="both", color="0.85")
    ax.tick_params(axis="x", which="both", length=0)
    place = ax.get_subplotspec()  # None where a caller's axes are no subplot
    ax.set(xlim=(lines[0], shown[-1][1] / quarter), xlabel="bar",
           ylabel="pitch" if place is None or place.is_first_col() else "")
    ax.set_title(title, loc="left")
    return entries


def _pitch_axis(ax, scores, known=()) -> tuple[int, int]:
    """Make room for the pitches of these scores and those `known`, above the band of the drums if there are any, and
    name them; return the lowest and the highest."""
    tracks = [t for score in scores for t in score.tracks if t.notes]
    pitches = [*known, *(n.pitch for t in tracks if not t.is_drum for n in t.notes)] or [48, 72]
    low, high = min(pitches), max(pitches)
    named = {0: "C", 4: "E", 7: "G"} if high - low <= 40 else {0: "C"}
    ticks = [p for p in range(low - 2, high + 3) if p % 12 in named]
    ax.set_yticks(ticks, [f"{named[p % 12]}{p // 12 - 1}" for p in ticks])
    band = (high - low + 5) * BAND / (1 - BAND) if any(t.is_drum for t in tracks) else 0
    ax.set_ylim(low - 2.5 - band, high + 2.5)
    return low, high


def _legend(owner, entries: dict, height: float, **where) -> None:
    """Names in the order of the places; many are in small print, and in columns no taller than `height` inches."""
    if entries:
        small = len(entries) > len(PALETTE)
        owner.legend(*zip(*(entries[place] for place in sorted(entries)), strict=True), frameon=False,
                     fontsize="x-small" if small else "medium",
                     ncols=-(-len(entries) // max(1, int(height * (6 if small else 4.5)))), **where)


def piano_roll(score, ax=None, title: str = "", bars: int | tuple[int, int] | None = None) -> plt.Axes:
    """One rectangle a note, one colour a voice; pitch by name (C4 is middle C); drums are crosses in a band below, a
    row for each drum. `bars`: how many from the start, or (first, last), counted from 1, both included. ValueError if
    the score has no such bar."""
    ax = ax or plt.subplots(figsize=(10, 3.6))[1]
    entries = _draw(ax, score, named_voices(score)[0], title, bars)
    _pitch_axis(ax, [score])
    _legend(ax, entries, ax.figure.get_figheight(), loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def piano_rolls(scores, titles, columns: int = 3, bars: int | None = None) -> plt.Figure:
    """A grid of piano rolls on one pitch axis, `bars` of each; a track has one name and colour in all of them. The
    figure is closed in pyplot, so that a cell shows it only once."""
    columns = min(columns, len(scores))
    fig, axes = plt.subplots(-(-len(scores) // columns), columns, sharey=True, squeeze=False, layout="constrained")
    fig.set_size_inches(4.2 * columns + 1, 2.8 * len(axes))
    rolls = list(zip(scores, named_voices(*scores), titles, strict=True))
    entries = ChainMap(*(_draw(ax, *roll, bars) for ax, roll in zip(axes.flat, rolls, strict=False)))
    fig.scores, fig.pitches = list(scores), _pitch_axis(axes[0, 0], scores)
    _legend(fig, entries, fig.get_figheight(), loc="outside right upper")
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
    scores = [*fig.scores, score]
    fig.axes[number].clear()
    _draw(fig.axes[number], score, named_voices(*scores)[-1], title, bars)
    fig.pitches = _pitch_axis(fig.axes[0], scores, fig.pitches)


def png(fig: plt.Figure, dpi: int = 130) -> bytes:
    """The figure as PNG with a palette, a third of the size of the same in true colour."""
    from PIL import Image

    buffer, small = io.BytesIO(), io.BytesIO()
    fig.savefig(buffer, dpi=dpi)
    Image.open(buffer).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(small, "PNG")
    return small.getvalue()


@cache
def _soundfont() -> bytes:
    folder = importlib.util.find_spec("pretty_midi").submodule_search_locations[0]  # found, not imported
    return Path(folder, "TimGM6mb.sf2").read_bytes()


def waveform(score) -> tuple[np.ndarray, int]:
    """(samples, rate): the score as float32 mono, ending TAIL seconds after the last note, with the file's programs,
    drums, velocities, tempos and pedals; LOUDNESS while something sounds, unless a peak would exceed 0.9. A score
    without notes gives a second of silence."""
    tracks = [t for t in score.tracks if t.notes]
    if not tracks:
        return np.zeros(RATE, np.float32), RATE
    score, sound, end = score.copy(), 0, max(n.end for t in tracks for n in t.notes)
    tempos = sorted((t for t in score.tempos if t.time <= end), key=lambda t: t.time) or [symusic.Tempo(0, 120)]
    # The renderer stops dead at the last event: a tempo that changes nothing lets the last notes ring. What else stands
    # in the score, such as the end of a window, must not come later.
    score.markers, score.time_signatures = [], []
    score.tempos = [*tempos, symusic.Tempo(end + round(TAIL * tempos[-1].qpm / 60 * score.tpq), tempos[-1].qpm)]
    for i in range(0, len(tracks), CHANNELS):  # more tracks would share a channel, and with it the program
        score.tracks = tracks[i:i + CHANNELS]
        with wave.open(io.BytesIO(midirenderer.render_wave_from(_soundfont(), score.dumps_midi()))) as file:
            stereo = np.frombuffer(file.readframes(file.getnframes()), np.int16).reshape(-1, 2)
        sound = sound + np.convolve(stereo[:, 0].astype(np.float32) + stereo[:, 1], HALF_BAND, "same")[::2]
    sound[-int(TAIL * RATE):] *= np.linspace(1, 0, int(TAIL * RATE))
    size = np.abs(sound)
    level = np.sqrt(np.mean(size[size >= size.max() / 100] ** 2))
    return (sound * min(LOUDNESS / max(level, 1e-9), 0.9 / max(size.max(), 1e-9))).astype(np.float32), RATE


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


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>
:root {{color-scheme: light dark}}
body {{font: 16px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2rem auto; padding: 0 1rem}}
figure {{margin: 1.5rem 0 2rem}}
figcaption {{display: flex; flex-wrap: wrap; gap: .3rem 1rem; align-items: center}}
figcaption b {{flex: 1 1 14rem}}
audio {{height: 36px; width: 320px}}
img {{display: block; max-width: 100%; margin-top: .5rem; background: white; border-radius: 4px}}
@media (prefers-color-scheme: dark) {{img {{filter: invert(.88) hue-rotate(180deg)}}}}
</style><h1>{title}</h1><p>{intro}</p>
{body}</html>
"""


def page(path: str | Path, title: str, intro: str, sections: dict[str, list[tuple[str, symusic.Score]]]) -> None:
    """Write one HTML file that needs no kernel and no network: for each (caption, score) of each section a player, the
    piano roll, the notation of the first NOTATED bars (20 KB each) and a link that saves its MIDI, all inside the file.
    Atomic."""
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


def player(score, autoplay: bool = False) -> str:
    """An <audio> element with the sound inside."""
    return f'<audio controls{" autoplay" * autoplay} src="{_uri("audio/ogg", _ogg(*waveform(score)))}"></audio>'


def audio(score) -> HTML:
    return HTML(player(score))


def show_notation(score) -> SVG:
    return SVG(notation(score))
