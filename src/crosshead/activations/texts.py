"""A user's own texts as a batch of activations."""

from collections.abc import Sequence

import torch

from crosshead.activations.base_model import LanguageModel
from crosshead.activations.capture import capture
from crosshead.dictionaries.base import Batch, Site

__all__ = ["read_texts"]


def read_texts(
    model: LanguageModel, texts: Sequence[str], sites: Sequence[Site], *, context_length: int | None = None
) -> Batch:
    """Run the model on texts and return the sites as a batch, one context per text.

    Every context begins with the beginning-of-text token; longer texts are cut at ``context_length`` tokens (by default
    the longest text, or the model's limit), shorter ones are padded on the right. The mask leaves out both that token
    and the padding, which causality keeps from touching anything before it. ValueError for no text or an empty one.
    """
    if not texts:
        raise ValueError("no texts given; pass at least one")
    limits = [length for length in (context_length, model.context_limit) if length is not None]
    limit = min(limits, default=None)
    rows: list[list[int]] = []
    for i, text in enumerate(texts):
        ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError(f"text {i} ({text!r}) has no tokens; leave it out")
        rows.append([model.bos_id, *ids][:limit])
    length = max(map(len, rows))
    tokens = torch.full((len(rows), length), model.bos_id)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
        mask[i, 1 : len(row)] = True
    captured = capture(model, tokens, sites)
    device = model.device
    return Batch({site: tensor.float() for site, tensor in captured.items()}, mask.to(device), tokens.to(device))
