"""The one training loop. It asks no dictionary for its kind.

A step reads ``train.at(step)``, takes the loss at progress = step / steps, and updates. Everything a step depends on is
in the checkpoint or a function of (seed, step), so a run killed anywhere and started again ends in the same bits as one
that was left alone (on CPU, at the same number of threads).
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from tqdm import tqdm

from crosshead.dictionaries.base import Batch, LayerWeights, Trainable
from crosshead.io.files import read_json, recover_directory, write_json
from crosshead.maths.engine import Engine
from crosshead.training.checkpoint import load_checkpoint, save_checkpoint
from crosshead.training.schedules import learning_rate_factor

__all__ = ["BatchSource", "FitResult", "Speed", "TrainingConfig", "fit"]

Metrics = dict[str, float]
OnMetrics = Callable[[int, Metrics], None]


class TrainingConfig(BaseModel):
    """How a dictionary is trained."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: Annotated[int, Field(gt=0)] = 300
    """Optimiser steps."""
    contexts_per_batch: Annotated[int, Field(gt=0)] = 4
    """Whole contexts in a batch."""
    learning_rate: Annotated[float, Field(gt=0)] = 4e-3
    """Adam's; parameter groups multiply it."""
    warmup_steps: Annotated[int, Field(ge=0)] = 30
    """Steps over which the learning rate rises."""
    decay_fraction: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Last share of training over which it falls."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Adam's first decay."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Adam's second decay."""
    gradient_clip: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the whole gradient; null leaves it alone."""
    log_every: Annotated[int, Field(gt=0)] = 10
    """Steps between logged training losses."""
    evaluate_every: Annotated[int, Field(gt=0)] = 100
    """Steps between evaluations on a few held-out contexts."""
    evaluate_contexts: Annotated[int, Field(gt=0)] = 4
    """Held-out contexts of those."""
    checkpoint_every: Annotated[int, Field(gt=0)] = 50
    """Steps between checkpoints."""
    start_contexts: Annotated[int, Field(gt=0)] = 32
    """Training contexts that the start is computed from."""
    calibrate_contexts: Annotated[int, Field(gt=0)] = 64
    """Training contexts that inference thresholds are set on."""
    engine: Engine = Engine()
    """How sparse products are computed: memory of the encoder's product, and prices by which dense or sparse is chosen.
    Part of the run's inputs, because the choice changes roundings."""
    autocast: Literal["none", "bf16"] = "none"
    """bf16: matrix products in bfloat16 on a GPU; ignored on the CPU."""


class BatchSource(Protocol):
    """What ``fit`` needs of training and held-out data; Batches is one."""

    def at(self, step: int) -> Batch:
        """The batch of a step: a pure function of it."""
        ...

    def sample(self, n_contexts: int, seed: int) -> list[Batch]:
        """Some contexts, in batches."""
        ...


class Speed(NamedTuple):
    """How fast a training went, in this process. No part of its result: two equal runs are not equally fast."""

    seconds: float
    """Steps, evaluations and checkpoints together."""
    waited: float
    """Seconds of these until batches that were asked for had been read (on a GPU, earlier steps may still run)."""
    tokens: int
    """Counted positions trained on."""

    @property
    def waited_share(self) -> float:
        """Share of the time that went into waiting."""
        return self.waited / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Counted positions per second."""
        return self.tokens / self.seconds if self.seconds else 0.0


class FitResult(NamedTuple):
    """What training leaves beside the module's weights."""

    history: list[Metrics]
    """Logged steps: step, loss parts, l0, normalised_mse, and heldout_* where evaluated."""
    steps: int
    tokens: int
    """Counted positions trained on, repetitions included."""
    silent_fraction: float
    """Features that did not fire over the last ``log_every`` * 10 training steps."""


def fit(
    module: Trainable,
    train: BatchSource,
    heldout: BatchSource,
    weights: Mapping[int, LayerWeights],
    config: TrainingConfig,
    *,
    seed: int,
    work: Path,
    identity: str,
    device: str = "cpu",
    on_metrics: OnMetrics | None = None,
    on_speed: Callable[[Speed], None] | None = None,
    description: str = "train",
) -> FitResult:
    """Train ``module`` in place, from the checkpoint in ``work`` if there is one; calibrate it; leave it in eval mode.

    ``on_metrics(step, metrics)`` is called in order, and for a step only after a checkpoint that covers it is on disk.
    It sees every step at least once, and twice only if the process died while reporting. ``on_speed`` is called once,
    after the last step, about the steps of this process if there were any.

    Raises ValueError for a checkpoint of another ``identity`` or a damaged one, FloatingPointError when a loss is not
    finite (the last checkpoint stays), KeyboardInterrupt after a checkpoint on interrupt or SIGTERM.
    """
    module.to(device).train()
    module.engine = config.engine
    session = _Session(module, config, identity, work, on_metrics)
    if not session.resume():
        generator = torch.Generator().manual_seed(seed)
        moved = {layer: LayerWeights(*(t.to(device) for t in w)) for layer, w in weights.items()}
        module.start_(train.sample(config.start_contexts, seed), moved, generator)
    bar = tqdm(total=config.steps, initial=session.step, desc=description, disable=None)
    began, waited, tokens = time.perf_counter(), 0.0, int(session.tokens)
    with _StopRequest() as stop, bar:
        while session.step < config.steps:
            asked = time.perf_counter()
            batch = train.at(session.step)
            waited += time.perf_counter() - asked
            session.advance(batch, device)
            last = session.step == config.steps
            if last or session.step % config.evaluate_every == 0:
                session.evaluate(heldout, seed)
            if last or stop.requested or session.step % config.checkpoint_every == 0:
                session.checkpoint()
            if stop.requested:
                raise KeyboardInterrupt(f"{description}: stopped after step {session.step}, checkpoint written")
            bar.update()
    if on_speed is not None and int(session.tokens) > tokens:
        on_speed(Speed(time.perf_counter() - began, waited, int(session.tokens) - tokens))
    module.calibrate_(train.sample(config.calibrate_contexts, seed + 1))
    module.eval()
    silent = float((session.since_fired >= min(config.steps, 10 * config.log_every)).float().mean())
    return FitResult(session.history, session.step, int(session.tokens), silent)


class _Session:
    """The moving parts of one run: optimiser, step, counters, history."""

    def __init__(
        self, module: Trainable, config: TrainingConfig, identity: str, work: Path, on_metrics: OnMetrics | None
    ):
        self.module, self.config, self.identity, self.work = module, config, identity, work
        self.on_metrics = on_metrics
        groups = module.parameter_groups()
        self.multipliers = [group.multiplier for group in groups]
        self.parameters = [p for group in groups for p in group.parameters]
        self.optimiser = torch.optim.Adam(
            [{"params": group.parameters} for group in groups],
            lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True,
        )  # fmt: skip
        device = self.parameters[0].device
        self.step = 0
        self.since_fired = torch.zeros(module.config.features, dtype=torch.long, device=device)
        self.tokens = torch.zeros((), dtype=torch.long)
        self.history: list[Metrics] = []

    @property
    def counters(self) -> dict[str, torch.Tensor]:
        return {"since_fired": self.since_fired, "tokens": self.tokens}

    def resume(self) -> bool:
        """Take up the checkpoint in ``work``; False when there is none."""
        path = self.work / "checkpoint"
        if not recover_directory(path):
            return False
        self.step, self.history = load_checkpoint(
            path, self.module, self.optimiser, identity=self.identity, counters=self.counters
        )
        self._report()
        return True

    def advance(self, batch: Batch, device: str) -> None:
        """One optimiser step."""
        config = self.config
        factor = learning_rate_factor(self.step, config.steps, config.warmup_steps, config.decay_fraction)
        for group, multiplier in zip(self.optimiser.param_groups, self.multipliers, strict=True):
            group["lr"] = config.learning_rate * multiplier * factor
        self.optimiser.zero_grad(set_to_none=True)
        with _autocast(config.autocast, device):
            loss = self.module.loss(batch, self.step / config.steps)
            total = loss.total
        if not math.isfinite(float(total.detach())):
            raise self._not_finite("the loss", float(total.detach()))
        total.backward()
        # Before the weights change: a checkpoint must never hold what cannot be trained on.
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if not math.isfinite(float(norm)):
            raise self._not_finite("the gradient's norm", float(norm))
        if config.gradient_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, config.gradient_clip, norm)
        self.optimiser.step()
        self.module.project_()
        self.step += 1
        self.since_fired += 1
        self.since_fired[loss.fired] = 0
        self.tokens += batch.n_counted
        if self.step % config.log_every == 0 or self.step == config.steps:
            parts = {f"loss_{name}": float(value.detach()) for name, value in loss.parts.items()}
            self._record({"l0": loss.l0, "normalised_mse": loss.normalised_mse, **parts})

    def _not_finite(self, what: str, value: float) -> FloatingPointError:
        return FloatingPointError(
            f"{what} at step {self.step} is {value}; the last good checkpoint is in {self.work / 'checkpoint'}; lower "
            f"training.learning_rate (now {self.config.learning_rate}) or set training.gradient_clip"
        )

    @torch.no_grad()
    def evaluate(self, heldout: BatchSource, seed: int) -> None:
        """Losses on a few held-out contexts, as in training (batch-wise selections look at their own batch)."""
        losses = [self.module.loss(b, self.step / self.config.steps)
                  for b in heldout.sample(self.config.evaluate_contexts, seed)]  # fmt: skip
        self._record({
            "heldout_normalised_mse": sum(loss.normalised_mse for loss in losses) / len(losses),
            "heldout_l0": sum(loss.l0 for loss in losses) / len(losses),
            "silent_fraction": float((self.since_fired >= 10 * self.config.log_every).float().mean()),
        })  # fmt: skip

    def checkpoint(self) -> None:
        """Write the state, then report what it covers."""
        save_checkpoint(
            self.work / "checkpoint", self.module, self.optimiser, identity=self.identity, step=self.step,
            counters=self.counters, history=self.history,
        )  # fmt: skip
        self._report()

    def _record(self, metrics: Metrics) -> None:
        if self.history and self.history[-1]["step"] == self.step:
            self.history[-1] |= metrics
        else:
            self.history.append({"step": self.step, **metrics})

    def _report(self) -> None:
        if self.on_metrics is None:
            return
        mark = self.work / "reported.json"
        reported = read_json(mark)["step"] if mark.exists() else 0
        for entry in self.history:
            if entry["step"] > reported:
                self.on_metrics(int(entry["step"]), {k: v for k, v in entry.items() if k != "step"})
        write_json(mark, {"step": self.step})


def _autocast(kind: str, device: str) -> AbstractContextManager:
    if kind == "bf16" and device.startswith("cuda"):
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return nullcontext()


class _StopRequest:
    """Turns interrupt and SIGTERM into a request that is answered between steps, never in the middle of one.

    Signals can be caught in the main thread only; elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, _number: int, _frame: object) -> None:
        self.requested = True
