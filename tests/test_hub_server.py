"""Models pushed to and created from a Hub, with the real client against the loopback server of `hub_server`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import timm
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RevisionNotFoundError,
)

import striate
from hub_helpers import FILES, assert_equal, log_in, saved_files, tiny
from hub_server import Hub
from striate.hub import AccessError, DamagedFileError, HubError, NotFoundError, TokenError, UnreachableError


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
    for token, words in ((None, "wants a login"), ("hf_stranger", "may not be seen with this token")):
        log_in(monkeypatch, token)
        cache = tmp_path / f"cache of {token}"
        if private:
            with pytest.raises(NotFoundError, match=words):
                striate.create_model("hf-hub:org/model", cache_dir=cache)
        else:
            assert_equal(striate.create_model("hf-hub:org/model", cache_dir=cache), model)
    log_in(monkeypatch, "hf_wrong")
    with pytest.raises(TokenError, match="does not know the token; log in again"):
        striate.create_model("hf-hub:org/model", cache_dir=tmp_path / "wrong")


@pytest.mark.parametrize(
    ("token", "words"),
    [
        (None, "nobody is logged in"),
        ("hf_wrong", "does not know the token"),
        ("hf_reader", "ada may not write"),
        ("hf_stranger", "eve may not write"),
    ],
)
def test_who_may_not_write_changes_nothing(
    token: str | None, words: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = hub.add("org/model", {"README.md": b"---\nlicense: mit\n---\nmine"})
    log_in(monkeypatch, token)
    for name in ("org/model", "org/new"):
        with pytest.raises(AccessError, match=words) as error:
            striate.push(tiny(), name)
        assert str(token) not in str(error.value)
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
    with pytest.raises(NotFoundError, match="org/model has no branch, tag or commit 'v2'"):
        striate.create_model("hf-hub:org/model@v2")
    with pytest.raises(NotFoundError, match="org/model has no branch, tag or commit 'nowhere'"):
        striate.push(tiny(), "org/model@nowhere")
    with pytest.raises(ValueError, match="is a commit, which cannot change"):
        striate.push(tiny(), old.removeprefix("hf-hub:"))
    with pytest.raises(NotFoundError, match="there is no http.*/org/none, or it is private"):
        striate.create_model("hf-hub:org/none")
    with pytest.raises(NotFoundError, match="a new repository has no branch 'dev'"):
        striate.push(tiny(), "org/none@dev")
    assert "org/none" not in hub.repos


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
    with pytest.raises(UnreachableError, match="answers 404"):
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
    with pytest.raises(HubError, match=r"model\.safetensors.*nothing was published"):
        striate.push(tiny(), "org/model")
    assert [call.status for call in hub.calls("PUT ")] == [422]
    assert hub.repos["org/model"].head == before


@pytest.mark.parametrize(
    ("what", "tries"), [(dict(status=500), 4), (dict(drop=True), 4), (dict(status=403), 1), (dict(status=400), 1)]
)
def test_a_failed_commit_publishes_nothing(what: dict[str, Any], tries: int, hub: Hub, sleeps: list[float]) -> None:
    model = tiny(10)
    striate.push(model, "org/model")
    before = hub.repos["org/model"].head
    hub.log.clear()
    hub.fail("POST .*/commit/", times=tries, **what)
    with pytest.raises(HubError, match="no answer|answers|refuses"):
        striate.push(tiny(3), "org/model")
    assert len(hub.calls("POST .*/commit/")) == tries
    assert hub.repos["org/model"].head == before
    assert_equal(striate.create_model("hf-hub:org/model"), model)


@pytest.mark.parametrize("what", [dict(status=500), dict(drop=True), dict(lose=True)])
def test_a_commit_that_fails_at_first_is_made_once(what: dict[str, Any], hub: Hub, sleeps: list[float]) -> None:
    """Also when it was made and only the answer was lost."""
    striate.push(tiny(10), "org/model")
    hub.fail("POST .*/commit/", **what)
    model = tiny(3)
    address = striate.push(model, "org/model")
    repo = hub.repos["org/model"]
    assert len(list(repo.history(repo.head.oid))) == 3
    assert address == f"hf-hub:org/model@{repo.head.oid}"
    assert_equal(striate.create_model(address), model)


def test_a_push_that_meets_another_gives_way(hub: Hub, sleeps: list[float]) -> None:
    striate.push(tiny(10), "org/model")
    hub.fail("POST .*/commit/", hook=lambda: hub.add("org/model", {"notes.txt": b"of somebody else"}))
    with pytest.raises(HubError, match="changed by somebody else meanwhile; nothing was published"):
        striate.push(tiny(3), "org/model")
    repo = hub.repos["org/model"]
    assert "notes.txt" in repo.head.files
    assert striate.create_model("hf-hub:org/model").num_classes == 10
    striate.push(tiny(3), "org/model")
    assert striate.create_model("hf-hub:org/model").num_classes == 3


def test_other_bytes_on_the_hub_are_seen(hub: Hub) -> None:
    """A hub that stores something else than it was sent, which it alone has noticed."""

    def disturb() -> None:
        repo = hub.repos["org/model"]
        repo.objects = {oid: data[:-1] + b"x" for oid, data in repo.objects.items()}

    hub.fail("POST .*/commit/", hook=disturb)
    with pytest.raises(DamagedFileError, match="has other bytes at .* than were sent"):
        striate.push(tiny(), "org/model")


def test_a_repository_made_twice_is_made_once(hub: Hub, sleeps: list[float]) -> None:
    hub.fail("POST /api/repos/create", lose=True)
    model = tiny()
    striate.push(model, "org/model", private=True)
    assert hub.repos["org/model"].private
    assert_equal(striate.create_model("hf-hub:org/model"), model)


def test_recipe_metrics_and_tag_travel_along(hub: Hub, tmp_path: Path, sleeps: list[float]) -> None:
    story = dict(metrics={"top1": 50.0}, dataset="fashion_mnist", recipe="model:\n  name: biformer_nano\n")
    first = striate.push(tiny(10), "org/model", tag="v1", **story)
    folder = striate.pull("org/model@v1", tmp_path / "copy")
    assert (folder / "recipe.yaml").read_text() == story["recipe"]
    assert json.loads((folder / "metrics.json").read_text()) == {
        "dataset": "fashion_mnist",
        "metrics": {"top1": 50.0},
    }
    assert json.loads((folder / "config.json").read_text())["num_classes"] == 10
    log = len(hub.repos["org/model"].commits)
    model = striate.create_model(first)
    with pytest.raises(ValueError, match="tag v1 of org/model is at .* choose a new tag"):
        striate.push(tiny(3), "org/model", tag="v1")
    assert len(hub.repos["org/model"].commits) == log
    second = striate.push(model, "org/model", recipe="striate train --config x")
    assert {"recipe.yaml", "metrics.json"}.isdisjoint(hub.repos["org/model"].head.files)
    assert hub.repos["org/model"].head.files["recipe.txt"].data == b"striate train --config x\n"
    hub.fail("POST .*/tag/", times=4, status=503)
    with pytest.raises(HubError, match="is published at .*, but has no tag v2"):
        striate.push(model, "org/model", tag="v2", **story)
    third = striate.push(model, "org/model", tag="v2", **story)
    assert hub.repos["org/model"].tags == {"v1": first[-40:], "v2": third[-40:]}
    assert striate.push(model, "org/model", tag="v2", **story) == third != second


@pytest.mark.parametrize("status", [403, 404, 500])
def test_an_answer_that_is_none_never_loads_the_pickle(status: int, hub: Hub, sleeps: list[float]) -> None:
    model = timm.create_model("test_vit", num_classes=3)
    timm.models.push_to_hf_hub(model, "org/vit", model_args=dict(num_classes=3))
    assert "pytorch_model.bin" in hub.repos["org/vit"].head.files
    hub.fail(r"HEAD .*model\.safetensors", times=99, status=status)
    hub.log.clear()
    with pytest.raises(AccessError if status == 403 else UnreachableError, match=f"{status}|refuses"):
        striate.create_model("hf-hub:org/vit")
    assert hub.calls(r"HEAD .*model\.safetensors")
    assert not hub.calls(r".*\.bin")


@pytest.mark.parametrize("header", ["X-Repo-Commit", "ETag"])
def test_a_server_that_is_no_hub_is_refused(header: str, hub: Hub) -> None:
    striate.push(tiny(), "org/model")
    hub.fail("HEAD .*config", times=9, strip=(header,))
    with pytest.raises(UnreachableError, match=f"does not answer as a hub .*{header}"):
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
    with pytest.raises(UnreachableError, match="no answer from .* check the network"):
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
    with pytest.raises(DamagedFileError, match=r"model\.safetensors of hf-hub:org/m arrives damaged: its checksum"):
        striate.create_model("hf-hub:org/m")
    assert_equal(striate.create_model("hf-hub:org/m"), wanted)


def test_the_same_weights_are_the_same_file(hub: Hub, tmp_path: Path) -> None:
    model = tiny()
    files = []
    for number in range(4):
        striate.push(model, f"local-dir:{tmp_path / str(number)}")
        files.append((tmp_path / str(number) / "model.safetensors").read_bytes())
    assert len(set(files)) == 1
