"""`lerobot-lam-tokens add-column`, and `verify` of a dataset that has such a column."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata

from lerobot_lam_diffusion.constants import OBS_LAM_TOKENS
from lerobot_lam_diffusion.precompute.recompute import Agreement, recompute_sample
from lerobot_lam_diffusion.scripts.command_line import DatasetSource
from lerobot_lam_diffusion.scripts.inputs import open_dataset, open_metadata
from lerobot_lam_diffusion.scripts.next_step import next_step, training
from lerobot_lam_diffusion.tokens import TokenStore
from lerobot_lam_diffusion.tokens.add_column import add_column
from lerobot_lam_diffusion.tokens.check_column import check_values, open_column
from lerobot_lam_diffusion.tokens.column import TokenColumn, read_column
from lerobot_lam_diffusion.tokens.dataset_check import absent_files
from lerobot_lam_diffusion.tokens.provenance import VQ, refuse_other_lam
from lerobot_lam_diffusion.utils.errors import DatasetError, UserError

NEARER = 0.75
"""A derived dataset's frames were re-encoded, so its tokens may differ from the LAM's tokens of these frames,
but by less than this fraction of the difference to tokens of other frames."""


@dataclass
class AddColumnConfig:
    """Write a dataset with a store's tokens as a column.

    Args:
        store: Its folder, or its repository on the Hub.
        dataset: The dataset that the store was made of.
        output_dir: Root of the new dataset.
        new_repo_id: What the new dataset is going to be called; as its folder, under the same
            user, if left out.
        column: Name of the column.
        copy_videos: Copy the videos. False: link them, where the file system can.
    """

    store: str
    dataset: DatasetSource
    output_dir: Path
    new_repo_id: str | None = None
    column: str = OBS_LAM_TOKENS
    copy_videos: bool = False


def add_token_column(config: AddColumnConfig) -> None:
    if config.dataset.episodes is not None:
        raise UserError(
            "--dataset.episodes is not for add-column: leave it out, the new dataset has all episodes; split "
            "it afterwards with lerobot-edit-dataset"
        )
    meta = open_metadata(config.dataset)
    store = TokenStore.open(config.store, meta)
    if config.dataset.root is None and absent_files(meta):
        meta = open_dataset(config.dataset).meta  # fetches the rest from the Hub
    made = add_column(store, meta, config.output_dir, config.column, config.copy_videos)
    repo_id = config.new_repo_id or _named_as(made.root, meta.repo_id)
    print(
        f"{made.root}: {meta.total_frames} frames with {config.column}; {made.linked} video files linked, "
        f"{made.copied} copied"
    )
    if made.linked:
        print(
            "The linked videos are the original's own files; to re-encode them in place "
            "(lerobot-edit-dataset --operation.type=reencode_videos), add the column with --copy_videos=true"
        )
    print(next_step(_train_on_column(repo_id, made.root, config.column), fps=meta.fps))


def _train_on_column(repo_id: str, root: Path | str | None, column: str) -> list[str]:
    named = [] if column == OBS_LAM_TOKENS else [f"--policy.lam_tokens_key={column}"]
    return training(repo_id, root, "--policy.use_precomputed_lam_tokens=true", *named)


def verify_dataset(config: Any) -> None:
    """`verify` of a dataset's column; prints what was found.

    Args:
        config: `VerifyConfig`, whose `store` is a dataset's folder or None.

    Raises:
        UserError: none or two datasets are named, or the column is missing or contradicts its description.
    """
    if (config.store is None) == (config.dataset is None):
        found = "neither" if config.store is None else f"{config.store}, a dataset, and --dataset.repo_id"
        raise UserError(f"expected a token store, or one dataset that has a column of tokens; found {found}")
    source = config.dataset or _dataset_at(Path(config.store))
    meta = open_metadata(source)
    column = _column(meta, config.column)
    lam = None if config.lam is None else _open_lam(config, column, meta)
    if source.root is None and absent_files(meta):
        meta = open_dataset(source).meta  # fetches the rest from the Hub
    store = open_column(column, meta)
    codebook = None if lam is None or column.kind != VQ else lam.codebook.float().cpu()
    missing = check_values(column, store, codebook)
    of_codebook = "" if codebook is None else ", the others are rows of the LAM's codebook"
    print(
        f"ok  {store.num_frames} rows of {column.key}, all valid; zeros exactly where the stride of "
        f"{column.frame_stride} says that there is no token ({missing}){of_codebook}"
    )
    print(f"ok  {column.state}" if column.derived is None else f"note  {column.state}")
    if lam is not None:
        sample = recompute_sample(
            store, open_dataset(source, config.tolerance_s), lam, config.num_samples, config.seed
        )
        print(_compared(column, sample))
    made_of = column.provenance.dataset.repo_id
    repo_id = _named_as(Path(config.store), made_of) if config.dataset is None else source.repo_id
    print(next_step(_train_on_column(repo_id, source.root, config.column), fps=meta.fps))


def _named_as(root: Path, made_of: str) -> str:
    """A dataset's name after its folder, under the user of the dataset that its tokens were made of."""
    return f"{made_of.partition('/')[0]}/{root.expanduser().resolve().name}"


def _dataset_at(root: Path) -> DatasetSource:
    """The dataset at this root; what it is called does not matter."""
    root = root.expanduser().resolve()
    return DatasetSource(repo_id=f"local/{root.name}", root=str(root))


def _open_lam(config: Any, column: TokenColumn, meta: LeRobotDatasetMetadata) -> Any:
    """The LAM that the command line names, which must be the one that made the column."""
    camera = column.provenance.camera_key
    if camera not in meta.camera_keys:
        raise DatasetError(
            f"column {column.key!r} was made of {camera}, which is not among the dataset's cameras "
            f"{meta.camera_keys}: nothing to compare a LAM's tokens with; leave out --lam.path"
        )
    lam = config.lam.load(config.device, column.provenance.dtype)
    refuse_other_lam(f"column {column.key!r}", column.provenance.lam, lam)
    return lam


def _column(meta: LeRobotDatasetMetadata, key: str) -> TokenColumn:
    if key not in meta.features:
        raise DatasetError(
            f"dataset {meta.root} has no column {key!r}, only {list(meta.features)}; name it with --column, "
            "or name a token store to verify that"
        )
    column = read_column(meta, key)
    if column is None:
        raise DatasetError(
            f"column {key!r} of {meta.root} does not say what its tokens are, so there is nothing to check "
            "it against; columns made by lerobot-lam-tokens add-column do"
        )
    return column


def _compared(column: TokenColumn, found: Agreement) -> str:
    agreement = found.text
    if found.equal == found.checked:
        return f"ok  {agreement}"
    if column.derived is None:
        raise DatasetError(
            f"{agreement}: the frames or the LAM changed, or the tokens were made on another kind of device. "
            "Extract them again with lerobot-lam-precompute"
        )
    agreement += (
        f"; they differ by {found.mean_error:.2g} on average, tokens of other frames by "
        f"{found.mean_error_of_others:.2g}"
    )
    if found.distinct > 1 and found.mean_error >= NEARER * found.mean_error_of_others:
        raise DatasetError(f"{agreement}: the rows are not those of their frames. Extract the tokens again")
    return f"ok  {agreement}: the frames were encoded again since"
