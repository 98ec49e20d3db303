"""A cluster of this machine: sbatch, srun and scontrol, as far as ``launch.sbatch`` uses them.

Installed under these three names on PATH. ``sbatch`` runs the script here, again when it was queued again; ``srun``
starts a task a rank, sends USR1 once training has begun as SLURM does near a time limit (in the first run of the job
alone), and ends all tasks with the first that fails.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

JOB = "77"


def sbatch(arguments: list[str]) -> int:
    script = Path(arguments[-1])
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", script.read_text(), re.MULTILINE))
    if options.get("partition") == "nowhere":
        print("sbatch: error: invalid partition specified: nowhere", file=sys.stderr)
        return 1
    assert "--parsable" in arguments and "--wait" in arguments
    print(f"{JOB};cluster", flush=True)
    tasks = int(options["nodes"]) * int(options["ntasks-per-node"])
    environment = {
        **os.environ,
        **{"SLURM_JOB_ID": JOB, "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": str(tasks)},
        "FAKE_SLURM_FOLDER": str(script.parent),
        "FAKE_SLURM_USR1": "yes" if "signal" in options else "",
    }
    while True:
        with open(options["output"].replace("%j", JOB), "a") as log:
            code = subprocess.run(["bash", str(script)], env=environment, stdout=log, stderr=log).returncode
        if not (script.parent / "queued_again").exists():
            return code
        (script.parent / "queued_again").rename(script.parent / "was_queued_again")
        environment["FAKE_SLURM_USR1"] = ""


def scontrol(arguments: list[str]) -> int:
    if arguments[:2] == ["show", "hostnames"]:
        print("127.0.0.1\n127.0.0.2")
    else:
        assert arguments == ["requeue", JOB]
        Path(os.environ["FAKE_SLURM_FOLDER"], "queued_again").touch()
    return 0


def srun(arguments: list[str]) -> int:
    assert arguments.pop(0) == "--kill-on-bad-exit=1"
    tasks = [
        subprocess.Popen(arguments, env={**os.environ, "SLURM_PROCID": str(rank), "SLURM_LOCALID": "0"})
        for rank in range(int(os.environ["SLURM_NTASKS"]))
    ]
    rows = Path(os.environ["FAKE_SLURM_FOLDER"], "metrics.jsonl")
    warn = bool(os.environ["FAKE_SLURM_USR1"])
    while any(task.poll() is None for task in tasks):
        if warn and rows.exists() and "train/loss" in rows.read_text():
            warn = False
            for task in tasks:
                task.send_signal(signal.SIGUSR1)
        if any(task.returncode for task in tasks):
            for task in tasks:
                task.kill()
        time.sleep(0.01)
    return max(task.returncode for task in tasks)


if __name__ == "__main__":
    sys.exit({"sbatch": sbatch, "scontrol": scontrol, "srun": srun}[Path(sys.argv[0]).name](sys.argv[1:]))
