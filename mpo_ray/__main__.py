"""`python -m mpo_ray` is `mpo-ray`."""

import sys

from mpo_ray.cli import main

sys.exit(main())
