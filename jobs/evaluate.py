"""Evaluate the mixture and write the report: python jobs/evaluate.py --config FILE, as a Ray job."""

import sys

from mpo_ray.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("evaluate", "report"))
