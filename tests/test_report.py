"""`striate report`: a page that stands alone, shows what the run logged, and lets nothing through as markup."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from striate.train.cli import main
from striate.train.report import MAX_POINTS, Curve, draw_curves, read_confusion, thin, ticks

EVIL = '<script>alert("x")</script>'
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Counts elements, checks that they are closed, and keeps their texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def write_run(folder: Path, finished: bool = True) -> Path:
    folder.mkdir()
    config = {"model": {"name": "swin_tiny"}, "data": {"name": "folder", "root": f"/data/{EVIL}"}, "optim": {"lr": 0.5}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    records = []
    for step in range(10, 101, 10):
        records.append({"type": "train", "step": step, "epoch": 1, "loss": 4 - step / 50, "lr": step / 1000})
    records[3]["loss"] = float("nan")
    records.append({"type": "skipped", "step": 55, "epoch": 1, "ranks": [0]})
    best = {"step": 100, "epoch": 1, "top1": 61.25, "top5": 90.0, "correct": 49, "total": 80, "loss": 1.5}
    records.append({"type": "eval", **best})
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    summary = {
        "steps": 100, "epochs": 1, "parameters": 28_300_000, "train_images": 12_345, "seconds": 3725.0, "seed": 7,
        "device": "cpu", "best": best, "final": best, "versions": {"striate": "1.2.3", "torch": "9.9"},
    }  # fmt: skip
    if finished:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_the_page_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"written: {run / 'report.html'}\n"
    text = (run / "report.html").read_text()
    page = Page(text)
    for said in ("swin_tiny on folder", "61.25 %", "49 of 80", "28.30 M", "12,345", "1 h 2 min", "1.2.3", "9.9", "0.5"):
        assert any(said in part for part in page.texts), said
    curves = [attributes for tag, attributes in page.elements if tag == "polyline"]
    loss = next(line["points"] for line in curves)
    assert loss is not None
    assert len(loss.split()) == 9, "ten records, of which one is NaN"
    heights = [float(point.split(",")[1]) for point in loss.split()]
    assert heights == sorted(heights), "the loss falls, so the curve goes down"
    assert "skipped steps" in page.texts
    command = f"striate validate {run} --confusion {run / 'confusion.csv'}"
    assert command in page.texts


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert main(["report", str(run), "--output", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.elements}
    assert not re.search(r"https?:|url\(|@import|src=", text)
    assert "prefers-color-scheme: dark" in text


def test_names_are_text_and_not_markup(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "confusion.csv").write_text(f'true,"{EVIL.replace(chr(34), chr(34) * 2)}",b\nx,5,3\nb,0,0\n')
    assert main(["report", str(run)]) == 0
    text = (run / "report.html").read_text()
    page = Page(text)
    assert "<script" not in text.lower()
    assert any(f"/data/{EVIL}" in part for part in page.texts)
    assert any(part == f"{EVIL} taken for b: 3 of 8" for part in page.texts)
    cells = [attributes for tag, attributes in page.elements if tag == "rect"]
    assert [cell["fill-opacity"] for cell in cells] == ["0.531", "0.319", "0.000", "0.000"]


def test_a_run_that_is_not_finished(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", finished=False)
    assert main(["report", str(run)]) == 0
    page = Page((run / "report.html").read_text())
    assert any("not finished, 100 steps logged so far" in part for part in page.texts)
    (run / "log.jsonl").unlink()
    assert main(["report", str(run)]) == 0
    assert "nothing logged yet" in Page((run / "report.html").read_text()).texts


def test_many_classes_are_listed_and_not_drawn(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    names = [f"class{number}" for number in range(41)]
    rows = [[0] * 41 for _ in names]
    rows[7][3], rows[7][7], rows[9][1] = 6, 2, 1
    lines = [["true", *names], *([name, *map(str, row)] for name, row in zip(names, rows, strict=True))]
    (run / "confusion.csv").write_text("\n".join(",".join(line) for line in lines) + "\n")
    assert main(["report", str(run)]) == 0
    page = Page((run / "report.html").read_text())
    assert page.count("rect") == 0
    at = page.texts.index("class7")
    assert page.texts[at : at + 6] == ["class7", "class3", "6 of 8", "class9", "class1", "1 of 1"]


@pytest.mark.parametrize("text", ["", "true,a,b\na,1,2\n", "true,a\na,x\n", "true,a,b\na,1\nb,1,2\n"])
def test_what_is_no_confusion_matrix(tmp_path: Path, text: str) -> None:
    (tmp_path / "confusion.csv").write_text(text)
    with pytest.raises(ValueError, match="confusion.csv"):
        read_confusion(tmp_path / "confusion.csv")


def test_wrong_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "is no run folder" in capsys.readouterr().err
    run = write_run(tmp_path / "run")
    assert main(["report", str(run), "--output", str(tmp_path / "page.txt")]) == 2
    assert "must end in .html" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "want"),
    [
        ([0, 1], [0, 0.2, 0.4, 0.6, 0.8, 1]),
        ([3, 97], [0, 20, 40, 60, 80, 100]),
        ([2.1, 2.9], [2, 2.2, 2.4, 2.6, 2.8, 3]),
        ([-1e-5, 1e-5], [-1e-5, -5e-6, 0, 5e-6, 1e-5]),
        ([4, 4], [2, 3, 4, 5, 6]),
    ],
)
def test_ticks(values: list[float], want: list[float]) -> None:
    assert ticks(values) == pytest.approx(want, abs=1e-12)


def test_long_curves_are_thinned() -> None:
    points = [(float(step), step / 7) for step in range(10 * MAX_POINTS + 3)]
    kept = thin(points)
    assert MAX_POINTS / 2 < len(kept) <= MAX_POINTS
    assert kept[-1] == points[-1]
    assert set(kept) <= set(points)
    assert draw_curves([Curve("x", points)], "t").count("<circle") == 0
    assert draw_curves([Curve("x", [(3.0, 1.0)])], "t").count("<circle") == 1
