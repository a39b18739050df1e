"""Downloads by the hub's real client, from a server on this machine that refuses in every way."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from src.errors import UserError
from src.models.load import load_pipeline

import pytest

pytestmark = [pytest.mark.sd3, pytest.mark.slow]

ANSWERS = {
    "gated": (401, {"X-Error-Code": "GatedRepo"}),
    "not yet granted": (403, {"X-Error-Code": "GatedRepo"}),
    "gone": (404, {"X-Error-Code": "EntryNotFound"}),
}


@contextmanager
def hub(status: int, headers: dict[str, str]) -> Iterator[str]:
    """The address of a hub that gives one answer to everything."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD = answer

        def log_message(self, *words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return constants


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("gated", ["accept its licence at https://huggingface.co/", "hf auth login"]),
        ("not yet granted", ["accept its licence", "hf auth login"]),
        ("gone", ["--checkpoint"]),
    ],
)
def test_a_refusal_names_the_way_out(monkeypatch, empty_cache, answer, words):
    with hub(*ANSWERS[answer]) as address:
        monkeypatch.setattr(empty_cache, "ENDPOINT", address)
        monkeypatch.setattr(
            empty_cache,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            address + "/{repo_id}/resolve/{revision}/{filename}",
        )
        with pytest.raises(UserError) as error:
            load_pipeline("sd3-medium")
    assert all(word in str(error.value) for word in [*words, "the weights of sd3-medium"])


def test_offline_names_the_way_out(monkeypatch, empty_cache):
    monkeypatch.setattr(empty_cache, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError,
        match=r"does not hold the weights of sd3-medium, .*cannot be reached.*--checkpoint",
    ):
        load_pipeline("sd3-medium")
