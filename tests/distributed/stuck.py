"""`ultravox train CONFIG`, in which rank 1 gets stuck in its data at the fourth step."""

import os
import sys
import time

from ultravox.cli.main import entry
from ultravox.data.loader import Loader

steps = Loader.steps


def stuck_in_data(self, start):
    for number, step in enumerate(steps(self, start)):
        while number == 3 and os.environ["RANK"] == "1":
            time.sleep(1)
        yield step


Loader.steps = stuck_in_data
sys.argv = ["ultravox", "train", sys.argv[1]]
entry()
