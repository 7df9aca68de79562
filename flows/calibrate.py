"""Measure what dense and sparse products cost here, and write it into a parameter file.

    python -m flows.calibrate --params params.yaml

The prices belong to a run's inputs, so new ones train every run anew. They change speed, and results by rounding only.
"""

import argparse
import re
import sys
from pathlib import Path

from crosshead.io.files import write_text
from crosshead.maths.calibration import measure_costs
from crosshead.params import load_params

_COSTS = re.compile(r"\bcosts: \{[^}]*\}")


def calibrate(path: Path, device: str = "cpu") -> str:
    """Replace the prices in a parameter file; return them. ValueError where it has no place for them."""
    text = path.read_text()
    if (found := len(_COSTS.findall(text))) != 1:
        raise ValueError(f"{path} has {found} places of the form 'costs: {{...}}'; write one, 'costs: {{}}', under "
                         "training.engine")  # fmt: skip
    costs = ", ".join(f"{name}: {price}" for name, price in measure_costs(device).model_dump().items())
    write_text(path, _COSTS.sub(f"costs: {{{costs}}}", text))
    return f"costs: {{{costs}}}"


def main() -> int:
    """Calibrate the file named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    path = parser.parse_args().params
    try:
        print(f"{path}: {calibrate(path, load_params(path).machine.prepare())}")
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
