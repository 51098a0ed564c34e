"""What a check finds, and what all findings together say."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

FORMAT_VERSION = 1


class Status(StrEnum):
    """How a check came out."""

    PASS = "PASS"
    WARN = "WARN"
    FAIL = "FAIL"
    SKIP = "SKIP"


class Blame(StrEnum):
    """What a failed check speaks of; the first in this order is the verdict, since it may cause those after it."""

    DATA = "a data or label bug"
    ORDER = "a fault in how the data is dealt out"
    SCALE = "audio embeddings of another scale than the language model's own"
    MIXING = "examples of a batch that see each other"
    FROZEN = "a part that does not train as the configuration asks, or trains though it should not"
    ACCUMULATION = "a step that depends on how it is cut into batches"
    RATE = "a learning rate that does not fit"
    MODEL = "a fault in the model or the optimizer"
    AUDIO = "audio that is not used"
    SLOPE = "a loss that rises"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found."""

    status: Status
    evidence: str
    """What was measured, with its numbers; of SKIP, why nothing was."""
    cause: str = ""
    """The probable one, where something is wrong."""
    action: str = ""
    """What to do next."""
    numbers: dict[str, Any] = field(default_factory=dict)
    """The same for programs; JSON."""
    lines: list[str] = field(default_factory=list)
    """What a person should read, such as a batch."""


def passed(evidence: str, lines: Sequence[str] = (), **numbers: Any) -> Finding:
    """All is well."""
    return Finding(Status.PASS, evidence, numbers=numbers, lines=list(lines))


def warned(evidence: str, cause: str, action: str, lines: Sequence[str] = (), **numbers: Any) -> Finding:
    """Unusual, and no proof of a fault."""
    return Finding(Status.WARN, evidence, cause, action, numbers, list(lines))


def failed(evidence: str, cause: str, action: str, lines: Sequence[str] = (), **numbers: Any) -> Finding:
    """A fault."""
    return Finding(Status.FAIL, evidence, cause, action, numbers, list(lines))


def skipped(reason: str) -> Finding:
    """Nothing could be measured."""
    return Finding(Status.SKIP, reason)


@dataclass(frozen=True, slots=True)
class Check:
    """One question. `run` gets a `Workbench`."""

    number: int
    name: str
    criterion: str
    blame: Blame
    run: Callable[[Any], Finding]
    needs: Callable[[Any], str] = lambda bench: ""
    """Why it cannot be asked of this run; empty = it can."""


@dataclass(frozen=True, slots=True)
class Result:
    """A check with what it found and what that took."""

    check: Check
    finding: Finding
    seconds: float

    @property
    def status(self) -> Status:
        return self.finding.status

    def to_json(self) -> dict[str, Any]:
        return {
            "check": self.check.number,
            "name": self.check.name,
            "criterion": self.check.criterion,
            **asdict(self.finding),
            "seconds": round(self.seconds, 2),
        }


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All results of one configuration."""

    config: str
    stage: str
    """The stage that was looked at."""
    checkpoint: str | None
    results: list[Result]
    seconds: float
    """All in all, with the building of the model and the data."""

    @property
    def healthy(self) -> bool:
        """Whether no check failed."""
        return not self.failed

    @property
    def failed(self) -> list[Result]:
        return [result for result in self.results if result.status == Status.FAIL]

    @property
    def counts(self) -> dict[str, int]:
        """How many checks came out how."""
        return {status: sum(result.status == status for result in self.results) for status in Status}

    @property
    def verdict(self) -> str:
        """One or two sentences."""
        if self.failed:
            order = list(Blame)
            first = min(self.failed, key=lambda result: (order.index(result.check.blame), result.check.number))
            same = [result for result in self.failed if result.check.blame == first.check.blame]
            others = [result for result in self.failed if result not in same]
            text = f"It is real: {first.check.blame} ({_named(same)})."
            if others:
                text += f" Mend that first: it may be why {_named(others)} failed too."
            return text
        status = {result.check.number: result.status for result in self.results}
        if status.get(11) == Status.PASS and status.get(12) == Status.WARN:
            return (
                "Not a bug: held-out loss shows that the audio is used, and the loss has come to a halt. What is "
                "missing is capacity, learning rate or data."
            )
        if status.get(11) == Status.PASS and status.get(12) == Status.PASS:
            return "No fault found: the audio is used, and the loss still falls. Train on."
        unasked = [result for result in self.results if result.status == Status.SKIP]
        text = f"No fault found in {len(self.results) - len(unasked)} checks."
        if len(unasked) == len(self.results):
            text = "Nothing was looked at: none of these checks could be asked."
        if {11, 12} & {result.check.number for result in unasked} and self.checkpoint is None:
            text += " Whether unseen audio is used, only trained weights can tell: --checkpoint RUN."
        return text

    def to_json(self) -> dict[str, Any]:
        return {
            "version": FORMAT_VERSION,
            "config": self.config,
            "stage": self.stage,
            "checkpoint": self.checkpoint,
            "healthy": self.healthy,
            "verdict": self.verdict,
            "counts": self.counts,
            "seconds": round(self.seconds, 1),
            "checks": [result.to_json() for result in self.results],
        }


def _named(results: Sequence[Result]) -> str:
    word = "check" if len(results) == 1 else "checks"
    return f"{word} {', '.join(f'{result.check.number} {result.check.name}' for result in results)}"
