"""The workflow: one module per DVC stage, each read parameters -> load -> call crosshead -> save."""

import sys
from pathlib import Path

# An editable install points at one checkout; a stage must run the library that lies beside it (dvc exp run --temp).
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
