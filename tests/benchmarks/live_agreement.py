"""How well live tokens agree with stored ones, where they cannot be the same bits.

    python tests/benchmarks/live_agreement.py --num_episodes=10

Two honest exceptions to "the same numbers": a robot's frames have not been through the video encoder, and
bfloat16 flips codes that are nearly tied. On recorded PushT demonstrations this prints the share of equal
code indices, rendered against recorded frames and bfloat16 against float32, and what either does to the loss
of a briefly trained policy, beside tokens of other frames (shuffled) and none at all.
"""

import argparse
import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_policy, make_pre_post_processors
from torch import Tensor

from lerobot_lam_diffusion import OBS_LAM_TOKENS, DiffusionLamConfig
from lerobot_lam_diffusion.demo.expert import plan_episode
from lerobot_lam_diffusion.demo.record import IMAGE_KEY, record_pusht, replay
from lerobot_lam_diffusion.lam import load_lam
from lerobot_lam_diffusion.precompute.engine import precompute_tokens
from lerobot_lam_diffusion.tokens import TokenStore


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num_episodes", type=int, default=10)
    parser.add_argument("--lam_path", default="pusht-compact")
    parser.add_argument("--train_steps", type=int, default=150)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), args)


def compare(work_dir: Path, args: argparse.Namespace) -> None:
    root = work_dir / "pusht"
    summary = record_pusht(root, "local/pusht", args.num_episodes, near_goal=True)
    dataset = LeRobotDataset("local/pusht", root=root, video_backend="pyav", return_uint8=True)
    stores: dict[str, TokenStore] = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        stores[name] = precompute_tokens(
            dataset,
            load_lam(args.lam_path, dtype=dtype),
            work_dir / name,
            camera_key=IMAGE_KEY,
            lam_path=args.lam_path,
        ).store
    rendered = rendered_indices(summary.seeds, args.lam_path)
    recorded = stores["float32"]
    frames = recorded.frames_with_tokens()
    table = {
        "rendered frames against recorded ones": rendered == recorded.values[frames],
        "bfloat16 against float32": stores["bfloat16"].values[frames] == recorded.values[frames],
    }
    print(f"\n{len(frames)} pairs, perplexity {', '.join(f'{p:.1f}' for p in recorded.code_perplexity())}")
    for name, equal in table.items():
        share = equal.float().mean(0).tolist()
        slots = ", ".join(f"{100 * part:.1f} %" for part in share)
        whole = 100 * float(equal.all(1).float().mean())
        print(f"{name:<40} equal indices by slot: {slots}; whole tokens: {whole:.1f} %")

    tokens = all_tokens(recorded)
    from_rendered = tokens.clone()
    from_rendered[frames] = recorded.codebook[rendered.long()].flatten(1)
    shuffled = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))]
    losses = policy_losses(
        dataset,
        recorded,
        {
            "recorded, float32": tokens,
            "recorded, bfloat16": all_tokens(stores["bfloat16"]),
            "rendered, float32": from_rendered,
            "shuffled": shuffled,
            "none": torch.zeros_like(tokens),
        },
        args.train_steps,
    )
    print(f"\nloss after {args.train_steps} steps on the recorded float32 tokens, with tokens that are")
    for name, loss in losses.items():
        print(f"  {name:<22} {loss:.4f}  ({loss / losses['recorded, float32']:.3f} x)")


def rendered_indices(seeds: list[int], lam_path: str) -> Tensor:
    """Code indices `(pairs, n)` of the frames as the simulator draws them, episode by episode."""
    lam = load_lam(lam_path)
    indices = []
    for seed in seeds:
        demonstration = plan_episode(seed, near_goal=True)
        assert demonstration is not None
        frames = torch.stack(
            [torch.from_numpy(step[IMAGE_KEY]).permute(2, 0, 1) for step in replay(demonstration)]
        )
        indices.append(lam.encode_pairs(frames[:-1], frames[1:]).indices)
    return torch.cat(indices)


def all_tokens(store: TokenStore) -> Tensor:
    return store.window(torch.arange(store.num_frames), [0])[:, 0]


def policy_losses(
    dataset: LeRobotDataset, store: TokenStore, sources: dict[str, Tensor], train_steps: int
) -> dict[str, float]:
    """Mean loss of one trained policy on the same batches and noise, tokens taken from each source."""
    config = DiffusionLamConfig(
        use_precomputed_lam_tokens=True,
        lam_tokens_path=str(store.path),
        device="cpu",
        pretrained_backbone_weights=None,
        down_dims=(64, 128),
        horizon=8,
        n_action_steps=4,
        push_to_hub=False,
    )
    torch.manual_seed(0)
    policy = make_policy(config, ds_meta=dataset.meta)
    preprocess, _ = make_pre_post_processors(config, dataset_stats=dataset.meta.stats)
    deltas = resolve_delta_timestamps(config, dataset.meta)
    windows = LeRobotDataset("local/pusht", root=dataset.root, delta_timestamps=deltas, video_backend="pyav")
    loader = torch.utils.data.DataLoader(windows, batch_size=16, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=5e-4)
    policy.train()
    step = 0
    while step < train_steps:
        for batch in loader:
            policy.forward(preprocess(batch))[0].backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step == train_steps:
                break
    policy.eval()
    batches = [preprocess(batch) for batch in loader]
    losses = {}
    for name, tokens in sources.items():
        torch.manual_seed(1)
        with torch.no_grad():
            each = [
                policy.forward({**b, OBS_LAM_TOKENS: tokens[b["index"]].unsqueeze(1)})[0] for b in batches
            ]
        losses[name] = float(torch.stack(each).mean())
    return losses


if __name__ == "__main__":
    main()
