"""Every dial of a run, in three frozen dataclasses, and the presets that set them together.

A notebook's `parameters` cell holds plain scalars with the same names, so one flat dictionary is enough to describe a
run: `Config.from_flat({"preset": "quick", "beta_max": 0.5})`. An unknown name fails with the nearest match.
"""

import difflib
import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path


@dataclass(frozen=True)
class DataConfig:
    source: str = "bach"  # bach, jsfakes, jsb, folder, or a sum such as "bach+jsfakes"
    archive: str = ""  # local zip, folder or file to read instead of downloading; the tree of MIDI for `folder`
    data_dir: str = "data"  # where corpora and token stores are cached
    limit: int = 0  # read only the first pieces of each source; 0 reads all
    grid: int = 4  # positions a quarter that notes go to: 4 (16ths), 8 (32nds), 12 (16ths and triplets) or 24
    velocities: int = 0  # loudnesses told apart; 0: none, all notes are alike
    tempos: int = 0  # tempos told apart, at equal ratios; 0: a piece's first one only, which the tokens do not say
    pedal: bool = False  # notes sound on while the sustain pedal is down
    bpe_vocab: int = 600  # vocabulary size after BPE, learned on the training split; 0 uses no BPE
    n_bars: int = 4  # bars a window
    hop: int = 1  # bars between the starts of two training windows
    transpose: bool = True  # store the training windows in twelve keys, -5 to +6 semitones
    store: str = ""  # folder of the token store; filled in by the tokenization

    @property
    def form(self) -> dict:
        """The dials of `music.normal.normalise`, as `load_corpus` and the readers take them."""
        return {"grid": self.grid, "velocities": self.velocities, "tempos": self.tempos, "pedal": self.pedal}


@dataclass(frozen=True)
class ModelConfig:
    d_model: int = 128  # width D of encoder and decoder
    enc_layers: int = 2  # transformer blocks in the encoder
    dec_layers: int = 3  # transformer blocks in the decoder
    n_heads: int = 4  # attention heads
    dropout: float = 0.0  # dropout inside the blocks (token dropout is a training setting)
    tie_weights: bool = True  # the output layer shares the decoder's embedding
    bottleneck: str = "rows"  # conv, linear1d, linear2d, rows or none
    variational: bool = True  # False: a plain autoencoder, z is mu and there is no KL
    prior: str = "normal"  # what z comes from: normal, N(0, I), or joint, a prior over rows that learns along
    rows_per_bar: int = 4  # rows bottleneck: latent rows a bar (1 bar, 2 half bars, 4 beats)
    latent_channels: int = 16  # C, channels of a latent row
    conv_stride: int = 8  # conv bottleneck: tokens a latent row, a power of two
    condition: str = "both"  # how the decoder reads z: cross, in or both
    max_tokens: int = 512  # longest window in tokens; longer ones are left out of the store


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 1000  # optimiser steps
    batch_size: int = 32  # windows a step
    accumulate: int = 1  # micro-batches a step; batch_size is their sum
    optimizer: str = "muon"  # muon for the matrices of the layers and AdamW for the rest, or adamw for all
    lr: float = 5e-3  # peak learning rate
    lr_warmup: int = 100  # steps of linear learning-rate warm-up, before the cosine
    weight_decay: float = 0.01  # decoupled decay, on matrices only
    grad_clip: float = 1.0  # largest gradient norm
    recon_scale: str = "sequence"  # sequence: the ELBO; token: the classic mistake, kept to be shown
    beta_schedule: str = "linear"  # constant, linear, cyclical, or rate (beta steered to hold the target rate)
    beta_max: float = 0.3  # weight of the KL at the end of the warm-up, or the most that `rate` may use
    beta_warmup: int = 800  # steps of linear ramp (linear) or of one cycle (cyclical)
    free_bits: float = 0.0  # nats per latent dimension that cost nothing
    target_rate: float = 0.0  # nats per window to hold the KL at, by |KL - C| or by steering beta; 0 turns it off
    target_start: float = 0.0  # target rate at step 0, lowered linearly over beta_warmup; 0 starts at target_rate
    dec_token_dropout: float = 0.0  # share of decoder input tokens replaced
    enc_token_dropout: float = 0.0  # share of encoder input tokens replaced
    dropout_kind: str = "mask"  # replace by the mask token, or by a random token
    spare_structure: bool = True  # token dropout leaves tokens that are bar or position only; BPE leaves few
    ema: float = 0.0  # decay of the moving average of the weights; 0 turns it off
    precision: str = "auto"  # auto (bf16 where this machine multiplies faster in it), bf16 or fp32
    compile: bool = False  # torch.compile the model
    eval_every: int = 200  # steps between validations
    eval_windows: int = 256  # validation windows per validation, drawn once
    patience: int = 0  # validations without progress before stopping; 0 never stops early
    threads: int = 0  # CPU threads; 0 leaves torch's choice
    seed: int = 0  # of weights, batches and noise
    wandb: str = "offline"  # off, offline or online


# What each preset changes. Cost and expected result stand beside it.
PRESETS: dict[str, dict[str, object]] = {
    # A few seconds: for tests and for a first look at the plumbing. Nothing is learned.
    "tiny": {
        "d_model": 32, "enc_layers": 1, "dec_layers": 1, "n_heads": 2, "latent_channels": 4, "steps": 12,
        "batch_size": 8, "lr_warmup": 4, "beta_warmup": 6, "eval_every": 6, "eval_windows": 16, "wandb": "off",
    },
    # The defaults of the dataclasses: about 5 minutes on two cores, on Bach. A verdict of `healthy` is expected.
    "quick": {},
    # 80 minutes on one core, on js-fakes, whose licence lets the weights be shipped. On its test split: note_f1 0.97 at
    # 194 nats a window.
    "reference": {
        "source": "jsfakes", "d_model": 160, "enc_layers": 3, "dec_layers": 4, "steps": 8000, "lr_warmup": 200,
        "dec_token_dropout": 0.3, "beta_schedule": "rate", "beta_max": 1.0, "target_rate": 200.0, "target_start": 400.0,
        "beta_warmup": 2000, "eval_every": 500, "ema": 0.999,
    },
}


@dataclass(frozen=True)
class Config:
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self):
        check(self)

    @classmethod
    def from_flat(cls, values: dict) -> "Config":
        """Build from one flat dictionary; `preset`, if there, is applied first. Raises ValueError on unknown names."""
        values = dict(values)
        preset = values.pop("preset", "")
        if preset:
            values = {**preset_values(preset), **values}
        known = flat_names()
        for name in values:
            if name not in known:
                raise ValueError(f"unknown parameter {name!r}{nearest(name, known)}")
        return cls(*(part(**{f.name: typed(f, values[f.name]) for f in fields(part) if f.name in values})
                     for part in PARTS))

    @classmethod
    def from_dict(cls, nested: dict) -> "Config":
        """Build from `to_dict()`'s form: {"data": {...}, "model": {...}, "train": {...}}."""
        unknown = set(nested) - {"data", "model", "train"}
        if unknown:
            raise ValueError(f"unknown section {sorted(unknown)[0]!r}: expected data, model and train")
        values = {k: v for part in nested.values() for k, v in part.items()}
        if (tokenizer := values.pop("tokenizer", "REMI")) != "REMI":  # a dial of earlier runs
            raise ValueError(f"parameter 'tokenizer': expected REMI, the only one left, got {tokenizer!r}: train again")
        return cls.from_flat(values)

    @classmethod
    def load(cls, path: str | Path) -> "Config":
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except (ValueError, AttributeError, TypeError, RecursionError) as e:
            raise ValueError(f"{path} is not a config: {e}") from e

    def to_dict(self) -> dict:
        return asdict(self)

    def flat(self) -> dict:
        return {**asdict(self.data), **asdict(self.model), **asdict(self.train)}

    def replace(self, **values) -> "Config":
        """A copy with some dials changed, by their flat names."""
        return Config.from_flat({**self.flat(), **values})


PAD, BOS, EOS, MASK = 0, 1, 2, 3  # ids of the special tokens, the same in every tokenizer
N_SPECIAL = 4
SLOTS_PER_BAR = 16  # sixteenths, the grid on which tokens are placed
PARTS = (DataConfig, ModelConfig, TrainConfig)
SOURCES = ("bach", "jsfakes", "jsb", "folder")
SPLITS = ("train", "valid", "test")
CHOICES = {
    "bottleneck": ("conv", "linear1d", "linear2d", "rows", "none"),
    "condition": ("cross", "in", "both"),
    "prior": ("normal", "joint"),
    "optimizer": ("muon", "adamw"),
    "recon_scale": ("sequence", "token"),
    "beta_schedule": ("constant", "linear", "cyclical", "rate"),
    "dropout_kind": ("mask", "random"),
    "precision": ("auto", "bf16", "fp32"),
    "wandb": ("off", "offline", "online"),
    "rows_per_bar": (1, 2, 4),
    "grid": (4, 8, 12, 24),
    "split": SPLITS,
}
# what a value may be, by its name: of these dials, and of the notebooks' own parameters
POSITIVE = ("n_bars", "hop", "d_model", "enc_layers", "dec_layers", "n_heads", "latent_channels", "conv_stride",
            "max_tokens", "steps", "batch_size", "accumulate", "lr", "grad_clip", "eval_every", "eval_windows",
            "show_bars", "steps_between", "pairs", "pair_steps", "attribute_windows", "prior_steps", "long_bars",
            "judged_pieces", "judged_bars", "top_p")
NOT_NEGATIVE = ("limit", "bpe_vocab", "velocities", "tempos", "lr_warmup", "weight_decay", "beta_max", "beta_warmup",
                "free_bits", "target_rate", "target_start", "patience", "threads", "seed", "temperature",
                "sample_temperature", "examples", "saved", "samples")
SHARES = ("dropout", "dec_token_dropout", "enc_token_dropout", "ema")


def flat_names() -> set[str]:
    return {f.name for part in PARTS for f in fields(part)}


def preset_values(name: str) -> dict:
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}{nearest(name, PRESETS)}; expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


def nearest(name: str, known) -> str:
    match = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


def typed(f, value):
    """The value as the field's type: an int is welcome where a float is declared, nothing else is converted."""
    if f.type is float and type(value) is int:
        value = float(value)
    if type(value) is not f.type:
        raise ValueError(f"parameter {f.name!r}: expected {f.type.__name__}, got {value!r}")
    return value


def archive_paths(archive: str, change: Callable[[str], object]) -> str:
    """`archive` with each of its paths changed: it is one, or several as in "jsfakes=a.zip,jsb=b.json"."""
    parts = re.split(f"((?:^|,)(?:{'|'.join(SOURCES)})=)", archive)
    return "".join(part if i % 2 or not part else str(change(part)) for i, part in enumerate(parts))


def check_value(name: str, value) -> None:
    """Raises ValueError where a parameter of this name cannot have this value."""
    numbers = value if isinstance(value, list) else [value]
    if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
        expected = "a finite number"
    elif name in CHOICES and value not in CHOICES[name]:
        expected = f"one of {', '.join(map(str, CHOICES[name]))}"
    elif name == "source" and not set(value.split("+")) <= set(SOURCES):
        expected = f"one of {', '.join(SOURCES)}, or several joined by +"
    elif name == "others" and not all(re.fullmatch(f"\\w+/({'|'.join(SPLITS)})", s) for s in value.split(",") if s):
        expected = "sets as in bach/test"
    elif name in POSITIVE and value <= 0:
        expected = "more than 0"
    elif name in NOT_NEGATIVE and value < 0:
        expected = "0 or more"
    elif name == "top_p" and value > 1:
        expected = "at most 1"
    elif name in SHARES and not 0 <= value < 1:
        expected = "a share in [0, 1)"
    else:
        return
    raise ValueError(f"parameter {name!r}: expected {expected}, got {value!r}")


def check(config: Config) -> None:
    flat = config.flat()
    for name, value in flat.items():
        check_value(name, value)
    data, model, train = config.data, config.model, config.train
    is_rate, heads = train.beta_schedule == "rate", 2 * model.n_heads
    for is_wrong, name, expected in (
            (train.target_rate and train.free_bits, "free_bits", "0 with a target_rate, which takes its place"),
            (train.target_start and not train.target_rate, "target_start", "a target_rate to go to, or 0"),
            (is_rate and not train.target_rate, "target_rate", "the nats to hold with beta_schedule 'rate'"),
            (is_rate and not model.variational, "variational", "True with beta_schedule 'rate', which steers a KL"),
            (data.velocities > 127, "velocities", "at most 127, as many as MIDI has"),
            (model.d_model % heads, "d_model", f"a multiple of 2 * n_heads = {heads}"),
            (model.conv_stride & (model.conv_stride - 1), "conv_stride", "a power of two"),
            (train.batch_size % train.accumulate, "accumulate", f"a divisor of batch_size {train.batch_size}")):
        if is_wrong:
            raise ValueError(f"parameter {name!r}: expected {expected}, got {flat[name]!r}")
    if model.prior == "joint" and (model.bottleneck != "rows" or not model.variational or train.free_bits):
        raise ValueError("parameter 'prior': 'joint' expects bottleneck 'rows', variational True and free_bits 0, got "
                         f"{model.bottleneck!r}, {model.variational} and {train.free_bits}")
