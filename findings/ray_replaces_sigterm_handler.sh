#!/usr/bin/env bash
# Ray 2.60.0: ray.init replaces the program's own handler of SIGTERM, and does not call it.
#
# A program that sets a handler of SIGTERM (to save, to let go of a lock) and then calls ray.init ends at SIGTERM
# without it: no exception, no `finally` of the program. A handler that is set after ray.init runs.
#
# Seen on 2026-11-30, Linux, Python 3.11:
#   set before ray.init: own handler ran: no
#   set after ray.init: own handler ran: yes
#
# The product sets its handler again after ray.init (mpo_ray/cluster/session.py, tests/cluster/test_session.py).
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet "ray==2.60.0" 2>/dev/null
cat > "$place/program.py" <<'PROGRAM'
import os, signal, sys, time

def own(number, frame):
    print("own handler", flush=True)
    sys.exit(0)

import ray

signal.signal(signal.SIGTERM, own)
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
if sys.argv[1] == "after":
    signal.signal(signal.SIGTERM, own)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(30)
PROGRAM
export RAY_AUTH_MODE=disabled RAY_USAGE_STATS_ENABLED=0
for moment in before after; do
    said=$("$place/venv/bin/python" "$place/program.py" "$moment" 2>/dev/null) || true
    [ "$said" = "own handler" ] && ran=yes || ran=no
    echo "set $moment ray.init: own handler ran: $ran"
    [ "$moment" = before ] && wanted=no || wanted=yes
    [ "$ran" = "$wanted" ] || { echo "this has changed" >&2; exit 1; }
done
