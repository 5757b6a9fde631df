"""Answers are learned and nothing else, whichever way a row is written; the tokenizer's own offsets say which tokens are answers."""

from __future__ import annotations

import json
from itertools import chain

import pytest
from transformers import AutoTokenizer

from lightning_peft import InstructionDataModule
from lightning_peft.data.chat import assistant_spans, token_labels
from lightning_peft.data.instructions import ALPACA, ALPACA_INPUT
from lightning_peft.errors import BadRowError, ConfigError

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Lily."},
    {"role": "user", "content": "Where is assistant?"},
    {"role": "assistant", "content": "In the park."},
]


def set_up(tokenizer, train, **options):
    data = InstructionDataModule(tokenizer, train, shuffle=False, **options)
    data.prepare_data()
    data.setup("fit")
    return data


def rows_of(data):
    examples = data._datasets["train", True]
    return [(one["input_ids"].tolist(), one["labels"].tolist()) for one in examples]


def predicted(data, number=0):
    return [text for text, learned in data.shown(data._datasets["train", True][number]) if learned]


def self_instruct(data_dir):
    rows = []
    for line in (data_dir / "instruct" / "self_instruct_seed.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows += [{"instruction": row["instruction"], **instance} for instance in row["instances"]]
    return rows


# -- on real files -----------------------------------------------------------------------------------------------------


def test_the_mask_of_real_rows_is_that_of_the_offsets(data_dir, stories):
    path = data_dir / "e2e" / "valid.jsonl"
    data = set_up(stories, str(path), prompt="{mr} =>", completion=" {ref}", max_train_rows=200)
    tokenizer = AutoTokenizer.from_pretrained(stories)
    lines = path.read_text(encoding="utf-8").splitlines()
    for line, (ids, labels) in zip(lines[:200], rows_of(data), strict=True):
        row = json.loads(line)
        prompt, answer = f"{row['mr']} =>", f" {row['ref']}"
        whole = tokenizer(prompt + answer, add_special_tokens=False, return_offsets_mapping=True)
        inside = [any(c >= len(prompt) for c in range(*span)) for span in whole["offset_mapping"]]
        assert ids == [1, *whole["input_ids"], 2]
        assert [label != -100 for label in labels] == [False, *inside, True]
        assert tokenizer.decode([one for one in labels if one != -100]).strip() == f"{row['ref']}</s>"


def test_alpaca_rows_of_real_tasks_have_the_prompt_of_alpaca(data_dir, stories, jsonl):
    rows = self_instruct(data_dir)[:60]
    data = set_up(stories, jsonl("a.jsonl", rows), max_length=4096)
    assert len(rows_of(data)) == len(rows)
    for number, row in enumerate(rows):
        template = ALPACA_INPUT if row["input"].strip() else ALPACA
        pieces = data.shown(data._datasets["train", True][number])
        assert [learned for _, learned in pieces] == [False, True]
        (prompt, _), (answer, _) = pieces
        # Characters that the tokenizer has no piece for come back from their bytes, so texts are equal.
        assert prompt == f"<s> {template.format(**row)}"
        assert answer == f"{row['output']}</s>"


@pytest.mark.parametrize("template", ["chatml", "marked_chatml"])
def test_only_the_turns_of_the_assistant_are_learned_in_real_conversations(data_dir, stories, jsonl, template, request):
    tasks = self_instruct(data_dir)
    talks = [
        [
            {"role": role, "content": text}
            for task in tasks[i : i + 3]
            for role, text in (
                ("user", f"{task['instruction']} {task['input']}"),
                ("assistant", task["output"].strip()),
            )
        ]
        for i in range(0, 60, 3)
    ]
    path = jsonl("chat.jsonl", [{"messages": talk} for talk in talks])
    data = set_up(stories, path, chat_template=request.getfixturevalue(template), max_length=8192)
    tokenizer = AutoTokenizer.from_pretrained(stories, chat_template=request.getfixturevalue("chatml"))
    for number, (talk, (ids, labels)) in enumerate(zip(talks, rows_of(data), strict=True)):
        text = tokenizer.apply_chat_template(talk, tokenize=False)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        answered, end = set(), 0
        for message in talk:  # found in the text itself, turn by turn
            start = text.index(f"<|im_start|>{message['role']}\n{message['content']}", end)
            end = text.index("<|im_end|>\n", start + len(message["content"])) + len("<|im_end|>\n")
            if message["role"] == "assistant":
                answered |= set(range(start + len("<|im_start|>assistant\n"), end))
        inside = [bool(answered & set(range(*span))) for span in encoded["offset_mapping"]]
        assert ids == encoded["input_ids"]
        assert [label != -100 for label in labels] == inside
        assert len(predicted(data, number)) == 3


# -- formats -----------------------------------------------------------------------------------------------------------


def test_a_conversation_is_masked_turn_by_turn(byte_tokenizer, jsonl, chatml, marked_chatml):
    path = jsonl("a.jsonl", [{"messages": TALK}])
    by_prefix = set_up(byte_tokenizer, path, chat_template=chatml)
    by_marks = set_up(byte_tokenizer, path, chat_template=marked_chatml)
    assert predicted(by_prefix) == ["Lily.<|im_end|>\n", "In the park.<|im_end|>\n"]
    assert rows_of(by_prefix) == rows_of(by_marks)


def test_prompt_and_completion_and_each_row_by_its_fields(byte_tokenizer, jsonl, chatml):
    rows = [
        {"prompt": "2+2=", "completion": "4"},
        {"instruction": "Add.", "input": "2 2", "output": "4!"},
        {"messages": TALK[1:3]},
    ]
    data = set_up(byte_tokenizer, jsonl("a.jsonl", rows), chat_template=chatml)
    assert rows_of(data)[0] == ([256, *b"2+2=4", 257], [-100] * 5 + [ord("4"), 257])
    assert [predicted(data, number) for number in range(3)] == [["4</s>"], ["4!</s>"], ["Lily.<|im_end|>\n"]]
    with pytest.raises(ConfigError, match=r"there is no set 'trian'; did you mean 'train'\? The sets are: train"):
        data.first("trian", 1)
    bare = set_up(byte_tokenizer, jsonl("b.jsonl", rows[:1]), add_bos=False, add_eos=False)
    assert rows_of(bare) == [([*b"2+2=4"], [-100] * 4 + [ord("4")])]


def test_a_token_of_prompt_and_answer_is_learned():
    encoded = {"input_ids": [1, 2, 3, 4, 5], "offset_mapping": [(0, 0), (0, 3), (3, 6), (6, 6), (6, 8)]}
    assert token_labels(encoded, [(4, 6)]) == [-100, -100, 3, -100, -100]
    assert token_labels(encoded, [(0, 1), (7, 8)]) == [-100, 2, -100, -100, 5]


def test_a_batch_is_filled_up_and_grouped_by_length(byte_tokenizer, jsonl):
    rows = [{"prompt": "p", "completion": "x" * (1 + number % 40)} for number in range(80)]
    data = InstructionDataModule(byte_tokenizer, jsonl("a.jsonl", rows), batch_size=4, group_by_length=True, seed=3)
    data.setup("fit")
    batches, filler = list(data.train_dataloader()), 0
    for batch in batches:
        real = batch["attention_mask"].bool()
        assert (batch["labels"][~real] == -100).all()
        assert (batch["input_ids"][~real] == 257).all()
        filler += int((~real).sum())
    assert filler < 80
    lengths = [batch["attention_mask"].sum(1).tolist() for batch in batches]
    assert sorted(chain(*lengths)) == sorted(4 + number % 40 for number in range(80))


def test_the_split_is_a_function_of_the_seed(byte_tokenizer, jsonl):
    rows = [{"prompt": "p", "completion": str(number)} for number in range(40)]
    path = jsonl("a.jsonl", rows)

    def split(**options):
        data = set_up(byte_tokenizer, path, val_fraction=0.25, **options)
        return [
            [int("".join(map(chr, one["input_ids"].tolist()[2:-1]))) for one in data._datasets[name, trained]]
            for name, trained in (("train", True), ("a", False))
        ], data.summary()

    (kept, held_out), summary = split()
    assert sorted(kept + held_out) == list(range(40))
    assert len(held_out) == 10
    assert held_out != list(range(30, 40))
    assert "0.25 of the file is held out, drawn with seed 0" in summary
    assert split()[0] == [kept, held_out]
    assert split(seed=1)[0] != [kept, held_out]
    assert split(split="end")[0][1] == list(range(30, 40))


# -- what cannot be used -----------------------------------------------------------------------------------------------


def test_bad_rows_are_counted_or_refused(byte_tokenizer, jsonl):
    rows = [
        {"prompt": "p", "completion": "fine"},
        {"prompt": "p", "completion": " "},
        {"prompt": "p" * 30, "completion": "never reached"},
        {"prompt": "p", "completion": "much too long for it"},
        {"prompt": 3, "completion": "a"},
        {"other": "a"},
        {"messages": []},
        {"messages": [{"role": "user", "content": "a"}]},
    ]
    path = jsonl("a.jsonl", rows)
    with pytest.warns(UserWarning, match=r"4 empty rows left out.*\n1 truncated row cut.*\n2 malformed rows left out"):
        data = set_up(byte_tokenizer, path, max_length=12, on_bad_rows="report")
    bad = data.bad_rows["train"]
    assert dict(bad.counts) == {"empty": 4, "truncated": 1, "malformed": 2}
    assert [place.partition("line ")[2][0] for place in bad.places["empty"]] == ["2", "3", "7", "8"]
    assert [place.partition("line ")[2] for place in bad.places["truncated"]] == [
        "4 has 23 tokens, 11 more than max_length=12"
    ]
    assert [predicted(data, number) for number in range(2)] == [["fine</s>"], ["much too l"]]
    assert "neither messages, nor instruction and output" in str(bad)
    assert "4 empty rows left out" in data.summary()
    with pytest.raises(BadRowError, match=r"a.jsonl' line 2 has no text as 'completion'; on_bad_rows='report'"):
        set_up(byte_tokenizer, path)


def test_a_template_that_writes_turns_in_two_ways_is_refused(byte_tokenizer, jsonl):
    moving = (
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] if loop.last or m['role'] != 'assistant' else '(cut)' }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    path = jsonl("a.jsonl", [{"messages": TALK}])
    with pytest.raises(ConfigError, match=r"line 1: the chat template writes turn 3 in another way.*% generation %"):
        set_up(byte_tokenizer, path, chat_template=moving)
    once = set_up(byte_tokenizer, jsonl("b.jsonl", [{"messages": TALK[:3]}]), chat_template=moving)
    assert predicted(once) == ["Lily.\n"]


def test_a_tokenizer_without_a_chat_template_is_told(byte_tokenizer, jsonl, tmp_path, chatml):
    path = jsonl("a.jsonl", [{"messages": TALK}])
    with pytest.raises(ConfigError, match="has no chat template; give chat_template="):
        set_up(byte_tokenizer, path)
    with pytest.raises(ConfigError, match="chat_template='nowhere.jinja' is neither a template nor a file"):
        set_up(byte_tokenizer, path, chat_template="nowhere.jinja")
    (tmp_path / "chat.jinja").write_text(chatml)
    assert predicted(set_up(byte_tokenizer, path, chat_template=str(tmp_path / "chat.jinja")))[0].startswith("Lily")


def test_messages_are_checked(byte_tokenizer, chatml):
    tokenizer = AutoTokenizer.from_pretrained(byte_tokenizer, chat_template=chatml)
    with pytest.raises(BadRowError, match="begins with an answer"):
        assistant_spans(tokenizer, TALK[2:3], "here")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "sharegpt"}, "format must be one of auto, messages, alpaca, prompt_completion, got 'sharegpt'"),
        ({"prompt": "{a}"}, "prompt and completion are given together, without a format"),
        ({"document_mask": "none"}, "document_mask must be positions or dense, got 'none'"),
        ({"packing": True, "group_by_length": True}, "packing fills every row.*leave group_by_length out"),
        ({"max_length": 1}, "max_length must be an integer of at least 2, got 1"),
        ({"split": "middle"}, "split must be 'random' or 'end', got 'middle'"),
        ({"max_similarity": 2}, r"max_similarity must lie in \(0, 1\], got 2"),
        ({"diverse_rows": 0}, "diverse_rows must be an integer of at least 1, got 0"),
        ({"streaming": True, "val_fraction": 0.1}, "never holds all rows, which val_fraction=0.1 needs"),
    ],
)
def test_an_argument_out_of_range_is_refused_at_once(options, message):
    with pytest.raises(ConfigError, match=message):
        InstructionDataModule("tokenizer", "a.jsonl", **options)


def test_a_prompt_that_fills_the_row_is_counted_once(byte_tokenizer, jsonl):
    rows = [{"prompt": "p" * 20, "completion": "a"}, {"prompt": "p", "completion": "a" * 20}]
    with pytest.warns(UserWarning, match="line 1 has no token of an answer among its first 8 of 23"):
        data = set_up(byte_tokenizer, jsonl("a.jsonl", rows), max_length=8, on_bad_rows="report")
    assert dict(data.bad_rows["train"].counts) == {"empty": 1, "truncated": 1}


@pytest.mark.parametrize("marked", [False, True])
def test_the_tools_of_a_row_are_in_its_text(byte_tokenizer, jsonl, chatml, marked_chatml, marked):
    shown = "{% if tools %}{{ tools | tojson }}{% endif %}"
    tools = [{"type": "function", "function": {"name": "look"}}]
    talk = [
        {"role": "user", "content": "Hi", "tool_calls": None},  # as data sets of the hub fill it up
        {"role": "assistant", "content": "Hello"},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "Five"},
    ]
    refuses = "{% for m in messages %}{% if 'tool_calls' in m %}{{ raise_exception('calls') }}{% endif %}{% endfor %}"
    template = shown + refuses + (marked_chatml if marked else chatml)
    rows = [{"messages": talk, "tools": given} for given in (tools, json.dumps(tools), None)]
    data = set_up(byte_tokenizer, jsonl("a.jsonl", rows), chat_template=template)
    texts = ["".join(text for text, _ in data.shown(one)) for one in data.first("train", 3)]
    assert [text.startswith(json.dumps(tools)) for text in texts] == [True, True, False]
    assert predicted(data) == ["Hello<|im_end|>\n", "Five<|im_end|>\n"]
    for given, message in (("{", "has 'tools' that are not JSON"), ({"a": 1}, "has a dict as 'tools', not a list")):
        with pytest.raises(BadRowError, match=message):
            set_up(byte_tokenizer, jsonl("b.jsonl", [{"messages": talk, "tools": given}]), chat_template=template)


def test_content_in_parts_is_one_text(byte_tokenizer, jsonl, chatml):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    talk = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, {"role": "assistant", "content": parts}]
    image = [{"role": "user", "content": [{"type": "image", "url": "a.png"}]}, talk[1]]
    number = [{"role": "user", "content": 5}, talk[1]]
    path = jsonl("a.jsonl", [{"messages": messages} for messages in (talk, image, number)])
    with pytest.warns(
        UserWarning, match="line 2 has a message with a part that is no text.*line 3 has a int as the content"
    ):
        data = set_up(byte_tokenizer, path, chat_template=chatml, on_bad_rows="report")
    assert predicted(data) == ["Hello<|im_end|>\n"]
    assert "user\nHi<|im_end|>" in data.shown(data.first("train", 1)[0])[0][0]


def test_a_row_that_has_its_own_bos_and_eos_gets_no_others(byte_tokenizer, jsonl):
    data = set_up(
        byte_tokenizer,
        jsonl("a.jsonl", [{"prompt": "<s>a", "completion": "b</s>"}, {"prompt": "a", "completion": "b"}]),
    )
    assert rows_of(data) == [([256, *b"ab", 257], [-100, -100, *b"b", 257])] * 2
