"""`striate zoo`: a page of every model with its own numbers, which a browser sorts, searches, filters and draws."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import pytest

import striate
from striate.backbones import Family, ModelInfo
from striate.train import benchmark as bench
from striate.train import measure, zoo
from striate.train.measure import PeakMemory, Workload

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
OWN = "document.title='owned'"
EVIL = f'</script><script>{OWN}</script><img src=x onerror="{OWN}"><!--<script> \u2028'
ENVIRONMENT = measure.environment("cpu") | {"cpu": "Abacus 9", "threads": 2, "load_average": 0.25}


def report(*names: str, seconds: float = 2.0, size: int = 224, **environment: Any) -> dict[str, Any]:
    """As `striate benchmark` makes it, of a machine that is not this one; each further model takes twice as long."""
    work = {f"{'rival' if i else 'model'}/plain": Workload(name, "plain", 4, size, "float32", "cpu")
            for i, name in enumerate(names)}  # fmt: skip
    timings = {key: [seconds * 2**i] * 2 + [2 * seconds * 2**i] for i, key in enumerate(work)}
    limits = {"float32": SimpleNamespace(flops={"a": 400})}
    peaks = {key: PeakMemory(3 << 20, True) for key in work}
    made = bench.make_report(work, timings | {"float32 a": [1.0] * 3}, {"model": 200, "rival": 100}, peaks, limits)  # type: ignore[arg-type]
    return made | {"environment": ENVIRONMENT | environment}


def write(file: Path, *documents: Any, indent: int | None = None) -> Path:
    file.write_text("\n".join(json.dumps(document, indent=indent) for document in documents) + "\n")
    return file


class Elements(HTMLParser):
    """The elements of a page, and the text of its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.inside = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.scripts[-1] += data

    @property
    def data(self) -> dict[str, Any]:
        return dict(json.loads(self.scripts[0]))


def evil_model() -> ModelInfo:
    family = Family(EVIL, EVIL, f"javascript:{OWN}", f"https://example.org/{EVIL}", EVIL)
    return dataclasses.replace(striate.model_info("swin_tiny"), name=EVIL, family=family, pretraining=EVIL)


def test_every_model_is_there_with_its_own_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert zoo.main(["--out", str(tmp_path / "new" / "folder")]) == 0
    assert capsys.readouterr().out == f"written: {tmp_path / 'new' / 'folder' / 'index.html'}\n"
    data = Elements((tmp_path / "new" / "folder" / "index.html").read_text()).data
    assert [model["name"] for model in data["models"]] == striate.list_models()
    for model in data["models"]:
        info = striate.model_info(model["name"])
        for key in ("params", "gmacs", "top1", "pretraining"):
            assert model[key] == getattr(info, key), (info.name, key)
        assert model["input"] == list(info.input_size)
        family = data["families"][model["family"]]
        assert family == {key: getattr(info.family, key) for key in ("title", "paper", "source", "licence")}
        works = bool(model["weights"]) and model["weights"][0]["works"]
        argument = ", pretrained=True" if works else ""
        assert model["use"] == f'import striate; model = striate.create_model("{info.name}"{argument})'
    assert data["groups"] == []
    assert data["version"] == striate.__version__


def test_published_weights_are_told_as_they_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    known = SimpleNamespace(
        name="m.a_in1k", page="https://p", licence="MIT", top1=None, works=False, dead="gone", link=1
    )
    works = SimpleNamespace(**vars(known) | {"name": "m.b_in1k", "works": True, "dead": ""})
    info = striate.model_info("swin_tiny")

    def made(*weights: Any) -> dict[str, Any]:
        monkeypatch.setattr(zoo, "published", {info.name: weights}.__getitem__)
        return dict(Elements(zoo.render_zoo([info])).data["models"][0])

    told = made(works, known)
    assert told["weights"][1] == {
        "name": "m.a_in1k", "page": "https://p", "licence": "MIT", "top1": None, "works": False, "dead": "gone"
    }  # fmt: skip
    assert told["use"].endswith('create_model("swin_tiny", pretrained=True)')
    assert made(known, works)["use"].endswith('create_model("swin_tiny")'), "pretrained=True means the first"
    assert made()["use"].endswith('create_model("swin_tiny")')


def test_one_family(tmp_path: Path) -> None:
    assert zoo.main(["--out", str(tmp_path), "--family", "swinv2"]) == 0
    data = Elements((tmp_path / "index.html").read_text()).data
    assert [model["name"] for model in data["models"]] == striate.list_models(family="swinv2")
    assert list(data["families"]) == ["swinv2"]
    with pytest.raises(ValueError, match="no family 'nothing'"):
        zoo.main(["--out", str(tmp_path), "--family", "nothing"])


def test_the_page_needs_nothing_else() -> None:
    page = zoo.render_zoo([striate.model_info("swin_tiny")])
    elements = Elements(page)
    assert not {"link", "img", "iframe", "object", "embed"} & {tag for tag, _ in elements.found}
    assert not any({"src", "onclick", "style"} & attributes.keys() for _, attributes in elements.found)
    markup = page.replace(elements.scripts[0], "").replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:/[^\\]|url\(|@import|fetch\(|XMLHttp|import\(", markup)
    policy = next(attributes["content"] for tag, attributes in elements.found if "http-equiv" in attributes)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    assert "prefers-color-scheme: dark" in page


def test_strings_are_data_and_not_markup() -> None:
    elements = Elements(zoo.render_zoo([evil_model()]))
    assert len(elements.scripts) == 2
    assert not re.search(r"[<>&\u2028]", elements.scripts[0])
    assert elements.data["models"][0]["name"] == EVIL
    assert elements.data["families"][EVIL]["licence"] == EVIL


# Measurements


def read(*files: Path) -> tuple[list[zoo.Group], list[str]]:
    return zoo.read_benchmarks(files, [striate.model_info(name) for name in striate.list_models()])


def test_measurements_of_one_setting_are_one_group(tmp_path: Path) -> None:
    busy = report("swin_tiny", seconds=4.0, load_average=1.5)
    one = write(tmp_path / "one.json", report("biformer_tiny"), busy)
    two = write(tmp_path / "two.json", report("swinv2_tiny_window8_256", size=256), indent=1)
    (group,), remarks = read(one, two)
    assert remarks == []
    assert group.label == "Abacus 9 · 2 threads · batch 4 · float32 · inference"
    assert group.native
    assert sorted(group.models) == ["biformer_tiny", "swin_tiny", "swinv2_tiny_window8_256"]
    assert group.models["swin_tiny"] == {
        "speed": 1.0, "slow": pytest.approx(4 / 6), "fast": 1.0, "memory": 3 << 20, "exact": True, "rounds": 3
    }  # fmt: skip
    assert group.facts["torch"] == ENVIRONMENT["torch"]
    assert group.facts["images"] == "the model's own size"
    assert ["load average", "0.2 to 1.5"] in [list(fact) for fact in zoo._facts(group)]


def test_other_machines_settings_and_versions_are_other_groups(tmp_path: Path) -> None:
    other = report("swin_tiny")
    other["results"][0] |= {"mode": "train", "peak_memory_bytes": None}
    bfloat = report("swin_tiny")
    bfloat["results"][0] |= {"dtype": "bfloat16", "peak_memory_exact": False}
    large = report("swin_tiny") | {"batch": 16}
    documents = [
        report("swin_tiny"), report("swin_tiny", threads=1), report("swin_tiny", cpu="Slide rule"), other, bfloat,
        large, report("swin_tiny", size=256), report("swin_tiny", torch="9.9"),
        report("swin_tiny", variables={"OMP_X": "1"}), report("swin_tiny", gpu="Card 1"),
    ]  # fmt: skip
    groups, remarks = read(write(tmp_path / "all.json", *documents))
    assert remarks == []
    assert len(groups) == len(documents)
    labels = [group.label for group in groups]
    assert len(set(labels)) == len(labels)
    base = "Abacus 9 · 2 threads · batch 4 · float32 · inference"
    assert {"Card 1 · batch 4 · float32 · inference", "Abacus 9 · 1 thread · batch 4 · float32 · inference"} < set(
        labels
    )
    assert f"{base} · torch 9.9 · variables {zoo._plain(ENVIRONMENT['variables'])}" in labels
    assert any(label.startswith(base) and "variables OMP_X=1" in label for label in labels)
    (foreign,) = [group for group in groups if not group.native]
    assert foreign.label == f"{base} · 256 × 256"
    by_label = {group.label: group.models["swin_tiny"] for group in groups}
    assert by_label["Abacus 9 · 2 threads · batch 4 · float32 · training step"]["memory"] is None
    assert by_label["Abacus 9 · 2 threads · batch 4 · bfloat16 · inference"]["exact"] is False


def test_the_largest_group_comes_first_and_what_is_left_out_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = report("swin_tiny", seconds=8.0)
    file = write(tmp_path / "a.json", report("swin_tiny", cpu="A"), report("swin_tiny", "timm:resnet18"), again)
    more = write(tmp_path / "b.json", report("swin_small", "vig_tiny"))
    assert zoo.main(["--out", str(tmp_path), "--benchmarks", str(file), str(more)]) == 0
    data = Elements((tmp_path / "index.html").read_text()).data
    first, second = data["groups"]
    assert sorted(first["models"]) == ["swin_small", "swin_tiny", "vig_tiny"]
    assert first["models"]["swin_tiny"]["speed"] == 0.5, "the last one counts"
    assert first["models"]["vig_tiny"]["speed"] == 1.0
    assert second["label"].startswith("A · ")
    assert capsys.readouterr().err.splitlines() == [
        f"striate zoo: {file}: left out timm:resnet18: no model of this page",
        f"striate zoo: swin_tiny was measured more than once on {first['label']}; the last one counts",
    ]


def broken(path: str, value: Any) -> str:
    """A report of which one place is something else, or is missing."""
    document: Any = report("swin_tiny")
    *way, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    place = document
    for key in way:
        place = place[key]
    if value is KeyError:
        del place[last]
    else:
        place[last] = value
    return json.dumps(document)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("model  ms\nswin_tiny  3", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        (json.dumps(report("swin_tiny")) + "\n{", "is no JSON"),
        ("[1, 2]", "document 1 is no report of a model: the report is [1, 2], not an object"),
        (json.dumps(report("swin_tiny")) + '{"rows": [1]}', "document 2 … : the report has no 'batch'"),
        (json.dumps(report("timm:resnet18", "hf-hub:a/b")), "no model of this page, but timm:resnet18, hf-hub:a/b"),
        (broken("results", []), "'results' is empty"),
        (broken("environment", KeyError), "the report has no 'environment'"),
        (broken("environment.threads", "2"), "'threads' is '2', not a positive whole number"),
        (broken("batch", True), "'batch' is True, not a positive whole number"),
        (broken("results.0.name", 3), "'name' is 3, not a text"),
        (broken("results.0.mode", "fast"), "'mode' is 'fast', not plain, optimized, train"),
        (broken("results.0.images_per_second", float("nan")), "'images_per_second' is nan, not a positive number"),
        (broken("results.0.images_per_second", float("inf")), "'images_per_second' is inf, not a positive number"),
        (broken("results.0.seconds.q1", 0), "'q1' is 0, not a positive number"),
        (broken("results.0.peak_memory_bytes", -5), "'peak_memory_bytes' is -5, not a positive whole number"),
        (broken("results.0", "x" * 99), "a result is 'xxx … …, not an object"),
    ],
)  # fmt: skip
def test_what_is_no_file_of_measurements(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "index.html").write_text("the page before")
    file = tmp_path / "bench.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="; (write|leave) it") as caught:
        zoo.main(["--out", str(tmp_path), "--benchmarks", str(file)])
    message = str(caught.value)
    assert message.startswith(str(file))
    assert all(part in message for part in said.split(" … ")), message
    assert (tmp_path / "index.html").read_text() == "the page before"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe{")
    for name, said in (("none.json", "No such file"), ("bytes.json", "utf-8"), (".", "Is a directory")):
        with pytest.raises(ValueError, match=f"cannot be read .*{said}.*striate benchmark MODEL --json"):
            list(zoo.read_reports(tmp_path / name))


def test_the_folder_is_checked_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in ("file", "file/below"):
        with pytest.raises(ValueError, match=f"--out .*{out} cannot be made .*; give a folder that is yours"):
            zoo.main(["--out", str(tmp_path / out), "--benchmarks", str(tmp_path / "none.json")])
    (tmp_path / "taken" / "index.html").mkdir(parents=True)
    with pytest.raises(ValueError, match="--out .*index.html cannot be written"):
        zoo.main(["--out", str(tmp_path / "taken"), "--benchmarks", str(tmp_path / "none.json")])


# The page in a browser

HELPERS = """
<pre id="outcome"></pre><script>
const names = () => [...document.querySelectorAll("tr.model")].map(row => row.dataset.name);
const cells = key => [...document.querySelectorAll("tr.model")].map(row =>
  row.children[[...at("heads").children].findIndex(head => head.dataset.key === key)].textContent);
const head = key => document.querySelector(`#heads [data-key=${key}] button`);
const sorted = () => [...at("heads").children].filter(h => h.ariaSort).map(h => [h.dataset.key, h.ariaSort]);
const axis = key => document.querySelector(`#axes [data-key=${key}]`);
const put = (id, value, kind) => { at(id).value = value; at(id).dispatchEvent(new Event(kind)); };
const place = name => {
  const point = document.querySelector(`.point[data-name="${name}"]`);
  return point && point.getAttribute("transform").match(/-?[\\d.]+/g).map(Number);
};
const places = () => [...document.querySelectorAll(".point")].map(({dataset: {name}}) => [name, ...place(name)]);
const shownPoints = () => [...document.querySelectorAll(".point:not(.off)")].map(point => point.dataset.name).sort();
function pointer(kind, name) {
  const box = document.querySelector(`.point[data-name="${name}"] .mark`).getBoundingClientRect();
  const [clientX, clientY] = [box.x + box.width / 2 + 3, box.y + box.height / 2 + 3];
  at("chart").dispatchEvent(new PointerEvent(kind, {bubbles: true, clientX, clientY}));
}
const press = key => at("chart").dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
const tip = () => at("tip").hidden ? null : at("tip").innerText;
const opened = () => document.getElementById("details")?.innerText ?? null;
const out = {};
const pause = () => new Promise(resolve => setTimeout(resolve, 20));
(async () => { SCRIPT })().catch(error => { out.error = String(error.stack); }).finally(() => {
  at("outcome").textContent = encodeURIComponent(JSON.stringify(out));
});
</script></body>"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"the page is not driven: none of {', '.join(BROWSERS)} is installed (apt-get install chromium)")
    return found


def drive(browser: str, folder: Path, page: str, script: str, width: int = 1200) -> dict[str, Any]:
    """What `script` put into `out`, run in a copy of the page."""
    assert page.count("</body>") == 1
    file = folder / "driven.html"
    file.write_text(page.replace("</body>", HELPERS.replace("SCRIPT", script)), encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += [f"--window-size={width},900", "--virtual-time-budget=2000", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    match = re.search(r'<pre id="outcome">([^<]+)</pre>', done.stdout)
    assert match, f"{command} ended with {done.returncode} and no outcome:\n{done.stderr[-2000:]}"
    out = json.loads(unquote(match[1]))
    assert "error" not in out, out["error"]
    return dict(out)


def test_the_table_is_sorted_searched_and_filtered(browser: str, tmp_path: Path) -> None:
    infos = {name: striate.model_info(name) for name in striate.list_models()}
    script = """
    out.first = [names(), sorted()];
    head("params").click(); out.large = [names(), sorted()];
    head("params").click(); out.small = [names(), sorted(), cells("params")];
    head("top1").click(); out.best = [names(), cells("top1")];
    head("top1").click(); out.worst = names();
    head("title").click(); out.families = [names(), sorted()];
    head("name").click(); head("name").click(); out.backwards = names();
    put("search", " SWIN  22k ", "input"); out.searched = [names(), at("count").textContent, shownPoints()];
    put("search", "no such model", "input"); out.nothing = [names(), at("rows").innerText];
    put("search", "", "input"); put("family", "davit", "change"); out.family = [names(), shownPoints()];
    put("search", "tiny", "input"); out.both = names(); put("search", "", "input");
    document.querySelector("#legend [data-family=vig]").click(); out.chip = [names(), at("family").value];
    document.querySelector("#legend [data-family=vig]").click(); out.all = names().length;
    """
    out = drive(browser, tmp_path, zoo.render_zoo(list(infos.values())), script)
    assert out["first"] == [list(infos), [["name", "ascending"]]]
    for key, (got, marks, *_), order in (("params", out["large"], -1), ("params", out["small"], 1)):
        want = sorted(infos, key=lambda name: order * infos[name].params)
        assert got == want
        assert marks == [[key, "descending" if order < 0 else "ascending"]]
    assert out["small"][2] == [f"{infos[name].params:g}" for name in out["small"][0]]
    known = [name for name in infos if infos[name].top1 is not None]
    unknown = [name for name in infos if infos[name].top1 is None]
    assert out["best"][0] == [*sorted(known, key=lambda name: -(infos[name].top1 or 0)), *unknown]
    assert out["worst"] == [*sorted(known, key=lambda name: infos[name].top1 or 0), *unknown]
    assert out["best"][1][len(known) :] == ["not published"] * len(unknown)
    assert out["best"][1][: len(known)] == [f"{infos[name].top1:g}" for name in out["best"][0][: len(known)]]
    titles = [infos[name].family.title for name in out["families"][0]]
    assert titles[0] == "BiFormer"
    assert [title for i, title in enumerate(titles) if title not in titles[:i]] == sorted(set(titles), key=str.lower)
    assert out["families"][1] == [["title", "ascending"]]
    assert out["backwards"] == list(infos)[::-1]
    large = ["swin_large_window12_384", "swin_large"]
    assert out["searched"] == [large, f"2 of {len(infos)} models", sorted(large)]
    assert out["nothing"] == [[], "No model matches."]
    davit = striate.list_models(family="davit")[::-1]
    assert out["family"] == [davit, sorted(name for name in davit if name in known)]
    assert out["both"] == ["davit_tiny"]
    assert out["chip"] == [striate.list_models(family="vig")[::-1], "vig"]
    assert out["all"] == len(infos)


def check_places(places: list[tuple[str, float, float]], values: dict[str, float], infos: dict[str, ModelInfo]) -> None:
    """Points lie by the logarithm of their value to the right, and by their top-1 upwards."""
    assert sorted(name for name, _, _ in places) == sorted(values)
    known = [(math.log(values[name]), infos[name].top1 or 0.0, x, y) for name, x, y in places]
    low, high = min(known), max(known)
    for log, top1, x, y in known:
        assert x == pytest.approx(low[2] + (log - low[0]) / (high[0] - low[0]) * (high[2] - low[2]), abs=0.01)
        assert y == pytest.approx(low[3] + (top1 - low[1]) / (high[1] - low[1]) * (high[3] - low[3]), abs=0.01)
    assert high[2] - low[2] > 500, "more is to the right, over most of the width"
    assert (high[3] < low[3]) == (high[1] > low[1]), "better is higher"


def test_the_chart_shows_accuracy_over_what_is_asked_for(browser: str, tmp_path: Path) -> None:
    one = report("vig_tiny", "swin_large") | {"batch": 1}
    file = write(tmp_path / "a.json", report("vig_tiny", "swin_tiny"), report("biformer_tiny"), one)
    infos = {name: striate.model_info(name) for name in striate.list_models()}
    groups, _ = zoo.read_benchmarks([file], list(infos.values()))
    script = """
    const two = () => [places(), shownPoints(), at("absent").textContent];
    out.none = opened();
    out.gmacs = two(); out.pressed = axis("gmacs").ariaPressed + axis("params").ariaPressed;
    axis("params").click(); out.params = two();
    axis("speed").click(); out.speed = two(); out.cells = cells("speed").filter(cell => cell !== "not measured");
    out.options = [...at("group").options].map(option => option.textContent); out.memory = cells("memory").slice(-1);
    put("group", 1, "change"); out.other = two(); out.facts = at("facts").textContent;
    axis("gmacs").click();
    pointer("pointermove", "vig_tiny"); out.tip = tip();
    out.near = [...document.querySelectorAll(".point.near")].map(point => point.dataset.family);
    pointer("click", "vig_tiny");
    out.opened = [opened(), location.hash, document.querySelector("tr.chosen").dataset.name];
    out.links = [...document.querySelectorAll("#details a")].map(a => a.href);
    document.querySelector("tr.chosen button.name").click(); out.closed = [opened(), location.hash];
    press("ArrowRight"); const left = tip(); press("ArrowRight"); press("ArrowLeft"); out.arrows = [left, tip()];
    press("ArrowLeft"); out.last = tip(); press("Enter");
    out.entered = [location.hash, document.activeElement.dataset.model];
    at("chart").dispatchEvent(new Event("pointerleave")); out.left = tip();
    """
    out = drive(browser, tmp_path, zoo.render_zoo(list(infos.values()), groups), script)
    known = sorted(name for name in infos if infos[name].top1 is not None)
    absent = f"{len(infos) - len(known)} of {len(infos)} models have no published top-1 and are in the table only."
    for key in ("gmacs", "params"):
        assert out[key][1:] == [known, absent]
        check_places(out[key][0], {name: getattr(infos[name], key) for name in known}, infos)
    assert out["none"] is None
    assert out["pressed"] == "truefalse"
    assert out["speed"][1] == ["biformer_tiny", "swin_tiny", "vig_tiny"]
    check_places(out["speed"][0], {"vig_tiny": 2.0, "swin_tiny": 1.0, "biformer_tiny": 2.0}, infos)
    assert sorted(out["cells"]) == ["1", "2", "2"]
    assert out["memory"] == ["3"]
    assert out["options"] == [group.label for group in groups]
    check_places(out["other"][0], {"vig_tiny": 0.5, "swin_large": 0.25}, infos)
    assert out["facts"].startswith("Abacus 9 · 2 threads · batch 1 · float32 · inference: ")
    assert f"torch {ENVIRONMENT['torch']}" in out["facts"]
    vig = infos["vig_tiny"]
    assert out["tip"] == f"vig_tiny\n{vig.family.title}\n{vig.top1:g} % · {vig.gmacs:g} GMACs"
    assert set(out["near"]) == {"vig"}
    text, address, row = out["opened"]
    assert (address, row) == ("#vig_tiny", "vig_tiny")
    for said in ('striate.create_model("vig_tiny"', "MIT", "77.2 % as published", "2 images/s", "3 × 224 × 224"):
        assert said in text
    assert text.count("images/s (quartiles") == 2
    assert out["links"][:2] == [vig.family.paper, vig.family.source]
    assert out["closed"] == [None, ""]
    assert out["arrows"][0] == out["arrows"][1]
    assert out["arrows"][0].startswith("ecoformer_pvt_v2_b0"), "the fewest GMACs of those with a published top-1"
    assert out["last"].startswith("swin_large_window12_384")
    assert out["entered"] == ["#swin_large_window12_384", "swin_large_window12_384"], "and the keyboard is there too"
    assert out["left"] is None


def test_nothing_of_a_model_becomes_markup_and_a_phone_can_show_it(browser: str, tmp_path: Path) -> None:
    script = """
    document.querySelector("button.name").click();
    out.title = document.title; out.images = document.images.length; out.names = names(); out.text = opened();
    out.links = [...document.querySelectorAll("#details a")].map(a => a.protocol);
    out.wide = document.documentElement.scrollWidth - innerWidth; out.width = innerWidth;
    out.speed = [axis("speed").disabled, at("group").hidden, at("measured").hidden, at("unmeasured").hidden];
    out.unnamed = [...document.querySelectorAll("input, select, button")]
      .filter(control => !control.ariaLabel && !control.textContent.trim()).length;
    const said = () => document.querySelector(".use [role=status]").textContent;
    const board = {writeText: async text => { out.copied = text; }};
    Object.defineProperty(navigator, "clipboard", {value: board});
    document.querySelector(".copy").click(); await pause(); out.said = said();
    board.writeText = async () => { throw new Error("not allowed"); };
    document.execCommand = () => false;
    document.querySelector(".copy").click(); await pause(); out.refused = [said(), String(getSelection())];
    """
    model = evil_model()
    out = drive(browser, tmp_path, zoo.render_zoo([model, striate.model_info("davit_giant")]), script, width=500)
    assert (out["title"], out["images"], out["unnamed"]) == ("striate model zoo", 0, 0)
    assert out["names"] == [EVIL, "davit_giant"]
    assert f"javascript:{OWN}" in out["text"], "shown as text"
    assert set(out["links"]) <= {"https:"}
    assert out["width"] <= 500
    assert out["wide"] <= 0, "the page itself does not scroll sideways"
    assert out["speed"] == [True, True, True, False]
    use = f"import striate; model = striate.create_model({json.dumps(EVIL)})"
    assert (out["copied"], out["said"]) == (use, "copied")
    assert out["refused"][0] == "selected: copy it with the keyboard"
    assert out["refused"][1].split() == use.split()
