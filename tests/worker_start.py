"""A program that Ray starts in the place of its own script for workers: has a worker forked, and ends when it does.

It imports little, because it is started for every worker. See `forked_workers.py`.
"""

import array
import json
import os
import socket
import sys

#: What a library reads before the worker has its environment: such a worker starts as Ray starts it.
EARLY = ("PYTHON", "LD_", "OMP_", "DS_")


def main() -> None:
    given, context = [], {}
    for argument in sys.argv[1:]:
        if argument.startswith("--serialized-runtime-env-context="):
            context = json.loads(argument.partition("=")[2])
        elif not argument.startswith("--language="):
            given.append(argument)
    while given[0] in ("-s", "-S"):
        del given[0]
    changed = context.pop("env_vars", {})
    plain = context.get("py_executable", sys.executable) == sys.executable and not any(
        value for name, value in context.items() if name != "py_executable"
    )
    if not plain or any(name.startswith(EARLY) for name in changed) or not _forked(given, {**os.environ, **changed}):
        script = os.path.join(os.path.dirname(given[0]), "setup_worker.py")
        os.execv(sys.executable, [sys.executable, script, *sys.argv[1:]])


def _forked(arguments: list[str], environment: dict[str, str]) -> bool:
    """Ask for a worker, and wait for its end; false if there is none."""
    with socket.socket(socket.AF_UNIX) as connection:
        content = json.dumps([arguments, environment, os.getcwd()]).encode()
        streams = array.array("i", [0, 1, 2])
        try:
            connection.connect(os.environ["MPO_RAY_TEST_WORKERS"])
            connection.sendmsg([len(content).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
            connection.sendall(content)
            there = connection.recv(1) == b"+"
            connection.recv(1)
        except OSError:
            return False
    return there


if __name__ == "__main__":
    main()
