"""From a row's columns to a dialogue: the templates of a task or of the user, compiled once, in a sandbox.

The templates come from a configuration file and the values from a dataset: neither may run code (Jinja2's sandbox), and
a value may not smuggle in a recording's placeholder.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, UndefinedError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from ultravox.audio.content import NO_AUDIO, Audio
from ultravox.data.columns import read_as
from ultravox.data.manifest import Clip
from ultravox.data.prompts import Message, user_message
from ultravox.data.tasks import TASKS, Task
from ultravox.errors import DataError
from ultravox.tokens import AUDIO_TOKEN

FIELDS = ("id", "text", "duration", "speaker", "licence", "answer", "language", "messages")
#: Reasons that rows are left out for.
INJECTED = "with a special token in its text"
UNFIT = "with values that do not fit its template"
ROLES = ("system", "user", "assistant")


class UnusableRow(DataError):
    """A row that cannot be trained on: to be left out, counted by its `reason` and named.

    Args:
        reason: one of a few, such as "without answer".
        row_id: its `Clip.id`.
        detail: what is wrong with this row, read before "in row …"; by itself the reason.
        row: its number in the source, where that is known.
    """

    def __init__(self, reason: str, row_id: str, detail: str = "", row: int | None = None) -> None:
        self.reason, self.row_id, self.detail, self.row = reason, row_id, detail, row
        where = f"row {row_id}" if row is None else f"row {row} (id {row_id})"
        super().__init__(f"{detail} in {where}" if detail else f"{where} is {reason}")

    @property
    def name(self) -> str:
        """What it is called among the rows that are left out: by its id, and by what did not fit where each differs."""
        return f"{self.row_id} ({self.detail})" if self.reason == UNFIT else self.row_id

    def __reduce__(self) -> tuple[Any, ...]:  # it may come from one of the loader's processes
        return type(self), (self.reason, self.row_id, self.detail, self.row)

    def at(self, row: int) -> "UnusableRow":
        """The same, with the row's number."""
        return UnusableRow(self.reason, self.row_id, self.detail, row)


def miscounted(clip: Clip, num_clips: int, num_placeholders: int) -> UnusableRow:
    """The error of a row that has other placeholders than recordings."""
    detail = f"{num_clips} audio clips, {num_placeholders} {AUDIO_TOKEN} placeholders"
    return UnusableRow("with other placeholders than recordings", clip.id, detail)


def columns_of(clip: Clip) -> dict[str, Any]:
    """What templates may name in a row: its fields, its further columns, its `messages`. What is empty is not there."""
    names = [*FIELDS, *(name for name in clip.columns if name not in FIELDS)]
    return {name: value for name in names if (value := _column(clip, name)) is not None}


def _column(clip: Clip, name: str) -> Any:
    """A column's value in one row; None when it is empty."""
    value = getattr(clip, name) if name in FIELDS else clip.columns.get(name)
    return None if isinstance(value, str) and not value.strip() else value


class PromptTemplate:
    """The dialogues that a source's rows become.

    Args:
        task: a name in `TASKS`.
        prompts: "first" or "all" of the task's phrasings, or Jinja templates of the user's own.
        response: Jinja template of the answer; None = the task's own.

    Raises:
        DataError: a template that Jinja cannot read, or that reaches for what the sandbox hides.
    """

    def __init__(
        self, task: str, prompts: Literal["first", "all"] | Sequence[str] = "first", response: str | None = None
    ) -> None:
        if task not in TASKS:
            raise DataError(f"no task {task!r}: expected one of {', '.join(TASKS)}")
        self.name, self.task = task, TASKS[task]
        self._arguments = (task, prompts, response)
        own = not isinstance(prompts, str) or response is not None
        if own and not self.task.prompts:
            raise DataError(f"the task {task!r} takes each row's own messages: leave out prompts and response")
        if not prompts:
            raise DataError(f"the task {task!r} is given no prompts: expected 'first', 'all' or a list of at least one")
        if isinstance(prompts, str):
            prompts = self.task.prompts[: 1 if prompts == "first" else None]
        self.takes_messages = self.task.dialogue and not own
        """Whether a row's own `messages` are its dialogue."""
        self._prompts = [_Compiled(source, self.task) for source in prompts]
        self._response = _Compiled(self.task.response if response is None else response, self.task)

    def __reduce__(self) -> tuple[Any, ...]:  # for the loader's processes: compiled templates cannot travel
        return type(self), self._arguments

    @property
    def num_prompts(self) -> int:
        """How many dialogues a row gives."""
        return len(self._prompts) or 1

    @property
    def fixed_prompts(self) -> list[int]:
        """The phrasings that are the same text in every row."""
        return [index for index, template in enumerate(self._prompts) if template.fixed is not None]

    @cached_property
    def columns_needed(self) -> frozenset[str]:
        """Columns that each row without `messages` of its own must have."""
        if not self._prompts:
            return frozenset({"messages"})
        return frozenset().union(*(template.needs for template in [*self._prompts, self._response]))

    def require_columns(self, clips: Iterable[Clip], source: str, columns: Mapping[str, str] | None = None) -> None:
        """Raise a DataError when a template names a column that no row of the source has: a typing error, mostly.

        `columns` says which columns of the source were read under which names of ours.
        """
        there = set[str]()
        for clip in clips:
            there.update(columns_of(clip))
            if self.columns_needed <= there or (self.takes_messages and "messages" in there):
                return
        if not there:
            return
        column = min(self.columns_needed - there)
        templates = [template.source for template in [*self._prompts, self._response] if column in template.needs]
        who = f"the template {templates[0]!r} of the task {self.name!r}" if templates else f"the task {self.name!r}"
        ours = read_as(column, columns or {})
        if ours is None:
            what = "name another, or say with `columns` which is meant"
        elif ours in ("audio", "offset"):
            what = f"a column {column!r} is read as {ours!r}, which is heard and which no template can write"
        else:
            what = f"a column {column!r} is read as {ours!r}, so write {{{{ {ours} }}}}"
        raise DataError(
            f"{who} needs the column {column!r}, which {source} has not: it has {', '.join(sorted(there))}; {what}"
        )

    def messages(self, clip: Clip, prompt_index: int = 0) -> list[Message]:
        """A row's dialogue with one phrasing.

        Raises:
            UnusableRow: a column is empty, nothing is to be learnt from the row, or its placeholders and recordings
                differ in number.
        """
        num_clips = len(self.recordings(clip))
        if self.task.hears and num_clips == 0 and not self.takes_messages:
            raise UnusableRow("without audio", clip.id)
        if self.takes_messages and clip.messages is not None:
            messages = _own_messages(clip)
        elif not self._prompts:
            raise UnusableRow("without messages", clip.id)
        else:
            user = self._prompts[prompt_index].render(clip)
            if not user and num_clips == 0:
                raise UnusableRow("without prompt", clip.id)
            answer = self._response.render(clip)
            if not answer:
                raise UnusableRow("without answer", clip.id)
            messages = [user_message(user, num_clips), {"role": "assistant", "content": answer}]
        placeholders = sum(message["content"].count(AUDIO_TOKEN) for message in messages)
        if placeholders != num_clips:
            raise miscounted(clip, num_clips, placeholders)
        return messages

    def recordings(self, clip: Clip) -> tuple[tuple[Audio, float], ...]:
        """What is heard in a row's dialogue, and its seconds; nothing in the task `text`."""
        if not self.task.hears or clip.audio is NO_AUDIO:
            return ()
        return ((clip.audio, clip.duration), *clip.more_audio)


def _own_messages(clip: Clip) -> list[Message]:
    """A row's own dialogue, checked: known roles, words in each of the assistant's turns, and the last one its."""
    messages: list[Message] = []
    for turn, message in enumerate(clip.messages or (), start=1):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
        if role not in ROLES or not isinstance(content, str):
            detail = f"a turn {turn} without a role ({', '.join(ROLES)}) or without a text as its content"
            raise UnusableRow("with messages of another form", clip.id, detail)
        if role == "assistant" and not content.strip():
            raise UnusableRow("without answer", clip.id)
        if role != "user" and AUDIO_TOKEN in content:
            raise UnusableRow(INJECTED, clip.id, f"{AUDIO_TOKEN} in what the {role} says")
        messages.append({"role": role, "content": content})
    if not messages or messages[-1]["role"] != "assistant":
        raise UnusableRow("without answer", clip.id, "no answer of the assistant at the end of the messages")
    return messages


# One template


class _Absent(StrictUndefined):
    """An empty column: `{% if %}` may ask for it and `default` replace it, but it cannot be written."""

    __slots__ = ()

    def __bool__(self) -> bool:  # type: ignore[override]
        return False


def truth(value: Any) -> bool:
    """A yes or no, also as a text or a number: the filter `truth` of templates. ValueError for anything else."""
    found = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}.get(str(value).lower())
    if found is None:
        raise ValueError(f"expected true or false, got {value!r}")
    return found


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(undefined=_Absent, autoescape=False)
    environment.globals.clear()  # every name is a column
    del environment.filters["random"]  # one row, one text
    environment.filters["truth"] = truth
    return environment


_ENVIRONMENT = _environment()


class _Compiled:
    """A template, the columns that it `needs`, and its text where that is `fixed`: the same for every row."""

    def __init__(self, source: str, task: Task) -> None:
        self.source = source
        self.fixed: str | None = None
        try:
            tree = _ENVIRONMENT.parse(source)
            if hidden := next(_hidden(tree), None):
                raise DataError(f"the template {source!r} may not use {hidden}: expected columns, filters, conditions")
            self._names = frozenset(meta.find_undeclared_variables(tree))
            self._template = _ENVIRONMENT.from_string(source)
            if not self._names:
                self.fixed = self._template.render().strip()
        except TemplateSyntaxError as error:
            raise DataError(f"the template {source!r} cannot be read: {error.message}") from error
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise DataError(f"the template {source!r} fails: {error}") from error
        self.needs = self._names - task.optional

    def render(self, clip: Clip) -> str:
        """The text for a row, stripped. UnusableRow when there is none, or it holds a placeholder too many."""
        if self.fixed is not None:
            return self.fixed
        values = {name: value for name in self._names if (value := _column(clip, name)) is not None}
        try:
            text = self._template.render(values).strip()
        except SecurityError as error:
            raise DataError(f"the template {self.source!r} is refused: {error}") from error
        except UndefinedError as error:
            for name in self._names - values.keys():
                if error.message == f"{name!r} is undefined":
                    raise UnusableRow(f"without {name}", clip.id) from error
            raise UnusableRow(UNFIT, clip.id, self._failure(values, error)) from error
        except Exception as error:  # whatever an expression does with a value that it was not made for
            raise UnusableRow(UNFIT, clip.id, self._failure(values, error)) from error
        if text.count(AUDIO_TOKEN) > self.source.count(AUDIO_TOKEN):
            raise UnusableRow(INJECTED, clip.id, f"{AUDIO_TOKEN} as a text")
        return text

    def _failure(self, values: Mapping[str, Any], error: Exception) -> str:
        """Which template fails, on which values of which columns, and why."""
        given = ", ".join(f"{name} = {_brief(value, 40)}" for name, value in sorted(values.items()))
        return (
            f"the template {_brief(self.source, 80)} fails with {given or 'no value'}: {' '.join(str(error).split())}"
        )


def _brief(value: Any, most: int) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _hidden(tree: nodes.Template) -> Iterator[str]:
    """What a template may not hold: private attributes, however they are reached, and other templates."""
    for node in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
        yield f"{type(node).__name__.lower()} (there are no other templates)"
    for attribute in tree.find_all(nodes.Getattr):
        if attribute.attr.startswith("_"):
            yield f"the private attribute {attribute.attr!r}"
    for constant in tree.find_all(nodes.Const):
        if isinstance(constant.value, str) and constant.value.startswith("__"):
            yield f"the private attribute {constant.value!r}"
