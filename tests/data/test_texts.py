"""One text or chat: its special tokens once, its characters whole, or a refusal that says what is wrong."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from modlab import data
from modlab.data.batches import as_batches
from modlab.data.pieces import encode
from modlab.data.texts import checked, is_chat, text_of, token_ids, unwrapped
from modlab.errors import ModlabError
from tests.helpers.tokenizers import character_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
)
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
TOLD = "<s>user: hello\nassistant: good day\n"


@pytest.fixture
def tokenizer() -> Any:
    made = with_bos()
    made.chat_template = TEMPLATE
    return made


def with_bos() -> Any:
    """A tokenizer that begins each text with <s>, as Llama's does."""
    from tokenizers import processors

    made = character_tokenizer(bos_token="<s>", eos_token="</s>")
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return made


def test_a_text_gets_its_begin_token_once(tokenizer: Any) -> None:
    plain = token_ids("abc", tokenizer)
    assert plain[0] == 0 and plain.count(0) == 1
    assert token_ids("<s>abc", tokenizer) == plain
    assert token_ids("abc<s>", tokenizer) == [*plain, 0]
    assert token_ids("<s><s>abc", tokenizer) == [0, *plain]  # asked for: two in the text are two


def test_a_chat_is_what_its_template_writes(tokenizer: Any) -> None:
    ids = token_ids(CHAT, tokenizer)
    assert ids == tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    assert ids.count(0) == 1
    assert token_ids(TOLD, tokenizer) == ids
    assert token_ids({"messages": CHAT}, tokenizer) == token_ids(tuple(CHAT), tokenizer) == ids


def test_what_is_a_chat(tokenizer: Any) -> None:
    assert is_chat(CHAT)
    for other in ([], "text", [1, 2], [{"input_ids": [1]}], {"role": "user"}, [CHAT]):
        assert not is_chat(other)


def test_rows_of_a_data_set_are_their_text() -> None:
    assert unwrapped({"text": "abc"}) == unwrapped({"text": "abc", "input_ids": None}) == "abc"
    for other in ({"text": "abc", "name": "x"}, {"input_ids": [1]}, "abc", [1]):
        assert unwrapped(other) == other


def test_a_chat_without_a_template_or_against_it_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ModlabError, match="no chat template"):
        text_of(CHAT, with_bos())
    with pytest.raises(ModlabError, match="needs the tokenizer"):
        text_of(CHAT, None)
    with pytest.raises(ModlabError, match="refuses these messages.*no system"):
        text_of([{"role": "system", "content": "x"}], tokenizer)


@pytest.mark.parametrize("text", ["\ud800", "fine \udfff end", "\U0001f600\ude00"])
def test_half_a_surrogate_pair_is_said_so_everywhere(text: str, tokenizer: Any) -> None:
    with pytest.raises(ModlabError, match=r"half a surrogate pair.*at character \d+"):
        checked(text)
    with pytest.raises(ModlabError, match="surrogate"):
        token_ids(text, tokenizer)
    with pytest.raises(ModlabError, match="document 1 has half a surrogate pair"):
        data.packed(["fine", text], tokenizer, 8)
    with pytest.raises(ModlabError, match="document 1 has half a surrogate pair"):
        data.documents(["fine", text])
    with pytest.raises(ModlabError, match="surrogate"):
        text_of([{"role": "user", "content": text}], tokenizer)


@pytest.mark.parametrize(("text", "says"), [(b"abc", "decode them"), (3, "int"), (None, "NoneType")])
def test_what_is_no_text_is_refused(text: Any, says: str, tokenizer: Any) -> None:
    with pytest.raises(ModlabError, match=says):
        token_ids(text, tokenizer)


def test_packed_takes_lists_of_texts_and_chats(tokenizer: Any) -> None:
    texts = [f"text {i} of several\n" for i in range(20)]
    packed = data.packed(texts, tokenizer, 16)
    same = data.packed(Dataset.from_dict({"text": texts}), tokenizer, 16)
    assert [row.tolist() for row in packed["input_ids"]] == [row.tolist() for row in same["input_ids"]]
    ids = token_ids(CHAT, tokenizer)
    (row,) = data.packed([CHAT], tokenizer, len(ids) + 1)["input_ids"]
    assert row.tolist() == [*ids, tokenizer.eos_token_id]  # with one begin token, that of the template
    with pytest.raises(ModlabError, match="document 1 is of type int"):
        data.packed(["fine", 3], tokenizer, 8)
    with pytest.raises(ModlabError, match="list of texts is empty"):
        data.packed([], tokenizer, 8)


@pytest.mark.parametrize("name", ["t.txt", "notes", "sub/", "./sub", "{home}/t.txt"])
def test_a_name_of_a_file_is_never_taken_as_text(
    name: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("t.txt", "notes"):
        (tmp_path / file).write_text("words")
    (tmp_path / "sub").mkdir()
    name = name.format(home=tmp_path)
    for item in (name, {"text": name}, [name, name]):
        with pytest.raises(ModlabError, match=r"name of a file or folder.* Read it"):
            as_batches(item, tokenizer)
    for item in (name, {"text": name}):
        with pytest.raises(ModlabError, match=r"name of a file or folder.* Read it"):
            encode(tokenizer, item)
    with pytest.raises(ModlabError, match="list of texts is .*, the name"):
        data.packed([name, "t.txt"], tokenizer, seq_len=2)


def test_among_texts_a_name_is_a_text_wherever_one_stands(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "LICENSE").write_text("words")
    texts = ["LICENSE", "some words of a text"]
    for items in (texts, Dataset.from_dict({"text": texts}), [{"text": text} for text in texts]):
        elsewhere = data.packed(items, tokenizer, 4)["input_ids"]
        monkeypatch.chdir(tmp_path)
        assert torch.equal(data.packed(items, tokenizer, 4)["input_ids"][:], elsewhere[:])
        monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert len(as_batches(texts, tokenizer)) == 2


def test_texts_that_only_look_like_names_are_texts(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that nothing has, one word that is a folder's, marks alone, and a name told from itself."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("words")
    (tmp_path / "docs").mkdir()
    for text in ("missing.txt", "docs", "/", "./", "..", "t.txt ", "t.txt\n", "~", "a" * 5000):
        assert token_ids(text, tokenizer)


@pytest.mark.parametrize("text", ["to be or not", "one line\nanother", "a\tb"])
def test_a_text_is_never_looked_for_as_a_source(text: str, tokenizer: Any) -> None:
    with pytest.raises(ModlabError, match=r"is it the text itself\? Give a list of texts then: \[text\]"):
        data.packed(text, tokenizer, seq_len=2)
