from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import pytest

from mmfuse.eval import Picture, Prediction, provenance, score, write_report
from mmfuse.eval.report import percent

ATTACK = "<script>alert('x')</script>\"&"
PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Checks that tags are closed in order, and keeps tags with attributes and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text += data


def predictions(family="read", count=4, wrong=2):
    said = ["wrong" if number < wrong else "12 34" for number in range(count)]
    return [Prediction(f"s{i}", family, "Read all digits.", "12 34", text, i) for i, text in enumerate(said)]


@pytest.fixture
def picture(tmp_path):
    (tmp_path / "loss.png").write_bytes(PNG)
    return Picture("Loss", "Lower is better.", tmp_path / "loss.png")


def test_the_page_holds_everything_and_asks_for_nothing(tmp_path, picture):
    seen = predictions()
    results = {**score(seen, seen), **provenance(), "train_seconds": 231.42, "parameters": 1058784}
    path = write_report(
        tmp_path / "run",
        title="A run",
        results=results,
        config_text="fusion: mma\n",
        pictures=[picture],
        predictions=seen,
        blind=seen,
    )
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert path.name == "report.html"
    assert "50.0\u202f%" in page.text and "fusion: mma" in page.text and "Lower is better." in page.text
    assert "231.4" in page.text and "1\u202f058\u202f784" in page.text and "✗ wrong" in page.text
    assert base64.b64encode(PNG).decode() in text
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "base", "form")
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:")
        assert not [name for name in attributes if name.startswith("on")]
    assert not re.search(r"url\(|@import|https?://", text)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert "prefers-color-scheme: dark" in text


def test_what_a_model_or_a_user_wrote_is_text_and_never_markup(tmp_path, picture):
    item = Prediction(ATTACK, ATTACK, ATTACK, ATTACK, ATTACK, 0)
    plain = write_report(
        tmp_path,
        title="t",
        results=score(predictions()[:1]),
        config_text="c",
        pictures=[picture],
        predictions=predictions()[:1],
        blind=predictions()[:1],
    ).read_text()
    text = write_report(
        tmp_path,
        title=ATTACK,
        results={**score([item], [item]), "note": ATTACK, "platform": ATTACK},
        config_text=ATTACK,
        pictures=[Picture(ATTACK, ATTACK, picture.path)],
        predictions=[item],
        blind=[item],
    ).read_text()
    assert "<script" not in text and "alert('x')" not in text
    # title 2, family and its majority answer, picture 2, answer row 6, note, platform, config
    assert Page(text).text.count(ATTACK) == 15
    assert {tag for tag, _ in Page(text).tags} - {"footer", "ul", "li"} == {tag for tag, _ in Page(plain).tags}


def test_a_report_without_scores_pictures_and_answers(tmp_path):
    path = write_report(tmp_path, title="Bare", results={}, config_text="")
    text = Page(path.read_text()).text
    assert "Bare" in text and "By family" not in text and "None" not in text


def test_results_without_blind_scores_show_a_dash(tmp_path):
    results = score(predictions())
    page = Page(write_report(tmp_path, title="t", results=results, config_text="").read_text())
    assert "–" in page.text and "None" not in page.text


def test_cut_and_empty_answers_are_marked(tmp_path):
    held = [Prediction("a", "f", "q", "1", "", 0), Prediction("b", "f", "q", "1", "1 1 1", 1, finished=False)]
    text = Page(write_report(tmp_path, title="t", results={}, config_text="", predictions=held).read_text()).text
    assert "(nothing)" in text and "1 1 1 … (cut)" in text


def test_some_answers_of_each_family_wrong_ones_first_and_right_ones_too(tmp_path):
    held = predictions("read", 40, wrong=30) + predictions("count", 40, wrong=1) + predictions("last", 2, wrong=0)
    path = write_report(tmp_path, title="t", results={}, config_text="", predictions=held, per_family=6)
    marks = re.findall(r'class="mark (right|wrong)">.*?<td>(\w+)</td>', path.read_text())
    assert marks == (
        [("wrong", "read")] * 3
        + [("right", "read")] * 3
        + [("wrong", "count")]
        + [("right", "count")] * 5
        + [("right", "last")] * 2
    )


def test_a_picture_that_is_missing_or_of_another_kind_is_an_error(tmp_path):
    for name, error, message in (
        ("gone.png", FileNotFoundError, "gone.png"),
        ("x.pdf", ValueError, "x.pdf: unknown picture format '.pdf'"),
    ):
        with pytest.raises(error, match=message):
            write_report(tmp_path, title="t", results={}, config_text="", pictures=[Picture("a", "b", tmp_path / name)])
    assert not (tmp_path / "report.html").exists()


def test_blind_answers_must_belong_to_the_predictions(tmp_path):
    with pytest.raises(ValueError, match="1 blind predictions for 4 questions"):
        write_report(
            tmp_path, title="t", results={}, config_text="", predictions=predictions(), blind=predictions(count=1)
        )


@pytest.mark.parametrize(
    ("share", "text"),
    [(1.0, "100.0"), (0.99999, "99.9"), (0.0, "0.0"), (0.00001, "0.1"), (0.9312, "93.1"), (0.5, "50.0")],
)
def test_only_all_is_a_hundred_per_cent(share, text):
    assert percent(share) == f"{text}\u202f%"
    assert percent(None) == "–"
