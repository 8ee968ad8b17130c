"""`mpo-ray` as a process of a test: the command itself, whose Ray has the test's workers where there are such."""

import sys

from mpo_ray.cli import main
from tests.forked_workers import with_the_tests_workers

if __name__ == "__main__":
    with with_the_tests_workers():
        sys.exit(main())
