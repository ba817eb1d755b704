"""Chat templates of every family: ids, labels, and texts that never become markup."""

from __future__ import annotations

import copy
import datetime
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from lavis.common.errors import ConfigError, DataError, WeightsError
from lavis.common.types import IGNORE_INDEX
from lavis.processors.chatml import text_pieces
from lavis.processors.contracts import Kind, Piece
from lavis.processors.conversation import ConversationEncoder, Turn
from lavis.processors.hf_tokenizer import FastTokenizer
from lavis.processors.proof import check, prove
from lavis.processors.templates import TokenizerTemplate
from tests.gguf_files import write_gguf
from tests.processors.families import CHATML, FAMILIES, Family, byte_level

ROWS = 700
QUESTIONS = [
    "What is it?", "", "   ", "\n", " \n What?\n\n", "图里有什么？", "e\u0301 🙂👩‍🚀",
    "3.14159 12345", "if x:\n\treturn [1]\n", "a\u3000",
    "'quoted' \"twice\" \\ &", "\r\nold\r\n", "Two  blanks",
]  # fmt: skip
ANSWERS = [
    "A red ball.", " a ball ", "\nA ball\n", "红色的球。", "1", "🙂", "x = {1: 2}\n", "\n\n",
    "No\t",
]  # fmt: skip


class Built:
    """A family's folder, tokenizer and template."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.family: Family = FAMILIES[name]
        self.folder = self.family.save(folder / name)
        self.tokenizer = FastTokenizer.load(self.folder, ROWS)
        self.template = TokenizerTemplate(self.tokenizer)

    def encoder(self, **settings: Any) -> ConversationEncoder:
        return ConversationEncoder(self.tokenizer, self.template, 2, **settings)

    @property
    def systems(self) -> list[str | None]:
        return [None, "Be brief.", " 图 \n", ""] if self.family.system else [None]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    folder = tmp_path_factory.mktemp("families")
    return {name: Built(name, folder) for name in FAMILIES}


@pytest.fixture(params=FAMILIES)
def built(request: pytest.FixtureRequest, families: dict[str, Built]) -> Built:
    return families[request.param]


@pytest.fixture()
def fixed_date(monkeypatch: pytest.MonkeyPatch) -> None:
    class Day(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Day:
            return cls(2024, 7, 26)

    monkeypatch.setattr(chat_template_utils, "datetime", Day)


def dialog(*texts: str) -> list[Turn]:
    return [Turn("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(texts)]


def test_ids_are_those_of_apply_chat_template(built: Built, fixed_date: None) -> None:
    """Those of the family's tokenizer as Transformers loads it, untouched by ours."""
    hf = PreTrainedTokenizerFast.from_pretrained(str(built.folder))
    for system in built.systems:
        for n, question in enumerate(QUESTIONS):
            one, two = ANSWERS[n % len(ANSWERS)], ANSWERS[(n + 4) % len(ANSWERS)]
            texts = [question, one, QUESTIONS[n - 3], two, "And?"]
            for length in range(1, 6):
                turns, ask = dialog(*texts[:length]), length % 2 == 1
                messages: list[dict[str, Any]] = [
                    {"role": role, "content": text} for role, text in turns
                ]
                if system is not None:
                    messages.insert(0, {"role": "system", "content": system})
                if built.family.in_parts:
                    messages = [
                        m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages
                    ]
                expected = hf.apply_chat_template(
                    messages, add_generation_prompt=ask, return_dict=False, enable_thinking=False
                )
                pieces = built.template.pieces(turns, system=system, ask=ask)
                assert built.tokenizer.encode_pieces(pieces).ids == expected, (system, turns)


def test_markup_is_the_familys(built: Built) -> None:
    """Default system prompt, date, blanks, no room for thoughts: exactly these characters."""
    family = built.family
    asked = built.template.pieces(dialog("cat"), ask=True)
    assert "".join(p.text for p in asked) == f"{family.begin}cat{family.ask}"
    pieces = built.template.pieces(dialog("cat", "dog"))
    text = "".join(p.text for p in pieces)
    assert text.startswith(f"{family.begin}cat{family.ask}")
    learnt = "".join(p.text for p in pieces if p.kind in (Kind.ANSWER, Kind.END))
    assert learnt.lstrip() == f"dog{family.end}"
    assert "".join(p.text for p in pieces if p.kind is Kind.TEXT) == "cat"
    assert built.tokenizer.names(built.template.stops)[0] == family.end.strip()


def test_labels_hold_the_answers_and_what_ends_them(built: Built) -> None:
    decode, family = built.tokenizer.decode, built.family
    for system in built.systems:
        for answer in ("A red ball.", "图 3\n\n4", "x"):
            turns = dialog("What is it? 图", answer, "box", "two")
            narrow = built.encoder(label_mask="assistant_only", system=system).encode(turns)
            wide = built.encoder(label_mask="chatml_delimiters", system=system).encode(turns)
            runs: list[list[int]] = [[]]
            for label in narrow.labels:
                if label != IGNORE_INDEX:
                    runs[-1].append(label)
                elif runs[-1]:
                    runs.append([])
            texts = [decode(run) for run in runs if run]
            assert [t.strip() for t in texts] == [answer + family.end, "two" + family.end]
            assert narrow.input_ids == wide.input_ids
            more = {
                w for n, w in zip(narrow.labels, wide.labels, strict=True) if n != w
            } - {IGNORE_INDEX}  # fmt: skip
            assert all(built.tokenizer.hf.added_tokens_decoder[i].special for i in more)
            for encoded in (narrow, wide):
                pairs = zip(encoded.input_ids, encoded.labels, strict=True)
                assert all(label in (i, IGNORE_INDEX) for i, label in pairs)


def test_a_prompt_is_what_training_has_before_the_first_label(built: Built) -> None:
    encoder = built.encoder(label_mask="assistant_only")
    for question in QUESTIONS:
        encoded = encoder.encode(dialog(question, "Red."))
        first = next(n for n, label in enumerate(encoded.labels) if label != IGNORE_INDEX)
        assert encoder.prompt(dialog(question)) == encoded.input_ids[:first]


def hostile_texts(tokenizer: FastTokenizer) -> list[str]:
    contents = [*tokenizer.names(tokenizer.markup_ids), "<ImageHere>", "<unk>"]
    texts = [f"{before}{c}{after}" for c in contents for before, after in (("", ""), ("a ", " b"))]
    halves = [part for c in contents for part in (c[:-1], c[1:], c[: len(c) // 2])]
    return [*texts, *halves, "".join(contents), "[INST] <<SYS>>"]


def test_no_text_gives_a_special_token(built: Built) -> None:
    """Every added token, whole and in halves that markup might complete, in every role."""
    tokenizer, template = built.tokenizer, built.template
    added = set(tokenizer.hf.added_tokens_decoder) | {tokenizer.image_id}
    blanks = {
        i for i, t in tokenizer.hf.added_tokens_decoder.items()
        if t.content.replace("▁", " ").isspace()
    }  # fmt: skip

    def specials(system: str | None, question: str, answer: str) -> list[int]:
        pieces = template.pieces(dialog(question, answer, question, "c"), system=system)
        return [i for i in tokenizer.encode_pieces(pieces).ids if i in added - blanks]

    plain_system = "s" if built.family.system else None
    expected = specials(plain_system, "q", "a")
    assert specials(None, "q", "a")
    for text in hostile_texts(tokenizer):
        assert not set(tokenizer.encode(text)) & (added - blanks), text
        question = text.replace("<ImageHere>", "<ImageHere")
        assert specials(plain_system, question, "a") == expected, text
        assert specials(plain_system, "q", text) == expected, text
        if built.family.system:
            assert specials(text, "q", "a") == expected, text


def test_hostile_text_is_its_characters(built: Built) -> None:
    """Nothing of it is lost, and an answer's label is all of it."""
    for text in hostile_texts(built.tokenizer):
        encoded = built.encoder(label_mask="assistant_only").encode(dialog("q", text))
        said = b"".join(
            built.tokenizer.token_bytes(i) for i in encoded.labels if i != IGNORE_INDEX
        ).decode()  # fmt: skip
        assert said.strip() == text.strip()


def test_token_bytes_spell_the_text(built: Built) -> None:
    tokenizer = built.tokenizer
    for text in ("What is it?", "图里有什么？", "🙂👩‍🚀 é", "a\n\n\n  b", "x  =\t1"):
        spelt = b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))).decode()
        assert spelt.removeprefix(" ") == text
        assert tokenizer.decode(tokenizer.encode(text)).removeprefix(" ") == text
    special = [*tokenizer.hf.all_special_ids, tokenizer.image_id, ROWS - 1, 10**6]
    assert [tokenizer.token_bytes(i) for i in special] == [b""] * len(special)


def test_images_stand_where_the_question_names_them(built: Built) -> None:
    tokenizer = built.tokenizer
    turns = dialog("<ImageHere>cat <Img><ImageHere></Img>", "no <ImageHere>", "<ImageHere>", "x")
    pieces = built.template.pieces(turns)
    ids, kinds = tokenizer.encode_pieces(pieces)
    assert [k for i, k in zip(ids, kinds, strict=True) if i == tokenizer.image_id] == [
        Kind.IMAGE
    ] * 3
    places = [n for n, i in enumerate(ids) if i == tokenizer.image_id]
    assert "cat <Img>" in tokenizer.decode(ids[places[0] : places[1]])
    assert tokenizer.decode(ids).count("<ImageHere>") == 4
    assert "no <ImageHere>" in tokenizer.decode(ids)
    encoded = built.encoder().encode(turns)
    assert encoded.input_ids.count(tokenizer.image_id) == 6
    assert tokenizer.image_id not in encoded.labels


def test_the_image_token_is_past_every_row(built: Built) -> None:
    assert built.tokenizer.image_id == ROWS
    few = FastTokenizer.load(built.folder, built.tokenizer.vocab_size)
    assert few.image_id == few.vocab_size == built.tokenizer.vocab_size
    assert max(few.encode("".join(QUESTIONS) + "<ImageHere>")) < few.vocab_size
    assert few.decode([few.image_id]) == "<ImageHere>"
    assert few.decode([few.image_id], skip_special_tokens=True) == ""
    # an id that only padding rows of the head have says nothing
    assert built.tokenizer.decode([built.tokenizer.vocab_size]) == ""


def test_constant_prefix(built: Built) -> None:
    tokenizer = built.tokenizer
    for system in built.systems:
        encoder = built.encoder(system=system, label_mask="assistant_only")
        ids, labels = encoder.constant_prefix()
        assert labels == [IGNORE_INDEX] * len(ids)
        if system is None:
            assert ids == tokenizer.encode_markup(built.family.prefix)
        for question in (*QUESTIONS, "<ImageHere>", "<|im_end|>", "</s>"):
            for texts in ((question, "a"), (question, "a", "", "b"), (question,)):
                whole = encoder._encode(dialog(*texts), ask=len(texts) == 1).ids
                assert whole[: len(ids)] == ids
        wide = built.encoder(system=system).constant_prefix()
        assert wide[0] == ids
        assert wide[1] == built.encoder(system=system).encode(dialog("q", "a")).labels[: len(ids)]


def test_the_proof_passes(built: Built) -> None:
    notes = prove(built.template)
    assert len(notes) == built.family.notes, notes


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if not f.system])
def test_a_template_without_system_prompts_says_so(name: str, families: dict[str, Built]) -> None:
    template = families[name].template
    with pytest.raises(ConfigError, match=r"takes no system prompt \(.*(System role|only user)"):
        template.pieces(dialog("a"), system="Be brief.")
    assert template.no_system is not None
    assert "takes no system prompt" in template.no_system


def test_a_refused_conversation_is_the_datas_fault(families: dict[str, Built]) -> None:
    with pytest.raises(DataError, match="refuses a conversation of user, user: roles must alt"):
        families["llama2-first"].template.pieces([Turn("user", "a"), Turn("user", "b")])


# Thoughts


def test_thinking_is_off_unless_asked_for(families: dict[str, Built]) -> None:
    built = families["qwen3"]
    thinking = TokenizerTemplate(built.tokenizer, thinking=True)
    asked = thinking.pieces(dialog("cat"), ask=True)
    assert "".join(p.text for p in asked).endswith("<|im_start|>assistant\n")
    # A model that is asked without an empty thought has to write it: it is learnt.
    pieces = thinking.pieces(dialog("cat", "dog"))
    learnt = "".join(p.text for p in pieces if p.kind in (Kind.ANSWER, Kind.END))
    assert learnt == "<think>\n\n</think>\n\ndog<|im_end|>"
    assert len(prove(thinking)) == 0
    assert "earlier turns in another way" in prove(built.template)[0]


def test_a_prompt_that_training_never_sees_is_noted(families: dict[str, Built]) -> None:
    """Tokenizer or template: a blank that a prompt ends in merges with an answer."""
    source = CHATML.replace("'<|im_start|>assistant\\n' }}", "'<|im_start|>assistant\\n\\n' }}")
    assert source != CHATML
    notes = prove(TokenizerTemplate(with_template(families["chatml"], source)))
    assert len(notes) == 1
    assert "asks and trains differently: a prompt ends in " in notes[0]
    assert "'ĊĊ', but in training an answer stands after " in notes[0]


def test_a_thought_in_an_answer_is_not_acted_upon(families: dict[str, Built]) -> None:
    built = families["qwen3"]
    pieces = built.template.pieces(dialog("cat", "<think>a</think>b"))
    assert [p.text for p in pieces if p.kind is Kind.ANSWER] == ["<think>a</think>b"]


def test_the_date_is_fixed(families: dict[str, Built]) -> None:
    for name in ("llama3", "smollm3", "granite"):
        text = "".join(p.text for p in families[name].template.pieces(dialog("a")))
        assert "2024" in text
        assert str(datetime.datetime.now().year) not in text


# Templates that cannot be taken apart


def with_template(built: Built, template: str | None) -> FastTokenizer:
    tokenizer = copy.copy(built.tokenizer)
    tokenizer.hf = copy.deepcopy(built.tokenizer.hf)
    tokenizer.hf.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("m.content", "m.content | upper", "rewrites the text of a message (user)"),
        ("m.content", "(m.content | tojson)", "rewrites the text of a message (user)"),
        ("m.content", "m.content | replace('\\n', ' ')", "rewrites the text of a message (user)"),
        ("m.content", "m.content + m.content", "repeats the text of a message (user)"),
        (
            "m.content",
            "(m.content if m.role == 'user' else '')",
            "leaves out the text of a message",
        ),
        ("m.content", "(m.content if m.content[0] != ' ' else 'b' + m.content)", "blanks around"),
        ("<|im_end|>", "", "ends an answer with no special token"),
    ],
)
def test_templates_that_do_more_are_refused(
    families: dict[str, Built], old: str, new: str, message: str
) -> None:
    tokenizer = with_template(families["chatml"], CHATML.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        TokenizerTemplate(tokenizer)
    assert message in str(caught.value)
    assert "language.template: my_pkg.my_module:MyTemplate" in str(caught.value)


def test_a_system_prompt_that_would_be_lost_is_refused(families: dict[str, Built]) -> None:
    source = CHATML.replace("for m in messages", "for m in messages if m.role != 'system'")
    template = TokenizerTemplate(with_template(families["chatml"], source))
    assert template.pieces(dialog("a"))
    with pytest.raises(ConfigError, match="leaves the system prompt out"):
        template.pieces(dialog("a"), system="Be brief.")


def test_no_template_is_said(families: dict[str, Built]) -> None:
    with pytest.raises(ConfigError, match=r"no chat template to use .* class of about 15 lines"):
        TokenizerTemplate(with_template(families["chatml"], None))


def test_a_mismatch_shows_the_tokens(families: dict[str, Built]) -> None:
    """A template that looks into its texts gives other markup than the one taken apart."""
    source = CHATML.replace("m.content +", "m.content + ('!' if '3.14' in m.content else '') +")
    template = TokenizerTemplate(with_template(families["chatml"], source))
    with pytest.raises(ConfigError) as caught:
        prove(template)
    lines = str(caught.value).splitlines()
    assert "cannot be taken apart into markup and texts" in lines[0]
    assert lines[1].startswith("from token ")
    assert lines[2].startswith("  Transformers  ")
    assert "'!' '<|im_end|>'" in lines[2]
    assert lines[3].startswith("  its parts     ")
    assert "'!'" not in lines[3]
    assert "'<|im_end|>'" in lines[3]
    assert "language.template: my_pkg.my_module:MyTemplate" in lines[4]


def test_the_models_own_system_prompt_is_proved(families: dict[str, Built]) -> None:
    source = CHATML.replace("m.content +", "m.content + ('!' if '/fast' in m.content else '') +")
    template = TokenizerTemplate(with_template(families["chatml"], source))
    assert prove(template) == prove(template, "Be slow.") == []
    with pytest.raises(ConfigError, match=r"(?s)cannot be taken apart.*'Be /fast'"):
        prove(template, "Be /fast")
    # what looks like markup in it is meant to differ, and stays text
    assert prove(families["chatml"].template, "Say <|im_end|> and <ImageHere>") == []
    pieces = families["chatml"].template.pieces(dialog("a"), system="<|im_end|><ImageHere>")
    ids = families["chatml"].tokenizer.encode_pieces(pieces).ids
    assert families["chatml"].tokenizer.names(ids).count("<|im_end|>") == 2
    assert families["chatml"].tokenizer.image_id not in ids


class MyTemplate:
    """As a user would write one."""

    def __init__(self, tokenizer: FastTokenizer) -> None:
        self.stops = tokenizer.eos

    def pieces(self, turns: list[Turn], *, system: str | None, ask: bool) -> list[Piece]:
        pieces = [Piece(f"{system}\n", Kind.TEXT)] if system else []
        for role, text in turns:
            if role == "user":
                pieces.append(Piece("<|user|>\n", Kind.MARKUP))
                pieces += text_pieces(text, Kind.TEXT, images=True)
                pieces.append(Piece("\n", Kind.MARKUP))
            else:
                pieces.append(Piece("<|assistant|>\n", Kind.MARKUP))
                pieces += [Piece(text, Kind.ANSWER), Piece("<|endoftext|>", Kind.END)]
        return [*pieces, Piece("<|assistant|>\n", Kind.MARKUP)] if ask else pieces


def test_a_template_of_ones_own(families: dict[str, Built]) -> None:
    tokenizer = families["olmo"].tokenizer
    template = MyTemplate(tokenizer)
    assert check(template, tokenizer) == []
    encoder = ConversationEncoder(tokenizer, template, 1, 99, "assistant_only")
    encoded = encoder.encode(dialog("<ImageHere>What is it?", "A ball."))
    labels = [i for i in encoded.labels if i != IGNORE_INDEX]
    assert tokenizer.decode(labels) == "A ball.<|endoftext|>"
    assert tokenizer.decode(encoded.input_ids) == (
        "<|user|>\n<ImageHere>What is it?\n<|assistant|>\nA ball.<|endoftext|>"
    )


def test_a_template_that_never_stops_is_refused(families: dict[str, Built]) -> None:
    tokenizer = families["olmo"].tokenizer
    template = MyTemplate(tokenizer)
    template.stops = (5,)
    with pytest.raises(ConfigError, match=r"ends in \['<\|endoftext\|>'\], which is none of the"):
        check(template, tokenizer)


def test_a_template_that_reads_markup_in_texts_is_refused(families: dict[str, Built]) -> None:
    tokenizer = families["olmo"].tokenizer

    class Careless(MyTemplate):
        def pieces(self, turns: list[Turn], *, system: str | None, ask: bool) -> list[Piece]:
            pieces = super().pieces(turns, system=system, ask=ask)
            return [Piece(t, Kind.MARKUP if k is Kind.TEXT else k) for t, k in pieces]

    with pytest.raises(ConfigError, match="looks like markup in a text becomes markup"):
        check(Careless(tokenizer), tokenizer)

    class Trusting(MyTemplate):
        def pieces(self, turns: list[Turn], *, system: str | None, ask: bool) -> list[Piece]:
            pieces = super().pieces(turns, system=system, ask=ask)
            return [pieces[0]._replace(kind=Kind.MARKUP), *pieces[1:]]

    assert check(Trusting(tokenizer), tokenizer) == []
    with pytest.raises(ConfigError, match="looks like markup in a text becomes markup"):
        check(Trusting(tokenizer), tokenizer, "Be brief.")


# Reading tokenizers


def test_what_is_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="does not exist"):
        FastTokenizer.load(tmp_path / "absent", ROWS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match=r"it needs tokenizer\.json"):
        FastTokenizer.load(tmp_path / "empty", ROWS)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    with pytest.raises(WeightsError, match=r"it needs tokenizer\.json"):
        FastTokenizer.load(tmp_path / "bad", ROWS)


def test_code_in_the_folder_is_not_run(families: dict[str, Built], tmp_path: Path) -> None:
    folder = tmp_path / "code"
    shutil.copytree(families["internlm2"].folder, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": [None, "theirs.Theirs"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    tokenizer = FastTokenizer.load(folder, ROWS)  # the ready tokenizer.json serves
    assert tokenizer.encode("What?") == families["internlm2"].tokenizer.encode("What?")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(WeightsError, match="without running code from the folder"):
        FastTokenizer.load(folder, ROWS)
    assert not (tmp_path / "ran").exists()


def test_a_model_with_too_few_rows(families: dict[str, Built]) -> None:
    with pytest.raises(WeightsError, match=r"the tokenizer has \d+ tokens, the language model 300"):
        FastTokenizer.load(families["chatml"].folder, 300)


def test_an_added_token_without_a_row(families: dict[str, Built]) -> None:
    """It is allowed as long as the template does not write it (as in gemma-3-1b)."""
    whole = families["qwen3"].tokenizer
    thought = whole.hf.convert_tokens_to_ids("</think>")
    assert thought == whole.vocab_size - 1
    tokenizer = FastTokenizer.load(families["qwen3"].folder, thought)
    assert tokenizer.vocab_size == thought
    assert tokenizer.image_id == thought + 1
    with pytest.raises(ConfigError, match=rf"writes </think>, token {thought}, but the language"):
        prove(TokenizerTemplate(tokenizer))


def test_words_in_pieces_are_no_vocabulary_for_us(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(str(tmp_path))
    with pytest.raises(WeightsError, match="neither a byte-level nor a SentencePiece tokenizer"):
        FastTokenizer.load(tmp_path, ROWS)


def test_a_special_token_in_a_vocabulary_that_skips_merges(tmp_path: Path) -> None:
    """Where a whole word of the vocabulary is taken as it stands, a special token is one too."""
    state = json.loads(byte_level(trim=True).to_str())
    state["pre_tokenizer"] = state["pre_tokenizer"]["pretokenizers"][1]
    state["model"]["vocab"]["<s>"] = end = len(state["model"]["vocab"])
    backend = Tokenizer.from_str(json.dumps(state))
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<s>")
    assert hf("<s>").input_ids == [end]
    hf.save_pretrained(str(tmp_path))
    tokenizer = FastTokenizer.load(tmp_path, ROWS)
    assert tokenizer.encode_markup("<s>") == [end]
    assert tokenizer.names(tokenizer.encode("<s>")) == ["<", "s", ">"]


def test_end_and_padding_tokens(families: dict[str, Built], tmp_path: Path) -> None:
    folder = tmp_path / "ends"
    shutil.copytree(families["llama3"].folder, folder)
    end, other = families["llama3"].tokenizer.encode_markup("<|eot_id|><|end_of_text|>")
    generation = folder / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": [other, end, ROWS + 5]}))
    tokenizer = FastTokenizer.load(folder, ROWS)
    assert tokenizer.eos == (end, other)
    assert tokenizer.pad_id == end
    assert TokenizerTemplate(tokenizer).stops == (end, other)
    assert families["qwen2.5"].tokenizer.names([families["qwen2.5"].tokenizer.pad_id]) == [
        "<|endoftext|>"
    ]
    generation.write_text("[]")
    with pytest.raises(WeightsError, match=r"generation_config\.json: not a JSON object"):
        FastTokenizer.load(folder, ROWS)


def test_an_encoder_can_be_sent_to_a_worker(built: Built) -> None:
    encoder = built.encoder()
    turns = dialog("<ImageHere>cat", "dog </s><|im_end|>")
    assert pickle.loads(pickle.dumps(encoder)).encode(turns) == encoder.encode(turns)


def test_half_a_surrogate_pair_is_replaced(built: Built) -> None:
    assert built.tokenizer.encode("a\ud83d") == built.tokenizer.encode("a\ufffd")
    assert built.tokenizer.encode("\ud83d\ude42") == built.tokenizer.encode("🙂")


@pytest.mark.parametrize(
    ("name", "kind", "splits"),
    [("chatml", "gpt2", "llama-bpe"), ("llama2-first", "llama", "default")],
)
def test_a_gguf_file(
    name: str, kind: str, splits: str, families: dict[str, Built], tmp_path: Path
) -> None:
    built = families[name]
    given = (built.family, built.folder, kind, splits)
    path = write_gguf(tmp_path / "model.gguf", tokenizer=given)
    tokenizer = FastTokenizer.load(path, ROWS)
    template = TokenizerTemplate(tokenizer)
    assert prove(template) == []
    for question in QUESTIONS:
        turns = dialog(question, "A red ball. </s><|im_end|>")
        found = tokenizer.encode_pieces(template.pieces(turns))
        assert found == built.tokenizer.encode_pieces(built.template.pieces(turns)), question


@pytest.mark.parametrize("kind", ["llama2-prepend", "llama2-always", "llama3", "qwen3", "gemma3"])
def test_as_the_familys_own_class(kind: str, families: dict[str, Built], tmp_path: Path) -> None:
    """With the folder's config, Transformers builds the tokenizer by its own rules."""
    model, name = {
        "llama2-prepend": ("llama", "LlamaTokenizer"), "llama2-always": ("llama", "LlamaTokenizer"),
        "llama3": ("llama", "PreTrainedTokenizerFast"), "qwen3": ("qwen3", "Qwen2Tokenizer"),
        "gemma3": ("gemma3_text", "GemmaTokenizer"),
    }[kind]  # fmt: skip
    folder = tmp_path / kind
    shutil.copytree(families[kind].folder, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": model, "vocab_size": ROWS}))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": name}))
    template = TokenizerTemplate(FastTokenizer.load(folder, ROWS))
    assert len(prove(template)) == families[kind].family.notes
