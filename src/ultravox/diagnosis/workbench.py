"""What the checks work on: the model and data of a run, built as `ultravox train` builds them, and a few rows of it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ultravox.config.data import AugmentConfig
from ultravox.config.objectives import TuneOptions
from ultravox.config.schema import RunConfig, StageConfig
from ultravox.diagnosis.practice import Practice, remove_dropout
from ultravox.errors import CheckpointError, UltravoxError
from ultravox.model.factory import build_model, build_processor
from ultravox.model.performance import run_efficiently
from ultravox.training import checkpoint as checkpoints
from ultravox.training.align import AlignTask
from ultravox.training.batches import SpeechBatch
from ultravox.training.examples import Example, count_tokens, ctc_tokens
from ultravox.training.identity import base_models
from ultravox.training.init_from import begin_from
from ultravox.training.resume import compare
from ultravox.training.seeding import seed_everything
from ultravox.training.speech import SpeechData, prepare_speech
from ultravox.training.speech_task import SpeechTask
from ultravox.training.stage import TASKS
from ultravox.training.stream import prepare_stream
from ultravox.training.teacher import Teacher
from ultravox.training.tune import TuneTask

#: Examples that rows are chosen from.
POOL = 256
#: Rows that are learnt by heart, and rows whose gradients are compared.
FEW, SEVERAL = 4, 8
#: Rows of each source whose text and audio are read.
READ_OF_SOURCE = 6
#: An aligned start, where the run has one: so many steps at most on the few rows, down to this loss a token.
ALIGN_STEPS, ALIGNED = 60, 0.5


@dataclass
class Workbench:
    """The parts of a run, and where its weights began."""

    config: RunConfig
    model: Any
    processor: Any
    data: SpeechData
    stage: StageConfig
    """The stage that is looked at, without augmentation, and with the cross-entropy alone."""
    task: SpeechTask
    checkpoint: Path | None
    """The run folder whose weights are looked at; None = fresh ones."""
    start: dict[str, Tensor]
    """What trains, as it was at the beginning."""

    @property
    def tune(self) -> TuneTask:
        """The task of a tune stage. Only for checks that need one."""
        assert isinstance(self.task, TuneTask)
        return self.task

    def reset(self) -> None:
        """Put back the weights of the beginning."""
        self.task.parameter_groups()
        self.task.load_trainable_state(self.start)
        self.task.train_mode()
        for parameter in self.task.trainable.values():
            parameter.grad = None

    @cached_property
    def pool(self) -> list[Example]:
        """Some examples with their tokens, of all sources; those with one recording of one window and a text first."""
        if self.data.stream is not None:
            found = [example for tried in self.data.stream.tried for example in tried]
        else:
            numbers = np.random.default_rng(self.config.seed).permutation(len(self.task.examples))[:POOL]
            found = [self.task.examples[int(number)] for number in np.sort(numbers)]
        return [example for example in found if example.versions]

    @cached_property
    def several(self) -> list[Example]:
        """Rows of one recording of one window each, no two of which are to say the same, rather short; 8 at most."""
        chosen: list[Example] = []
        texts: set[tuple[int, ...]] = set()
        for example in sorted(self.pool, key=_length):
            if not _is_plain(example):
                continue
            ids, supervised = example.prompts[0]
            said = tuple(ids[supervised].tolist())
            if said not in texts and len(said) <= len(example.transcript) + 8:  # what a look at progress decodes
                chosen.append(example)
                texts.add(said)
        # a single word tells little of a loss, a long answer takes long
        middle = chosen[len(chosen) // 5 : len(chosen) * 3 // 5] if len(chosen) >= 4 * SEVERAL else chosen
        return middle[:: max(1, len(middle) // SEVERAL)][:SEVERAL]

    @property
    def few(self) -> list[Example]:
        return self.several[:FEW]

    @cached_property
    def read(self) -> list[Example]:
        """A few rows of each source."""
        found: list[Example] = []
        for source in sorted({example.source for example in self.pool}):
            found += [example for example in self.pool if example.source == source][:READ_OF_SOURCE]
        return found

    @cached_property
    def forward_error(self) -> Exception | None:
        """What stands in the way of a loss and its gradient on the few rows."""
        self.reset()
        try:
            output = self.task.loss(self.task.first_versions(self.few))
            if output.sum.requires_grad:
                output.sum.backward()
        except Exception as error:  # a planted or real bug may raise anything; check 3 tells it
            return error
        finally:
            self.reset()
        return None

    def begin(self) -> SpeechBatch:
        """The few rows as a batch, with the weights that the stage would find: aligned on them, if the run aligns."""
        self.reset()
        batch = self.task.first_versions(self.few)
        if self.align is not None and self.checkpoint is None:
            sources = set(self.align.examples.sources.tolist()) if self.data.stream is None else None
            rows = [row for row in self.few if (sources is None or row.source in sources) and fits_ctc(self, row)]
            if rows:
                practice = Practice.of(self.align, [self.align.first_versions(rows)])
                while practice.state.step < ALIGN_STEPS and practice.train(10).loss > ALIGNED:
                    pass
        self.task.parameter_groups()
        self.task.train_mode()
        for parameter in self.task.trainable.values():
            parameter.grad = None
        return batch

    @cached_property
    def teacher(self) -> Teacher | None:
        """The stage's own, if it distils."""
        stage = next(stage for stage in self.config.stages if stage.name == self.stage.name)
        if not stage.tune.distillation.weight:
            return None
        task = _make_task(self.config, self.model, self.processor, self.data, stage)
        assert isinstance(task, TuneTask)
        return task.teacher

    @cached_property
    def align(self) -> AlignTask | None:
        """The run's alignment before the stage, if it has one and some of the few rows can be aligned."""
        before = self.config.stages[: [stage.name for stage in self.config.stages].index(self.stage.name)]
        for stage in before:
            if stage.objective == "align" and isinstance(self.task, TuneTask):
                task = _make_task(self.config, self.model, self.processor, self.data, plain_stage(stage))
                assert isinstance(task, AlignTask)
                return task
        return None


def build_workbench(
    config: RunConfig, checkpoint: Path | None = None, on_progress: Callable[[str], None] = lambda text: None
) -> Workbench:
    """As `run_training` builds a run, up to its first step, and nothing in its folder.

    Raises:
        CheckpointError: a checkpoint that is none, or of another model.
        UltravoxError: whatever in the configuration or the data does not fit.
    """
    stage = next((stage for stage in reversed(config.stages) if stage.objective == "tune"), config.stages[0])
    saved = None if checkpoint is None else _newest(checkpoint, config, stage)
    on_progress("building the model")
    seed_everything(config.seed, "model")
    processor = build_processor(config.model)
    model = build_model(config.model)
    run_efficiently(model, attention=config.performance.attention)
    if config.init_from is not None and saved is None:
        begin_from(config.init_from, Path(config.run_dir), model, config.model, base_models(config))
    on_progress("preparing the data")
    prepare = prepare_stream if config.data.streaming else prepare_speech
    data = prepare(config, model, processor)
    plain = plain_stage(stage)
    seed_everything(config.seed, stage.name)
    task = _make_task(config, model, processor, data, plain)
    remove_dropout(model)
    if saved is not None:
        own = task.trainable_state()  # heads of objectives that are left out here are in the checkpoint alone
        state = saved.trainable
        task.load_trainable_state({n: v for n, v in state.items() if n in own or not n.startswith("objective.")})
    task.parameter_groups()
    start = {name: tensor.detach().clone() for name, tensor in task.trainable_state().items()}
    return Workbench(config, model, processor, data, plain, task, checkpoint, start)


def plain_stage(stage: StageConfig) -> StageConfig:
    """The same stage with its examples as they are, and with nothing learnt but their next tokens.

    What a teacher says, or what is learnt at audio positions, would be no test of whether rows can be learnt by heart.
    """
    tune = TuneOptions(loss_mask=stage.tune.loss_mask, boundary_share=stage.tune.boundary_share)
    return stage.model_copy(update={"augment": AugmentConfig(), "tune": tune})


def _make_task(config: RunConfig, model: Any, processor: Any, data: SpeechData, stage: StageConfig) -> SpeechTask:
    return TASKS[stage.objective](model, processor, data, stage, config.seed)


def _newest(run: Path, config: RunConfig, stage: StageConfig) -> checkpoints.Checkpoint:
    """A run's newest checkpoint of the stage, if its model is this configuration's."""
    if not run.is_dir():
        raise CheckpointError(f"{run} is no run folder: expected one that `ultravox train` wrote")
    found = checkpoints.list_checkpoints(run, [stage.name])
    if not found:
        raise CheckpointError(
            f"{run} holds no checkpoint of the stage {stage.name!r}: expected the folder of a run of this "
            "configuration, which keeps its newest checkpoints"
        )
    checkpoint = checkpoints.load_checkpoint(found[-1])
    mine = {"model": config.model.model_dump(mode="json")}
    for _, text in compare({"model": checkpoint.state["config"]["model"]}, mine):
        raise CheckpointError(f"{run} is no run of this configuration: {text}; name the file that it was trained with")
    return checkpoint


def _is_plain(example: Example) -> bool:
    """One recording of one window, and a text."""
    return [len(windows) for windows in example.versions[0].frames] == [1] and len(example.transcript) > 0


def fits_ctc(bench: Workbench, example: Example) -> bool:
    """Whether CTC has room for its transcript."""
    return ctc_tokens(example.transcript) <= count_tokens(example.versions[0], bench.model.config.stack_factor)


def _length(example: Example) -> tuple[float, str]:
    """Positions, roughly; the id decides between equals."""
    return len(example.prompts[0][0]) + 10 * example.versions[0].seconds, example.id


def describe_error(error: BaseException) -> str:
    """In one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UltravoxError) else f"{type(error).__name__}: {text}"


def needs_tuning(bench: Workbench) -> str:
    """Why a check that goes through the language model cannot be asked."""
    return "" if isinstance(bench.task, TuneTask) else "the configuration has no stage with objective tune"


def needs_rows(bench: Workbench, count: int = 2) -> str:
    """Why a check that compares rows cannot be asked."""
    if len(bench.several) < count:
        return f"it wants {count} rows of one recording up to 30 s with different texts, and found {len(bench.several)}"
    error = bench.forward_error
    return "" if error is None else f"there is no loss to look at ({describe_error(error)}): see checks 2 and 3"


def needs_tuned_rows(bench: Workbench) -> str:
    """Both."""
    return needs_tuning(bench) or needs_rows(bench)


def model_tolerance(model: Any, single: float, half: float) -> float:
    """A tolerance in float32, and the one for weights of 16 bits."""
    return single if model.dtype == torch.float32 else half
