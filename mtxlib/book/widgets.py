"""The widgets of notebook 06: `Morph` one piece into another, `Compose` from the prior, `Steer` the attributes of a
window; `play` shows all three.

What is unusual: a callback never raises. What went wrong is one sentence in the status line, and what was shown stays.
Uploads are parsed in a process of their own within limits of time, so a hostile file costs seconds and no more.
"""

from __future__ import annotations  # symusic.Score is no class: `Path | Score` cannot be evaluated

import logging
import re
from collections.abc import Iterable
from contextlib import contextmanager, redirect_stdout
from functools import partial
from html import escape
from io import StringIO
from itertools import count

import ipywidgets as widgets
import numpy as np
import torch
from ipywidgets import Layout
from symusic import Score
from torch import Tensor

from mtxlib.files import brief
from mtxlib.latent.interpolate import mix
from mtxlib.music import display, notation
from mtxlib.music.corpus import Piece
from mtxlib.music.metrics import ATTRIBUTES
from mtxlib.music.readers import KINDS, read_safely
from mtxlib.music.score import TONICS, bar_starts, cut
from mtxlib.run import Run, load_run

STEPS = 21  # positions of the slider from A to B
TOP_P = 0.95  # where the temperature is not 0
REACH, FINE = 3.0, 0.25  # of the sliders of attributes, see `latent.attributes.Directions.move`
ROW = Layout(flex_flow="row wrap", align_items="center", grid_gap="4px 16px")
WIDE = 13.6, 3  # inches of a picture
STYLE = """<style>.mtx audio {height: 36px; width: 320px; display: block}
.mtx img {background: white; border-radius: 4px; height: auto}</style>"""


def app(run_dir: str) -> widgets.Widget:
    """What `mtx app` shows: the widgets with pieces of the run, or one sentence why there are none."""
    with telling(sentence := widgets.HTML()), redirect_stdout(StringIO()):
        return play(run := load_run(run_dir), run.kept_pieces())
    return sentence


def play(run: Run, pieces: list[Piece]) -> widgets.Tab:
    """The widgets, one a tab; they offer these pieces. Steering, whose directions may have to be found first, is made
    when its tab is opened."""
    later = widgets.HTML(finding := "Finding what to steer by in the training split; the run remembers it …")
    tab = widgets.Tab([Morph(run, pieces), Compose(run, pieces)] + [later] * follows_bars(run),
                      titles=["Morph", "Compose", "Steer"])

    def opened(change: dict) -> None:
        if tab.children[change["new"]] is later:
            with telling(later, finding):
                tab.children = [*tab.children[:2], Steer(run, pieces)]

    tab.observe(opened, "selected_index")
    return tab


def say(line: widgets.HTML, text: str, colour: str = "inherit") -> None:
    line.value = f'<span style="color: {colour}">{escape(text)}</span>'


@contextmanager
def telling(line: widgets.HTML, doing: str = ""):
    """Says in `line` what is being done and, if it cannot be, why in one sentence: a mistake of the user's as it is
    told, any other error with its kind, and the rest in the log."""
    say(line, doing)
    said = line.value
    try:
        yield
        if line.value == said:  # nothing more has been said
            say(line, "")
    except (ValueError, OSError) as e:
        say(line, str(e), "#b3261e")
    except Exception as e:
        logging.getLogger(__name__).exception("%s failed", doing or "a widget")
        say(line, f"This went wrong: {brief(e)}", "#b3261e")


def follows_bars(run: Run) -> bool:
    return run.config.model.bottleneck == "rows"


def button(text: str, icon: str, call) -> widgets.Button:
    made = widgets.Button(description=text, icon=icon, layout=Layout(width="auto"))
    made.on_click(lambda _: call())
    return made


class Studio(widgets.VBox):
    """What the three share: settings, a status line, a picture, a player, the notation, and saving what is shown."""

    def __init__(self, run: Run, temperature: float = 0.0):
        self.run, self.score, self.name, self.ready = run, None, "", {}
        self.temperature = widgets.FloatSlider(temperature, min=0, max=1.5, step=0.1, continuous_update=False,
                                               description="temperature", style={"description_width": "100px"},
                                               layout=Layout(width="300px"))
        self.seed = widgets.BoundedIntText(0, min=0, max=2**31 - 1, description="seed",
                                         style={"description_width": "40px"}, layout=Layout(width="140px"))
        self.status, self.sound = widgets.HTML(), widgets.HTML()
        self.picture = widgets.Image()
        self.notation = widgets.Image(format="svg+xml", layout=Layout(flex="0 0 auto"))
        self.plays = widgets.Checkbox(description="play each change", indent=False, layout=Layout(width="150px"))
        self.plays.observe(lambda _: self.ready.clear(), "value")
        saves = [button(f"Save {kind}", "download", partial(self.save, suffix))
                 for kind, suffix in (("MIDI", ".mid"), ("MusicXML", ".musicxml"))]
        self.result = widgets.VBox([self.picture, widgets.HBox([self.sound, self.plays, *saves], layout=ROW),
                                    widgets.VBox([self.notation], layout=Layout(max_height="460px", overflow="auto",
                                                                              align_items="flex-start"))],
                                   layout=Layout(display="none", grid_gap="8px"))
        super().__init__(layout=Layout(max_width="1200px", grid_gap="8px", padding="8px 0"))
        self.add_class("mtx")

    def arrange(self, *controls: widgets.Widget) -> None:
        self.children = [widgets.HTML(STYLE, layout=Layout(display="none")), *controls, self.status, self.result]

    def telling(self, doing: str = ""):
        return telling(self.status, doing)

    def watch(self, *dials: widgets.Widget) -> None:
        for dial in dials:
            dial.observe(self.turn, "value")

    def turn_to(self, dials: Iterable[widgets.Widget], values: list[float]) -> None:
        """Set several dials, and follow them once."""
        for dial, value in zip(dials, values, strict=True):
            dial.unobserve(self.turn, "value")
            dial.value = value
        self.watch(*dials)
        self.turn()

    def present(self, score: Score, name: str, draw, bars: int | None = None) -> None:
        """Show a score once its picture, sound and notation are all there: what is seen is what is heard. `name` tells
        it from all others, its files too; `draw` pictures it."""
        if name not in self.ready:
            self.ready[name] = display.player(score, self.plays.value), notation.notation(score, bars).encode(), draw()
        self.sound.value, self.notation.value, self.picture.value = self.ready[name]
        self.score, self.name = score, re.sub(r"[^\w.,=+-]+", "_", name.replace("–", "-"))
        self.result.layout.display = ""

    def save(self, suffix: str) -> None:
        """Write what is shown into the run's samples, under a name that is free."""
        with self.telling():
            folder = self.run.folder / "samples"
            folder.mkdir(exist_ok=True)
            paths = (folder / f"{self.name[:150]}{f'_{n}' if n > 1 else ''}{suffix}" for n in count(1))
            path = next(path for path in paths if not path.exists())
            display.save(self.score, path)
            say(self.status, f"Saved as {path}")


class Chooser(widgets.HBox):
    """A piece of those offered, or an uploaded one, and a window of it. `changed` is called when either is another."""

    def __init__(self, studio: Studio, pieces: list[Piece], label: str, index: int = 0, nothing: str = ""):
        self.studio, self.run, self.changed, self.score = studio, studio.run, lambda: None, None
        self.music = {f"{p.name} · {p.key} · {p.bars} bars": (p.name, p)
                      for p in pieces if p.bars >= self.run.n_bars}
        if not self.music:
            raise ValueError(f"pieces: expected one of {self.run.n_bars} bars or more, got none in {len(pieces)}")
        self.music = ({nothing: (nothing, None)} if nothing else {}) | self.music
        self.piece = widgets.Dropdown(options=list(self.music), index=min(index, len(self.music) - 1),
                                      description=label, layout=Layout(width="350px"))
        self.bars = widgets.Dropdown(layout=Layout(width="120px"))
        self.upload = widgets.FileUpload(accept=",".join(KINDS), description="your file", layout=Layout(width="auto"))
        self.pick()
        self.piece.observe(self.pick, "value")
        self.bars.observe(lambda _: self.changed(), "value")
        self.upload.observe(self.take, "value")
        super().__init__([self.piece, self.bars, self.upload], layout=ROW)

    def pick(self, _=None) -> None:
        with self.studio.telling():
            n, (self.name, music) = self.run.n_bars, self.music[self.piece.value]
            self.score = music and self.run.score(music)
            self.starts = bar_starts(self.score) if music else []
            self.bars.options = [(f"bars {bar + 1}–{bar + n}", bar) for bar in range(len(self.starts) - n)]
            self.bars.index = 0 if music else None
            self.bars.layout.display = "" if music else "none"
            self.changed()

    def take(self, change: dict) -> None:
        """Read an upload; if it is no music for this run, say why and leave everything as it was."""
        for file in change["new"]:
            name = file["name"]
            with self.studio.telling(f"Reading {name} …"):
                score = self.read(name, bytes(file["content"]))
                self.music = {name: (name, score)} | {k: m for k, m in self.music.items() if k != name}
                self.piece.options = list(self.music)
                self.piece.value = name
                self.pick()  # also where a file of this name was there before

    def read(self, name: str, content: bytes) -> Score:
        """In normal form. Raises ValueError that names the file."""
        try:
            score = self.run.score(read_safely(content))
        except ValueError as e:
            raise ValueError(f"{name}: {re.sub('^the (file|score): ', '', str(e))}") from e
        if (bars := len(bar_starts(score)) - 1) < self.run.n_bars:
            raise ValueError(f"{name}: expected the {self.run.n_bars} bars of a window or more, got {bars}")
        return score

    @property
    def window(self) -> Score | None:
        return self.score and cut(self.score, self.starts, self.bars.value, self.run.n_bars)

    @property
    def place(self) -> str:
        return f"{self.name} {self.bars.label}"


class Morph(Studio):
    """From A to B by a slider, or bar by bar."""

    def __init__(self, run: Run, pieces: list[Piece]):
        super().__init__(run)
        self.a, self.b = Chooser(self, pieces, "A"), Chooser(self, pieces, "B", 1)
        self.steps = [(round(float(alpha), 2),) for alpha in np.linspace(0, 1, STEPS)]
        self.alpha = widgets.SelectionSlider(options=[(f"α {a:.2f}", a) for a, in self.steps], value=0.5,
                                             description="A to B", layout=Layout(width="640px"))
        self.bars = [widgets.FloatSlider(min=0, max=1, step=0.05, orientation="vertical", continuous_update=False,
                                         layout=Layout(height="130px")) for _ in range(run.n_bars)]
        columns = [widgets.VBox([widgets.Label(f"bar {i}"), dial, button("swap", "exchange", partial(self.swap, dial))],
                                layout=Layout(align_items="center")) for i, dial in enumerate(self.bars, 1)]
        line = np.linspace(0, 1, run.n_bars).round(2).tolist()
        presets = widgets.VBox([widgets.Label("0 is A, 1 is B"),
                                button("A becomes B", "arrow-right", partial(self.turn_to, self.bars, line)),
                                button("B becomes A", "arrow-left", partial(self.turn_to, self.bars, line[::-1]))])
        self.mode = widgets.ToggleButtons(options=[("whole window", False), ("bar by bar", True)],
                                          style={"button_width": "130px"})
        self.mode.layout.display = "" if follows_bars(run) else "none"
        self.by_bar = widgets.HBox([*columns, presets], layout=Layout(display="none", grid_gap="24px"))
        self.arrange(widgets.HBox([self.a, self.b], layout=ROW),
                     widgets.HBox([self.temperature, self.seed, self.mode], layout=ROW), self.alpha, self.by_bar)
        self.a.changed = self.b.changed = self.prepare
        for dial in (self.temperature, self.seed):
            dial.observe(self.prepare, "value")
        self.watch(self.alpha, self.mode, *self.bars)
        self.key, self.mixes = None, {}
        self.prepare()

    @property
    def position(self) -> tuple[float, ...]:
        """Where the slider, or those of the bars, stand."""
        return tuple(dial.value for dial in self.bars) if self.mode.value else (self.alpha.value,)

    def prepare(self, _=None) -> None:
        """Begin anew if A, B or a setting has changed. Only what is shown is decoded, for the rest may not be asked
        for; where notes are drawn by chance all is, since one seed draws them all."""
        with self.telling("Decoding …"):
            windows = [self.a.window, self.b.window]
            key = (*windows, self.temperature.value, self.seed.value)
            if key == self.key:
                return
            z = self.run.encode_windows(windows)
            mixes = self.decode(z, self.steps if self.temperature.value else [self.position])
            titles = [f"A: {self.a.place}", "", f"B: {self.b.place}"]
            figure = display.piano_rolls([windows[0], *windows], titles, bars=self.run.n_bars)  # see `draw`
            self.z, self.mixes, self.figure, self.key = z, mixes, figure, key
            self.ready.clear()
            self.turn()

    def decode(self, z: Tensor, positions: list[tuple]) -> dict[tuple, Score]:
        mixes = torch.stack([mix(*z, list(p) if len(p) > 1 else p[0], self.run.n_bars) for p in positions])
        return dict(zip(positions, self.run.decode(mixes, self.temperature.value, TOP_P, self.seed.value), strict=True))

    def turn(self, _=None) -> None:
        """Show the mix of this position. At the first move of the slider all its steps are decoded at once."""
        self.alpha.layout.display, self.by_bar.layout.display = ("none", "") if self.mode.value else ("", "none")
        with self.telling("Decoding …"):
            now = self.position
            if now not in self.mixes:
                steps = [step for step in self.steps if step not in self.mixes]
                self.mixes |= self.decode(self.z, [now] if self.mode.value else steps)
            where = " ".join(f"{alpha:.2f}" for alpha in now)
            name = f"morph {self.a.place} to {self.b.place} at {where}"
            self.present(self.mixes[now], name, lambda: self.draw(self.mixes[now], f"mix: α {where}"), self.run.n_bars)

    def draw(self, score: Score, title: str) -> bytes:
        display.redraw(self.figure, 1, score, title, self.run.n_bars)
        return display.png(self.figure)

    def swap(self, dial: widgets.FloatSlider) -> None:
        dial.value = 1 - dial.value


class Steer(Studio):
    """One window with a slider an attribute."""

    def __init__(self, run: Run, pieces: list[Piece]):
        super().__init__(run)
        self.directions = run.directions()
        self.piece = Chooser(self, pieces, "piece")
        self.dials = {name: widgets.FloatSlider(0, min=-REACH, max=REACH, step=FINE, readout_format="+.2f",
                                                continuous_update=False, layout=Layout(width="360px"))
                      for name in self.directions.names}
        self.measured = {name: widgets.Label() for name in self.directions.names}
        rows = [w for name in self.dials for w in (widgets.Label(name), self.dials[name], self.measured[name])]
        reset = partial(self.turn_to, self.dials.values(), [0.0] * len(self.dials))
        rows += [button("Reset", "undo", reset), widgets.Label("less  ←  as it is  →  more"),
                 widgets.Label("as it was → as it is")]
        table = widgets.GridBox(rows, layout=Layout(grid_template_columns="110px 380px auto", align_items="center",
                                                    grid_gap="2px 16px"))
        self.arrange(widgets.HBox([self.piece, self.temperature, self.seed], layout=ROW), table)
        self.piece.changed = self.turn
        self.watch(self.temperature, self.seed, *self.dials.values())
        self.turn()

    def turn(self, _=None) -> None:
        with self.telling("Decoding …"):
            window = self.piece.window
            z = self.run.encode_windows([window])
            moved = self.directions.move(z, {name: dial.value for name, dial in self.dials.items()})
            plain, score = self.run.decode(torch.cat([z, moved]), self.temperature.value, TOP_P, self.seed.value)
            for name, label in self.measured.items():
                label.value = f"{ATTRIBUTES[name](plain):.2f} → {ATTRIBUTES[name](score):.2f}"
            said = " ".join(f"{name}{dial.value:+.2f}" for name, dial in self.dials.items() if dial.value)
            figure = display.piano_rolls([window, score], [self.piece.place, f"steered {said}"], bars=self.run.n_bars)
            figure.set_size_inches(WIDE)
            self.ready.clear()
            self.present(score, f"steer {self.piece.place} {said}", lambda: display.png(figure), self.run.n_bars)


class Compose(Studio):
    """A piece of any length from the prior, or one that goes on from a window."""

    def __init__(self, run: Run, pieces: list[Piece]):
        super().__init__(run, temperature=1.0)
        self.prompt = Chooser(self, pieces, "begins with", nothing="nothing: all is made up")
        self.length = widgets.IntSlider(16, min=8, max=128, step=4, description="bars", layout=Layout(width="420px"))
        self.key = widgets.Dropdown(options=[("that of the beginning, or any", ""), *((key, key) for key in TONICS)],
                                    description="key", layout=Layout(width="300px"))
        self.arrange(widgets.HBox([self.prompt, self.length], layout=ROW),
                     widgets.HBox([self.key, self.temperature, self.seed, button("Compose", "music", self.compose)],
                                  layout=ROW))

    def compose(self) -> None:
        bars, seed, temperature = self.length.value, self.seed.value, self.temperature.value
        with self.telling(f"Composing {bars} bars …"):
            score = self.run.generate(bars, seed, temperature, top_p=TOP_P, prompt=self.prompt.window,
                                      key=self.key.value or None)
            figure = display.piano_rolls([score], [f"{bars} bars, seed {seed}, temperature {temperature}"])
            figure.set_size_inches(WIDE)
            self.ready.clear()
            self.present(score, f"composed {bars} bars seed {seed} temperature {temperature:.1f}",
                         lambda: display.png(figure))
