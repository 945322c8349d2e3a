"""Packed rows: exact content, splits, determinism, refusals."""

from __future__ import annotations

import json
import sysconfig
import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from modlab import data
from modlab.data import packing, sources
from modlab.errors import ModlabError
from tests.helpers.tokenizers import character_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return character_tokenizer(bos_token="<s>", eos_token="</s>")


@pytest.fixture(autouse=True)
def quiet_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that `datasets` caches go with the test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write_documents(folder: Path, texts: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    for i, text in enumerate(texts):
        (folder / f"{i:03}.txt").write_text(text, encoding="utf-8")
    return folder


def texts(count: int) -> list[str]:
    rng = np.random.default_rng(3)
    return ["".join(rng.choice(list("abcdefgh"), int(rng.integers(1, 90)))) for _ in range(count)]


def stream(rows: Any) -> list[int]:
    return torch.cat([row["input_ids"] for row in rows]).tolist()


def split_documents(ids: list[int]) -> list[list[int]]:
    """What stands between a bos (0) and an eos (1), in order; the last one may be cut."""
    found: list[list[int]] = []
    for token in ids:
        if token == 0:
            found.append([])
        elif token != 1:
            found[-1].append(token)
    return found


def test_rows_are_the_documents_between_separators(tmp_path: Path, tokenizer: Any) -> None:
    originals = texts(40)
    rows = data.packed(write_documents(tmp_path / "docs", originals), tokenizer, seq_len=16)
    total = sum(len(t) + 2 for t in originals)
    assert len(rows) == total // 16
    assert all(row["input_ids"].shape == (16,) and row["input_ids"].dtype == torch.int64 for row in rows)
    ids = stream(rows)
    assert ids[0] == 0
    assert all(ids[i + 1] == 0 for i, token in enumerate(ids[:-1]) if token == 1), (
        "every eos is followed by a bos"
    )
    packed = split_documents(ids)
    encoded = {tuple(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in originals}
    assert {tuple(d) for d in packed[:-1]} <= encoded
    assert len({tuple(d) for d in packed[:-1]}) == len(packed) - 1 >= 35


def test_one_separator_stands_once_before_each_document(tmp_path: Path) -> None:
    tokenizer = character_tokenizer(bos_token="<s>", eos_token="<s>")
    rows = data.packed(write_documents(tmp_path / "docs", ["abc"] + ["defg"]), tokenizer, seq_len=9)
    ids = stream(rows)
    assert sorted(split_documents(ids)) == [[3, 4, 5], [6, 7, 8, 9]]
    assert len(ids) == 9
    assert ids.count(0) == 2


def test_order_follows_the_seed_and_not_the_processes(tmp_path: Path, tokenizer: Any) -> None:
    folder = write_documents(tmp_path / "docs", texts(60))
    first = stream(data.packed(folder, tokenizer, 16, seed=1))
    assert stream(data.packed(folder, tokenizer, 16, seed=1)) == first
    assert stream(data.packed(folder, tokenizer, 16, seed=1, num_proc=2)) == first
    other = stream(data.packed(folder, tokenizer, 16, seed=2))
    assert other != first


@pytest.mark.parametrize("num_proc", [None, 2])
def test_the_same_tokenizer_in_another_folder_finds_what_was_tokenised(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, num_proc: int | None
) -> None:
    """Whatever it was called with before; another tokenizer does not."""
    folder = write_documents(tmp_path / "docs", texts(60))
    tokenizer.save_pretrained(tmp_path / "a")
    tokenizer.save_pretrained(tmp_path / "b")
    first, second = (AutoTokenizer.from_pretrained(tmp_path / name) for name in "ab")
    expected = stream(data.packed(folder, first, 16, num_proc=num_proc))
    second("abc", truncation=True, max_length=2)
    with monkeypatch.context() as patched:
        patched.setattr(packing, "_tokenise", lambda *args, **given: 1 / 0)
        assert stream(data.packed(folder, second, 16, num_proc=num_proc)) == expected
        with pytest.raises(ZeroDivisionError):
            data.packed(folder, character_tokenizer(bos_token="<s>"), 16)
    second.add_tokens(["ab"])
    assert stream(data.packed(folder, second, 16, num_proc=num_proc)) != expected


def test_a_tokenizer_of_own_code_is_known_by_its_pickle(tokenizer: Any) -> None:
    class Own(PreTrainedTokenizerFast):
        pass

    assert packing._identity(Own(tokenizer_object=tokenizer.backend_tokenizer)) is None
    assert packing._identity(tokenizer) == packing._identity(
        character_tokenizer(bos_token="<s>", eos_token="</s>")
    )


@pytest.mark.parametrize(("value", "said"), [(None, False), ("true", False), ("False", True), ("0", True)])
def test_the_progress_says_when_tokenising_has_one_core(
    value: str | None, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    if value is not None:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", value)
    assert ("one core" in packing._one_core()) == said


def test_packing_carries_over_batches_of_documents(tmp_path: Path, tokenizer: Any) -> None:
    """More documents than one packing batch: nothing is lost or repeated where two batches meet."""
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i:04}"}) + "\n" for i in range(2500)), encoding="utf-8")
    rows = data.packed(path, tokenizer, seq_len=11)  # 1,000 documents of 6 tokens leave 5 for the next batch
    assert len(rows) == 2500 * 6 // 11
    numbers = [tokenizer.decode(d).replace(" ", "") for d in split_documents(stream(rows))]
    assert all(len(n) == 4 for n in numbers[:-1]), "no token is lost inside a document"
    assert len(set(numbers)) == len(numbers) == -(-len(rows) * 11 // 6)


def test_a_tokenizer_with_a_part_in_python_is_packed_too(tmp_path: Path) -> None:
    class Split:
        def pre_tokenize(self, text: Any) -> None:
            text.split(lambda _, word: [word])

    own = character_tokenizer(bos_token="<s>", eos_token="</s>")
    own.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Split())
    rows = data.packed(["hello world " * 50] * 20, own, 32)
    assert len(rows) >= 1 and rows[0]["input_ids"].shape == (32,)


def test_limit_gives_a_prefix_of_whole_rows(tmp_path: Path, tokenizer: Any) -> None:
    folder = write_documents(tmp_path / "docs", texts(60))
    everything = stream(data.packed(folder, tokenizer, 16))
    for limit in (16, 100, 1000):
        some = stream(data.packed(folder, tokenizer, 16, limit_tokens=limit))
        assert len(some) == limit // 16 * 16
        assert some == everything[: len(some)]


def test_limit_beyond_the_first_guess(tmp_path: Path) -> None:
    """A tokenizer that makes few tokens of many characters needs a second helping of documents."""
    vocabulary = {"<s>": 0, "<unk>": 1}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>")
    folder = write_documents(tmp_path / "docs", ["x" * 500 + f"{i}" for i in range(30)])
    rows = data.packed(folder, tokenizer, 4, limit_tokens=40)
    assert len(rows) == 10


def test_splits_share_no_document(tmp_path: Path, tokenizer: Any) -> None:
    folder = write_documents(tmp_path / "docs", texts(200))
    train = set(data.documents(folder, "train", heldout_fraction=0.2)["name"])
    heldout = set(data.documents(folder, "heldout", heldout_fraction=0.2)["name"])
    assert not train & heldout
    assert len(train | heldout) == len(set(data.documents(folder)["name"]))
    assert 20 <= len(heldout) <= 65  # 40 expected; hashes, not luck: the same in every run


def test_split_of_a_document_depends_on_its_text_alone(tmp_path: Path) -> None:
    all_texts = texts(100)
    before = set(data.documents(write_documents(tmp_path / "a", all_texts), "heldout", 0.2)["text"])
    shuffled = write_documents(tmp_path / "b", all_texts[::-1][:50])
    after = set(data.documents(shuffled, "heldout", 0.2)["text"])
    assert after == before & set(all_texts[::-1][:50])


def test_json_columns_and_mixed_folders(tmp_path: Path, tokenizer: Any) -> None:
    folder = write_documents(tmp_path / "docs", ["from text"])
    lines = [{"body": "from json"}, {"body": ""}, {"body": None}, {"body": "  \n"}]
    (folder / "more.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "empty.txt").write_text("")
    docs = data.documents(folder, text_column="body")
    assert sorted(docs["text"]) == ["from json", "from text"]
    with pytest.raises(ModlabError, match="no column 'text'.*'body'"):
        data.documents(folder)


def test_files_of_a_folder_may_have_other_columns(tmp_path: Path) -> None:
    for name, row in (("a", {"text": "one"}), ("b", {"text": "two", "year": 7, "name": "b/2"})):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    docs = data.documents(tmp_path)
    assert dict(zip(docs["text"], docs["name"], strict=True)) == {"one": sources.digest("one"), "two": "b/2"}
    (tmp_path / "c.jsonl").write_text('{"body": "three"}\n', encoding="utf-8")
    with pytest.raises(ModlabError, match=r"c\.jsonl has no column 'text', only \['body'\]"):
        data.documents(tmp_path)


def write_rows(folder: Path, **files: list[dict[str, Any]]) -> None:
    """A .jsonl file of each; not in `tmp_path` itself, where the tests' cache lies."""
    folder.mkdir(exist_ok=True)
    for name, rows in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
@pytest.mark.parametrize("other", [["a list"], None], ids=str)
def test_what_is_no_text_in_one_file_leaves_the_others_alone(
    tmp_path: Path, other: Any, order: tuple[str, str]
) -> None:
    write_rows(tmp_path / "docs", **dict(zip(order, ([{"text": other}], [{"text": "hello"}]), strict=True)))
    with pytest.warns(UserWarning, match="1 of 2 rows have no text"):
        assert data.documents(tmp_path / "docs")["text"] == ["hello"]


@pytest.mark.parametrize("other", [5, {"a": "dict"}], ids=str)
def test_what_datasets_could_write_as_a_text_is_none(tmp_path: Path, other: Any) -> None:
    """It does where the first file holds texts."""
    write_rows(tmp_path / "docs", a=[{"text": other}], b=[{"text": "hello"}])
    with pytest.warns(UserWarning, match="1 of 2 rows have no text"):
        assert data.documents(tmp_path / "docs")["text"] == ["hello"]


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_names_of_all_types_are_strings(tmp_path: Path, order: tuple[str, str]) -> None:
    """A row's split follows from its name, which may not depend on the rows around it."""
    rows = [{"text": "one", "name": 3}, {"text": "two"}], [{"text": "three", "name": "c/3"}]
    write_rows(tmp_path / "docs", **dict(zip(order, rows, strict=True)))
    docs = data.documents(tmp_path / "docs")
    assert dict(zip(docs["text"], docs["name"], strict=True)) == {
        "one": "3",
        "two": sources.digest("two"),
        "three": "c/3",
    }


def test_one_odd_file_among_many_is_found_by_halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"f{i:02d}": [{"text": f"text {i}"}] for i in range(64)}
    write_rows(tmp_path / "docs", **{**files, "f37": [{"text": "odd", "year": 7}]})
    calls, load = [], datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: calls.append(1) or load(*a, **k))
    texts_found = data.documents(tmp_path / "docs")["text"]
    assert list(texts_found) == [rows[0]["text"] if name != "f37" else "odd" for name, rows in files.items()]
    assert len(calls) <= 13  # all, and two at each of six halvings
    write_rows(tmp_path / "docs", f37=[{"body": "odd"}], f38=[{"body": "odd"}])
    with pytest.raises(ModlabError, match=r"f37\.jsonl has no column 'text', only \['body'\]"):
        data.documents(tmp_path / "docs")


@pytest.mark.parametrize("blank", ["\n", " \n\n", "[]", "[\n]\n"])
def test_files_without_a_row_are_left_out(tmp_path: Path, blank: str) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.json").write_text(blank, encoding="utf-8")
    for source in (tmp_path / "docs", tmp_path / "docs" / "a.json"):
        with pytest.raises(ModlabError, match="holds no text"):
            data.documents(source)
    write_rows(tmp_path / "docs", b=[{"text": "one"}], c=[{"text": "two", "year": 7}])
    assert data.documents(tmp_path / "docs")["text"] == ["one", "two"]
    with pytest.raises(ModlabError, match="holds no text"):
        data.documents(Dataset.from_dict({"text": []}))


def test_rows_without_a_text_are_counted(tmp_path: Path) -> None:
    """Where a field is missing, half of the data may be gone without anybody's asking for it; blank rows are
    common and say nothing."""
    path = tmp_path / "some.jsonl"
    rows = [{"text": "one"}, {"body": "two"}, {"text": None}, {"text": " "}, {"text": "five"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.warns(UserWarning, match="2 of 5 rows have no text"):
        assert sorted(data.documents(path)["text"]) == ["five", "one"]
    with pytest.warns(UserWarning, match="2 of 2 rows have no text"), pytest.raises(ModlabError):
        data.documents(Dataset.from_dict({"text": [[1], [2]]}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert data.documents(Dataset.from_dict({"text": ["one", " ", ""]}))["text"] == ["one"]


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_other_encodings_are_named_and_a_byte_order_mark_is_no_text(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "text.txt"
    path.write_text("café " * 50, encoding="utf-8-sig")
    assert data.documents(path)["text"][0].startswith("café")
    path.write_text("café " * 50, encoding=encoding)
    (tmp_path / "other.txt").write_text("plain", encoding="utf-8")
    said = r"text\.txt as text: 'utf-8' codec .*\(save the file as UTF-8\)"
    for source in (path, tmp_path):
        with pytest.raises(ModlabError, match=said):
            data.documents(source)


def test_documents_can_be_packed_again(tmp_path: Path, tokenizer: Any) -> None:
    docs = data.documents(write_documents(tmp_path / "docs", texts(30)))
    assert stream(data.packed(docs, tokenizer, 16)) == stream(data.packed(tmp_path / "docs", tokenizer, 16))


@pytest.fixture
def small_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose standard library and packages are a handful of files."""
    stdlib, packages = tmp_path / "lib", tmp_path / "lib" / "site-packages"
    body = "x = 1  # filler\n" * 40
    files = {stdlib / f"module_{i}.py": f"# module {i}\n{body}" for i in range(30)}
    files |= {packages / "pkg" / f"part_{i}.py": f"# part {i}\n{body}" for i in range(30)}
    files[packages / "pkg" / "copy_of_part_3.py"] = f"# part 3\n{body}"
    files[packages / "pkg" / "__init__.py"] = "too short"
    files[packages / "pkg" / "__pycache__" / "cached.py"] = f"# cached\n{body}"
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (packages / "pkg" / "latin.py").write_bytes(b"# caf\xe9\n" + body.encode())
    paths = {"stdlib": str(stdlib), "purelib": str(packages), "platlib": str(packages)}
    monkeypatch.setattr(sources.sysconfig, "get_paths", lambda: paths)
    monkeypatch.setattr(sources.site, "getsitepackages", lambda: [str(packages)])
    return stdlib


def test_python_source_is_deduplicated_and_filtered(small_python: Path) -> None:
    docs = data.documents("python")
    names = docs["name"]
    assert len(names) == len(set(names)) == 60
    assert ("pkg/copy_of_part_3.py" in names) != ("pkg/part_3.py" in names)
    assert not {"pkg/__init__.py", "pkg/latin.py", "pkg/__pycache__/cached.py"} & set(names)
    assert sorted(data.documents("python-stdlib")["name"]) == sorted(
        n for n in names if n.startswith("module")
    )


def test_python_split_is_by_relative_path(
    small_python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same file is held out on every machine, wherever its packages lie."""
    heldout = set(data.documents("python", "heldout", 0.3)["name"])
    train = set(data.documents("python", "train", 0.3)["name"])
    assert heldout and train and not heldout & train
    moved = tmp_path / "elsewhere"
    small_python.rename(moved)
    packages = str(moved / "site-packages")
    monkeypatch.setattr(
        sources.sysconfig,
        "get_paths",
        lambda: {"stdlib": str(moved), "purelib": packages, "platlib": packages},
    )
    monkeypatch.setattr(sources.site, "getsitepackages", lambda: [packages])
    assert set(data.documents("python", "heldout", 0.3)["name"]) == heldout


def test_the_real_standard_library(tokenizer: Any) -> None:
    rows = data.packed("python-stdlib", tokenizer, seq_len=256, split="train", limit_tokens=50_000)
    assert len(rows) == 50_000 // 256
    heldout = data.documents("python-stdlib", "heldout")
    assert Path(sysconfig.get_paths()["stdlib"], heldout[0]["name"]).is_file()
    assert min(heldout["chars"]) >= data.MIN_PYTHON_CHARS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "no/such/place/at/all"}, "does not exist"),
        ({"source": "missing.txt"}, "does not exist"),
        ({"source": "a whole text. " * 400}, r"names no file .* Give a list of texts"),
        ({"seq_len": 1}, "seq_len=1: give a whole number of at least 2"),
        ({"limit_tokens": 5}, "less than one row"),
        ({"split": "test"}, "split='test'"),
        ({"heldout_fraction": 0.0}, "heldout_fraction=0.0"),
        ({"seq_len": 10_000_000}, "fewer than one row"),
        ({"tokenizer": character_tokenizer()}, "neither a bos nor an eos"),
        ({"split": "heldout", "heldout_fraction": 1e-9}, "heldout split .* is empty.*--heldout-tokens 0"),
    ],
)
def test_refusals(tmp_path: Path, tokenizer: Any, arguments: dict[str, Any], message: str) -> None:
    folder = write_documents(tmp_path / "docs", ["some text", "more text"])
    with pytest.raises(ModlabError, match=message) as caught:
        data.packed(**{"source": folder, "tokenizer": tokenizer, "seq_len": 8, **arguments})
    assert str(caught.value).count("\n") < 5


def test_refuses_nothing_to_read(tmp_path: Path, tokenizer: Any) -> None:
    folder = write_documents(tmp_path / "docs", ["", "  \n "])
    with pytest.raises(ModlabError, match="holds no text"):
        data.packed(folder, tokenizer, 8)
    (tmp_path / "bare").mkdir()
    with pytest.raises(ModlabError, match="holds no text"):
        data.packed(tmp_path / "bare", tokenizer, 8)
    (tmp_path / "bad.json").write_text("{not json", encoding="utf-8")
    with pytest.raises(ModlabError, match="Could not read"):
        data.packed(tmp_path / "bad.json", tokenizer, 8)


def test_hub_name_without_network(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModlabError, match="from the hub") as caught:
        data.packed("modlab/no-such-data", tokenizer, 8)
    assert "network" in str(caught.value)
