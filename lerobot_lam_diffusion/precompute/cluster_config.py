"""The flags of an extraction on a cluster, `--cluster.*`; `cluster.py` submits it."""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path

ENGINES = ("slurm", "ray", "local")
DEFAULT_CPUS, DEFAULT_MEM_PER_CPU_GB = 8, 4

_COMMON = {"engine", "tasks", "workers", "logs", "dry_run"}
_RESOURCES = {"cpus_per_task", "gpus_per_task", "mem_per_cpu_gb"}
FLAGS = {
    "slurm": _COMMON | _RESOURCES | {"partition", "time", "qos", "venv", "sbatch_args"},
    "ray": _COMMON | _RESOURCES,
    "local": _COMMON,
}
"""Flags that each engine knows."""


@dataclass
class ClusterConfig:
    """Extraction by the tasks of an engine that a cluster runs, through datatrove.

    Args:
        engine: slurm, ray or local (processes of this machine). This process extracts if left out.
        tasks: Tasks that share the shards.
        workers: Tasks that run at a time; all if left out.
        logs: The engine's records, on a file system that all nodes see. OUTPUT_DIR.logs if left out.
        dry_run: Print what would be submitted, and submit nothing.
        cpus_per_task: Cores of a task, which decode; slurm and ray, 8 if left out.
        gpus_per_task: 0 or 1; slurm and ray, 1 if left out, unless --device=cpu.
        mem_per_cpu_gb: Memory of each core in GB; slurm and ray, 4 if left out.
        partition: SLURM's partition (required by it).
        time: Most time of a task, as SLURM writes it, 04:00:00 (required by it; in YAML in quotes).
        qos: SLURM's quality of service.
        venv: Environment of SLURM's tasks, a folder; the one that submits if left out.
        sbatch_args: More of sbatch's options, by their long names: {account: robots}.
    """

    engine: str | None = None
    tasks: int | None = None
    workers: int | None = None
    logs: Path | None = None
    dry_run: bool = False
    cpus_per_task: int | None = None
    gpus_per_task: int | None = None
    mem_per_cpu_gb: int | None = None
    partition: str | None = None
    time: str | None = None
    qos: str | None = None
    venv: Path | None = None
    sbatch_args: dict[str, str] = field(default_factory=dict)

    def problems(self, device: str | None, is_job_array: bool) -> list[str]:
        """Everything that does not go together, before anything is submitted.

        Args:
            device: `--device`.
            is_job_array: Whether `--shard_index` or `--num_shards` is given as well.
        """
        given = [each.name for each in fields(self) if getattr(self, each.name) not in (None, False, {})]
        if self.engine is None:
            return [f"--cluster.{name} needs --cluster.engine ({', '.join(ENGINES)})" for name in given]
        if self.engine not in FLAGS:
            return [f"--cluster.engine={self.engine} must be one of {', '.join(ENGINES)}"]
        problems = []
        for name in given:
            if name not in FLAGS[self.engine]:
                knowing = " and ".join(engine for engine in ENGINES if name in FLAGS[engine])
                problems.append(f"--cluster.{name} is for {knowing}, not for {self.engine}")
        required = ["tasks", "partition", "time"] if self.engine == "slurm" else ["tasks"]
        problems += [
            f"--cluster.engine={self.engine} needs --cluster.{name}"
            for name in required
            if getattr(self, name) is None
        ]
        for name in ("tasks", "workers", "cpus_per_task", "mem_per_cpu_gb"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"--cluster.{name}={value} must be at least 1")
        if self.gpus_per_task not in (None, 0, 1):
            problems.append(
                f"--cluster.gpus_per_task={self.gpus_per_task} must be 0 or 1: a task is one process on one "
                "GPU, more GPUs are more --cluster.tasks"
            )
        elif (self.gpus_per_task, device) in ((1, "cpu"), (0, "cuda")):
            problems.append(
                f"--cluster.gpus_per_task={self.gpus_per_task} contradicts --device={device}; leave out one "
                "of them"
            )
        if self.time is not None and not re.fullmatch(r"(\d+-)?\d+(:\d\d){1,2}", self.time):
            problems.append(
                f"--cluster.time={self.time} must be hours, as 04:00:00 or 1-12:00:00 (in YAML in quotes, "
                "else it is read as a number)"
            )
        if is_job_array:
            problems.append(
                f"--shard_index and --num_shards are what --cluster.engine={self.engine} gives its tasks "
                "itself; leave them out"
            )
        return problems
