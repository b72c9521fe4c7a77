"""What a token store is, in words: for `info`, its card on the Hub and its report."""

from lerobot_lam_diffusion.tokens.store import TokenStore


def described(store: TokenStore) -> dict[str, str]:
    """What its provenance says, and what it covers; a row for each fact.

    Args:
        store: Must have a provenance.
    """
    assert store.provenance is not None
    provenance, frames = store.provenance, len(store.values)
    source, lam, stride = provenance.dataset, provenance.lam, provenance.frame_stride
    codebook = f"codebook of {lam.num_codes}" if lam.num_codes else "no codebook"
    return {
        "dataset": f"{source.repo_id}, revision {source.revision or 'not recorded'}, {source.total_frames} "
        f"frames in {source.total_episodes} episodes at {source.fps:g} fps",
        "dataset digest": source.digest,
        "coverage": f"{store.coverage}; {frames - store.num_tokens} of {frames} frames have no token",
        "camera": provenance.camera_key,
        "stride": f"{stride} frame{'s' if stride > 1 else ''} = {provenance.stride_seconds:g} s",
        "LAM": lam.path + (f", revision {lam.revision}" if lam.revision else ""),
        "LAM fingerprint": lam.fingerprint,
        "tokens": f"{provenance.token_kind}, {lam.num_learned_tokens} × {lam.action_latent_dim} numbers "
        f"({codebook})",
        "context": provenance.context,
        "encoded in": f"{provenance.dtype} on {provenance.device}, decoder {provenance.decoder}",
        "stored as": f"{provenance.storage_dtype}, largest error {provenance.max_error:.2g}",
        "SHA-256": provenance.tensors_sha256,
        "made with": ", ".join(f"{name} {version}" for name, version in provenance.versions.items()),
    }
