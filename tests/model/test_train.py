"""What training leaves behind, whatever ends it: the end, a kill, Ctrl-C, numbers that are none, a full disk."""

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mtxlib.config import Config
from mtxlib.data.store import TokenStore
from mtxlib.model import train as module
from mtxlib.model.losses import objective
from mtxlib.model.optim import Muon, make_optimizers
from mtxlib.model.train import Trainer, main, train
from mtxlib.model.vae import MusicVAE

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
# 14 steps, validated after 6, 12 and 14; with everything that draws random numbers
EVENTFUL = {"steps": 14, "dropout": 0.1, "enc_token_dropout": 0.1, "ema": 0.9, "dropout_kind": "random"}
STEERED = {"beta_schedule": "rate", "target_rate": 20.0}  # what a run of the tiny model can get to


def lines(folder):
    """metrics.jsonl without what the clock says."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s")} for row in rows]


def state(folder):
    return torch.load(folder / "state.pt", weights_only=True)


def same(a, b):
    """Equal bit for bit, whatever is nested in them."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k != "seconds")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(a, b):
    assert lines(a) == lines(b)
    assert same(state(a), state(b)) and same(load_file(a / "model.safetensors"), load_file(b / "model.safetensors"))


def on_step(monkeypatch, step, action):
    """Do something before the update that follows so many steps, once."""
    update, done = Trainer.update, []

    def patched(self, batch):
        if self.step == step and not done:
            done.append(action(self))
        return update(self, batch)

    monkeypatch.setattr(Trainer, "update", patched)


def poison(trainer):
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(math.nan)


def interrupt(_):
    signal.raise_signal(signal.SIGINT)


@pytest.fixture(scope="module", params=[{"optimizer": "adamw"}, {"optimizer": "muon", **STEERED}],
                ids=["adamw", "muon, steered"])
def eventful(request, run_config):
    return run_config.replace(**EVENTFUL, **request.param)


@pytest.fixture(scope="module")
def uninterrupted(eventful, tmp_path_factory):
    folder = tmp_path_factory.mktemp("train") / "uninterrupted"
    train(eventful, folder, "cpu")
    return folder


def write_config(config, folder):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder / "config.json"


# -- resuming -------------------------------------------------------------------------------------------------------

def test_a_run_repeats_itself(eventful, uninterrupted, tmp_path):
    train(eventful, tmp_path / "again", "cpu")
    assert_same_run(tmp_path / "again", uninterrupted)
    train(eventful.replace(seed=1), tmp_path / "other", "cpu")
    assert lines(tmp_path / "other") != lines(uninterrupted)


KILLED = """
import os, signal, sys
from mtxlib.config import Config
from mtxlib.model.train import Trainer, train
update = Trainer.update
def deadly(self, batch):
    if self.step == 11:
        os.kill(os.getpid(), signal.SIGKILL)
    return update(self, batch)
Trainer.update = deadly
train(Config.load(sys.argv[1] + "/config.json"), sys.argv[1], "cpu")
"""


def go_on(config, folder, uninterrupted, capsys):
    train(config, folder, "cpu")
    assert f"going on from step 6 of 14 in {folder / 'state.pt'}" in capsys.readouterr().out
    assert_same_run(folder, uninterrupted)


def test_a_killed_run_goes_on_bit_for_bit(eventful, uninterrupted, tmp_path, capsys):
    """Killed in the twelfth step: the last checkpoint is of step 6, the last line of step 10."""
    write_config(eventful, tmp_path)
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    assert done.returncode == -signal.SIGKILL and state(tmp_path)["step"] == 6
    assert lines(tmp_path)[-1]["step"] == 10
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 1')  # a line that was being written
    go_on(eventful, tmp_path, uninterrupted, capsys)


def test_an_end_between_the_lines_of_a_validation_and_its_checkpoint(eventful, uninterrupted, tmp_path, monkeypatch,
                                                                     capsys):
    save = Trainer.save_state
    monkeypatch.setattr(Trainer, "save_state", lambda self: save(self) if self.step < 12 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(eventful, tmp_path, "cpu")
    monkeypatch.undo()
    assert lines(tmp_path)[-1]["split"] == "valid" and lines(tmp_path)[-1]["step"] == 12
    go_on(eventful, tmp_path, uninterrupted, capsys)


@pytest.mark.parametrize("step", [2, 8])
def test_ctrl_c_saves_says_how_to_go_on_and_goes_on_bit_for_bit(step, eventful, uninterrupted, tmp_path, monkeypatch,
                                                                capsys):
    before = signal.getsignal(signal.SIGINT)
    on_step(monkeypatch, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(eventful, tmp_path, "cpu")
    assert f"stopped at step {step + 1} of 14; run the same command again to go on" in capsys.readouterr().out
    assert state(tmp_path)["step"] == step + 1 and signal.getsignal(signal.SIGINT) is before
    train(eventful, tmp_path, "cpu")
    assert_same_run(tmp_path, uninterrupted)


def test_a_finished_run_stays_as_it_is(eventful, uninterrupted, tmp_path):
    before = {p.name: p.read_bytes() for p in uninterrupted.iterdir()}
    train(eventful, uninterrupted, "cpu")
    assert {p.name: p.read_bytes() for p in uninterrupted.iterdir()} == before


def test_more_steps_go_on_from_the_end(run_config, tmp_path):
    train(run_config.replace(steps=4), tmp_path, "cpu")
    train(run_config.replace(steps=7), tmp_path, "cpu")
    assert [(r["step"], r["split"]) for r in lines(tmp_path)] == [
        (4, "train"), (4, "valid"), (6, "train"), (6, "valid"), (7, "train"), (7, "valid")]
    assert Config.load(tmp_path / "config.json").train.steps == 7
    with pytest.raises(ValueError, match="is at step 7, beyond steps = 5"):
        train(run_config.replace(steps=5), tmp_path, "cpu")


def test_a_run_keeps_its_own_tokenizer(run_config, uninterrupted, store):
    assert (uninterrupted / "tokenizer.json").read_bytes() == (store.folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("change", [{"lr": 0.5}, {"d_model": 64}, {"source": "bach"}])
def test_resuming_with_another_configuration_is_refused(change, run_config, uninterrupted, eventful):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    [(name, value)] = change.items()
    with pytest.raises(ValueError, match=f"was trained with {name} = .*, now it is {value!r}: choose another"):
        train(eventful.replace(**change), uninterrupted, "cpu")
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_batches_of_a_resumed_run_are_those_of_an_uninterrupted_one(run_config, tmp_path):
    trainer = Trainer(run_config.replace(batch_size=96), tmp_path, "cpu")
    per_epoch = len(trainer.train_indices) // 96

    def stream(step, n):
        trainer.step, order = step, []
        for _ in islice(trainer.batches(), n):
            order.append(trainer.current.tolist())
        return order

    n = 2 * per_epoch + 1
    full = stream(0, n)
    assert per_epoch >= 2 and len({tuple(b) for b in full}) == n
    for step in (1, per_epoch - 1, per_epoch, per_epoch + 1):
        assert stream(step, n - step) == full[step:]


# -- what a run writes ----------------------------------------------------------------------------------------------

def test_a_run_folder_holds_what_the_design_says(run_dir, run_config):
    assert {p.name for p in run_dir.iterdir()} == {"config.json", "metrics.jsonl", "model.safetensors", "state.pt",
                                                   "tokenizer.json", ".lock"}
    assert Config.load(run_dir / "config.json") == run_config


def test_metrics_have_their_fields(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["split"]) for r in rows] == [(6, "train"), (6, "valid"), (10, "train"), (12, "train"),
                                                       (12, "valid")]
    fields = {"train": {"step", "split", "loss", "recon", "kl", "kl_loss", "grad_norm", "beta", "target_rate", "lr",
                        "tokens_per_s", "seconds"},
              "valid": {"step", "split", "recon", "kl", "recon_per_token", "delta_nll_shuffled", "active_units",
                        "objective", "seconds", "precision"}}
    for row in rows:
        assert set(row) == fields[row["split"]]
        assert all(math.isfinite(v) for k, v in row.items() if k not in ("split", "precision"))
        assert row.get("precision", "fp32, as asked for") == "fp32, as asked for"
    assert [r["seconds"] for r in rows] == sorted(r["seconds"] for r in rows)
    assert rows[0]["beta"] == pytest.approx(5 / 6) and rows[-2]["beta"] == 1.0, "beta of the step itself"


def test_a_line_is_the_mean_of_the_steps_since_the_last_one(run_config, tmp_path, monkeypatch):
    """Validations fall between the lines of every tenth step."""
    update, values = Trainer.update, []

    def recorded(self, batch):
        values.append({k: float(v) for k, v in update(self, batch).items()})
        return values[-1]

    monkeypatch.setattr(Trainer, "update", recorded)
    train(run_config.replace(steps=21, eval_every=7), tmp_path, "cpu")
    rows = [r for r in lines(tmp_path) if r["split"] == "train"]
    assert [r["step"] for r in rows] == [7, 10, 14, 20, 21]
    for begin, row in zip([0, 7, 10, 14, 20], rows, strict=True):
        for name in ("loss", "recon", "kl", "kl_loss", "grad_norm"):
            assert row[name] == pytest.approx(np.mean([v[name] for v in values[begin:row["step"]]]), rel=1e-5), name


def test_wandb_gets_the_same_names(run_config, tmp_path, monkeypatch):
    logged, finished, asked = [], [], {}

    def init(**kwargs):
        asked.update(kwargs)
        return SimpleNamespace(log=lambda values, step: logged.append((step, values)),
                               finish=lambda: finished.append(True))

    fake = SimpleNamespace(init=init, Settings=lambda **kwargs: kwargs)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    train(run_config.replace(wandb="offline"), tmp_path, "cpu")
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert logged == [(r["step"], {f"{r['split']}/{k}": v for k, v in r.items() if k not in ("step", "split")})
                      for r in rows]
    assert asked["mode"] == "offline" and asked["dir"] == str(tmp_path) and finished == [True]
    assert asked["config"] == run_config.replace(wandb="offline").flat()


def test_no_wandb_where_it_is_off(run_config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would fail
    train(run_config.replace(steps=1, wandb="off"), tmp_path, "cpu")
    with pytest.raises(ImportError):
        train(run_config.replace(steps=1, wandb="online"), tmp_path / "online", "cpu")


def test_validation_hooks_see_metrics_that_are_up_to_date(run_config, tmp_path):
    seen = []
    train(run_config, tmp_path, "cpu", on_validate=lambda: seen.append(lines(tmp_path)[-1]))
    assert [(r["step"], r["split"]) for r in seen] == [(6, "valid"), (12, "valid")]


# -- one step -------------------------------------------------------------------------------------------------------

def grads_of(config, folder, indices):
    """Gradients and reported means of one step from the same weights, without noise."""
    trainer, grads = Trainer(config, folder, "cpu"), {}
    trainer.optimizers = [SimpleNamespace(
        param_groups=[], zero_grad=lambda set_to_none: None,
        step=lambda: grads.update({n: p.grad.clone() for n, p in trainer.model.named_parameters()}))]
    values = trainer.update(trainer.store.batch(indices))
    return grads, {k: float(v) for k, v in values.items()}


@pytest.mark.parametrize("recon_scale", ["sequence", "token"])
def test_accumulated_gradients_are_those_of_the_whole_batch(recon_scale, run_config, store, tmp_path, monkeypatch):
    monkeypatch.setattr(MusicVAE, "reparameterize", lambda self, posterior, generator=None: posterior.mu)
    indices = store.select("train")[:80:10]
    config = run_config.replace(dec_token_dropout=0.0, grad_clip=1e9, beta_schedule="constant", recon_scale=recon_scale)
    whole, parts = (grads_of(config.replace(accumulate=n), tmp_path, indices) for n in (1, 4))
    assert parts[1] == pytest.approx(whole[1], rel=1e-4)
    for name, grad in whole[0].items():
        torch.testing.assert_close(parts[0][name], grad, atol=1e-5, rtol=1e-3, msg=name)


def test_the_gradient_is_that_of_the_elbo_per_token(run_config, store, tmp_path, monkeypatch):
    """Against autograd of the written-out objective: only the constant factor, tokens a window, is left out."""
    monkeypatch.setattr(MusicVAE, "reparameterize", lambda self, posterior, generator=None: posterior.mu)
    config = run_config.replace(dec_token_dropout=0.0, grad_clip=1e9, beta_schedule="constant", beta_max=0.3)
    indices = store.select("train")[:4]
    grads, _ = grads_of(config.replace(batch_size=4), tmp_path, indices)
    trainer = Trainer(config, tmp_path, "cpu")
    ids, slots = trainer.store.batch(indices)
    out = trainer.model(ids, slots)
    nats = -out.logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    mu, logvar, _ = out.posterior
    kl = 0.5 * (mu ** 2 + logvar.exp() - 1 - logvar)
    loss = ((nats * (ids[:, 1:] != 0)).sum() + 0.3 * kl.sum()) / 4
    (loss / float(store.lengths[store.select("train")].mean())).backward()
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, atol=1e-6, rtol=1e-3, msg=name)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_decay_is_on_matrices_only(optimizer, run_config, tmp_path):
    trainer = Trainer(run_config.replace(weight_decay=0.5, lr=0.1, optimizer=optimizer), tmp_path, "cpu")
    names = {p: n for n, p in trainer.model.named_parameters()}
    groups = [group for o in trainer.optimizers for group in o.param_groups]
    decay, free = ({names[p] for g in groups if g["weight_decay"] == w for p in g["params"]} for w in (0.5, 0.0))
    assert sum(len(g["params"]) for g in groups) == len(names), "each is in one group"
    assert decay | free == set(names.values()) and not decay & free
    assert all("norm" in n or n.endswith(("bias", "null")) for n in free) and not any("norm" in n for n in decay)
    before = {n: p.detach().clone() for p, n in names.items()}
    for p in trainer.model.parameters():
        p.grad = torch.zeros_like(p)
    for o in trainer.optimizers:
        o.step()
    for p, n in names.items():
        torch.testing.assert_close(p.detach(), before[n] * (0.95 if n in decay else 1.0), msg=n)


@pytest.mark.parametrize("bottleneck", ["rows", "conv", "linear1d", "none"])
def test_muon_gets_the_matrices_of_the_blocks_and_adamw_the_rest(bottleneck, run_config):
    model = MusicVAE(run_config.replace(bottleneck=bottleneck).model, 40, 4)
    names = {p: n for n, p in model.named_parameters()}
    adamw, muon = make_optimizers(model, run_config.replace(optimizer="muon").train)
    assert (type(adamw), type(muon)) == (torch.optim.AdamW, Muon)
    ours, rest = ([names[p] for g in o.param_groups for p in g["params"]] for o in (muon, adamw))
    assert sorted(ours + rest) == sorted(names.values()), "each parameter once"
    layers = [module for half in (model.encoder, model.decoder) if half for module in half.blocks.modules()]
    assert set(ours) == {names[layer.weight] for layer in layers if isinstance(layer, torch.nn.Linear)}
    assert {"decoder.embedding.token.weight", "decoder.norm.weight", "decoder.blocks.0.norm1.weight"} <= set(rest)
    [alone] = make_optimizers(model, run_config.replace(optimizer="adamw").train)
    assert {p for g in alone.param_groups for p in g["params"]} == set(names)


def test_a_first_step_of_muon_is_the_orthogonal_factor_of_the_gradient(run_config, tmp_path):
    """Against U V' of the gradient's U S V' by LAPACK, in size 0.2 lr a weight; and of AdamW, the sign times lr. Muon
    iterates five times in bf16, which brings singular values within a third of 1."""
    trainer = Trainer(run_config.replace(lr=0.01, weight_decay=0.0, optimizer="muon"), tmp_path, "cpu")
    adamw, muon = trainer.optimizers
    before = {p: p.detach().clone() for p in trainer.model.parameters()}
    generator = torch.Generator().manual_seed(0)
    for p in before:
        p.grad = torch.randn(p.shape, generator=generator).sign()
    for p in muon.param_groups[0]["params"]:  # ten times as long in one direction as in another
        u, _, v = torch.linalg.svd(p.grad, full_matrices=False)
        p.grad = u @ torch.linspace(1e-3, 1e-4, len(v)).diag() @ v
    for optimizer in trainer.optimizers:
        optimizer.step()
    for p in muon.param_groups[0]["params"]:
        update = (before[p] - p.detach()) / (0.01 * 0.2 * max(p.shape) ** 0.5)
        u, _, v = torch.linalg.svd(p.grad, full_matrices=False)
        values = torch.linalg.svdvals(update)
        assert values.min() > 0.65 and values.max() < 1.3
        assert (update * (u @ v)).sum() > 0.98 * update.norm() * min(p.shape) ** 0.5, "the same directions"
        assert (before[p] - p.detach()).square().mean().sqrt() == pytest.approx(0.2 * 0.01, rel=0.15)
    for p in (p for group in adamw.param_groups for p in group["params"]):
        torch.testing.assert_close(p.detach(), before[p] - 0.01 * p.grad)


def test_both_optimizers_follow_the_schedule_of_the_learning_rate(run_config, tmp_path):
    trainer = Trainer(run_config.replace(lr=0.01, lr_warmup=4, optimizer="muon"), tmp_path, "cpu")
    trainer.step = 1
    trainer.update(next(trainer.batches()))
    assert [g["lr"] for o in trainer.optimizers for g in o.param_groups] == [pytest.approx(0.005)] * 3


def test_a_steered_run_comes_to_its_target(run_config, tmp_path):
    """Its rate first grows away from it, and stays there where beta is held at its start."""
    config = run_config.replace(**STEERED, steps=90, eval_every=90, lr=3e-3)
    train(config, tmp_path, "cpu")
    rows = [r for r in lines(tmp_path) if r["split"] == "train"]
    start, *_, end = (abs(r["kl"] - 20) for r in rows)
    assert end < start / 2 and max(r["kl"] for r in rows) > 5 * 20
    assert 0.01 < rows[0]["beta"] < 0.1 < rows[-1]["beta"] <= 1.0 and {r["target_rate"] for r in rows} == {20.0}


def test_ema_is_the_moving_average_and_is_what_is_kept(run_config, store, tmp_path):
    trainer = Trainer(run_config.replace(ema=0.8), tmp_path / "a", "cpu")
    expected = None
    for _, batch in zip(range(4), trainer.batches(), strict=False):
        trainer.update(batch)
        now = [p.detach().clone() for p in trainer.model.parameters()]
        expected = now if expected is None else [0.8 * e + 0.2 * p for e, p in zip(expected, now, strict=True)]
    for a, e in zip(trainer.average.module.parameters(), expected, strict=True):
        torch.testing.assert_close(a.detach(), e)
    train(run_config.replace(ema=0.8, steps=6), tmp_path / "b", "cpu")
    kept, final = load_file(tmp_path / "b" / "model.safetensors"), state(tmp_path / "b")
    name = "bottleneck.head.weight"
    assert torch.equal(kept[name], final["average"][f"module.{name}"])
    assert not torch.equal(kept[name], final["model"][name])


# -- the validation objective and early stopping --------------------------------------------------------------------

def test_the_validation_objective_is_at_the_end_of_the_schedules(run_config, tmp_path):
    trainer = Trainer(run_config.replace(beta_max=0.5, beta_warmup=1000, target_rate=3.0, target_start=99.0), tmp_path,
                      "cpu")
    m = module.measure(trainer.model, trainer.store, trainer.valid_indices)
    assert trainer.step == 0
    expected = m.recon.mean() + 0.5 * (m.kl.sum((1, 2)).mean() - 3).abs()
    assert trainer.final_objective(m) == pytest.approx(float(expected))
    for target, over in ((3.0, m.kl.sum() / len(m.kl) - 3), (1e4, 0.0)):  # nats below the target are no gain
        steered = Trainer(run_config.replace(beta_schedule="rate", target_rate=target), tmp_path, "cpu")
        assert over >= 0 and steered.final_objective(m) == pytest.approx(float(m.recon.mean() + over))
    plain = Trainer(run_config.replace(variational=False, beta_max=0.5), tmp_path, "cpu")
    m = module.measure(plain.model, plain.store, plain.valid_indices)
    assert plain.final_objective(m) == pytest.approx(float(objective(m.recon, 0 * m.kl, 1.0).loss))


def test_patience_stops_and_the_best_weights_are_kept(run_config, tmp_path, monkeypatch):
    scores, saved, save = iter([5.0, 4.0, 4.5, 4.0, 1.0]), [], module.save_weights
    monkeypatch.setattr(Trainer, "final_objective", lambda self, m: next(scores))
    monkeypatch.setattr(module, "save_weights", lambda model, *args: saved.append(
        {k: v.clone() for k, v in model.state_dict().items()}) or save(model, *args))
    config = run_config.replace(steps=30, eval_every=2, patience=2)
    train(config, tmp_path, "cpu")
    objectives = [r["objective"] for r in lines(tmp_path) if r["split"] == "valid"]
    assert objectives == [5.0, 4.0, 4.5, 4.0], "equal is no progress"
    assert len(saved) == 2 and lines(tmp_path)[-1]["step"] == 8
    kept = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(v, saved[1][k]) for k, v in kept.items())
    train(config, tmp_path, "cpu")
    assert lines(tmp_path)[-1]["step"] == 8, "and it stays stopped"


# -- what goes wrong ------------------------------------------------------------------------------------------------

def test_poisoned_weights_stop_with_step_pieces_and_checkpoint(run_config, store, tmp_path, monkeypatch):
    on_step(monkeypatch, 8, poison)
    with pytest.raises(FloatingPointError, match=r"the loss is not a number at step 9\b") as e:
        train(run_config.replace(steps=20), tmp_path, "cpu")
    assert f"the last good checkpoint is {tmp_path / 'state.pt'}" in str(e.value)
    named = str(e.value).split("the last batch held ")[1].split("; ")[0].split(", ")
    trained = {store.pieces[p]["name"] for p in store.windows["piece"][store.select("train")]}
    assert named and set(named) <= trained
    good = state(tmp_path)
    assert good["step"] == 6 and all(v.isfinite().all() for v in good["model"].values())
    monkeypatch.undo()
    train(run_config.replace(steps=20), tmp_path, "cpu")
    assert lines(tmp_path)[-1]["step"] == 20, "the checkpoint is good"


def test_a_learning_rate_that_explodes_stops_without_a_checkpoint(run_config, tmp_path):
    with pytest.raises(FloatingPointError, match="last good checkpoint is none: lower lr"):
        train(run_config.replace(lr=1e30), tmp_path, "cpu")
    assert not (tmp_path / "state.pt").exists() and not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("what", ["validation", "ctrl-c"])
def test_weights_that_are_no_numbers_never_become_the_checkpoint(what, run_config, tmp_path, monkeypatch):
    def act(trainer):
        if what == "ctrl-c":
            poison(trainer)
            interrupt(trainer)
        else:  # the last step before a validation: its own loss is still a number
            trainer.optimizers[-1].step = lambda: poison(trainer)

    on_step(monkeypatch, 11 if what == "validation" else 8, act)
    with pytest.raises(FloatingPointError, match=r"last good checkpoint is .*state\.pt"):
        train(run_config, tmp_path, "cpu")
    assert state(tmp_path)["step"] == 6


def no_leftovers(folder):
    return not [p for p in folder.iterdir() if p.name.startswith(".") and p.name != ".lock"]


def test_a_failed_write_leaves_the_old_file(run_config, tmp_path, monkeypatch):
    train(run_config.replace(steps=6), tmp_path, "cpu")
    before = (tmp_path / "state.pt").read_bytes()

    def full(_, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"could not write .*state\.pt .*No space left.*unharmed.*run the same command"):
        train(run_config.replace(steps=12), tmp_path, "cpu")
    assert (tmp_path / "state.pt").read_bytes() == before and no_leftovers(tmp_path)
    monkeypatch.undo()
    train(run_config.replace(steps=12), tmp_path, "cpu")
    assert [r["step"] for r in lines(tmp_path)] == [6, 6, 10, 12, 12]


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt"])
def test_a_disk_that_refuses_is_told(name, run_config, tmp_path, monkeypatch):
    """A limit on the size of files makes torch and safetensors themselves fail, each with an error of its own."""
    train(run_config.replace(steps=6), tmp_path, "cpu")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    if name == "model.safetensors":
        monkeypatch.setattr(Trainer, "final_objective", lambda self, m: -1.0)
    else:
        monkeypatch.setattr(Trainer, "final_objective", lambda self, m: 1e9)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match=f"could not write .*{name}.*what was there before is unharmed"):
            train(run_config.replace(steps=12), tmp_path, "cpu")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    for kept in ("model.safetensors", "state.pt", "tokenizer.json"):
        assert (tmp_path / kept).read_bytes() == before[kept]
    assert Config.load(tmp_path / "config.json").train.steps == 12
    assert no_leftovers(tmp_path)


def test_without_a_store_it_says_what_to_do(config, tmp_path):
    with pytest.raises(FileNotFoundError, match="no token store in .*: run notebooks/02"):
        train(config.replace(store=str(tmp_path / "nothing")), tmp_path / "run", "cpu")


# -- the command ----------------------------------------------------------------------------------------------------

def test_the_command_stops_at_ctrl_c_and_needs_little_but_torch(run_config, tmp_path):
    path = write_config(run_config.replace(steps=1_000_000, eval_every=1_000_000), tmp_path)
    command = [sys.executable, "-X", "importtime", "-m", "mtxlib.train", str(path), "--device", "cpu"]
    with (tmp_path / "err").open("w") as errors:  # a pipe that nobody reads would fill up
        process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=errors, env=ENVIRONMENT)
        try:
            for _ in range(2400):
                if (tmp_path / "metrics.jsonl").exists() or process.poll() is not None:
                    break
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=120)
        finally:
            process.kill()
    err = (tmp_path / "err").read_text()
    assert process.returncode == 130, err[-2000:]
    assert "run the same command again to go on" in out and "Traceback" not in err
    assert f"stopped at step {state(tmp_path)['step']} of 1000000" in out and state(tmp_path)["step"] >= 10
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in err.splitlines() if "import time" in line}
    foreign = {"miditok", "symusic", "music21", "wandb", "IPython", "jupyter_core", "ipywidgets", "matplotlib"}
    assert {"torch", "safetensors", "tqdm"} <= imported and not imported & foreign


def test_the_command_trains_to_the_end(run_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", str(write_config(run_config.replace(steps=3), tmp_path))])
    assert main() == 0
    said = "precision: fp32, as asked for", str(tmp_path / "model.safetensors")
    assert tuple(capsys.readouterr().out.splitlines()) == said
    assert (tmp_path / "model.safetensors").exists()


def test_the_commands_errors_are_one_line(config, run_config, tmp_path, monkeypatch, capsys):
    def command(config):
        monkeypatch.setattr(sys, "argv", ["train", str(write_config(config, tmp_path)), "--device", "cpu"])
        return main(), capsys.readouterr().err.splitlines()[-1]

    assert command(config.replace(store="nowhere"))[1].startswith("error: no token store in nowhere")
    code, said = command(run_config.replace(lr=1e30))
    assert code == 1 and said.startswith("error: the loss is not a number at step")
    (tmp_path / "config.json").write_text('{"train": {"stepps": 3}}')
    assert main() == 1 and "unknown parameter 'stepps'; did you mean 'steps'?" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["train", str(tmp_path / "none" / "config.json")])
    assert main() == 1 and "No such file" in capsys.readouterr().err


def test_the_store_is_opened_not_read(run_config):
    assert isinstance(TokenStore(run_config.data.store).ids, np.memmap)
