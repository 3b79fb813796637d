"""Records -> conversations: where each image goes, and the errors of wrong fields."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from vlft.data.conversation import ImageRef
from vlft.data.options import Reading
from vlft.data.read import read_record
from vlft.data.records import Record
from vlft.errors import DataError

TAG = "<image_placeholder>"


def conversation(fields: dict[str, Any], *, need_response: bool = False):
    reading = Reading(TAG, need_response=need_response)
    record = Record(fields, Path("a.jsonl"), 7)
    return read_record(record, reading, Path("data")).conversations[0]


def flat(fields: dict[str, Any]) -> list[str]:
    """Each turn as text, an image as {its name}."""
    return [
        "".join(f"{{{part.given}}}" if isinstance(part, ImageRef) else part for part in turn.parts)
        for turn in conversation(fields).turns
    ]


def message(fields: dict[str, Any], *, need_response: bool = True) -> str:
    with pytest.raises(DataError) as error:
        conversation(fields, need_response=need_response)
    return str(error.value)


class TestTurns:
    def test_roles_and_texts_in_order(self):
        made = conversation(
            {"query": "q3", "response": "r3", "history": [["q1", "r1"], ("q2", "r2")]}
        )
        assert [(turn.role, turn.parts) for turn in made.turns] == [
            ("user", ("q1",)), ("assistant", ("r1",)),
            ("user", ("q2",)), ("assistant", ("r2",)),
            ("user", ("q3",)), ("assistant", ("r3",)),
        ]  # fmt: skip
        assert (made.place, made.reply, made.system) == ("a.jsonl:7", "r3", None)

    def test_texts_are_left_as_they_are(self):
        made = conversation({"query": "  q\n", "response": " r ", "system": ""})
        assert [turn.parts for turn in made.turns] == [("  q\n",), (" r ",)]
        assert made.system == ""

    @pytest.mark.parametrize("absent", [{}, {"response": None}])
    def test_without_response_it_is_a_question(self, absent):
        made = conversation({"query": "q", **absent})
        assert [turn.role for turn in made.turns] == ["user"]
        assert made.reply is None
        assert message({"query": "q", **absent}).startswith(
            "a.jsonl:7: no reply among the columns that are known (columns: query"
        )

    def test_null_is_absent(self):
        empty = dict.fromkeys(("history", "images", "system", "id", "meta"))
        assert conversation({"query": "q", "response": "r", **empty}) == conversation(
            {"query": "q", "response": "r"}
        )

    def test_id_meta_and_underscores_are_left_alone(self):
        assert flat({"query": "q", "id": 3, "meta": {"a": [1]}, "_source": object()}) == ["q"]

    def test_an_image_may_be_alone_in_its_turn(self):
        assert flat({"query": "<image>", "images": ["a.jpg"]}) == ["{a.jpg}"]

    def test_paths_start_at_the_folder(self):
        made = conversation({"query": "q", "images": ["sub/a.jpg", "/b.jpg", "../c.jpg"]})
        assert [str(image.path) for image in made.images] == [
            "data/sub/a.jpg", "/b.jpg", "data/../c.jpg",
        ]  # fmt: skip

    def test_one_path_needs_no_list(self):
        assert flat({"query": "q", "images": "a.jpg"}) == ["{a.jpg}q"]
        assert flat({"query": "q", "images": ""}) == ["q"]
        assert flat({"query": "q", "images": ()}) == ["q"]


class TestTags:
    @pytest.mark.parametrize("tag", ["<image>", TAG])
    def test_an_image_stands_where_its_tag_does(self, tag):
        fields = {"query": f"x {tag} y{tag}", "images": ["1", "2"], "response": "r"}
        assert flat(fields) == ["x {1} y{2}", "r"]

    def test_both_tags_mix_through_history_and_query(self):
        fields = {
            "history": [[f"<image>a{TAG}", "r1"], ["b<ImageHere>", "r2"], [TAG, "r3"]],
            "query": "c<image>d",
            "images": ["1", "2", "3", "4", "5"],
        }
        assert flat(fields) == ["{1}a{2}", "r1", "b{3}", "r2", "{4}", "r3", "c{5}d"]

    def test_tags_side_by_side(self):
        assert flat({"query": f"<image>{TAG}<image>", "images": list("123")}) == ["{1}{2}{3}"]

    @pytest.mark.parametrize("text", ["<Image>", "< image>", "<image", "<images>", "&lt;image&gt;"])
    def test_what_is_no_tag(self, text):
        assert flat({"query": f"x{text}", "images": ["1"]}) == [f"{{1}}x{text}"]
        assert flat({"query": f"x{text}"}) == [f"x{text}"]

    @pytest.mark.parametrize("count", [1, 2, 5])
    def test_no_tag_and_one_turn(self, count):
        names = [str(i) for i in range(count)]
        start = "".join(f"{{{name}}}" for name in names)
        assert flat({"query": "q", "images": names, "response": "r"}) == [f"{start}q", "r"]

    @pytest.mark.parametrize("turns", [2, 3])
    def test_no_tag_and_as_many_images_as_turns(self, turns):
        fields = {
            "history": [[f"q{i}", f"r{i}"] for i in range(turns - 1)],
            "query": f"q{turns - 1}",
            "images": [str(i) for i in range(turns)],
        }
        assert flat(fields)[::2] == [f"{{{i}}}q{i}" for i in range(turns)]
        assert flat(fields)[1::2] == [f"r{i}" for i in range(turns - 1)]

    @pytest.mark.parametrize("turns", [2, 3, 4])
    def test_no_tag_one_image_and_several_turns(self, turns):
        fields = {
            "history": [[f"q{i}", f"r{i}"] for i in range(turns - 1)],
            "query": "last",
            "images": ["1"],
        }
        assert flat(fields)[0] == "{1}q0"
        assert flat(fields)[2::2] == [*(f"q{i}" for i in range(1, turns - 1)), "last"]

    @pytest.mark.parametrize(("turns", "images"), [(2, 3), (3, 2), (4, 7)])
    def test_no_tag_and_numbers_that_do_not_fit(self, turns, images):
        fields = {
            "history": [["q", "r"]] * (turns - 1),
            "query": "q",
            "images": ["a.jpg"] * images,
            "response": "r",
        }
        assert message(fields) == (
            f"a.jsonl:7: {images} images listed, {turns} user turns and no <image> in the text\n"
            " hint: put <image> where each image belongs"
        )

    @pytest.mark.parametrize(
        ("query", "images", "found"),
        [
            ("<image>", 0, "0 images listed, 1 <image>"),
            ("<image>", 2, "2 images listed, 1 <image>"),
            (f"<image>{TAG}", 1, "1 image listed, 2 <image>"),
            (f"{TAG}<image>x<image>", 4, "4 images listed, 3 <image>"),
        ],
    )
    def test_tags_that_do_not_fit(self, query, images, found):
        expected = (
            f"a.jsonl:7: {found} in the text\n"
            ' hint: put one <image> per entry of "images", in the order they are read'
        )
        listed = ["a.jpg"] * images
        assert message({"query": query, "images": listed, "response": "r"}) == expected
        history = [[query, "r1"]]
        assert message({"query": "q", "history": history, "images": listed, "response": "r"}) == (
            expected
        )

    @pytest.mark.parametrize("tag", ["<image>", TAG])
    @pytest.mark.parametrize("name", ["response", "system"])
    def test_no_tag_belongs_here(self, name, tag):
        fields = {"query": "q", "response": "r", name: f"x {tag}"}
        where = "the system prompt" if name == "system" else '"response", a reply'
        expected = f"a.jsonl:7: found {tag} in {where}\n hint: images belong in a question"
        assert message(fields) == expected

    def test_no_tag_belongs_in_a_reply_of_the_history(self):
        fields = {"query": "q", "history": [["q", "see <image>"]], "images": ["a"], "response": "r"}
        assert 'found <image> in "history", a reply' in message(fields)


class TestFields:
    @pytest.mark.parametrize(
        ("fields", "found"),
        [
            ({"query": 3}, '"query": found a number, 3; text is allowed'),
            ({"query": ["q"]}, "\"query\": found a list, ['q']; text is allowed"),
            ({"query": True}, '"query": found true or false, True; text is allowed'),
            ({"response": 1.5}, '"response": found a number, 1.5; text is allowed'),
            ({"system": {}}, '"system": found an object, {}; text is allowed'),
            ({"images": 3}, '"images": found a number, 3; a list of paths is allowed'),
            ({"images": ["", 1]}, "\"images\": found a list, ['', 1]; a list of paths is allowed"),
            ({"images": [None]}, '"images": found a list, [None]; a list of paths is allowed'),
            (
                {"images": {"file": "a"}},
                "\"images\": found an object, {'file': 'a'}; a list of paths is allowed",
            ),
            *(
                (
                    {"history": value},
                    f'"history": found {kind}, {value!r}; '
                    'a list of ["question", "reply"] pairs is allowed',
                )
                for value, kind in (
                    ([["a", "b", "c"]], "a list"),
                    ([["a"]], "a list"),
                    (["ab"], "a list"),
                    ([["a", None]], "a list"),
                    ([["a", "b"], 3], "a list"),
                    ([{"q": "r"}], "a list"),
                    ({"q": "r"}, "an object"),
                    ("q", "text"),
                )
            ),
        ],
    )  # fmt: skip
    def test_wrong_type(self, fields, found):
        (name,) = fields
        example = {"images": '["a.jpg"]', "history": '[["question", "reply"]]'}.get(name, '"..."')
        assert message({"query": "q", "response": "r", **fields}) == (
            f'a.jsonl:7: {found}\n hint: write e.g. "{name}": {example}'
        )

    def test_a_long_value_is_cut(self):
        nested: list[Any] = []
        for _ in range(5000):
            nested = [nested]
        for value in ([1] * 9999, {"x": 9999 * "y"}, nested):
            assert len(message({"query": value, "response": "r"}).splitlines()[0]) < 120

    @pytest.mark.parametrize(
        ("fields", "found", "hint"),
        [
            (
                {"imges": ["a.jpg"]}, '"imges" is not read, and the record has no image',
                'did you mean "images"? Or add --columns images=imges',
            ),
            (
                {"Images": "a"}, '"Images" is not read, and the record has no image',
                'did you mean "images"? Or add --columns images=Images',
            ),
            (
                {"scan": ["x/1.PNG", "2.jpeg"]}, '"scan" seems to hold images',
                "add --columns images=scan to read it",
            ),
            ({"thumb": {"bytes": b"x", "path": None}}, '"thumb" seems to hold images', "add --"),
            ({"histroy": [["q", "r"]]}, '"histroy" is not read', 'did you mean "history"?'),
        ],
    )  # fmt: skip
    def test_a_name_that_is_nearly_right(self, fields, found, hint):
        said = message({"query": "q", "response": "r", **fields})
        assert said.startswith(f"a.jsonl:7: {found}")
        assert f"\n hint: {hint}" in said

    def test_other_columns_are_named(self):
        fields = {
            "query": "q", "response": "r", "id": 1, "_own": 2, "category": "c", "empty": None,
            "story": "once", "image_id": 7, "messages_count": 2,
        }  # fmt: skip
        record = Record(fields, Path("a.jsonl"), 7)
        made = read_record(record, Reading(TAG), Path("data"))
        assert made.unread == ("category", "story", "image_id", "messages_count")

    @pytest.mark.parametrize(
        ("fields", "unread"),
        [
            ({"messages": [{"role": "user", "content": "q", "name": "Ann", "id": None},
                           {"role": "assistant", "content": "r", "loss": 1, "thought": "hm"}],
              "images": ["a.jpg"], "source": "x"},
             ("source", "messages[].name", "messages[].thought")),
            ([{"from": "human", "value": "q"}, {"from": "gpt", "value": "r", "score": 0.5}],
             ("[].score",)),
            ({"qa": [{"question": "q", "answer": "r", "page": 3}]}, ("qa[].page",)),
            ({"query": "q", "response": "r", "images": [{"path": "a.jpg", "bytes": None}]}, ()),
        ],
    )  # fmt: skip
    def test_keys_of_turns_that_are_not_read_are_named_too(self, fields, unread):
        made = read_record(Record(fields, Path("a.jsonl"), 7), Reading(TAG), Path("data"))
        assert made.unread == unread

    def test_with_an_image_a_second_column_of_images_is_only_named(self):
        fields = {"query": "q", "response": "r", "images": ["a.jpg"], "mask": "m.png"}
        made = read_record(Record(fields, Path("a.jsonl"), 7), Reading(TAG), Path("data"))
        assert made.unread == ("mask",)

    @pytest.mark.parametrize("fields", [{}, {"query": None}])
    def test_no_query(self, fields):
        assert message({"response": "r", **fields}).startswith(
            "a.jsonl:7: no question among the columns that are known (columns: response"
        )

    @pytest.mark.parametrize("text", ["", " \n\t"])
    def test_empty_query_and_response(self, text):
        assert message({"query": text, "response": "r"}) == (
            'a.jsonl:7: "query" is empty\n hint: write the question'
        )
        assert message({"query": "q", "response": text}) == (
            'a.jsonl:7: "response" is empty\n hint: write the reply; only vlft infer works without'
        )

    def test_an_untagged_image_makes_a_query_of_spaces_a_question(self):
        assert flat({"query": " ", "images": ["1"]}) == ["{1} "]

    @pytest.mark.parametrize("path", ["", "  "])
    def test_empty_path(self, path):
        assert message({"query": "q", "response": "r", "images": [path]}) == (
            'a.jsonl:7: "images" holds an empty path\n hint: name an image'
        )

    def test_nul_in_a_path(self):
        assert message({"query": "q", "response": "r", "images": ["a\0.jpg"]}) == (
            "a.jsonl:7: \"images\" holds 'a\\x00.jpg'; no path has a NUL character\n"
            " hint: remove the character"
        )

    @pytest.mark.parametrize(
        "fields",
        [
            {"query": "q\ud83d"},
            {"response": "\udfffr"},
            {"system": "\ud800"},
            {"images": ["a\udc00.jpg"]},
            {"history": [["q", "r"], ["q", "\udbff"]]},
        ],
    )
    def test_half_a_character(self, fields):
        ((name, value),) = fields.items()
        (half,) = re.findall(r"[\ud800-\udfff]", str(value)) or re.findall(r"\\ud...", str(value))
        assert message({"query": "q", "response": "r", **fields}) == (
            f"a.jsonl:7: \"{name}\" holds '{half.encode('ascii', 'backslashreplace').decode()}', "
            "a lone surrogate\n hint: write the file again as UTF-8, or remove the character"
        )

    def test_whole_characters_beyond_the_basic_plane_are_text(self):
        assert flat({"query": "😀𝔸", "response": "\ufffd\ue000"}) == ["😀𝔸", "\ufffd\ue000"]


@pytest.mark.parametrize(
    "name", ["s3://bucket/a.jpg", "OSS://b/a.jpg", "cluster:s3://b/a.jpg", "ftp://a.b/c.jpg"]
)
def test_addresses_are_refused_as_they_are_written(name):
    found = message({"query": "What?", "images": [name], "response": "r"})
    assert found.startswith(f"a.jsonl:7: found {name!r} as an image; paths and http(s) addresses")


class TestRules:
    """Where two readings are near, the one that the order of the rules gives."""

    @pytest.mark.parametrize(
        ("fields", "turns"),
        [
            ({"messages": [], "query": "q", "response": "r"}, ["q", "r"]),
            ({"query": "q", "response": "[]", "tools": "[]", "videos": []}, ["q", "[]"]),
            ({"prompt": "", "question": "q", "answer": "", "solution": "r"}, ["q", "r"]),
            ({"question": "q", "answer": "r", "answers": ["x", "y"]}, ["q", "r"]),
            ({"texts": ["a", None], "question": "q", "answer": "r"}, ["q", "r"]),
            (
                {"messages": [{"user": "q", "assistant": "r", "role": None, "content": None}]},
                ["q", "r"],
            ),
            (
                {"conversations": [{"from": "user", "value": "q", "role": None, "content": None},
                                   {"from": None, "value": None, "role": "MODEL", "content": "r"}]},
                ["q", "r"],
            ),
            ({"query": "<img>a.png</img>q", "response": "r"}, ["{a.png}q", "r"]),
            ({"query": "q", "response": "r", "image": {"bytes": None, "path": "a.png"}},
             ["{a.png}q", "r"]),
            ({"query": "q", "response": "r", "image": {"bytes": None, "path": None}}, ["q", "r"]),
            ({"query": "What is <Image>?", "response": "r"}, ["What is <Image>?", "r"]),
            (
                {"messages": [
                    {"role": "user", "content": [
                        {"type": "image", "source": {"type": "url", "url": "a.png"}},
                        {"type": "text", "text": "q"}]},
                    {"role": "assistant", "content": "r"}]},
                ["{a.png}q", "r"],
            ),
        ],
    )  # fmt: skip
    def test_is_read(self, fields, turns):
        assert flat(fields) == turns

    @pytest.mark.parametrize(
        ("fields", "found"),
        [
            ({"messages": []}, '"messages" has no turn'),
            ({"messages": [{"role": "user", "content": "q"}], "texts": [{"user": "a"}]},
             "messages and texts are lists of turns"),
            ({"question": "q", "answer": "B", "choices": ["x"]}, "found answer beside choices"),
            ({"question": "q", "answer": "B", "A": "x", "B": "y"}, "found answer beside A and B"),
            ({"question": "q", "answers": ["x"]}, "found answers, a list"),
            ({"question": "q", "answer": ["x"]}, "found answer, a list; which one"),
            ({"query": "<image 1> q", "response": "r"}, "found <image 1> in"),
            ({"query": "<|image_1|>q", "response": "r"}, "found <|image_1|> in"),
            ({"query": "<|vision_start|>q", "response": "r"}, "found <|vision_start|> in"),
            ({"prompt": "q", "chosen": "a", "rejected": "b"}, "found chosen, rejected"),
            ({"query": "q", "response": "r", "label": False}, "found label with true or false"),
            ({"query": "q", "response": "r", "objects": {"ref": ["x"]}}, 'found "objects"'),
            ({"query": "<img>a.png</img>q", "response": "r", "images": ["a.png"]},
             "1 image listed, 0 <image>"),
            ({"query": "q", "response": "r", "image": {"<x>": "a.png"}},
             "<x> has an image and is not in the text"),
            ({"query": "q", "response": "r", "image": "a.png", "file_name": "b.png"},
             "image and file_name could be the images"),
            ({"messages": [{"role": "user", "content": "q", "loss": True},
                           {"role": "assistant", "content": "r"}]}, "turn 1 is to be trained"),
        ],
    )  # fmt: skip
    def test_is_refused(self, fields, found):
        assert message(fields).startswith(f"a.jsonl:7: {found}")

    @pytest.mark.parametrize(
        ("fields", "turns"),
        [
            ({"prompt": "q", "chosen": "a", "rejected": "b"}, ["q", "a"]),
            ({"prompt": "q", "chosen": {"role": "assistant", "content": "a"}, "rejected": "b"},
             ["q", "a"]),
            ({"prompt": "q", "chosen": [{"role": "user", "content": "q"},
                                        {"role": "assistant", "content": "a"}], "rejected": []},
             ["q", "a"]),
            ({"prompt": [{"role": "user", "content": "q"}],
              "chosen": [{"role": "assistant", "content": "a"}], "rejected": "b"}, ["q", "a"]),
            ({"messages": [{"role": "user", "content": "q"}], "chosen": "a", "rejected": "b"},
             ["q", "a"]),
        ],
    )  # fmt: skip
    def test_the_chosen_reply(self, fields, turns):
        record = Record(fields, Path("a.jsonl"), 7)
        made = read_record(record, Reading(preference="chosen"), Path()).conversations[0]
        assert [turn.parts[0] for turn in made.turns] == turns

    def test_turns_that_are_a_text_are_named(self):
        found = message({"messages": '[{"role": "user", "content": "q"}]'})
        assert found.startswith('a.jsonl:7: "messages" is no list of turns')
        assert "a text that holds JSON: write the list itself" in found

    def test_a_prompt_that_the_dialogue_took_counts_as_read(self):
        fields = {
            "prompt": [{"role": "user", "content": "q"}],
            "chosen": [{"role": "assistant", "content": "a"}],
            "rejected": "b",
        }
        made = read_record(Record(fields, Path("a.jsonl"), 7), Reading(preference="chosen"), Path())
        assert made.columns == ("prompt", "chosen", "rejected")
        assert made.unread == ()

    @pytest.mark.parametrize("name", ["answer", "captions"])
    def test_a_reply_that_is_a_list_is_several_references(self, name):
        fields = {"question": "q", name: ["x", {"answer": "y"}, "x"]}
        columns = {"response": name}
        for answers, replies in (("first", ["x"]), ("most", ["x"]), ("each", ["x", "y"])):
            reading = Reading(answers=answers, columns=columns)
            made = read_record(Record(fields, Path("a.jsonl"), 7), reading, Path()).conversations
            assert [item.reply for item in made] == replies

    def test_bytes_of_a_source_are_the_image(self):
        source = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}
        parts = [{"type": "image", "source": source}, {"type": "text", "text": "q"}]
        made = conversation({"messages": [{"role": "user", "content": parts}]})
        assert made.turns[0].parts[0].path.read_bytes() == b"\x89PNG\r\n\x1a\n"
        assert made.turns[0].parts[1] == "q"
