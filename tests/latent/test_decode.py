"""Decoding against the teacher-forced pass on its own output, sampling against its distribution, slerp's geometry."""

import math

import pytest
import torch

from mtxlib.config import BOS, EOS, MASK, PAD
from mtxlib.data.store import SlotTable
from mtxlib.data.tokens import Codec, load_tokenizer
from mtxlib.latent.decode import Place, choose, cut_after_eos, decode, prior_latents
from mtxlib.latent.interpolate import mix, slerp
from mtxlib.model.vae import MusicVAE
from mtxlib.music.score import note_counts

KINDS = [("rows", "both"), ("rows", "cross"), ("conv", "in"), ("linear2d", "both"), ("linear1d", "both"),
         ("none", "both")]


@pytest.fixture(scope="module")
def codec(store):
    return Codec(load_tokenizer(store.folder / "tokenizer.json"), store.n_bars)


def make(config, store, bottleneck="rows", condition="both"):
    """Random weights, larger than in training and untied, so that what is likely changes with each token."""
    torch.manual_seed(4)
    model = MusicVAE(config.replace(bottleneck=bottleneck, condition=condition, tie_weights=False).model,
                     store.vocab_size, store.n_bars)
    with torch.no_grad():
        for p in model.decoder.parameters():
            p.mul_(2.0)
    return model.eval()


@pytest.mark.parametrize("with_grammar", [False, True], ids=["free", "grammar"])
@pytest.mark.parametrize("bottleneck, condition", KINDS)
def test_temperature_0_is_the_argmax_of_the_full_pass_on_its_own_output(bottleneck, condition, with_grammar, config,
                                                                        store, codec):
    model, grammar = make(config, store, bottleneck, condition), codec.grammar if with_grammar else None
    z = prior_latents(model, 5, 30, seed=1)
    is_live = torch.ones(z.shape[:2], dtype=torch.bool)
    if bottleneck == "conv":
        is_live[2, 2:] = False
    out = decode(model, codec.table, z, is_live, max_tokens=40, grammar=grammar)
    assert len({tuple(ids) for ids in out}) > (0 if bottleneck == "none" else 1)
    for i, sequence in enumerate(out):
        assert sequence[0] == BOS and (sequence[-1] == EOS) + (len(sequence) == 40) >= 1
        ids = torch.tensor([sequence])
        slots = codec.table.slots(ids)
        logits = model.decode(ids[:, :-1], slots[:, :-1], z[i:i + 1], is_live[i:i + 1])[0]
        place = Place(codec.table, grammar, 1)
        for t in range(len(sequence) - 1):
            place.read(ids[:, t].numpy())
            logits[t, torch.from_numpy(place.forbids(logits.shape[1])[0])] = -torch.inf
            best, ours = logits[t].max(), logits[t, sequence[t + 1]]
            assert (best - ours).item() < 1e-4, f"token {t + 1} of sequence {i}"


@pytest.mark.parametrize("scale", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 30.0])
def test_no_weights_write_a_note_twice_at_one_place(scale, temperature, config, store, codec):
    """Untrained and spoilt weights, with a beginning of its own for each sequence."""
    model = MusicVAE(config.model, store.vocab_size, store.n_bars).eval()
    with torch.no_grad():
        for p in model.decoder.parameters():
            p.add_(scale * torch.randn_like(p))
    for seed in range(3):
        z = 10 ** seed * prior_latents(model, 6, 30, seed)
        begin = [store.ids[a:b].tolist()[:1 + 20 * seed + i] for i, (a, b) in
                 enumerate(zip(store.offsets[:6], store.offsets[1:7], strict=True))]
        out = decode(model, codec.table, z, max_tokens=300, temperature=temperature, seed=seed, begin=begin,
                     grammar=codec.grammar)
        for ids, given in zip(out, begin, strict=True):
            assert ids[:len(given)] == given and max(note_counts(codec.decode(ids)).values(), default=1) == 1


def test_samples_depend_on_the_seed_alone(config, store, codec):
    model = make(config, store)
    z = prior_latents(model, 6, 30)
    a, b, c = (decode(model, codec.table, z, max_tokens=30, temperature=1.0, seed=seed) for seed in (0, 0, 1))
    assert a == b != c and a != decode(model, codec.table, z, max_tokens=30)
    assert len({tuple(ids) for ids in a}) == 6
    assert all(set(ids[1:]).isdisjoint({PAD, BOS, MASK}) for ids in a)
    state = torch.get_rng_state()
    decode(model, codec.table, z, max_tokens=5, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), state), "no global state is used"


class Scripted:
    """A model that says token 5, then EOS after `lengths[i]` tokens; it finds out which sequences it is asked about
    by their z, and what it has been asked."""

    def __init__(self, lengths):
        self.lengths, self.asked = lengths, []

    def begin(self, z, is_live, size):
        self.z, self.step = z, 0
        return self

    def keep(self, rows):
        self.z = self.z[rows]

    def proceed(self, ids, slots, decoding):
        self.step += 1
        who = self.z[:, 0, 0].long().tolist()
        self.asked.append(who)
        logits = torch.zeros(len(who), 8)
        for row, i in enumerate(who):
            logits[row, EOS if self.step >= self.lengths[i] else 5] = 50.0
        return logits


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_finished_sequences_leave_the_batch(temperature):
    lengths = [3, 9, 1, 4, 9, 2, 20, 5, 1, 6]
    model, table = Scripted(lengths), SlotTable([[0, -1, -1, -1]] * 8, 1)
    out = decode(model, table, torch.arange(10.0)[:, None, None], max_tokens=12, temperature=temperature)
    for ids, n in zip(out, lengths, strict=True):
        assert ids == ([BOS] + [5] * (n - 1) + [EOS] if n < 12 else [BOS] + [5] * 11), "the seventh is cut"
    assert model.asked[0] == list(range(10)) and model.asked[-1] == [6] and len(model.asked) == 11
    for step, asked in enumerate(model.asked):
        going = sum(n > step for n in lengths)
        assert going <= len(asked) <= max(1, math.ceil(going / 0.8)), "at most a fifth have ended"


def test_choose_follows_the_tempered_softmax():
    logits, g = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0]), torch.Generator().manual_seed(0)
    for temperature in (0.5, 1.0, 2.0):
        picks = choose(logits.expand(20_000, 5), temperature, 1.0, g)
        shares = torch.bincount(picks, minlength=5) / 20_000
        torch.testing.assert_close(shares, (logits / temperature).softmax(0), atol=0.015, rtol=0)


def test_top_p_keeps_the_smallest_set_of_that_mass():
    logits, g = torch.tensor([0.1, 0.5, 0.15, 0.25]).log(), torch.Generator().manual_seed(0)
    for top_p, kept in ((0.01, {1}), (0.49, {1}), (0.6, {1, 3}), (0.74, {1, 3}), (0.8, {1, 2, 3}), (1.0, {0, 1, 2, 3})):
        picks = choose(logits.expand(4000, 4), 1.0, top_p, g)
        assert set(picks.tolist()) == kept, top_p
    shares = torch.bincount(choose(logits.expand(20_000, 4), 1.0, 0.7, g), minlength=4) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0, 2 / 3, 0, 1 / 3]), atol=0.015, rtol=0)


def test_cut_after_eos():
    assert cut_after_eos([BOS, 5, EOS, EOS, 7]) == [BOS, 5, EOS] and cut_after_eos([BOS, 5]) == [BOS, 5]


# -- latents --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bottleneck, rows", [("rows", 16), ("conv", 13), ("linear1d", 1), ("linear2d", 100),
                                              ("none", 0)])
def test_prior_latents(bottleneck, rows, config, store):
    model = make(config, store, bottleneck)
    z = prior_latents(model, 50, 100, seed=2)
    assert z.shape == (50, rows, config.model.latent_channels)
    assert torch.equal(z, prior_latents(model, 50, 100, seed=2))
    if rows:
        assert not torch.equal(z, prior_latents(model, 50, 100, seed=3))
        assert abs(z.mean()) < 0.3 and abs(z.std() - 1) < 0.3


def angle(a, b):
    a, b = a.double(), b.double()
    return math.acos((a * b).sum() / (a.norm() * b.norm()))


def test_slerp_turns_evenly_from_one_end_to_the_other():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(6, 4, generator=g), 3 * torch.randn(6, 4, generator=g)
    assert torch.equal(slerp(a, b, 0), a) and torch.equal(slerp(a, b, 1), b)
    assert torch.equal(slerp(a, b, 0.0), a) and torch.equal(slerp(a, b, 1.0), b)
    whole = angle(a, b)
    for alpha in (0.1, 0.25, 0.5, 0.9):
        z = slerp(a, b, alpha)
        assert z.shape == a.shape
        assert angle(a, z) == pytest.approx(alpha * whole, abs=1e-3)
        assert angle(z, b) == pytest.approx((1 - alpha) * whole, abs=1e-3)
        assert float(z.norm()) == pytest.approx(float((1 - alpha) * a.norm() + alpha * b.norm()), rel=1e-4)
    torch.testing.assert_close(slerp(a, b, 0.3), slerp(b, a, 0.7))


def test_slerp_where_there_is_no_angle():
    a, zero = torch.randn(3, 4), torch.zeros(3, 4)
    for b in (2 * a, zero, -a, a):
        for z in (slerp(a, b, 0.5), slerp(b, a, 0.5)):
            torch.testing.assert_close(z, (a + b) / 2)
    assert slerp(torch.zeros(0, 4), torch.zeros(0, 4), 0.5).shape == (0, 4)


def test_mix_gives_each_bar_its_own_share():
    a, b = torch.randn(8, 3), torch.randn(8, 3)
    torch.testing.assert_close(mix(a, b, 0.3, 4), slerp(a, b, 0.3))
    swapped = mix(a, b, [0, 1, 0, 0.5], 4)
    assert torch.equal(swapped[:2], a[:2]) and torch.equal(swapped[2:4], b[2:4]) and torch.equal(swapped[4:6], a[4:6])
    torch.testing.assert_close(swapped[6:], slerp(a[6:], b[6:], 0.5))


@pytest.mark.parametrize("rows, alphas", [(8, [0.0, 1.0]), (6, [0.0, 0.0, 1.0, 1.0])])
def test_mix_refuses_alphas_that_do_not_fit(rows, alphas):
    with pytest.raises(ValueError, match="alpha: expected a number, or a list of 4"):
        mix(torch.zeros(rows, 3), torch.zeros(rows, 3), alphas, 4)
