"""The benchmarks measure what they say: FLOPs against torch's own count, baselines that do the same work as ours."""

from concurrent.futures import ThreadPoolExecutor

import bench
import pytest
import torch
from bench import (
    LARGE,
    Endless,
    Row,
    Setting,
    Textbook,
    drop_in_lists,
    drop_one_by_one,
    measured,
    next_uncached,
    prefixes,
    table,
    window_flops,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mtxlib.config import BOS, EOS, MASK, PAD, Config
from mtxlib.data.store import TokenDropout
from mtxlib.latent.decode import decode, prior_latents
from mtxlib.model.vae import MusicVAE


@pytest.mark.parametrize("n_tokens", [5, 40])
@pytest.mark.parametrize("dials", [{"enc_layers": 1, "dec_layers": 3}, {"d_model": 64, "n_heads": 4, "enc_layers": 3},
                                   {"latent_channels": 7, "rows_per_bar": 1}], ids=str)
def test_flops_are_those_that_torch_counts(dials, n_tokens):
    c = Config.from_flat({"preset": "tiny", "bottleneck": "rows", "condition": "both", **dials}).model
    model, ids = MusicVAE(c, 90, 2), torch.randint(4, 90, (3, n_tokens))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # its count of fused kernels differs
        model(ids, torch.randint(0, 32, ids.shape)).logits.sum().backward()
    assert counter.get_total_flops() == 3 * window_flops(c, 90, model.bottleneck.rows, n_tokens)


def test_decoding_without_cache_writes_the_same_and_never_ends(run):
    grammar, table = Endless(run.codec.grammar), run.codec.table
    z = prior_latents(run.model, 3, run.mean_tokens, seed=1)
    ours = torch.tensor(decode(run.model, table, z, max_tokens=61, grammar=grammar))
    assert ours.shape == (3, 61) and not torch.isin(ours[:, 1:], torch.tensor([PAD, BOS, EOS, MASK])).any()
    asked = list(prefixes(table, grammar, ours))
    assert [ids.shape[1] for ids, _, _ in asked] == list(range(1, 61))
    theirs = [next_uncached(run.model, z, *prefix) for prefix in asked]
    assert torch.equal(torch.stack(theirs, 1), ours[:, 1:])
    assert [ids.shape[1] for ids, _, _ in prefixes(table, grammar, ours, 8)] == [4, 12, 20, 28, 36, 44, 52, 60]


def test_token_dropout_one_by_one_hits_what_ours_hits():
    ids, spare = torch.arange(20).repeat(3, 1), torch.arange(20) % 3 == 0
    all_hit = TokenDropout(1.0, 20, spare=spare)(ids)
    assert torch.equal(drop_one_by_one(ids, 1.0, spare), all_hit) and not torch.equal(all_hit, ids)
    assert torch.equal(drop_in_lists(ids, 1.0, spare.tolist()), all_hit)
    for drop in (lambda x: drop_one_by_one(x, 0.3, spare), lambda x: drop_in_lists(x, 0.3, spare.tolist())):
        hit = drop(torch.full((20, 100), 7)) == MASK
        assert 0.25 < hit.float().mean() < 0.35


def test_the_textbook_reads_all_and_writes_from_the_past():
    c = Config.from_flat({"preset": "tiny"}).model
    model, ids = Textbook(c, 50), torch.randint(4, 50, (2, 12))
    ids[1, 9:] = PAD
    logits = model(ids)
    assert logits.shape == (2, 11, 50)
    torch.testing.assert_close(model(ids[1:, :9])[0], logits[1, :8])
    encoded, memory = [], model.transformer.encoder(model.embed(ids))
    for changed in (ids, torch.cat([ids[:, :6], ids[:, 6:] % 40 + 5], 1)):
        encoded.append(model.transformer.decoder(model.embed(changed[:, :-1]), memory, tgt_is_causal=True,
                                                 tgt_mask=torch.ones(11, 11).triu(1).bool()))
    torch.testing.assert_close(encoded[0][:, :6], encoded[1][:, :6])
    other = ids.clone()
    other[:, 11] = ids[:, 11] % 40 + 5
    assert not torch.equal(model(other)[0], logits[0]), "the encoder reads the whole window"
    ours = MusicVAE(c, 50, 4)
    assert 0.7 < ours.n_parameters() / sum(p.numel() for p in model.parameters()) < 1.3


def test_utilisation_is_flops_over_the_peak_of_the_card(monkeypatch, run_config, run_dir):
    """On a CPU that calls itself an H100, uncompiled."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: model)
    monkeypatch.setattr(bench, "GPU_STEPS", 1)
    for size in ("REFERENCE", "LARGE"):
        monkeypatch.setattr(bench, size, {"preset": "tiny"})
    rows = [row.to_dict() for row in bench.gpu(Setting(run_config, [], run_dir))]
    speed, used = rows[::2], rows[1::2]
    assert len(speed) == len(used) == 4 and {row["unit"] for row in used} == {"TFLOP/s"}
    for a, b in zip(speed, used, strict=True):
        assert b["ratio"] == pytest.approx(b["measured"] / 989) and b["at_least"] == 0.4 and b["reached"] is False
        flops_per_token = [1e12 * x / y for x, y in zip(b["values"], a["values"], strict=True)]
        assert 1e5 < min(flops_per_token) <= max(flops_per_token) < 1.2 * min(flops_per_token)
    with torch.device("meta"):
        large = MusicVAE(Config.from_flat(LARGE).model, 600, 4)
    assert large.n_parameters() == pytest.approx(100e6, rel=0.05)


def test_training_is_told_beside_the_textbook_and_the_matmuls_of_the_machine(monkeypatch, run_config, run_dir):
    for size in ("REFERENCE", "QUICK"):
        monkeypatch.setattr(bench, size, {"preset": "tiny"})
    rows = [row.to_dict() for row in bench.training(Setting(run_config, [], run_dir))]
    speed, used = ([row for row in rows if row["name"].startswith(name)] for name in ("training", "CPU utilisation"))
    for a, b in zip(speed, used, strict=True):
        assert (a["at_least"], b["at_least"], b["unit"]) == (2.5, 0.5, "FLOP/s") and 0 < b["ratio"] < 1
        assert len(a["values"]) == len(a["baseline"]) == len(b["baseline"]) == 5
        assert 1e5 < b["values"][0] / a["values"][0] < 1e6, "FLOPs a token"


def test_flops_a_token_are_of_the_windows_since_it_was_last_asked(run_config, tmp_path):
    ours = bench.OurTrainer(run_config, str(tmp_path))
    n_tokens = ours.step()
    lengths, c, rows = list(ours.lengths), run_config.model, ours.trainer.model.bottleneck.rows
    expected = sum(window_flops(c, ours.trainer.store.vocab_size, rows, n) for n in lengths) / n_tokens
    assert ours.flops_per_token() == pytest.approx(expected) and not ours.lengths


def test_a_busy_process_is_there_and_goes(monkeypatch, run_config, run_dir):
    seen = []

    def quiet_and_beside(config):
        with bench.busy_process():
            seen.append(bench.os.environ["GOMP_SPINCOUNT"])
        return [10.0, 12.0], [4.0, 6.0]
    monkeypatch.setattr(bench, "quiet_and_beside", quiet_and_beside)
    monkeypatch.setattr(bench, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    monkeypatch.setenv("GOMP_SPINCOUNT", "4000")
    ratios = [row.to_dict()["ratio"] for row in bench.shared(Setting(run_config, [], run_dir))]
    assert seen == ["4000", "300000"] and bench.os.environ["GOMP_SPINCOUNT"] == "4000"
    assert ratios == [pytest.approx(5 / 11), 1.0, 1.0]


def test_training_beside_a_busy_process_takes_turns_with_training_alone(run_config):
    quiet, beside = bench.quiet_and_beside(run_config)
    assert len(quiet) == len(beside) == 5 and min(quiet + beside) > 0


def test_a_machine_is_the_same_whatever_its_matmuls_took():
    here = bench.machine()
    assert set(here["matmuls"]) == {"bf16", "fp32"} and "GFLOP/s in bf16" in here["precision"]
    assert bench.is_same(here, {**here, "matmuls": {}, "precision": ""})
    assert not bench.is_same(here, {**here, "cpu": ""})


def test_rows_say_whether_the_aim_is_reached():
    fast = Row("fast", "tokens/s", [8.0, 10.0, 30.0], [5.0, 4.0, 6.0], at_least=2.0).to_dict()
    assert (fast["measured"], fast["ratio"], fast["spread"], fast["reached"]) == (10.0, 2.0, 2.2, True)
    assert Row("", "", [9.0], [5.0], at_least=2.0).to_dict()["reached"] is False
    assert [Row("", "s", [t], at_most=10.0).to_dict()["reached"] for t in (9.9, 10.1)] == [True, False]
    plain = Row("plain", "windows/s", [3.0]).to_dict()
    assert plain["ratio"] is None and plain["reached"] is None
    lines = table([fast, plain]).splitlines()
    assert lines[1].split() == "fast 10 tokens/s 220% 5 2 × ≥ 2 × yes".split()
    assert lines[2].split() == "plain 3 windows/s 0%".split()


def test_a_benchmark_gives_its_rows_and_its_peak_memory(run_config, run_dir):
    rows = measured("dropout", Setting(run_config, [], run_dir))
    assert {row["bench"] for row in rows} == {"dropout"} and rows[0]["at_least"] == 100
    assert rows[0]["measured"] > rows[0]["baseline"][0] > 0
    peak = next(row for row in rows if row["name"] == "peak memory, dropout")
    assert 0.05 < peak["measured"] < 10 and peak["unit"] == "GB"
