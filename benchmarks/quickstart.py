"""How long `make quickstart` takes on a machine that has nothing yet: a fresh clone, an empty ULTRAVOX_HOME.

    python benchmarks/quickstart.py FOLDER

Clones the committed state into FOLDER/ultravox, runs the command there with FOLDER/home as ULTRAVOX_HOME, and writes
the wall time beside the results, to `runs/quickstart/whole.json`, from where `benchmarks/readme.py` takes it.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Clone, run, and say how long it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="an empty or a new folder")
    folder = parser.parse_args().folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        parser.error(f"{folder} is not empty: a second run would find what the first one fetched")
    clone = folder / "ultravox"
    begin = time.monotonic()
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=clone, check=True, capture_output=True, text=True)
    environment = {**os.environ, "ULTRAVOX_HOME": str(folder / "home")}
    code = subprocess.run(["make", "quickstart"], cwd=clone, env=environment).returncode
    seconds = time.monotonic() - begin
    if code:
        print(f"make quickstart failed with code {code} after {seconds / 60:.1f} min", file=sys.stderr)
        return code
    whole = {"version": 1, "command": "make quickstart", "commit": commit.stdout.strip(), "seconds": seconds}
    (clone / "runs" / "quickstart" / "whole.json").write_text(json.dumps(whole, indent=2) + "\n")
    print(f"make quickstart: {seconds / 60:.1f} min; now: python benchmarks/readme.py {clone / 'runs' / 'quickstart'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
