"""Fit the weights and write the mixture: python jobs/fit_weights.py --config FILE, as a Ray job."""

import sys

from mpo_ray.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("fit", "export"))
