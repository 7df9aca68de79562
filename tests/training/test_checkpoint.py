"""Checkpoints: what is saved comes back, and what is damaged or foreign is refused in one sentence."""

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from crosshead.io.files import read_json, write_json
from crosshead.io.tensors import load_tensors, save_tensors
from crosshead.training.checkpoint import load_checkpoint, save_checkpoint
from tests.training.test_fit import Killed, Source, digest, killed, train

HISTORY = [{"step": 3, "l0": 1.5}]


def parts(width: int = 3, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer, dict[str, torch.Tensor]]:
    """A module, its optimiser after one step, a counter."""
    torch.manual_seed(seed)
    module = nn.Linear(width, 2)
    optimiser = torch.optim.Adam(module.parameters())
    module(torch.randn(4, width)).square().sum().backward()
    optimiser.step()
    return module, optimiser, {"fired": torch.arange(2)}


def save(path: Path) -> tuple[nn.Module, torch.optim.Optimizer, dict[str, torch.Tensor]]:
    module, optimiser, counters = parts()
    save_checkpoint(path, module, optimiser, identity="a", step=3, counters=counters, history=HISTORY)
    return module, optimiser, counters


def load(path: Path, width: int = 3) -> tuple[int, list[dict[str, float]]]:
    module, optimiser, counters = parts(width, seed=1)
    return load_checkpoint(path, module, optimiser, identity="a", counters=counters)


def change_description(path: Path, **changes: object) -> None:
    kept = {key: value for key, value in (read_json(path / "state.json") | changes).items() if value is not None}
    write_json(path / "state.json", kept)


def change_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_tensors(path / "state.safetensors", "")
    change(tensors)
    save_tensors(path / "state.safetensors", tensors)


def test_the_whole_state_comes_back(tmp_path: Path):
    module, optimiser, counters = save(tmp_path / "checkpoint")
    expected = torch.rand(3)  # the random state goes on where it was saved
    other, other_optimiser, other_counters = parts(seed=1)
    other_counters["fired"].zero_()
    assert load_checkpoint(tmp_path / "checkpoint", other, other_optimiser, identity="a",
                           counters=other_counters) == (3, HISTORY)  # fmt: skip
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(other_counters["fired"], counters["fired"])
    for name, tensor in module.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    for index, state in optimiser.state_dict()["state"].items():
        for key, value in state.items():
            assert torch.equal(other_optimiser.state_dict()["state"][index][key], value), key


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": 2}, r"state\.json has format 2, this version reads 1; delete .* to start anew"),
        ({"format": None}, "has format None"),
        ({"identity": "b"}, r"belongs to another configuration \(b; this run is a\); delete it"),
        ({"step": None}, "lacks the step or the history; delete"),
        ({"history": "none"}, "lacks the step or the history; delete"),
    ],
)
def test_a_description_that_this_run_cannot_use_is_refused(changes: dict, said: str, tmp_path: Path):
    save(tmp_path / "checkpoint")
    change_description(tmp_path / "checkpoint", **changes)
    with pytest.raises(ValueError, match=said):
        load(tmp_path / "checkpoint")


def test_a_description_that_is_no_mapping_is_refused(tmp_path: Path):
    save(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "state.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="holds list, expected a mapping; delete"):
        load(tmp_path / "checkpoint")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda tensors: tensors.pop("module.weight"),
            r"does not fit this run \(.*Missing key.*\); delete .* start anew",
        ),
        (lambda tensors: tensors.update({"module.bias": torch.zeros(7)}), "does not fit this run .*size mismatch"),
        (lambda tensors: tensors.update({"optimiser.0.exp_avg": torch.zeros(7)}), r"exp_avg has shape \(7,\)"),
        (
            lambda tensors: tensors.update({"optimiser.9.exp_avg": torch.zeros(7)}),
            "moments of parameter 9, the run has 2",
        ),
        (lambda tensors: tensors.update({"optimiser.x.exp_avg": torch.zeros(7)}), "does not fit this run"),
        (lambda tensors: tensors.pop("counter.fired"), "lacks 'fired'; delete"),
        (lambda tensors: tensors.update({"counter.fired": torch.zeros(7)}), "does not fit this run"),
        (lambda tensors: tensors.pop("random.cpu"), r"lacks 'random\.cpu'; delete"),
        (lambda tensors: tensors.update({"random.cpu": torch.zeros(7)}), "does not fit this run"),
    ],
)
def test_tensors_that_do_not_fit_are_one_sentence(change: Callable, said: str, tmp_path: Path):
    save(tmp_path / "checkpoint")
    change_tensors(tmp_path / "checkpoint", change)
    with pytest.raises(ValueError, match=said) as caught:
        load(tmp_path / "checkpoint")
    assert len(str(caught.value).splitlines()) == 1


def test_a_checkpoint_of_another_width_is_refused(tmp_path: Path):
    save(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="does not fit this run"):
        load(tmp_path / "checkpoint", width=5)


def test_training_goes_on_from_a_checkpoint_whose_replacement_was_killed(tmp_path: Path):
    with pytest.raises(Killed):
        train("value_sae-one/topk", tmp_path / "cut", Source(13, killed), on_metrics=lambda step, metrics: None)
    (tmp_path / "cut" / "checkpoint").rename(tmp_path / "cut" / ".checkpoint.old")  # killed between two renames
    seen: list[int] = []
    resumed = train("value_sae-one/topk", tmp_path / "cut", on_metrics=lambda step, metrics: seen.append(step))
    assert min(seen) > 10
    assert digest(*resumed) == digest(*train("value_sae-one/topk", tmp_path / "whole"))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(tmp_path / "checkpoint")
    module, optimiser, counters = parts(seed=1)

    def fills_the_disk(path: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fills_the_disk)
    with pytest.raises(OSError, match="No space left") as caught:
        save_checkpoint(tmp_path / "checkpoint", module, optimiser, identity="a", step=4, counters=counters, history=[])
    assert caught.value.filename == str(tmp_path / "checkpoint")
    monkeypatch.undo()
    assert load(tmp_path / "checkpoint") == (3, HISTORY)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
