"""Initial weights with which a LAM learns motion in hundreds of steps, not none in thousands.

With random weights the tokens of a small moving object start as noise: the pair feature averages both frames,
the pooling averages all patches, and the pusher of PushT covers 2 of 64 patches. With points 1 and 2 alone
the held-out R² of the state's change was 0.0 after 200 steps of 64 pairs; with all four it was 0.67 after
200 steps and 0.91 after 800:

1. the patch embedding starts as two copies, side by side, of the principal components of the changes;
2. the first temporal attention attends evenly and subtracts, so that the second copy becomes half the
   difference (later frame) and zero (earlier frame), while the first copy stays unchanged;
3. the pooling's values use only the difference half and its keys only the other half, so each head sums the
   differences under a different smooth window over the image;
4. its gain is set so that, over the data, the spread of those sums matches the size of the latents.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..villa_x.decoder import Decoder, DecoderBlock
from ..villa_x.encoder import Block, Encoder, SelfAttention

_CONSTANTS, _CONSTANT = 16, 8.0
"""How many channels of a copying decoder are constant, and at which value."""
_HEAD_FRAMES = 256


@torch.no_grad()
def init_encoder(encoder: Encoder, prev: Tensor, cur: Tensor) -> None:
    """Set all weights but the position tables.

    Args:
        encoder: of any villa-X dimensions.
        prev, cur: normalised (B, 3, R, R), a few hundred pairs of the data.
    """
    _init_linears(encoder)
    _embed_changes(encoder.embed.proj, prev, cur)
    for index, layer in enumerate(encoder.layers):
        assert isinstance(layer, Block)
        table = layer.scale_shift_table
        table.zero_()
        table[[2, 5]] = 1  # both gates open
        for branch in (layer.attn.proj, layer.attn_temp.proj, layer.mlp.fc2):
            branch.weight.mul_(0.1)
        if index == 0:
            _subtract_frames(layer.attn_temp, encoder.pe_temporal[0])
    _pool_differences(encoder, torch.stack([prev, cur], dim=1))


@torch.no_grad()
def init_decoder(decoder: Decoder, frames: Tensor) -> None:
    """Start as the best linear copy of the frame: principal components in, least squares out.

    Args:
        frames: normalised (B, 3, R, R), a few hundred.
    """
    _init_linears(decoder)
    patches = _patches(frames, decoder.patch_size)
    _embed_components(decoder.embed.proj, patches, patches.mean(0), copies=1)
    if decoder.in_channels == 3:
        _fit_head(decoder, frames, ridge=1e-3)


@torch.no_grad()
def init_copying_decoder(decoder: Decoder, frames: Tensor) -> None:
    """Initialise to a copy of the frame, as exact as the width allows: no block changes anything yet.

    The principal components of the patches are orthogonal to the position table, so that neither disturbs the
    other, and are joined by some large constant channels, so that the norms hardly depend on the patch.

    Args:
        decoder: of RGB frames.
        frames: normalised (B, 3, R, R), about a thousand.
    """
    _init_linears(decoder)
    for block in decoder.layers:
        assert isinstance(block, DecoderBlock)
        block.layer_scale_attn.gamma.fill_(1.0)
        block.layer_scale_mlp.gamma.fill_(1.0)
        for branch in (block.attn.proj, block.mlp[2]):
            assert isinstance(branch, nn.Linear)
            branch.weight.zero_()
    patches = _patches(frames, decoder.patch_size)
    center = patches.median(0).values
    _, strength, directions = torch.linalg.svd(decoder.pe.flatten(0, -2), full_matrices=True)
    free = directions[int((strength > 1e-6 * strength[0]).sum()) :]
    filters = _components(patches - center, len(free) - _CONSTANTS)
    embed = decoder.embed.proj
    assert embed.bias is not None
    weight = free[: len(filters)].T @ filters
    embed.weight.copy_(weight.view_as(embed.weight))
    constants = free[len(filters) : len(filters) + _CONSTANTS].sum(0)
    embed.bias.copy_(_CONSTANT * constants - weight @ center)
    _fit_head(decoder, frames, ridge=1e-4)


def _fit_head(decoder: Decoder, frames: Tensor, ridge: float) -> None:
    """Least squares from the decoder's last features to the frames that it is given."""
    features: list[Tensor] = []
    handle = decoder.norm.register_forward_hook(lambda _module, _inputs, out: features.append(out[:, 1:]))
    for part in frames.split(_HEAD_FRAMES):
        decoder(part, part.new_zeros(len(part), decoder.action_embed.in_features))
    handle.remove()
    # patches are (colour, row, column) here, (row, column, colour) in the model's output
    P = decoder.patch_size
    targets = _patches(frames, P).view(-1, 3, P, P).permute(0, 2, 3, 1).flatten(1)
    inputs = F.pad(torch.cat(features).flatten(0, 1), (0, 1), value=1.0).cpu().double()
    gram = inputs.T @ inputs + ridge * torch.eye(inputs.shape[1], dtype=torch.double)
    solution = torch.linalg.solve(gram, inputs.T @ targets.cpu().double()).float()
    decoder.pred_head.weight.copy_(solution[:-1].T)
    decoder.pred_head.bias.copy_(solution[-1])


def _init_linears(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)


def _embed_changes(embed: nn.Conv2d, prev: Tensor, cur: Tensor) -> None:
    P = embed.kernel_size[0]
    before, after = _patches(prev, P), _patches(cur, P)
    changes = after - before
    energy = changes.square().sum(1)
    _embed_components(embed, changes[energy >= energy.mean()], after.median(0).values, copies=2)


def _embed_components(embed: nn.Conv2d, samples: Tensor, center: Tensor, copies: int) -> None:
    """Principal components of `samples` (S, 3·P·P) as filters, half whitened, `copies` times side by side."""
    width = embed.out_channels // copies
    components = _components(samples, width)
    filters = embed.weight.new_zeros(width, samples.shape[1])
    filters[: len(components)] = components
    filters = filters.repeat(copies, 1)
    embed.weight.copy_(filters.view_as(embed.weight))
    assert embed.bias is not None
    embed.bias.copy_(-filters @ center.to(filters.dtype))


def _components(samples: Tensor, at_most: int) -> Tensor:
    """The first principal components of `samples` (S, D), half whitened: (k, D)."""
    device, samples = samples.device, samples.cpu().double()  # Apple's GPUs have no float64
    values, vectors = torch.linalg.eigh(samples.T @ samples / len(samples))
    count = min(at_most, len(values))
    spread = values.flip(0)[:count].clamp(min=0).sqrt()
    return (vectors.flip(1).T[:count] / (spread + 0.2 * spread[0] + 1e-6)[:, None]).float().to(device)


def _subtract_frames(attention: SelfAttention, time_table: Tensor) -> None:
    """Even attention to both frames; v = x; the output is minus the mean, in the second half of channels."""
    D = time_table.shape[1]
    attention.qkv.weight[: 2 * D].mul_(0.1)
    if isinstance(attention.q_norm, nn.LayerNorm):
        attention.q_norm.weight.fill_(0.1)
    attention.qkv.weight[2 * D :].copy_(torch.eye(D))
    subtract = torch.zeros(D, D)
    subtract[D // 2 :, D // 2 :] = -torch.eye(D - D // 2)
    subtract = subtract.to(time_table)
    attention.proj.weight.copy_(subtract)
    attention.proj.bias.copy_(-subtract @ time_table[:2].mean(0))


def _pool_differences(encoder: Encoder, clips: Tensor, window_spread: float = 1.5) -> None:
    pool = encoder.map_block
    D = pool.latents.shape[1]
    pool.latents.normal_()
    pool.pre_projection.weight.copy_(torch.eye(D))
    keys, values = pool.attn.kv.weight[:D], pool.attn.kv.weight[D:]
    keys[:, D // 2 :] = 0
    values[:, : D // 2] = 0
    captured: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda _module, _inputs, out, name=name: captured.update({name: out}))
        for name, module in (("q", pool.attn.q), ("kv", pool.attn.kv), ("out", pool.attn))
    ]
    encoder(clips)
    heads = pool.attn.heads
    q = captured["q"][0].unflatten(-1, (heads, -1))  # (n, h, e)
    k = captured["kv"][..., :D].unflatten(-1, (heads, -1))  # (B, N, h, e)
    logits = torch.einsum("nhe,bshe->bnhs", q, k) * q.shape[-1] ** -0.5
    pool.attn.q.weight.mul_(window_spread / (logits.std(-1).mean() + 1e-6))
    encoder(clips)
    pool.attn.proj.weight.mul_(1 / (captured["out"].std(0).mean() + 1e-6))
    encoder(clips)
    pool.attn.proj.bias.copy_(-captured["out"].mean((0, 1)))
    for handle in handles:
        handle.remove()


def _patches(frames: Tensor, patch_size: int) -> Tensor:
    """(B, 3, R, R) → (B·N, 3·P·P), patches in row-major order, inside a patch colour, row, column."""
    return F.unfold(frames, patch_size, stride=patch_size).transpose(1, 2).flatten(0, 1)
