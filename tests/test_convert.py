"""``vlft data``: annotations of other tools become records, which are then read for a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import OCR, OCR2, VL2_NOAUX
from PIL import Image

from vlft.cli.check import run_check
from vlft.cli.data import run_data
from vlft.cli.options import read_settings
from vlft.config import CheckConfig, DataConfig
from vlft.data.boxes import write_boxes
from vlft.data.conversation import flat_text
from vlft.data.convert import xml_tree
from vlft.data.dataset import load_dataset
from vlft.data.options import DataOptions, Reading
from vlft.errors import UsageError

CASES = Path(__file__).parent / "data_cases"
COCO = {
    "images": [
        {"id": 1, "file_name": "a.png", "width": 96, "height": 64},
        {"id": "b", "file_name": "b.png"},
    ],
    "categories": [{"id": 3, "name": "disc"}, {"id": 4, "name": "bar"}],
    "annotations": [
        {"id": 7, "image_id": 1, "category_id": 3, "bbox": [12, 8, 36, 48]},
        {"id": 8, "image_id": 1, "category_id": 4, "bbox": [60.1, 16, 30.2, 32]},
        {"id": 9, "image_id": 1, "category_id": 3, "bbox": [0, 0, 96, 64]},
        {"id": 10, "image_id": "b", "category_id": 3, "bbox": [1, 1, 2, 2], "iscrowd": 1},
    ],
}
PAGE = """<PcGts xmlns="http://schema.primaresearch.org/PAGE/gts/pagecontent/2019-07-15">
<Page imageFilename="a.png" imageWidth="200" imageHeight="100"><ReadingOrder><OrderedGroup>
<OrderedGroupIndexed index="1"><RegionRefIndexed index="0" regionRef="r2"/></OrderedGroupIndexed>
<RegionRefIndexed index="0" regionRef="r1"/></OrderedGroup></ReadingOrder>
<TextRegion id="r3"><TextEquiv><Unicode>last, a region alone</Unicode></TextEquiv>
<Coords points="0,90 200,90 200,100 0,100"/></TextRegion>
<TextRegion id="r2"><TextLine><Coords><Point x="20" y="50"/><Point x="100" y="60"/></Coords>
<Word><TextEquiv><Unicode>two</Unicode></TextEquiv></Word>
<Word><TextEquiv><Unicode>words</Unicode></TextEquiv></Word></TextLine>
<TextLine><Coords points="0,0 1,1"/></TextLine></TextRegion>
<TextRegion id="r1"><TextLine id="l1"><Coords points="20,10 100,10 100,30 20,30"/>
<TextEquiv index="1"><Unicode>second guess</Unicode></TextEquiv>
<TextEquiv index="0"><Unicode> first &amp; best </Unicode></TextEquiv></TextLine></TextRegion>
</Page></PcGts>"""
ALTO = """<alto xmlns="http://www.loc.gov/standards/alto/ns-v4#"><Description>
<MeasurementUnit>mm10</MeasurementUnit><sourceImageInformation><fileName> a.png </fileName>
</sourceImageInformation></Description><Layout><Page WIDTH="2000" HEIGHT="1000"><PrintSpace>
<ComposedBlock><TextBlock><TextLine HPOS="200" VPOS="100" WIDTH="800" HEIGHT="200">
<String CONTENT="A"/><String CONTENT="bro"/><HYP CONTENT="-"/></TextLine>
<TextLine HPOS="0" VPOS="0" WIDTH="1" HEIGHT="1"/>
<TextLine HPOS="200" VPOS="500" WIDTH="800" HEIGHT="100"><String CONTENT="ken"/><SP/>
<String CONTENT="line"/></TextLine></TextBlock></ComposedBlock></PrintSpace></Page></Layout>
</alto>"""
OMNI = [{
    "page_info": {"image_path": "a.png", "width": 200, "height": 100},
    "layout_dets": [
        {"category_type": "figure", "poly": [0, 50, 200, 50, 200, 100, 0, 100], "order": 3},
        {"category_type": "text_block", "poly": [20, 20, 180, 20, 180, 40, 20, 40], "order": 2,
         "text": "Body."},
        {"category_type": "title", "poly": [20, 0, 180, 0, 180, 20, 20, 20], "order": 1,
         "text": "Title", "ignore": False},
        {"category_type": "header", "poly": [0, 0, 9, 0, 9, 9, 0, 9], "order": None, "text": "7"},
        {"category_type": "text_mask", "poly": [0, 0, 9, 0, 9, 9, 0, 9], "order": 0,
         "ignore": True, "text": "x"},
    ],
}]  # fmt: skip
REFER = [{"ref_id": 1, "ann_id": 8, "image_id": 1, "sentences": [{"sent": "the bar"}, "right"]}]
MDETR = {
    "images": [{"id": 5, "file_name": "a.png", "caption": "the left disc"}],
    "annotations": [{"id": 1, "image_id": 5, "category_id": 1, "bbox": [12, 8, 36, 48]}],
    "categories": [{"id": 1, "name": "object"}],
}
EXPRESSIONS = [{"img_path": "a.png", "expression": "a disc", "bbox": [12, 8, 48, 56]}]
CAPTIONS = {"images": COCO["images"],
            "annotations": [{"id": 1, "image_id": 1, "caption": " A disc.\n"}]}  # fmt: skip


@pytest.fixture(autouse=True)
def _inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (96, 64), "white").save("a.png")


def write(name: str, value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    Path(name).write_text(text, "utf-8")
    return name


def convert(*words: str) -> list[dict[str, Any]]:
    config, _ = read_settings(DataConfig, "data", [*words, "--output", "out.jsonl", "--overwrite"])
    run_data(config)
    return [json.loads(line) for line in Path("out.jsonl").read_text("utf-8").splitlines()]


def message(*words: str) -> str:
    with pytest.raises(UsageError) as error:
        convert(*words)
    return str(error.value)


def turns(row: dict[str, Any]) -> list[str]:
    return [turn["content"] for turn in row["messages"]]


class TestLocated:
    def test_coco_is_a_record_for_each_category_on_an_image(self, capsys):
        rows = convert(write("c.json", COCO))
        assert [row["objects"] for row in rows] == [
            {"ref": ["disc"], "bbox": [[12, 8, 48, 56], [0, 0, 96, 64]], "bbox_type": "real"},
            {"ref": ["bar"], "bbox": [[60.1, 16, 90.3, 48]], "bbox_type": "real"},
        ]
        assert turns(rows[0]) == ["<image>\nLocate <ref-object> in the image.", "<bbox><bbox>"]
        assert rows[0]["images"] == [str(Path("a.png").absolute())]
        assert "left out: 1 annotations of crowds" in capsys.readouterr().err

    def test_a_prompt_without_the_ref_leaves_it_to_the_reply(self):
        rows = convert(write("c.json", MDETR), "--prompt", "Where is it?")
        assert turns(rows[0]) == ["<image>\nWhere is it?", "<ref-object><bbox>"]

    def test_expressions_of_three_forms(self):
        assert convert(write("m.json", MDETR))[0]["objects"]["ref"] == ["the left disc"]
        rows = convert(write("r.json", REFER), write("c.json", COCO))
        assert [row["objects"]["ref"] for row in rows] == [["the bar"], ["right"]]
        assert rows[0]["objects"]["bbox"] == [[60.1, 16, 90.3, 48]]
        lines = write("e.jsonl", "\n".join(map(json.dumps, EXPRESSIONS)))
        assert "add --box-format xyxy" in message(lines)
        rows = convert(lines, "--box-format", "xyxy")
        assert rows[0]["objects"] == {
            "ref": ["a disc"], "bbox": [[12, 8, 48, 56]], "bbox_type": "real"
        }  # fmt: skip
        assert convert(lines, "--box-format", "xywh")[0]["objects"]["bbox"] == [[12, 8, 60, 64]]

    def test_captions(self):
        rows = convert(write("c.json", CAPTIONS))
        assert turns(rows[0]) == ["<image>\nDescribe this image in one sentence.", "A disc."]
        assert "objects" not in rows[0]

    @pytest.mark.parametrize(
        ("change", "found"),
        [
            ({"image_id": 99}, "c.json: annotations[0]: image_id 99 is no image of the file"),
            ({"image_id": [1]}, "annotations[0]: image_id [1] is no image"),
            ({"category_id": 9}, "annotations[0]: category_id 9 is no category"),
            ({"category_id": {}}, "annotations[0]: category_id {} is no category"),
            ({"bbox": [1, 2, 3]}, "annotations[0]: bbox is [1, 2, 3], four numbers"),
            ({"bbox": [1, 2, "3", 4]}, "four numbers are allowed"),
            ({"bbox": [1, 2, 10**400, 4]}, "four numbers are allowed"),
            ({"bbox": [9, 2, -3, 4]}, "has a negative width or height"),
            ({"bbox": None}, "bbox is None"),
            ({"image_id": "b", "bbox": [0, 0, 1, 1]}, "image b: no such image: b.png"),
        ],
    )
    def test_a_bad_annotation_is_named_or_skipped(self, change, found, capsys):
        items = [COCO["annotations"][0] | change, *COCO["annotations"][1:]]
        name = write("c.json", COCO | {"annotations": items})
        assert found in message(name)
        assert [row["objects"]["ref"] for row in convert(name, "--on-bad-sample", "skip")] == [
            ["bar"], ["disc"]
        ]  # fmt: skip
        assert "skipped 1, the first: c.json" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("value", "found"),
        [
            ({"images": [], "annotations": [1]}, "c.json: annotations[0]: found no object"),
            ({"images": [{}], "annotations": []}, "c.json: images[0]: id is None"),
            ({"images": 3, "annotations": []}, '"images" is no list'),
            ({"images": [], "annotations": []}, "no record is left"),
            ([{"a": 1}], "c.json:1: found records with a"),
            (REFER, "c.json:1: ann_id 8 is no annotation of the files"),
            ("[1", "c.json:1"),
        ],
    )
    def test_a_file_of_another_form_is_refused(self, value, found):
        assert found in message(write("c.json", value))


class TestPages:
    def test_of_page_xml_in_reading_order(self):
        (row,) = convert(write("p.xml", PAGE))
        text = "first & best\ntwo words\nlast, a region alone"
        assert turns(row) == ["<image>\nFree OCR.", text]
        (row,) = convert("p.xml", "--boxes")
        assert turns(row) == [
            "<image>\n<|grounding|>OCR this image.", "\n".join(["<ref-object><bbox>"] * 3)
        ]  # fmt: skip
        assert row["objects"] == {
            "ref": text.split("\n"),
            "bbox": [[0.1, 0.1, 0.5, 0.3], [0.1, 0.5, 0.5, 0.6], [0, 0.9, 1, 1]],
            "bbox_type": "norm1",
        }

    def test_of_alto_as_they_are_printed(self):
        (row,) = convert(write("p.xml", ALTO), "--boxes")
        assert row["objects"] == {
            "ref": ["A bro-", "ken line"],
            "bbox": [[0.1, 0.1, 0.5, 0.3], [0.1, 0.5, 0.5, 0.6]],
            "bbox_type": "norm1",
        }
        assert turns(convert("p.xml")[0])[1] == "A bro-\nken line"

    def test_of_omnidocbench_by_their_parts(self, capsys):
        (row,) = convert(write("o.json", OMNI))
        assert turns(row) == ["<image>\nFree OCR.", "Title\n\nBody."]
        assert "left out: 2 parts of pages without order" in capsys.readouterr().err
        (row,) = convert("o.json", "--boxes")
        tags = "<ref-object><bbox>"
        assert turns(row) == [
            "<image>\n<|grounding|>Convert the document to markdown.",
            f"{tags}\nTitle\n\n{tags}\nBody.\n\n{tags}",
        ]
        assert row["objects"]["ref"] == ["title", "text", "image"]
        assert row["objects"]["bbox"][0] == [0.1, 0, 0.9, 0.2]

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("page_xml_alto/p1.page.xml", "first & best\nsecond line"),
            ("page_xml_alto/p1.alto.xml", "first & be-"),
            ("omnidocbench/OmniDocBench.json",
             "Title\n\nBody text.\n\n<table><tr><td>1</td></tr></table>"),
        ],
    )  # fmt: skip
    def test_of_the_cases_as_their_readme_says(self, name, expected):
        (row,) = convert(str(CASES / name))
        assert turns(row)[1] == expected
        assert Path(row["images"][0]).is_file()

    @pytest.mark.parametrize(
        ("old", "new", "found"),
        [
            ("a.png", "no.png", "p.xml:2: no such image: no.png"),
            ("a.png", "9" * 500, "p.xml:2: no such image: 999"),
            ("a.png", "", "p.xml:2: found '' as the name of an image"),
            ('imageWidth="200"', "", "p.xml:2: imageWidth is None, a number of pixels"),
            ('imageWidth="200"', 'imageWidth="0"', "a number of pixels is allowed"),
            ('points="20,10 100,10 100,30 20,30"', "", "p.xml:11: TextLine has no Coords"),
            ("<Page ", "<Sheet ", "p.xml:14: not XML: mismatched tag at column 3"),
            ("PcGts", "svg", "p.xml:1: found <svg>, no PAGE or ALTO"),
        ],
    )
    def test_what_is_wrong_has_its_place(self, old, new, found):
        assert found in message(write("p.xml", PAGE.replace(old, new)), "--boxes")

    def test_an_image_of_the_folder_above_is_named(self):
        Path("page").mkdir()
        said = message(write("page/p.xml", PAGE))
        assert "page/p.xml:2: no such image: page/a.png" in said
        assert "it is in .: add --image-root ." in said
        assert len(convert("page/p.xml", "--image-root", ".")) == 1

    def test_an_image_of_a_folder_beside_is_named(self):
        for name in ("annotations", "train2017"):
            Path(name).mkdir()
        Path("a.png").rename("train2017/a.png")
        said = message(write("annotations/c.json", MDETR))
        assert "it is in train2017: add --image-root train2017" in said

    def test_an_alto_file_of_two_pages_is_refused(self):
        text = ALTO.replace("</Layout>", "<Page/></Layout>")
        assert "p.xml: found 2 pages and 1 names of images" in message(write("p.xml", text))
        text = ALTO.replace('HPOS="200"', 'HPOS="x"')
        assert "p.xml:4: TextLine: HPOS is 'x'" in message(write("p.xml", text), "--boxes")

    def test_a_flag_that_decides_nothing_is_refused(self):
        assert "--boxes: decides nothing" in message(write("c.json", MDETR), "--boxes")
        said = message(write("p.xml", PAGE), "--box-format", "xyxy")
        assert "--box-format: decides nothing" in said


def test_reading_such_files_as_data_names_the_command():
    for name, value in (("c.json", COCO), ("o.json", OMNI), ("p.xml", PAGE)):
        with pytest.raises(UsageError, match="vlft data converts"):
            run_check(read_settings(CheckConfig, "check", [write(name, value)])[0])


BOMB = "".join(f'<!ENTITY a{n + 1} "{f"&a{n};" * 10}">' for n in range(9))


class TestHostileXml:
    @pytest.mark.parametrize(
        "doctype",
        [
            '<!DOCTYPE PcGts SYSTEM "file:///etc/passwd">',
            '<!DOCTYPE PcGts [<!ENTITY x SYSTEM "file:///etc/passwd">]>',
            f'<!DOCTYPE PcGts [<!ENTITY a0 "ha">{BOMB}]>',
            '<!DOCTYPE PcGts [<!ENTITY % p SYSTEM "http://127.0.0.1:1/"> %p;]>',
        ],
    )
    def test_a_document_type_is_refused(self, doctype):
        text = PAGE.replace("first &amp; best", "&x;")
        assert "p.xml:1: found a document type" in message(write("p.xml", doctype + text))

    def test_an_entity_without_one_is_not_xml(self):
        said = message(write("p.xml", PAGE.replace("&amp;", "&xxe;")))
        assert "p.xml:13: not XML: undefined entity" in said

    def test_size_number_and_depth_are_bounded(self, monkeypatch):
        said = message(write("p.xml", "<a>" * 101 + "</a>" * 101))
        assert "p.xml:1: elements more than 100 deep" in said
        monkeypatch.setattr(xml_tree, "MOST_ELEMENTS", 10)
        assert "more than 10 elements" in message(write("p.xml", PAGE))
        monkeypatch.setattr(xml_tree, "LARGEST_FILE", 100)
        assert "p.xml: more than 100 bytes" in message("p.xml")
        assert "no.xml: cannot be read (No such file or directory)" in message("no.xml")

    @pytest.mark.parametrize("text", ["", "x", '<?xml version="1.0" encoding="no"?><a/>', "<a"])
    def test_what_is_no_xml_has_a_place(self, text):
        assert message(write("p.xml", text)).startswith("p.xml:1: ")


@pytest.mark.parametrize("case", [VL2_NOAUX, OCR, OCR2], indirect=True, ids=str)
def test_what_is_written_is_trained(case, processor):
    files = [write("c.json", COCO), write("p.xml", PAGE), write("q.xml", ALTO),
             write("o.json", OMNI)]  # fmt: skip
    rows = [row for name in files for row in convert(name, *["--boxes"] * (name != "c.json"))]
    Path("all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    reading = Reading(processor.family.image_tag, has_boxes=True)
    options = DataOptions(reading=reading)
    data = load_dataset(["all.jsonl"], processor.encoder, options)
    replies = [flat_text(item.turns[-1], "") for item in data.conversations]
    assert replies[0] == (
        "<|ref|>disc<|/ref|><|det|>[[125, 125, 500, 874], [0, 0, 999, 999]]<|/det|>"
    )
    assert replies[3].startswith("<|ref|>A bro-<|/ref|><|det|>[[100, 100, 500, 300]]<|/det|>\n")
    assert replies[4].endswith("\n\n<|ref|>image<|/ref|><|det|>[[0, 500, 999, 999]]<|/det|>")
    assert all(write_boxes(item) is item for item in data.conversations)
    det = processor.chat.tokenizer.token_to_id("<|det|>")
    assert [sample.labels.tolist().count(det) for sample in data] == [1, 1, 3, 2, 3]
