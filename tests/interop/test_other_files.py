"""Other people's files mean what they mean in transformers: model folders, chat templates, tokenizers, chat data."""

import json
import re
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from test_tokenize import small_files

TOKENS = [[1, 17, 5, 40, 8, 63, 2, 9], [3, 3, 60, 11]]


def tiny(folder, **settings):
    """A small random Llama as transformers writes it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, **settings,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {f"w{id}": id for id in range(64)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))
    return folder


def assert_same_scores(trainer, folder, tmp_path, rows=TOKENS, adapter=None):
    """`trainer logits` in 16 bits (nothing quantized) against transformers, or PEFT, on the same folder."""
    tokens = tmp_path / "tokens.json"
    tokens.write_text(json.dumps(rows))
    output = tmp_path / "logits.safetensors"
    trainer("logits", "--backend", "cpu", "--model", folder, "--quant-bits", "16", "--tokens", tokens, "--output", output,
            *(["--adapter", adapter] if adapter else []))
    with safe_open(output, "pt") as ours, torch.no_grad():
        assert len(ours.keys()) == len(rows), ours.keys()
        for row, ids in enumerate(rows):
            # A model anew for each row: "dynamic" remembers the longest that it has seen.
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            if adapter:
                model = PeftModel.from_pretrained(model, adapter)
            name = f"row.{row}"
            expected = model(torch.tensor([ids])).logits[0]
            # Sums in f32 in another order.
            torch.testing.assert_close(ours.get_tensor(name).reshape(expected.shape), expected, atol=2e-4, rtol=0)


def edit(file, change):
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def test_two_tables_under_a_tied_configuration_are_two_tables(trainer, tmp_path):
    folder = tiny(tmp_path / "model", tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 0.1 * torch.randn(64, 32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    assert_same_scores(trainer, folder, tmp_path)
    # A copy of the embedding is nothing new.
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert_same_scores(trainer, folder, tmp_path)


@pytest.mark.parametrize("places", ["new", "old", "old base outside", "both"])
def test_rotary_settings_count_wherever_they_stand(trainer, tmp_path, places):
    folder = tiny(tmp_path / "model")
    linear = {"rope_type": "linear", "factor": 3.0}

    def change(config):
        config.pop("rope_parameters", None)
        match places:
            case "new":
                config["rope_parameters"] = {**linear, "rope_theta": 500.0}
            case "old":
                config["rope_scaling"] = {"type": "linear", "factor": 3.0}
                config["rope_theta"] = 500.0
            case "old base outside":
                config["rope_parameters"] = linear
                config["rope_theta"] = 500.0
            case "both":
                config["rope_parameters"] = {"rope_type": "default", "rope_theta": 20.0}
                config["rope_scaling"] = linear
                config["rope_theta"] = 500.0

    edit(folder / "config.json", change)
    assert_same_scores(trainer, folder, tmp_path)


YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
SCALINGS = {
    "yarn": {"rope_type": "yarn", **YARN},
    "yarn's attention factor": {"rope_type": "yarn", **YARN, "attention_factor": 0.6},
    "yarn's mscale": {"rope_type": "yarn", **YARN, "mscale": 1.5, "mscale_all_dim": 0.7},
    "yarn's mscale alone": {"rope_type": "yarn", **YARN, "mscale": 1.5},
    "yarn without whole dimensions": {"rope_type": "yarn", **YARN, "truncate": False},
    "yarn's betas": {"rope_type": "yarn", **YARN, "beta_fast": 5, "beta_slow": 0.3, "truncate": False},
    "yarn's implied factor": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16},
    "yarn without a context": {"rope_type": "yarn", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
}


def lengths(*lengths):
    """Rows of these lengths that begin alike."""
    return [[(7 * token + 3) % 64 for token in range(length)] for length in lengths]


@pytest.mark.parametrize("place", ["rope_parameters", "rope_scaling", "type"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_scaled_contexts_are_transformers(trainer, tmp_path, scaling, place):
    folder = tiny(tmp_path / "model", head_dim=32)
    settings = dict(SCALINGS[scaling])

    def change(config):
        config.pop("rope_parameters", None)
        if place == "type":
            settings["type"] = settings.pop("rope_type")
        config["rope_theta"] = 500.0
        config["rope_parameters" if place == "rope_parameters" else "rope_scaling"] = settings

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    edit(folder / "config.json", change)
    # Up to the limit of 64 positions and beyond it, as far as the scaling reaches.
    beyond = {"dynamic": [65, 100, 190], "yarn without a context": [65, 150]}.get(scaling, [])
    rows = lengths(5, 64, *beyond)
    assert_same_scores(trainer, folder, tmp_path, rows)
    if scaling != "dynamic":
        scaled = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            ids = torch.tensor([rows[1]])
            assert (plain(ids).logits - scaled(ids).logits).abs().max() > 1e-2, "the scaling changes the scores"
    longer = tmp_path / "longer.json"
    limit = {"dynamic": 192, "yarn without a context": 160}.get(scaling, 64)
    longer.write_text(json.dumps(lengths(limit + 1)))
    run = trainer.run(
        "logits", "--backend", "cpu", "--model", folder, "--tokens", longer, "--output", tmp_path / "no.safetensors"
    )
    assert run.code != 0 and f"positions end at {limit}" in run.stderr, run.stderr


@pytest.mark.parametrize("scaling", ["yarn", "dynamic"])
def test_text_under_a_scaled_context_goes_on_as_transformers_goes_on(trainer, tmp_path, scaling):
    folder = tiny(tmp_path / "model", head_dim=32, eos_token_id=63, pad_token_id=62)
    edit(folder / "config.json", lambda config: config.update(rope_parameters={
        "rope_theta": 500.0, **SCALINGS["dynamic" if scaling == "dynamic" else "yarn without a context"]}))
    # Two that stay below the limit, one that crosses it, one that begins beyond it.
    rows = lengths(20, 21, 50, 90)
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": " ".join(f"w{id}" for id in row)}) + "\n" for row in rows))
    edit(folder / "tokenizer.json", lambda tokenizer: tokenizer.update(pre_tokenizer={"type": "WhitespaceSplit"}))
    trainer(
        "generate", "--backend", "cpu", "--model", folder, "--quant-bits", 16, "--template", "raw", "--max-new-tokens", 40,
        "--prompts", prompts, "--output", answers,
    )
    found = [json.loads(line)["tokens"] for line in answers.read_text().splitlines()]
    for row, tokens in zip(rows, found, strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        ids = torch.tensor([row])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        expected = expected[0, len(row) :].tolist()
        # The end token belongs to no text.
        assert tokens == expected[: expected.index(63) if 63 in expected else None] and tokens


def test_a_merged_model_keeps_its_rotary_settings(trainer, tmp_path):
    base = tiny(tmp_path / "base", head_dim=32, rope_parameters={"rope_theta": 500.0, **SCALINGS["yarn's mscale"]})
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    trainer("merge", "--model", base, "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged", "--dtype", "f32")
    settings = [json.loads((folder / "config.json").read_text())["rope_parameters"] for folder in (base, tmp_path / "merged")]
    assert settings[0] == settings[1]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = torch.tensor(lengths(64))
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=2e-4, rtol=0)


@pytest.fixture
def chat_model(smollm2, tmp_path):
    """SmolLM2's folder under a chat template of the test's own."""

    def make(template):
        folder = tmp_path / "chat"
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        for file in smollm2.iterdir():
            (folder / file.name).symlink_to(file.resolve())
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        (folder / "chat_template.jinja").write_bytes(template.encode())
        return folder

    return make


def inspect(trainer, folder, rows, tmp_path):
    """The ids of each row, and which of them are learned."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = trainer(
        "inspect-data", "--set", f"base_model={folder}", "--set", f"dataset_path={data}", "--set", "val_set_size=0",
        "--set", "max_seq_len=2048",
        "--rows", "99", "--json",
    )
    found = []
    for row in run.json_lines():
        learned = [0] * len(row["ids"])
        for start, end in row["learned"]:
            learned[start:end] = [1] * (end - start)
        found.append((row["ids"], learned))
    return found


TURNS = [
    {"role": "user", "content": "weather? <b>&'\" é"},
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {
        "name": "w", "arguments": {"city": "Rome", "n": 1.0, "small": 1e-7, "large": 1e17, "flag": True, "none": None,
        "wide": -(10**25), "wider": [10**50 + 7]}}}]},
    {"role": "tool", "name": "w", "content": "20"},
    {"role": "assistant", "content": " It is 20.\n", "reasoning": "so it said"},
]
TOOLS = [{"type": "function", "function": {"name": "w", "description": "\"é\"", "parameters": {"b": [1, 2.5], "a": None}}}]

# Each writes the roles and contents, and one construct more.
CONSTRUCTS = {
    "values": "{{ [1, 'a', none, true, 1e-7, {'k': \"it's\"}] }}{{ none }}{{ 1.0 }}{{ true | string }}",
    "json of tools": "{% if tools %}{{ tools | tojson }}{{ tools[0] | tojson(indent=2, sort_keys=true) }}{% endif %}",
    "json with arguments": "{{ tools | tojson(ensure_ascii=true, separators=(',', ':')) }}",
    "calls": "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}"
    "{% for k, v in c.function.arguments | items %}{{ k }}={{ v }};{% endfor %}{% endfor %}{% endfor %}",
    "tests": "{{ tools is iterable }}{{ documents is iterable }}{{ 'a' is sequence }}{{ {} is mapping }}{{ x is defined }}"
    "{{ none is none }}{{ messages[0].content is string }}",
    "methods": "{{ ' A,b '.strip().lower().split(',') }}{{ 'ab'.startswith('a') }}{{ 'a-b'.replace('-', '+') }}"
    "{{ 'ab'.title() }}{{ 'x'.join(['a', 'b']) if false else 'x' }}{{ 'a\\nb'.splitlines() }}",
    "more methods": "{{ 'abc'.removeprefix('a') }}{{ 'a-b-c'.rsplit('-', 1) }}{{ 'a-b'.partition('-') }}{{ '7'.zfill(3) }}"
    "{{ 'ab'.center(7, '*') }}{{ ' a  b c '.split(maxsplit=1) }}{{ 'hello world foo' | truncate(9) }}{{ 'a b' | wordcount }}",
    "percent": "{{ '%s: %05.1f%%' % (messages[0].role, 2.25) }}{{ '%d' % messages|length }}{{ 7 % 3 }}{{ '%s' % [1, 2] }}"
    "{% for m in messages %}{{ '%02d' % loop.index }}{{ 'x' if loop.index0 % 2 else 'y' }}{% endfor %}",
    "dictionaries": "{{ {'b': 1, 'a': 'é'} }}{{ {'b': 1, 'a': [2]} | tojson }}{{ {'b': 1, 'a': 2}.items() | list }}"
    "{{ {'b': 1, 'a': 2} | dictsort }}{{ ['\u200b', 'é\u0301'] }}",
    "numbers": "{% for c in messages[1].tool_calls or [] %}{% set a = c.function.arguments %}{{ a.wide }} {{ a.wider }}"
    "{{ a.wide is integer }}{{ a.wider[0] is number }}{{ a.n is integer }}{{ a.flag is number }}{{ a.flag is integer }}"
    "{{ a.wide + 1 }}{{ [a.wider[0], a.wide] | tojson }}{% endfor %}",
    "reasoning": "{% for m in messages if m.reasoning_content is defined %}<{{ m.reasoning_content }}{{ m.thinking }}>"
    "{% endfor %}",
    "namespaces": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + loop.index0 %}{% endfor %}{{ ns.n }}",
    "slices": "{{ messages[1:]|length }}{{ messages[-1].role }}{{ messages[::-1][0].role }}{{ 'abcd'[1:3] }}",
}
CHAT = "{% for m in messages %}{{ '<|im_start|>' + m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


@pytest.mark.parametrize("construct", CONSTRUCTS)
def test_a_template_is_rendered_as_transformers_renders_it(trainer, smollm2, chat_model, tmp_path, construct):
    template = CONSTRUCTS[construct] + "\r\n" + CHAT.replace("\n", "\r\n")
    # As Python's open reads the file.
    read = template.replace("\r\n", "\n")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    # Only the last turn is learned: constructs that count messages change what comes before the others.
    turns = [TURNS[0], {**TURNS[1], "weight": 0}, *TURNS[2:]]
    rows = [
        {"messages": turns, "tools": TOOLS},
        {"messages": turns[2:], "tools": json.dumps(TOOLS)},
        {"messages": [{**turn, "tool_call_id": None} for turn in turns], "tools": TOOLS},
    ]
    found = inspect(trainer, chat_model(template), rows, tmp_path)
    for row, (ids, _) in zip(rows, found, strict=True):
        theirs = TURNS[-len(row["messages"]) :]
        expected = tokenizer.apply_chat_template(
            theirs, tools=TOOLS, chat_template=read, tokenize=True, return_dict=True
        )["input_ids"]
        assert ids == expected, f"{tokenizer.decode(ids)}\n{tokenizer.decode(expected)}"


@pytest.mark.parametrize("space", ["", "-"])
def test_marks_of_a_template_are_transformers_mask(trainer, smollm2, chat_model, tmp_path, space):
    template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}\
{% generation S%}\n  {{ m.content + '<|im_end|>' }}{%S endgeneration %}{{ '\n' }}{% else %}{{ m.content + '<|im_end|>\n' }}\
{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}".replace("S", space)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    rows = [{"messages": TURNS[2:]}, {"messages": [TURNS[0], TURNS[3], TURNS[0], TURNS[3]]}]
    found = inspect(trainer, chat_model(template), rows, tmp_path)
    for row, (ids, learned) in zip(rows, found, strict=True):
        expected = tokenizer.apply_chat_template(
            row["messages"], chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert ids == expected["input_ids"]
        assert learned == expected["assistant_masks"] and any(learned)


@pytest.mark.parametrize("form", ["added_tokens_decoder", "added_tokens.json"])
def test_added_tokens_of_other_files_are_whole(trainer, smollm2, chat_model, tmp_path, form):
    folder = chat_model(CHAT)
    config = json.loads((smollm2 / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").unlink()
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    if form == "added_tokens_decoder":
        config["added_tokens_decoder"]["49152"] = {**token, "content": "<call>", "special": False}
        config["added_tokens_decoder"]["49153"] = {**token, "content": "<|eom|>", "special": True}
    else:
        config.pop("added_tokens_decoder")
        (folder / "added_tokens.json").write_text(json.dumps({"<call>": 49152, "<|eom|>": 49153}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    model = json.loads((smollm2 / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**model, "vocab_size": 49154}))
    text = "a<call>b<|eom|>c <call> d"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    assert 49152 in expected and 49153 in expected
    found = inspect(trainer, folder, [{"text": text}], tmp_path)
    assert found[0][0] == expected


NAMED = {
    "unnamed tokens, version 4": ({"additional_special_tokens": ["<call>", "<|eom|>"]}, None),
    "unnamed tokens, version 5": ({"extra_special_tokens": ["<call>", "<|eom|>"]}, None),
    "a model's own names": ({"call_token": "<call>", "extra_special_tokens": {"eom_token": "<|eom|>"}}, None),
    "a standard name": ({"pad_token": "<|eom|>", "extra_special_tokens": ["<call>"]}, None),
    "special_tokens_map.json": ({}, {"pad_token": "<call>", "additional_special_tokens": ["<|eom|>"]}),
    "special tokens as text": ({"extra_special_tokens": ["<call>", "<|eom|>"], "split_special_tokens": True}, None),
}


@pytest.mark.parametrize("case", NAMED)
def test_tokens_that_are_named_without_an_id_are_added(trainer, smollm2, chat_model, tmp_path, case):
    settings, old_map = NAMED[case]
    folder = chat_model(CHAT)
    config = json.loads((smollm2 / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").unlink()
    if old_map:
        config.pop("added_tokens_decoder")
        (folder / "special_tokens_map.json").unlink(missing_ok=True)
        (folder / "special_tokens_map.json").write_text(json.dumps(old_map))
    config.pop("additional_special_tokens", None)
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **settings}))
    model = json.loads((smollm2 / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**model, "vocab_size": 49154}))
    text = "a<call>b<|eom|>c <call> <|im_end|> d"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    assert ({49152, 49153} <= set(expected)) == ("split_special_tokens" not in settings)
    found = inspect(trainer, folder, [{"text": text}], tmp_path)
    assert found[0][0] == expected


@pytest.mark.parametrize("keys", [{}, {"legacy": True}, {"add_prefix_space": False}, {"add_bos_token": False}])
def test_a_llama_tokenizer_is_transformers_own(trainer, stories260k, tmp_path, keys):
    """transformers 5 builds this class around the file's vocabulary; ids differ from the file's own pipeline."""
    folder = small_files(stories260k, tmp_path / "model")
    texts = ["Once upon", " two  spaces", "a<s>b</s>\n c", "\nline", "日本 é </s> x", ""]
    texts = [text + "z" for text in texts]
    plain = AutoTokenizer.from_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.update(tokenizer_class="LlamaTokenizer", **keys)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = [tokenizer(text)["input_ids"] for text in texts]
    assert expected != [plain(text)["input_ids"] for text in texts]
    found = inspect(trainer, folder, [{"text": text} for text in texts], tmp_path)
    assert [ids for ids, _ in found] == [ids + [tokenizer.eos_token_id] for ids in expected]


def test_saved_tables_of_a_grown_vocabulary_merge_as_in_peft(trainer, tmp_path):
    base = tiny(tmp_path / "base", tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(70)
    model.save_pretrained(tmp_path / "grown")
    for file in ["tokenizer.json"]:
        shutil.copy(base / file, tmp_path / "grown" / file)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "grown", dtype=torch.float32)
    # So that PEFT sees that the vocabulary has grown.
    model.config._name_or_path = str(base)
    model.name_or_path = str(base)
    adapted = get_peft_model(
        model,
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"],
                   task_type="CAUSAL_LM"),
    )
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    names = load_file(tmp_path / "adapter/adapter_model.safetensors")
    print(sorted(name for name in names if "lora" not in name))
    trainer(
        "merge", "--model", tmp_path / "grown", "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged",
        "--dtype", "f32",
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = torch.tensor([TOKENS[0] + [69]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=2e-4, rtol=0)


TOKENS_TRAINED = {
    "list": [3, 17],
    "map": {"embed_tokens": [17, 3]},
    "in full": {"model.embed_tokens": [17, 3]},
    "head": {"lm_head": [40]},
    "both": {"embed_tokens": [3], "lm_head": [40, 9]},
    "both alike": {"embed_tokens": [3], "lm_head": [3]},
}


@pytest.mark.parametrize("whole_tables", [False, True])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tokens", TOKENS_TRAINED)
def test_trained_tokens_are_pefts(trainer, tmp_path, tokens, tied, whole_tables):
    base = tiny(tmp_path / "base", tie_word_embeddings=tied)
    indices = TOKENS_TRAINED[tokens]
    # PEFT runs no LoRA beside the rows of a table; a head that has none can have one.
    targets = ["q_proj", "lm_head"] if tokens in ("list", "map", "in full") and not tied else ["q_proj"]
    torch.manual_seed(1)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=4, target_modules=targets, trainable_token_indices=indices, init_lora_weights=False,
                   task_type="CAUSAL_LM"),
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=whole_tables)
    assert_same_scores(trainer, base, tmp_path, adapter=tmp_path / "adapter")
    trainer("merge", "--model", base, "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged", "--dtype", "f32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        for ids in TOKENS:
            expected = adapted(torch.tensor([ids])).logits
            # Sums in f32 in another order.
            torch.testing.assert_close(merged(torch.tensor([ids])).logits, expected, atol=2e-4, rtol=0)
    run = trainer.run("unmerge", "--model", tmp_path / "merged", "--adapter", tmp_path / "adapter", "--output", tmp_path / "back")
    assert run.code != 0 and "rows of the embedding" in run.stderr, run.stderr


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize(
    "tokens, tied", [("list", True), ("list", False), ("in full", True), ("head", True), ("head", False), ("both", True),
                     ("both", False), ("both alike", True)]
)
def test_training_tokens_is_pefts_training(trainer, tmp_path, tokens, tied, bits):
    """From one adapter and on the same rows, six steps of ours and of PyTorch's AdamW make the same adapter."""
    base = tiny(tmp_path / "base", tie_word_embeddings=tied, eos_token_id=63)
    edit(base / "tokenizer.json", lambda tokenizer: tokenizer.update(pre_tokenizer={"type": "WhitespaceSplit"}))
    indices = TOKENS_TRAINED[tokens]
    torch.manual_seed(1)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=4, target_modules=["v_proj"], layers_to_transform=[1], trainable_token_indices=indices,
                   init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    adapted.save_pretrained(tmp_path / "start")
    texts = ["w3 w17 w5 w40 w3 w8 w9", "w17 w3 w60 w11", "w40 w40 w9 w2 w17", "w3 w17 w5 w22"]
    rows = [{"text": text} for text in texts]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer(
        "train", "--backend", "cpu", "--output-dir", tmp_path / "run", *[
            argument for key in [
                f"base_model={base}", f"dataset_path={data}", f"init_adapter={tmp_path / 'start'}", "val_set_size=0", "max_steps=6",
                f"quant_bits={bits}", "batch_size=4", "learning_rate=0.01", "lr_scheduler=constant", "warmup_ratio=0",
                "max_grad_norm=0", "num_epochs=6",
            ] for argument in ("--set", key)
        ],
    )
    # What was written of the settings is a configuration again.
    trainer("plan", "--config", tmp_path / "run/config.toml")
    if bits == 8:
        # Other weights, other numbers: only that the rows are trained and PEFT loads them.
        ours = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
        start = load_file(tmp_path / "start/adapter_model.safetensors")
        assert ours.keys() == start.keys()
        for name in (name for name in ours if "token_adapter" in name):
            assert (ours[name] - start[name]).abs().max() > 5e-3, name
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "run/adapter")
        return
    found = inspect(trainer, base, rows, tmp_path)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.01, weight_decay=0)
    for _ in range(6):
        losses, count = 0, 0
        for ids, learned in found:
            logits = adapted(torch.tensor([ids])).logits[0]
            targets = torch.tensor([id if learn else -100 for id, learn in zip(ids, learned)][1:])
            losses = losses + torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="sum")
            count += (targets >= 0).sum()
        optimizer.zero_grad()
        (losses / count).backward()
        optimizer.step()
    adapted.save_pretrained(tmp_path / "expected")
    ours = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    expected = load_file(tmp_path / "expected/adapter_model.safetensors")
    assert ours.keys() == expected.keys() and any("token_adapter" in name for name in ours)
    for name in expected:
        # Six updates of up to 0.01 each.
        torch.testing.assert_close(ours[name], expected[name], atol=1e-4, rtol=0, msg=lambda m: f"{name}: {m}")
    assert_same_scores(trainer, base, tmp_path, adapter=tmp_path / "run/adapter")
    trainer("merge", "--model", base, "--adapter", tmp_path / "run/adapter", "--output", tmp_path / "merged", "--dtype", "f32")
    arguments = ["--backend", "cpu", "--quant-bits", "16", "--prompt", "w3 w17 w5", "--max-new-tokens", "12"]
    adapter = ["--model", base, "--adapter", tmp_path / "run/adapter"]
    written = [trainer("generate", *arguments, *model).stdout for model in (["--model", tmp_path / "merged"], adapter, [*adapter, "--merge"])]
    assert written[0].strip() and written[0] == written[1] == written[2], written


def test_fresh_tokens_start_as_the_tables_rows(trainer, tmp_path):
    base = tiny(tmp_path / "base", tie_word_embeddings=True, eos_token_id=63)
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"text": "w3"}) + "\n")
    keys = [f"base_model={base}", f"dataset_path={data}", "val_set_size=0", "max_steps=1", "quant_bits=8",
            "learning_rate=1e-9", "trainable_token_indices=[17, 5]"]
    sets = [argument for key in keys for argument in ("--set", key)]
    trainer("train", "--backend", "cpu", "--output-dir", tmp_path / "run", *sets)
    saved = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert saved["trainable_token_indices"] == {"embed_tokens": [17, 5]}
    rows = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    rows = rows["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    table = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    torch.testing.assert_close(rows, table[[17, 5]], atol=1e-8, rtol=0)
    trainer.fails("export-gguf", "--model", base, "--adapter", tmp_path / "run/adapter", "--lora", "--output", tmp_path / "lora.gguf",
                  saying=["rows of model.embed_tokens", "llama.cpp"])
    trainer.fails("combine", "--adapter", f"{tmp_path / 'run/adapter'}=1", "--output", tmp_path / "combined",
                  saying=["trainable_token_indices", "merge this adapter"])
    planned = [trainer("plan", *sets, *more).stdout for more in ([], ["--set", "trainable_token_indices=none"])]
    counts = [int(re.search(r"trainable: ([\d,]+) parameters", text)[1].replace(",", "")) for text in planned]
    assert counts[0] - counts[1] == 2 * 32, planned[0]
    for tokens, reason in [("[64]", "token 64"), ("[5, 5]", "twice"), ("{ lm_head = [5] }", "")]:
        run = trainer.run("train", "--backend", "cpu", "--output-dir", tmp_path / "other", *sets, "--set",
                          f"trainable_token_indices={tokens}", "--set", "target_modules=['lm_head']")
        assert run.code != 0 and "trainable_token_indices" in run.stderr and reason in run.stderr, run.stderr
