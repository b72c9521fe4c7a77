"""Tasks of a cluster make the store of one process, whichever end first, die, or are sent again."""

import json
import os
import random
import secrets
import sys
import time
from dataclasses import replace
from pathlib import Path

import dill
import pytest

from lerobot_lam_diffusion.precompute import cluster as engines
from lerobot_lam_diffusion.precompute.cluster import merge_task, submit
from lerobot_lam_diffusion.precompute.cluster_config import ClusterConfig
from lerobot_lam_diffusion.scripts.precompute_lam_tokens import extract_share, main
from lerobot_lam_diffusion.tokens.layout import PROVENANCE_FILE, TENSORS_FILE, unfinished_folder
from lerobot_lam_diffusion.utils.errors import DatasetError, ExtractionError
from tests.conftest import EPISODE_LENGTHS, TOP
from tests.precompute import cluster_tasks, interrupted

ROOT = Path(__file__).parents[2]
SLURM = ClusterConfig(engine="slurm", tasks=3, partition="cpu", time="01:00:00")
LOCAL = ClusterConfig(engine="local", tasks=2)


def task_flags(dataset, lam_folder, output_dir: Path) -> dict:
    """What a task is given: five shards of an episode each."""
    return {
        "dataset": {"repo_id": "local/squares", "root": str(dataset.root), "video_backend": "pyav"},
        "lam": {"path": str(lam_folder)},
        "camera_key": TOP,
        "output_dir": str(output_dir),
        "device": "cpu",
        "shard_frames": 1,
        "num_workers": 1,
    }


def words_of(flags: dict) -> list[str]:
    """The same as flags of the command."""
    names = {f"dataset.{name}": value for name, value in flags["dataset"].items()}
    names |= {"lam.path": flags["lam"]["path"]}
    names |= {name: value for name, value in flags.items() if name not in ("dataset", "lam")}
    return [f"--{name}={value}" for name, value in names.items()]


@pytest.fixture
def flags(dataset, lam_folder, tmp_path):
    return task_flags(dataset, lam_folder, tmp_path / "store")


@pytest.fixture
def argv(flags):
    return words_of(flags)


@pytest.fixture(scope="module")
def single(tmp_path_factory, dataset, lam_folder) -> Path:
    """The store of one process."""
    folder = tmp_path_factory.mktemp("single") / "store"
    main(words_of(task_flags(dataset, lam_folder, folder)))
    return folder


def same_values(a: Path, b: Path) -> bool:
    return (a / TENSORS_FILE).read_bytes() == (b / TENSORS_FILE).read_bytes()


def run_tasks(flags, ranks, tasks) -> None:
    for rank in ranks:
        extract_share(flags, 1, None, rank, tasks)


# --- flags


@pytest.mark.parametrize(
    ("cluster", "told"),
    [
        (ClusterConfig(tasks=4), "--cluster.tasks needs --cluster.engine (slurm, ray, local)"),
        (ClusterConfig(dry_run=True), "--cluster.dry_run needs --cluster.engine"),
        (ClusterConfig(engine="sge"), "--cluster.engine=sge must be one of slurm, ray, local"),
        (ClusterConfig(engine="jobs", tasks=2), "--cluster.engine=jobs must be one of slurm, ray, local"),
        (ClusterConfig(engine="local"), "--cluster.engine=local needs --cluster.tasks"),
        (replace(SLURM, time=None), "--cluster.engine=slurm needs --cluster.time"),
        (replace(SLURM, partition=None), "--cluster.engine=slurm needs --cluster.partition"),
        (replace(SLURM, time="14400"), "--cluster.time=14400 must be hours, as 04:00:00 or 1-12:00:00"),
        (replace(SLURM, tasks=0), "--cluster.tasks=0 must be at least 1"),
        (replace(SLURM, gpus_per_task=2), "--cluster.gpus_per_task=2 must be 0 or 1"),
        (replace(LOCAL, partition="gpu"), "--cluster.partition is for slurm, not for local"),
        (replace(LOCAL, cpus_per_task=4), "--cluster.cpus_per_task is for slurm and ray, not for local"),
        (replace(SLURM, engine="ray"), "--cluster.time is for slurm, not for ray"),
        (replace(LOCAL, sbatch_args={"account": "a"}), "--cluster.sbatch_args is for slurm"),
    ],
)
def test_what_an_engine_does_not_know_is_refused(cluster, told):
    assert any(problem.startswith(told) for problem in cluster.problems(None, False))


@pytest.mark.parametrize("cluster", [ClusterConfig(), SLURM, LOCAL, replace(SLURM, time="1-12:00:00")])
def test_what_goes_together_is_accepted(cluster):
    assert cluster.problems(None, False) == []


def test_device_and_job_array_have_to_agree_with_the_engine():
    for gpus, device in ((1, "cpu"), (0, "cuda")):
        (problem,) = replace(SLURM, gpus_per_task=gpus).problems(device, False)
        assert f"--cluster.gpus_per_task={gpus} contradicts --device={device}; leave out one" in problem
    (problem,) = SLURM.problems(None, True)
    assert problem.startswith("--shard_index and --num_shards are what --cluster.engine=slurm gives")


@pytest.mark.parametrize(
    ("flag", "refusal"),
    [
        ("--extend=old", "no token store at old"),
        ("--storage_dtype=int8", "--storage_dtype=int8 is for continuous tokens"),
        ("--camera_key=side", "pass one of them as --camera_key"),
    ],
)
def test_what_no_task_could_do_is_not_submitted(argv, flag, refusal, tmp_path):
    pytest.importorskip("datatrove")
    argv = [word for word in argv if not flag.startswith(word.partition("=")[0])]
    with pytest.raises(SystemExit, match=refusal):
        main([*argv, "--cluster.engine=local", "--cluster.tasks=2", flag])
    assert os.listdir(tmp_path) == []


def test_without_datatrove_the_command_names_the_extra(argv, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datatrove", None)
    with pytest.raises(SystemExit, match=r"needs datatrove, not installed here: pip install datatrove"):
        main([*argv, "--cluster.engine=local", "--cluster.tasks=2"])
    assert os.listdir(tmp_path) == []


def test_a_finished_store_is_not_submitted_again(argv, flags, single):
    argv = [word for word in argv if not word.startswith("--output_dir")]
    with pytest.raises(SystemExit, match="holds a finished token store, so nothing was submitted"):
        main([*argv, f"--output_dir={single}", "--cluster.engine=local", "--cluster.tasks=2"])


# --- tasks, without an engine


@pytest.mark.parametrize("tasks", [1, 2, *(pytest.param(n, marks=pytest.mark.slow) for n in (5, 7))])
def test_any_number_of_tasks_in_any_order_make_the_store_of_one_process(flags, single, tmp_path, tasks):
    ranks = random.Random(tasks).sample(range(tasks), tasks)
    run_tasks(flags, [*ranks, ranks[0]], tasks)  # one is sent again
    assert sorted(os.listdir(tmp_path)) == ["store.shards"]
    merge_task(flags["output_dir"])
    assert same_values(tmp_path / "store", single)
    assert (tmp_path / "store" / PROVENANCE_FILE).read_bytes() == (single / PROVENANCE_FILE).read_bytes()
    merge_task(flags["output_dir"])  # merged already
    assert os.listdir(tmp_path) == ["store"]


def test_what_is_pickled_are_names_paths_and_numbers(flags, tmp_path):
    (step,) = engines._executor(LOCAL, extract_share, flags, tmp_path / "logs").pipeline
    pickled = dill.dumps(step)
    again = dill.loads(pickled)
    assert (again.func, again.args) == (extract_share, step.args)
    assert json.loads(json.dumps(step.args)) == [flags, step.args[1]]
    assert len(pickled) < 4096


def test_a_merge_before_all_tasks_have_ended_is_refused(flags, tmp_path):
    run_tasks(flags, [0], 2)
    with pytest.raises(ExtractionError, match=r"has \d of 5 shards; run the extraction's command again"):
        merge_task(flags["output_dir"])
    assert not (tmp_path / "store").exists()


# --- what would be submitted


def test_a_dry_run_prints_the_sbatch_scripts_and_leaves_nothing(argv, tmp_path, capsys):
    cluster = [
        "--cluster.engine=slurm", "--cluster.tasks=64", "--cluster.workers=16", "--cluster.partition=gpu",
        "--cluster.time=04:00:00", "--cluster.venv=/shared/venv", "--cluster.dry_run=true",
        "--cluster.sbatch_args={account: robots}",
    ]  # fmt: skip
    main([*(word for word in argv if word != "--device=cpu"), *cluster])
    extraction, merge = capsys.readouterr().out.split("#!/bin/bash\n")[1:]
    logs = tmp_path / "store.logs"
    for line in (
        "#SBATCH --array=0-63%16",
        "#SBATCH --partition=gpu",
        "#SBATCH --time=04:00:00",
        "#SBATCH --gpus=1",
        "#SBATCH --cpus-per-task=8",
        "#SBATCH --mem-per-cpu=4G",
        "#SBATCH --account=robots",
        f"#SBATCH --output={logs}/extract/slurm_logs/%A_%a.out",
        'export PATH="/shared/venv/bin:$PATH"',
        f"srun  -l -n 1 launch_pickled_pipeline {logs}/extract/executor.pik",
    ):
        assert line in extraction.splitlines()
    assert "#SBATCH --array=0-0" in merge
    assert "#SBATCH --kill-on-invalid-dep=yes" in merge
    assert "--gpus" not in merge
    assert "--qos" not in extraction + merge
    assert os.listdir(tmp_path) == []


def test_a_dry_run_of_ray_names_tasks_and_resources(argv, tmp_path, capsys):
    pytest.importorskip("ray")
    main([*argv, "--cluster.engine=ray", "--cluster.tasks=4", "--cluster.dry_run=true"])
    printed = capsys.readouterr().out
    for line in ("engine: ray", "tasks: 4", "at a time: all", "cpus_per_task: 8", "gpus_per_task: 0"):
        assert line in printed.splitlines()
    assert os.listdir(tmp_path) == []


# --- the engines


@pytest.fixture
def others_find_the_tests(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.slow
def test_local_processes(argv, single, tmp_path, capsys, others_find_the_tests):
    main([*argv, "--cluster.engine=local", "--cluster.tasks=5", "--cluster.workers=2"])
    assert "frames    60 in 5 episodes" in capsys.readouterr().out
    assert same_values(tmp_path / "store", single)
    assert sorted(os.listdir(tmp_path)) == ["store", "store.logs"]


@pytest.mark.slow
def test_a_local_task_is_killed_and_the_command_run_again(flags, single, tmp_path, others_find_the_tests):
    """datatrove's pool waits for a killed task for ever: it is ended, as a user would."""
    server = interrupted.server()
    process = server.Process(target=submit, args=(LOCAL, cluster_tasks.dies_once, flags, tmp_path / "store"))
    process.start()
    done = tmp_path / "store.logs" / "extract" / "completions" / "00000"
    give_up = time.monotonic() + 400
    while not ((tmp_path / "died").exists() and done.exists()) and time.monotonic() < give_up:
        time.sleep(0.2)
    process.terminate()
    process.join()
    assert (tmp_path / "died").exists()
    left = set(unfinished_folder(tmp_path / "store").glob("0*.safetensors"))
    assert 0 < len(left) < len(EPISODE_LENGTHS)
    assert submit(replace(LOCAL, workers=1), cluster_tasks.dies_once, flags, tmp_path / "store") is None
    assert same_values(tmp_path / "store", single)


@pytest.mark.slow
def test_a_task_that_fails_is_told_with_its_log(flags, tmp_path):
    flags["dataset"]["root"] = str(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match=r"cannot be read in .*nowhere"):
        submit(replace(LOCAL, workers=1), extract_share, flags, tmp_path / "store")
    assert "cannot be read in" in (tmp_path / "store.logs/extract/logs/task_00000.log").read_text()


@pytest.mark.slow
def test_slurm(flags, single, tmp_path, monkeypatch, others_find_the_tests):
    """Tasks out of order, one killed; no merge. The same command again: all are sent, and one runs twice."""
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    folders = [
        Path(__file__).parent / "slurm",
        Path(sys.executable).parent,
    ]
    monkeypatch.setenv("PATH", ":".join([*map(str, folders), os.environ["PATH"]]))
    monkeypatch.setenv("SLURM_STAND_IN", str(jobs))
    logs = tmp_path / "store.logs"
    arguments = (cluster_tasks.dies_once, flags, tmp_path / "store")
    would_be = submit(replace(SLURM, dry_run=True), *arguments)

    monkeypatch.setenv("SLURM_ORDER", "2,0,1")
    told = submit(SLURM, *arguments)
    assert told.startswith("Extraction: job 1; merge: job 2, which begins once all tasks have ended well")
    scripts = [(logs / name / "launch_script.slurm").read_text() for name in ("extract", "merge")]
    assert would_be == "\n".join(scripts)
    assert (jobs / "job-1").read_text().endswith(scripts[0])
    assert "--dependency=afterok:1" in (jobs / "job-2").read_text()
    assert [path.name for path in sorted(jobs.glob("failed-*"))] == ["failed-1", "failed-2"]
    assert sorted(os.listdir(logs / "extract" / "completions")) == ["00000", "00002"]
    assert not (tmp_path / "store").exists()

    monkeypatch.setenv("SLURM_ORDER", "0,1,2,1")
    submit(SLURM, *arguments)
    assert "#SBATCH --array=0-2\n" in (jobs / "job-3").read_text()
    assert len(list(jobs.glob("failed-*"))) == 2
    assert same_values(tmp_path / "store", single)


@pytest.fixture(scope="module")
def ray_of_two_cores(tmp_path_factory):
    ray = pytest.importorskip("ray")
    before = dict(os.environ)
    os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    ray.init(num_cpus=2, include_dashboard=False)
    yield
    ray.shutdown()
    os.environ.clear()
    os.environ |= before


RAY = ClusterConfig(engine="ray", cpus_per_task=1, mem_per_cpu_gb=1)


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [1, 5])
def test_ray(ray_of_two_cores, flags, single, tmp_path, tasks):
    assert submit(replace(RAY, tasks=tasks), extract_share, flags, tmp_path / "store") is None
    assert same_values(tmp_path / "store", single)


@pytest.mark.slow
def test_ray_sends_a_task_again_whose_node_died(ray_of_two_cores, flags, single, tmp_path):
    task = cluster_tasks.dies_once_with_its_node
    assert submit(replace(RAY, tasks=2), task, flags, tmp_path / "store") is None
    assert (tmp_path / "died").exists()
    assert same_values(tmp_path / "store", single)


@pytest.mark.slow
def test_failed_tasks_on_ray_are_named(ray_of_two_cores, flags, tmp_path):
    flags["dataset"]["root"] = str(tmp_path / "nowhere")
    with pytest.raises(ExtractionError, match=r"1 of 1 tasks failed, see task_00000\.log in"):
        submit(replace(RAY, tasks=1), extract_share, flags, tmp_path / "store")


@pytest.mark.slow
def test_a_task_that_no_node_of_ray_can_run_is_refused(ray_of_two_cores, flags, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    too_large = (
        r"no node of this Ray cluster can run a task of 8 cores, 32 GB .*nodes: 2 cores.*cpus_per_task"
    )
    with pytest.raises(ExtractionError, match=too_large):
        submit(ClusterConfig(engine="ray", tasks=2), extract_share, flags, tmp_path / "store")
    assert not (tmp_path / "store.shards").exists()
