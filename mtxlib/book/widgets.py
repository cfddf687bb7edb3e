"""The widgets of notebook 06: `play` shows `Morph`, `Compose` and `Steer`.

What is unusual: a callback never raises. What went wrong is one sentence in the status line, and what was shown stays.
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
HIDDEN = "none"  # of a layout's `display`; "" is seen
ROW = {"flex_flow": "row wrap", "align_items": "center", "grid_gap": "4px 16px"}  # of a Layout each: one may be hidden
STYLE = """<style>.mtx audio {height: 36px; width: 320px; display: block}
.mtx img {background: white; border-radius: 4px; height: auto}</style>"""

slider = partial(widgets.FloatSlider, min=0, continuous_update=False)


def app(run_dir: str) -> widgets.Widget:
    """What `mtx app` shows: the widgets with pieces of the run, or one sentence why there are none."""
    with telling(sentence := widgets.HTML()), redirect_stdout(StringIO()):
        return play(run := load_run(run_dir), run.kept_pieces())
    return sentence


def play(run: Run, pieces: list[Piece]) -> widgets.Tab:
    """The widgets with these pieces. Steering, whose directions may have to be found first, is made when opened."""
    later = widgets.HTML(finding := "Finding what to steer by in the training split; the run remembers it …")
    tabs = [Morph(run, pieces), Compose(run, pieces)] + [later] * (run.config.model.bottleneck == "rows")
    tab = widgets.Tab(tabs, titles=["Morph", "Compose", "Steer"])

    def opened(change: dict) -> None:
        if tab.children[change["new"]] is later:
            with telling(later, finding):
                tab.children = [*tab.children[:2], Steer(run, pieces)]

    tab.observe(opened, "selected_index")
    return tab


@contextmanager
def telling(line: widgets.HTML, doing: str = ""):
    """Says in `line` what is being done and, if it cannot be, why in one sentence; of a bug the log has the rest."""
    line.value = said = spoken(doing)
    try:
        yield
        if line.value == said:  # nothing more has been said
            line.value = spoken("")
    except (ValueError, OSError) as e:
        line.value = spoken(str(e), "#b3261e")
    except Exception as e:
        logging.getLogger(__name__).exception("%s failed", doing or "a widget")
        line.value = spoken(f"This went wrong: {brief(e)}", "#b3261e")


def spoken(text: str, colour: str = "inherit") -> str:
    return f'<span style="color: {colour}">{escape(text)}</span>'


def button(text: str, icon: str, call) -> widgets.Button:
    made = widgets.Button(description=text, icon=icon, layout=Layout(width="auto"))
    made.on_click(lambda _: call())
    return made


def row(*parts: widgets.Widget) -> widgets.HBox:
    return widgets.HBox(parts, layout=Layout(**ROW))


class Studio(widgets.VBox):
    """What the three share: settings, a status line, a picture, a player, the notation, and saving what is shown."""

    def __init__(self, run: Run, temperature: float = 0.0):
        self.run, self.score, self.name, self.ready = run, None, "", {}
        self.temperature = slider(temperature, max=1.5, step=0.1, description="temperature")
        self.seed = widgets.BoundedIntText(0, max=2**31 - 1, description="seed", layout=Layout(width="180px"))
        self.status, self.sound, self.picture = widgets.HTML(), widgets.HTML(), widgets.Image()
        self.telling = partial(telling, self.status)
        self.notation = widgets.Image(format="svg+xml", layout=Layout(flex="0 0 auto"))
        self.plays = widgets.Checkbox(description="play each change", indent=False, layout=Layout(width="150px"))
        self.plays.observe(lambda _: self.ready.clear(), "value")
        saves = [button(f"Save {kind}", "download", partial(self.save, suffix))
                 for kind, suffix in (("MIDI", ".mid"), ("MusicXML", ".musicxml"))]
        page = Layout(max_height="460px", overflow="auto", align_items="flex-start")
        self.result = widgets.VBox([self.picture, row(self.sound, self.plays, *saves),
                                    widgets.VBox([self.notation], layout=page)],
                                   layout=Layout(display=HIDDEN, grid_gap="8px"))
        super().__init__(layout=Layout(max_width="1200px", grid_gap="8px", padding="8px 0"))
        self.add_class("mtx")

    def arrange(self, *controls: widgets.Widget) -> None:
        self.children = [widgets.HTML(STYLE, layout=Layout(display=HIDDEN)), *controls, self.status, self.result]

    def watch(self, call, *dials: widgets.Widget) -> None:
        for dial in dials:
            dial.observe(call, "value")

    def turn_to(self, dials: Iterable[widgets.Widget], values: list[float]) -> None:
        """Set several dials, and follow them once."""
        for dial, value in zip(dials, values, strict=True):
            dial.unobserve(self.turn, "value")
            dial.value = value
        self.watch(self.turn, *dials)
        self.turn()

    def decode(self, z: Tensor, tempos: Iterable[float]) -> list[Score]:
        """Latents (N, S, C) by the settings, each at its tempo."""
        scores = self.run.decode(z, self.temperature.value, TOP_P, self.seed.value)
        for score, tempo in zip(scores, tempos, strict=True):
            score.tempos[0].qpm = tempo
        return scores

    def present(self, score: Score, name: str, draw, bars: int | None = None) -> None:
        """Show a score once its picture, by `draw`, sound and notation are all there. No other has this `name`."""
        if name not in self.ready:
            self.ready[name] = display.player(score, self.plays.value), notation.notation(score, bars).encode(), draw()
        self.sound.value, self.notation.value, self.picture.value = self.ready[name]
        self.score, self.name = score, re.sub(r"[^\w.,=+-]+", "_", name.replace("–", "-"))
        self.result.layout.display = ""

    def present_new(self, name: str, scores: list[Score], titles: list[str], bars: int | None = None) -> None:
        """Show the last of these scores, drawn beside the others."""
        figure = display.piano_rolls(scores, titles, bars=bars)
        figure.set_size_inches(13.6, 3)
        self.ready.clear()
        self.present(scores[-1], name, lambda: display.png(figure), bars)

    def save(self, suffix: str) -> None:
        """Write what is shown into the run's samples, under a name that is free."""
        with self.telling():
            folder = self.run.folder / "samples"
            folder.mkdir(exist_ok=True)
            paths = (folder / f"{self.name[:150]}{f'_{n}' if n > 1 else ''}{suffix}" for n in count(1))
            path = next(path for path in paths if not path.exists())
            display.save(self.score, path)
            self.status.value = spoken(f"Saved as {path}")


class Chooser(widgets.HBox):
    """A piece of those offered, or an uploaded one, and a window of it. `changed` is called when either is another."""

    def __init__(self, studio: Studio, pieces: list[Piece], label: str, index: int = 0, nothing: str = ""):
        self.studio, self.run, self.changed = studio, studio.run, lambda: None
        self.music = {f"{p.name} · {p.key} · {p.bars} bars": p for p in pieces if p.bars >= self.run.n_bars}
        if not self.music:
            raise ValueError(f"pieces: expected one of {self.run.n_bars} bars or more, got none in {len(pieces)}")
        self.music = ({nothing: None} if nothing else {}) | self.music
        self.piece = widgets.Dropdown(options=list(self.music), index=min(index, len(self.music) - 1),
                                      description=label, layout=Layout(width="350px"))
        self.bars = widgets.Dropdown(layout=Layout(width="120px"))
        self.upload = widgets.FileUpload(accept=",".join(KINDS), description="your file", layout=Layout(width="auto"))
        self.pick()
        self.piece.observe(self.pick, "value")
        self.bars.observe(lambda _: self.changed(), "value")
        self.upload.observe(self.take, "value")
        super().__init__([self.piece, self.bars, self.upload], layout=Layout(**ROW))

    def pick(self, _=None) -> None:
        with self.studio.telling():
            n, music = self.run.n_bars, self.music[self.piece.value]
            self.name = music.name if isinstance(music, Piece) else self.piece.value
            self.score = music and self.run.score(music)
            self.starts = bar_starts(self.score) if music else []
            self.bars.options = [(f"bars {bar + 1}–{bar + n}", bar) for bar in range(len(self.starts) - n)]
            self.bars.index = 0 if music else None
            self.bars.layout.display = "" if music else HIDDEN
            self.changed()

    def take(self, change: dict) -> None:
        """Read an upload; if it is no music for this run, say why and leave everything as it was."""
        for file in change["new"]:
            name = file["name"]
            with self.studio.telling(f"Reading {name} …"):
                try:
                    score = self.run.score(read_safely(bytes(file["content"])))
                except ValueError as e:
                    raise ValueError(f"{name}: {re.sub('^the (file|score): ', '', str(e))}") from e
                if (bars := len(bar_starts(score)) - 1) < self.run.n_bars:
                    raise ValueError(f"{name}: expected the {self.run.n_bars} bars of a window or more, got {bars}")
                self.music = {name: score} | self.music | {name: score}  # it comes first, and is chosen
                self.piece.options = list(self.music)
                self.pick()  # also where a file of this name was there before

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
        self.steps = np.linspace(0, 1, STEPS).round(2).tolist()
        self.alpha = widgets.SelectionSlider(options=[(f"α {a:.2f}", a) for a in self.steps], value=0.5,
                                             description="A to B", layout=Layout(width="640px"))
        upright = {"orientation": "vertical", "layout": Layout(height="130px")}
        self.bars = [slider(max=1, step=0.05, **upright) for _ in range(run.n_bars)]
        columns = [widgets.VBox([widgets.Label(f"bar {i}"), dial, button("swap", "exchange", partial(self.swap, dial))],
                                layout=Layout(align_items="center")) for i, dial in enumerate(self.bars, 1)]
        line = np.linspace(0, 1, run.n_bars).round(2).tolist()
        presets = widgets.VBox([widgets.Label("0 is A, 1 is B"),
                                button("A becomes B", "arrow-right", partial(self.turn_to, self.bars, line)),
                                button("B becomes A", "arrow-left", partial(self.turn_to, self.bars, line[::-1]))])
        self.mode = widgets.ToggleButtons(options=[("whole window", False), ("bar by bar", True)])
        self.mode.layout.display = "" if run.config.model.bottleneck == "rows" else HIDDEN
        self.by_bar = row(*columns, presets)
        self.arrange(row(self.a, self.b), row(self.temperature, self.seed, self.mode), self.alpha, self.by_bar)
        self.a.changed = self.b.changed = self.prepare
        self.watch(self.prepare, self.temperature, self.seed)
        self.watch(self.turn, self.alpha, self.mode, *self.bars)
        self.key, self.mixes = None, {}
        self.prepare()

    @property
    def position(self) -> float | tuple[float, ...]:
        """Where the slider, or those of the bars, stand."""
        return tuple(dial.value for dial in self.bars) if self.mode.value else self.alpha.value

    def prepare(self, _=None) -> None:
        """Begin anew if A, B or a setting has changed. Only what is shown is decoded, for the rest may not be asked
        for; where notes are drawn by chance all is, since one seed draws them all."""
        with self.telling("Decoding …"):
            windows = [self.a.window, self.b.window]
            key = (*windows, self.temperature.value, self.seed.value)
            if key == self.key:
                return
            ends = self.run.encode_windows(windows), [window.tempos[0].qpm for window in windows]
            mixes = self.mix(ends, self.steps if self.temperature.value else [self.position])
            titles = [f"A: {self.a.place}", "", f"B: {self.b.place}"]
            figure = display.piano_rolls([windows[0], *windows], titles, bars=self.run.n_bars)  # see `turn`
            self.ends, self.mixes, self.figure, self.key = ends, mixes, figure, key
            self.ready.clear()
            self.turn()

    def mix(self, ends: tuple[Tensor, list[float]], positions: list) -> dict:
        """The score at each position between two latents, at a tempo between theirs."""
        z, tempos = ends
        mixed = torch.stack([mix(*z, position, self.run.n_bars) for position in positions])
        scores = self.decode(mixed, [np.interp(np.mean(position), (0, 1), tempos) for position in positions])
        return dict(zip(positions, scores, strict=True))

    def turn(self, _=None) -> None:
        """Show the mix of this position. At the first move of the slider all its steps are decoded at once."""
        self.alpha.layout.display, self.by_bar.layout.display = (HIDDEN, "") if self.mode.value else ("", HIDDEN)
        with self.telling("Decoding …"):
            now, n_bars = self.position, self.run.n_bars
            if now not in self.mixes:
                steps = [step for step in self.steps if step not in self.mixes]
                self.mixes |= self.mix(self.ends, [now] if self.mode.value else steps)
            where = " ".join(f"{alpha:.2f}" for alpha in np.atleast_1d(now))

            def draw() -> bytes:
                display.redraw(self.figure, 1, self.mixes[now], f"mix: α {where}", n_bars)
                return display.png(self.figure)

            self.present(self.mixes[now], f"morph {self.a.place} to {self.b.place} at {where}", draw, n_bars)

    def swap(self, dial: widgets.FloatSlider) -> None:
        dial.value = 1 - dial.value


class Steer(Studio):
    """One window with a slider an attribute."""

    def __init__(self, run: Run, pieces: list[Piece]):
        super().__init__(run)
        self.directions = run.directions()
        self.piece = Chooser(self, pieces, "piece")
        wide = Layout(width="360px")
        self.dials = {name: slider(0, min=-REACH, max=REACH, step=FINE, readout_format="+.2f", layout=wide)
                      for name in self.directions.names}
        self.measured = {name: widgets.Label() for name in self.dials}
        cells = [w for name in self.dials for w in (widgets.Label(name), self.dials[name], self.measured[name])]
        reset = partial(self.turn_to, self.dials.values(), [0.0] * len(self.dials))
        cells += [button("Reset", "undo", reset), widgets.Label("less  ←  as it is  →  more"),
                  widgets.Label("as it was → as it is")]
        columns = Layout(grid_template_columns="110px 380px auto", align_items="center", grid_gap="2px 16px")
        self.arrange(row(self.piece, self.temperature, self.seed), widgets.GridBox(cells, layout=columns))
        self.piece.changed = self.turn
        self.watch(self.turn, self.temperature, self.seed, *self.dials.values())
        self.turn()

    def turn(self, _=None) -> None:
        with self.telling("Decoding …"):
            window, values = self.piece.window, {name: dial.value for name, dial in self.dials.items()}
            z = self.run.encode_windows([window])
            both = torch.cat([z, self.directions.move(z, values)])
            plain, score = self.decode(both, [window.tempos[0].qpm] * 2)
            for name, label in self.measured.items():
                label.value = f"{ATTRIBUTES[name](plain):.2f} → {ATTRIBUTES[name](score):.2f}"
            said = " ".join(f"{name}{value:+.2f}" for name, value in values.items() if value)
            self.present_new(f"steer {self.piece.place} {said}", [window, score],
                             [self.piece.place, f"steered {said}"], self.run.n_bars)


class Compose(Studio):
    """A piece of any length from the prior, or one that goes on from a window."""

    def __init__(self, run: Run, pieces: list[Piece]):
        super().__init__(run, temperature=1.0)
        self.prompt = Chooser(self, pieces, "begins with", nothing="nothing: all is made up")
        self.length = widgets.IntSlider(16, min=8, max=128, step=4, description="bars", layout=Layout(width="420px"))
        self.key = widgets.Dropdown(options=[("that of the beginning, or any", ""), *((key, key) for key in TONICS)],
                                    description="key")
        self.arrange(row(self.prompt, self.length),
                     row(self.key, self.temperature, self.seed, button("Compose", "music", self.compose)))

    def compose(self) -> None:
        bars, seed, temperature = self.length.value, self.seed.value, self.temperature.value
        with self.telling(f"Composing {bars} bars …"):
            score = self.run.generate(bars, seed, temperature, top_p=TOP_P, prompt=self.prompt.window,
                                      key=self.key.value or None)
            self.present_new(f"composed {bars} bars seed {seed} temperature {temperature:.1f}", [score],
                             [f"{bars} bars, seed {seed}, temperature {temperature}"])
