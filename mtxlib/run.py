"""`load_run(folder)`: a trained run as one object, on CPU or GPU. What notebooks, scripts and widgets use.

Music goes in as paths, `symusic.Score`s or the `Piece`s of `Run.pieces`, and comes out as scores; latents are
float32 tensors (N, S, C) on the CPU. A path is read in a process of its own, for who knows what is in the file; a piece
has been, when its corpus was made.
"""

from __future__ import annotations  # symusic.Score is no class: `Path | Score` cannot be evaluated

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model
from symusic import Score
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mtxlib import ROOT
from mtxlib.config import SPLITS, Config, archive_paths
from mtxlib.data.store import Windows
from mtxlib.data.tokens import Codec, in_programs, load_tokenizer, tokenize
from mtxlib.files import atomic, atomic_text
from mtxlib.latent.attributes import Directions, change_mode, find, load_directions, save_directions
from mtxlib.latent.compose import compose, lines_of, sampled
from mtxlib.latent.decode import BATCH, decode_all, prior_latents
from mtxlib.latent.diagnose import diagnose
from mtxlib.latent.interpolate import mix, slerp
from mtxlib.model.optim import autocast_for
from mtxlib.model.prior import RowPrior, fit, load_prior, save_prior
from mtxlib.model.vae import MusicVAE
from mtxlib.music.corpus import Piece, load_corpus
from mtxlib.music.metrics import ATTRIBUTES
from mtxlib.music.normal import normalise
from mtxlib.music.readers import read_safely
from mtxlib.music.score import TEMPO, bar_starts, chain, cut, end_of, join, window_bars

Music = "str | Path | Piece | Score"
LINES, VIEWS = 64, 8  # lines a step when the prior is fitted, and how often each is seen on average, at least
MAY_BE_KEPT = ("jsfakes", "folder")  # sources whose pieces may lie in a run's folder, which may be given on


def load_run(folder: str | Path, device: str = "") -> Run:
    """Load config.json, tokenizer.json and model.safetensors of a run folder.

    Raises FileNotFoundError when one is missing, ValueError when the weights are not a run's or a device is not there.
    """
    folder = Path(folder)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder} is not a finished run: expected {name} in it; train it first "
                                    "(`mtx run`, or notebooks/04_training)")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.partition(":")[0] not in ("cpu", "cuda") or device != "cpu" and not torch.cuda.is_available():
        there = "cpu or cuda" if torch.cuda.is_available() else "cpu, for torch sees no GPU"
        raise ValueError(f"device: expected {there}, got {device!r}")
    config = Config.load(folder / "config.json")
    model, metadata = load_weights(folder / "model.safetensors", config)
    codec = Codec(load_tokenizer(folder / "tokenizer.json"), config.data.n_bars)
    if codec.vocab_size != model.vocab_size:
        raise ValueError(f"{folder / 'tokenizer.json'}: expected the {model.vocab_size} ids that the weights were "
                         f"trained on, got {codec.vocab_size}")
    return Run(folder, config, model.to(device).eval(), codec, int(metadata["mean_tokens"]),
               int(1.5 * int(metadata["most_tokens"])))


class Undrawn(TorchFunctionMode):
    """Within it a module draws no first weights: to draw or scale them on the device "meta" torch would import its
    compiler, which takes longer than all else here."""

    def __torch_function__(self, call, types, args=(), kwargs=None):
        if call in (torch.nn.init.normal_, torch.Tensor.mul):
            return kwargs["tensor"] if kwargs else args[0]
        return (torch.empty if call is torch.randn else call)(*args, **kwargs or {})


def load_weights(path: Path, config: Config) -> tuple[MusicVAE, dict[str, str]]:
    """The model and the metadata of its file."""
    try:
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata() or {}
    except SafetensorError as e:
        raise ValueError(f"{path}: expected weights as safetensors, got something else ({e})") from e
    if metadata.get("format") != "mtxlib":
        raise ValueError(f"{path}: expected weights saved by mtxlib.train, got a safetensors file without its mark")
    try:
        sizes = config.model, int(metadata["vocab_size"]), int(metadata["n_bars"])
        with torch.device("meta"), Undrawn():  # no memory for a size that the file only claims
            n_bytes = sum(p.numel() * 2 for p in MusicVAE(*sizes).parameters())
        if n_bytes > path.stat().st_size:
            raise ValueError(f"expected {n_bytes:,} bytes or more, got {path.stat().st_size:,}")
        load_model(model := MusicVAE(*sizes), path)
    except (KeyError, RuntimeError, ValueError) as e:
        raise ValueError(f"{path} does not fit the config.json beside it: {e}") from e
    return model, metadata


def whole(name: str, value: int, least: int = 1) -> None:
    if not isinstance(value, (int, np.integer)) or value < least:
        kind = "" if isinstance(value, (int, np.integer)) else "a whole number, "
        raise ValueError(f"{name}: expected {kind}at least {least}, got {value!r}")


def checked(temperature: float, top_p: float) -> None:
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature: expected 0 (greedy) or more, got {temperature!r}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a share above 0, at most 1, got {top_p!r}")


def name_of(music: Music) -> str:
    return "the score" if isinstance(music, Score) else music.name if isinstance(music, Piece) else str(music)


class Run:
    """A model with its tokenizer. `mean_tokens`: of the windows it was trained on; no decoding exceeds `max_tokens`."""

    def __init__(self, folder: Path, config: Config, model: MusicVAE, codec: Codec, mean_tokens: int,
                 max_tokens: int):
        self.folder, self.config, self.model, self.codec = folder, config, model, codec
        self.mean_tokens, self.max_tokens = mean_tokens, max_tokens
        self.n_bars, self.told = config.data.n_bars, set()
        self.prior: RowPrior | None = load_prior(folder / "prior.safetensors", folder / "model.safetensors")

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    # -- music in -----------------------------------------------------------------------------------------------------

    def score(self, music: Music) -> Score:
        """Music in normal form; a window (of `cut`, or decoded) stays as it is. A program that the tokenizer does
        not know becomes its nearest relative (`in_programs`), said once; ValueError where no note is left."""
        if isinstance(music, Piece):
            score = Score(music.path)
        else:
            form = self.config.data.form
            score = music if isinstance(music, Score) else read_safely(music, **form)
            score = normalise(score, **form) if end_of(score) is None else score
        known = set(self.codec.tokenizer.config.programs)
        score, changed = in_programs(score, known)
        told = (f"{name_of(music)}: expected the programs {sorted(known)} (-1 is drums), which this run learned from: "
                f"{', '.join(changed)}")
        if changed and not score.note_num():
            raise ValueError(f"{told}; no note is left")
        if changed and told not in self.told:
            self.told.add(told)
            print(told)
        return score

    def windows(self, music: Music) -> tuple[Score, list[int], list[Score]]:
        """The normalised score, the first bar of each window, and the windows: end to end, the last one ending with the
        piece, over bars of the one before where it has to. ValueError where one has more notes than `max_tokens`."""
        score = self.score(music)
        starts = bar_starts(score, end_of(score))
        bars = window_bars(len(starts) - 1, self.n_bars, self.n_bars)
        windows, limit = [cut(score, starts, bar, self.n_bars) for bar in bars], self.config.model.max_tokens
        for bar, window in zip(bars, windows, strict=True):
            if window.note_num() > limit:
                raise ValueError(f"{name_of(music)}: expected at most {limit} notes in {self.n_bars} bars, got "
                                 f"{window.note_num():,} from bar {bar + 1} on")
        return score, bars, windows

    def encode(self, music: Music | list[Music]) -> Tensor:
        """Posterior means (N, S, C) of the windows of a piece, or of several, one after the other."""
        music = [music] if isinstance(music, (str, Path, Piece, Score)) else music
        if not music:
            raise ValueError("music: expected at least one path or score, got an empty list")
        return self.encode_windows([w for piece in music for w in self.windows(piece)[2]])

    def pack(self, windows: list[Score]) -> Windows:
        """Scores that are windows already, as tokens."""
        return self.codec.pack(self.codec.encode(windows), [(0, 0, 0, 0)] * len(windows))

    @torch.no_grad()
    def encode_windows(self, windows: list[Score]) -> Tensor:
        """Posterior means (N, S, C) of scores that are windows already."""
        packed = self.pack(windows)
        mus = []
        for i in range(0, len(packed), BATCH):
            batch = packed.batch(range(i, min(i + BATCH, len(packed)))).to(self.device)
            mus.append(self.model.encode(*batch).mu.float().cpu())
        rows = max(mu.shape[1] for mu in mus)
        return torch.cat([torch.nn.functional.pad(mu, (0, 0, 0, rows - mu.shape[1])) for mu in mus])

    # -- music out ----------------------------------------------------------------------------------------------------

    def decode(self, z: Tensor | np.ndarray, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0,
               begin: list[list[int]] | None = None) -> list[Score]:
        """Latents (N, S, C) -> N scores of `n_bars` bars, four voices kept apart; temperature 0 is greedy. `begin`: the
        ids each goes on from. Raises ValueError for another shape, or a temperature or top_p that cannot be."""
        checked(temperature, top_p)
        z = torch.as_tensor(z, dtype=torch.float32, device=self.device)
        if z.ndim != 3 or z.shape[2] != self.config.model.latent_channels:
            raise ValueError(f"z: expected (N, S, {self.config.model.latent_channels}), got {tuple(z.shape)}")
        is_live = self.model.bottleneck.live_rows(z) if self.model.bottleneck else None
        return [self.codec.decode(ids) for ids in
                decode_all(self.model, self.codec, z, is_live, max_tokens=self.max_tokens, temperature=temperature,
                           top_p=top_p, seed=seed, begin=begin)]

    def reconstruct(self, music: Music, temperature: float = 0.0) -> Score:
        """A whole piece through the latent, window by window, with the original's metre and tempo; a window without
        notes stays so."""
        score, bars, windows = self.windows(music)
        there, end = [w for w in windows if w.note_num()], end_of(score)
        decoded = iter(self.decode(self.encode_windows(there), temperature) if there else [])
        out = join([next(decoded) if w.note_num() else w for w in windows], bars, self.n_bars, bar_starts(score, end))
        out.time_signatures.extend(score.time_signatures)
        out.tempos.extend(score.tempos)
        out.markers.extend([m for m in score.markers if m.time == end])
        return out

    def interpolate(self, a, b, steps: int = 7, temperature: float = 0.0) -> list[Score]:
        """Scores along the slerp between the posterior means of the first windows of a and b (paths, scores or
        latents (S, C)); the ends are their reconstructions."""
        if steps < 2:
            raise ValueError(f"steps: expected at least 2, the two ends, got {steps}")
        whole("steps", steps)
        za, zb, tempo = self.pair(a, b)
        alphas = [i / (steps - 1) for i in range(steps)]
        scores = self.decode(torch.stack([slerp(za, zb, alpha) for alpha in alphas]), temperature)
        return [tempo(score, alpha) for score, alpha in zip(scores, alphas, strict=True)]

    def morph(self, a, b, alpha: float | Sequence[float], temperature: float = 0.0, seed: int = 0) -> Score:
        """One window between a and b (as in `interpolate`): alpha 0 is a, 1 is b; several give each bar its own, so
        [0, 0.3, 0.7, 1] begins as a and ends as b, and [0, 1, 0, 0] puts b's second bar into a."""
        za, zb, tempo = self.pair(a, b)
        score = self.decode(mix(za, zb, alpha, self.n_bars)[None], temperature, seed=seed)[0]
        return tempo(score, float(np.mean(np.asarray(alpha))))

    def pair(self, a, b) -> tuple[Tensor, Tensor, Callable[[Score, float], Score]]:
        """Latents (S, C) of the first windows of a and b: paths, scores or latents; and what gives a score the tempo
        between theirs, `TEMPO` for a latent. Raises ValueError if they differ in shape."""
        ends = [(x, TEMPO) if isinstance(x, Tensor) else (self.encode_windows([window])[0], window.tempos[0].qpm)
                for x in (a, b) for window in ([x] if isinstance(x, Tensor) else self.windows(x)[2][:1])]
        (za, one), (zb, other) = ends

        def tempo(score: Score, alpha: float) -> Score:
            score.tempos[0].qpm = (1 - alpha) * one + alpha * other
            return score

        if za.shape != zb.shape:
            raise ValueError(f"a and b need latents of one shape to be mixed, got {tuple(za.shape)} and "
                             f"{tuple(zb.shape)}: the {self.config.model.bottleneck} bottleneck follows the tokens")
        return za, zb, tempo

    def sample(self, n: int, seed: int = 0, temperature: float = 1.0, top_p: float = 1.0) -> list[Score]:
        """n windows from the prior, z ~ N(0, 1)."""
        whole("n", n)
        return self.decode(prior_latents(self.model, n, self.mean_tokens, seed), temperature, top_p, seed)

    def generate(self, bars: int = 64, seed: int = 0, temperature: float = 1.0, **how) -> Score:
        """One piece of `bars` bars; see `compose` for what else can be asked."""
        return self.compose(1, bars, seed, temperature, **how)[0]

    def compose(self, n: int, bars: int = 64, seed: int = 0, temperature: float = 1.0, top_p: float = 1.0,
                prompt: Music | None = None, key: str | None = None, cadence: bool = True,
                learned: bool = True) -> list[Score]:
        """n pieces of `bars` bars each, the prompt's included.

        With a learned prior (see `fit_prior`) the rows of a whole piece are drawn at `temperature` one after the other,
        by a model that knows how many bars are left; each window is then decoded greedily as the continuation of the
        last bar of the one before. A piece opens with the music of `prompt`, is in `key` ("a minor"; the prompt's, or
        any, if None) and, with `cadence`, ends as those pieces did that `music.metrics.closes` finds closed; of
        ENDINGS last bars the first is taken that closes by the same measure.

        Without one, or not `learned`, windows drawn from N(0, 1), decoded at `temperature` and `top_p`, are laid end to
        end.
        """
        whole("n", n), whole("bars", bars)
        if self.prior is not None and learned:
            checked(temperature, top_p)
            opening = None if prompt is None else self.score(prompt)
            return compose(self, n, bars, seed, temperature, opening, key, cadence)
        for name, value in (("prompt", prompt), ("key", key)):
            if value is not None:
                raise ValueError(f"{name}: expected a run with a learned prior, N(0, 1) cannot follow one; call "
                                 "run.fit_prior() first")
        spans = [(0, min(self.n_bars, bars - bar)) for bar in range(0, bars, self.n_bars)]
        windows = self.sample(n * len(spans), seed, temperature, top_p)
        return [chain(windows[i::n], spans) for i in range(n)]

    def fit_prior(self, steps: int = 1500, seed: int = 0) -> dict[str, float]:
        """Learn the prior over latent rows from the training split and keep it in the run's folder; returns what a row
        of the validation split costs in nats, under N(0, I) (`normal`) and under it (`learned`).

        Raises ValueError where latent rows are not aligned with bars.
        """
        if self.config.model.bottleneck != "rows":
            raise ValueError(f"bottleneck: expected rows, whose latent follows the bars, got "
                             f"{self.config.model.bottleneck!r}")
        # A line is seen VIEWS times or more: further ones would cost their encoding and hardly be learned from.
        with autocast_for("auto", self.device)():
            lines = lines_of(self.model, self.codec, sampled(self.pieces("train")), steps * LINES // VIEWS, seed)
        held_out = lines_of(self.model, self.codec, sampled(self.pieces("valid")))
        self.prior, figures = fit(lines, held_out, self.config.model.rows_per_bar, steps=steps, batch_size=LINES,
                                  seed=seed, joint=self.model.prior)
        save_prior(self.prior, self.folder / "prior.safetensors", self.folder / "model.safetensors")
        return figures

    def directions(self) -> Directions:
        """Where the latent changes the attributes of the music: found on the training split, and kept in the run's
        folder; the mode is changed by this run's own coding (`latent.attributes.change_mode`). Raises ValueError where
        windows do not all have the same latent rows."""
        if self.config.model.bottleneck not in ("rows", "linear1d"):
            raise ValueError("bottleneck: expected rows or linear1d, whose latents all have one shape, got "
                             f"{self.config.model.bottleneck!r}")
        path, weights = self.folder / "directions.safetensors", self.folder / "model.safetensors"
        directions = load_directions(path, weights)
        if directions is None:
            windows = [w for piece in sampled(self.pieces("train")) for w in self.windows(piece)[2] if w.note_num()]
            values = np.array([[attribute(w) for attribute in ATTRIBUTES.values()] for w in windows])
            directions = find(self.encode_windows(windows), values, list(ATTRIBUTES))
            save_directions(directions, path, weights)
        return replace(directions, change_mode=partial(change_mode, self))

    # -- measuring ----------------------------------------------------------------------------------------------------

    def pieces(self, split: str, source: str = "", archive: str = "") -> list[Piece]:
        """The pieces of a split of the run's own source, or of another one (from `archive`, see `load_corpus`). What
        config.json says of paths is relative to the project's root."""
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        data = self.config.data
        own = not source or source == data.source
        archive = archive or (archive_paths(data.archive, ROOT.joinpath) if own else "")
        pieces = load_corpus(source or data.source, ROOT / data.data_dir, archive=archive,
                             limit=data.limit if own else 0, form=data.form)
        return [p for p in pieces if p.split == split]

    def keep_pieces(self, pieces: list[Piece], most: int = 12) -> None:
        """Put the first of these pieces into the run's folder: `pieces/` with their MIDI and pieces.json, which names
        each with its licence. Only such as may be given on with the folder: CC BY, or the user's own."""
        folder = self.folder / "pieces"
        folder.mkdir(exist_ok=True)
        chosen = [p for p in pieces if p.source in MAY_BE_KEPT and p.bars >= self.n_bars][:most]
        for piece in chosen:
            atomic(folder / piece.path.name, partial(shutil.copyfile, piece.path))
        entries = [{**asdict(piece), "path": piece.path.name} for piece in chosen]
        atomic_text(folder / "pieces.json", json.dumps(entries, indent=1) + "\n")
        for stale in {*folder.glob("*.mid")} - {folder / piece.path.name for piece in chosen}:
            stale.unlink()

    def kept_pieces(self, split: str = "test") -> list[Piece]:
        """Pieces of a split to look at and play with: some that lie in the run's folder, or all of its corpus where
        none do."""
        folder, kept = self.folder / "pieces", []
        if (folder / "pieces.json").exists():
            entries = json.loads((folder / "pieces.json").read_text())
            kept = [Piece(**{field: entry.get(field) for field in Piece.__annotations__}
                          | {"path": folder / entry["path"]}) for entry in entries]
        return [piece for piece in kept if piece.split == split] or self.pieces(split)

    def diagnose(self, pieces: str | list[Piece] = "test", floor: float | None = None) -> dict:
        """The keys of diagnosis.json over a split of the run's source, or over pieces; see `mtxlib.latent.diagnose`."""
        pieces = self.pieces(pieces) if isinstance(pieces, str) else pieces
        return diagnose(self.model, self.codec, tokenize(self.codec, pieces), self.config, floor=floor)
