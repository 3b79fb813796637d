"""Data files -> records: every format, line numbers, and the errors of bad records."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from vlft.data.containers import NAME_A_FILE, columnar, open_records, unpack
from vlft.data.records import Record, Records, kind_of
from vlft.errors import DataError


@pytest.fixture(autouse=True)
def _inside(tmp_path, monkeypatch):
    """Messages name paths from the working folder."""
    monkeypatch.chdir(tmp_path)


def read(name: str, content: str | bytes) -> Records:
    data = content if isinstance(content, bytes) else content.encode("utf-8")
    Path(name).write_bytes(data)
    return open_records(Path(name))


def lines(found: Records) -> list[tuple[int, object]]:
    """(line, fields) of records, (line, message) of errors."""
    return [
        (item.line, item.fields)
        if isinstance(item, Record)
        else (int(item.place.rpartition(":")[2]), item.message)
        for item in found
    ]


class TestJsonLines:
    def test_every_line_with_its_number(self):
        found = read("a.jsonl", '{"query": "1"}\n\n  \n{"query": "4"}\r\n{"query": "5"}')
        assert lines(found) == [(1, {"query": "1"}), (4, {"query": "4"}), (5, {"query": "5"})]
        assert [item.place for item in found] == ["a.jsonl:1", "a.jsonl:4", "a.jsonl:5"]

    def test_line_numbers_of_a_long_file_are_those_of_the_file(self):
        # Each record says where it is, every third line is blank, every seventh broken.
        text, expected = "", []
        for number in range(1, 200):
            if number % 3 == 0:
                text += "\n"
            elif number % 7 == 0:
                text += "{broken\n"
                expected.append(number)
            else:
                text += json.dumps({"query": str(number)}) + "\n"
                expected.append(number)
        found = read("a.jsonl", text)
        assert [line for line, _ in lines(found)] == expected
        assert all(item.fields["query"] == str(item.line) for item in found if type(item) is Record)

    def test_byte_order_marks_mean_nothing(self):
        one = b'\xef\xbb\xbf{"query": "1"}\n'
        assert lines(read("a.jsonl", one + one)) == [(1, {"query": "1"}), (2, {"query": "1"})]
        assert lines(read("a.jsonl", b"\xef\xbb\xbf" + one)) == [(1, {"query": "1"})]

    @pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
    def test_only_a_newline_ends_a_line(self, mark):
        # JSON wants characters below 0x20 escaped; the others may stand as they are.
        row = {"query": f"a{mark}b"}
        text = json.dumps(row, ensure_ascii=mark < " ") + '\n{"query": "2"}\n'
        assert lines(read("a.jsonl", text)) == [(1, row), (2, {"query": "2"})]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"query": "x"', r"not JSON: Expecting ',' delimiter at column 14"),
            ('{"query": "x', r"not JSON: Unterminated string starting at column 11"),
            ('{"query": }', r"not JSON: Expecting value at column 11"),
            ("x", r"not JSON: Expecting value at column 1"),
            ("{'query': 1}", r"not JSON: Expecting property name .* at column 2"),
            ('{"query": "x",}', r"a comma before '}'"),
            ('{"a": {"query": "x", "query": "y"}}', r'the key "query" stands twice in an object'),
            ('{"query": 1' + 5000 * "0" + "}", r"not JSON: a number is too long"),
            (100_000 * "[", r"not JSON: too deeply nested"),
            ('"text"', r"found text, an object is allowed"),
            ("3.5", r"found a number, an object is allowed"),
            ("true", r"found true or false, an object is allowed"),
            ("null", r"found null, an object is allowed"),
        ],
    )
    def test_a_bad_line_is_named_and_reading_goes_on(self, line, message):
        found = read("a.jsonl", f'{{"query": "1"}}\n{line}\n{{"query": "3"}}\n')
        assert [number for number, _ in lines(found)] == [1, 2, 3]
        assert isinstance(found[1], DataError)
        assert re.fullmatch(f"a\\.jsonl:2: {message}\n hint: .*", str(found[1]))
        assert isinstance(found[2], Record)


class TestArray:
    def test_records_know_their_line(self):
        text = """

        [ {"query": "3a"}, {"query": "3b"},
          {
            "query": "4",
            "history": [
              ["[", "]"]
            ]
          }, {"query": "9"}

          ,
          {"query": "12"} ]
        """
        found = read("a.json", text)
        assert [(line, fields["query"]) for line, fields in lines(found)] == [
            (3, "3a"), (3, "3b"), (4, "4"), (9, "9"), (12, "12"),
        ]  # fmt: skip
        assert [item.fields for item in found] == json.loads(text)

    @pytest.mark.parametrize("indent", [None, 2])
    def test_equals_what_json_reads(self, indent):
        rows = [{"query": f"\u2028{i}\n", "images": [], "history": [["a", "[{"]]} for i in range(9)]
        text = json.dumps(rows, indent=indent, ensure_ascii=False)
        found = read("a.json", text)
        assert [item.fields for item in found] == rows
        starts = [text[: m.start()].count("\n") + 1 for m in re.finditer(r'\{\s*"query', text)]
        assert [item.line for item in found] == starts

    def test_byte_order_mark_and_no_record(self):
        assert lines(read("a.json", b'\xef\xbb\xbf[{"query": "1"}]')) == [(1, {"query": "1"})]
        assert len(read("a.json", "[\n]\n")) == 0

    def test_an_item_that_is_no_object_is_named_and_reading_goes_on(self):
        assert lines(read("a.json", '[{"query": "1"},\n7,\n{"query": "3"}]')) == [
            (1, {"query": "1"}),
            (2, "found a number, an object is allowed"),
            (3, {"query": "3"}),
        ]

    @pytest.mark.parametrize(
        ("text", "line", "message"),
        [
            ("[", 1, "not JSON: Expecting value at column 2"),
            ('[{"query": "x"},\n', 1, "not JSON: Expecting value at column 1"),
            ('[{"query": "x"}\n,]', 2, "a comma before ']'"),
            ('[{"query": "x"},\n{"query": [1,\n]}]', 2, "a comma before ']'"),
            (
                "[{'query': 1}]", 1,
                "not JSON: Expecting property name enclosed in double quotes at column 3",
            ),
            (
                '[{"query": "x"}\n', 1,
                "the file ends where the array goes on with ',' or ends with ']'",
            ),
            (
                '[{"query": "x"}\n{"query": "y"}]', 2,
                "found '{' where the array goes on with ',' or ends with ']'",
            ),
            ('[{"query": "x"}]\n\n[{"query": "y"}]', 3, "found text after the end of the array"),
            ('[{},\n{"query" "y"}]', 2, "not JSON: Expecting ':' delimiter at column 10"),
            ("[\n1" + 5000 * "0" + "]", 2, "not JSON: a number is too long"),
            (100_000 * "[", 1, "not JSON: too deeply nested"),
        ],
    )  # fmt: skip
    def test_a_broken_array_is_never_cut_short_in_silence(self, text, line, message):
        with pytest.raises(DataError) as error:
            read("a.json", text)
        assert (error.value.place, error.value.message) == (f"a.json:{line}", message)


class TestTable:
    def test_quoted_newlines_and_json_cells(self):
        text = (
            "query,response,images,history\r\n"
            '"two\r\nlines","a, ""b""",a.jpg,\r\n'
            "\r\n"
            'q,r,"[""a.jpg"", ""b.jpg""]","[[""q1"", ""r\n1""]]"\r\n'.replace("\n1", "\\n1")
            + "last,r,,\r\n"
        )
        assert lines(read("a.csv", text)) == [
            (2, {"query": "two\nlines", "response": 'a, "b"', "images": "a.jpg"}),
            (5, {
                "query": "q", "response": "r", "images": ["a.jpg", "b.jpg"],
                "history": [["q1", "r\n1"]],
            }),
            (6, {"query": "last", "response": "r"}),
        ]  # fmt: skip

    @pytest.mark.parametrize("mark", ["\u2028", "\x85", "\x0b", "\x0c", "\x1c"])
    def test_only_a_newline_ends_a_row(self, mark):
        text = f"query,response\na{mark}b,c\nd,e\n"
        assert lines(read("a.csv", text)) == [
            (2, {"query": f"a{mark}b", "response": "c"}),
            (3, {"query": "d", "response": "e"}),
        ]

    def test_byte_order_mark(self):
        assert lines(read("a.csv", b"\xef\xbb\xbfquery\nx\n")) == [(2, {"query": "x"})]

    def test_bad_rows_are_named_and_reading_goes_on(self):
        text = (
            "query,response,images,history\n"
            "a,b,c,d,e\n"
            "a\n"
            'q,r,"[""a.jpg""",\n'
            'q,r,,"[[""q"", ""r""]"\n'
            f"q,r,[1{5000 * '0'}],\n"
            "good,r,,\n"
        )
        found = read("a.csv", text)
        assert lines(found) == [
            (2, "found 5 cells, the header has 4"),
            (3, "found 1 cell, the header has 4"),
            (4, "\"images\": not JSON: Expecting ',' delimiter at column 9"),
            (5, "\"history\": not JSON: Expecting ',' delimiter at column 12"),
            (6, '"images": not JSON: a number is too long'),
            (7, {"query": "good", "response": "r"}),
        ]
        assert [item.hint for item in list(found)[:5]] == [
            "quote cells that hold commas",
            "quote cells that hold commas",
            'write e.g. "[""a.jpg"", ""b.jpg""]"',
            'write e.g. "[[""q"", ""r""]]"',
            'write e.g. "[""a.jpg"", ""b.jpg""]"',
        ]

    @pytest.mark.parametrize(
        ("text", "line", "message"),
        [
            ('query\nx\n"never\n\nclosed', 3, "not CSV: unexpected end of data"),
            ('query\n"x"y\n', 2, "not CSV: ',' expected after '\"'"),
            ("\nquery,response,query\n1,2,3\n", 2, "column 'query' is 2 times in the header"),
        ],
    )
    def test_a_broken_table_is_never_cut_short_in_silence(self, text, line, message):
        assert lines(read("a.csv", text))[-1] == (line, message)


class TestFiles:
    @pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "A.JSONL"])
    @pytest.mark.parametrize("content", [b"", b" \n\t\n", b"\xef\xbb\xbf\n"])
    def test_empty(self, name, content):
        with pytest.raises(DataError, match=rf"^{name}: the file is empty\n hint: write e\.g\. "):
            read(name, content)

    def test_not_utf8(self):
        with pytest.raises(
            DataError, match=r"^a\.jsonl: not UTF-8 \(byte 2\)\n hint: save the file as UTF-8$"
        ):
            read("a.jsonl", b'{"\xe9": 1}')

    @pytest.mark.parametrize(
        ("content", "found", "hint"),
        [
            ("query\nx\n".encode("utf-16"), "UTF-16", "save the file as UTF-8"),
            ("query\nx\n".encode("utf-16-le"), "UTF-16", "save the file as UTF-8"),
            # The time would be in the test's name, which all workers must agree on.
            (gzip.compress(b"{}", mtime=0), "compressed with gzip", r"add \.gz to its name"),
            (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS", "git lfs pull"),
            (b"\n <HTML><body>404", "an HTML page", "download"),
            (b"PK\x03\x04..", "a zip archive or an Excel file", "save it as CSV UTF-8"),
            (b"PAR1....", "a parquet file", r"\.parquet"),
        ],
    )
    @pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
    def test_what_is_no_text_is_named_by_its_first_bytes(self, name, content, found, hint):
        with pytest.raises(DataError, match=rf"^{name}: found .*{found}.*\n hint: .*{hint}"):
            read(name, content)

    def test_a_long_cell(self):
        cell = 131_073 * "x"
        assert lines(read("a.csv", f"query\n{cell}\n")) == [(2, {"query": cell})]

    @pytest.mark.parametrize("mark", [",", ";", "\t"])
    def test_separators(self, mark):
        text = f"query{mark}response{mark}images\n'a, b'{mark}x{mark}a.png\n".replace("'", '"')
        assert lines(read("a.csv", text)) == [
            (2, {"query": "a, b", "response": "x", "images": "a.png"})
        ]

    def test_compressed_files_and_what_calls_itself_so(self):
        rows = [{"query": "ä"}, {"query": "2"}]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        found = read("a.jsonl.gz", gzip.compress(text.encode()))
        assert lines(found) == [(1, rows[0]), (2, rows[1])]
        with pytest.raises(DataError, match="not compressed with gzip"):
            read("b.jsonl.gz", text)
        with pytest.raises(DataError, match="damaged"):
            read("c.jsonl.gz", gzip.compress(text.encode())[:-9])

    def test_gzip_that_holds_far_more_than_data_does_is_refused(self, monkeypatch):
        row = '{"query": "q", "response": "r"}\n'
        monkeypatch.setattr(unpack, "ALWAYS", 2**20)
        assert len(read("a.jsonl.gz", gzip.compress(row.encode() * 30_000))) == 30_000
        bomb = gzip.compress(row.encode() * 300_000)
        with pytest.raises(DataError) as error:
            read("b.jsonl.gz", bomb)
        found = f"b.jsonl.gz: {len(bomb):,} bytes hold more than {100 * len(bomb):,}, which no data"
        assert str(error.value).startswith(found)

    @pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
    def test_the_content_decides_and_not_the_ending(self, name):
        rows = [{"query": "1", "response": "{"}, {"query": "2", "history": [["[", "]"]]}]
        whole, indented = json.dumps(rows), json.dumps(rows, indent=2)
        one_by_one = "\n".join(json.dumps(row, indent=3) for row in rows)
        for text in (whole, indented, one_by_one, "\r".join(map(json.dumps, rows))):
            assert [item.fields for item in read(name, text)] == rows

    def test_the_only_list_of_objects_of_an_object(self):
        text = '{"version": "1",\n "tags": ["x"], "train": [\n{"query": "1"}, {"query": "2"}]}'
        found = read("a.json", text)
        assert found.note == 'reads the list under "train"'
        assert lines(found) == [(3, {"query": "1"}), (3, {"query": "2"})]
        assert [item.place for item in found] == ["a.json:3", "a.json:3 (record 2)"]
        for other in ('{"a": [{"x": 1}], "b": [{"x": 1}]}', '{"a": {"query": "1"}}', '{"a": []}'):
            with pytest.raises(DataError, match="found one object with the keys a"):
                read("a.json", other)

    def test_an_object_that_names_an_image_is_a_record(self):
        """Else the list in it would be read, and trained without the image."""
        record = {"image": "a.png", "asked": [{"question": "q", "answer": "r"}]}
        assert [item.fields for item in read("a.json", json.dumps(record))] == [record]
        whole = {"images": [{"id": 1, "file_name": "a.png"}], "info": "of COCO"}
        assert read("a.json", json.dumps(whole)).note == 'reads the list under "images"'

    def test_a_broken_object_over_several_lines_is_one_problem(self):
        text = '{"query": "1"}\n{\n "query": 2 3,\n "response": "x"\n}\n{"query": "4"}\n'
        assert lines(read("a.jsonl", text)) == [
            (1, {"query": "1"}),
            (3, "not JSON: Expecting ',' delimiter at column 13"),
            (6, {"query": "4"}),
        ]

    def test_missing(self):
        with pytest.raises(DataError, match=r"^sub/a\.jsonl: no such file\n hint: check the path$"):
            open_records(Path("sub/a.jsonl"))

    def test_folder(self):
        Path("a.jsonl").mkdir()
        for name in ("a.jsonl", ""):
            with pytest.raises(
                DataError, match=r"^(a\.jsonl|\.): found a folder, which holds .*\n hint: name a "
            ):
                open_records(Path(name))

    def test_not_a_path(self):
        with pytest.raises(DataError, match=r"cannot be read \(embedded null byte\)"):
            open_records(Path("a\0.jsonl"))

    @pytest.mark.parametrize(
        ("name", "found"),
        [
            ("a.txt", "found '.txt' at the end of the name"),
            ("train", "the name has no ending"),
        ],
    )
    def test_unknown_ending(self, name, found):
        message = f"{name}: {found}\n hint: {NAME_A_FILE}"
        with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
            read(name, "{}")

    def test_a_path_outside_of_the_working_folder_is_named_whole(self, tmp_path_factory):
        path = tmp_path_factory.mktemp("elsewhere") / "a.jsonl"
        path.write_text("x\n")
        (found,) = open_records(path)
        assert isinstance(found, DataError)
        assert found.place == f"{path}:1"

    def test_a_whole_path_inside_is_named_from_the_working_folder(self, tmp_path):
        Path("sub").mkdir()
        path = tmp_path / "sub" / "a.jsonl"
        path.write_text('x\n{"query": "2"}\n')
        assert [item.place for item in open_records(path)] == ["sub/a.jsonl:1", "sub/a.jsonl:2"]


def test_kinds_in_words():
    values = [None, True, 1, 1.5, "x", [], {}, (1,)]
    assert [kind_of(value) for value in values] == [
        "null", "true or false", "a number", "a number", "text", "a list", "an object", "a list",
    ]  # fmt: skip


def test_batches_of_a_table_are_held_as_far_as_their_bytes_allow(monkeypatch):
    """In a shuffled order each row would else decode its batch again."""
    arrow = pytest.importorskip("pyarrow")
    read: list[int] = []

    def batch(number: int):
        read.append(number)
        return arrow.table({"n": arrow.array([2 * number, 2 * number + 1], arrow.int64())})

    batches = [(2, lambda number=number: batch(number)) for number in range(4)]
    monkeypatch.setattr(columnar, "BYTES_HELD", 3 * 16)
    rows = columnar.Rows(batches)
    order = [0, 2, 4, 1, 3, 5]
    assert [rows[index] for index in order] == [(index + 1, {"n": index}) for index in order]
    assert read == [0, 1, 2]
    # The fourth takes the place of the one that was used longest ago.
    assert [rows[index][0] for index in (6, 2, 4, 6, 0)] == [7, 3, 5, 7, 1]
    assert read == [0, 1, 2, 3, 0]
    # A batch that is larger than what may be held is held alone.
    monkeypatch.setattr(columnar, "BYTES_HELD", 1)
    rows = columnar.Rows(batches)
    assert [rows[index][0] for index in (0, 1, 2, 0)] == [1, 2, 3, 1]
    assert read[5:] == [0, 1, 0]
