"""Properties every bottleneck and every condition must have: causality, padding, use of z, the cache, gradients."""

import copy
import math

import pytest
import torch

from mtxlib.config import BOS, EOS, N_SPECIAL, PAD, SLOTS_PER_BAR, ModelConfig
from mtxlib.data.store import pad_sequences
from mtxlib.model.losses import kl_per_dim, reconstruction
from mtxlib.model.vae import LOGVAR_RANGE, MusicVAE, Posterior, sinusoid

V, N_BARS, C = 24, 2, 4
LENGTHS = (29, 13, 22)  # no multiples of the stride; in a batch they have 33 positions, so that all are padded
SMALL = {"d_model": 32, "enc_layers": 2, "dec_layers": 2, "n_heads": 2, "latent_channels": C, "conv_stride": 4,
         "rows_per_bar": 2, "max_tokens": 64}
KINDS = [(b, c) for b in ("conv", "linear1d", "linear2d", "rows") for c in ("cross", "in", "both")] + [("none", "both")]
WITH_LATENT = KINDS[:-1]


def make(bottleneck, condition="both", **changes):
    torch.manual_seed(0)
    model = MusicVAE(ModelConfig(**{**SMALL, "bottleneck": bottleneck, "condition": condition, **changes}), V, N_BARS)
    return model.eval()


def window(length, seed):
    """ids and slots (1, T): slots go forward as they do in a real window."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(N_SPECIAL, V, (1, length), generator=g)
    ids[0, 0], ids[0, -1] = BOS, EOS
    slots = torch.randint(N_BARS * SLOTS_PER_BAR, (1, length), generator=g).sort(1).values
    return ids, slots


def batch_of(windows):
    """As a store makes them."""
    return [pad_sequences([x[0].numpy() for x in part]) for part in zip(*windows, strict=True)]


@pytest.fixture(scope="module")
def batch():
    return batch_of([window(n, seed) for seed, n in enumerate(LENGTHS)])


def some_z(model, posterior, seed=3):
    return posterior.mu + torch.randn(posterior.mu.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bottleneck, condition", KINDS)
def test_shapes(bottleneck, condition, batch):
    model, (ids, slots) = make(bottleneck, condition), batch
    B, T = ids.shape
    S = {"conv": math.ceil(T / 4), "linear1d": 1, "linear2d": T, "rows": 2 * N_BARS, "none": 0}[bottleneck]
    out = model(ids, slots)
    assert out.logits.shape == (B, T - 1, V) and out.logits.isfinite().all()
    assert out.z.shape == out.posterior.mu.shape == out.posterior.logvar.shape == (B, S, C)
    assert out.posterior.is_live.shape == (B, S)
    if model.bottleneck:
        assert model.bottleneck.n_rows(T) == S
        live = {"conv": [8, 4, 6], "linear2d": list(LENGTHS)}.get(bottleneck, [S] * 3)
        assert out.posterior.is_live.sum(1).tolist() == live, "rows that carry music"
        assert (out.posterior.mu[~out.posterior.is_live] == 0).all()


@pytest.mark.parametrize("bottleneck, condition", KINDS)
def test_the_future_does_not_change_the_past(bottleneck, condition, batch):
    model, (ids, slots) = make(bottleneck, condition), batch
    posterior = model.encode(ids, slots)
    z = some_z(model, posterior)
    for t in (1, 7, 20):
        later_ids, later_slots = ids.clone(), slots.clone()
        later_ids[:, t:] = (ids[:, t:] + 5) % (V - N_SPECIAL) + N_SPECIAL
        later_slots[:, t:] = 31
        a, b = (model.decode(*x, z, posterior.is_live) for x in ((ids, slots), (later_ids, later_slots)))
        torch.testing.assert_close(a[:, :t], b[:, :t])
        assert (a[:, t] - b[:, t]).abs().max() > 1e-4, "the token itself does change what follows"


@pytest.mark.parametrize("bottleneck, condition", KINDS)
def test_padding_changes_nothing(bottleneck, condition, batch):
    """A window alone gives the posterior and logits that it gives beside longer ones; also with a sampled z, whose
    rows beyond the window's end are noise."""
    model, (ids, slots) = make(bottleneck, condition), batch
    posterior = model.encode(ids, slots)
    z = some_z(model, posterior)
    logits = model.decode(ids, slots, z, posterior.is_live)
    for i, n in enumerate(LENGTHS):
        alone = model.encode(ids[i:i + 1, :n], slots[i:i + 1, :n])
        S = alone.mu.shape[1]
        assert alone.is_live.all() and posterior.is_live[i].sum() == S
        torch.testing.assert_close(posterior.mu[i, :S], alone.mu[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(posterior.logvar[i, :S], alone.logvar[0], atol=1e-5, rtol=1e-4)
        ours = model.decode(ids[i:i + 1, :n], slots[i:i + 1, :n], z[i:i + 1, :S], alone.is_live)
        torch.testing.assert_close(logits[i, :n], ours[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bottleneck, condition", KINDS)
def test_padding_is_free(bottleneck, condition, batch):
    model, (ids, slots) = make(bottleneck, condition), batch
    posterior = model.encode(ids, slots)
    kl = kl_per_dim(*posterior).sum((1, 2)).tolist()
    logits = model.decode(ids[:, :-1], slots[:, :-1], posterior.mu, posterior.is_live)
    recon = reconstruction(logits, ids[:, 1:], ids[:, 1:] == PAD)
    for i, n in enumerate(LENGTHS):
        alone = model.encode(ids[i:i + 1, :n], slots[i:i + 1, :n])
        assert kl_per_dim(*alone).sum().item() == pytest.approx(kl[i], rel=1e-4, abs=1e-4)
        ours = model.decode(ids[i:i + 1, :n - 1], slots[i:i + 1, :n - 1], alone.mu, alone.is_live)
        nats = reconstruction(ours, ids[i:i + 1, 1:n], torch.zeros(1, n - 1, dtype=torch.bool))
        assert nats.item() == pytest.approx(recon[i].item(), rel=1e-4)


@pytest.mark.parametrize("bottleneck, condition", WITH_LATENT)
def test_changing_z_changes_logits(bottleneck, condition, batch):
    model, (ids, slots) = make(bottleneck, condition), batch
    posterior = model.encode(ids, slots)
    z = some_z(model, posterior)
    a, b = (model.decode(ids, slots, x, posterior.is_live) for x in (z, z.flip(0)))
    assert ((a - b).abs().amax(-1) > 1e-4).float().mean() > 0.5
    for row in range(z.shape[1]):
        if posterior.is_live[0, row]:
            changed = z.clone()
            changed[0, row] += 1
            c = model.decode(ids, slots, changed, posterior.is_live)
            assert (a[0] - c[0]).abs().max() > 1e-5, f"row {row} is read"
            torch.testing.assert_close(a[1:], c[1:])


def test_none_ignores_everything_but_its_input(batch):
    model, (ids, slots) = make("none"), batch
    posterior = model.encode(ids, slots)
    assert posterior.mu.shape == (3, 0, C) and kl_per_dim(*posterior).sum() == 0
    a = model.decode(ids, slots, posterior.mu, posterior.is_live)
    b = model.decode(ids, slots, torch.randn(3, 5, C), torch.ones(3, 5, dtype=torch.bool))
    assert torch.equal(a, b)
    assert torch.equal(model(ids, slots, enc_ids=ids.flip(1)).logits, model(ids, slots).logits)
    assert not any("encoder" in name or "cross" in name or "add_rows" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("bottleneck, condition", KINDS)
def test_cached_steps_are_the_full_pass(bottleneck, condition, batch):
    """Token by token, with sequences leaving on the way."""
    model, (ids, slots) = make(bottleneck, condition), batch
    posterior = model.encode(ids, slots)
    z = some_z(model, posterior)
    full = model.decode(ids, slots, z, posterior.is_live)
    decoding, rows = model.begin(z, posterior.is_live, size=ids.shape[1]), torch.arange(3)
    for t in range(ids.shape[1]):
        if t == 13:
            rows = torch.tensor([2, 0])
            decoding.keep(rows)
        step = model.proceed(ids[rows, t:t + 1], slots[rows, t:t + 1], decoding)
        torch.testing.assert_close(step, full[rows, t], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("bottleneck, condition", KINDS)
def test_gradients_reach_every_parameter(bottleneck, condition, tie_weights, batch):
    model, (ids, slots) = make(bottleneck, condition, tie_weights=tie_weights).train(), batch
    out = model(ids, slots)
    loss = reconstruction(out.logits, ids[:, 1:], ids[:, 1:] == PAD).sum() + kl_per_dim(*out.posterior).sum()
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name


@pytest.mark.parametrize("bottleneck, condition", KINDS)
def test_a_copy_is_independent(bottleneck, condition, batch):
    model, (ids, slots) = make(bottleneck, condition, variational=False), batch
    before = model(ids, slots).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids, slots).logits, before)
    assert twin.decoder.head.weight is twin.decoder.embedding.token.weight
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.1)
    assert torch.equal(model(ids, slots).logits, before) and not torch.equal(twin(ids, slots).logits, before)


@pytest.mark.parametrize("bottleneck, condition", KINDS)
def test_bf16_autocast_is_close_to_fp32(bottleneck, condition, batch):
    model, (ids, slots) = make(bottleneck, condition, variational=False), batch
    expected = model(ids, slots)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, slots)
    assert out.posterior.mu.dtype == torch.float32
    assert (out.logits.float() - expected.logits).abs().max() < 0.1 * expected.logits.std() + 0.05


# -- one thing at a time --------------------------------------------------------------------------------------------

def test_weights_are_tied_and_counted_once():
    tied, free = make("rows"), make("rows", tie_weights=False)
    assert free.n_parameters() - tied.n_parameters() == V * 32
    assert tied.decoder.head.weight is tied.decoder.embedding.token.weight


def test_reparameterize_samples_the_posterior():
    model = make("rows")
    mu, logvar = torch.tensor([[[1.0, -2.0]]]).expand(4000, 1, 2), torch.tensor([[[0.0, -2.0]]]).expand(4000, 1, 2)
    posterior = Posterior(mu, logvar, torch.ones(4000, 1, dtype=torch.bool))
    z = model.reparameterize(posterior, torch.Generator().manual_seed(0))
    torch.testing.assert_close(z.mean(0), mu[0], atol=0.07, rtol=0)
    torch.testing.assert_close(z.var(0).log(), logvar[0], atol=0.1, rtol=0)
    assert torch.equal(z, model.reparameterize(posterior, torch.Generator().manual_seed(0)))
    assert torch.equal(make("rows", variational=False).reparameterize(posterior), mu)


def test_logvar_stays_in_its_range(batch):
    model = make("rows")
    with torch.no_grad():
        model.bottleneck.head.weight.mul_(1000)
    logvar = model.encode(*batch).logvar
    assert (logvar.min(), logvar.max()) == LOGVAR_RANGE


def test_token_dropout_reaches_the_side_it_is_for(batch):
    model, (ids, slots) = make("rows", variational=False), batch
    other = ids.clone()
    other[:, 5] = 3
    plain, enc, dec = model(ids, slots), model(ids, slots, enc_ids=other), model(ids, slots, dec_ids=other)
    assert torch.equal(plain.posterior.mu, dec.posterior.mu) and not torch.equal(plain.posterior.mu, enc.posterior.mu)
    assert torch.equal(plain.logits[:, :5], dec.logits[:, :5]) and not torch.equal(plain.logits, dec.logits)


# -- rows -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rows_per_bar", [1, 2, 4])
def test_a_token_is_pooled_into_its_own_row_alone(rows_per_bar, batch):
    """Without encoder blocks, which mix all positions, a token reaches one row."""
    model, (ids, slots) = make("rows", rows_per_bar=rows_per_bar), batch
    model.encoder.blocks = torch.nn.ModuleList()
    mu = model.encode(ids, slots).mu
    assert mu.shape[1] == N_BARS * rows_per_bar
    for t in range(1, 12):
        changed = ids.clone()
        changed[:, t] = (ids[:, t] + 3) % (V - N_SPECIAL) + N_SPECIAL
        is_moved = (model.encode(changed, slots).mu - mu).abs().amax(-1) > 1e-6
        own = slots[:, t] // (SLOTS_PER_BAR // rows_per_bar)
        assert is_moved.nonzero().tolist() == [[i, int(row)] for i, row in enumerate(own)]


def test_an_empty_row_has_its_own_code():
    model = make("rows")
    ids, slots = torch.tensor([[BOS, 5, 6, EOS]]), torch.tensor([[0, 0, 3, 3]])
    model.encoder.blocks = torch.nn.ModuleList()
    mu = model.encode(ids, slots).mu[0]
    other = model.encode(torch.tensor([[BOS, 9, 9, EOS]]), slots).mu[0]
    assert mu.isfinite().all() and torch.equal(mu[1:], other[1:]) and not torch.equal(mu[0], other[0])
    assert torch.equal(mu[1], mu[2]), "whatever its place"


def test_rows_at_gives_a_tokens_own_row_and_the_next():
    model = make("rows")  # 2 rows a bar, 8 slots a row
    z = torch.arange(1.0, 1 + 2 * 4 * C).view(2, 4, C)
    slots = torch.tensor([[0, 7, 8, 16, 24, 31], [31, 24, 23, 15, 1, 0]])
    rows = model.rows_at(z, slots)
    assert rows.shape == (2, 6, 2 * C)
    for i in range(2):
        for t in range(6):
            row = int(slots[i, t]) // 8
            following = z[i, row + 1] if row < 3 else torch.zeros(C)
            assert torch.equal(rows[i, t], torch.cat([z[i, row], following]))


@pytest.mark.parametrize("bottleneck, rows", [("conv", [0, 0, 0, 0, 1, 1, 1]), ("linear2d", [0, 1, 2, 3, 4, 5, 6]),
                                              ("linear1d", [0] * 7)])
def test_rows_of_the_other_bottlenecks_follow_the_tokens(bottleneck, rows):
    model, slots = make(bottleneck), torch.zeros(1, 7, dtype=torch.long)
    assert model.bottleneck.row_of(slots).tolist() == [rows]
    assert model.bottleneck.row_of(slots[:, 5:], start=5).tolist() == [rows[5:]]
    z = torch.cat([torch.randn(1, 3, C), torch.zeros(1, 9, C)], dim=1)
    own = model.rows_at(z[:, :3], slots)[0, :, :C]
    assert torch.equal(own, z[0, rows]), "where a decoding runs on beyond its latent, it reads zeros"


def test_linear1d_takes_padding_beyond_its_tokens_but_no_token():
    """64 positions: a window that fills them is padded to 65."""
    model, (ids, slots) = make("linear1d", variational=False), batch_of([window(64, 0), window(40, 1)])
    out, alone = model(ids, slots), model(ids[:1, :64], slots[:1, :64])
    assert ids.shape == (2, 65)
    torch.testing.assert_close(out.posterior.mu[0], alone.posterior.mu[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out.logits[0, :63], alone.logits[0], atol=1e-5, rtol=1e-4)
    for n in (65, 66):
        with pytest.raises(ValueError, match="linear1d: expected at most max_tokens = 64 tokens, got"):
            model.encode(*batch_of([window(40, 1), window(n, 0)]))


def test_a_traced_model_gives_the_same():
    """What torch.compile reads of it, without the compiler; the second batch has another length."""
    model = make("rows", enc_layers=1, dec_layers=1).train()
    traced = torch.compile(model, backend="eager", dynamic=True)
    for lengths in ((5, 9), (20, 30)):
        ids, slots = batch_of([window(n, n) for n in lengths])
        torch.manual_seed(1)
        ours = traced(ids, slots)
        torch.manual_seed(1)
        expected = model(ids, slots)
        torch.testing.assert_close(ours.logits, expected.logits)
        assert torch.equal(ours.z, expected.z) and not torch.equal(ours.z, ours.posterior.mu), "sampled alike"


def test_conv_works_at_any_length():
    model = make("conv")
    for n in (2, 4, 5, 64, 200):
        out = model(*window(n, n))
        assert out.posterior.mu.shape[1] == math.ceil(n / 4) and out.logits.isfinite().all()


def test_sinusoid_is_vaswanis():
    table = sinusoid(50, 8, torch.zeros(1))
    for t in (0, 1, 49):
        for i in range(4):
            angle = t / 10_000 ** (i / 4)
            assert table[t, [i, i + 4]].tolist() == pytest.approx([math.sin(angle), math.cos(angle)], abs=1e-5)
