"""``python -m ultravox.config.describe`` prints docs/configuration.md, which a test holds against the schema."""

from collections.abc import Iterator

from ultravox.config.walk import KeyInfo, describe_keys

INTRODUCTION = """\
# Configuration

<!-- Written by `make docs` from src/ultravox/config/schema.py; do not edit. -->

A run is one YAML file: `ultravox train configs/quickstart.yaml`.

- `extends: other.yaml`, relative to the file, names one parent. Sections are merged key by key, `stages` by the stage's
  name; any other list is replaced. `run_dir` is not inherited. `max_steps: 0` leaves an inherited stage out; it need
  not fit the data then.
- Any key can be overridden on the command line, stages and sources by name or by index:
  `ultravox train configs/quickstart.yaml --stages.tune.max_steps 10 --seed 1`. Values are read as YAML
  (`--data.speeds "[0.9, 1.0]"`).
- Unknown keys, keys given twice and values out of range are refused, all at once, each with its file and line. Of two
  that do not go together, the line of the refining file is named, or the option of the command line.
- Paths of models and datasets are relative to the working directory.
- The run's folder keeps the resolved file, `config.yaml`, and every checkpoint a copy. Of the checkpoints, the two
  newest are kept.
"""


def markdown() -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, *_sections(), ""])


def _sections() -> Iterator[str]:
    keys = describe_keys()
    groups: dict[str, list[KeyInfo]] = {"": []}
    meanings: dict[str, str] = {}
    for key in keys:
        if key.is_section:
            groups[key.path] = []
            meanings[key.path] = key.description
        else:
            groups[key.path.rpartition(".")[0]].append(key)
    for path, members in groups.items():
        if path:
            yield f"## {path}\n"
            yield f"{_sentence(meanings[path])}\n"
        else:
            yield "## Top level\n"
        if not members:
            continue
        yield "| Key | Type | Default | Meaning |"
        yield "|---|---|---|---|"
        for key in members:
            name = key.path.rpartition(".")[2]
            yield f"| `{name}` | {key.type} | {_code(key.default)} | {_sentence(key.description)} |"
        yield ""


def _code(default: str) -> str:
    return default if default == "required" else f"`{default}`"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}." if text else ""


if __name__ == "__main__":
    print(markdown(), end="")
