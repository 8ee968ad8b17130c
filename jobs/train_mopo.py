"""Sample, score, and train MOPO's policies: python jobs/train_mopo.py --config FILE, as a Ray job."""

import sys

from mpo_ray.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("sample", "score", "mopo"))
