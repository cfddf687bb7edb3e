"""The units of the objective, against torch's own functions, at named places of the schedules and in a closed loop."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

from mtxlib.model.losses import beta_at, kl_per_dim, lr_at, objective, rate_at, reconstruction, steer

B, T, V, S, C = 5, 9, 7, 4, 3


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    lengths = torch.tensor([9, 4, 7, 1, 6])
    return {"logits": 3 * torch.randn(B, T, V, generator=g), "targets": torch.randint(V, (B, T), generator=g),
            "is_pad": torch.arange(T) >= lengths[:, None], "mu": 2 * torch.randn(B, S, C, generator=g),
            "logvar": torch.randn(B, S, C, generator=g), "is_live": torch.rand(B, S, generator=g) < 0.7}


def terms(batch, **kwargs):
    recon = reconstruction(batch["logits"], batch["targets"], batch["is_pad"])
    kl = kl_per_dim(batch["mu"], batch["logvar"], batch["is_live"])
    return objective(recon, kl, 0.7, n_tokens=(~batch["is_pad"]).sum(1), **kwargs)


def test_kl_is_that_of_torch_distributions(batch):
    ours = kl_per_dim(batch["mu"], batch["logvar"], torch.ones(B, S, dtype=torch.bool))
    theirs = kl_divergence(Normal(batch["mu"], (0.5 * batch["logvar"]).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(ours, theirs)


def test_rows_that_are_not_live_cost_nothing(batch):
    kl = kl_per_dim(batch["mu"], batch["logvar"], batch["is_live"])
    assert (kl[~batch["is_live"]] == 0).all() and (kl[batch["is_live"]] > 0).all()


def test_reconstruction_is_the_summed_cross_entropy_of_each_sequence(batch):
    ours = reconstruction(batch["logits"], batch["targets"], batch["is_pad"])
    theirs = [F.cross_entropy(x[~p], t[~p], reduction="sum")
              for x, t, p in zip(batch["logits"], batch["targets"], batch["is_pad"], strict=True)]
    torch.testing.assert_close(ours, torch.stack(theirs))


def test_reconstruction_is_computed_in_float32(batch):
    ours = reconstruction(batch["logits"].bfloat16(), batch["targets"], batch["is_pad"])
    torch.testing.assert_close(ours, reconstruction(batch["logits"].bfloat16().float(), batch["targets"],
                                                    batch["is_pad"]))


def test_loss_is_the_negative_elbo_at_beta_1(batch):
    recon, kl = torch.tensor([10.0, 20.0]), torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
    assert objective(recon, kl, 1.0) == (20.0, 15.0, 5.0, 5.0)
    assert objective(recon, kl, 0.1).loss == pytest.approx(15.5)


@pytest.mark.parametrize("kwargs", [{}, {"free_bits": 0.4}, {"target_rate": 3.0}, {"target_rate": 300.0},
                                    {"recon_scale": "token"}])
def test_tiling_a_batch_changes_nothing(batch, kwargs):
    once = terms(batch, **kwargs)
    thrice = terms({k: torch.cat([v] * 3) for k, v in batch.items()}, **kwargs)
    for name, a, b in zip(once._fields, once, thrice, strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_more_latent_dimensions_cost_more(batch):
    """A KL averaged over dimensions, or over the batch twice, would not double."""
    twice = {**batch, **{k: torch.cat([batch[k]] * 2, dim=1) for k in ("mu", "logvar", "is_live")}}
    torch.testing.assert_close(terms(twice).kl, 2 * terms(batch).kl)


def test_free_bits_clamp_each_dimension_after_the_batch_mean():
    kl = torch.tensor([[[0.0, 3.0]], [[2.0, 3.0]], [[1.0, 0.0]]])  # means 1 and 2
    counted = {bits: objective(torch.zeros(3), kl, 1.0, free_bits=bits).kl_loss for bits in (0.0, 1.0, 1.5)}
    assert counted[1.0] == 3.0, "clamped before the mean it would be 4/3 + 7/3"
    assert counted[1.5] == 3.5, "clamped as a total it would be 3"
    assert counted[0.0] == 3.0
    assert objective(torch.zeros(3), kl, 2.0, free_bits=1.5) == (7.0, 0.0, 3.0, 3.5), "the reported KL stays raw"


def test_free_dimensions_get_no_gradient():
    mu = torch.tensor([[[0.1, 2.0]]], requires_grad=True)
    kl = kl_per_dim(mu, torch.zeros(1, 1, 2), torch.ones(1, 1, dtype=torch.bool))
    objective(torch.zeros(1), kl, 1.0, free_bits=0.5).loss.backward()
    assert mu.grad.tolist() == [[[0.0, 2.0]]]


@pytest.mark.parametrize("target, sign", [(4.0, 1), (6.0, -1)])
def test_target_rate_pulls_from_both_sides(target, sign):
    kl = torch.full((2, 1, 5), 1.0, requires_grad=True)
    result = objective(torch.zeros(2), kl, 1.0, target_rate=target)
    assert result.kl == 5.0 and result.kl_loss == 1.0
    result.loss.backward()
    assert (kl.grad == sign / 2).all()


def test_recon_scale_token_multiplies_the_weight_of_the_kl_by_the_number_of_tokens():
    recon = torch.tensor([300.0, 500.0], requires_grad=True)
    kl = torch.full((2, 3, 4), 2.0, requires_grad=True)
    n = 250
    mistake = objective(recon, kl, 0.1, recon_scale="token", n_tokens=torch.tensor([n, n]))
    right = objective(recon, kl, 0.1 * n)
    torch.testing.assert_close(mistake.loss * n, right.loss)
    a, b = (torch.autograd.grad(x, (recon, kl)) for x in (mistake.loss, right.loss))
    for ours, theirs in zip(a, b, strict=True):
        torch.testing.assert_close(ours * n, theirs)
    assert mistake.recon == right.recon == 400.0 and mistake.kl == 24.0, "what is reported stays in nats per sequence"


@pytest.mark.parametrize("schedule, step, expected", [
    ("constant", 0, 0.5), ("constant", 99, 0.5),
    ("linear", 0, 0.0), ("linear", 50, 0.25), ("linear", 100, 0.5), ("linear", 1000, 0.5),
    ("cyclical", 0, 0.0), ("cyclical", 25, 0.25), ("cyclical", 50, 0.5), ("cyclical", 99, 0.5),
    ("cyclical", 100, 0.0), ("cyclical", 125, 0.25), ("cyclical", 175, 0.5)])
def test_beta_schedules(schedule, step, expected):
    assert beta_at(step, schedule, 0.5, 100) == pytest.approx(expected)
    assert beta_at(step, schedule, 0.5, 0) == 0.5, "no warm-up"


@pytest.mark.parametrize("schedule", ["rate", "Linear", ""])
def test_a_schedule_without_a_clock_is_refused(schedule):
    with pytest.raises(ValueError, match=f"beta_schedule: expected constant, linear or cyclical, got '{schedule}'"):
        beta_at(3, schedule, 0.5, 100)


@pytest.mark.parametrize("beta", [1e-4, 0.003, 0.1, 0.99, 1.0])
def test_beta_is_steered_towards_the_target_and_stays_in_its_bounds(beta):
    beta, on_target, above = torch.tensor([beta, 200.0, 300.0], dtype=torch.float64)
    rates = [0.0, 20.0, 100.0, 199.0, 200.0, 201.0, 400.0, 20_000.0, 1e12]
    betas = [steer(beta, torch.tensor(kl).double(), 200.0, 1.0) for kl in rates]
    assert betas == sorted(betas) and all(1e-4 <= b <= 1.0 for b in betas), "the higher the rate the dearer, in bounds"
    assert steer(beta, on_target, 200.0, 1.0) == beta, "on target it stays"
    for kl, moved in zip(rates, betas, strict=True):
        if (beta < 1.0 and kl > 200) or (beta > 1e-4 and kl < 200):
            assert (moved > beta) == (kl > 200) and moved != beta, "at a bound it turns back at once"
    assert steer(beta, above, 200.0, beta) == beta, "beta_max is the most"


@pytest.mark.parametrize("start", [0.001, 0.01, 1.0])
@pytest.mark.parametrize("b", [0.25, 0.5, 1.0, 2.0])
def test_steering_settles_on_the_target(b, start):
    """A model stands in whose rate falls as beta ** -b, with 10 % of noise, while the target is lowered from 400 to 200
    as in training. At beta = 0.1 its rate would be 200."""
    noise, beta, rates = random.Random(0), torch.tensor(start), []
    for step in range(2500):
        rates.append(200 * (beta / 0.1) ** -b * noise.lognormvariate(0, 0.1))
        beta = steer(beta, rates[-1], rate_at(step, 200.0, 400.0, 500), 1.0)
    assert sum(rates[-500:]) / 500 == pytest.approx(200, rel=0.03) and float(beta) == pytest.approx(0.1, rel=0.15)


@pytest.mark.parametrize("step, expected", [(0, 400.0), (50, 250.0), (100, 100.0), (5000, 100.0)])
def test_target_rate_is_lowered_from_its_start(step, expected):
    assert rate_at(step, 100.0, 400.0, 100) == pytest.approx(expected)
    assert rate_at(step, 100.0, 0.0, 100) == 100.0


def test_learning_rate_is_that_of_torch_after_a_linear_warm_up():
    assert [lr_at(s, 100, 4) for s in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=96, eta_min=0.1)
    for step in range(4, 101):
        assert lr_at(step, 100, 4) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-5), step
        optimizer.step()
        theirs.step()
    assert lr_at(100, 100, 4) == pytest.approx(0.1) and lr_at(0, 10, 0) == pytest.approx(1.0)
