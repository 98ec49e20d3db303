"""A run as a SLURM batch job: a script to read and to edit, ``<run>/launch.sbatch``, and its submission.

One task a rank, so that SLURM itself starts, binds, signals and ends them. Near the time limit the ranks are told
(``#SBATCH --signal``), save, and end with a code on which the job queues itself again, if there is a checkpoint that
was not there before; a preempted job is queued again by SLURM. Either way the worker goes on from the newest one.
"""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from moba_train import durable
from moba_train.config import Device, LaunchConfig
from moba_train.parallel import local, variables

FILE = "launch.sbatch"
_OPTION = re.compile(r"[a-z][a-z0-9-]*")
_LIMIT = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
_QUEUE_AGAIN = 128 + signal.SIGUSR1
_EARLY_SECONDS = 60  # SLURM's signal may come before it is due by so many


def settle(launch: LaunchConfig) -> None:
    """
    Raises:
        ValueError: no number of processes, one that the nodes do not share evenly, an option that is none, or a time
            limit that leaves nothing before the run saves.
    """
    if launch.processes is None and launch.gpus is None and launch.gpus_per_node is None:
        raise ValueError("launch=slurm needs the number of processes: set launch.gpus_per_node, or launch.processes")
    if launch.world_size % launch.nodes:
        raise ValueError(
            f"{launch.counted} does not share out over launch.nodes={launch.nodes}: make it a multiple of that"
        )
    for key, value in _options(launch).items():
        if not _OPTION.fullmatch(key) or "\n" in value:
            raise ValueError(f"launch.slurm.options.{key}={value!r}: write long options of sbatch, without --")
    limit, needed = seconds(launch.slurm.time), launch.slurm.save_seconds + _EARLY_SECONDS
    if launch.slurm.save_seconds and limit is not None and limit <= needed:
        raise ValueError(
            f"launch.slurm.time={launch.slurm.time} is over {limit} s after the start, and the run may be told to save "
            f"launch.slurm.save_seconds={launch.slurm.save_seconds} + {_EARLY_SECONDS} s before: raise the former, or "
            f"lower the latter (0: it does not save)"
        )


def seconds(limit: str | None) -> int | None:
    """A time limit as sbatch reads it: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]].

    None for what is no such limit (UNLIMITED), or none (0 among them).
    """
    found = _LIMIT.fullmatch(limit or "")
    if not found:
        return None
    days, *clock = (int(part) if part else None for part in found.groups())
    given = [part for part in clock if part is not None]
    if days is None and len(given) < 3:  # the first are minutes
        given.insert(0, 0)
    hours, minutes, rest = (*given, 0, 0)[:3]
    return (((days or 0) * 24 + hours) * 60 + minutes) * 60 + rest or None


def check() -> None:
    """
    Raises:
        ValueError: this machine cannot submit.
    """
    if shutil.which("sbatch") is None:
        raise ValueError(
            "launch=slurm needs sbatch, and this machine has none: start it on a login node of the cluster, or write "
            "the script alone with launch.dry_run=true"
        )


def script(launch: LaunchConfig, resolved: Path) -> str:
    """The batch script of a run, whose ``resolved.yaml`` is given."""
    folder, each = resolved.parent, launch.world_size // launch.nodes
    options = {
        "job-name": folder.name,
        "nodes": str(launch.nodes),
        "ntasks-per-node": str(each),
        **({} if launch.device is Device.cpu or not launch.needs_gpus else {"gpus-per-node": str(each)}),
        "output": f"{folder}/slurm-%j.log",
        "open-mode": "append",
        "requeue": "",
        **({"signal": f"USR1@{launch.slurm.save_seconds}"} if launch.slurm.save_seconds else {}),
        **_options(launch),
    }
    worker = shlex.join([launch.python or sys.executable, *local.command(resolved)[1:]])
    report = shlex.join([launch.python or sys.executable, "-m", "moba_train", "report", f"run={folder}"])
    threads = launch.threads or "${SLURM_CPUS_PER_TASK:-1}"
    shared = variables.of_processes(launch, folder)
    return "\n".join(
        [
            "#!/bin/bash",
            f"# Written by moba-train. Edit it as you like, and submit it: sbatch {shlex.quote(str(folder / FILE))}",
            *(f"#SBATCH --{key}" + (f"={shlex.quote(value)}" if value else "") for key, value in options.items()),
            "",
            f"cd {shlex.quote(str(Path.cwd()))} || exit 1",
            *launch.slurm.setup,
            "set +e  # where the lines above set -e: what fails is seen to below",
            *(f"export {key}={shlex.quote(value)}" for key, value in shared.items()),
            f"export OMP_NUM_THREADS={threads}",
            "# Since 22.05 srun does not take it from the batch job.",
            'if [ "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi',
            *_master(launch),
            "",
            f"newest() {{ ls -d {shlex.quote(str(folder))}/checkpoints/step_* 2> /dev/null | tail -n 1; }}",
            "before=$(newest)",
            "# A task a rank; the first that fails ends the others.",
            "srun --kill-on-bad-exit=1 bash -c '",
            f"  export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE={each}",
            "  exec " + worker.replace("'", "'\\''") + "'",
            "code=$?",
            "",
            f"# {_QUEUE_AGAIN}: the time limit was near, and the run has saved. Queued again, it goes on from there.",
            f'if [ $code -eq {_QUEUE_AGAIN} ] && [ "$(newest)" != "$before" ]; then scontrol requeue "$SLURM_JOB_ID"',
            f"elif [ $code -eq {_QUEUE_AGAIN} ]; then echo 'error: no step was done before the run was told to save, "
            "launch.slurm.save_seconds before launch.slurm.time: raise the latter' >&2; fi",
            f"if [ $code -eq 0 ]; then {report}; fi",
            "exit $code",
            "",
        ]
    )


def _master(launch: LaunchConfig) -> list[str]:
    """Where rank 0 listens: on the first node, or at the address that the user gives, as of another network."""
    first = '$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
    address = [] if "MASTER_ADDR" in launch.environment else [f"MASTER_ADDR={first}"]
    return [
        *address,
        f"MASTER_PORT={launch.port or '$((20000 + SLURM_JOB_ID % 12000))'}",
        "export MASTER_ADDR MASTER_PORT",
    ]


def _options(launch: LaunchConfig) -> dict[str, str]:
    """The user's own, which go before ours."""
    named = {key: getattr(launch.slurm, key) for key in ("partition", "account", "time")}
    return {key: value for key, value in named.items() if value is not None} | launch.slurm.options


def run(launch: LaunchConfig, resolved: Path) -> int:
    """Write the script, print the command and submit; ``launch.dry_run`` stops before the last.

    Returns:
        0 once the job is queued, or with ``launch.slurm.wait`` its exit code; sbatch's own where it refuses.
    """
    file = resolved.parent / FILE
    durable.write(file, script(launch, resolved))
    wait = ["--wait"] if launch.slurm.wait else []
    command = ["sbatch", "--parsable", *wait, str(file)]
    print(f"command: {shlex.join(command)}", flush=True)
    if launch.dry_run:
        return 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as submission:
        assert submission.stdout is not None
        job = submission.stdout.readline().strip().partition(";")[0]  # of several clusters its name follows
        if job:
            print(f"job {job}: its log is {resolved.parent}/slurm-{job}.log; scancel {job} ends it", flush=True)
    return submission.returncode
