"""The experiment trackers by name; a configuration becomes the trackers of a run."""

from collections.abc import Mapping
from pathlib import Path

from ultravox.auth.credentials import Found
from ultravox.config.schema import RunConfig
from ultravox.training.trackers.clearml import ClearmlTracker
from ultravox.training.trackers.mlflow import MlflowTracker
from ultravox.training.trackers.tracker import Tracker, TrackerOptions
from ultravox.training.trackers.tracking import RunTracking
from ultravox.training.trackers.trackio import TrackioTracker
from ultravox.training.trackers.wandb import WandbTracker

TRACKERS: dict[str, type[Tracker]] = {
    tracker.name: tracker for tracker in (WandbTracker, MlflowTracker, ClearmlTracker, TrackioTracker)
}


def make_tracking(
    config: RunConfig, found: Mapping[str, Found], *, resume: bool = False, has_trackers: bool = True
) -> RunTracking:
    """The trackers of a run, not started yet.

    Args:
        config: of the run.
        found: the credentials in use, which no tracker is to show.
        resume: whether the run is gone on with.
        has_trackers: false where there is nothing to tell: in all processes of a run but one, and of a finished run.
    """
    logging, run_dir = config.logging, Path(config.run_dir)
    name = logging.run_name or run_dir.resolve().name
    trackers = [
        TRACKERS[tracker](TrackerOptions(logging.project, name, run_dir / "trackers" / tracker, logging.offline))
        for tracker in (logging.trackers if has_trackers else ())
    ]
    secrets = [one.secret for one in found.values()]
    return RunTracking(trackers, run_dir, config.model_dump(mode="json"), resume=resume, secrets=secrets)
