"""Published weights: the table, and how `pretrained=True` fetches them. The only network here is the loopback."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import multiprocessing
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save

import striate
from striate.backbones import _fetch
from striate.backbones._fetch import download, fetch
from striate.backbones._hub_files import HubError
from striate.backbones._published import TABLE, TAG, UNPUBLISHED, Weights, hub_place, published
from striate.backbones._reading import CheckpointError
from striate.train import weights as weights_command

DIMS = dict(dims=(32, 32, 32, 32), depths=(1, 1, 1, 1))
ENTRIES = [weights for entries in TABLE.values() for weights in entries]
SHARES = {"api.onedrive.com", "drive.google.com", "connecthkuhk-my.sharepoint.com", "console.cloud.google.com"}
FILE, NAME = "/release/nano.pth", "nano.pth"


@dataclasses.dataclass
class Files:
    """What a server holds and what it is asked for; `cuts` ends its answers, one after the other, after some bytes."""

    content: dict[str, bytes]
    log: list[tuple[str, str | None, int]] = dataclasses.field(default_factory=list)  # path, Range, status
    cuts: list[int] = dataclasses.field(default_factory=list)
    knows_range: bool = True
    kind: str = "application/octet-stream"
    url: str = ""
    hook: Callable[[], object] = lambda: None

    def asked(self, path: str = FILE) -> list[tuple[str | None, int]]:
        return [(wanted, status) for p, wanted, status in self.log if p == path]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, files: Files, *args: object) -> None:
        self.files = files
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        self.files.hook()
        data = self.files.content.get(self.path)
        etag = f'"{hashlib.sha1(data or b"").hexdigest()}"'
        wanted = self.headers.get("Range")
        start = 0
        if data is not None and wanted and self.files.knows_range and self.headers.get("If-Range", etag) == etag:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        status = 404 if data is None else 416 if start and start >= len(data) else 206 if start else 200
        self.files.log.append((self.path, wanted, status))
        self.send_response(status)
        body = (data or b"")[start:] if status in (200, 206) else b""
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", self.files.kind)
        self.send_header("ETag", etag)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(data or b'') - 1}/{len(data or b'')}")
        self.end_headers()
        if body and self.files.cuts:
            body, self.close_connection = body[: self.files.cuts.pop(0)], True
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def files(monkeypatch) -> Iterator[Files]:
    held = Files({FILE: saved(nano())})
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, held))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    held.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv(_fetch.MIRRORS, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(_fetch, "WAITS", (0, 0, 0))
    huggingface_hub.close_session()
    yield held
    server.shutdown()
    server.server_close()
    huggingface_hub.close_session()


def nano(**kwargs: object) -> torch.nn.Module:
    return striate.create_model("biformer_nano", **DIMS, **kwargs)


def saved(model: torch.nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict()}, buffer)
    return buffer.getvalue()


def state_of(data: bytes) -> dict[str, torch.Tensor]:
    return torch.load(io.BytesIO(data), weights_only=True)["model"]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def entry(files, monkeypatch, tmp_path) -> Callable[..., Weights]:
    """Put one file of weights for biformer_nano into the table, linked from `files`; its cache is `tmp_path/hub`."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def put(**changes: object) -> Weights:
        known = dict(
            model="biformer_nano", tag="test_in1k", file=NAME, page="https://example.org/nano", size=64, licence="MIT",
            link=files.url + FILE, sha256=sha256(files.content[FILE]),
        )  # fmt: skip
        weights = Weights(**{**known, **changes})  # type: ignore[arg-type]
        monkeypatch.setitem(TABLE, "biformer_nano", (weights,))
        return weights

    return put


# The table


def test_every_model_is_published_or_it_is_known_why_not() -> None:
    assert sorted([*TABLE, *UNPUBLISHED]) == sorted(striate.list_models())
    assert all(UNPUBLISHED.values())


@pytest.mark.parametrize("weights", ENTRIES, ids=lambda w: w.name)
def test_entries_are_well_formed(weights) -> None:
    info = striate.model_info(weights.model)
    assert TAG.fullmatch(weights.tag)
    assert [w.tag for w in published(weights.model)].count(weights.tag) == 1
    assert re.fullmatch(r"[\w.-]+\.(pth|safetensors)", weights.file)
    assert weights.sha256 is None or re.fullmatch("[0-9a-f]{64}", weights.sha256)
    assert weights.licence == info.family.licence
    for address in filter(None, (weights.page, weights.link)):
        assert urlsplit(address).scheme == "https"
    if weights.link and urlsplit(weights.link).netloc not in SHARES:
        assert weights.link.endswith(f"/{weights.file}")
    resolution = re.search(r"_(\d+)$", weights.tag)
    assert weights.size == (int(resolution[1]) if resolution else info.input_size[1])


def test_the_default_weights_fit_the_registered_model() -> None:
    for name, entries in TABLE.items():
        assert not entries[0].args, name
        assert entries[0].input_size == striate.model_info(name).input_size
        if entries[0].top1 is not None and name != "metaspikformer_8_512":
            assert entries[0].top1 == striate.model_info(name).top1


def test_copies_at_timm_are_those_of_its_registry() -> None:
    copies = [(w, hub_place(mirror)[0]) for w in ENTRIES for mirror in w.mirrors if mirror.startswith("hf:timm/")]
    assert len(copies) > 40
    for weights, repository in copies:
        cfg = timm.get_pretrained_cfg(repository.removeprefix("timm/"))
        assert cfg.hf_hub_id == repository
        assert not cfg.url or cfg.url == weights.link
        mine = striate.model_info(weights.model).pretrained_cfg(weights)
        same = ("num_classes", "input_size", "mean", "std", "crop_mode", "interpolation")
        assert [getattr(mine, key) for key in same] == [getattr(cfg, key) for key in same], weights.name


def test_a_copy_on_a_hub() -> None:
    assert hub_place("hf:org/name") == ("org/name", None)
    assert hub_place("hf:org/name/folder/file.pth") == ("org/name", "folder/file.pth")


@pytest.mark.parametrize("tag", ["in1k", "ms_in1k_", "MS_in1k", "ms_in2k", "ms_in1k_224_384", "ms"])
def test_malformed_tags(tag) -> None:
    with pytest.raises(ValueError, match=f"weight tag '{tag}' is not <source>_<data set>"):
        _ = dataclasses.replace(ENTRIES[0], tag=tag).num_classes


# Tags


def test_a_tag_sets_classes_arguments_and_input() -> None:
    model = striate.create_model("maxvit_tiny.google_in1k_384", depths=(1, 1, 1, 1))
    assert model.model_args["img_size"] == 384
    assert model.pretrained_cfg["input_size"] == (3, 384, 384)
    assert (model.pretrained_cfg["crop_mode"], model.pretrained_cfg["mean"]) == ("squash", (0.5, 0.5, 0.5))
    model = timm.create_model("swin_tiny.ms_in22k", depths=(1, 1, 1, 1))
    assert model.num_classes == model.pretrained_cfg["num_classes"] == 21841
    model = striate.create_model("swin_tiny.ms_in22k", depths=(1, 1, 1, 1), num_classes=7)
    assert model.num_classes == model.pretrained_cfg["num_classes"] == 7


def test_a_name_without_a_tag_is_the_model_as_registered() -> None:
    model = striate.create_model("maxvit_xlarge", stem_dim=32, dims=(32, 32, 32, 32), depths=(1, 1, 1, 1))
    assert model.num_classes == model.pretrained_cfg["num_classes"] == 1000
    assert model.pretrained_cfg["tag"] == "google_in21k"
    assert "tag" not in nano().pretrained_cfg


def test_timm_knows_the_tags() -> None:
    tags = ["swin_tiny.ms_in1k", "swin_tiny.ms_in22k", "swin_tiny.ms_in22k_ft_in1k"]
    assert timm.list_pretrained("swin_tiny.*") == tags
    assert timm.list_models("biformer_tiny*", include_tags=True) == ["biformer_tiny.rayleizhu_in1k"]
    assert timm.list_pretrained("biformer_*") == []  # no link of theirs works
    cfg = timm.get_pretrained_cfg("maxvit_base.google_in21k")
    assert (cfg.hf_hub_id, cfg.url, cfg.num_classes) == ("timm/maxvit_base_tf_224.in21k", None, 21843)
    assert timm.get_pretrained_cfg("swin_tiny").url.endswith("/swin_tiny_patch4_window7_224.pth")


def test_a_tag_of_ours_goes_before_timms() -> None:
    assert isinstance(striate.create_model("davit_tiny.msft_in1k", depths=(1, 1, 1, 1)), striate.backbones.Backbone)


def test_unknown_tags() -> None:
    with pytest.raises(ValueError, match=r"no weights swin_tiny\.x: the tags are ms_in1k, ms_in22k_ft_in1k, ms_in22k;"):
        striate.create_model("swin_tiny.x")


# Fetching


@pytest.fixture
def loads(files) -> Callable[..., None]:
    """Assert that `pretrained=True` gives the weights that `files` holds."""
    wanted = state_of(files.content[FILE])

    def check(name: str = "biformer_nano", **kwargs: object) -> None:
        model = striate.create_model(name, pretrained=True, **DIMS, **kwargs)
        assert all(torch.equal(value, wanted[key]) for key, value in model.state_dict().items())

    return check


def test_the_link_is_fetched_once(files, entry, loads, tmp_path) -> None:
    entry()
    loads()
    loads("biformer_nano.test_in1k")
    model = timm.create_model("biformer_nano.test_in1k", pretrained=True, **DIMS)
    assert torch.equal(model.head.fc.weight, state_of(files.content[FILE])["head.fc.weight"])
    assert files.asked() == [(None, 200)]
    assert (tmp_path / "hub" / "checkpoints" / NAME).read_bytes() == files.content[FILE]
    loads(cache_dir=tmp_path / "mine")
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == [NAME, f"{NAME}.lock"]


def test_a_broken_download_goes_on_where_it_stopped(files, entry, loads) -> None:
    entry(sha256=None)
    files.cuts = [1000, 500]
    loads()
    assert files.asked() == [(None, 200), ("bytes=1000-", 206), ("bytes=1500-", 206)]


def test_the_next_call_goes_on_where_the_last_one_gave_up(files, entry, loads) -> None:
    weights = entry(sha256=None)
    files.cuts = [1000, 0, 0, 0]
    with pytest.raises(HubError, match=r"biformer_nano.test_in1k could not be fetched. http://.*page is https://ex"):
        fetch(weights)
    files.log.clear()
    loads()
    assert files.asked() == [("bytes=1000-", 206)]


def test_a_server_that_ignores_ranges_starts_anew(files, entry, loads) -> None:
    entry(sha256=None)
    files.cuts, files.knows_range = [1000], False
    loads()
    assert files.asked() == [(None, 200), ("bytes=1000-", 200)]


def test_parts_of_two_versions_are_not_joined(files, entry) -> None:
    """If-Range: the file may be another one by the time the download goes on."""
    weights = entry(sha256=None)
    files.cuts = [1000, 0, 0, 0]
    with pytest.raises(HubError):
        fetch(weights)
    files.content[FILE] = bytes(5000)
    assert fetch(weights).read_bytes() == bytes(5000)
    assert files.asked()[-1] == ("bytes=1000-", 200)


@pytest.mark.parametrize("note", ["", 'http://127.0.0.1/other\n"tag"', "{url}\n"])
def test_a_part_of_unknown_origin_is_not_used(files, tmp_path, note) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(b"x" * 1000)
    (tmp_path / f"{NAME}.part.version").write_text(note.format(url=files.url + FILE))
    assert download(files.url + FILE, tmp_path / NAME).read_bytes() == files.content[FILE]
    assert files.asked() == [(None, 200)]


def test_a_part_that_is_whole_or_too_long(files, tmp_path) -> None:
    """A process ended between the last byte and the renaming."""
    data = files.content[FILE]
    (tmp_path / f"{NAME}.part").write_bytes(data + b"x")
    (tmp_path / f"{NAME}.part.version").write_text(f'{files.url}{FILE}\n"{hashlib.sha1(data).hexdigest()}"')
    assert download(files.url + FILE, tmp_path / NAME).read_bytes() == data
    assert files.asked() == [(f"bytes={len(data) + 1}-", 416), (None, 200)]


def test_a_wrong_checksum_is_no_weight(files, entry, loads, tmp_path, monkeypatch) -> None:
    """The file is thrown away, the next place is asked, and the answer names what went wrong."""
    weights = entry()
    files.content["/mirror/" + NAME] = files.content[FILE]
    files.content[FILE] = bytes(len(files.content[FILE]))
    with pytest.raises(HubError, match=r"nano.pth: its sha256 is not that of the published file\. .*checkpoint_path="):
        fetch(weights)
    assert [p.name for p in (tmp_path / "hub" / "checkpoints").iterdir()] == [f"{NAME}.lock"]
    monkeypatch.setenv(_fetch.MIRRORS, f"{files.url}/wrong, {files.url}/mirror/")
    loads()
    assert [path for path, _, _ in files.log] == [FILE, "/wrong/" + NAME, "/mirror/" + NAME]


def test_a_damaged_file_in_the_cache_is_fetched_again(files, entry, loads, tmp_path, messages) -> None:
    entry()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / NAME).write_bytes(b"x")
    loads()
    assert any("is not the published file, so it is fetched again" in line for line in messages())


def test_a_web_page_is_no_file(files, entry, loads) -> None:
    weights = entry(sha256=None)
    files.kind = "text/html; charset=utf-8"
    with pytest.raises(HubError, match="the answer is a web page, not a file"):
        fetch(weights)
    files.kind = "application/octet-stream"
    loads()


def test_a_copy_on_a_hub_is_next(hub, files, entry, loads) -> None:
    entry(link=f"{files.url}/gone.pth", mirrors=("hf:org/empty", "hf:org/nano", "hf:org/never"))
    hub.add("org/empty", {"README.md": b""})
    hub.add("org/nano", {"model.safetensors": save(state_of(files.content[FILE]))})
    loads()
    assert files.asked("/gone.pth") == [(None, 404)]
    assert hub.calls("HEAD /org/nano/resolve/")
    assert not hub.calls(".*/org/never/")


def test_a_hub_without_safetensors_is_read_with_a_warning(hub, files, entry, loads, messages, tmp_path) -> None:
    hub.add("org/old", {"pytorch_model.bin": files.content[FILE]})
    loads(pretrained_cfg_overlay={"hf_hub_id": "org/old"})
    assert "org/old has no model.safetensors; pytorch_model.bin is read instead" in messages()
    hub.add("org/old", {"model.safetensors": b""})
    hub.fail(".* /org/old/resolve/.*model.safetensors", times=9, status=403)
    with pytest.raises(HubError, match="refuses|no answer|403"):
        loads(pretrained_cfg_overlay={"hf_hub_id": "org/old"}, cache_dir=tmp_path)


def test_a_link_in_the_config(files, entry, loads) -> None:
    entry()
    files.content["/some/other%20file.pth"] = files.content[FILE]
    loads(pretrained_cfg_overlay={"url": f"{files.url}/some/other%20file.pth"})
    with pytest.raises(HubError, match="the answer is 404"):
        loads(pretrained_cfg_overlay={"url": f"{files.url}/none.pth"})


def test_all_places_fail(files, entry, loads, monkeypatch, tmp_path) -> None:
    entry(link=f"{files.url}/gone.pth", note="key abcd")
    monkeypatch.setenv(_fetch.MIRRORS, f"{tmp_path},http://me:secret@127.0.0.1:9/x")
    with pytest.raises(HubError) as caught:
        loads()
    said = str(caught.value)
    assert f"{tmp_path / NAME}: no such file; http://127.0.0.1:9/x/{NAME}: " in said
    assert f"{files.url}/gone.pth: the answer is 404. The authors' page is https://example.org/nano (key abcd)." in said
    assert f"checkpoint_path=FILE with their file, or put it as {NAME} into a folder that STRIATE_MIRRORS names" in said
    assert "secret" not in said


@pytest.mark.parametrize("form", ["{}", "file://{}"])
def test_mirrors_may_be_folders(files, entry, loads, monkeypatch, tmp_path, form) -> None:
    """They are read where they are, also of a dead link and without the network."""
    entry(dead="since 2020 nobody answers")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "my mirror"
    folder.mkdir()
    (folder / NAME).write_bytes(files.content[FILE])
    monkeypatch.setenv(_fetch.MIRRORS, form.format(str(folder).replace(" ", "%20") if "file" in form else folder))
    loads()
    assert not (tmp_path / "hub").exists()
    (folder / NAME).write_bytes(b"x")
    with pytest.raises(HubError, match="its sha256 is not that of the published file"):
        loads()


def test_offline(files, entry, loads, monkeypatch, hub) -> None:
    entry(mirrors=("hf:org/nano",))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv(_fetch.MIRRORS, f"{files.url}/mirror")
    with pytest.raises(HubError, match=r"mirror/nano.pth: HF_HUB_OFFLINE is set; .*hf:org/nano: HF_HUB_OFFLINE is set"):
        loads()
    assert files.log == []
    assert hub.log == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv(_fetch.MIRRORS)
    loads()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    loads()
    assert files.asked() == [(None, 200)]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dead": "since 2020 nobody answers"}, "their link is dead: since 2020 nobody answers. The authors' page is "),
        (
            {"link": None},
            "the authors' page needs a browser. The authors' page is https://example.org/nano. Pass check",
        ),
    ],
)
def test_what_only_a_person_can_fetch(files, entry, loads, changes, reason) -> None:
    entry(**changes)
    with pytest.raises(CheckpointError, match="no working download of biformer_nano.test_in1k is known: ") as caught:
        loads()
    assert reason in str(caught.value)
    assert files.log == []


def test_two_at_once_fetch_once(files, entry) -> None:
    """A second process waits for the first one and takes what it has fetched."""
    weights = entry()
    begun, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        assert let_go.wait(60)

    files.hook = hold
    first = multiprocessing.get_context("fork").Process(target=fetch, args=(weights,))
    first.start()
    assert begun.wait(60)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(fetch, weights)
        with pytest.raises(TimeoutError):
            second.result(0.3)
        let_go.set()
        assert second.result(60).read_bytes() == files.content[FILE]
    first.join(60)
    assert first.exitcode == 0
    assert files.asked() == [(None, 200)]


def test_a_folder_of_weights(tmp_path, files, loads) -> None:
    with pytest.raises(CheckpointError, match=r"no weights in .*; model.safetensors, pytorch_model.bin,"):
        loads(pretrained_cfg_overlay={"file": str(tmp_path)})
    (tmp_path / "any.pth").write_bytes(files.content[FILE])
    loads(pretrained_cfg_overlay={"file": str(tmp_path)})
    (tmp_path / "other.pt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"holds any.pth, other.pt; name one of them"):
        loads(pretrained_cfg_overlay={"file": str(tmp_path)})
    (tmp_path / "pytorch_model.bin").write_bytes(files.content[FILE])
    loads(pretrained_cfg_overlay={"file": str(tmp_path)})


# The command


def test_the_command_lists_all_models(capsys) -> None:
    assert weights_command.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = {line.split()[0].partition(".")[0] for line in lines[1:]}
    assert names == set(striate.list_models())
    row = next(line for line in lines if line.startswith("swin_tiny.ms_in1k "))
    assert re.search(r"\byes +MIT +link, mirror +swin_tiny_patch4_window7_224\.pth", row)
    row = next(line for line in lines if line.startswith("biformer_tiny."))
    assert re.search(r"\bno +MIT +dead +biformer_tiny_in1k\.pth +https://github.com/rayleizhu/BiFormer", row)
    assert any(re.match(r"biformer_nano +no +- +none +it is a size of our own", line) for line in lines)


@pytest.mark.parametrize(
    ("changes", "row"),
    [
        ({}, ["yes", "MIT", "link"]),
        ({"link": None}, ["no", "MIT", "page"]),
        ({"link": None, "dead": "since 2020"}, ["no", "MIT", "dead"]),
        ({"dead": "since 2020", "mirrors": ("hf:org/nano",)}, ["yes", "MIT", "mirror"]),
    ],
)
def test_where_weights_are(entry, capsys, changes, row) -> None:
    entry(**changes)
    assert weights_command.main(["biformer_nano"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[1:4] == row


def test_the_command_in_json(capsys) -> None:
    assert weights_command.main(["vig_*y", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["model"] for entry in found] == ["vig_h_tiny", "vig_tiny"]
    assert found[0]["works"] is False
    assert found[0]["page"].startswith("https://huggingface.co/hustvl/ViG")
    with pytest.raises(ValueError, match="no model matches 'nothing'"):
        weights_command.main(["nothing"])
