"""A prior that learns along with the model: its numbers against N(0, I), and who hears which part of the loss."""

import pytest
import torch
from torch import distributions

from mtxlib.config import Config
from mtxlib.data.store import TokenStore
from mtxlib.model.likelihood import measure
from mtxlib.model.losses import entropy, kl_per_dim, normal_share
from mtxlib.model.prior import RowPrior
from mtxlib.model.train import Trainer, train


@pytest.fixture
def trainer(run_config, tmp_path):
    return Trainer(run_config.replace(prior="joint", beta_schedule="constant", dec_token_dropout=0.0), tmp_path, "cpu")


def grads(loss, parameters):
    return [torch.zeros_like(p) if g is None else g for p, g in
            zip(parameters, torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True), strict=True)]


def test_under_a_normal_prior_both_kls_agree():
    prior = RowPrior(3, rows_per_bar=4, d_model=16, n_layers=1, n_heads=2, hidden=8, components=1).eval()
    with torch.no_grad():  # one component, mean 0, log sigma 0, whatever came before
        prior.to_mixture.zero_()
        prior.bias.zero_()
    torch.manual_seed(0)
    mu, logvar = torch.randn(2000, 4, 3), torch.randn(2000, 4, 3) - 1
    z = mu + torch.randn(mu.shape) * (0.5 * logvar).exp()
    nats = prior.window_nats(z).detach()
    torch.testing.assert_close(nats, -distributions.Normal(0, 1).log_prob(z).sum(-1))
    torch.testing.assert_close(entropy(logvar), distributions.Normal(mu, (0.5 * logvar).exp()).entropy().sum(-1))
    exact = float(kl_per_dim(mu, logvar, torch.ones(2000, 4, dtype=torch.bool)).sum((1, 2)).mean())
    assert float((nats - entropy(logvar)).sum(1).mean()) == pytest.approx(exact, rel=0.03)


def test_a_row_is_told_of_the_rows_before_it_only(trainer):
    prior, z = trainer.model.prior, torch.randn(1, 16, 4)
    changed = z.clone()
    changed[:, 9] += 1
    differs = (prior.window_nats(z) - prior.window_nats(changed)).abs()[0] > 1e-6
    assert not differs[:9].any() and differs[9:].all()


def test_the_prior_hears_its_own_loss_in_full_and_the_model_only_the_kl(trainer):
    batch = next(trainer.batches())
    trainer.step, model = 3, trainer.model
    of_prior = list(model.prior.parameters())
    others = [p for name, p in model.named_parameters() if not name.startswith("prior.")]
    torch.manual_seed(1)
    loss = trainer.terms(batch).loss
    torch.manual_seed(1)
    out = model(batch.ids, batch.slots)
    share, beta = normal_share(3, trainer.c.beta_warmup), trainer.c.beta_max
    for ours, alone in zip(grads(loss, of_prior), grads(out.prior_loss.sum(1).mean(), of_prior), strict=True):
        torch.testing.assert_close(ours, alone, atol=1e-5, rtol=1e-3)
    targets = batch.ids[:, 1:]
    recon = torch.nn.functional.cross_entropy(out.logits.transpose(1, 2), targets, reduction="none", ignore_index=0)
    kl = share * kl_per_dim(*out.posterior).sum((1, 2)) + (1 - share) * (
        out.prior_nats - entropy(out.posterior.logvar)).sum(1)
    expected = (recon.sum(1) + beta * kl).mean()
    for ours, theirs in zip(grads(loss, others), grads(expected, others), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)


def test_samples_follow_the_prior():
    prior = RowPrior(2, rows_per_bar=4, d_model=16, n_layers=1, n_heads=2, hidden=8, components=1).eval()
    with torch.no_grad():
        prior.to_mixture.zero_()
        prior.bias.copy_(torch.tensor([[0.0, 1.5, -1.0], [0.0, -0.5, 0.0]]))  # log weight, mean, log sigma
    z = prior.sample_windows(3000, 4, torch.Generator().manual_seed(0))
    assert z.shape == (3000, 4, 2)
    torch.testing.assert_close(z.mean((0, 1)), torch.tensor([1.5, -0.5]), atol=0.05, rtol=0)
    torch.testing.assert_close(z.std((0, 1)), torch.tensor([-1.0, 0.0]).exp(), atol=0.05, rtol=0)


def test_it_is_trained_measured_and_resumed(run_config, tmp_path):
    config = run_config.replace(prior="joint", beta_schedule="rate", target_rate=10.0, ema=0.9)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(config, whole, "cpu")
    first = Trainer(config, halves, "cpu")
    batches = first.batches()
    for _ in range(6):
        first.update(next(batches))
        first.step += 1
    first.save_state()
    train(config, halves, "cpu")
    a, b = (torch.load(folder / "state.pt", weights_only=True)["model"] for folder in (whole, halves))
    assert all(torch.equal(a[name], b[name]) for name in a) and any(name.startswith("prior.") for name in a)
    trainer = Trainer(config, whole, "cpu")
    trainer.resume()
    store = TokenStore(config.data.store)
    m = measure(trainer.model, store, store.select("valid"))
    assert m.rate.isfinite().all() and not torch.allclose(m.rate, m.kl.sum((1, 2)))


@pytest.mark.parametrize("wrong", [{"bottleneck": "conv"}, {"variational": False}, {"free_bits": 0.1}])
def test_a_joint_prior_needs_rows_and_a_kl(wrong):
    with pytest.raises(ValueError, match="parameter 'prior': 'joint' expects"):
        Config.from_flat({"prior": "joint", **wrong})
