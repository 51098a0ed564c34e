"""What a run configuration may say about data: sources, tasks, filters, mixture, augmentation, loading."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ultravox.config.section import Name, Section, Share, Speed, misfit

SourceFormat = Literal["auto", "manifest", "audio_folder", "dataset", "prepared", "huggingface", "lhotse"]
TaskName = Literal[
    "transcription",
    "translation",
    "continuation",
    "answer",
    "question_answering",
    "endpointing",
    "conversation",
    "text",
]
Codec = Literal["mulaw", "telephone", "opus", "mp3"]


class FilterConfig(Section):
    """Which rows of a source are used; the others are counted, and named in train.json."""

    min_seconds: float | None = Field(None, ge=0, description="shorter clips are left out; null = data's limit alone")
    max_seconds: float | None = Field(None, gt=0, description="longer clips are left out; null = data's limit alone")
    min_characters_per_second: float | None = Field(None, ge=0, description="slower speech is left out")
    max_characters_per_second: float | None = Field(None, gt=0, description="faster speech is left out")
    languages: list[Name] | None = Field(
        None, min_length=1, description="languages to use, as the rows name them; null = all"
    )

    @model_validator(mode="after")
    def _check(self) -> "FilterConfig":
        for unit in ("seconds", "characters_per_second"):
            least, most = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if least is not None and most is not None and least > most:
                message = f"min_{unit} = {least:g} is more than max_{unit} = {most:g}, so no clip is left"
                raise misfit(message, f"min_{unit}", f"max_{unit}")
        return self


class SourceConfig(Section):
    """One dataset that training draws from."""

    name: Name = Field(
        description="a bundled dataset, a folder, a .jsonl file, or the id of a Hugging Face dataset; several sources "
        "may have one name"
    )
    format: SourceFormat = Field("auto", description="what kind of source it is; auto = by what is there")
    split: Name = Field("train", description="split of that dataset; a single file is one, so leave it out there")
    subset: Name | None = Field(None, description="configuration of a Hugging Face dataset, such as a language")
    revision: Name | None = Field(None, description="commit, tag or branch of a dataset on the hub")
    streaming: bool = Field(
        False,
        description="read a Hugging Face dataset, or a folder that `ultravox data prepare` wrote, shard by shard and "
        "never all of it; all sources of a run do, or none",
    )
    columns: dict[Name, Name] = Field(
        default_factory=dict,
        description="our column (id, audio, text, duration, speaker, licence, language, answer, or one that a prompt "
        "names) → the source's column",
    )
    filters: FilterConfig = Field(default_factory=FilterConfig, description="which rows are used")
    task: TaskName = Field(
        "transcription",
        description="what the model learns to write: the transcript, its translation, a continuation or answer, the "
        "answer to a written question, whether the speaker has finished, what the assistant says in a row's own "
        "messages, or (without audio) a text",
    )
    prompts: Literal["first", "all"] | Annotated[list[Name], Field(min_length=1)] = Field(
        "first",
        description="the user's words: the task's first phrasing, all of its phrasings in turn, or Jinja templates of "
        "your own over the row's columns",
    )
    response: Name | None = Field(None, description="Jinja template of the answer; null = the task's own")
    repeat: float | None = Field(
        None, gt=0, le=1000, description="how often each clip comes in one epoch; 0.5 = every other time; null = once"
    )
    weight: float | None = Field(
        None,
        gt=0,
        description="share of this source among the examples of an epoch, of a stream among all; all sources have one, "
        "or none",
    )
    max_clips: int | None = Field(None, ge=1, description="use the first so many clips only; null = all")
    max_hours: float | None = Field(None, gt=0, description="use so many hours from the beginning; null = all")
    speeds: list[Speed] | None = Field(None, min_length=1, description="instead of data.speeds, for this dataset")


class LoaderConfig(Section):
    """How batches get to the step. Changes no result."""

    workers: int = Field(
        0, ge=0, le=256, description="processes that make batches; 0 = a thread beside the step, enough for features"
    )
    prefetch: int = Field(2, ge=1, le=64, description="batches made ahead, by each worker")
    pin_memory: bool = Field(
        True, description="with a CUDA GPU: into memory that the GPU reads by itself, while it computes"
    )


class DataConfig(Section):
    """What the stages train on."""

    sources: list[SourceConfig] = Field(
        default_factory=lambda: [SourceConfig(name="asterisk-en")], min_length=1, description="datasets to mix"
    )
    temperature: float | None = Field(
        None,
        gt=0,
        description="weights of the sources = their sizes ** (1 / temperature): 1 = as they are, more = more even; "
        "null = by repeat and weight",
    )
    speeds: list[Speed] = Field(
        [1.0], min_length=1, description="playing speeds; each is one more cached version of every clip"
    )
    transcript_style: Literal["written", "spoken"] = Field(
        "written",
        description='what the model learns to write: the text as it stands, or "spoken" = words alone, in lower case',
    )
    min_audio_seconds: float = Field(0.1, ge=0, description="shorter clips are left out")
    max_audio_seconds: float = Field(30.0, gt=0, le=600, description="longer clips are left out")
    max_quarantine_share: Share = Field(
        0.01, description="training stops when more than this share of the clips cannot be read"
    )
    cache: Literal["auto", "none"] = Field(
        "auto",
        description="auto = keep features on disk (a frozen encoder's frames, else what the encoder eats), unless a "
        "stage augments waveforms; none = decode in every epoch",
    )
    feature_dtype: Literal["float16", "float32"] = Field(
        "float16", description="number type of a frozen encoder's features on disk"
    )
    max_cache_gb: float | None = Field(
        None, gt=0, description="the least recently used features go when the cache grows beyond this; null = no limit"
    )
    stream_window: int = Field(
        2048, ge=1, description="clips of the streaming sources that are in memory, mixed and planned together"
    )
    loader: LoaderConfig = Field(default_factory=LoaderConfig, description="how batches get to the step")

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if self.min_audio_seconds >= self.max_audio_seconds:
            message = (
                f"min_audio_seconds ({self.min_audio_seconds:g}) must be less than max_audio_seconds "
                f"({self.max_audio_seconds:g}); lower the one or raise the other"
            )
            raise misfit(message, "min_audio_seconds", "max_audio_seconds")
        if len(set(self.speeds)) != len(self.speeds):
            raise misfit(f"speeds holds one speed twice: {self.speeds}; keep one", "speeds")
        keys = [(source.name, source.subset, source.split, source.task) for source in self.sources]
        for key in keys:
            if keys.count(key) > 1:
                both = [f"sources.{index}" for index, other in enumerate(keys) if other == key]
                message = f"sources holds {key[0]!r} (split {key[2]}, task {key[3]}) twice; use repeat instead"
                raise misfit(message, *both[1:])
        weighted = [source.name for source in self.sources if source.weight is not None]
        if weighted and len(weighted) < len(self.sources):
            index, other = next((i, s.name) for i, s in enumerate(self.sources) if s.weight is None)
            message = f"{weighted[0]!r} has a weight and {other!r} has none: give all sources one, or none"
            raise misfit(message, f"sources.{index}")
        for index, source in enumerate(self.sources):
            if source.repeat is not None and (source.weight is not None or self.temperature is not None):
                message = f"source {source.name!r} has repeat beside weights or a temperature; choose one way"
                raise misfit(message, f"sources.{index}.repeat", "temperature")
        if weighted and self.temperature is not None:
            raise misfit("sources have weights and data has a temperature; choose one way", "temperature", "sources")
        self._check_streams()
        return self

    def _check_streams(self) -> None:
        """All sources are streams, or none; and a stream is asked for nothing that takes a total."""
        streams = [source for source in self.sources if source.streaming]
        if streams and len(streams) < len(self.sources):
            index, other = next((i, s.name) for i, s in enumerate(self.sources) if not s.streaming)
            raise misfit(
                f"{streams[0].name!r} is streamed and {other!r} is not: set streaming: true on all sources (a "
                "folder of `ultravox data prepare` can be streamed too), or on none",
                f"sources.{index}",
            )
        if streams and self.temperature is not None:
            message = "temperature weighs sources by their sizes, and a stream has none: give sources weights"
            raise misfit(message, "temperature")
        for index, source in enumerate(self.sources if streams else []):
            for name in ("repeat", "max_clips", "max_hours"):
                if getattr(source, name) is not None:
                    instead = "; give sources weights" if name == "repeat" and len(streams) > 1 else ""
                    message = f"{source.name!r} is streamed, each clip once in an epoch: leave out {name}{instead}"
                    raise misfit(message, f"sources.{index}.{name}")

    @property
    def streaming(self) -> bool:
        """Whether the clips come from streams, never to be seen as a whole."""
        return any(source.streaming for source in self.sources)


class WaveformAugmentConfig(Section):
    """Changes to the sound itself, drawn anew for each clip in each epoch. They need decoding in every epoch."""

    gain_db: float = Field(0.0, ge=0, le=40, description="louder or softer by up to so many decibels")
    speed: float = Field(0.0, ge=0, le=0.5, description="faster or slower by up to this share, pitch and all")
    noise_share: Share = Field(0.0, description="share of the clips that get noise")
    noise_snr_db: tuple[float, float] = Field((5.0, 25.0), description="least and most signal-to-noise ratio")
    noise_folder: Name | None = Field(None, description="folder of recordings of noise; null = coloured noise is made")
    reverb_share: Share = Field(0.0, description="share of the clips that are played in a room")
    reverb_seconds: tuple[float, float] = Field((0.1, 0.8), description="least and most time to fall by 60 dB")
    codec_share: Share = Field(0.0, description="share of the clips that go through a codec and back")
    codecs: list[Codec] = Field(["mulaw", "telephone", "opus", "mp3"], min_length=1, description="the codecs, evenly")

    @model_validator(mode="after")
    def _check(self) -> "WaveformAugmentConfig":
        for name in ("noise_snr_db", "reverb_seconds"):
            low, high = getattr(self, name)
            if low > high:
                raise misfit(f"{name} must be [least, most], got [{low:g}, {high:g}]; swap them", name)
        if self.reverb_seconds[0] <= 0:
            message = f"reverb_seconds must be above 0, got {self.reverb_seconds[0]:g}; raise the least"
            raise misfit(message, "reverb_seconds")
        return self

    @property
    def active(self) -> bool:
        """Whether anything is changed at all."""
        return bool(self.gain_db or self.speed or self.noise_share or self.reverb_share or self.codec_share)


class AugmentConfig(Section):
    """Changes to the encoder frames, drawn anew in every epoch; they work on cached features too."""

    time_masks: int = Field(0, ge=0, le=100, description="stretches of time set to zero, per clip")
    max_time_mask_seconds: float = Field(0.2, ge=0, le=30, description="longest such stretch")
    channel_masks: int = Field(0, ge=0, le=100, description="bands of feature channels set to zero, per clip")
    max_channel_mask_share: Share = Field(0.1, description="widest such band, as a share of the channels")
    noise_std: float = Field(
        0.0, ge=0, le=10, description="Gaussian noise, in standard deviations of the clip's features"
    )
    waveform: WaveformAugmentConfig = Field(
        default_factory=WaveformAugmentConfig, description="changes to the sound itself"
    )
