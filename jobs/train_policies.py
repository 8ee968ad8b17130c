"""Train one policy per objective: python jobs/train_policies.py --config FILE, as a Ray job."""

import sys

from mpo_ray.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("data", "train"))
