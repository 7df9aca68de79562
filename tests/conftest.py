"""Models and batches that the tests share."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from crosshead.activations.base_model import LanguageModel, ModelConfig, load_model, prepare_model
from crosshead.dictionaries.base import Batch, ModelDims, Site
from flows._runtime import lock

VOCABULARY = 260
CONTEXT_LIMIT = 128
REPOSITORY = Path(__file__).resolve().parents[1]

# Grouped-query families get a head_dim that is not hidden_size / heads, so that nothing can guess it.
_COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
_GROUPED = _COMMON | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": CONTEXT_LIMIT,
}
_CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "gpt2": lambda: GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=CONTEXT_LIMIT, **_COMMON),
    "gpt_neox": lambda: GPTNeoXConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=CONTEXT_LIMIT, **_COMMON),
    "llama": lambda: LlamaConfig(**_GROUPED),
    "qwen3": lambda: Qwen3Config(**_GROUPED),
    "gemma2": lambda: Gemma2Config(
        sliding_window=6, attn_logit_softcapping=5.0, query_pre_attn_scalar=10, **_GROUPED),
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The end-to-end run first: it takes as long as half of the others, so a second process can do those meanwhile."""
    items.sort(key=lambda item: item.path.name != "test_smoke.py")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per UTF-8 byte; token 0 begins every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<bos>": 0} | {character: i + 1 for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>")


def save_tiny_model(family: str, seed: int, directory: Path) -> None:
    """Write a small model with random weights, large enough for uneven patterns, in hub layout."""
    model = AutoModelForCausalLM.from_config(_CONFIGS[family]())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * noise if parameter.ndim > 1 else parameter + 0.1 * noise)
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)


@pytest.fixture(scope="session")
def tiny_model_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return ``(family, seed=0) -> directory`` in hub layout. Do not change its files: other tests use them."""
    made: dict[tuple[str, int], Path] = {}

    def make(family: str, seed: int = 0) -> Path:
        if (family, seed) not in made:
            directory = tmp_path_factory.mktemp(f"{family}-{seed}")
            save_tiny_model(family, seed, directory)
            made[family, seed] = directory
        return made[family, seed]

    return make


@pytest.fixture(scope="session")
def tiny_model(tiny_model_directory: Callable[..., Path]) -> Callable[..., LanguageModel]:
    """Return ``(family, seed=0) -> LanguageModel`` for gpt2, gpt_neox, llama, qwen3 and gemma2: 3 layers, width 32."""
    loaded: dict[tuple[str, int], LanguageModel] = {}

    def make(family: str, seed: int = 0) -> LanguageModel:
        if (family, seed) not in loaded:
            loaded[family, seed] = load_model(tiny_model_directory(family, seed))
        return loaded[family, seed]

    return make


@pytest.fixture(scope="session")
def test_cache() -> Path:
    """A directory that survives test runs: CROSSHEAD_TEST_CACHE, else work/test-cache in the repository."""
    return Path(os.environ.get("CROSSHEAD_TEST_CACHE") or REPOSITORY / "work" / "test-cache")


@pytest.fixture(scope="session")
def smollm2_directory(test_cache: Path) -> Path:
    """The default base model in hub layout, prepared once."""
    directory = test_cache / "smollm2" / "model"
    with lock(test_cache / "smollm2.lock", "another process prepares the model"):
        if not (directory / "provenance.json").exists():
            prepare_model(ModelConfig(), directory, work=test_cache / "smollm2" / "work")
    return directory


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two threads of the tensor library, whatever the machine and the caller have chosen."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def smollm2(smollm2_directory: Path) -> LanguageModel:
    """The default base model: SmolLM2-135M-Instruct, dequantised."""
    return load_model(smollm2_directory)


@pytest.fixture(scope="session")
def random_batch() -> Callable[..., Batch]:
    """Return ``(sites, dims, n_contexts=3, n_positions=8, seed=0) -> Batch`` of random activations."""
    return make_random_batch


def make_random_batch(
    sites: Sequence[Site], dims: ModelDims, n_contexts: int = 3, n_positions: int = 8, seed: int = 0
) -> Batch:
    """Random activations of the right shapes; patterns are causal and their rows sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    heads = {"q": dims.n_heads, "k": dims.n_kv_heads, "v": dims.n_kv_heads}

    def values(site: Site) -> torch.Tensor:
        if site.name == "pattern":
            scores = torch.randn(n_contexts, dims.n_heads, n_positions, n_positions, generator=generator)
            future = torch.ones(n_positions, n_positions, dtype=torch.bool).triu(1)
            return scores.masked_fill(future, -torch.inf).softmax(-1)
        if site.name in heads:
            return torch.randn(n_contexts, heads[site.name], n_positions, dims.head_dim, generator=generator)
        return torch.randn(n_contexts, n_positions, dims.d_model, generator=generator)

    mask = torch.ones(n_contexts, n_positions, dtype=torch.bool)
    mask[:, 0] = False
    tokens = torch.randint(1, VOCABULARY, (n_contexts, n_positions), generator=generator)
    tokens[:, 0] = 0
    return Batch({site: values(site) for site in sites}, mask, tokens)
