"""The report of a store: what it says, and how a browser takes it."""

import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from lerobot_lam_diffusion.lam.fit.report import axis_r2, ridge_predictions
from lerobot_lam_diffusion.report.build import write_report
from lerobot_lam_diffusion.report.codes import read_codes
from lerobot_lam_diffusion.report.frames import Footage
from lerobot_lam_diffusion.report.motion import StateProbe
from lerobot_lam_diffusion.report.verdict import DOUBTFUL, GOOD, USELESS, judge

from ..conftest import TOP, with_rows_beyond

CHROMIUM = os.environ.get("LAM_CHROMIUM") or shutil.which("chromium")


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.images, self.links, self.tags = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        if tag == "img":
            self.images.append(attrs)
        self.links += [attrs[name] for name in ("src", "href") if name in attrs]


@pytest.fixture(scope="module")
def page(store, dataset, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(store, Footage(dataset, TOP), path)
    return path


def test_page_stands_alone_and_every_picture_has_a_text(page):
    found = Page(page.read_text())
    assert len(found.images) > 5
    assert all(image["alt"].strip() for image in found.images)
    assert all(link.startswith("data:") for link in found.links)
    assert "script" not in found.tags


def test_questions_come_in_order(page):
    titles = re.findall("<h2>(.*?)</h2>", page.read_text())
    assert titles == [
        "Do the tokens say what moved?",
        "What does each code mean?",
        "Are they used?",
        "Where in time?",
        "What is this?",
    ]


@pytest.mark.slow
def test_same_seed_same_page(page, store, dataset, tmp_path):
    write_report(store, Footage(dataset, TOP), tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == page.read_bytes()


def test_store_alone_gives_the_parts_without_frames(store, tmp_path):
    verdict = write_report(store, None, tmp_path / "r.html")
    assert verdict.word == DOUBTFUL
    titles = re.findall("<h2>(.*?)</h2>", (tmp_path / "r.html").read_text())
    assert "Are they used?" in titles
    assert "Where in time?" not in titles


def test_continuous_tokens_have_bins_instead_of_codes(continuous_store, dataset, tmp_path):
    write_report(continuous_store, Footage(dataset, TOP), tmp_path / "r.html")
    assert "principal direction" in (tmp_path / "r.html").read_text()


def test_codes_count_what_the_store_holds(store):
    codes = read_codes(store, list(range(len(store.episode_row))), seed=0)
    assert torch.equal(codes.frames, store.frames_with_tokens())
    for slot, counts in enumerate(store.code_counts()):
        assert torch.allclose(codes.shares(slot), counts.double() / counts.sum())
    assert torch.equal(store.codebook[codes.labels].flatten(1), store.window(codes.frames, [0])[:, 0])


def test_shares_of_transitions_sum_to_one(store):
    rows = read_codes(store, list(range(len(store.episode_row))), seed=0).transitions(0).sum(1)
    assert all(abs(total - 1) < 1e-9 or total == 0 for total in rows.tolist())


@pytest.mark.slow
def test_rows_beyond_the_last_episode_are_no_frames(store, dataset, tmp_path):
    root = with_rows_beyond(dataset, tmp_path / "data")
    opened = LeRobotDataset(dataset.repo_id, root=root, video_backend="pyav", return_uint8=True)
    write_report(store, Footage(opened, TOP), tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_collapsed_tokens_are_useless():
    assert judge(None, [1.0, 1.2], "no dataset").word == USELESS


@pytest.mark.parametrize(
    ("token", "shuffled", "word"),
    [
        ([0.3, 0.3], [0.0, 0.0], GOOD),
        ([0.9, -50.0], [0.0, 0.0], GOOD),  # an axis that is predicted worse than by its mean counts as 0
        ([0.28, 0.3], [0.0, 0.0], DOUBTFUL),
        ([0.4, 0.4], [0.2, 0.2], DOUBTFUL),  # what shuffled tokens reach does not count
        ([0.3, 0.0, 0.0, 0.0], [0.0] * 4, DOUBTFUL),  # one dimension is explained well
        ([0.09, 0.09], [0.0, 0.0], USELESS),
    ],
)
def test_the_verdict_follows_from_what_the_tokens_explain(token, shuffled, word):
    names = [f"state[{axis}]" for axis in range(len(token))]
    nothing = torch.zeros(0, len(token))
    assert judge(StateProbe(names, [], token, shuffled, nothing, nothing, [0]), [20.0], "").word == word


def test_r2_of_each_axis():
    tokens = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)).double()
    noise = torch.randn(500, generator=torch.Generator().manual_seed(1)).double()
    changes = torch.stack([3 * tokens[:, 0], noise], dim=1)
    known, unknown = axis_r2(ridge_predictions(tokens[:300], changes[:300], tokens[300:]), changes[300:])
    assert known > 0.99
    assert unknown < 0.1


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no browser: set LAM_CHROMIUM=$(.ci/fetch_chromium DIR)")
def test_browser_has_nothing_to_complain_of(page, tmp_path):
    probe = tmp_path / "probe.html"
    measure = (
        "<script>addEventListener('load', () => console.log('MEASURED', "
        "document.documentElement.scrollWidth <= innerWidth, "
        "performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length, "
        "[...document.images].every(i => i.complete && i.naturalWidth > 0)))</script></body>"
    )
    probe.write_text(page.read_text().replace("</body>", measure))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    # Headless Chromium has no window narrower than 500, so the phone is a frame of 375 inside one.
    frame = tmp_path / "frame.html"
    frame.write_text(
        '<link rel="icon" href="data:,"><iframe src="probe.html" width="375" height="800"></iframe>'
    )
    done = subprocess.run(
        [CHROMIUM, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", f"file://{frame}"],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert len(console) == 1, console
    assert "MEASURED true 0 true" in console[0]
