"""CIDEr and TEDS against the numbers of their authors' code, which was run once."""

from __future__ import annotations

import pytest
from conftest import write_jsonl

import vlft
from vlft.errors import DataError
from vlft.evaluation.captions import cider
from vlft.evaluation.metrics import METRICS
from vlft.evaluation.tables import teds
from vlft.evaluation.trees import Tree, tree_distance

# Replies and references, and pycocoevalcap 1.2: Cider().compute_score after its PTBTokenizer.
CAPTIONS = [
    ("A man rides a brown horse.",
     ["A man riding a horse on the beach.", "A person on a brown horse."], 2.244879120514754),
    ("Two cats are sleeping on the bed",
     ["Two cats sleep on a bed.", "A pair of cats lying on the bed", "Cats asleep on a blanket."],
     1.6079110811433293),
    ("It's a kitchen, with a white-tiled wall!",
     ["It's a kitchen with white-tiled walls.",
      "The kitchen has a white-tiled wall, a stove and a sink."], 3.971914377496955),
    ("A red bus doesn't stop at the corner.",
     ["A red bus that doesn't stop.", "A red double-decker bus at a street corner"],
     2.916755568131244),
    ("", ["A dog runs on the grass."], 0.0),
    ("A plate of food: rice, beans and 3 eggs",
     ["A plate with rice, beans, and eggs.", "Food (rice; beans) on a plate..."],
     2.6688787023348115),
    ("a man", ["A man in a suit.", "The man's suit is black."], 1.1694109248908129),
]  # fmt: skip
PRICES = (
    "<table><thead><tr><td>Item</td><td>Price</td></tr></thead><tbody>"
    "<tr><td>Rice</td><td>0.40</td></tr><tr><td>Beans</td><td>1.25</td></tr></tbody></table>"
)
GRID = "<table><tr><td>1</td><td>2</td></tr><tr><td>3</td><td>4</td></tr></table>"
# Reply, reference, and PubTabNet's TEDS().evaluate of both within <html><body>.
TABLES = [
    (PRICES, PRICES, 1.0),
    (PRICES.replace("0.40", "0.48"), PRICES, 0.9772727272727273),
    (PRICES.replace("<tr><td>Beans</td><td>1.25</td></tr>", ""), PRICES, 0.7272727272727273),
    (PRICES.replace("thead>", "x>").replace("<x>", "").replace("</x>", "")
     .replace("<tbody>", "").replace("</tbody>", ""), PRICES, 0.8181818181818181),
    ('<table><tr><td colspan="2">Total</td></tr><tr><td>a</td><td rowspan="2"><b>b</b> x</td></tr>'
     "</table>",
     '<table><tr><td>Total</td><td></td></tr><tr><td>a</td><td rowspan="2">b <i>x</i></td></tr>'
     "</table>", 0.6000000000000001),
    ("<table><tr><th>Item</th><th>No<br>2</th></tr><tr><td>Rice &amp; beans<br>x</td><td>3</td>"
     "</tr></table>",
     "<table><tr><td>Item</td><th>No 2</th></tr><tr><td>Rice and beans</td><td>4</td></tr></table>",
     0.575),
    (GRID, GRID.replace("</td><td>", "</td></tr><tr><td>"), 0.25),
    ("<table><tr><td>1<td>2<tr><td>3<td>4</table>", GRID, 1.0),
    ("<table><tr><td>1</td><td>2</td></tr><tr><td>3</td><td>", GRID, 0.8333333333333334),
    ("<table></table>", "<table><tr><td>1</td></tr></table>", 0.0),
]  # fmt: skip
MARKDOWN = "| Item | Price |\n|:---|---:|\n| Rice | 0.40 |\n| Beans | 1.25 |"


class TestCider:
    @pytest.mark.parametrize("case", CAPTIONS, ids=lambda case: case[0][:20])
    def test_the_authors_numbers(self, case):
        score = cider([references for _, references, _ in CAPTIONS])
        assert score(case[0], case[1]) == pytest.approx(case[2], abs=1e-12)

    def test_the_command_knows_all_records(self, tmp_path):
        rows = [{"query": "", "response": reply, "meta": {"all": references}, "images": []}
                for reply, references, _ in CAPTIONS]  # fmt: skip
        path = write_jsonl(tmp_path / "captions.jsonl", rows)
        config = vlft.EvalConfig(results=(path,), metric=("cider",), references="meta.all")
        (score,) = vlft.evaluate(config).summary["metrics"]["cider"]["scores"]
        assert score["mean"] == pytest.approx(2.082821396358844, abs=1e-12)
        low, high = score["interval"]
        assert low < score["mean"] < high

    def test_no_record_has_one_alone(self):
        with pytest.raises(ValueError, match="is scored by vlft eval alone"):
            METRICS["cider"].best("A man.", ["A man."])


class TestTeds:
    @pytest.mark.parametrize("case", TABLES, ids=lambda case: case[0][:40])
    def test_the_authors_numbers(self, case):
        assert teds(case[0], case[1]) == pytest.approx(case[2], abs=1e-12)

    @pytest.mark.parametrize(
        ("reply", "reference", "score"),
        [
            (MARKDOWN, MARKDOWN, 1.0),
            (f"Here it is:\n\n{MARKDOWN}\n\nAnd more.", PRICES, 1.0),
            (PRICES, MARKDOWN, 1.0),
            # A replaced character of four, of nine nodes.
            (MARKDOWN.replace("0.40", "0.48"), PRICES, 1 - 0.25 / 9),
            ("| a \\| b |\n|---|", "<table><tr><th>a | b</th></tr></table>", 1.0),
            # Two tables for one, and one for two.
            (f"{MARKDOWN}\n\n{MARKDOWN}", PRICES, 0.5),
            (PRICES, f"{PRICES}\n{MARKDOWN}", 0.5),
            (f"{MARKDOWN}\n\n{GRID}", f"{PRICES}{GRID}", 1.0),
            ("No table.", PRICES, 0.0),
            ("| no | table |", PRICES, 0.0),
        ],
    )
    def test_markdown_and_several(self, reply, reference, score):
        assert teds(reply, reference) == pytest.approx(score)

    def test_a_reference_without_a_table(self, tmp_path):
        row = {"query": "", "response": PRICES, "label": "No table.", "images": []}
        path = write_jsonl(tmp_path / "tables.jsonl", [row])
        with pytest.raises(DataError, match="the reference has no table in HTML or Markdown"):
            vlft.evaluate(vlft.EvalConfig(results=(path,), metric=("teds",)))

    def test_a_table_of_many_cells_is_quick(self):
        rows = [[f"{row} {column}" for column in range(8)] for row in range(20)]
        one, other = (
            "<table>"
            + "".join(f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in some)
            + "</table>"
            for some in (rows, rows[1:])
        )
        assert teds(other, one) == pytest.approx(1 - 9 / 180)


def test_the_edits_of_the_authors_trees():
    """Zhang and Shasha 1989, figure 4: two edits."""
    a, b, c, d, e, f = (Tree(name) for name in "abcdef")
    one = Tree("f", [Tree("d", [a, Tree("c", [b])]), e])
    other = Tree("f", [Tree("c", [Tree("d", [a, b])]), e])
    assert tree_distance(one, other, lambda x, y: float(x != y)) == 2
    assert tree_distance(Tree("f", [c]), Tree("f", [d, f]), lambda x, y: float(x != y)) == 2
