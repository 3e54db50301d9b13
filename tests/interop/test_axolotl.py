"""axolotl's configurations and data: ids and labels as its own strategies make them.

Where axolotl can be imported (`pip install --no-deps axolotl`, with `datasets`), its code is the reference. For the instruct
format there is another one beside it, a few lines on transformers' tokenizer alone, which is used in any case.
"""

import json
import random

import pytest
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from test_tokenize import small_files

try:
    from axolotl.prompt_strategies import load as load_strategy
    from axolotl.prompt_strategies.user_defined import UserDefinedDatasetConfig, load as load_user_defined
    from axolotl.prompters import AlpacaPrompter, GPTeacherPrompter
    from axolotl.prompt_tokenizers import AlpacaPromptTokenizingStrategy, GPTeacherPromptTokenizingStrategy
    from axolotl.utils.dict import DictDefault
except ImportError:
    load_strategy = None

SEQUENCE_LEN = 4096
FINLORA = {
    "system_prompt": "",
    "field_system": "system",
    "field_instruction": "context",
    "field_output": "target",
    "format": "[INST] {instruction} [/INST]",
    "no_input_format": "[INST] {instruction} [/INST]",
}
WORDS = (
    "margin fell rose quarter bank rate yield the of and 1,204.5 -0.03 3% 17 2026 café naïve Zürich 東京 利益 Δ ≥ 👩‍🚀 a\u0301 ﬁ "
    "it's we'll [INST] [/INST] {x} {instruction} <b> \\n \t\t -- ... ''"
).split(" ")


def words(draw, count):
    """Words with spaces and line ends between and around them."""
    text = "".join(draw.choice(WORDS) + draw.choice([" ", " ", " ", "  ", "\n", ""]) for _ in range(count))
    return draw.choice(["", "", " ", "\n"]) + text + draw.choice(["", "", " ", "\n\n"])


def made_up_rows(tokenizer, count=200):
    """Rows of FinLoRA's columns. Some contexts are empty; some targets end with the end token."""
    draw = random.Random(12)
    rows = []
    for index in range(count):
        context = "" if index % 17 == 0 else words(draw, draw.randrange(1, 40))
        target = words(draw, draw.randrange(1, 6)) + "x"
        if index % 13 == 0:
            target += tokenizer.eos_token
        rows.append({"context": context, "target": target})
    return rows


def prompt_and_answer(tokenizer, prompt, answer):
    """Ids and labels of an answer to a prompt, each tokenized by itself: what the tokenizer puts before a text stands before
    the prompt alone, and the end token follows the answer once."""
    ids = tokenizer(prompt)["input_ids"] if prompt else []
    learned = tokenizer(answer)["input_ids"]
    if learned[-1] != tokenizer.eos_token_id:
        learned = [*learned, tokenizer.eos_token_id]
    if learned[0] == tokenizer.bos_token_id:
        learned = learned[1:]
    return ids + learned, [-100] * len(ids) + learned


def settings(tokenizer=None, **more):
    return DictDefault({"train_on_inputs": False, "sequence_len": SEQUENCE_LEN, "tokenizer": tokenizer, **more})


def axolotls(strategy, rows):
    """Ids and labels as a strategy of axolotl's makes them."""
    made = [strategy.tokenize_prompt(dict(row)) for row in rows]
    return [(row["input_ids"], row["labels"]) for row in made]


def llama3_style(smollm2, folder):
    """SmolLM2's byte-level BPE with a token before every text, as Llama 3's tokenizer has one."""
    copy = small_files(smollm2, folder)
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    begin = "<repo_name>"
    template = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    tokenizer.save(str(copy / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": "<|im_end|>"}
    (copy / "tokenizer_config.json").write_text(json.dumps(names))
    (copy / "special_tokens_map.json").unlink(missing_ok=True)
    return copy


@pytest.fixture(params=["smollm2", "stories260k", "embedded_model", "llama3"])
def model(request, tmp_path):
    """Byte-level BPE without BOS, SentencePiece's kind with BOS and a space before every text, and Llama 3's kind."""
    if request.param == "llama3":
        return llama3_style(request.getfixturevalue("smollm2"), tmp_path / "model")
    return small_files(request.getfixturevalue(request.param), tmp_path / "model")


@pytest.fixture
def inspect(trainer, tmp_path):
    """`inspect(model, rows, type)`: our ids and labels of rows under an axolotl file with this type of data."""

    def run(model, rows, kind, **more):
        folder = tmp_path / "configs"
        folder.mkdir(exist_ok=True)
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        config = {
            "base_model": str(model),
            "datasets": [{"path": "../rows.jsonl", "type": kind, **more}],
            "adapter": "lora",
            "lora_r": 8,
            "lora_alpha": 16,
            "lora_target_modules": ["q_proj", "v_proj"],
            "learning_rate": 0.0002,
            "sequence_len": SEQUENCE_LEN,
            "wandb_project": None,
            "deepspeed": "zero1.json",
        }
        # JSON is YAML.
        (folder / "run.yml").write_text(json.dumps(config, ensure_ascii=False, indent=1), encoding="utf-8")
        found = trainer("inspect-data", "--json", "--rows", len(rows), "--config", folder / "run.yml").json_lines()
        labelled = []
        for row in found:
            learned = {at for start, end in row["learned"] for at in range(start, end)}
            labelled.append((row["ids"], [id if at in learned else -100 for at, id in enumerate(row["ids"])]))
        return labelled

    return run


def assert_same(rows, ours, theirs):
    theirs = list(theirs)
    assert len(ours) == len(theirs) == len(rows)
    for row, our, their in zip(rows, ours, theirs):
        assert our == tuple(their), row


def test_200_rows_of_finloras_format_have_axolotls_ids_and_labels(model, inspect):
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = made_up_rows(tokenizer)
    ours = inspect(model, rows, FINLORA)
    expected = [prompt_and_answer(tokenizer, f"[INST] {row['context']} [/INST]", row["target"]) for row in rows]
    assert_same(rows, ours, expected)
    begins = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    for ids, labels in ours:
        assert ids[:1] == [tokenizer.bos_token_id] if begins else True
        assert labels[-1] == tokenizer.eos_token_id
    if load_strategy:
        strategy = load_user_defined(tokenizer, settings(), UserDefinedDatasetConfig(**FINLORA))
        assert_same(rows, ours, axolotls(strategy, rows))


CUSTOM = {
    "system_prompt": "Answer briefly. {system}",
    "system_format": "<<{system}>>\n",
    "field_system": "role",
    "field_instruction": "question",
    "field_input": "passage",
    "field_output": "reply",
    "format": "{{Q}} {instruction}\n{input}\n{instruction}? ",
    "no_input_format": "{{Q}} {instruction}\n",
}


@pytest.mark.parametrize("has_role", [True, False])
def test_a_format_of_ones_own_is_filled_as_pythons_format_does(model, inspect, has_role):
    tokenizer = AutoTokenizer.from_pretrained(model)
    draw = random.Random(3)
    rows = []
    for index in range(60):
        row = {"question": words(draw, 8), "reply": words(draw, 3) + "y", "instruction": "not read", "output": "nor this"}
        row["passage"] = words(draw, 12) if index % 3 else ""
        if has_role:
            row["role"] = words(draw, 4) if index % 4 else ""
        rows.append(row)
    expected = []
    for row in rows:
        system = row.get("role", CUSTOM["system_prompt"])
        prompt = CUSTOM["system_format"].format(system=system) if system else ""
        if row["passage"]:
            prompt += CUSTOM["format"].format(instruction=row["question"], input=row["passage"])
        else:
            prompt += CUSTOM["no_input_format"].format(instruction=row["question"])
        expected.append(prompt_and_answer(tokenizer, prompt, row["reply"]))
    ours = inspect(model, rows, CUSTOM)
    assert_same(rows, ours, expected)
    if load_strategy:
        strategy = load_user_defined(tokenizer, settings(), UserDefinedDatasetConfig(**CUSTOM))
        assert_same(rows, ours, axolotls(strategy, rows))


def named_strategy(kind, tokenizer):
    """axolotl's strategy of a name, by its two ways: a handler of its own, or a module."""
    base, _, style = kind.partition(":")
    if base == "alpaca":
        return AlpacaPromptTokenizingStrategy(AlpacaPrompter(style or None), tokenizer, False, SEQUENCE_LEN)
    if base == "gpteacher":
        return GPTeacherPromptTokenizingStrategy(GPTeacherPrompter(style or None), tokenizer, False, SEQUENCE_LEN)
    return load_strategy(kind, tokenizer, settings(), DictDefault({}))


NAMED = [
    "alpaca", "alpaca:instruct", "alpaca:chat", "alpaca:chatml", "alpaca_chat.load", "alpaca_chat.load_no_prompt",
    "alpaca_instruct.load", "alpaca_instruct.load_no_prompt", "gpteacher",
]


@pytest.mark.skipif(load_strategy is None, reason="axolotl's own prompts are its code's: pip install --no-deps axolotl")
def test_named_types_have_axolotls_prompts(smollm2, inspect, tmp_path):
    model = small_files(smollm2, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    for kind in NAMED:
        draw = random.Random(4)
        answer = "response" if kind == "gpteacher" else "output"
        rows = [
            {"instruction": words(draw, 8), "input": words(draw, 9) if index % 2 else "", answer: words(draw, 3) + "y"}
            for index in range(20)
        ]
        ours = inspect(model, rows, kind)
        assert_same(rows, ours, axolotls(named_strategy(kind, tokenizer), rows))


def test_completions_are_learned_from_their_second_token_on(model, inspect):
    tokenizer = AutoTokenizer.from_pretrained(model)
    draw = random.Random(5)
    rows = [{"body": words(draw, 12) + "z"} for _ in range(20)]
    ours = inspect(model, rows, "completion", field="body")
    # Nothing predicts a first token, whatever its label is.
    without_first = lambda ids: (ids, [-100, *ids[1:]])
    expected = [without_first(tokenizer(row["body"])["input_ids"] + [tokenizer.eos_token_id]) for row in rows]
    assert_same(rows, ours, expected)
    if load_strategy:
        strategy = load_strategy("completion", tokenizer, settings(), DictDefault({"field": "body"}))
        made = strategy.tokenize_prompt({"body": [row["body"] for row in rows]})
        assert made["labels"] == made["input_ids"]
        assert_same(rows, ours, map(without_first, made["input_ids"]))


@pytest.mark.skipif(load_strategy is None, reason="axolotl's own strategies are its code's: pip install --no-deps axolotl")
def test_turns_of_a_conversation_are_learned_with_the_end_token(smollm2, inspect, tmp_path):
    model = small_files(smollm2, tmp_path / "model")
    for file in smollm2.glob("*.jinja"):
        (model / file.name).write_text(file.read_text())
    tokenizer = AutoTokenizer.from_pretrained(model)
    draw = random.Random(6)
    rows = []
    for index in range(20):
        turns = [{"role": "system", "content": "Be brief."}] if index % 2 else []
        for _ in range(index % 3 + 1):
            turns.append({"role": "user", "content": words(draw, 6).strip()})
            turns.append({"role": "assistant", "content": words(draw, 4).strip() + "y"})
        rows.append({"messages": turns})
    kind = {"type": "chat_template", "field_messages": "messages"}
    strategy = load_strategy("chat_template", tokenizer, settings(), DictDefault(kind))
    assert_same(rows, inspect(model, rows, "chat_template", field_messages="messages"), axolotls(strategy, rows))
