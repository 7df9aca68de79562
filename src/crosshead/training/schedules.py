"""Learning-rate schedule: a linear rise, a plateau, a linear fall."""

__all__ = ["learning_rate_factor"]


def learning_rate_factor(step: int, steps: int, warmup_steps: int, decay_fraction: float) -> float:
    """Share of the full learning rate at a step (counted from 0).

    Rises linearly over ``warmup_steps``, falls linearly to nearly zero over the last ``decay_fraction`` of ``steps``.
    """
    rise = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    fall = min(1.0, (steps - step) / (decay_fraction * steps)) if decay_fraction else 1.0
    return rise * fall
