"""A training run's whole state as one directory: safetensors plus JSON, replaced as a whole.

Holds weights and buffers, the optimiser's moments, steps since each feature fired, the random states, the step (which
is the data position: batches are a function of it) and the logged history. A run that goes on from it is bit for bit
the run that was never stopped.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from crosshead.io.files import atomic_directory, read_json, write_json

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
        save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()},
                  directory / "state.safetensors")  # fmt: skip
        write_json(directory / "state.json", {
            "format": _FORMAT, "identity": identity, "step": step, "history": history,
        })  # fmt: skip


def load_checkpoint(
    path: Path, module: nn.Module, optimiser: torch.optim.Optimizer, *, identity: str, counters: dict[str, Tensor]
) -> tuple[int, list[dict[str, float]]]:
    """Restore module, optimiser, counters and random states in place; return (step, history).

    ValueError when the checkpoint is damaged or belongs to another configuration.
    """
    description = read_json(path / "state.json")
    if description["identity"] != identity:
        raise ValueError(f"{path} belongs to another configuration ({description['identity']}; this run is "
                         f"{identity}); delete it to start anew")  # fmt: skip
    try:
        tensors = load_file(path / "state.safetensors")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}/state.safetensors cannot be read ({error}); delete {path} to start anew") from error
    module.load_state_dict(_under(tensors, "module."))
    packed = optimiser.state_dict()
    states: dict[int, dict[str, Any]] = {}
    for name, tensor in _under(tensors, "optimiser.").items():
        index, key = name.split(".", 1)
        states.setdefault(int(index), {})[key] = tensor
    optimiser.load_state_dict({"state": states, "param_groups": packed["param_groups"]})
    for name, tensor in _under(tensors, "counter.").items():
        counters[name].copy_(tensor)
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
    return int(description["step"]), description["history"]


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
