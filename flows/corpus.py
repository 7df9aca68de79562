"""Cut the texts into contexts of tokens."""

from crosshead.activations.base_model import load_tokenizer
from crosshead.activations.corpus import CorpusConfig, build_corpus
from flows._runtime import Stage, main


def corpus(stage: Stage) -> None:
    """Build the corpus."""
    config = stage.section("corpus", CorpusConfig)
    tokenizer = load_tokenizer(stage.data / "model")
    with stage.work(stage.identity(("corpus",), ())) as work:
        build_corpus(config, tokenizer, stage.data / "corpus", work=work)


if __name__ == "__main__":
    main(corpus)
