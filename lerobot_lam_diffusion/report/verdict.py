"""Good, doubtful or useless: one sentence at the top of the report, and why."""

from typing import NamedTuple

from lerobot_lam_diffusion.report.motion import StateProbe

GOOD, DOUBTFUL, USELESS = "good", "doubtful", "useless"
_GOOD_R2, _SOME_R2 = 0.3, 0.1
_COLLAPSED = 2.0  # perplexity


class Verdict(NamedTuple):
    word: str
    why: str


def judge(probe: StateProbe | None, perplexity: list[float], why_no_probe: str) -> Verdict:
    """Judge how useful the tokens are to a policy for this robot.

    Args:
        probe: None if there is none; `why_no_probe` then says why.
        perplexity: perplexity of each slot; empty for continuous tokens.
    """
    if perplexity and max(perplexity) < _COLLAPSED:
        return Verdict(
            USELESS, f"nearly all tokens have the same code (perplexity at most {max(perplexity):.1f})"
        )
    if probe is None:
        return Verdict(DOUBTFUL, f"cannot be judged from here: {why_no_probe}")
    best, gain = probe.best, probe.mean - probe.mean_shuffled
    described = (
        f"on held-out episodes they explain {probe.mean:.0%} of the state's change (R², mean over "
        f"dimensions; shuffled tokens {probe.mean_shuffled:.0%}), {probe.names[best]} best with "
        f"{max(probe.token[best], 0):.0%}"
    )
    if gain >= _GOOD_R2:
        return Verdict(GOOD, described)
    if gain >= _SOME_R2 or probe.token[best] >= _GOOD_R2:
        return Verdict(DOUBTFUL, described)
    return Verdict(USELESS, f"{described}: hardly more than chance")
