import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from crosshead.dictionaries.registry import build
from crosshead.maths.engine import Costs, Engine
from crosshead.training.fit import Speed, TrainingConfig, fit
from tests.dictionaries.cases import DIMS, config_of, random_batch, weights

CONFIG = TrainingConfig(steps=24, warmup_steps=3, learning_rate=1e-2, log_every=4, evaluate_every=8,
                        checkpoint_every=5, start_contexts=6, calibrate_contexts=6, gradient_clip=1.0)  # fmt: skip


class Source:
    """Random batches as a function of the step; may die at one of them."""

    def __init__(self, dies_at: int | None = None, how=None):
        self.dies_at, self.how = dies_at, how

    def at(self, step: int):
        if step == self.dies_at:
            self.how()
        return random_batch(100 + step % 7)

    def sample(self, n_contexts: int, seed: int):
        return [random_batch(seed * 31 + i) for i in range(n_contexts // 3)]


class Killed(BaseException):
    """Stands for a process that is gone."""


def killed():
    raise Killed


def train(case: str, work: Path, source: Source | None = None, identity="a", config=CONFIG, on_metrics=None):
    module = build(config_of(case), DIMS)
    result = fit(module, source or Source(), Source(), weights(), config,
                 seed=0, work=work, identity=identity, on_metrics=on_metrics)  # fmt: skip
    return module, result


def digest(module, result) -> str:
    parts = [t.detach().numpy().tobytes() for _, t in sorted(module.state_dict().items())]
    parts.append(json.dumps(result, sort_keys=True).encode())
    return hashlib.sha256(b"".join(parts)).hexdigest()


@pytest.mark.parametrize("case", ["mtc/batch_topk", "mtc-top1/l1", "value_sae-two/jumprelu", "attn_out_sae/topk"])
@pytest.mark.parametrize("step", [1, 5, 13, 23])
@pytest.mark.usefixtures("two_threads")
def test_a_run_killed_at_any_step_and_resumed_equals_the_uninterrupted_run(case, step, tmp_path):
    whole = digest(*train(case, tmp_path / "whole"))
    with pytest.raises(Killed):
        train(case, tmp_path / "cut", Source(step, killed))
    torch.manual_seed(999)  # a new process has other random states
    assert digest(*train(case, tmp_path / "cut")) == whole


@pytest.mark.parametrize("step", [2, 9])
def test_a_run_whose_products_go_from_dense_to_sparse_resumes_bit_for_bit(step, tmp_path, monkeypatch):
    """k anneals, so that the density falls below the price at which dense products are cheaper."""
    chosen: list[bool] = []
    decide = Engine.prefers_dense
    monkeypatch.setattr(Engine, "prefers_dense", lambda *a: chosen.append(decide(*a)) or chosen[-1])
    costs = Costs(dense=1e-9, entry=0.193 * DIMS.d_model, plain=1.0, moved=1.0)
    config = CONFIG.model_copy(update={"engine": Engine(costs=costs)})
    whole = digest(*train("mtc/batch_topk", tmp_path / "whole", config=config))
    assert set(chosen) == {True, False}
    with pytest.raises(Killed):
        train("mtc/batch_topk", tmp_path / "cut", Source(step, killed), config=config)
    assert digest(*train("mtc/batch_topk", tmp_path / "cut", config=config)) == whole


def test_a_process_killed_by_the_system_leaves_a_run_that_resumes_bit_for_bit(tmp_path):
    script = textwrap.dedent("""
        import os, signal, sys, torch
        from pathlib import Path
        from tests.training.test_fit import Source, digest, train
        torch.set_num_threads(1)
        dies = Source(17, lambda: os.kill(os.getpid(), signal.SIGKILL)) if sys.argv[2] == "die" else None
        print(digest(*train("mtc/batch_topk", Path(sys.argv[1]), dies)))
    """)

    def run(work: str, mode: str):
        return subprocess.run([sys.executable, "-c", script, str(tmp_path / work), mode],
                              capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)  # fmt: skip

    assert run("cut", "die").returncode == -signal.SIGKILL
    assert run("cut", "live").stdout == run("whole", "live").stdout != ""


def test_an_interrupt_is_answered_between_steps_with_a_checkpoint(tmp_path):
    with pytest.raises(KeyboardInterrupt, match="stopped after step 8, checkpoint written"):
        train("mtc/topk", tmp_path / "cut", Source(7, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    state = json.loads((tmp_path / "cut" / "checkpoint" / "state.json").read_text())
    assert state["step"] == 8
    assert digest(*train("mtc/topk", tmp_path / "cut")) == digest(*train("mtc/topk", tmp_path / "whole"))


def test_metrics_are_reported_once_in_order_and_only_under_a_checkpoint(tmp_path):
    seen = []

    def on_metrics(step, metrics):
        state = json.loads((tmp_path / "w" / "checkpoint" / "state.json").read_text())
        assert state["step"] >= step
        seen.append(step)

    with pytest.raises(Killed):
        train("mtc/topk", tmp_path / "w", Source(13, killed), on_metrics=on_metrics)
    train("mtc/topk", tmp_path / "w", on_metrics=on_metrics)
    assert seen == [4, 8, 12, 16, 20, 24]


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path):
    with pytest.raises(Killed):
        train("mtc/topk", tmp_path, Source(7, killed))
    with pytest.raises(ValueError, match=r"belongs to another configuration \(a; this run is b\); delete it"):
        train("mtc/topk", tmp_path, identity="b")


def test_a_damaged_checkpoint_is_named(tmp_path):
    with pytest.raises(Killed):
        train("mtc/topk", tmp_path, Source(7, killed))
    state = tmp_path / "checkpoint" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"state\.safetensors cannot be read .*; delete .* to start anew"):
        train("mtc/topk", tmp_path)


def test_a_loss_that_is_not_finite_stops_with_the_last_checkpoint_kept(tmp_path):
    def poison(step):
        batch = random_batch(100 + step % 7)
        if step == 12:
            for tensor in batch.sites.values():
                tensor.fill_(torch.nan)
        return batch

    source = Source()
    source.at = poison
    with pytest.raises(FloatingPointError, match=r"the loss at step 12 is nan; .*lower training.learning_rate"):
        train("value_sae-one/l1", tmp_path, source)
    assert json.loads((tmp_path / "checkpoint" / "state.json").read_text())["step"] == 10


def test_a_gradient_that_is_not_finite_under_a_finite_loss_never_reaches_the_weights(tmp_path, monkeypatch):
    from crosshead.dictionaries.value_sae import Module

    honest = Module.loss

    def poisoned(module, batch, progress=1.0):
        loss = honest(module, batch, progress)
        if round(progress * CONFIG.steps) != 12:
            return loss
        # The square root of exactly zero: its value is fine, its slope is not.
        return loss._replace(parts=loss.parts | {"slope": (module.encoder.weight.sum() * 0).sqrt()})

    monkeypatch.setattr(Module, "loss", poisoned)
    with pytest.raises(FloatingPointError, match=r"the gradient's norm at step 12 is nan; the last good checkpoint"):
        train("value_sae-one/l1", tmp_path)
    monkeypatch.setattr(Module, "loss", honest)
    module, _ = train("value_sae-one/l1", tmp_path)
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_an_interrupt_during_the_last_step_is_answered_too(tmp_path):
    last = CONFIG.steps - 1
    with pytest.raises(KeyboardInterrupt, match=f"stopped after step {CONFIG.steps}, checkpoint written"):
        train("mtc/topk", tmp_path / "cut", Source(last, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert digest(*train("mtc/topk", tmp_path / "cut")) == digest(*train("mtc/topk", tmp_path / "whole"))


def test_training_lowers_the_heldout_error_and_counts_tokens(tmp_path):
    config = CONFIG.model_copy(update={"steps": 200, "evaluate_every": 10})
    _, result = train("attn_out_sae/topk", tmp_path, config=config)
    evaluated = [entry["heldout_normalised_mse"] for entry in result.history if "heldout_normalised_mse" in entry]
    assert evaluated[-1] < evaluated[0]
    assert result.tokens == 200 * random_batch(0).n_counted


def test_start_and_data_depend_on_the_seed_alone(tmp_path):
    assert digest(*train("mtc/l1", tmp_path / "a")) == digest(*train("mtc/l1", tmp_path / "b"))


def test_speed_counts_the_steps_of_this_process_and_its_waiting(tmp_path):
    class Slow(Source):
        def at(self, step):
            time.sleep(0.02)
            return super().at(step)

    told: list[Speed] = []
    module = build(config_of("mtc/topk"), DIMS)
    result = fit(module, Slow(), Source(), weights(), CONFIG, seed=0, work=tmp_path, identity="a", on_speed=told.append)
    (speed,) = told
    assert speed.tokens == result.tokens
    assert 24 * 0.02 <= speed.waited <= speed.seconds
    assert speed.waited_share == speed.waited / speed.seconds
    assert speed.tokens_per_second == speed.tokens / speed.seconds
