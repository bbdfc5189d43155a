"""Models pushed to and created from a Hub, with the real client against the loopback server of `hub_server`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from torch import nn

import striate
from hub_server import Hub, User

FILES = ["README.md", "config.json", "model.safetensors"]
USERS = {
    "hf_writer": User("ada", ("org",)),
    "hf_reader": User("ada", ("org",), can_write=False),
    "hf_stranger": User("eve"),
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """What huggingface_hub and timm take for the Hub, with an empty cache and the token of a writer to `org`."""
    with Hub(USERS) as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        settings = dict(
            ENDPOINT=server.url,
            HUGGINGFACE_CO_URL_TEMPLATE=template,
            HF_HUB_CACHE=str(tmp_path / "cache"),
            HF_TOKEN_PATH=str(tmp_path / "token"),
            HF_STORED_TOKENS_PATH=str(tmp_path / "tokens"),
            AGENT_HARNESSES_PATH=str(tmp_path / "agents.json"),
            HF_HUB_DISABLE_XET=True,
            HF_HUB_DISABLE_TELEMETRY=True,
            HF_HUB_OFFLINE=False,
        )
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value, raising=False)  # versions differ in what they have
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)  # of the functions without a class
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        huggingface_hub.close_session()  # one made earlier keeps the proxies of then
        log_in(monkeypatch, "hf_writer")
        yield server
        huggingface_hub.close_session()


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long huggingface_hub would have waited before it tried again."""
    waited: list[float] = []
    for module in (huggingface_hub.utils._http, huggingface_hub.file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=waited.append))
    return waited


def log_in(monkeypatch: pytest.MonkeyPatch, token: str | None) -> None:
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)


def tiny(num_classes: int = 10) -> nn.Module:
    args = dict(dims=(32, 32, 32, 32), depths=(1, 1, 1, 1), in_chans=1)
    return striate.create_model("biformer_nano", num_classes=num_classes, **args).eval()


def saved_files(folder: Path, num_classes: int) -> dict[str, bytes]:
    """What a push of `tiny` writes."""
    striate.push(tiny(num_classes), f"local-dir:{folder}")
    return {name: (folder / name).read_bytes() for name in FILES}


def assert_equal(found: nn.Module, wanted: nn.Module) -> None:
    state = wanted.state_dict()
    assert found.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in found.state_dict().items())
    x = torch.randn(2, *wanted.pretrained_cfg["input_size"])  # type: ignore[index, misc]
    assert torch.equal(found.eval()(x), wanted.eval()(x))


def test_the_server_answers_as_the_client_expects(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = HfApi()
    assert api.whoami()["name"] == "ada"
    url = api.create_repo("org/repo")
    assert url.repo_id == api.create_repo("org/repo", exist_ok=True).repo_id == "org/repo"
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("org/repo")
    with pytest.raises(HfHubHTTPError, match="may not write to other"):
        api.create_repo("other/repo")
    first = api.repo_info("org/repo").sha
    data = {"a.txt": b"text", "deep/er/w.bin": bytes(range(256)) * 9, "deep/empty.bin": b""}

    def commit(parent: str | None = None) -> str:
        adds = [CommitOperationAdd(path, content) for path, content in data.items()]
        return api.create_commit("org/repo", adds, commit_message="Add", parent_commit=parent).oid

    second = commit(first)
    assert commit() == second  # nothing is new
    assert len(hub.calls("PUT ")) == 1
    assert [item.commit_id for item in api.list_repo_commits("org/repo")] == [second, first]
    assert {path: api.file_exists("org/repo", path) for path in ("a.txt", "b.txt")} == {"a.txt": True, "b.txt": False}
    siblings = api.model_info("org/repo", files_metadata=True).siblings or ()
    sizes = {item.rfilename: item.size for item in siblings}
    assert {path: sizes[path] for path in data} == {path: len(content) for path, content in data.items()}
    assert set(api.list_repo_files("org/repo", revision=second)) == {".gitattributes", *data}
    assert {item.path for item in api.list_repo_tree("org/repo", "deep")} == {"deep/er", "deep/empty.bin"}
    text, weights = api.get_paths_info("org/repo", ["a.txt", "deep/er/w.bin", "none"])
    assert text.blob_id == "f3a34851d44d6b97c90fbb99dd3d18c261b9a237"  # type: ignore[union-attr]
    assert weights.lfs.sha256 == hashlib.sha256(data["deep/er/w.bin"]).hexdigest()  # type: ignore[union-attr]
    with pytest.raises(HfHubHTTPError, match="412"):
        data["a.txt"] = b"newer"
        commit(first)
    data["a.txt"] = b"text"
    with pytest.raises(EntryNotFoundError, match="doesn't exist"):
        api.create_commit("org/repo", [CommitOperationDelete("none")], commit_message="Remove")
    api.create_branch("org/repo", branch="dev/x", revision=first)
    api.create_tag("org/repo", tag="v1", revision=second)
    third = api.create_commit("org/repo", [CommitOperationDelete("deep/")], commit_message="Remove").oid
    refs = api.list_repo_refs("org/repo")
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": third, "dev/x": first}
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1": second}
    assert set(api.list_repo_files("org/repo")) == {".gitattributes", "a.txt"}
    folder = Path(api.snapshot_download("org/repo", revision="v1"))
    assert {path: (folder / path).read_bytes() for path in data} == data
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download("org/repo", "a.txt", revision="v2")
    hub.repos["org/repo"].gated = True
    log_in(monkeypatch, None)
    with pytest.raises(GatedRepoError):
        api.hf_hub_download("org/repo", "a.txt", cache_dir=tmp_path / "none")


def test_a_large_download_goes_on_where_it_broke(hub: Hub, tmp_path: Path, sleeps: list[float]) -> None:
    data = bytes(range(256)) * (1 << 16)  # 16 MiB; the client goes on from whole chunks of 10 MiB
    hub.add("org/big", {"w.bin": data})
    hub.fail("GET /org/big/lfs", cut=11 << 20)
    assert Path(huggingface_hub.hf_hub_download("org/big", "w.bin")).read_bytes() == data
    first, second = hub.calls("GET /org/big/lfs")
    assert "range" not in first.headers
    assert second.headers["range"] == f"bytes={10 << 20}-"
    assert second.status == 206
    hub.fail("GET /org/big/lfs", cut=11 << 20)
    hub.fail("GET /org/big/lfs", no_range=True)
    again = huggingface_hub.hf_hub_download("org/big", "w.bin", cache_dir=tmp_path / "again")
    assert Path(again).read_bytes() == data
    assert len(sleeps) == 2


@pytest.mark.parametrize("private", [False, True])
def test_round_trip(private: bool, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    address = striate.push(model, "org/model", private=private)
    repo = hub.repos["org/model"]
    assert repo.private == private
    assert address == f"hf-hub:org/model@{repo.head.oid}"
    assert sorted(repo.head.files) == [".gitattributes", *FILES]
    assert len(hub.calls("POST /api/models/org/model/commit/")) == 1
    assert repo.head.parent is not None
    assert repo.commits[repo.head.parent].parent is None
    assert_equal(striate.create_model("hf-hub:org/model"), model)
    assert_equal(striate.create_model(address, cache_dir=tmp_path / "other"), model)
    assert [call.status for call in hub.calls("GET /org/model/lfs/")] == [200, 200]
    assert {call.origin for call in hub.log} == {"hub", "cdn"}
    assert all("authorization" not in call.headers for call in hub.log if call.origin == "cdn")
    for token, error in ((None, RepositoryNotFoundError), ("hf_stranger", RepositoryNotFoundError)):
        log_in(monkeypatch, token)
        cache = tmp_path / f"cache of {token}"
        if private:
            with pytest.raises(error):
                striate.create_model("hf-hub:org/model", cache_dir=cache)
        else:
            assert_equal(striate.create_model("hf-hub:org/model", cache_dir=cache), model)
    log_in(monkeypatch, "hf_wrong")
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        striate.create_model("hf-hub:org/model", cache_dir=tmp_path / "wrong")


@pytest.mark.parametrize(
    ("token", "words"),
    [("hf_wrong", "Invalid credentials"), ("hf_reader", "ada may not write"), ("hf_stranger", "eve may not write")],
)
def test_who_may_not_write_changes_nothing(token: str, words: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    before = hub.add("org/model", {"README.md": b"---\nlicense: mit\n---\nmine"})
    log_in(monkeypatch, token)
    for name in ("org/model", "org/new"):
        with pytest.raises(HfHubHTTPError, match=words) as error:
            striate.push(tiny(), name)
        assert token not in str(error.value)
    assert hub.repos.keys() == {"org/model"}
    assert hub.repos["org/model"].head == before


def test_pushing_again(hub: Hub) -> None:
    first = striate.push(tiny(10), "org/model")
    model = tiny(3)
    second = striate.push(model, "org/model", metrics={"top1": 50.0}, dataset="fashion_mnist", commit_message="Better")
    assert first != second
    assert [commit.title for commit in hub.repos["org/model"].history(second[-40:])][:2] == ["Better", "Add model"]
    assert_equal(striate.create_model("hf-hub:org/model"), model)
    assert striate.create_model(first).num_classes == 10
    assert b"50" in hub.repos["org/model"].head.files["README.md"].data
    edited = hub.add("org/model", {"README.md": b"---\nlicense: mit\n---\nmine", "notes.txt": b"kept"})
    striate.push(tiny(4), "org/model")
    files = hub.repos["org/model"].head.files
    assert {name: files[name] for name in ("README.md", "notes.txt")} == {
        name: edited.files[name] for name in ("README.md", "notes.txt")
    }
    assert striate.create_model("hf-hub:org/model").num_classes == 4


def test_timm_loads_what_we_push(hub: Hub) -> None:
    for name, model in (("org/ours", tiny()), ("org/timms", striate.create_model("test_vit", num_classes=3))):
        striate.push(model, name)
        assert_equal(timm.create_model(f"hf-hub:{name}", pretrained=True), model)
    assert not hub.calls(r".*\.bin")


def test_we_load_what_timm_pushes(hub: Hub, tmp_path: Path) -> None:
    model = timm.create_model("test_vit", num_classes=3)
    timm.models.push_to_hf_hub(model, "org/vit", model_args=dict(num_classes=3))
    assert {"pytorch_model.bin", *FILES} < hub.repos["org/vit"].head.files.keys()
    assert_equal(striate.create_model("hf-hub:org/vit"), model)
    assert_equal(striate.create_model(f"local-dir:{striate.pull('org/vit', tmp_path / 'copy')}"), model)
    assert not hub.calls(r".*resolve.*\.bin")


def test_tags_branches_and_commits(hub: Hub) -> None:
    api = HfApi()
    models = {classes: tiny(classes) for classes in (2, 3, 4)}
    old = striate.push(models[2], "org/model")
    api.create_tag("org/model", tag="v1")
    api.create_branch("org/model", branch="dev/x")
    new = striate.push(models[3], "org/model@dev/x")
    striate.push(models[4], "org/model")
    wanted = {"": 4, "@main": 4, "@v1": 2, "@dev/x": 3, old[old.index("@") :]: 2, new[new.index("@") :]: 3}
    for revision, classes in wanted.items():
        assert_equal(striate.create_model(f"hf-hub:org/model{revision}"), models[classes])
    with pytest.raises(RevisionNotFoundError):
        striate.create_model("hf-hub:org/model@v2")
    with pytest.raises(RevisionNotFoundError):
        striate.push(tiny(), "org/model@nowhere")
    with pytest.raises(RepositoryNotFoundError):
        striate.create_model("hf-hub:org/none")


def test_a_push_in_between_does_not_mix_commits(hub: Hub, tmp_path: Path) -> None:
    files = saved_files(tmp_path / "new", 3)
    model = tiny(10)
    striate.push(model, "org/model")
    for pattern, read in (
        (r"HEAD .*model\.safetensors", striate.create_model),
        (r"GET /org/model/lfs", lambda source: striate.create_model(f"local-dir:{striate.pull(source)}")),
        (r"HEAD .*README\.md", lambda source: striate.create_model(f"local-dir:{striate.pull(source)}")),
    ):
        old = hub.repos["org/model"].head
        fault = hub.fail(pattern, hook=lambda: hub.add("org/model", files))
        constants.HF_HUB_CACHE = str(tmp_path / pattern[-6:])  # the fixture puts it back
        assert_equal(read("hf-hub:org/model"), model)
        assert fault.times == 0
        assert hub.repos["org/model"].head != old
        hub.add("org/model", {name: blob.data for name, blob in old.files.items()})


def test_pull(hub: Hub, tmp_path: Path) -> None:
    striate.push(tiny(), "org/model")
    stored = {name: blob.data for name, blob in hub.repos["org/model"].head.files.items() if name in FILES}
    for folder in (striate.pull("org/model"), striate.pull("hf-hub:org/model@main", tmp_path / "copy")):
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == stored
    hub.fail("GET /org/two/lfs", times=99, status=404)
    hub.add("org/two", stored)
    with pytest.raises(HfHubHTTPError, match="404"):
        striate.pull("org/two", tmp_path / "two")
    assert not (tmp_path / "two").exists()


def test_failing_uploads_are_tried_again(hub: Hub, sleeps: list[float]) -> None:
    bursts = [
        hub.fail(f".*{path}", times=2, status=status)
        for path, status in (("/preupload/", 502), ("/info/lfs/objects/batch", 503), ("/lfs/verify", 500))
    ]
    bursts += [hub.fail("PUT ", status=500), hub.fail("PUT ", drop=True), hub.fail("PUT ", lose=True)]
    model = tiny()
    striate.push(model, "org/model")
    assert [fault.times for fault in bursts] == [0] * len(bursts)
    assert len(sleeps) == 9
    assert len(hub.calls("POST /api/models/org/model/commit/")) == 1
    assert_equal(striate.create_model("hf-hub:org/model"), model)


def test_an_upload_that_arrives_differently_is_refused(hub: Hub) -> None:
    before = hub.add("org/model", {})
    hub.fail("PUT ", corrupt=-1)
    with pytest.raises(RuntimeError, match=r"model\.safetensors"):
        striate.push(tiny(), "org/model")
    assert [call.status for call in hub.calls("PUT ")] == [422]
    assert hub.repos["org/model"].head == before


@pytest.mark.parametrize("what", [dict(status=500), dict(drop=True), dict(status=412)])
def test_a_failed_commit_publishes_nothing(what: dict[str, Any], hub: Hub) -> None:
    model = tiny(10)
    striate.push(model, "org/model")
    before = hub.repos["org/model"].head
    hub.fail("POST .*/commit/", **what)
    with pytest.raises(Exception, match="|".join(map(str, (*what.values(), "disconnected", "reset")))):
        striate.push(tiny(3), "org/model")
    assert len(hub.calls("POST .*/commit/")) == 2
    assert hub.repos["org/model"].head == before
    assert_equal(striate.create_model("hf-hub:org/model"), model)


@pytest.mark.parametrize("status", [403, 404, 500])
def test_an_answer_that_is_none_never_loads_the_pickle(status: int, hub: Hub, sleeps: list[float]) -> None:
    model = timm.create_model("test_vit", num_classes=3)
    timm.models.push_to_hf_hub(model, "org/vit", model_args=dict(num_classes=3))
    assert "pytorch_model.bin" in hub.repos["org/vit"].head.files
    hub.fail(r"HEAD .*model\.safetensors", times=99, status=status)
    hub.log.clear()
    with pytest.raises(LocalEntryNotFoundError):
        striate.create_model("hf-hub:org/vit")
    assert hub.calls(r"HEAD .*model\.safetensors")
    assert not hub.calls(r".*\.bin")


@pytest.mark.parametrize("header", ["X-Repo-Commit", "ETag"])
def test_a_server_that_is_no_hub_is_refused(header: str, hub: Hub) -> None:
    striate.push(tiny(), "org/model")
    hub.fail("HEAD .*config", times=9, strip=(header,))
    with pytest.raises(LocalEntryNotFoundError):
        striate.create_model("hf-hub:org/model")


def test_broken_downloads_are_tried_again(hub: Hub, sleeps: list[float]) -> None:
    model = tiny()
    striate.push(model, "org/model")
    hub.fail("GET /org/model/lfs", cut=1000)
    hub.fail("GET /org/model/lfs", drop=True)
    hub.fail("GET /org/model/resolve/.*/config", cut=10)
    assert_equal(striate.create_model("hf-hub:org/model"), model)
    assert len(hub.calls("GET /org/model/lfs")) == 3


def test_other_content_in_a_repository_is_said(hub: Hub, tmp_path: Path) -> None:
    files = saved_files(tmp_path / "m", 3)
    config = {**json.loads(files["config.json"]), "num_classes": "3"}
    lacking = {name: data for name, data in files.items() if name != "model.safetensors"}
    state = {key: value[:1] for key, value in tiny(3).state_dict().items() if value.ndim == 4}
    for name, content, words in (
        ("pointer", {**files, "model.safetensors": b"version https://git-lfs.github.com/spec/v1\n"}, "git-lfs"),
        ("page", {**files, "model.safetensors": b"<html>"}, "web page"),
        ("short", {**files, "model.safetensors": files["model.safetensors"][:-1]}, "damaged"),
        ("shapes", {**files, "model.safetensors": safetensors.torch.save(state)}, "biformer_nano|fit"),
        ("config", {**files, "config.json": json.dumps(config).encode()}, "'num_classes' is '3'"),
        ("pickle", {**lacking, "pytorch_model.bin": b"x"}, r"has no model\.safetensors"),
    ):
        hub.add(f"org/{name}", content)
        with pytest.raises(ValueError, match=words):
            striate.create_model(f"hf-hub:org/{name}")
    assert not hub.calls(r".*\.bin")


def test_without_the_server_the_cache_serves(
    hub: Hub, tmp_path: Path, sleeps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny()
    striate.push(model, "org/model")
    striate.create_model("hf-hub:org/model")
    hub.log.clear()
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert_equal(striate.create_model("hf-hub:org/model"), model)
    hub.close()
    huggingface_hub.close_session()  # it holds connections that still work
    assert_equal(striate.create_model("hf-hub:org/model"), model)
    with pytest.raises(LocalEntryNotFoundError):
        striate.create_model("hf-hub:org/model", cache_dir=tmp_path / "empty")
    assert hub.log == []


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_file_is_fetched_once_more(hub: Hub, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """One byte is another one, which neither huggingface_hub nor safetensors notices; the same in the cache."""
    model = tiny()
    striate.push(model, "org/m")
    place = "lfs" if name == "model.safetensors" else "resolve/.*config.json"
    offset = -1 if name == "model.safetensors" else -3
    hub.fail(f"GET /org/m.*{place}", corrupt=offset)
    assert_equal(striate.create_model("hf-hub:org/m"), model)
    assert f"{name} of hf-hub:org/m is damaged, so it is fetched once more" in caplog.text
    caplog.clear()
    path = striate.pull("org/m") / name
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.resolve().write_bytes(content)
    assert_equal(striate.create_model("hf-hub:org/m"), model)
    assert "is damaged" in caplog.text
    caplog.clear()
    assert_equal(striate.create_model("hf-hub:org/m"), model)
    assert not caplog.text


def test_a_file_that_stays_damaged_is_refused(hub: Hub) -> None:
    wanted = tiny()
    striate.push(wanted, "org/m")
    hub.fail("GET /org/m.*lfs", times=2, corrupt=-1)
    with pytest.raises(ValueError, match=r"model\.safetensors of hf-hub:org/m arrives damaged: its checksum"):
        striate.create_model("hf-hub:org/m")
    assert_equal(striate.create_model("hf-hub:org/m"), wanted)


def test_the_same_weights_are_the_same_file(hub: Hub, tmp_path: Path) -> None:
    model = tiny()
    files = []
    for number in range(4):
        striate.push(model, f"local-dir:{tmp_path / str(number)}")
        files.append((tmp_path / str(number) / "model.safetensors").read_bytes())
    assert len(set(files)) == 1
