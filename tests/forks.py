"""Ranks forked off a process that has imported everything: Python and its imports take seconds a rank otherwise.

python forks.py    # a line of JSON a request (see ``main``), a line with the ranks' exit codes for each
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from functools import cache
from pathlib import Path
from typing import Any, NoReturn


def run(
    program: str, arguments: list[str], environments: list[dict[str, str]], seconds: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a script, or the ``main`` of a module, as a rank for each environment. When one fails, the others are killed.

    Returns:
        the first exit code that is not 0, and what all of them printed.
    """
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        request = {"program": program, "arguments": arguments, "environments": environments, "output": folder}
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        if not select.select([server.stdout], [], [], seconds)[0]:
            server.kill()  # and with it its ranks
            _server.cache_clear()
            raise TimeoutError(f"{program} {arguments} has not ended in {seconds} s: {_printed(folder)}")
        codes = json.loads(server.stdout.readline())
        return subprocess.CompletedProcess([program, *arguments], next(filter(None, codes), 0), *_printed(folder))


def _printed(folder: str) -> list[str]:
    return [file.read_text() if file.exists() else "" for file in (Path(folder, "1"), Path(folder, "2"))]


@cache
def _server() -> subprocess.Popen[str]:
    # With NVML's count of GPUs, none of the imports starts CUDA, which no fork could use then.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    command = [sys.executable, __file__]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    atexit.register(server.kill)
    return server


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # DeepSpeed's import prints
    import deepspeed  # noqa: F401

    import moba_train.worker  # noqa: F401
    from moba_train.parallel.lifetime import follow_parent

    for line in sys.stdin:
        request = json.loads(line)
        pids = []
        for environment in request.pop("environments"):
            pids.append(os.fork())
            if pids[-1] == 0:
                follow_parent()
                rank(environment, **request)
        codes: dict[int, int] = {}
        while len(codes) < len(pids):
            pid, status = os.wait()
            codes[pid] = os.waitstatus_to_exitcode(status)
            if codes[pid] > 0:
                for other in set(pids) - codes.keys():
                    os.kill(other, signal.SIGKILL)
        print(
            json.dumps([codes[pid] for pid in sorted(pids, key=lambda pid: codes[pid] < 0)]), file=answers, flush=True
        )


def rank(environment: dict[str, str], program: str, arguments: list[str], output: str) -> NoReturn:
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor in (1, 2):
        os.dup2(os.open(f"{output}/{descriptor}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.argv = [program, *arguments]
    code: Any = 0
    try:
        if program.endswith(".py"):
            sys.path.insert(0, str(Path(program).parent))
            runpy.run_path(program, run_name="__main__")
        else:
            code = importlib.import_module(program).main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    main()
