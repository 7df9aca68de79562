"""From measured numbers to verdicts, one row per claim of the source (Jermyn et al., Progress on Attention, 2025).

The rules stand in ``rules`` and beside each claim under ``claims``; docs/verdicts.md has them in one place. They were
written before the numbers they judge.
"""

from typing import Any

from crosshead.analysis.claims import (
    attention_output,
    clusters,
    coupling,
    heads,
    interpretability,
    layers,
    planted,
    qk,
    replacement,
    superposition,
)
from crosshead.analysis.rules import Finding, Record

__all__ = ["judge"]


def judge(metrics: Record, config: Any) -> list[Finding]:
    """Findings in the order of the report, from the content of metrics.json. Claims without their runs are left out."""
    topics = (
        superposition,
        heads,
        interpretability,
        coupling,
        layers,
        clusters,
        attention_output,
        qk,
        replacement,
        planted,
    )
    found = (finding for topic in topics for finding in topic.findings(metrics, config))
    return [finding for finding in found if finding is not None]
