"""docs/clusters.md: what it says of the files, and each of its commands that can be run here."""

import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from ultravox.cli import main as cli
from ultravox.clusters import azureml_client
from ultravox.config.load import load_config

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "clusters.md").read_text()


def commands() -> list[list[str]]:
    """Each command of the shell blocks, in order."""
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines]


def test_the_first_run_is_there_in_order():
    lines = [" ".join(words) for words in commands()]
    wanted = [
        "az extension add --name ml",
        "az login",
        "az account set --subscription SUBSCRIPTION",
        "az configure --defaults workspace=WORKSPACE group=RESOURCE_GROUP",
        "az ml job create -f ./azureml/configs/audiollm.yml --web",
        ".venv/bin/ultravox azureml submit azureml/job.yml",
    ]
    assert [line for line in lines if line in wanted] == wanted


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\b(?:azureml|launch|configs)/[\w./-]*\w", PAGE))))
def test_every_file_it_names_exists(name):
    assert (ROOT / name).exists() or name in ("azureml/job.yml", "azureml/spot.yml")


def test_the_table_has_every_job():
    listed = set(re.findall(r"^\| `([\w-]+\.yml)` \|", PAGE, flags=re.MULTILINE))
    assert listed == {path.name for path in (ROOT / "azureml" / "configs").glob("*.yml")}


def test_what_its_jobs_read_is_what_it_uploads():
    created = {words[words.index("--name") + 1] for words in commands() if words[:4] == ["az", "ml", "data", "create"]}
    jobs = "".join(path.read_text() for path in (ROOT / "azureml" / "configs").glob("*.yml"))
    assert created == set(re.findall(r"path: azureml:([\w-]+)@latest", jobs))
    clusters = {words[words.index("--name") + 1] for words in commands() if words[2:4] == ["compute", "create"]}
    assert clusters == set(re.findall(r"compute: azureml:([\w-]+)", jobs))


def test_the_azureml_commands_run(tmp_path, monkeypatch, capsys, azure_sdk):
    """In a checkout, with a workspace that takes everything."""
    for entry in ROOT.iterdir():
        if entry.name not in ("azureml", "runs"):
            (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "azureml").mkdir()
    for name in ("configs", "env"):
        (tmp_path / "azureml" / name).mkdir()
        for file in (ROOT / "azureml" / name).iterdir():
            (tmp_path / "azureml" / name / file.name).write_bytes(file.read_bytes())
    for name in ("configs", "src"):  # a config must be inside the folder that goes with the job
        (tmp_path / name).unlink()
        subprocess.run(["cp", "-r", ROOT / name, tmp_path / name], check=True)
    sent = []
    jobs = SimpleNamespace(create_or_update=lambda job: sent.append(job) or SimpleNamespace(name="n", studio_url="u"))
    monkeypatch.setattr(azureml_client, "connect", lambda workspace: SimpleNamespace(jobs=jobs))
    monkeypatch.chdir(tmp_path)
    ours = [words[1:] for words in commands() if words[:2] == [".venv/bin/ultravox", "azureml"]]
    assert len(ours) == 4
    for words in ours:
        assert cli.main(words) == 0, capsys.readouterr().err
    (job,) = sent
    assert (job.resources.instance_count, job.experiment_name) == (4, "calls")


def test_the_configs_of_the_other_launchers_load_with_their_words():
    trained = 0
    for words in commands():
        if any(word.startswith("launch/") and not word.endswith(".yaml") for word in words):
            at = words.index("configs/audiollm.yaml")
            rest = [word for word in words[at + 1 :] if word not in ("--num-workers", "16")]
            load_config(ROOT / words[at], rest)
            trained += 1
    assert trained == 3


def test_the_other_commands_of_ours_are_commands():
    found = [words[1:] for words in commands() if words[0] == ".venv/bin/ultravox"]
    assert found
    for words in found:
        parser, module = cli.build_parser(".".join(words[:2]) if words[0] in cli.ACTIONS else words[0])
        _, unknown = parser.parse_known_args(words[2 if words[0] in cli.ACTIONS else 1 :])
        assert not unknown or getattr(module, "TAKES_OVERRIDES", False), words
