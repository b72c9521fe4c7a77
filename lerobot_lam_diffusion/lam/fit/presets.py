"""Named model sizes for `lerobot-lam-fit`."""

from ..villa_x.config import LamConfig

_COMPACT = LamConfig(
    resolution=96, patch_size=12, d_t=2, mlp_ratio=2.0,
    encoder_depth=2, encoder_embed_dim=64, encoder_n_heads=4, map_heads=8,
    num_learned_tokens=2, action_latent_dim=32, n_codes=32,
    decoder_depth=2, decoder_embed_dim=128, decoder_n_heads=4,
)  # fmt: skip

PRESETS: dict[str, LamConfig] = {
    # 0.6 M parameters, 2.6 MB: minutes on a CPU, for simple scenes.
    "compact": _COMPACT,
    # 5.8 M parameters, 23 MB: finer patches and more width, for a GPU and real cameras (not yet tried there).
    "small": LamConfig(
        resolution=96, patch_size=8, d_t=2, mlp_ratio=4.0,
        encoder_depth=4, encoder_embed_dim=128, encoder_n_heads=4, map_heads=8,
        num_learned_tokens=2, action_latent_dim=32, n_codes=32,
        decoder_depth=4, decoder_embed_dim=256, decoder_n_heads=8,
    ),
    # 0.02 M parameters, seconds: for tests and for trying a set-up.
    "tiny": LamConfig(
        resolution=32, patch_size=8, d_t=2, mlp_ratio=1.0,
        encoder_depth=1, encoder_embed_dim=16, encoder_n_heads=2, map_heads=2,
        num_learned_tokens=2, action_latent_dim=8, n_codes=8,
        decoder_depth=1, decoder_embed_dim=16, decoder_n_heads=2,
    ),
}  # fmt: skip
