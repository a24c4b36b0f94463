"""Reading text in every form it comes in."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from robust_unlearning import UserError
from robust_unlearning.data.corpora import read_documents
from robust_unlearning.recipe import TextSource

LONG = [
    f"document {index} of {word}, long enough to be kept as it is by the default" for index, word in enumerate("abcd")
]


def _write(path: Path, lines: Iterable[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def _jsonl(path: Path, rows: Iterable[Any]) -> Path:
    return _write(path, (json.dumps(row) for row in rows))


def _parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def _read(path: Path, **changes: Any) -> list[str]:
    return read_documents(TextSource(path=str(path), **changes))


def _error(path: Path | str, **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        read_documents(TextSource(path=str(path), **changes))
    return str(caught.value)


# --- forms


def test_jsonl_objects(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "a.jsonl", ({"text": text, "more": 1} for text in LONG))
    assert _read(path) == LONG


def test_jsonl_objects_with_another_field(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "a.jsonl", ({"body": text, "text": "x" * 60} for text in LONG))
    assert _read(path, field="body") == LONG


def test_jsonl_of_bare_strings(tmp_path: Path) -> None:
    assert _read(_jsonl(tmp_path / "a.jsonl", LONG)) == LONG


def test_wmdp_biology_papers(tmp_path: Path) -> None:
    rows = [{"title": "T", "abstract": "A" * 99, "text": text, "doi": "10.1/x"} for text in LONG]
    path = _jsonl(tmp_path / "bio_remove_dataset.jsonl", rows)
    assert _read(path) == LONG
    assert _read(path, field="abstract") == ["A" * 99] * 4


def test_wmdp_cyber_as_objects_and_as_bare_lines_gives_the_same_documents(tmp_path: Path) -> None:
    objects = _jsonl(tmp_path / "objects.jsonl", ({"text": text} for text in LONG))
    bare = _write(tmp_path / "cyber-forget-corpus.jsonl", LONG)
    assert _read(objects) == _read(bare) == LONG


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in LONG), encoding="utf-8-sig")
    assert _read(path) == LONG


def test_blank_lines_of_jsonl_are_passed_over(tmp_path: Path) -> None:
    path = _write(
        tmp_path / "a.jsonl", ["", *(line for text in LONG for line in (json.dumps({"text": text}), "", " "))]
    )
    assert _read(path) == LONG


def test_line_separators_inside_a_string_do_not_break_a_line(tmp_path: Path) -> None:
    text = LONG[0] + "\u2028\x85\x0c" + LONG[1]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert _read(path) == [text]


def test_text_is_read_by_paragraphs(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.txt", [LONG[0], LONG[1], "", "  ", LONG[2], "", LONG[3]])
    assert _read(path) == [f"{LONG[0]}\n{LONG[1]}", LONG[2], LONG[3]]


def test_format_lines_takes_each_line_of_any_file(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.data", [LONG[0], "", LONG[1], '{"text": "' + "x" * 60 + '"}'])
    assert _read(path, format="lines") == [LONG[0], LONG[1], '{"text": "' + "x" * 60 + '"}']


def test_parquet(tmp_path: Path) -> None:
    path = _parquet(tmp_path / "a.parquet", {"text": LONG, "label": [1, 2, 3, 4]})
    assert _read(path) == LONG


def test_empty_cells_of_parquet_are_passed_over(tmp_path: Path) -> None:
    path = _parquet(tmp_path / "a.parquet", {"text": [LONG[0], None, LONG[1]]})
    assert _read(path) == LONG[:2]


@pytest.fixture
def hub_folder(tmp_path: Path) -> Path:
    """A folder laid out as WMDP's data set on the hub: two configurations, one parquet file each."""
    folder = tmp_path / "wmdp-corpora"
    names = ["bio-retain-corpus", "cyber-forget-corpus"]
    for index, name in enumerate(names):
        _parquet(folder / name / "train-00000-of-00001.parquet", {"text": LONG[2 * index : 2 * index + 2]})
    configs = [f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*\n" for name in names]
    (folder / "README.md").write_text("---\nconfigs:\n" + "".join(configs) + "---\n# A data set\n", encoding="utf-8")
    return folder


def test_a_folder_laid_out_as_the_hubs_is_read_by_configuration(hub_folder: Path) -> None:
    assert _read(hub_folder, config="bio-retain-corpus") == LONG[:2]
    assert _read(hub_folder, config="cyber-forget-corpus") == LONG[2:]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"config": "bio-retain"}, "bio-retain-corpus"),
        ({}, "bio-retain-corpus"),
        ({"config": "bio-retain-corpus", "split": "test"}, "test"),
        ({"config": "bio-retain-corpus", "field": "texts"}, "text"),
    ],
)
def test_a_wrong_configuration_split_or_column_of_a_folder_is_named(
    changes: dict[str, str], says: str, hub_folder: Path
) -> None:
    message = _error(hub_folder, **changes)
    assert says in message
    assert hub_folder.name in message


def test_a_hub_data_set_that_cannot_be_had_is_an_error_that_names_it() -> None:
    message = _error("hub:no-such-org/no-such-data", config="some")
    assert "hub:no-such-org/no-such-data" in message
    assert "'some'" in message


# --- which documents


def test_short_lines_as_of_wikitext_are_left_out(tmp_path: Path) -> None:
    rows = ["", " = Title = \n", LONG[0], "", " = = Section = = \n", LONG[1], " "]
    path = _parquet(tmp_path / "a.parquet", {"text": rows})
    assert _read(path) == LONG[:2]
    assert _read(path, min_chars=5) == [rows[1], LONG[0], rows[4], LONG[1]]
    assert len(_read(path, min_chars=0)) == 4  # blank rows are no documents even then


def test_min_chars_counts_what_is_left_without_surrounding_blanks(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "a.jsonl", [{"text": "x" * 10}, {"text": "y" * 9 + " " * 20}, {"text": "z" * 11}])
    assert _read(path, min_chars=10) == ["x" * 10, "z" * 11]


def test_max_documents_counts_the_kept_ones(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "a.jsonl", [{"text": text} for text in ("short", *LONG)])
    assert _read(path, max_documents=2) == LONG[:2]
    assert _read(path, max_documents=99) == LONG


# --- errors


def test_a_wrong_path_gets_the_nearest_name_beside_it(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "forget.jsonl", LONG)
    message = _error(tmp_path / "forgt.jsonl")
    assert "no such file or folder" in message
    assert f"Did you mean {str(path)!r}?" in message
    for name in ("o_mmlu.txt", "one.jsonl", "elsewhere.txt", "forget.txt"):
        (tmp_path / name).touch()
    for wrong, right in {"forgt": "forget.jsonl", "forgot.txt": "forget.txt", "o_mlu.txt": "o_mmlu.txt"}.items():
        assert f"Did you mean {str(tmp_path / right)!r}?" in _error(tmp_path / wrong)
    assert f"Did you mean {str(path)!r}?" in _error(tmp_path.with_name(tmp_path.name + "_") / path.name)
    for wrong in ("mmlu", "nofile.txt", "nope.json", "nowhere"):
        assert "Did you mean" not in _error(tmp_path / wrong)


def test_a_wrong_relative_path_says_where_was_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(tmp_path / "data" / "forget.jsonl") in _error("data/forget.jsonl")


def test_a_wrong_bundled_file_gets_the_nearest() -> None:
    assert "did you mean 'demo:forget.jsonl'?" in _error("demo:forgt.jsonl")


def test_the_bundled_texts_can_be_read() -> None:
    assert read_documents(TextSource(path="demo:forget.jsonl", max_documents=3, min_chars=0))


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    assert "it is empty" in _error(_write(tmp_path / "a.jsonl", []))


def test_only_short_documents_are_an_error_that_counts_them(tmp_path: Path) -> None:
    message = _error(_jsonl(tmp_path / "a.jsonl", [{"text": "short"}] * 3))
    assert "none of its 3 documents has 50 characters" in message
    assert "min_chars" in message


def test_a_missing_column_is_named_with_the_line_the_columns_and_the_nearest(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "a.jsonl", [{"text": LONG[0]}, {"texts": LONG[1], "doi": "x"}])
    message = _error(path)
    assert f"{path}, line 2: no column 'text'; it has doi, texts" in message
    assert message.endswith("texts?")


def test_a_missing_parquet_column_is_named_with_the_nearest(tmp_path: Path) -> None:
    message = _error(_parquet(tmp_path / "a.parquet", {"body": LONG}), field="bdy")
    assert "no column 'bdy'; it has body" in message
    assert message.endswith("body?")


def test_a_broken_line_is_named_by_its_number(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", [json.dumps({"text": LONG[0]}), "", '{"text": "cut off', json.dumps(LONG[1])])
    message = _error(path)
    assert f"{path}, line 3: not JSON" in message


def test_a_broken_first_object_is_not_taken_for_plain_text(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", ['{"text": "' + "x" * 80, *LONG])
    assert "line 1: not JSON" in _error(path)


@pytest.mark.parametrize("row", [3, [LONG[0]], None, True])
def test_a_row_that_is_neither_object_nor_string_is_an_error(row: Any, tmp_path: Path) -> None:
    message = _error(_jsonl(tmp_path / "a.jsonl", [{"text": LONG[0]}, row]))
    assert "line 2: an object or a string is expected" in message


@pytest.mark.parametrize(
    ("value", "kind"),
    [(3, "a number"), (True, "true or false"), (None, "nothing"), (["a"], "a list"), ({"a": 1}, "a mapping")],
)
def test_a_value_that_is_no_text_is_named_by_line_and_type(value: Any, kind: str, tmp_path: Path) -> None:
    message = _error(_jsonl(tmp_path / "a.jsonl", [{"text": LONG[0]}, {"text": value}]))
    assert f"line 2: 'text' holds {kind}, not text" in message


def test_a_parquet_column_that_is_no_text_is_named_by_row_and_type(tmp_path: Path) -> None:
    message = _error(_parquet(tmp_path / "a.parquet", {"text": [1, 2]}))
    assert "row 1: 'text' holds a number, not text" in message


def test_a_broken_parquet_file_is_one_message(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.parquet").write_text("junk")
    assert "a.parquet' with error" in _error(tmp_path / "a.parquet")
    assert not caplog.records


def test_bytes_that_are_not_utf8_are_an_error(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.txt"):
        (tmp_path / name).write_bytes(b'{"text": "caf\xe9 ' + b"x" * 60 + b'"}\n')
        message = _error(tmp_path / name)
        assert "not UTF-8" in message
        assert name in message


@pytest.mark.parametrize("kind", ["jsonl", "text", "lines", "parquet"])
def test_a_folder_where_a_file_is_needed_is_an_error(kind: str, tmp_path: Path) -> None:
    message = _error(tmp_path, format=kind)
    assert "is a folder" in message
    assert kind in message


def test_a_file_where_a_folder_is_needed_is_an_error(tmp_path: Path) -> None:
    assert "is a file" in _error(_jsonl(tmp_path / "a.jsonl", LONG), format="hub")


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    assert "cannot read data set" in _error(tmp_path / "data")


def test_a_file_that_is_no_parquet_is_an_error(tmp_path: Path) -> None:
    assert "cannot read data set" in _error(_write(tmp_path / "a.parquet", LONG))


def test_an_unknown_ending_asks_for_the_format(tmp_path: Path) -> None:
    message = _error(_write(tmp_path / "a.data", LONG))
    assert "'.data'" in message
    assert "set format" in message
