"""Token ids and what is learned of them, against transformers' tokenizers and chat templates."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

# A template with transformers' own marks around what the assistant says. Two special tokens that both
# models' tokenizers can be given.
MARKED = (
    "{{ bos_token }}{%- for message in messages -%}\n{% if message['role'] == 'assistant' %}"
    "<|{{ message['role'] }}|>\n{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}\n"
    "{% else %}<|{{ message['role'] }}|>\n{{ message['content'] | trim }}\n{% endif %}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>\n{% endif %}"
)

TOOLS = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}\n{{ tool | tojson(indent=2) }}\n{% endfor %}{% endif %}"
    "{% for message in messages %}[{{ message.role | upper }}] {{ message.content.strip() }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[ASSISTANT] {% endif %}"
)


def small_files(folder, copy):
    """A copy of what tokenization needs of a model, with positions for rows of any length."""
    copy.mkdir()
    for file in folder.iterdir():
        if file.suffix == ".json":
            shutil.copy(file, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1_000_000}))
    # A configuration's model must have weights; nothing here reads them.
    (copy / "model.safetensors").touch()
    return copy


@pytest.fixture(params=["smollm2", "stories260k", "embedded_model"])
def model(request, tmp_path):
    """Every tokenizer at hand: byte-level BPE, SentencePiece with BOS, and the embedded one."""
    return small_files(request.getfixturevalue(request.param), tmp_path / "model")


@pytest.fixture
def with_template(tmp_path):
    """`with_template(folder, text)`: a copy of a model's small files with this chat template."""

    def make(folder, text):
        copy = small_files(folder, tmp_path / "with_template")
        (copy / "chat_template.jinja").write_text(text)
        return copy

    return make


@pytest.fixture
def tokenize(trainer, tmp_path):
    """`tokenize(model, rows, template)`: our ids and learned positions of rows, in their order."""

    def run(model, rows, template="raw", name="rows.jsonl"):
        file = tmp_path / name
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        settings = {
            "base_model": model,
            "dataset_path": file,
            "val_set_size": 0,
            "max_seq_len": 1_000_000,
            "prompt_template": template,
        }
        sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        found = trainer("inspect-data", "--json", "--rows", len(rows), *sets).json_lines()
        return [(row["ids"], [at for start, end in row["learned"] for at in range(start, end)]) for row in found]

    return run


def rows_of(data, count):
    """The first rows of FinLoRA's two files, half of each."""
    rows = []
    for name in ["fpb_train.jsonl", "tfns_train.jsonl"]:
        lines = (data / name).read_text(encoding="utf-8").splitlines()
        rows += [json.loads(line) for line in lines[: count // 2]]
    return rows


def made_up_rows(count):
    """Rows of characters and spacings that tokenizers stumble over."""
    pieces = ["é", "日本語", "👩‍🚀", "\n\n", "  ", "\t", "<|im_end|>", "</s>", "<s>", "'re", "1,234.5", "ﬁ", "a\u0301", "́", "\u200b"]
    rows = []
    for index in range(count):
        picked = [pieces[(index * 7 + step * (index % 5 + 1)) % len(pieces)] for step in range(6)]
        rows.append({"context": " ".join(picked) + "x", "target": "".join(picked[:3]) + "y"})
    return rows


def assert_pairs(model, tokenize, rows, template, prompt_of):
    """Prompt and target as transformers tokenizes them: the first with special tokens, the second without. A prompt
    that opens with the begin token itself gets no second one, as in TRL."""
    reference = AutoTokenizer.from_pretrained(model)
    ours = tokenize(model, rows, template)
    expected = []
    for row in rows:
        prompt = prompt_of(reference, row)
        if reference.bos_token_id is not None and prompt[:2] == [reference.bos_token_id] * 2:
            prompt = prompt[1:]
        target = reference(row["target"], add_special_tokens=False)["input_ids"] + [reference.eos_token_id]
        expected.append((prompt + target, list(range(len(prompt), len(prompt) + len(target)))))
    assert len(ours) == len(expected)
    for index, (ours, theirs) in enumerate(zip(ours, expected)):
        assert ours == theirs, f"row {index}: {rows[index]}"


def test_3000_real_rows_are_tokenized_alike(model, data, tokenize):
    rows = rows_of(data, 3000)
    assert len(rows) == 3000
    assert_pairs(model, tokenize, rows, "raw", lambda it, row: it(row["context"])["input_ids"])


def test_rows_of_odd_characters_are_tokenized_alike(model, tokenize):
    rows = made_up_rows(200)
    assert_pairs(model, tokenize, rows, "raw", lambda it, row: it(row["context"])["input_ids"])
    assert_pairs(model, tokenize, rows, "inst", lambda it, row: it(f"[INST] {row['context']} [/INST]")["input_ids"])


def chat(it, messages, **options):
    return it.apply_chat_template(messages, tokenize=True, return_dict=True, **options)


def test_prompts_of_the_chat_template_are_alike(smollm2, data, tokenize):
    rows = rows_of(data, 400) + made_up_rows(50)

    def prompt(it, row):
        message = {"role": "user", "content": row["context"]}
        return chat(it, [message], add_generation_prompt=True)["input_ids"]

    assert_pairs(smollm2, tokenize, rows, "chat", prompt)


def conversations(rows):
    """Conversations of one to three answers, with and without a system message."""
    made = []
    for index in range(0, len(rows) - 3, 3):
        messages = [{"role": "system", "content": "Be brief."}] if index % 2 else []
        for row in rows[index : index + 1 + index % 3]:
            messages.append({"role": "user", "content": row["context"]})
            messages.append({"role": "assistant", "content": row["target"]})
        made.append({"messages": messages})
    return made


def test_conversations_are_rendered_and_tokenized_alike(smollm2, data, tokenize):
    rows = conversations(rows_of(data, 900) + made_up_rows(60))
    reference = AutoTokenizer.from_pretrained(smollm2)
    ours = tokenize(smollm2, rows)
    end = reference.convert_tokens_to_ids("<|im_end|>")
    assert len(ours) == len(rows)
    checked = 0
    for row, (ids, learned) in zip(rows, ours):
        messages = row["messages"]
        assert ids == chat(reference, messages)["input_ids"]
        # This template has no marks, so the turns are found by their tokens: what each adds to those before it,
        # up to the one that ends it. Where an answer begins with a line break, which goes into one token with
        # that before it, or holds the end token itself, this way is none.
        expected, compared = [], True
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                before = chat(reference, messages[:index], add_generation_prompt=True)["input_ids"]
                compared &= before == ids[: len(before)] and "<|im_end|>" not in message["content"]
                stop = len(before) + (ids[len(before) :] + [end]).index(end) + 1
                expected += range(len(before), stop)
        if compared:
            assert learned == expected, row
            checked += 1
    assert checked > 300


def test_masks_are_those_of_transformers_where_a_template_marks_the_assistant(model, data, with_template, tokenize):
    rows = conversations(rows_of(data, 300))
    marked = with_template(model, MARKED)
    reference = AutoTokenizer.from_pretrained(marked)
    expected = []
    for row in rows:
        both = chat(reference, row["messages"], return_assistant_tokens_mask=True)
        learned = [at for at, mask in enumerate(both["assistant_masks"]) if mask]
        expected.append((both["input_ids"], learned))
    assert len(expected) == len(rows) > 90
    assert tokenize(marked, rows) == expected


def test_tools_reach_the_template_as_python_writes_them(smollm2, with_template, tokenize):
    tools = [
        {"type": "function", "function": {"name": "f", "description": "é <b> 'x' \"y\"", "strict": True, "n": [1, 2.5]}},
        {"z": None, "a": {}, "m": []},
    ]
    messages = [{"role": "user", "content": " weather? "}, {"role": "assistant", "content": "sunny"}]
    model = with_template(smollm2, TOOLS)
    reference = AutoTokenizer.from_pretrained(model)
    theirs = reference.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=True)["input_ids"]
    [(ours, learned)] = tokenize(model, [{"messages": messages, "tools": tools}])
    assert reference.decode(ours) == reference.decode(theirs)
    assert ours == theirs
    # The space before the answer is one token with its first word, and is learned with it.
    assert reference.decode([ours[at] for at in learned]) == " sunny<|im_end|>"


def test_a_text_is_learned_whole(model, tokenize):
    rows = [{"text": "Once upon a time, there was a café."}, {"text": "yes\n"}]
    reference = AutoTokenizer.from_pretrained(model)
    for row, (ids, learned) in zip(rows, tokenize(model, rows)):
        expected = reference(row["text"])["input_ids"] + [reference.eos_token_id]
        assert ids == expected
        assert learned == list(range(1, len(expected)))
