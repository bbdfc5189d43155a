"""What goes wrong between a model and a hub, and what is said then; and the route of xet."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import timm
from huggingface_hub import HfApi, constants

import striate
from hub_helpers import assert_equal, log_in, saved_files, tiny
from hub_server import Hub
from striate.hub import AccessError, DamagedFileError, HubError, NotFoundError, StorageError, UnreachableError

DEAD = "http://127.0.0.1:9"  # nobody listens there


@pytest.fixture
def xet(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The store of a hub that speaks xet."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr(constants, "HF_XET_CACHE", str(tmp_path / "xet"))
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet"))
    hub.store = tmp_path / "store"
    hub.store.mkdir()
    return hub.store


def test_xet_both_ways(hub: Hub, xet: Path, tmp_path: Path) -> None:
    model = tiny()
    address = striate.push(model, "org/model", private=True)
    assert hub.repos["org/model"].head.files["model.safetensors"].xet is not None
    assert not hub.calls("PUT ")
    assert_equal(striate.create_model(address), model)
    assert_equal(striate.create_model("hf-hub:org/model", cache_dir=tmp_path / "other"), model)
    assert_equal(timm.create_model("hf-hub:org/model", pretrained=True), model)
    assert not hub.calls("GET .*/lfs/")
    assert striate.push(model, "org/model") == address
    striate.push(tiny(3), "org/model")
    assert striate.create_model("hf-hub:org/model").num_classes == 3


def test_a_damaged_store_is_noticed(hub: Hub, xet: Path, tmp_path: Path) -> None:
    """The client rebuilds a file from the store's chunks without looking at its sha256."""
    striate.push(tiny(), "org/model")
    whole = {path: path.read_bytes() for path in xet.rglob("*") if path.is_file() and path.stat().st_size > 100_000}
    for path, content in whole.items():
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(HubError) as error:
        striate.create_model("hf-hub:org/model", cache_dir=tmp_path / "other")
    assert isinstance(error.value, (DamagedFileError, UnreachableError))


def test_a_token_that_went_wrong_is_told_beside_a_warm_cache(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny()
    address = striate.push(model, "org/model", private=True)
    striate.create_model("hf-hub:org/model")
    for token, words in (("hf_wrong", "does not know the token"), (None, "wants a login")):
        log_in(monkeypatch, token)
        caplog.clear()
        assert_equal(striate.create_model("hf-hub:org/model"), model)
        (said,) = caplog.messages
        assert words in said
        assert f"the copy in {constants.HF_HUB_CACHE} is taken" in said
        assert "hf_wrong" not in said
    hub.log.clear()
    assert_equal(striate.create_model(address), model)  # a commit cannot change: nobody is asked
    assert not hub.log


def test_token_endpoint_and_cache_can_be_given(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log_in(monkeypatch, None)
    monkeypatch.setattr(constants, "ENDPOINT", DEAD)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", DEAD + "/{repo_id}/resolve/{revision}/{filename}")
    given = dict(token="hf_writer", endpoint=hub.url)
    model = tiny()
    for _ in range(2):  # made, and there already
        striate.push(model, "org/model", private=True, **given)  # type: ignore[arg-type]
    assert_equal(striate.create_model("hf-hub:org/model", cache_dir=tmp_path / "here", **given), model)
    assert list((tmp_path / "here").glob("models--org--model/snapshots/*/model.safetensors"))
    folder = striate.pull("org/model", tmp_path / "copy", cache_dir=tmp_path / "there", **given)  # type: ignore[arg-type]
    assert_equal(striate.create_model(f"local-dir:{folder}"), model)
    with pytest.raises(NotFoundError, match="wants a login"):
        striate.create_model("hf-hub:org/model", endpoint=hub.url, cache_dir=tmp_path / "new")
    with pytest.raises(ValueError, match="token and endpoint go with hf-hub:org/name"):
        striate.create_model("biformer_nano", token="hf_writer")


def test_gated(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    striate.push(tiny(), "org/model")
    hub.repos["org/model"].gated = True
    log_in(monkeypatch, None)
    with pytest.raises(AccessError, match="/org/model is gated; ask for access on that page"):
        striate.create_model("hf-hub:org/model")


def test_a_burst_of_errors_is_waited_out(hub: Hub, tmp_path: Path, sleeps: list[float]) -> None:
    model = tiny()
    striate.push(model, "org/model")
    bursts = [
        hub.fail("HEAD .*config", times=2, status=503),
        hub.fail("GET .*config", status=500),
        hub.fail("GET /org/model/lfs", times=3, status=502),
    ]
    assert_equal(striate.create_model("hf-hub:org/model"), model)
    assert [fault.times for fault in bursts] == [0, 0, 0]
    assert sleeps == [1, 2, 1, 1, 2, 4]
    hub.fail("HEAD .*config", times=99, status=503)
    with pytest.raises(UnreachableError, match="answers 503 .* try again later"):
        striate.create_model("hf-hub:org/model", cache_dir=tmp_path / "other")


def test_a_busy_hub_says_how_long(hub: Hub, sleeps: list[float]) -> None:
    model = tiny()
    striate.push(model, "org/model")
    hub.fail("HEAD .*config", status=429, headers={"Retry-After": "7"})
    assert_equal(striate.create_model("hf-hub:org/model"), model)
    assert sleeps == [7]


def test_a_hub_that_does_not_answer(hub: Hub, monkeypatch: pytest.MonkeyPatch, sleeps: list[float]) -> None:
    striate.push(tiny(), "org/model")
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.05)
    hub.fail("HEAD ", times=99, delay=0.4)
    with pytest.raises(UnreachableError, match="no answer from .*timed out"):
        striate.create_model("hf-hub:org/model")


def test_a_large_file_that_breaks_off_goes_on(hub: Hub, tmp_path: Path, sleeps: list[float]) -> None:
    """Over 10 MiB the client goes on from whole chunks; what it put together is compared as a whole."""
    args = dict(dims=(384, 384, 384, 384), depths=(1, 1, 1, 1), in_chans=1, num_classes=10)
    model = striate.create_model("biformer_nano", **args).eval()
    striate.push(model, "org/large")
    assert hub.repos["org/large"].head.files["model.safetensors"].size > 22 << 20
    hub.fail("GET /org/large/lfs", cut=11 << 20)
    found = striate.create_model("hf-hub:org/large")
    assert all(value.equal(found.state_dict()[key]) for key, value in model.state_dict().items())
    assert [call.headers.get("range") for call in hub.calls("GET /org/large/lfs")] == [None, f"bytes={10 << 20}-"]


def test_a_cache_that_is_only_read(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in it serves; what is not is an error that says where to put it."""
    model = tiny()
    striate.push(model, "org/model")
    striate.create_model("hf-hub:org/model")
    before = sorted(Path(constants.HF_HUB_CACHE).rglob("*"))
    striate.push(tiny(3), "org/two")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        for name in ("makedirs", "mkdir", "replace", "rename", "symlink"):
            patch.setattr(os, name, refuse)
        assert_equal(striate.create_model("hf-hub:org/model"), model)
        with pytest.raises(StorageError, match="cannot be written to .*Read-only file system.* cache_dir="):
            striate.create_model("hf-hub:org/two")
    assert sorted(Path(constants.HF_HUB_CACHE).rglob("*"))[: len(before)] == before


def test_a_full_disk(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    striate.push(model, "org/model")

    def fill(url: str, file: object, **_: object) -> None:
        file.write(b"the first bytes")  # type: ignore[attr-defined]
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.file_download, "http_get", fill)
        with pytest.raises(StorageError, match="no room in .*No space left on device.*free some"):
            striate.create_model("hf-hub:org/model")
        with pytest.raises(StorageError):
            striate.pull("org/model", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    assert_equal(striate.create_model("hf-hub:org/model"), model)


def test_two_processes_fetch_once(hub: Hub, tmp_path: Path) -> None:
    striate.push(tiny(), "org/model")
    hub.fail("GET /org/model/lfs", delay=0.5)  # time enough for the other one to want it too
    context = multiprocessing.get_context("fork")  # with the settings that make the server the Hub
    with context.Pool(2, huggingface_hub.close_session) as pool:
        folders = pool.map(striate.pull, ["org/model"] * 2, chunksize=1)
    assert len(set(folders)) == 1
    assert len(hub.calls("GET /org/model/lfs")) == 1


def test_a_hostile_repository_runs_nothing(hub: Hub, tmp_path: Path) -> None:
    files = saved_files(tmp_path / "m", 3)
    config = json.loads(files["config.json"])
    header = (
        b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    )
    twice = len(header).to_bytes(8, "little") + header + bytes(4)
    located = {**config, "pretrained_cfg": {**config["pretrained_cfg"], "file": "/etc/passwd", "custom_load": True}}
    absurd = {**config, "model_args": {**config["model_args"], "dims": [1 << 40] * 4}}
    for name, content, words in (
        ("twice", {**files, "model.safetensors": twice}, "twice|duplicate|damaged"),
        ("absurd", {**files, "config.json": json.dumps(absurd).encode()}, "cannot be created"),
    ):
        hub.add(f"org/{name}", content)
        with pytest.raises(ValueError, match=words):
            striate.create_model(f"hf-hub:org/{name}")
    hub.add("org/located", {**files, "config.json": json.dumps(located).encode()})
    found = striate.create_model("hf-hub:org/located").state_dict()
    wanted = safetensors.torch.load(files["model.safetensors"])
    assert all(value.equal(found[key]) for key, value in wanted.items())


def test_the_commit_of_a_push_is_compared_with_the_client(hub: Hub, tmp_path: Path) -> None:
    """What huggingface_hub's own check of a cache says about what we left there."""
    striate.push(tiny(), "org/model")
    folder = striate.pull("org/model")
    api = HfApi()
    if hasattr(api, "verify_repo_checksums"):
        assert not api.verify_repo_checksums("org/model").mismatches
    assert folder.name == hub.repos["org/model"].head.oid
