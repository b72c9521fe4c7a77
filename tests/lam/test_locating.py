"""Where models are found: folders, shipped names, and a Hub that is a server on this machine."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lerobot_lam_diffusion.lam import load_lam, resolve_lam, shipped_lams
from lerobot_lam_diffusion.utils.errors import LamError

COMMIT = "c0ffee" + "0" * 34


def test_a_folder_or_its_lam_folder(make_lam_folder, tmp_path):
    folder = make_lam_folder("checkpoint/lam")
    assert resolve_lam(folder) == folder
    assert resolve_lam(str(tmp_path / "checkpoint")) == folder
    assert load_lam(tmp_path / "checkpoint").path == folder


def test_nothing_there(tmp_path):
    with pytest.raises(LamError, match=r"no LAM at '.*nowhere'(.|\n)*Hub id(.|\n)*Correct the path"):
        resolve_lam(tmp_path / "nowhere")
    with pytest.raises(LamError, match=r"holds no model_config\.json"):
        resolve_lam(tmp_path)


def test_shipped_names():
    for name in shipped_lams():
        assert load_lam(name).revision is None


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's interface as a snapshot download of one model repository asks for."""

    files: dict[str, bytes] = {}  # noqa: RUF012

    def do_GET(self):
        self.reply(body=True)

    def do_HEAD(self):
        self.reply(body=False)

    def reply(self, body: bool):
        path = self.path.split("?")[0]
        api = "/api/models/someone/a-lam"
        if path in (f"{api}/revision/{ref}" for ref in ("main", "v1", COMMIT)) or path == api:
            siblings = [{"rfilename": name} for name in self.files]
            content = json.dumps({"id": "someone/a-lam", "sha": COMMIT, "siblings": siblings}).encode()
        elif path.startswith(f"{api}/tree/"):
            sizes = {name: len(data) for name, data in self.files.items()}
            entries = [{"type": "file", "path": p, "size": size, "oid": "0"} for p, size in sizes.items()]
            content = json.dumps(entries).encode()
        else:
            content = self.files.get(path.removeprefix(f"/someone/a-lam/resolve/{COMMIT}/"))
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "RevisionNotFound" if "a-lam" in path else "RepoNotFound")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(make_lam_folder):
    """A server with one repository: the model in its folder lam/, and a large file that nobody wants."""
    folder = make_lam_folder("remote")
    Hub.files = {f"lam/{p.name}": p.read_bytes() for p in folder.iterdir()} | {"policy.bin": b"x" * 1000}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


_LOOK = """
import sys
from lerobot_lam_diffusion.lam.locating import locate_lam
from lerobot_lam_diffusion.utils.errors import LamError
for path, revision in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        folder, commit = locate_lam(path, revision or None)
        inside, beside = (sorted(p.name for p in f.iterdir()) for f in (folder, folder.parent))
        print("found", commit, inside, beside)
    except LamError as error:
        print("error", error)
"""


def look(endpoint, cache, *questions, offline=False):
    """Ask in another process: huggingface_hub reads its settings on import. Returns a line per question."""
    environment = dict(os.environ, HF_ENDPOINT=endpoint, HF_HOME=str(cache), HF_HUB_OFFLINE=str(int(offline)))
    command = [sys.executable, "-c", _LOOK, *(word for question in questions for word in question)]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return output.strip().splitlines()


@pytest.mark.slow
def test_hub(hub, tmp_path):
    cache = tmp_path / "cache"
    lines = look(
        hub, cache,
        ("someone/a-lam", ""), ("someone/a-lam", "v1"), ("someone/a-lam", "nope"), ("someone/else", ""),
    )  # fmt: skip
    found = f"found {COMMIT} ['model.safetensors', 'model_config.json'] ['lam']"
    assert lines[:2] == [found, found]
    assert "LAM at 'someone/a-lam' at revision 'nope'" in lines[2]
    assert "Revision Not Found" in lines[2]
    assert "LAM at 'someone/else'" in lines[3]
    assert "Repository Not Found" in lines[3]
    # The cache serves it offline, and an absent one says how to get it.
    lines = look(hub, cache, ("someone/a-lam", ""), ("someone/other", ""), offline=True)
    assert lines[0] == found
    assert "HF_HUB_OFFLINE" in lines[1]
