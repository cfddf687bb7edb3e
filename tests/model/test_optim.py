"""Muon against torch's own, and the precision that is fast on this machine against rates that are made up."""

import json
from contextlib import nullcontext

import pytest
import torch

from mtxlib.model import optim
from mtxlib.model.optim import Muon, autocast_for, explain, fast_dtype, fast_rates, matmul_rate
from mtxlib.model.train import train

CPU = torch.device("cpu")
WITH_UNITS, WITHOUT = (4e11, 2e11), (3.1e10, 1.65e11)  # bf16 and fp32, FLOP/s


@pytest.mark.parametrize("rates, tolerance", [(WITH_UNITS, 0.01), (WITHOUT, 0.04)], ids=["bf16", "fp32"])
def test_muon_is_torchs(rates, tolerance, monkeypatch):
    """On the same gradients, one matrix at a time in bf16 there; ours must not fall behind in either precision."""
    monkeypatch.setattr(optim, "fast_rates", lambda device: rates)
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 8), (32, 8), (8, 32), (32, 8), (8, 24), (8, 8)]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = ([x.clone().requires_grad_() for x in start] for _ in range(2))
    unused = torch.ones(8, 8, requires_grad=True)  # without a gradient it stays
    optimizers = (Muon([*ours, unused], lr=0.02, weight_decay=0.1),
                  torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, before in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() < tolerance * (b - before).norm()
        state = optimizers[0].state[a]["momentum_buffer"], optimizers[1].state[b]["momentum_buffer"]
        torch.testing.assert_close(*state)
    assert torch.equal(unused, torch.ones(8, 8)) and unused not in optimizers[0].state


def test_a_run_with_it_is_no_worse(run_config, tmp_path, monkeypatch):
    monkeypatch.setattr(optim, "fast_rates", lambda device: WITHOUT)
    config = run_config.replace(optimizer="muon", steps=100, eval_every=100)
    monkeypatch.setattr(torch, "save", lambda state, path: path.write_bytes(b""))
    objectives = []
    for name in ("ours", "torch"):
        train(config, tmp_path / name, "cpu")
        last = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])
        objectives.append(last["objective"])
        monkeypatch.setattr(optim, "Muon", lambda *args, **kwargs: torch.optim.Muon(
            *args, **kwargs, adjust_lr_fn="match_rms_adamw"))
    assert objectives[0] < 1.02 * objectives[1] and objectives[0] != objectives[1]


@pytest.mark.parametrize("rates, chosen", [(WITH_UNITS, "bf16"), (WITHOUT, "fp32"), ((1.1e11, 1e11), "fp32")])
def test_auto_is_what_multiplies_faster_by_enough_to_pay_for_the_casts(rates, chosen, monkeypatch):
    monkeypatch.setattr(optim, "fast_rates", lambda device: rates)
    assert fast_dtype("cpu") == {"bf16": torch.bfloat16, "fp32": torch.float32}[chosen]
    assert explain("auto", CPU) == (f"{chosen}: matmuls run at {rates[0] / 1e9:.3g} GFLOP/s in bf16, "
                                    f"{rates[1] / 1e9:.3g} in fp32")
    with autocast_for("auto", CPU)():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == fast_dtype("cpu")
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        assert explain(precision, CPU) == f"{precision}, as asked for"
        with autocast_for(precision, CPU)():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert autocast_for("fp32", CPU) is nullcontext


def test_rates_are_measured_once_and_leave_random_numbers_alone():
    fast_rates.cache_clear()
    before = torch.get_rng_state()
    rates = fast_rates("cpu")
    assert fast_rates("cpu") is rates and min(rates) > 1e8 and torch.equal(before, torch.get_rng_state())
    assert 1e6 < matmul_rate("cpu", torch.float32, 64, repeats=2) < 1e14
