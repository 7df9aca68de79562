import shutil

import pytest
import yaml

from crosshead.maths import calibration
from crosshead.maths.calibration import measure_costs
from crosshead.maths.engine import Costs
from crosshead.params import load_params
from flows import calibrate as flow
from flows.sync import ROOT


@pytest.mark.parametrize("profile", ["params.yaml", "flows/profiles/gpu/params.yaml"])
def test_new_prices_replace_the_old_ones_and_nothing_else(profile, tmp_path, monkeypatch):
    path = tmp_path / "params.yaml"
    shutil.copyfile(ROOT / profile, path)
    before = yaml.safe_load(path.read_text())
    prices = Costs(dense=1.5, entry=2.5, plain=3.5, moved=4.5)
    monkeypatch.setattr(flow, "measure_costs", lambda device: prices)
    flow.calibrate(path)
    after = yaml.safe_load(path.read_text())
    assert after["training"]["engine"].pop("costs") == prices.model_dump()
    before["training"]["engine"].pop("costs")
    assert after == before
    assert load_params(path).training.engine.costs == prices


def test_a_file_without_a_place_for_prices_is_told(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("training: {steps: 3}\n")
    with pytest.raises(ValueError, match="has 0 places"):
        flow.calibrate(path)


def test_prices_are_read_off_the_times_of_products(monkeypatch):
    """Times that a machine with known prices would take (seconds) give these prices back (nanoseconds)."""
    true = Costs(dense=0.02, entry=0.7, plain=0.05, moved=0.03)
    n_rows, n_features, n_movers, width = 64, 128, 4, 32
    n_nonzero = []

    def timed(product, dense_codes, repeats):
        nonzero, call = int((dense_codes != 0).sum()), len(n_nonzero)
        n_nonzero.append(nonzero)
        entries = n_movers * n_rows * n_features
        dense = [entries * (columns * true.dense + true.entry) for columns in (width, width // 4)]
        return 1e-9 * [*dense, nonzero * width * true.plain, n_movers * nonzero * width * true.moved][call]

    monkeypatch.setattr(calibration, "_median", timed)
    costs = measure_costs(n_rows=n_rows, n_features=n_features, n_movers=n_movers, width=width, active=8)
    assert costs.model_dump() == pytest.approx(true.model_dump(), rel=2e-2)


def test_measured_prices_are_positive():
    costs = measure_costs(n_rows=8, n_features=64, n_movers=3, width=16, active=8, repeats=1)
    assert all(price > 0 for price in costs.model_dump().values())
