"""``fat-plugins`` with the model ``plain``, and as the environment asks: on the toy host, slowly, failing.

``OWN_CLI`` holds words: ``toy``; ``slow``, a pause in every step; ``fail1``, process 1 fails in its third step;
``fail2``, in the third step of the second epoch with quantizers.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import plain_net  # noqa: F401
import torch

from fat_plugins import cli_train
from fat_plugins.cli import main
from fat_plugins.errors import FatPluginsError
from fat_plugins.recipes import loaded, run
from fat_plugins.recipes.trainer import Trainer

WORDS = os.environ.get("OWN_CLI", "").split()

if "toy" in WORDS:
    from toy_host import ToyHost

    run.get_host = loaded.get_host = lambda name: ToyHost()

cli_train.available = lambda: False  # pages have tests of their own
step = Trainer._one_step


def own_step(self, images, labels):
    if "slow" in WORDS:
        time.sleep(0.1)
    late = self.controller is not None and self.epoch == 1
    if ("fail1" in WORDS or ("fail2" in WORDS and late)) and self.world.rank == 1 and self.step == 2:
        raise FatPluginsError("the disk of process 1 is full")
    step(self, images, labels)


Trainer._one_step = own_step

if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
