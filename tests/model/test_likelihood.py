"""One teacher-forced pass, against the same numbers computed window by window."""

import numpy as np
import pytest
import torch

from mtxlib.config import PAD
from mtxlib.data.store import Windows
from mtxlib.model.likelihood import Measured, measure, other_pieces, stack
from mtxlib.model.losses import reconstruction
from mtxlib.model.vae import MusicVAE, Posterior


def small_model(config, store, **changes):
    torch.manual_seed(1)
    return MusicVAE(config.replace(**changes).model, store.vocab_size, store.n_bars)


def measured(mu, logvar=None, is_live=None, recon=None, n_tokens=None):
    N, S, _ = mu.shape
    recon = torch.zeros(N) if recon is None else recon
    return Measured(torch.ones(N) if n_tokens is None else n_tokens, recon, recon + 1, recon + 2, mu,
                    torch.zeros_like(mu) if logvar is None else logvar,
                    torch.ones(N, S, dtype=torch.bool) if is_live is None else is_live)


@pytest.mark.parametrize("pieces", [[0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 0, 1], [0, 1], [3, 3, 1, 1, 1, 0, 0, 0, 0, 2],
                                    [0, 1, 0, 1, 0, 1, 0, 1]])
def test_the_shuffled_partner_is_of_another_piece(pieces):
    pieces = np.array(pieces)
    partner = other_pieces(pieces)
    assert (pieces[partner] != pieces).all()


def test_many_partners_are_used():
    pieces = np.random.default_rng(0).integers(0, 9, 200)
    assert len(set(other_pieces(pieces).tolist())) > 150
    assert other_pieces(np.zeros(5, int)).tolist() == [0, 1, 2, 3, 4], "with one piece there is no other"


def test_active_units_of_a_case_made_by_hand():
    """Four dimensions: constant, barely moving, moving, moving in live rows only."""
    g = torch.Generator().manual_seed(0)
    n = 400
    moves = torch.randn(n, generator=g)
    mu = torch.stack([torch.full((n,), 3.0), 0.05 * moves, 0.2 * moves, torch.zeros(n)], -1)[:, None]
    assert measured(mu).active_units() == 0.25, "0.05 squared is below the threshold of 0.01, 0.2 squared above"
    assert measured(mu).active_units(threshold=1.0) == 0.0
    torch.testing.assert_close(measured(mu).mean_variance()[0, 2], (0.2 * moves).var(correction=0))


def test_rows_that_are_not_live_do_not_count():
    mu = torch.tensor([[[1.0], [5.0]], [[-1.0], [0.0]], [[0.0], [0.0]]])
    is_live = torch.tensor([[True, True], [True, False], [True, False]])
    m = measured(mu, is_live=is_live)
    torch.testing.assert_close(m.mean_variance(), torch.tensor([[2 / 3], [0.0]]))
    assert m.active_units() == 0.5 and (m.kl[~is_live] == 0).all()


def test_summary_is_per_window_and_per_token():
    m = measured(torch.ones(2, 1, 2), recon=torch.tensor([10.0, 30.0]), n_tokens=torch.tensor([10, 90]))
    s = m.summary()
    assert (s["recon"], s["kl"], s["recon_per_token"]) == (20.0, 1.0, pytest.approx(0.4))
    assert s["delta_nll_shuffled"] == pytest.approx(2 / 100) and s["active_units"] == 0.0


def test_posteriors_of_different_lengths_are_filled_up():
    a = Posterior(torch.ones(2, 3, 1), torch.ones(2, 3, 1), torch.ones(2, 3, dtype=torch.bool))
    b = Posterior(torch.ones(1, 1, 1), torch.ones(1, 1, 1), torch.ones(1, 1, dtype=torch.bool))
    both = stack([a, b])
    assert both.mu.shape == (3, 3, 1) and both.is_live.sum(1).tolist() == [3, 3, 1]


@pytest.mark.parametrize("bottleneck", ["rows", "conv", "none"])
def test_batches_do_not_change_the_numbers(bottleneck, config, store):
    model, indices = small_model(config, store, bottleneck=bottleneck), store.select("valid")
    results = [measure(model, store, indices, batch_size=n) for n in (1, 3, 128)]
    for name in Measured.__annotations__:
        for other in results[1:]:
            torch.testing.assert_close(getattr(other, name), getattr(results[0], name), atol=2e-3, rtol=1e-4, msg=name)
    assert results[0].n_tokens.tolist() == (store.lengths[indices] - 1).tolist()


def test_measuring_is_deterministic_and_leaves_no_trace(config, store):
    model, indices = small_model(config, store, dropout=0.3).train(), store.select("valid")
    state, before = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    a, b, c = (measure(model, store, indices, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(a.recon, b.recon) and not torch.equal(a.recon, c.recon) and model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_numbers_are_those_of_each_window_and_its_partner(config, store):
    """Two windows of two pieces: each must be the other's shuffled partner, whatever their lengths."""
    model = small_model(config, store, variational=False, bottleneck="conv").eval()
    indices = np.array([next(i for i in store.select(s)) for s in ("valid", "test")])
    m = measure(model, store, indices)
    windows = [store.batch([i]) for i in indices]
    posteriors = [model.encode(*w) for w in windows]
    S = max(p.mu.shape[1] for p in posteriors)
    mus, lives = ([torch.nn.functional.pad(x, (0, 0) * (x.ndim - 2) + (0, S - x.shape[1])) for x in xs]
                  for xs in ([p.mu for p in posteriors], [p.is_live for p in posteriors]))
    for i, (ids, slots) in enumerate(windows):
        for name, j in (("recon", i), ("recon_shuffled", 1 - i)):
            logits = model.decode(ids[:, :-1], slots[:, :-1], mus[j], lives[j])
            expected = reconstruction(logits, ids[:, 1:], ids[:, 1:] == PAD)
            torch.testing.assert_close(getattr(m, name)[i:i + 1], expected.detach(), atol=1e-2, rtol=1e-4)
        torch.testing.assert_close(m.mu[i], mus[i][0].detach(), atol=1e-5, rtol=1e-4)
    assert not torch.equal(m.recon, m.recon_shuffled)


def test_a_decoder_that_ignores_z_loses_nothing(config, store):
    model = small_model(config, store)
    with torch.no_grad():
        for block in model.decoder.blocks:
            block.cross.out.weight.zero_()
        for layer in model.decoder.add_rows:
            layer.weight.zero_()
    m = measure(model, store, store.select("valid"))
    assert abs(m.per_token(m.recon_shuffled - m.recon)) < 1e-6 and abs(m.per_token(m.recon_prior - m.recon)) < 1e-6
    deaf, hearing = m.recon_shuffled, small_model(config, store)
    assert not torch.equal(deaf, measure(hearing, store, store.select("valid")).recon_shuffled)


def test_windows_in_memory_are_measured_like_those_of_a_store(config, store):
    model, indices = small_model(config, store), store.select("test")
    packed = Windows.pack([store.batch([i]).ids[0].numpy() for i in indices],
                          [store.batch([i]).slots[0].numpy() for i in indices], store.windows[indices])
    a, b = measure(model, store, indices), measure(model, packed, np.arange(len(packed)))
    torch.testing.assert_close(a.recon, b.recon)
