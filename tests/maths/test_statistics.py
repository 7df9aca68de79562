import numpy as np
import pytest
import torch

from crosshead.maths.statistics import participation_ratio


def test_participation_ratio_counts_equal_shares():
    energies = torch.tensor([[1.0, 2.0, 3.0], [0.0, 2.0, 3.0], [0.0, 0.0, 3.0]])
    assert participation_ratio(energies).tolist() == pytest.approx([1.0, 2.0, 3.0])


def test_participation_ratio_ignores_scale():
    energies = torch.rand(4, 5, dtype=torch.float64)
    assert np.allclose(participation_ratio(energies), participation_ratio(energies * 7))
