"""The ranks of one machine of several: what ``launch=hostfile`` runs on each, over ssh.

    python -m moba_train.parallel.node --config RUN/resolved.yaml --first-rank 8 --processes 8 --world-size 16

Its standard input is its lifeline: a line is the number of a signal to pass on; its end, however the launcher or the
connection ended, is the end of the ranks.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
from pathlib import Path

from moba_train import resolved
from moba_train.parallel import local, variables


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="resolved.yaml in the run directory")
    parser.add_argument("--first-rank", type=int, required=True, help="of this machine")
    parser.add_argument("--processes", type=int, required=True, help="of this machine")
    parser.add_argument("--world-size", type=int, required=True, help="processes of all machines")
    arguments = parser.parse_args()
    if not arguments.config.is_file():
        print(
            f"error: {socket.gethostname()} does not see {arguments.config}: set run.dir to a folder that all machines "
            f"share",
            file=sys.stderr,
        )
        return 2
    launch = resolved.load(arguments.config).launch
    threading.Thread(target=_follow_input, daemon=True).start()
    size = arguments.processes
    shared = variables.of_threads(launch.threads or local.threads(size))
    shared |= variables.of_processes(launch, arguments.config.parent)
    master = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    environments = [
        shared | variables.of_rank(arguments.first_rank + rank, rank, arguments.world_size, size, master)
        for rank in range(size)
    ]
    return local.run(environments, arguments.config, claim=None)


def _follow_input() -> None:
    for line in sys.stdin:
        os.kill(os.getpid(), int(line))
    os.kill(os.getpid(), signal.SIGKILL)  # the ranks follow


if __name__ == "__main__":
    sys.exit(main())
