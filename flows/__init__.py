"""The workflow: one module per DVC stage, each read parameters -> load -> call crosshead -> save."""

import os
import sys
from pathlib import Path

# An editable install points at one checkout; a stage must run the library that lies beside it (dvc exp run --temp).
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

# OpenMP threads that spin while they wait cost a factor of five on a machine that others use too. Read by torch once.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
