"""A training run's whole state as one directory: safetensors plus JSON, replaced as a whole.

Holds weights and buffers, the optimiser's moments, steps since each feature fired, the random states, the step (which
is the data position: batches are a function of it) and the logged history. A run that goes on from it is bit for bit
the run that was never stopped.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crosshead.io.files import atomic_directory, read_json, write_json
from crosshead.io.tensors import load_tensors, save_tensors

__all__ = ["load_checkpoint", "save_checkpoint"]

_FORMAT = 1


def save_checkpoint(
    path: Path,
    module: nn.Module,
    optimiser: torch.optim.Optimizer,
    *,
    identity: str,
    step: int,
    counters: dict[str, Tensor],
    history: list[dict[str, float]],
) -> None:
    """Write the state after ``step`` steps. The directory at ``path`` is replaced only by a complete one."""
    tensors = {f"module.{name}": tensor for name, tensor in module.state_dict().items()}
    for index, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
    tensors |= {f"counter.{name}": tensor for name, tensor in counters.items()}
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    with atomic_directory(path) as directory:
        save_tensors(directory / "state.safetensors", tensors)
        write_json(directory / "state.json", {
            "format": _FORMAT, "identity": identity, "step": step, "history": history,
        })  # fmt: skip


def load_checkpoint(
    path: Path, module: nn.Module, optimiser: torch.optim.Optimizer, *, identity: str, counters: dict[str, Tensor]
) -> tuple[int, list[dict[str, float]]]:
    """Restore module, optimiser, counters and random states in place; return (step, history).

    ValueError when the checkpoint is damaged, of another format, or belongs to another configuration. What it
    overwrites is then undefined.
    """
    remedy = f"delete {path} to start anew"
    step, history = _described(path / "state.json", identity, remedy)
    tensors = load_tensors(path / "state.safetensors", remedy)
    packed = optimiser.state_dict()
    states: dict[int, dict[str, Any]] = {}
    try:
        module.load_state_dict(_under(tensors, "module."))
        for name, tensor in _under(tensors, "optimiser.").items():
            index, key = name.split(".", 1)
            states.setdefault(int(index), {})[key] = tensor
        _check_shapes(states, optimiser)
        optimiser.load_state_dict({"state": states, "param_groups": packed["param_groups"]})
        saved = _under(tensors, "counter.")
        for name, counter in counters.items():
            counter.copy_(saved[name])
        torch.set_rng_state(tensors["random.cpu"])
        if "random.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random.cuda"])
    except KeyError as error:
        raise ValueError(f"{path}/state.safetensors lacks {error}; {remedy}") from error
    except (RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}/state.safetensors does not fit this run ({reason}); {remedy}") from error
    return step, history


def _described(path: Path, identity: str, remedy: str) -> tuple[int, list[dict[str, float]]]:
    """Step and history of a checkpoint of this run."""
    description = read_json(path)
    if not isinstance(description, dict):
        raise ValueError(f"{path} holds {type(description).__name__}, expected a mapping; {remedy}")
    if (found := description.get("format")) != _FORMAT:
        raise ValueError(f"{path} has format {found}, this version reads {_FORMAT}; {remedy}")
    if (found := description.get("identity")) != identity:
        raise ValueError(f"{path.parent} belongs to another configuration ({found}; this run is {identity}); "
                         "delete it to start anew")  # fmt: skip
    step, history = description.get("step"), description.get("history")
    if not isinstance(step, int) or not isinstance(history, list):
        raise ValueError(f"{path} lacks the step or the history; {remedy}")
    return step, history


def _check_shapes(states: dict[int, dict[str, Any]], optimiser: torch.optim.Optimizer) -> None:
    """The optimiser itself would take moments of any shape and fail at the next step."""
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    for index, state in states.items():
        if index >= len(parameters):
            raise ValueError(f"it holds moments of parameter {index}, the run has {len(parameters)}")
        for key, tensor in state.items():
            if tensor.ndim and tensor.shape != parameters[index].shape:
                raise ValueError(f"optimiser.{index}.{key} has shape {tuple(tensor.shape)}, its parameter "
                                 f"{tuple(parameters[index].shape)}")  # fmt: skip


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
