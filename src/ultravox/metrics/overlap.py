"""BLEU and chrF (sacrebleu: Post 2018; chrF: Popović 2015), for what is generated and has no single right wording."""

import importlib.util
from collections.abc import Sequence
from typing import Any


def sacrebleu_is_installed() -> bool:
    """Whether the extra `evaluation` is there."""
    return importlib.util.find_spec("sacrebleu") is not None


def bleu(references: Sequence[str], hypotheses: Sequence[str]) -> tuple[float, str]:
    """Corpus BLEU in [0, 100], and sacrebleu's signature, without which the number means little.

    ValueError when the two differ in number.
    """
    from sacrebleu.metrics import BLEU

    return _score(BLEU(), references, hypotheses)


def chrf(references: Sequence[str], hypotheses: Sequence[str]) -> tuple[float, str]:
    """Corpus chrF2 in [0, 100], and sacrebleu's signature. ValueError when the two differ in number."""
    from sacrebleu.metrics import CHRF

    return _score(CHRF(), references, hypotheses)


def _score(metric: Any, references: Sequence[str], hypotheses: Sequence[str]) -> tuple[float, str]:
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references, {len(hypotheses)} hypotheses: give each its own")
    if not references:
        raise ValueError("no texts to compare")
    score = metric.corpus_score(list(hypotheses), [list(references)])
    return float(score.score), str(metric.get_signature())
