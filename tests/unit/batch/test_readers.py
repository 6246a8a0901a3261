"""Inputs as their authors write them: what is read, and where an error is said to be."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import given, strategies

from mii_serve.batch.readers import MAX_LINE_BYTES, CsvFile, JsonLines, Reader
from mii_serve.batch.rows import RowError, near_parameter, row_of, row_of_text
from mii_serve.types import RequestedParams


def read(path: Path, content: bytes) -> tuple[list[str], list[str]]:
    """The prompts, and the problems."""
    path.write_bytes(content)
    reader: Reader = JsonLines(path) if path.suffix == ".jsonl" else CsvFile(path)
    records = list(reader.records())
    for record in records:
        if record.row is not None:
            assert reader.row_at(record.position, record.line) == record.row
    return [r.row.params.prompt for r in records if r.row is not None], [str(r.problem) for r in records if r.row is None]


A, B = b'{"prompt": "a"}', b'{"prompt": "b"}'


@pytest.mark.parametrize(
    "content",
    [
        A + b"\n" + B + b"\n",
        A + b"\n" + B,
        b"\xef\xbb\xbf" + A + b"\r\n" + B + b"\r\n",
        b"\n\n" + A + b"\n  \n" + B + b"\n\n",
    ],
    ids=["plain", "no last newline", "BOM and CRLF", "empty lines"],
)
def test_json_lines_of_any_editor_are_read(tmp_path, content):
    assert read(tmp_path / "a.jsonl", content) == (["a", "b"], [])


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"prompt": "\xff"}', "2:13: not UTF-8: byte 0xff"),
        (b'{"prompt": "a\x00"}', "2:14: a NUL character"),
        (b'{"prompt": "a"', "2:15: not JSON: Expecting ',' delimiter"),
        (b'["a"]', "2:1: must be a JSON object, got list"),
        (b'{"prompt": NaN}', "2: not JSON: NaN is not a number"),
        (b'{"prompt": 7}', "2:2: prompt: must be text, got int"),
        (b'{"prompt": null}', "2:2: prompt: is missing"),
        (b'{"text": "a"}', "2: prompt: is missing"),
        (b'{"prompt": "a", "prompt": "b"}', "2:2: prompt: is there twice"),
        (b'{"prompt": "a", "guidence_scale": 3}', "2:17: guidence_scale: no such parameter; did you mean guidance_scale?"),
        (b'{"prompt": "a", "seed": "7"}', "2:17: seed: must be a whole number, got '7'"),
        (b'{"prompt": "a", "id": [1]}', "2:17: id: must be text or a whole number, got list"),
        (b'{"prompt": "a", "id": "' + 600 * b"x" + b'"}', "2:17: id: must have 1 to 512 characters, got 600"),
        (b'{"prompt": "a", "id": "\\ud800"}', "2:17: id: must be valid Unicode text without lone surrogates"),
        (b'{"prompt": "' + MAX_LINE_BYTES * 10 * b"x" + b'"}', "2: the line is longer than 1048576 bytes"),
        (b"[" * 100_000, "2: not JSON: nested too deeply"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_a_wrong_line_is_named_by_line_and_column_and_the_others_are_read(tmp_path, line, problem):
    prompts, problems = read(tmp_path / "a.jsonl", A + b"\n" + line + b"\n" + B + b"\n")
    assert prompts == ["a", "b"]
    [found] = problems
    assert found.startswith(problem)


def test_csv_with_quotes_commas_and_newlines_is_read_as_written(tmp_path):
    content = b'\xef\xbb\xbf,prompt,seed,note\r\n0,"a, ""b""\nc",7,x\r\n\r\n1,d,,\r\n'
    path = tmp_path / "a.csv"
    assert read(path, content) == (['a, "b"\nc', "d"], [])
    first, second = CsvFile(path).records()
    assert (first.line, second.line) == (2, 5)
    assert first.row.params == RequestedParams(prompt='a, "b"\nc', seed=7)
    assert first.row.extra == {"column 1": "0", "note": "x"}, "pandas writes its index without a name"
    assert second.row.params.seed is None


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"text,seed\na,1\n", "1: there is no column prompt, only text, seed"),
        (b"", "1: there is no column prompt, only "),
        (b"prompt,guidence_scale\na,1\n", "1:guidence_scale: no such parameter; did you mean guidance_scale?"),
        (b"prompt,prompt\na,b\n", "1:prompt: this column is there twice"),
        (b"prompt,seed\na\n", "2: has 1 of 2 columns"),
        (b"prompt,seed\na,x\n", "2:seed: seed: must be a whole number, got 'x'"),
        (b"prompt,seed\na,1\n\xff,2\n", "3:1: not UTF-8: byte 0xff"),
        (b'prompt,seed\n"a"b,1\n', "2: ',' expected after '\"'"),
        (b'prompt,seed\n"a,1\nb,2\n', "3: unexpected end of data"),
        (b"prompt\n\x00\n", "2:1: a NUL character"),
    ],
)
def test_a_wrong_csv_is_named_by_line_and_column(tmp_path, content, problem):
    _, problems = read(tmp_path / "a.csv", content)
    assert problems[0].startswith(problem)


TEXTS = strategies.text(strategies.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), min_size=1)


@given(strategies.lists(TEXTS.filter(str.strip), min_size=1, max_size=8))
def test_what_the_standard_library_writes_is_read_back(tmp_path_factory, prompts):
    folder = tmp_path_factory.mktemp("rows")
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerows([["prompt", "n"], *([prompt, n] for n, prompt in enumerate(prompts))])
    lines = "".join(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in prompts)
    assert read(folder / "a.jsonl", lines.encode()) == (prompts, [])
    found, problems = read(folder / "a.csv", text.getvalue().encode())
    assert not problems
    assert [one.replace("\r\n", "\n") for one in found] == [one.replace("\r\n", "\n") for one in prompts]


def test_a_line_of_openais_batch_format_is_a_row():
    body = {"model": "dall-e-3", "prompt": "a", "n": 2, "size": "512x256", "seed": 7, "response_format": "b64_json"}
    row = row_of({"custom_id": "x", "method": "POST", "url": "/v1/images/generations", "body": body})
    assert row.id == "x"
    assert row.params == RequestedParams(prompt="a", num_images_per_prompt=2, width=512, height=256, seed=7)
    assert row.extra == {"model": "dall-e-3", "response_format": "b64_json"}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"method": "GET"}, "method"),
        ({"url": "/v1/chat/completions"}, "url"),
        ({"body": []}, "body"),
        ({"more": 1}, "more"),
        ({"body": {"prompt": "a", "size": "big"}}, "size"),
        ({"body": {"prompt": "a", "stream": True}}, "stream"),
        ({"body": {}}, "prompt"),
    ],
)
def test_a_wrong_line_of_openais_format_is_refused_by_name(change, name):
    with pytest.raises(RowError) as caught:
        row_of({"custom_id": "x", "method": "POST", "url": "/v1/images/generations", "body": {"prompt": "a"}, **change})
    assert caught.value.name == name


def test_names_that_resemble_a_parameter_are_errors_and_others_are_kept():
    assert near_parameter("promt") == "prompt"
    assert near_parameter("num_inference_step") == "num_inference_steps"
    assert [near_parameter(name) for name in ("category", "idx", "caption", "source_file", "steps")] == [None] * 5
    assert row_of_text({"prompt": "a", "category": "b", "id": "7"}).extra == {"category": "b"}


@pytest.mark.parametrize("name", ["image", "mask_image", "strength"])
def test_a_row_that_would_start_from_an_image_is_refused_by_name(name):
    with pytest.raises(RowError, match=f"{name}: a row cannot start from an image"):
        row_of({"prompt": "a", name: "x"})
