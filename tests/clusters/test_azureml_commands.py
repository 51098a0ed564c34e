"""`ultravox azureml render` and `submit`, with a workspace that keeps what it is sent."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from ultravox.cli import main as cli
from ultravox.clusters import azureml_client
from ultravox.clusters.azureml_client import Workspace
from ultravox.clusters.azureml_job import JobOptions, fill, moved, read_job, write_job

ROOT = Path(__file__).parents[2]
TEMPLATES = ROOT / "azureml" / "configs"
SMOKE = str(TEMPLATES / "smoke.yml")
PUBLIC_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI ann@example.com\n"


@pytest.fixture
def in_root(monkeypatch):
    """In the repository, as the documents say."""
    monkeypatch.chdir(ROOT)


@pytest.fixture
def render(in_root, tmp_path, capsys, azure_sdk):
    """`render(*words)` → the written job, after its success."""

    def call(*words: str, config: str = "configs/audiollm.yaml") -> dict:
        output = tmp_path / "job.yml"
        code = cli.main(["azureml", "render", config, "--output", str(output), *words])
        printed = capsys.readouterr()
        assert (code, printed.err) == (0, "")
        assert printed.out.startswith(f"job    {output}, checked by ultravox and azure-ai-ml\n")
        assert list(tmp_path.iterdir()) == [output]
        return yaml.safe_load(output.read_text())

    return call


@pytest.mark.parametrize("template", sorted(TEMPLATES.glob("*.yml")), ids=lambda path: path.name)
def test_a_template_comes_back_as_it_was(template, tmp_path):
    """Filled in with its own config and no options, then read again: only name, description and line breaks differ."""
    job = read_job(template)
    config = "quickstart" if template.stem == "smoke" else "audiollm"
    filled = fill(job, template.parent, ROOT / "configs" / f"{config}.yaml", JobOptions())
    write_job(moved(filled, template.parent, tmp_path), tmp_path / "job.yml")
    again = moved(read_job(tmp_path / "job.yml"), tmp_path, template.parent)
    changed = {key for key in job.keys() | again.keys() if job.get(key) != again.get(key)}
    assert changed <= {"command", "display_name", "description"}
    if template.stem == "audiollm":
        assert again["command"] == job["command"], "its run is named after its config"


def test_a_config_of_ones_own(render):
    job = render("--seed", "7", "--stages.tune.max_steps", "400")
    assert 'train configs/audiollm.yaml --seed 7 --stages.tune.max_steps 400 --run_dir "$run" $resume' in job["command"]
    job = render("--template", SMOKE, config="configs/encoders/sew.yaml")
    assert 'train configs/encoders/sew.yaml --run_dir "$run" $resume' in job["command"]
    assert 'run="${{outputs.runs}}/sew"' in job["command"]
    assert job["display_name"] == "sew"


def test_options_of_a_cluster(render, tmp_path):
    key = tmp_path.parent / f"{tmp_path.name}.pub"
    key.write_text(PUBLIC_KEY)
    words = "--compute big --nodes 4 --gpus-per-node 4 --experiment trial --timeout 600 --ssh-public-key".split()
    words += [str(key), "--input", "data=azureml:calls:3", "--input", f"home={ROOT / 'examples'}"]
    job = render(*words, "--environment", "azureml:ultravox:2", "--key-vault-url", "https://example.com")
    assert job["compute"] == "azureml:big"
    assert job["resources"] == {"instance_count": 4, "shm_size": "64g"}
    assert job["distribution"] == {"type": "pytorch", "process_count_per_instance": 4}
    assert (job["experiment_name"], job["limits"]) == ("trial", {"timeout": 600})
    assert job["services"]["shell"] == {"type": "ssh", "ssh_public_keys": PUBLIC_KEY.strip(), "nodes": "all"}
    assert job["environment"] == "azureml:ultravox:2"
    assert job["environment_variables"]["AZURE_KEY_VAULT_URL"] == "https://example.com"
    assert [job["inputs"][name]["path"] for name in ("data", "home")] == ["azureml:calls:3", str(ROOT / "examples")]


def test_options_without_a_cluster(render):
    words = "--instance-type Standard_NC96ads_A100_v4 --tier spot --nodes 1 --gpus-per-node 4".split()
    job = render(*words)
    assert "compute" not in job
    assert job["queue_settings"] == {"job_tier": "spot"}
    assert job["resources"] == {
        "instance_count": 1,
        "shm_size": "64g",
        "instance_type": "Standard_NC96ads_A100_v4",
    }
    cluster = render("--template", str(TEMPLATES / "audiollm-spot.yml"), "--compute", "azureml:c")
    assert cluster["compute"] == "azureml:c"
    assert "queue_settings" not in cluster
    assert "instance_type" not in cluster["resources"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["configs/none.yaml"], "configs/none.yaml: no such config file"),
        (["configs/audiollm.yaml", "--sed", "3"], "did you mean"),
        (["configs/audiollm.yaml", "--template", "none.yml"], "none.yml: no such job file"),
        (["configs/audiollm.yaml", "--template", "pyproject.toml"], "pyproject.toml"),
        (["configs/audiollm.yaml", "--template", "configs/quickstart.yaml"], "holds no `-m ultravox train CONFIG"),
        (["configs/audiollm.yaml", "--nodes", "0"], "--nodes takes a number from 1, got 0"),
        (["configs/audiollm.yaml", "--tier", "cheap"], "invalid choice: 'cheap'"),
        (["configs/audiollm.yaml", "--tier", "spot"], "job_tier spot has no effect with compute azureml:gpu-cluster"),
        (
            ["configs/audiollm.yaml", "--compute", "c", "--tier", "spot"],
            "--compute names a cluster, which has its own size and tier",
        ),
        (["configs/audiollm.yaml", "--input", "data"], "--input takes NAME=PATH"),
        (["configs/audiollm.yaml", "--input", "data=none"], "--input data: none is no folder here"),
        (["configs/audiollm.yaml", "--input", "x=azureml:a:1"], "no such input (data, home)"),
        (["configs/audiollm.yaml", "--ssh-public-key", "none.pub"], "--ssh-public-key none.pub: cannot be read"),
        (["configs/audiollm.yaml", "--ssh-public-key", "README.md"], "no public key"),
        (["configs/audiollm.yaml", "--instance-type", "Standard_NC24ads_A100_v4"], "has 1 GPUs"),
    ],
)
def test_renders_errors_are_one_line_each(words, message, in_root, tmp_path, capsys):
    output = tmp_path / "job.yml"
    assert cli.main(["azureml", "render", *words, "--output", str(output)]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert len(printed.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [], "nothing is left that was refused"


def test_a_config_outside_the_code_is_refused(in_root, tmp_path, capsys):
    shutil.copy(ROOT / "configs" / "quickstart.yaml", tmp_path)
    words = [str(tmp_path / "quickstart.yaml"), "--output", str(tmp_path / "job.yml")]
    assert cli.main(["azureml", "render", *words]) == 2
    assert "the folder that goes with the job: put it there" in capsys.readouterr().err


class FakeWorkspace:
    """In the place of MLClient: the seam that `azureml_client.connect` documents."""

    def __init__(self, error: Exception | None = None) -> None:
        self.sent, self.error, self.jobs = [], error, self

    def create_or_update(self, job):
        if self.error is not None:
            raise self.error
        self.sent.append(job)
        return SimpleNamespace(name="jolly_pear", studio_url="https://example.com/runs/jolly_pear")


@pytest.fixture
def connected(monkeypatch):
    """`connected(error)` puts a FakeWorkspace in place; the workspaces that were asked for are in `.asked`."""

    def put(error: Exception | None = None) -> FakeWorkspace:
        fake = FakeWorkspace(error)
        fake.asked = []
        monkeypatch.setattr(azureml_client, "connect", lambda workspace: fake.asked.append(workspace) or fake)
        return fake

    return put


def test_submit_sends_and_says_where(connected, in_root, capsys, azure_sdk):
    fake = connected()
    words = [SMOKE, "--subscription", "s", "--resource-group", "g", "--workspace", "w"]
    assert cli.main(["azureml", "submit", *words]) == 0
    assert capsys.readouterr().out == "job    jolly_pear\nstudio https://example.com/runs/jolly_pear\n"
    assert fake.asked == [Workspace("s", "g", "w")]
    (job,) = fake.sent
    assert type(job).__module__.startswith("azure.ai.ml")
    assert (job.display_name, job.compute) == ("smoke", "gpu-cluster")


def test_what_render_writes_is_sent(connected, in_root, tmp_path, capsys, azure_sdk):
    fake = connected()
    path = str(tmp_path / "job.yml")
    assert cli.main(["azureml", "render", "configs/audiollm.yaml", "--output", path, "--nodes", "1"]) == 0
    assert cli.main(["azureml", "submit", path]) == 0
    assert fake.asked == [None], "the workspace of config.json"
    assert fake.sent[0].resources.instance_count == 1
    assert Path(fake.sent[0].code).resolve() == ROOT


def test_a_dry_run_sends_nothing(connected, in_root, capsys, azure_sdk):
    fake = connected()
    assert cli.main(["azureml", "submit", SMOKE, "--dry-run"]) == 0
    assert "nothing was sent" in capsys.readouterr().out
    assert (fake.sent, fake.asked) == ([], [])


def test_a_broken_file_is_not_sent(connected, in_root, tmp_path, capsys):
    fake = connected()
    job = moved(read_job(Path(SMOKE)), TEMPLATES, tmp_path)
    job["resources"]["shm_size"] = "8gb"
    job["services"]["code"]["type"] = "vscode"
    write_job(job, tmp_path / "job.yml")
    assert cli.main(["azureml", "submit", str(tmp_path / "job.yml")]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"ultravox: error: {tmp_path / 'job.yml'}: resources.shm_size is '8gb'")
    assert second.startswith(f"  {tmp_path / 'job.yml'}: services.code.type is 'vscode'")
    assert fake.sent == []


def test_the_sdks_own_complaints_end_it_too(connected, in_root, tmp_path, capsys, azure_sdk):
    fake = connected()
    job = moved(read_job(Path(SMOKE)), TEMPLATES, tmp_path)
    job["resources"]["instance_counts"] = 1
    write_job(job, tmp_path / "job.yml")
    assert cli.main(["azureml", "submit", str(tmp_path / "job.yml")]) == 2
    assert "instance_counts" in capsys.readouterr().err
    assert fake.sent == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.yml"], "none.yml: no such job file"),
        (["README.md"], "README.md"),
        ([SMOKE, "--workspace", "w"], "--subscription, --resource-group is missing"),
    ],
)
def test_submits_errors(words, message, connected, in_root, capsys):
    fake = connected()
    assert cli.main(["azureml", "submit", *words]) == 2
    assert message in capsys.readouterr().err
    assert fake.sent == []


def test_azures_errors_are_one_line(connected, in_root, capsys, azure_sdk):
    from azure.core.exceptions import ClientAuthenticationError, HttpResponseError, ServiceRequestError

    for error, message in (
        (ClientAuthenticationError("no token\nat all"), "run `az login` first (no token at all)"),
        (ServiceRequestError("no name server"), "Azure cannot be reached (no name server)"),
        (HttpResponseError("x" * 2000), "AzureML refused the job: xxx"),
    ):
        connected(error)
        assert cli.main(["azureml", "submit", SMOKE]) == 2
        printed = capsys.readouterr().err
        assert message in printed
        assert len(printed.splitlines()) == 1
        assert len(printed) < 600


def test_without_a_workspace_it_says_how_to_name_one(monkeypatch, tmp_path, capsys, azure_sdk):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["azureml", "submit", SMOKE]) == 2
    assert "no workspace: give --subscription, --resource-group and --workspace" in capsys.readouterr().err


def test_the_workspaces_config_file_is_found(monkeypatch, tmp_path, azure_sdk):
    """The real client, which asks nobody before its first call."""
    (tmp_path / "config.json").write_text('{"subscription_id": "s", "resource_group": "g", "workspace_name": "w"}')
    monkeypatch.chdir(tmp_path)
    client = azureml_client.connect(None)
    assert (client.subscription_id, client.resource_group_name, client.workspace_name) == ("s", "g", "w")
    named = azureml_client.connect(Workspace("a", "b", "c"))
    assert (named.subscription_id, named.resource_group_name, named.workspace_name) == ("a", "b", "c")


def test_without_the_extra(monkeypatch, in_root, tmp_path, capsys):
    monkeypatch.setattr(azureml_client, "is_installed", lambda: False)
    output = str(tmp_path / "job.yml")
    assert cli.main(["azureml", "render", "configs/audiollm.yaml", "--output", output]) == 0
    assert "checked by ultravox alone (azure-ai-ml is not installed" in capsys.readouterr().out
    assert cli.main(["azureml", "submit", output]) == 2
    assert "pip install 'ultravox[azure]'" in capsys.readouterr().err
