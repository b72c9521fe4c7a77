"""Extraction by SLURM, Ray or local tasks, which datatrove starts, records and restarts.

    OUTPUT_DIR.logs/extract/    completions/, logs/, stats/ of the tasks; the sbatch script   (datatrove)
    OUTPUT_DIR.shards/          finished shards, on a file system that all nodes see          (shards)

Task `rank` of `tasks` makes the same shards as a job-array task with `--shard_index` and `--num_shards`.
The shards record what is finished: tasks that are run again make only what is missing.
"""

import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor

from lerobot_lam_diffusion.precompute.cluster_config import (
    DEFAULT_CPUS,
    DEFAULT_MEM_PER_CPU_GB,
    ClusterConfig,
)
from lerobot_lam_diffusion.precompute.merge import merge_unfinished
from lerobot_lam_diffusion.precompute.processes import usable_cores
from lerobot_lam_diffusion.utils.errors import ExtractionError

logger = logging.getLogger(__name__)


type Extract = Callable[[dict[str, Any], int, Any, int, int], None]
"""Makes the shards of one task; opens dataset and LAM itself. Takes the flags (names, paths and numbers), the
task's cores, and what datatrove passes to a step: data, rank and number of tasks."""


def merge_task(output_dir: str, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
    """Make the store of shards that are all finished; needs neither dataset nor LAM."""
    merge_unfinished(Path(output_dir))


class _Slurm(SlurmPipelineExecutor):
    def launch_merge_stats(self) -> None:
        """Do nothing: datatrove would submit a separate job, with the tasks' GPU, to add up a few numbers."""


def submit(cluster: ClusterConfig, extract: Extract, flags: dict[str, Any], output_dir: Path) -> str | None:
    """Run the tasks, or have SLURM run them, and then the merge; finished shards are not made again.

    Args:
        extract: A function that tasks can import.
        flags: What it is given; paths are absolute.
        output_dir: Folder of the future store, absolute.

    Returns:
        What was, or would be, submitted; None if the store is finished.

    Raises:
        ExtractionError: tasks failed; names their logs.
    """
    assert cluster.tasks is not None
    logs = (cluster.logs or output_dir.with_name(f"{output_dir.name}.logs")).expanduser().absolute()
    if cluster.dry_run:
        return _described(cluster, extract, flags, output_dir, logs)
    for name in ("extract", "merge"):  # what is finished the shards decide, not datatrove's records
        shutil.rmtree(logs / name / "completions", ignore_errors=True)
    extraction = _executor(cluster, extract, flags, logs)
    if isinstance(extraction, SlurmPipelineExecutor):
        merge = _merge_job(cluster, output_dir, logs, extraction)
        merge.run()
        return (
            f"Extraction: job {extraction.job_id}; merge: job {merge.job_id}, which begins once all tasks "
            f"have ended well.\nLogs: {logs}. A failed task, or a merge that was cancelled for it: run the "
            "same command again when no job of this extraction is left in squeue"
        )
    extraction.run()
    failed = extraction.get_incomplete_ranks(skip_completed=True)
    if failed:
        named = ", ".join(f"task_{rank:05d}.log" for rank in failed[:5]) + (", …" if failed[5:] else "")
        raise ExtractionError(
            f"{len(failed)} of {cluster.tasks} tasks failed, see {named} in {logs / 'extract' / 'logs'}; "
            "finished shards are safe, run the same command again to go on"
        )
    merge_task(str(output_dir))
    return None


def _executor(
    cluster: ClusterConfig, extract: Extract, flags: dict[str, Any], logs: Path
) -> LocalPipelineExecutor | RayPipelineExecutor | SlurmPipelineExecutor:
    tasks, workers = cluster.tasks or 1, cluster.workers or -1
    folder = str(logs / "extract")
    if cluster.engine == "local":
        at_a_time = min(tasks, cluster.workers or tasks)
        step = partial(extract, flags, max(1, usable_cores() // at_a_time))
        return LocalPipelineExecutor([step], tasks=tasks, workers=at_a_time, logging_dir=folder)
    resources = _resources(cluster, flags)
    step = partial(extract, flags, resources["cpus_per_task"])
    if cluster.engine == "ray":
        _refuse_what_no_node_has(resources)
        return RayPipelineExecutor([step], tasks=tasks, workers=workers, logging_dir=folder, **resources)
    return _Slurm(
        [step],
        tasks=tasks,
        workers=workers,
        job_name="lam-extract",
        logging_dir=folder,
        **resources,
        **_slurm_options(cluster),
    )


def _merge_job(
    cluster: ClusterConfig, output_dir: Path, logs: Path, extraction: SlurmPipelineExecutor
) -> SlurmPipelineExecutor:
    options = _slurm_options(cluster)
    options["sbatch_args"] = {**options["sbatch_args"], "kill-on-invalid-dep": "yes"}
    return _Slurm(
        [partial(merge_task, str(output_dir))],
        tasks=1,
        job_name="lam-merge",
        logging_dir=str(logs / "merge"),
        mem_per_cpu_gb=DEFAULT_MEM_PER_CPU_GB,
        depends=extraction,
        **options,
    )


def _resources(cluster: ClusterConfig, flags: dict[str, Any]) -> dict[str, int]:
    return {
        "cpus_per_task": cluster.cpus_per_task or DEFAULT_CPUS,
        "mem_per_cpu_gb": cluster.mem_per_cpu_gb or DEFAULT_MEM_PER_CPU_GB,
        "gpus_per_task": 0 if flags["device"] == "cpu" else 1,
    }


def _refuse_what_no_node_has(resources: dict[str, int]) -> None:
    """Refuse tasks that no node can run: Ray would wait forever, since an autoscaler may add such a node.

    Raises:
        ExtractionError: no node can run a task; if RAY_ADDRESS names the cluster, this is only a warning.
    """
    import ray

    if not ray.is_initialized():
        ray.init()
    cpus = resources["cpus_per_task"]
    needed = {
        "CPU": cpus,
        "memory": (cpus * resources["mem_per_cpu_gb"]) << 30,
        "GPU": resources["gpus_per_task"],
    }
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(all(node.get(name, 0) >= amount for name, amount in needed.items()) for node in nodes):
        return
    found = "; ".join(
        f"{node.get('CPU', 0):g} cores, {node.get('memory', 0) / 2**30:.0f} GB, {node.get('GPU', 0):g} GPUs"
        for node in nodes[:5]
    )
    memory = cpus * resources["mem_per_cpu_gb"]
    if "RAY_ADDRESS" in os.environ:
        logger.warning("No node of this Ray cluster can run a task (nodes: %s): waiting for one.", found)
        return
    raise ExtractionError(
        f"no node of this Ray cluster can run a task of {cpus} cores, {memory} GB and "
        f"{resources['gpus_per_task']} GPUs (nodes: {found}). Set --cluster.cpus_per_task, "
        "--cluster.mem_per_cpu_gb and --device=cpu to what a node has; where an autoscaler adds such nodes, "
        "set RAY_ADDRESS=auto"
    )


def _slurm_options(cluster: ClusterConfig) -> dict[str, Any]:
    environment = (cluster.venv or Path(sys.prefix)).expanduser().absolute()
    return {
        "time": cluster.time,
        "partition": cluster.partition,
        "qos": cluster.qos,
        "env_command": f'export PATH="{environment / "bin"}:$PATH"',
        "sbatch_args": dict(cluster.sbatch_args),
    }


def _described(
    cluster: ClusterConfig, extract: Extract, flags: dict[str, Any], output_dir: Path, logs: Path
) -> str:
    """What would be submitted: for SLURM its scripts, else tasks and resources; leaves nothing behind."""
    if cluster.engine != "slurm":
        resources = _resources(cluster, flags) if cluster.engine == "ray" else {}
        described = {"engine": cluster.engine, "tasks": cluster.tasks, "at a time": cluster.workers or "all"}
        return yaml.safe_dump(
            {**described, **resources, "logs": str(logs), "flags": flags}, sort_keys=False, allow_unicode=True
        )
    with tempfile.TemporaryDirectory() as there:  # datatrove makes folders as it writes a script
        extraction = _executor(cluster, extract, flags, Path(there))
        assert isinstance(extraction, SlurmPipelineExecutor)
        merge = _merge_job(cluster, output_dir, Path(there), extraction)
        scripts = [_script(extraction), _script(merge)]
        return "\n".join(scripts).replace(os.path.realpath(there), str(logs)).replace(there, str(logs))


def _script(executor: SlurmPipelineExecutor) -> str:
    pickled = executor.logging_dir.resolve_paths("executor.pik")
    return executor.get_launch_file_contents(
        executor.get_sbatch_args(executor.tasks),
        f"srun  -l -n {executor.nodes_per_task} launch_pickled_pipeline {pickled}",
    )
