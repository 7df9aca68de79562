"""The README's example runs as it stands."""

import re
from pathlib import Path

import torch
import yaml

from crosshead import read_texts
from crosshead.activations.capture import layer_weights
from crosshead.dictionaries.registry import build, config_class
from crosshead.params import load_params

README = Path(__file__).resolve().parents[1] / "README.md"
TEXTS = [
    "The committee met on Tuesday, and the committee voted on Tuesday.",
    "def area(width, height): return width * height",
]


def test_the_example_runs_on_the_default_model(smollm2, smollm2_directory, tmp_path, monkeypatch, capsys):
    example = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[1]
    assert len(example.strip().splitlines()) <= 12
    config = config_class("mtc").model_validate(
        {"kind": "mtc", "layers": [17], "features": 64, "sparsity": {"kind": "batch_topk", "k": 4}}
    )
    module = build(config, smollm2.dims)
    batch = read_texts(smollm2, TEXTS, (*module.sites, *module.start_sites))
    module.train()
    module.start_([batch], {17: layer_weights(smollm2, 17)}, torch.Generator().manual_seed(0))
    module.calibrate_([batch])
    module.save(tmp_path / "data" / "laptop" / "runs" / "mtc-k60")
    (tmp_path / "data" / "laptop" / "model").symlink_to(smollm2_directory)

    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)

    length = names["batch"].mask.shape[1]
    assert names["moves"].shape == (1, length, length)
    assert names["fires"].shape == names["arrives"].shape == (1, length, 1)
    (predicted,) = names["predicted"].values()
    assert predicted.shape == (1, length, 576)
    assert str(names["feature"]) in capsys.readouterr().out


def test_the_parameters_shown_are_accepted(tmp_path):
    laptop = yaml.safe_load((README.parent / "params.yaml").read_text(encoding="utf-8"))
    examples = re.findall(r"```yaml\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert examples
    for number, example in enumerate(examples):
        path = tmp_path / f"{number}.yaml"
        sections = yaml.safe_load(example)
        if "runs" in sections:  # "a run more": the only section that is added to
            assert not sections["runs"].keys() & laptop["runs"].keys()
            sections["runs"] |= laptop["runs"]
        path.write_text(yaml.safe_dump({**laptop, **sections}), encoding="utf-8")
        load_params(path)


def test_every_file_the_readme_links_to_exists():
    text = README.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    assert [link for link in links if not (README.parent / link).exists()] == []
