"""A training loop of one's own on precomputed LAM tokens.

    python docs/examples/train_with_precomputed_lam.py --dataset-repo-id lerobot/pusht \
        --lam-tokens-path ./data/pusht_lam --output-dir outputs/own_loop --num-epochs 50

`lerobot-train --policy.type=diffusion_lam` does all of this and more; the loop shows the parts. Each epoch
ends with a checkpoint that `lerobot-eval --policy.path=outputs/own_loop/last` loads. On a CPU:

    python docs/examples/train_with_precomputed_lam.py --dataset-repo-id local/pusht \
        --dataset-root data/demo --lam-tokens-path data/demo_lam --output-dir outputs/own_loop \
        --num-epochs 1 --batch-size 8 --num-workers 0 --small --max-steps 20
"""

import argparse
import itertools
from pathlib import Path

import torch
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.datasets.lerobot_dataset import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.datasets.sampler import EpisodeAwareSampler
from lerobot.policies.factory import make_policy, make_pre_post_processors
from torch.utils.data import DataLoader
from tqdm import tqdm

from lerobot_lam_diffusion import DiffusionLamConfig, LamTokenDataset


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train diffusion_lam on precomputed LAM tokens.")
    parser.add_argument("--dataset-repo-id", required=True, help="LeRobot dataset, e.g. lerobot/pusht")
    parser.add_argument("--dataset-root", help="its folder, if it is not in LeRobot's home")
    parser.add_argument("--lam-tokens-path", required=True, help="what lerobot-lam-precompute made of it")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--num-epochs", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-workers", type=int, default=4)
    parser.add_argument("--max-steps", type=int, help="stop an epoch after so many steps")
    parser.add_argument("--small", action="store_true", help="a network that a CPU can train")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()

    # The policy. make_policy hands it the dataset's metadata: it opens the token store, checks that it was
    # made of this dataset, and takes the LAM's shape from it.
    config = DiffusionLamConfig(
        use_precomputed_lam_tokens=True,
        lam_tokens_path=args.lam_tokens_path,
        device=args.device,
        pretrained_backbone_weights=None,
        down_dims=(64, 128) if args.small else (512, 1024, 2048),
        push_to_hub=False,
    )
    meta = LeRobotDatasetMetadata(args.dataset_repo_id, root=args.dataset_root)
    policy = make_policy(config, ds_meta=meta)
    preprocessor, postprocessor = make_pre_post_processors(config, dataset_stats=meta.stats)

    # The data: LeRobot's dataset with the windows that the policy asks for, and the tokens joined to each.
    dataset = LamTokenDataset(
        LeRobotDataset(
            args.dataset_repo_id,
            root=args.dataset_root,
            delta_timestamps=resolve_delta_timestamps(config, meta),
        ),
        args.lam_tokens_path,
        deltas=config.lam_token_deltas,
    )
    sampler = EpisodeAwareSampler(
        meta.episodes["dataset_from_index"],
        meta.episodes["dataset_to_index"],
        drop_n_last_frames=config.drop_n_last_frames,
        shuffle=True,
    )
    loader = DataLoader(dataset, batch_size=args.batch_size, sampler=sampler, num_workers=args.num_workers)

    optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=args.learning_rate)
    for epoch in range(args.num_epochs):
        policy.train()
        losses = []
        batches = itertools.islice(loader, args.max_steps)
        total = min(len(loader), args.max_steps or len(loader))
        for batch in tqdm(batches, desc=f"epoch {epoch + 1}/{args.num_epochs}", total=total):
            loss, _ = policy.forward(preprocessor(batch))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 10.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.4f}")

        checkpoint = args.output_dir / "last"
        policy.save_pretrained(checkpoint)
        preprocessor.save_pretrained(checkpoint)
        postprocessor.save_pretrained(checkpoint)
    print(f"checkpoint: {checkpoint}")


if __name__ == "__main__":
    main()
