"""One trial of the planted suite: plant or train a small base, train dictionaries on it, hold them against the truth.

A trial is a function of its parameters: it returns rows of plain figures, works in a directory of its own, and goes on
at the last checkpoint of its trainings when it is called again there.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from crosshead.activations.batches import Batches, Control
from crosshead.activations.cache import ActivationCache, ActivationSource
from crosshead.activations.planted import PlantedConfig, Truth, plant
from crosshead.activations.toys import ToyConfig, ToyKind, train_toy
from crosshead.analysis.evaluation import Evaluation, EvaluationConfig, evaluate
from crosshead.analysis.frontiers import compare_objectives
from crosshead.analysis.one_head import PlantedSource
from crosshead.analysis.recovery import Recovery, found_moved, found_values, planted_moved, planted_values, recovery
from crosshead.dictionaries import mtc, value_sae
from crosshead.dictionaries.base import Dictionary, DictionaryConfig
from crosshead.dictionaries.registry import build
from crosshead.dictionaries.sparsity import L1, BatchTopK
from crosshead.io.files import fingerprint, read_json, write_json
from crosshead.training.fit import TrainingConfig, fit

__all__ = ["layer_trial", "phase_trial", "shared_trial", "toy_trial"]

Row = dict[str, Any]
_EVALUATION = EvaluationConfig(contexts_per_batch=64, detail_contexts=16)


class _Trained(NamedTuple):
    module: Dictionary
    evaluation: Evaluation


def layer_trial(
    layer: PlantedConfig, training: TrainingConfig, features: int, seed: int, work: Path, *, with_null: bool
) -> Row:
    """An MTC and a Top-1 MTC on one planted layer at equal k.

    ``{rows: [mtc, top1], ratio, null_ratio}``: their recovery, the ratio of their errors, and that ratio on the
    one-head null (None without).
    """
    cache, truth = _planted(layer, work)
    condition = read_json(work / "base" / "planted.json")["condition_number"]
    pair = _pair(cache, training, features, round(layer.l0), seed, work)
    rows = [{
        "architecture": name, **_figures(trained), **_recovered(truth, trained).model_dump(mode="json"),
        "condition_number": condition, "noise": layer.noise,
    } for name, trained in pair.items()]  # fmt: skip
    null = _null_ratio(pair, cache, training, features, round(layer.l0), seed, work) if with_null else None
    return {"rows": rows, "ratio": _ratio(pair), "null_ratio": null}


def phase_trial(layer: PlantedConfig, training: TrainingConfig, features: int, seed: int, work: Path) -> Row:
    """What an MTC recovers of one planted layer."""
    cache, truth = _planted(layer, work)
    trained = _train(_moving("mtc", features, round(layer.l0)), cache, training, seed, work / "mtc")
    return _figures(trained) | _recovered(truth, trained).model_dump(mode="json")


def toy_trial(
    kind: ToyKind, toy: ToyConfig, training: TrainingConfig, features: int, k: int, seed: int, work: Path,
    starts: int = 1,
) -> Row:  # fmt: skip
    """A trained toy, and an MTC and a Top-1 MTC on it at equal k: their errors, on the one-head null as well.

    Of each of the four dictionaries the best of ``starts`` trainings counts.
    """
    base = work / "base"
    if not (base / "toy.json").exists():
        trained_toy = train_toy(kind, seed, toy)
        trained_toy.write(base / "cache")
        write_json(base / "toy.json", {"accuracy": trained_toy.accuracy, "loss": trained_toy.loss})
    cache = ActivationCache.open(base / "cache")
    pair = _pair(cache, training, features, k, seed, work, starts)
    figures = {f"{name}_{key}": value for name, trained in pair.items() for key, value in _figures(trained).items()}
    null = _null_ratio(pair, cache, training, features, k, seed, work, starts)
    return {**read_json(base / "toy.json"), "k": k, **figures, "ratio": _ratio(pair), "null_ratio": null}


def shared_trial(
    layers: PlantedConfig, training: TrainingConfig, features: int, coefficient: float, control: Control, seed: int,
    work: Path,
) -> Row:  # fmt: skip
    """A value SAE on two planted layers against the sum of one-layer ones, at equal total features.

    ``ratio`` is that of the L1 objectives; below 1 the layers share features. What is recovered is told from decoders,
    which loadings follow from: a pair may have more features than its values have dimensions.
    """
    cache, truth = _planted(layers, work)
    sparsity = L1(coefficient=coefficient, start_l0=2 * layers.l0)
    records: dict[str, list[Row]] = {}
    joint: _Trained | None = None
    for name, chosen in {"both": (0, 1), "first": (0,), "second": (1,)}.items():
        config = value_sae.Config(layers=chosen, features=features * len(chosen), sparsity=sparsity)
        trained = _train(config, cache, training, seed, work / name, control if name == "both" else "none")
        joint = trained if name == "both" else joint
        records[name] = [{
            "sparsity": sparsity.model_dump(mode="json"), "seed": seed, "n_tokens": trained.evaluation.n_tokens,
            "evaluation": trained.evaluation.model_dump(mode="json"),
        }]  # fmt: skip
    assert joint is not None
    (compared,) = compare_objectives(records["both"], records["first"], records["second"])
    planted = planted_values(truth, cache.weights(), joint.module)
    found = recovery(planted, found_values(joint.module), _live(joint), by_encoders=False)
    cosines = {name: getattr(found, name) for name in ("cosine_encoder", "cosine_decoder", "cosine_loadings")}
    return {**compared, **_figures(joint), "share_recovered": found.share_recovered, **cosines}


def _planted(config: PlantedConfig, work: Path) -> tuple[ActivationCache, Truth]:
    """Plant, unless an earlier attempt has."""
    base = work / "base"
    truth = Truth.load(base) if base.exists() else plant(config, base)
    return ActivationCache.open(base / "cache"), truth


def _pair(
    source: ActivationSource, training: TrainingConfig, features: int, k: int, seed: int, work: Path, starts: int = 1
) -> dict[str, _Trained]:
    """An MTC and a Top-1 MTC, alike in all but the heads per feature; of several starts the one of least error."""
    pair: dict[str, _Trained] = {}
    for name in ("mtc", "top1"):
        trained = [_train(_moving(name, features, k), source, training, seed + 100 * start, work / f"{name}-{start}")
                   for start in range(starts)]  # fmt: skip
        pair[name] = min(trained, key=lambda one: one.evaluation.normalised_mse)
    return pair


def _null_ratio(
    pair: Mapping[str, _Trained], cache: ActivationSource, training: TrainingConfig, features: int, k: int, seed: int,
    work: Path, starts: int = 1,
) -> float:  # fmt: skip
    """The ratio where the Top-1 model's prediction, with its residuals from elsewhere, is the target."""
    planted = PlantedSource(cache, pair["top1"].module, work / "null", seed)
    # Another seed than the teacher's: a student that begins where its teacher did would be favoured.
    return _ratio(_pair(planted, training, features, k, seed + 1_000, work / "null", starts))


def _moving(name: str, features: int, k: int) -> mtc.Config:
    # Decoders are drawn where heads move much: a head that looks at few places moves noise from all others.
    return mtc.Config(layers=(0,), features=features, sparsity=BatchTopK(k=k), input="resid", start_tokens="energy",
                      heads_per_feature="all" if name == "mtc" else 1)  # fmt: skip


def _train(
    config: DictionaryConfig, cache: ActivationSource, training: TrainingConfig, seed: int, work: Path,
    control: Control = "none",
) -> _Trained:  # fmt: skip
    module = build(config, cache.dims)
    identity = fingerprint([config.model_dump(mode="json"), training.model_dump(mode="json"), seed, control,
                            cache.manifest.model])  # fmt: skip
    size = training.contexts_per_batch
    fit(
        module,
        Batches(cache, "train", (*module.sites, *module.start_sites), size, seed, control),
        Batches(cache, "heldout", module.sites, size, seed, control),
        cache.weights(), training, seed=seed, work=work, identity=identity, description=work.name,
    )  # fmt: skip
    # The control takes rows from contexts outside the batch.
    size = min(_EVALUATION.contexts_per_batch, max(1, cache.n_contexts("heldout") // 2))
    heldout = Batches(cache, "heldout", module.sites, size, seed, control)
    return _Trained(module, evaluate(module, heldout.all(), _EVALUATION))


def _live(trained: _Trained) -> torch.Tensor:
    return torch.tensor(trained.evaluation.feature_counts) > 0


def _recovered(truth: Truth, trained: _Trained) -> Recovery:
    return recovery(planted_moved(truth), found_moved(trained.module), _live(trained))


def _figures(trained: _Trained) -> Row:
    evaluation = trained.evaluation
    return {"l0": evaluation.l0, "normalised_mse": evaluation.normalised_mse}


def _ratio(pair: Mapping[str, _Trained]) -> float:
    """Normalised MSE of the MTC over that of the Top-1 MTC."""
    return pair["mtc"].evaluation.normalised_mse / pair["top1"].evaluation.normalised_mse
