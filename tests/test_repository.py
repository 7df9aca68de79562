"""What must agree across the repository: stages and flows, dependencies and imports, profiles, contracts, style."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from crosshead.attention.registry import KINDS as ATTENTION_KINDS
from crosshead.dictionaries.registry import KINDS
from flows._closure import ROOT, TRAININGS, code_closure, import_graph, training_closure
from flows._profiles import derived_parameters
from flows.sync import PROFILES, living_stages, remove_leftovers, stage_names, without_dead

PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())
STAGES = stage_names()
NOT_STAGES = {"calibrate", "findings", "publish", "servers", "sync"}


LOCKS = [ROOT / "dvc.lock", *(ROOT / "flows" / "profiles").glob("*/dvc.lock")]


@pytest.fixture(scope="module")
def graph():
    return import_graph()


def definition(stage: str) -> dict:
    found = PIPELINE["stages"][stage]
    return found.get("do", found)


def code(stage: str) -> list[str]:
    return [dep for dep in definition(stage)["deps"] if dep.startswith(("src/", "flows/"))]


def test_stages_and_flows_map_one_to_one():
    flows = {path.stem for path in (ROOT / "flows").glob("*.py") if not path.stem.startswith("_")}
    assert flows - NOT_STAGES == set(STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_code_dependencies_are_what_the_stage_imports(stage: str, graph):
    assert code(stage) == code_closure(stage, graph), "run `make sync`"


# Heavy packages once, then every stage in a fork of its own that has none of our modules yet.
_LOADED = """
import json, os, sys
import mlflow, torch, transformers
for stage in sys.argv[1:]:
    sys.stdout.flush()
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    __import__(f"flows.{stage}")
    ours = [m for n, m in sys.modules.items() if n.split(".")[0] in ("crosshead", "flows")]
    print(json.dumps([stage, [m.__file__ for m in ours if getattr(m, "__file__", None)]]))
    sys.stdout.flush()
    os._exit(0)
"""


def test_what_a_stage_loads_is_among_its_dependencies():
    """The interpreter's own list of modules, against the list that was read off the source."""
    command = [sys.executable, "-c", _LOADED, *STAGES]
    loaded = dict(json.loads(line) for line in subprocess.check_output(command, cwd=ROOT, text=True).splitlines())
    assert set(loaded) == set(STAGES)
    for stage, files in loaded.items():
        listed = set(code("code" if stage in TRAININGS.values() else stage))
        assert {Path(file).relative_to(ROOT).as_posix() for file in files} <= listed, stage


def test_a_training_depends_on_what_its_own_architecture_runs(graph):
    assert "${paths.data}/code/${item.kind}.json" in definition("train")["deps"]
    for kind in KINDS:
        listed = training_closure(kind, graph)
        assert set(listed) <= set(code("code"))
        assert "flows/train.py" in listed
        assert set(KINDS) & {Path(file).stem for file in listed if "/dictionaries/" in file} == {kind}


def test_an_attention_training_depends_on_what_its_own_kind_runs(graph):
    assert "${paths.data}/code/${item.kind}.json" in definition("attention")["deps"]
    homes = {"qk_diagonal": "qk_metrics", "replacement": "replacement_metrics"}
    for kind in ATTENTION_KINDS:
        listed = training_closure(kind, graph)
        assert set(listed) <= set(code("code"))
        assert "flows/attention.py" in listed
        stems = {Path(file).stem for file in listed}
        assert set(ATTENTION_KINDS) & stems == {kind}
        assert set(homes.values()) & stems == {homes[kind]}


def test_nulls_depend_on_what_mtcs_run(graph):
    assert "${paths.data}/code/nulls.json" in definition("nulls")["deps"]
    listed = training_closure("nulls", graph)
    assert set(listed) <= set(code("code"))
    assert "flows/nulls.py" in listed
    assert set(KINDS) & {Path(file).stem for file in listed if "/dictionaries/" in file} == {"mtc"}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_runs_from_the_root_and_leaves_earlier_outputs_alone(stage: str):
    found = definition(stage)
    assert found["wdir"] == "${paths.root}"
    assert found["cmd"].startswith(f"exec python -m flows.{stage} --params ${{paths.params}}")
    for out in found["outs"]:
        ((_, flags),) = out.items()
        assert flags["persist"]


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_has_the_same_stages(profile: str):
    copy = ROOT / "flows" / "profiles" / profile / "dvc.yaml"
    assert copy.read_bytes() == (ROOT / "dvc.yaml").read_bytes(), "run `make sync`"


@pytest.mark.parametrize("profile", [profile for profile in PROFILES if profile != "smoke"])
def test_derived_parameters_are_those_of_the_laptop_at_other_sizes(profile: str):
    path = ROOT / "flows" / "profiles" / profile / "params.yaml"
    assert path.read_text() == derived_parameters(profile), "run `make sync`"


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "--no-cache", "."],
        ["ruff", "format", "--no-cache", "--check", "src", "flows", "tests"],
        ["lint-imports", "--no-cache"],
    ],
    ids=["lint", "format", "imports"],
)
def test_style_and_import_contracts_hold(command: list[str]):
    program = Path(sys.executable).with_name(command[0])
    result = subprocess.run([program, *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_nothing_phones_home():
    config = (ROOT / ".dvc" / "config").read_text()
    assert "analytics = false" in config
    assert "check_update = false" in config
    script = "from prefect.settings import get_current_settings as s; print(s().server.analytics_enabled)"
    assert subprocess.check_output([sys.executable, "-c", script], cwd=ROOT, text=True).strip() == "False"


def test_starting_a_stage_loads_neither_prefect_nor_dvc():
    """Start-up is paid by every stage instance."""
    script = (
        "import sys, flows.train; print(*(n for n in ('prefect', 'dvc', 'matplotlib', 'sklearn') if n in sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", script], cwd=ROOT, text=True).strip() == ""


def test_the_ci_script_runs_the_tests():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert "make test" in script.read_text()


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.parent.name)
def test_locks_hold_no_stage_that_is_gone(lock: Path):
    sections = yaml.safe_load(lock.with_name("params.yaml").read_text())
    locked = set(yaml.safe_load(lock.read_text())["stages"])
    assert locked <= living_stages(PIPELINE["stages"], sections), "run `make sync`"


def test_the_lock_loses_dead_entries_and_nothing_else():
    lock = "schema: '2.0'\nstages:\n  a:\n    cmd: x\n      y\n  b@one:\n    cmd: z\n  b@two:\n    cmd: z\n"
    stages = {"a": {}, "b": {"foreach": "${section.runs}"}}
    living = living_stages(stages, {"section": {"runs": ["one"]}})
    assert living == {"a", "b@one"}
    assert without_dead(lock, living) == lock[: lock.index("  b@two")]
    assert without_dead(lock, living | {"b@two"}) == lock


def test_reports_of_runs_that_are_gone_are_removed_and_no_others(tmp_path: Path):
    (tmp_path / "params.yaml").write_text("paths: {reports: reports}\nruns: {a-s0: {}}\nattention_runs: {b-s0: {}}\n")
    kept = ["runs/a-s0.json", "attention/b-s0.json", "summaries/a-s0.json", "summaries/b-s0.json", "metrics.json"]
    gone = ["runs/c-s0.json", "attention/c-s0.json", "summaries/c-s0.json"]
    for name in kept + gone:
        report = tmp_path / "reports" / name
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text("{}")
    remove_leftovers(tmp_path, root=tmp_path)
    left = {str(path.relative_to(tmp_path / "reports")) for path in (tmp_path / "reports").rglob("*.json")}
    assert left == set(kept)
