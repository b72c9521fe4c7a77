"""Look at a token store, check it, put partial stores together, write it elsewhere or in another format.

    lerobot-lam-tokens info ./data/pusht_lam
    lerobot-lam-tokens verify ./data/pusht_lam --dataset.repo_id=lerobot/pusht --lam.path=microsoft/villa-x
    lerobot-lam-tokens report ./data/pusht_lam --dataset.repo_id=lerobot/pusht --output=report.html
    lerobot-lam-tokens view ./data/pusht_lam --dataset.repo_id=lerobot/pusht --episode=3 --save=episode_3.rrd
    lerobot-lam-tokens merge ./data/part_0 ./data/part_1 --output_dir=./data/pusht_lam
    lerobot-lam-tokens merge ./data/pusht_lam   # of an extraction whose processes finished all its shards
    lerobot-lam-tokens merge ./live --dataset.repo_id=lerobot/pusht --lam.path=./my_lam --output_dir=./store
    lerobot-lam-tokens export ./data/pusht_lam --format=parquet --output=./pusht_lam.parquet
    lerobot-lam-tokens add-column ./data/pusht_lam --dataset.repo_id=lerobot/pusht --output_dir=./pusht_col
    lerobot-lam-tokens verify ./pusht_col   # a dataset that has a column of tokens
    lerobot-lam-tokens push ./data/pusht_lam --repo_id=user/pusht-lam-tokens
    lerobot-lam-tokens pull user/pusht-lam-tokens --output_dir=./data/pusht_lam
    lerobot-lam-tokens cache list   # what lam_tokens_path=auto has built and lam_live_cache=auto has kept
    lerobot-lam-tokens cache prune --older_than_days=30   # or --all=true
    lerobot-lam-tokens cache path

A store is a folder, or a dataset repository on the Hub, `user/pusht-lam-tokens[@revision]`; where there is a
folder of that name, it is meant, and `hf://datasets/user/pusht-lam-tokens` is the Hub's.

`verify` reads every byte again; with a dataset it checks that the store was made of it, and with a LAM as
well it encodes a random sample of frame pairs and compares. A `.pt` file is verified with its dataset.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from lerobot.configs.default import DatasetConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset

import lerobot_lam_commands
from lerobot_lam_diffusion.constants import OBS_LAM_TOKENS
from lerobot_lam_diffusion.lam import load_lam
from lerobot_lam_diffusion.precompute.frames import EpisodeFrames
from lerobot_lam_diffusion.precompute.merge import merge_unfinished
from lerobot_lam_diffusion.precompute.recompute import recompute_sample
from lerobot_lam_diffusion.problems import FlagError, UserError
from lerobot_lam_diffusion.scripts.cache import (
    CacheListConfig,
    CachePathConfig,
    CachePruneConfig,
    cache_path,
    list_cache,
    prune_cache,
)
from lerobot_lam_diffusion.scripts.column import (
    AddColumnConfig,
    add_token_column,
    means_dataset,
    verify_dataset,
)
from lerobot_lam_diffusion.scripts.command_line import LamSource, did_you_mean, refuse, run_command
from lerobot_lam_diffusion.scripts.help import Command, summary_of
from lerobot_lam_diffusion.scripts.live_cache import (
    means_live_cache,
    merge_live_cache,
    print_live_cache,
    verify_live_cache,
)
from lerobot_lam_diffusion.scripts.next_step import next_step, train_on, verify_with_its_lam
from lerobot_lam_diffusion.scripts.opening import open_dataset, open_metadata, usable_device
from lerobot_lam_diffusion.scripts.report import ReportConfig, illustrate, open_footage, report
from lerobot_lam_diffusion.scripts.view import ViewConfig, view
from lerobot_lam_diffusion.tokens import TokenStore
from lerobot_lam_diffusion.tokens.binding import check_binding
from lerobot_lam_diffusion.tokens.export import export_store
from lerobot_lam_diffusion.tokens.layout import PROVENANCE_FILE, TENSORS_FILE, TokenStoreError
from lerobot_lam_diffusion.tokens.locating import check_located, locate_store
from lerobot_lam_diffusion.tokens.merge import merge_stores
from lerobot_lam_diffusion.tokens.pull import pull_store
from lerobot_lam_diffusion.tokens.push import push_store


@dataclass
class InfoConfig:
    """What a store, or a live cache, holds.

    Args:
        store: Its folder, or its repository on the Hub; a live cache's folder, or its name in `cache list`.
    """

    store: str


@dataclass
class VerifyConfig:
    """Check a store, or a dataset's column of tokens.

    Args:
        store: Its folder, or its repository on the Hub; a live cache; or a `.pt` file, which needs the
            dataset. A dataset's folder, or left out: the column of that dataset.
        column: Of the dataset.
        dataset: Check that the store was made of this dataset.
        lam: With a dataset: encode a random sample again with this LAM and compare.
        camera_key: Of a `.pt` file: the camera that the LAM looked at, where the dataset has several.
        num_samples: Tokens in that sample.
        seed: Of the sample.
        tolerance_s: As in lerobot-train: how far a frame may lie from its timestamp, in seconds.
        device: Where the LAM runs; the best there is if left out.
    """

    store: str | None = None
    column: str = OBS_LAM_TOKENS
    dataset: DatasetConfig | None = None
    lam: LamSource | None = None
    camera_key: str | None = None
    num_samples: int = 64
    seed: int = 0
    tolerance_s: float = 1e-4
    device: str | None = None


@dataclass
class MergeConfig:
    """Put partial stores together, or the shards of an unfinished extraction, or a live cache's episodes.

    Args:
        stores: Their folders, or repositories on the Hub; or the extraction's --output_dir, or the live
            cache, alone.
        output_dir: Where the new store will stand; not for an extraction.
        dataset: With a live cache: the dataset that it was filled from, whose pixels are compared.
        lam: With a live cache: the LAM that filled it encodes what is missing; if left out, the store has the
            complete episodes only.
        tolerance_s: With a live cache, as in lerobot-train: how far a frame may lie from its timestamp, in
            seconds.
    """

    output_dir: Path | None = None
    dataset: DatasetConfig | None = None
    lam: LamSource | None = None
    tolerance_s: float = 1e-4
    stores: list[str] = field(default_factory=list)


@dataclass
class ExportConfig:
    """Write a store in another format.

    Args:
        store: Its folder, or its repository on the Hub.
        format: pt, parquet or npy; training reads a .pt file, the others are for other programs.
        output: The new file.
    """

    store: str
    format: str
    output: Path


@dataclass
class PushConfig:
    """Put a store on the Hub, as a dataset repository with a card, in one commit.

    Args:
        store: Its folder.
        repo_id: The repository, user/name; made if there is none.
        private: Whether a new one is private; left out: as the user or organisation has it.
        revision: Branch, made if there is none; left out: main.
        dataset: That the store was made of: the card shows its frames and what the tokens say of its state.
    """

    store: str
    repo_id: str
    private: bool | None = None
    revision: str | None = None
    dataset: DatasetConfig | None = None


@dataclass
class PullConfig:
    """Fetch a store from the Hub as a folder. Training needs no folder: it takes the repository's name.

    Args:
        store: The repository, user/name[@revision].
        output_dir: The new folder.
    """

    store: str
    output_dir: Path


def info(config: InfoConfig) -> None:
    live_cache = means_live_cache(config.store)
    if live_cache is not None:
        print_live_cache(live_cache)
        return
    store = TokenStore.open(config.store)
    assert store.provenance is not None
    origin, lam = store.provenance.dataset, store.provenance.lam
    frames = len(store.values)
    missing = frames - store.num_tokens
    perplexity = store.code_perplexity()
    num_bytes = sum((store.path / name).stat().st_size for name in (TENSORS_FILE, PROVENANCE_FILE))
    rows = {
        "store": f"{store.hub_id or store.path.resolve()}, {num_bytes:,} bytes",
        "dataset": f"{origin.repo_id} ({origin.total_frames} frames, {origin.total_episodes} episodes, "
        f"{origin.fps:g} fps, revision {origin.revision})",
        "coverage": f"{frames} frames, {missing} of them without a token; {store.coverage}",
        "camera": store.provenance.camera_key,
        "stride": f"{store.frame_stride} frames = {store.provenance.stride_seconds:g} s",
        "LAM": f"{lam.path} (fingerprint {lam.fingerprint[:16]}…)",
        "tokens": f"{store.kind}, {lam.num_learned_tokens} x {lam.action_latent_dim} numbers, "
        f"encoded in {store.provenance.dtype} on {store.provenance.device}",
        "storage": f"{store.provenance.storage_dtype}, largest error {store.provenance.max_error:.2g}",
        "codebook": ", ".join(f"{slot:.1f}" for slot in perplexity)
        + f" of {lam.num_codes} codes a slot (perplexity)",
        "skipped": "; ".join(f"episode {episode}: {reason}" for episode, reason in store.skipped.items()),
        "made with": ", ".join(f"{name} {version}" for name, version in store.provenance.versions.items()),
    }
    if not perplexity:
        del rows["codebook"]
    if not store.skipped:
        del rows["skipped"]
    for name, text in rows.items():
        print(f"{name:<10}{text}")
    print(next_step(verify_with_its_lam(store, config.store)))


def verify(config: VerifyConfig) -> None:
    if config.store is None or means_dataset(config.store):
        verify_dataset(config)
        return
    if config.lam is not None and config.dataset is None:
        raise UserError(
            "--lam.path needs --dataset.repo_id as well: the LAM's tokens are those of its frames"
        )
    live_cache = means_live_cache(config.store)
    if live_cache is not None:
        verify_live_cache(live_cache, config)
        return
    store = _read_again(config)
    if config.dataset is None:
        if store.provenance is not None:
            print(
                next_step(verify_with_its_lam(store, config.store), "Next, compare with its dataset and LAM")
            )
        return
    dataset = open_dataset(config.dataset, config.tolerance_s)
    if store.provenance is not None:
        try:
            check_binding(store, dataset.meta)
        except TokenStoreError:
            _refuse_damaged_files(dataset, store.provenance.camera_key)
            raise
        print(f"ok  made of dataset {dataset.repo_id} at {dataset.root}")
    if config.lam is None:
        print(_train_next(config, store))
        return
    dtype = getattr(torch, store.provenance.dtype if store.provenance is not None else "float32")
    lam = load_lam(
        config.lam.path, revision=config.lam.revision, device=usable_device(config.device), dtype=dtype
    )
    result = recompute_sample(
        store, dataset, lam, config.num_samples, config.seed, camera_key=config.camera_key
    )
    told = (
        f"{result.equal} of {result.checked} sampled tokens agree with the LAM ({result.distinct} different "
        f"ones, largest difference {result.max_error:.2g})"
    )
    if result.equal < result.checked:
        raise TokenStoreError(
            f"{told}: the frames or the LAM changed, or the store was made on another kind of device. "
            "Extract the tokens again with lerobot-lam-precompute"
        )
    print(f"ok  {told}")
    print(_train_next(config, store))


def _refuse_damaged_files(dataset: LeRobotDataset, camera_key: str) -> None:
    """Name the file that cannot be read, if that is why the dataset's frames are not the store's."""
    if camera_key in dataset.meta.camera_keys:
        EpisodeFrames(dataset, camera_key).check(range(dataset.meta.total_episodes))


def _train_next(config: VerifyConfig, store: TokenStore) -> str:
    assert config.store is not None
    assert config.dataset is not None
    training = train_on(store, config.store, config.dataset.repo_id, config.dataset.root)
    return next_step(training, fps=store.provenance.dataset.fps if store.provenance else None)


def _read_again(config: VerifyConfig) -> TokenStore:
    assert config.store is not None
    location = locate_store(config.store)
    path = location.path
    meta = open_metadata(config.dataset) if config.dataset is not None else None
    if path.suffix in (".pt", ".pth") and path.is_file():
        store = TokenStore.open(path, meta)
        print("ok  all values valid, a row for each frame of the dataset")
        return store
    check_located(location, again=True)
    store = TokenStore.open(config.store)
    print(f"ok  every byte of {TENSORS_FILE} as written, all values valid ({store.coverage})")
    return store


def merge(config: MergeConfig) -> None:
    paths = config.stores
    live_cache = means_live_cache(paths[0]) if len(paths) == 1 else None
    if live_cache is not None:
        store = merge_live_cache(live_cache, config)
    elif config.dataset is not None or config.lam is not None:
        raise UserError(
            f"--dataset and --lam are for the merging of one live cache, and {', '.join(paths) or 'nothing'} "
            "is none: leave them out, or correct the path"
        )
    elif config.output_dir is None:
        if len(paths) != 1:
            raise UserError(
                "--output_dir is unset: name where the new store will stand, or an unfinished extraction "
                "alone"
            )
        store = merge_unfinished(Path(paths[0]).expanduser())
    else:
        store = merge_stores([TokenStore.open(path) for path in paths], config.output_dir)
    print(f"{store.path}: {len(store.values)} frames; {store.coverage}")
    print(next_step(verify_with_its_lam(store, store.path, config.dataset and config.dataset.root)))


def export(config: ExportConfig) -> None:
    if config.format == "pt" and config.output.suffix not in (".pt", ".pth"):
        raise UserError(f"--output={config.output} must end in .pt, by which a token file is known")
    store = TokenStore.open(config.store)
    export_store(store, config.output, config.format)
    print(f"{config.output}: {config.output.stat().st_size:,} bytes")
    if config.format == "pt":
        print(next_step(verify_with_its_lam(store, config.output)))
    elif store.provenance is not None:
        training = train_on(store, config.store, store.provenance.dataset.repo_id)
        print(next_step(training, "That file is for other programs; train on the store"))


def push(config: PushConfig) -> None:
    store, footage = open_footage(config.store, config.dataset)
    pushed = push_store(
        store,
        config.repo_id,
        private=config.private,
        revision=config.revision,
        illustrate=lambda: illustrate(store, footage),
    )
    lam = store.provenance.lam.path if store.provenance is not None else ""
    if Path(lam).is_absolute():
        print(f"note: its provenance names the LAM by its path here, {lam}")
    print(pushed.url)
    if store.provenance is not None:
        print(next_step(train_on(store, pushed.hub_id, store.provenance.dataset.repo_id), "Train on it"))


def pull(config: PullConfig) -> None:
    store = pull_store(config.store, config.output_dir)
    print(f"{config.output_dir}: {store.hub_id}, {len(store.values)} frames; {store.coverage}")
    print(next_step(verify_with_its_lam(store, config.output_dir)))


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "info": (InfoConfig, info),
    "verify": (VerifyConfig, verify),
    "report": (ReportConfig, report),
    "view": (ViewConfig, view),
    "merge": (MergeConfig, merge),
    "export": (ExportConfig, export),
    "add-column": (AddColumnConfig, add_token_column),
    "push": (PushConfig, push),
    "pull": (PullConfig, pull),
    "cache list": (CacheListConfig, list_cache),
    "cache prune": (CachePruneConfig, prune_cache),
    "cache path": (CachePathConfig, cache_path),
}


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["cache"]:
        if words[1:] in ([], ["-h"], ["--help"]):
            print(command_list("cache "))
            sys.exit(0 if words[1:] else 2)
        words[:2] = [" ".join(words[:2])]
    if words in ([], ["-h"], ["--help"]):
        print(command_list())
        sys.exit(0 if words else 2)
    if words[0] not in COMMANDS:
        known = list(COMMANDS)
        refuse(
            FlagError(
                f"unknown command {words[0]}{did_you_mean(words[0], known)} Commands: {', '.join(known)}"
            )
        )
    name = words.pop(0)
    config_class, command = COMMANDS[name]
    run_command(config_class, command, _with_flags(words, config_class), told_of(name))


def command_list(prefix: str = "") -> str:
    """What `lerobot-lam-tokens --help` prints; with a prefix, of the commands that begin so."""
    about = __doc__ or ""
    names = [
        f"    {name:<14}{summary_of(config_class)}"
        for name, (config_class, _) in COMMANDS.items()
        if name.startswith(prefix)
    ]
    flags = "Each takes --help, which tells its flags."
    if prefix:
        return "\n".join([f"usage: lerobot-lam-tokens {prefix}COMMAND [flags]\n", *names, f"\n{flags}"])
    return "\n".join(["usage: lerobot-lam-tokens COMMAND [STORE …] [flags]\n", about, *names, f"\n{flags}"])


def told_of(name: str) -> Command:
    """A subcommand with its examples."""
    config_class, _ = COMMANDS[name]
    begin = f"    lerobot-lam-tokens {name}"
    examples = [line for line in (__doc__ or "").splitlines() if f"{line} ".startswith(f"{begin} ")]
    paths = {"stores": "STORE …", "store": "STORE"}
    words = [paths[each.name] for each in fields(config_class) if each.name in paths]
    about = "\n".join([summary_of(config_class), *([""] if examples else []), *examples])
    hidden = ("dataset.episodes",) if config_class in (AddColumnConfig, ViewConfig) else ()
    return Command(f"lerobot-lam-tokens {name}", config_class, about, words[0] if words else "", hidden)


def _with_flags(words: list[str], config_class: type) -> list[str]:
    """Paths that stand before the first flag, as flags."""
    count = next((number for number, word in enumerate(words) if word.startswith("-")), len(words))
    paths, flags = words[:count], words[count:]
    if not paths:
        return flags
    if config_class is MergeConfig:
        return [f"--stores={json.dumps(paths)}", *flags]  # a JSON list is one of draccus, whatever is in it
    if len(paths) > 1:
        sys.exit(f"error: expected one store, found {', '.join(paths)}")
    return [f"--store={paths[0]}", *flags]


if __name__ == "__main__":
    lerobot_lam_commands.tokens()
