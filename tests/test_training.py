"""Training: schedules, checkpoints, and what a run leaves behind."""

import json
import math
import os
import signal
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from tutorial_sae import BatchTopKSAE, GatedSAE, JumpReLUSAE, TopKSAE, TrainConfig, VanillaSAE, load_sae, sparse, train
from tutorial_sae.runtime import TutorialError
from tutorial_sae.saes.base import check_activations
from tutorial_sae.training import _Run, hand_over, named, optimizer, resample, train_together

D_IN, D_SAE = 16, 48
SMALL: dict[str, Any] = {"tokens": 6_400, "batch_size": 64, "lr": 2e-3}


def activations(tokens: int = 1024, seed: int = 0) -> torch.Tensor:
    """Sparse combinations of 40 directions around a distant mean: something an SAE can learn."""
    chance = torch.Generator().manual_seed(seed)
    directions = torch.randn(40, D_IN, generator=torch.Generator().manual_seed(99))
    codes = torch.rand(tokens, 40, generator=chance) * (torch.rand(tokens, 40, generator=chance) < 0.1)
    return codes @ directions + 5.0


def batchtopk(**options) -> BatchTopKSAE:
    return BatchTopKSAE(D_IN, D_SAE, k=4, **options)


def stop_at(sae, step: int) -> None:
    """Press Ctrl-C in the middle of this step."""
    original, calls = sae.count_fired, iter(range(10**6))

    def interrupting(fired, tokens):
        if next(calls) == step:
            os.kill(os.getpid(), signal.SIGINT)
        original(fired, tokens)

    sae.count_fired = interrupting


@pytest.mark.parametrize(
    "make",
    [
        batchtopk,
        lambda: TopKSAE(D_IN, D_SAE, k=4),
        lambda: VanillaSAE(D_IN, D_SAE, l1=0.5),
        lambda: GatedSAE(D_IN, D_SAE, l1=0.2),
        lambda: JumpReLUSAE(D_IN, D_SAE, target_l0=4, theta=1.0),
    ],
)
def test_training_lowers_the_error_and_keeps_decoder_rows_at_length_one(make):
    result = train(make(), activations(), TrainConfig(**SMALL))
    assert result.history[-1]["mse"] < 0.75 * result.history[0]["mse"]
    torch.testing.assert_close(result.sae.W_dec.norm(dim=1), torch.ones(D_SAE), rtol=1e-5, atol=0)
    assert not result.sae.training


def test_normalisation_is_fitted_on_the_training_data():
    x = activations()
    sae = train(batchtopk(), x, TrainConfig(**SMALL)).sae
    torch.testing.assert_close(sae.norm_mean, x.mean(dim=0), rtol=1e-4, atol=1e-4)
    scaled = (x - sae.norm_mean) / sae.norm_scale
    assert float(scaled.square().sum(dim=1).mean()) == pytest.approx(D_IN, rel=1e-3)


def test_the_threshold_comes_from_the_calibration_data():
    x, other = activations(), 0.5 * activations(seed=1) + 2.5
    own = train(batchtopk(), x, TrainConfig(**SMALL)).sae
    given = train(batchtopk(), x, TrainConfig(**SMALL), calibration=other)
    assert torch.equal(own.W_enc, given.sae.W_enc)
    assert not torch.equal(given.sae.state_dict()["threshold"], own.state_dict()["threshold"])
    assert given.calibration is not None
    assert given.calibration.theta == pytest.approx(float(given.sae.state_dict()["threshold"]))


def test_learning_rate_rises_holds_and_falls():
    config = TrainConfig(tokens=1000, batch_size=10, lr=1.0, warmup=0.1, decay=0.2)
    rates = [config.lr_at(step) for step in range(config.steps)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:80] == [1.0] * 71
    assert rates[-1] == pytest.approx(1 / 20)
    assert all(a <= b for a, b in pairwise(rates[:11]))
    assert all(a >= b for a, b in pairwise(rates[79:]))


def test_penalty_warms_up_inside_training_but_the_loss_states_it_in_full():
    config = TrainConfig(tokens=1000, batch_size=10, penalty_warmup=0.5)
    assert [config.penalty_at(step) for step in (0, 24, 49, 99)] == pytest.approx([0.02, 0.5, 1.0, 1.0])
    sae = VanillaSAE(D_IN, D_SAE, l1=2.0)
    latents = sae.encode(activations(8))
    assert float(sae.loss(activations(8)).penalty.detach()) == pytest.approx(
        float(2.0 * latents.detach().sum(1).mean()), rel=1e-5
    )


def test_same_seed_same_sae_and_another_seed_another():
    runs = [train(batchtopk(seed=seed), activations(), TrainConfig(**SMALL), seed=seed).sae.W_dec for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize(("fast", "rough"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("step", [1, 37, 99])
def test_an_interrupted_run_ends_bit_for_bit_as_if_it_had_not_stopped(tmp_path, monkeypatch, step, fast, rough):
    monkeypatch.setattr(sparse, "bf16_is_fast", lambda: rough)  # candidates in bfloat16 depend on the last step's cut
    config = TrainConfig(**SMALL, fast=fast, dead_after_tokens=300)
    whole = train(batchtopk(), activations(), config)
    half = batchtopk()
    stop_at(half, step)
    with pytest.raises(KeyboardInterrupt):
        train(half, activations(), config, out=tmp_path / "run")
    resumed = train(batchtopk(), activations(), config, out=tmp_path / "run")
    for name, value in whole.sae.state_dict().items():
        assert torch.equal(value, resumed.sae.state_dict()[name]), name
    times = ("seconds",)
    for a, b in zip(whole.history, resumed.history, strict=True):
        assert {k: v for k, v in a.items() if k not in times} == {k: v for k, v in b.items() if k not in times}


def test_a_finished_run_is_read_back_without_training(tmp_path, monkeypatch):
    first = train(batchtopk(), activations(), TrainConfig(**SMALL), out=tmp_path)
    monkeypatch.setattr("tutorial_sae.training._Run.update", lambda *_: pytest.fail("trained again"))
    again = train(batchtopk(), activations(), TrainConfig(**SMALL), out=tmp_path)
    assert torch.equal(first.sae.W_dec, again.sae.W_dec)
    assert again.history == first.history
    assert again.calibration == first.calibration


def test_a_run_leaves_files_that_say_what_was_done(tmp_path):
    result = train(batchtopk(), activations(), TrainConfig(**SMALL), out=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.history
    assert lines[-1]["tokens"] == 6_400
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["variant"] == "batchtopk"
    assert config["tokens"] == 6_400
    assert config["model"] is None  # a bare tensor does not say
    x = activations(32)
    assert torch.equal(load_sae(tmp_path)(x), result.sae(x))


def test_another_runs_folder_is_refused_and_left_alone(tmp_path):
    train(batchtopk(), activations(), TrainConfig(**SMALL), out=tmp_path)
    before = (tmp_path / "sae.safetensors").read_bytes()
    with pytest.raises(ValueError, match="other settings"):
        train(batchtopk(), activations(), replace(TrainConfig(**SMALL), lr=1e-3), out=tmp_path)
    assert (tmp_path / "sae.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "change", [{"x": activations(seed=1)}, {"seed": 5}, {"theta": 0.7}, {"calibration": activations(seed=2)}]
)
def test_a_finished_run_of_other_data_or_another_start_is_refused(tmp_path, change):
    def run(x=None, seed=0, theta=None, calibration=None):
        x = activations() if x is None else x
        sae: Any = batchtopk(seed=seed) if theta is None else JumpReLUSAE(D_IN, D_SAE, target_l0=4, theta=theta)
        config = replace(TrainConfig(**SMALL), tokens=640)
        return train(sae, x, config, out=tmp_path, calibration=calibration).sae

    first = run(theta=1.0) if "theta" in change else run()
    again = run(theta=1.0) if "theta" in change else run()
    assert torch.equal(again.W_dec, first.W_dec)
    with pytest.raises(ValueError, match="other settings or data"):
        run(**change)


@pytest.mark.parametrize("wrong", [torch.zeros(64, 16, 16), torch.zeros(16), torch.zeros(64, 8)])
def test_activations_of_another_shape_are_refused(wrong):
    with pytest.raises(ValueError, match=r"shape .*reshape\(-1, 16\)"):
        check_activations(wrong, D_IN)


def test_activations_that_are_no_tensor_are_refused():
    with pytest.raises(TypeError, match="this is a list"):
        check_activations([[0.0] * D_IN], D_IN)


@pytest.mark.parametrize("name", ["checkpoint/state.safetensors", "run.json"])
def test_a_damaged_folder_is_named(tmp_path, name):
    if name == "run.json":
        train(batchtopk(), activations(), TrainConfig(**SMALL), out=tmp_path)
    else:
        half = batchtopk()
        stop_at(half, 5)
        with pytest.raises(KeyboardInterrupt):
            train(half, activations(), TrainConfig(**SMALL), out=tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(TutorialError, match="damaged"):
        train(batchtopk(), activations(), TrainConfig(**SMALL), out=tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused_by_batch_and_row(value, tmp_path):
    x = activations(64)
    sae = batchtopk()
    sae.fit_normalization = lambda _: None  # type: ignore[method-assign]
    x[10, 3] = value
    with pytest.raises(ValueError, match=r"row \d+ of batch 0 is not finite"):
        train(sae, x, TrainConfig(**SMALL), out=tmp_path)


def test_a_loss_that_blows_up_stops_the_run_and_is_not_kept(tmp_path):
    with pytest.raises(TutorialError, match="lower the learning rate"):
        train(VanillaSAE(D_IN, D_SAE, l1=1e38), activations(), replace(TrainConfig(**SMALL), lr=1e30), out=tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_jumprelu_reaches_its_target_and_its_thresholds_stay_positive():
    sae = JumpReLUSAE(D_IN, D_SAE, target_l0=4, theta=1.0)
    train(sae, activations(), TrainConfig(**SMALL))
    l0 = float((sae.encode(activations(seed=1)) > 0).float().sum(dim=1).mean())
    assert l0 == pytest.approx(4, rel=0.15)
    assert float(sae.threshold.detach().min()) > 0


def test_a_weighted_vanilla_sae_keeps_its_free_decoder():
    sae = train(VanillaSAE(D_IN, D_SAE, l1=0.5, decoder_norm="weighted"), activations(), TrainConfig(**SMALL)).sae
    assert float((sae.W_dec.detach().norm(dim=1) - 1).abs().max()) > 0.01


# -- dead latents ----------------------------------------------------------------------------------


def kill(sae, latents):
    """Latents that no input can wake: AuxK has no gradient for them."""
    with torch.no_grad():
        sae.b_enc[latents] = -100.0
    return sae


@pytest.mark.parametrize(
    ("make", "revive", "woken"),
    [
        (batchtopk, None, 0),
        (batchtopk, "none", 0),
        (batchtopk, "auxk", 0),
        (lambda: VanillaSAE(D_IN, D_SAE, l1=0.2), None, 0),
        (lambda: VanillaSAE(D_IN, D_SAE, l1=0.2), "resample", 16),
    ],
)
def test_resampling_wakes_what_auxk_cannot_reach(make, revive, woken):
    sae = kill(make(), slice(0, 16))
    train(sae, activations(), replace(TrainConfig(**SMALL), revive=revive))
    fired = (sae.train().encode(activations()) > 0).any(dim=0)
    assert int(fired[:16].sum()) == woken


def stepped(sae, x) -> torch.optim.Adam:
    """The optimiser after one step, so that there are moments to forget."""
    adam = optimizer(sae, TrainConfig())
    sae.loss(x).total.backward()
    hand_over(sae, adam)
    adam.step()
    return adam


@pytest.mark.parametrize("make", [lambda: GatedSAE(D_IN, D_SAE, l1=0.2), lambda: JumpReLUSAE(D_IN, D_SAE, target_l0=4)])
def test_adam_on_rows_does_what_adam_on_the_parameters_does(make):
    one, other, x = make(), make(), activations()
    rows, plain = (
        optimizer(one, TrainConfig()),
        torch.optim.Adam(other.parameters(), lr=TrainConfig.lr, betas=(0.9, 0.99)),
    )
    for _ in range(3):
        for sae, adam in ((one, rows), (other, plain)):
            sae.zero_grad()
            sae.loss(x).total.backward()
            if adam is rows:
                hand_over(sae, adam)
            adam.step()
            sae.constrain()
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)
    assert dict(named(rows))["W_enc"].data_ptr() == one.W_enc.data_ptr()
    assert all(parameter.is_contiguous() for _, parameter in named(rows))


@pytest.mark.parametrize("make", [lambda: GatedSAE(D_IN, D_SAE, l1=0.2), lambda: JumpReLUSAE(D_IN, D_SAE, target_l0=4)])
def test_resampled_latents_are_as_the_paper_says(make):
    sae, x = make(), activations()
    sae.fit_normalization(x)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.1
    adam = stepped(sae, x)
    sae.dead_after_tokens = 5000
    sae.tokens_since_fired[[3, 7]] = 5000
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    with torch.no_grad():
        inputs = (x - sae.norm_mean) / sae.norm_scale - sae.b_dec
        living = torch.ones(D_SAE, dtype=torch.bool)
        living[[3, 7]] = False
        length = 0.2 * sae.W_enc.norm(dim=0)[living].mean()
    assert resample(sae, x, adam, seed=0) == 2
    for latent in (3, 7):
        row = sae.W_dec.detach()[latent]
        assert float(row.norm()) == pytest.approx(1, rel=1e-5)
        cosines = inputs @ row / inputs.norm(dim=1)
        assert float(cosines.max()) == pytest.approx(1, abs=1e-5), "one of the inputs"
        torch.testing.assert_close(sae.W_enc.detach()[:, latent], length * row, rtol=1e-4, atol=1e-6)
        assert sae.b_enc[latent] == 0
        assert sae.tokens_since_fired[latent] == 0
        for name, parameter in named(adam):
            moments = adam.state[parameter]["exp_avg_sq"]
            assert name == "b_dec" or not moments[latent].any(), name
            assert name == "b_dec" or moments[[0, 1, 2, 4, 5, 6]].any(), name
    for name, parameter in sae.named_parameters():
        old = before[name]
        same = (
            (parameter.T == old.T if name == "W_enc" else parameter == old).reshape(len(living), -1).all(dim=1)
            if (name != "b_dec")
            else None
        )
        assert same is None or same[living].all(), name
    assert torch.equal(sae.b_dec.detach(), before["b_dec"])


def test_resampling_prefers_what_is_badly_reconstructed():
    sae = batchtopk(normalize="none")
    x = torch.zeros(100, D_IN)
    x[:, 0] = 1.0
    x[90:, 1] = 50.0  # far from anything
    with torch.no_grad():
        sae.b_dec[0] = 1.0
    adam = stepped(sae.train(), x)
    with torch.no_grad():
        sae.W_enc.zero_()
    sae.dead_after_tokens = 10
    sae.tokens_since_fired[:6] = 10
    resample(sae, x, adam, seed=0)
    assert (sae.W_dec[:6, 1] > 0.9).all()


def test_a_resampled_run_ends_bit_for_bit_as_if_it_had_not_stopped(tmp_path):
    config = replace(TrainConfig(**SMALL), revive="resample")
    whole = train(kill(batchtopk(), slice(0, 16)), activations(), config).sae
    sae = kill(batchtopk(), slice(0, 16))
    stop_at(sae, 40)
    with pytest.raises(KeyboardInterrupt):
        train(sae, activations(), config, out=tmp_path)
    again = train(kill(batchtopk(), slice(0, 16)), activations(), config, out=tmp_path).sae
    assert torch.equal(again.W_enc, whole.W_enc)


def test_auxk_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match="suits TopK and BatchTopK"):
        train(VanillaSAE(D_IN, D_SAE, l1=0.1), activations(), replace(TrainConfig(**SMALL), revive="auxk"))


def test_a_dead_window_longer_than_the_run_is_warned_of():
    with pytest.warns(UserWarning, match=r"7,000 is longer than the run of 6,400 tokens"):
        train(batchtopk(), activations(), TrainConfig(**SMALL, dead_after_tokens=7_000))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"lr": 0.0}, "positive"),
        ({"lr": math.nan}, "positive"),
        ({"revive": "neuron_resampling"}, "unknown revive"),
        ({"warmup": 0.9, "decay": 0.9}, "fractions"),
        ({"batch_size": 5000, "tokens": 10_000}, "exceeds the 1024 activations"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        train(batchtopk(), activations(), TrainConfig(**SMALL | options))


def test_width_of_activations_must_fit():
    with pytest.raises(ValueError, match=r"shape \(1024, 16\).*\(tokens, 8\)"):
        train(BatchTopKSAE(8, D_SAE, k=4), activations(), TrainConfig(**SMALL))


def test_dead_window_is_two_percent_of_a_short_run():
    assert train(batchtopk(), activations(), TrainConfig(**SMALL)).sae.dead_after_tokens == 128
    assert train(batchtopk(), activations(), TrainConfig(**SMALL, dead_after_tokens=7)).sae.dead_after_tokens == 7


# -- what a GPU needs -----------------------------------------------------------------------------


class NoWaiting(TorchDispatchMode):
    """Fails at whatever makes the host wait for a result of the device: sizes and numbers that depend on values."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        boolean = any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in _indices(func, args))
        if name in self.WAITING or boolean:
            raise AssertionError(f"{name} makes the host wait")
        return func(*args, **(kwargs or {}))


def _indices(func: Any, args: Any) -> list[Any]:
    return list(args[1]) if func.overloadpacket.__name__ in ("index", "index_put_") else []


@pytest.mark.parametrize(
    "make",
    [
        lambda: BatchTopKSAE(D_IN, D_SAE, k=4),
        lambda: TopKSAE(D_IN, D_SAE, k=4),
        lambda: JumpReLUSAE(D_IN, D_SAE, target_l0=4, theta=0.5),
        lambda: VanillaSAE(D_IN, D_SAE, l1=0.2),
        lambda: GatedSAE(D_IN, D_SAE, l1=0.2),
    ],
)
def test_a_step_as_a_gpu_takes_it_makes_nobody_wait(make, monkeypatch):
    """The step itself on the CPU, where every tensor says that it is on a GPU."""
    sae, x = make(), activations(64)
    run = _Run(sae, TrainConfig(**SMALL), None, [])
    run.loss = sparse.mixed
    run.update(x)  # the first may look around
    sae.alive_until = 10_000
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    with NoWaiting():
        run.update(x)
    sae.alive_until = None
    if isinstance(sae, TopKSAE):
        with pytest.raises(AssertionError, match="nonzero makes the host wait"), NoWaiting():
            _Run(sae, TrainConfig(**SMALL), None, []).update(x)
    monkeypatch.undo()
    assert run.step == 2
    assert math.isfinite(float(run.latest.total.detach()))


@pytest.mark.parametrize("make", [batchtopk, lambda: JumpReLUSAE(D_IN, D_SAE, target_l0=4, theta=1.0)])
def test_products_in_bfloat16_train_as_well_with_weights_in_float32(make):
    config = TrainConfig(**SMALL)
    exact = train(make(), activations(), config)
    rough = make()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "path", lambda sae: sparse.mixed)
        found = train(rough, activations(), config)
    assert rough.W_enc.dtype == rough.W_dec.dtype == torch.float32
    assert not torch.equal(found.sae.W_dec, exact.sae.W_dec)
    assert found.history[-1]["fvu"] == pytest.approx(exact.history[-1]["fvu"], rel=0.1)


def test_the_dead_are_looked_for_as_soon_as_there_can_be_any():
    """A run that puts looking off ends with the same SAE, bit for bit, as one that looks at every step."""
    config = TrainConfig(**SMALL, dead_after_tokens=500)
    lazy = train(kill(batchtopk(), slice(0, 16)), activations(), config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchTopKSAE, "alive_until", property(lambda self: None, lambda self, value: None), raising=False)
        eager = train(kill(batchtopk(), slice(0, 16)), activations(), config)
    assert lazy.history[-1]["aux"] > 0
    assert torch.equal(lazy.sae.W_enc, eager.sae.W_enc)
    assert [line["aux"] for line in lazy.history] == [line["aux"] for line in eager.history]


# -- several SAEs on one harvest ------------------------------------------------------------------------


def test_saes_trained_together_are_those_trained_alone(tmp_path):
    makes = [batchtopk, lambda: TopKSAE(D_IN, 32, k=3), lambda: JumpReLUSAE(D_IN, D_SAE, target_l0=4, theta=1.0)]
    alone = [train(make(), activations(), TrainConfig(**SMALL)).sae for make in makes]
    outs = [tmp_path / str(i) for i in range(3)]
    together = train_together([make() for make in makes], activations(), TrainConfig(**SMALL), outs=outs)
    for one, (sae, *_), out in zip(alone, together, outs, strict=True):
        assert torch.equal(one.W_dec, sae.W_dec)
        assert torch.equal(load_sae(out).W_dec, sae.W_dec)


def test_saes_whose_checkpoints_are_of_different_steps_catch_up(tmp_path, monkeypatch):
    config = TrainConfig(**SMALL, checkpoint_seconds=0)
    saes, outs = [batchtopk(), TopKSAE(D_IN, D_SAE, k=4)], [tmp_path / "a", tmp_path / "b"]
    whole = train_together([batchtopk(), TopKSAE(D_IN, D_SAE, k=4)], activations(), config, outs=[None, None])
    written = _Run.checkpoint

    def dying(self):  # after the first of the two has written its 40th step
        if self.step == 40 and isinstance(self.sae, TopKSAE) and not isinstance(self.sae, BatchTopKSAE):
            raise SystemExit
        written(self)

    monkeypatch.setattr(_Run, "checkpoint", dying)
    with pytest.raises(SystemExit):
        train_together(saes, activations(), config, outs=outs)
    monkeypatch.undo()
    again = train_together([batchtopk(), TopKSAE(D_IN, D_SAE, k=4)], activations(), config, outs=outs)
    for a, b in zip(whole, again, strict=True):
        assert torch.equal(a.sae.W_enc, b.sae.W_enc)
        assert a.history[-1]["total"] == b.history[-1]["total"]


# -- bad luck ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")],
)
def test_out_of_memory_says_what_to_lower_by_how_much(tmp_path, monkeypatch, error):
    original = _Run.update

    def full(self, x):
        if self.step == 30:
            self.whole = False
            raise error
        original(self, x)

    config = TrainConfig(**SMALL, checkpoint_seconds=0)
    monkeypatch.setattr(_Run, "update", full)
    with pytest.raises(TutorialError, match=r"64 activations a step.*batch_size=32 or d_sae=24"):
        train(batchtopk(), activations(), config, out=tmp_path)
    monkeypatch.undo()
    whole = train(batchtopk(), activations(), config).sae
    assert torch.equal(train(batchtopk(), activations(), config, out=tmp_path).sae.W_enc, whole.W_enc)


def stopped(folder) -> Any:
    sae = batchtopk()
    stop_at(sae, 40)
    with pytest.raises(KeyboardInterrupt):
        train(sae, activations(), TrainConfig(**SMALL), out=folder)
    return folder / "checkpoint" / "state.safetensors"


def test_an_edited_checkpoint_is_refused(tmp_path):
    path = stopped(tmp_path)
    with safe_open(path, framework="pt") as file:
        notes, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["sae.W_dec"][3, 3] += 1e-3
    save_file(tensors, path, notes)
    with pytest.raises(TutorialError, match=r"damaged .*not those that were saved.*remove that file"):
        train(batchtopk(), activations(), TrainConfig(**SMALL), out=tmp_path)


@pytest.mark.parametrize("keep", [0, 9, 1000, -1])
def test_a_truncated_checkpoint_is_refused(tmp_path, keep):
    path = stopped(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(TutorialError, match="damaged"):
        train(batchtopk(), activations(), TrainConfig(**SMALL), out=tmp_path)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    stopped(tmp_path)
    with pytest.raises(ValueError, match="other settings or data"):
        train(batchtopk(), activations(), replace(TrainConfig(**SMALL), lr=1e-3), out=tmp_path)


def test_a_number_that_is_not_finite_never_reaches_a_checkpoint(tmp_path, monkeypatch):
    """As on a GPU, where batches are not looked at one by one."""
    x = activations()
    x[:, 0] = torch.where(torch.arange(1024) == 700, math.nan, x[:, 0])
    monkeypatch.setattr("tutorial_sae.training._check_finite", lambda *_: None)
    monkeypatch.setattr("tutorial_sae.saes.base.SAE.fit_normalization", lambda *_: None)
    with pytest.raises(TutorialError, match="the loss is nan"):
        train(batchtopk(), x, TrainConfig(**SMALL, checkpoint_seconds=0), out=tmp_path)
    with safe_open(tmp_path / "checkpoint" / "state.safetensors", framework="pt") as file:
        assert all(bool(torch.isfinite(file.get_tensor(name)).all()) for name in file.keys() if "threshold" not in name)  # noqa: SIM118


def test_an_unknown_batch_cut_is_refused():
    with pytest.raises(ValueError, match="did you mean 'global'"):
        train(batchtopk(), activations(), TrainConfig(**SMALL, batch_cut="globl"))
