"""One rank of `test_run.py`: runs the recipes named on the command line."""

import sys

import torch

from herd.train import parallel
from herd.train.recipe import read_recipe
from herd.train.run import run_recipe

if __name__ == "__main__":
    torch.set_num_threads(1)
    for path in sys.argv[1:]:
        run_recipe(read_recipe(path))
    parallel.stop()
