"""Every model family against transformers, PEFT and llama.cpp: small random models, with tokenizers and chat templates
like those of the published ones."""

import json
import unicodedata

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from test_gguf import LlamaCpp, export, quantize

# name: the family, and what differs from SIZE. Heads of 32 in a model of 64: their widths do not add up to the hidden size.
FAMILIES = {
    "llama": ("llama", {}),
    "mistral": ("mistral", dict(head_dim=32, sliding_window=None, rope_theta=1e6, tie_word_embeddings=False)),
    # A window in every layer, and in the last two: rows and texts are longer.
    "mistral_window": ("mistral", dict(head_dim=32, sliding_window=12)),
    "qwen2_window": ("qwen2", dict(use_sliding_window=True, sliding_window=9, max_window_layers=1)),
    "qwen2": ("qwen2", dict(rope_theta=1e6)),
    "qwen2_untied": ("qwen2", dict(rope_theta=1e6, tie_word_embeddings=False, num_key_value_heads=1)),
    "qwen3": ("qwen3", dict(head_dim=32, rope_theta=1e6)),
    "qwen3_untied": ("qwen3", dict(head_dim=16, tie_word_embeddings=False, num_key_value_heads=4)),
}
SIZE = dict(hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=512, rms_norm_eps=1e-6, tie_word_embeddings=True, initializer_range=0.15)
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPTS = ["The capital of France is", "Once upon a time,", "1234567890 don't we'LL", "日本語 naïve façade 🙂", "x"]
NEW_TOKENS = 40
EXACT = ("--backend", "cpu", "--compute-dtype", "f32")
# f32 sums in another order, of logits of up to 6.
TOLERANCE = 5e-5

# Byte-level BPE as Qwen's tokenizers: NFC, words and single digits.
QWEN = {
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex":
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"}},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
    ]},
}
# What the templates of these families do, in few lines: a default system message, tools, the reasoning of turns before
# the last question left out, an empty thought where there is none.
CHATML = (
    "{%- if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n"
    "{%- elif messages[0]['role'] != 'system' %}<|im_start|>system\nBe helpful.<|im_end|>\n{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'user' or message.role == 'system' or (message.role == 'assistant' and not message.tool_calls) %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- elif message.role == 'tool' %}"
    "{%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}"
    "{{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
THINKING = (
    "{%- set ns = namespace(searching=true, last=messages|length - 1) %}"
    "{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}"
    "{%- if ns.searching and message.role == 'user' and message.content is string"
    " and not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}"
    "{%- set ns.searching = false %}{%- set ns.last = index %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{%- set content = message.content %}"
    "{%- if message.role == 'assistant' %}{%- set thought = '' %}"
    "{%- if message.reasoning_content is string %}{%- set thought = message.reasoning_content %}"
    "{%- elif '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{- '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}{{- '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
INST = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set rest = messages[1:] %}"
    "{%- else %}{%- set rest = messages %}{%- endif %}"
    "{%- for message in rest %}{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('roles have to alternate') }}{%- endif %}"
    "{%- if message['role'] == 'user' %}{%- if loop.first and system is defined %}"
    "{{- '[INST] ' + system + '\n\n' + message['content'] + ' [/INST]' }}{%- else %}"
    "{{- '[INST] ' + message['content'] + ' [/INST]' }}{%- endif %}"
    "{%- else %}{{- ' ' + message['content']|trim + eos_token }}{%- endif %}{%- endfor %}"
)
TEMPLATES = {"llama": CHATML, "mistral": INST, "qwen2": CHATML, "qwen3": THINKING}


def write_model(folder, family, settings, smollm2):
    """A random model; norms and biases are random too, or a mistake in them would not show."""
    torch.manual_seed(sum(map(ord, family)))
    tokenizer = json.loads((smollm2 / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = len(tokenizer["model"]["vocab"])
    config = AutoConfig.for_model(
        family, vocab_size=vocabulary, bos_token_id=None, eos_token_id=2, pad_token_id=None, **{**SIZE, **settings}
    )
    model = AutoModelForCausalLM.from_config(config).float()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.uniform_(0.5, 1.5)
        elif name.endswith(".bias"):
            parameter.data.normal_(0, 0.2)
    model.save_pretrained(folder)
    # Published models end texts with more than one token.
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    qwen = family.startswith("qwen")
    (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, **(QWEN if qwen else {})}), encoding="utf-8")
    settings = {"tokenizer_class": "Qwen2Tokenizer" if qwen else "PreTrainedTokenizerFast", "eos_token": "<|im_end|>",
                "pad_token": "<|endoftext|>", "unk_token": None, "clean_up_tokenization_spaces": False, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(TEMPLATES[family])
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory, smollm2):
    family, settings = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param) / "model"
    return write_model(folder, family, settings, smollm2)


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    torch.manual_seed(9)
    peft = get_peft_model(base(model), LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=LINEARS))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    folder = tmp_path_factory.mktemp("adapter")
    peft.save_pretrained(folder)
    return folder


def base(folder):
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, attn_implementation="eager").eval()


def with_adapter(folder, adapter):
    return PeftModel.from_pretrained(base(folder), str(adapter)).eval()


def greedy(model, tokenizer, prompt):
    ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).input_ids
    with torch.no_grad():
        new = model.generate(input_ids=ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids.shape[1] :].tolist()
    return new[:-1] if new[-1] in (2, 0) else new


def texts(trainer, model, folder, *arguments):
    questions, answers = folder / "prompts.jsonl", folder / "answers.jsonl"
    questions.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    trainer("generate", "--model", model, "--template", "raw", "--max-new-tokens", NEW_TOKENS, "--prompts", questions,
            "--output", answers, "--backend", "cpu", "--quant-bits", 16, *arguments)
    return [json.loads(line)["tokens"] for line in answers.read_text().splitlines()]


def rows(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 49_000, (length,), generator=generator).tolist() for length in (7, 33, 64)]


def logits(trainer, model, ids, folder, *arguments, bits=16):
    tokens, output = folder / "tokens.json", folder / "logits.safetensors"
    tokens.write_text(json.dumps(ids))
    trainer("logits", "--model", model, "--tokens", tokens, "--output", output, "--quant-bits", bits, *EXACT, *arguments)
    tensors = load_file(output)
    return [tensors[f"row.{index}"].reshape(len(row), -1) for index, row in enumerate(ids)]


def expected_logits(model, ids):
    with torch.no_grad():
        return [model(input_ids=torch.tensor([row])).logits[0].numpy() for row in ids]


def assert_near(ours, theirs, tolerance=TOLERANCE):
    for ours, theirs in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=tolerance, rtol=0)


@pytest.mark.parametrize("batch", [1, 5])
def test_greedy_text_is_that_of_transformers(trainer, model, tmp_path, batch):
    reference, tokenizer = base(model), AutoTokenizer.from_pretrained(model)
    expected = [greedy(reference, tokenizer, prompt) for prompt in PROMPTS]
    assert sum(map(len, expected)) > 100
    assert texts(trainer, model, tmp_path, "--batch-size", batch) == expected


def test_an_adapter_has_the_logits_and_the_text_that_peft_gives_it(trainer, model, adapter, tmp_path):
    reference, tokenizer, ids = with_adapter(model, adapter), AutoTokenizer.from_pretrained(model), rows()
    expected = expected_logits(reference, ids)
    assert_near(logits(trainer, model, ids, tmp_path, "--adapter", adapter), expected)
    plain = expected_logits(base(model), ids)
    assert np.abs(plain[0] - expected[0]).max() > 0.1, "the adapter changes the logits"
    assert_near(logits(trainer, model, ids, tmp_path), plain)
    text = texts(trainer, model, tmp_path, "--adapter", adapter)
    assert text == [greedy(reference, tokenizer, prompt) for prompt in PROMPTS]


def test_merged_weights_are_those_of_pefts_merge_and_unload(trainer, model, adapter, tmp_path):
    trainer("merge", "--model", model, "--adapter", adapter, "--output", tmp_path / "merged")
    expected = with_adapter(model, adapter).merge_and_unload()
    got = base(tmp_path / "merged").state_dict()
    for name, tensor in expected.state_dict().items():
        # A rounding of a sum of magnitude below 4.
        assert (got[name] - tensor).abs().max() < 5e-7, name


def test_a_trained_adapter_has_the_same_logits_in_peft(trainer, model, tmp_path):
    data = tmp_path / "rows.jsonl"
    lines = [{"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"It is {n}."}]} for n in range(16)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"base_model": model, "dataset_path": data, "output_dir": tmp_path / "run", "val_set_size": 0, "num_epochs": 1,
                "batch_size": 4, "quant_bits": 16, "learning_rate": 0.01, "lora_r": 4, "target_modules": "all-linear",
                "warmup_steps": 0}
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    trainer("train", "--backend", "cpu", *sets)
    adapter, ids = tmp_path / "run/adapter", rows(2)
    tensors = load_torch(adapter / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(LINEARS) * SIZE["num_hidden_layers"]
    assert all(tensor.abs().max() > 1e-3 for tensor in tensors.values()), "every B was trained"
    assert_near(logits(trainer, model, ids, tmp_path, "--adapter", adapter), expected_logits(with_adapter(model, adapter), ids))


def skip_windows(model):
    """llama.cpp has no windows for these families; such a model is not exported."""
    if json.loads((model / "config.json").read_text()).get("sliding_window"):
        pytest.skip("llama.cpp has no sliding window for this family")


def test_llama_cpp_and_we_read_the_exported_file_alike(trainer, llama_cpp, model, tmp_path):
    skip_windows(model)
    file = export(trainer, model, tmp_path / "model.gguf", "--type", "f32")
    runner, reference, ids = LlamaCpp(llama_cpp, file), base(model), rows()
    expected = expected_logits(reference, ids)
    for row, expected_row in zip(ids, expected, strict=True):
        # llama.cpp's exponentials and sums are not those of torch.
        np.testing.assert_allclose(runner.logits(row), expected_row, atol=2e-3)
    assert_near(logits(trainer, file, ids, tmp_path), expected)
    tokenizer = AutoTokenizer.from_pretrained(model)
    ours, theirs = texts(trainer, file, tmp_path), [runner.greedy(prompt, NEW_TOKENS) for prompt in PROMPTS]
    for prompt, one, other in zip(PROMPTS, ours, theirs, strict=True):
        assert one == other == greedy(reference, tokenizer, prompt), prompt
    runner.close()


def test_llama_cpp_runs_the_exported_adapter(trainer, llama_cpp, model, adapter, tmp_path):
    skip_windows(model)
    file = export(trainer, model, tmp_path / "model.gguf", "--type", "f32")
    lora = export(trainer, model, tmp_path / "lora.gguf", "--adapter", adapter, "--lora")
    merged = export(trainer, model, tmp_path / "merged.gguf", "--adapter", adapter, "--type", "f32")
    [ids] = rows()[1:2]
    [expected] = expected_logits(with_adapter(model, adapter), [ids])
    for runner in (LlamaCpp(llama_cpp, file, lora=lora), LlamaCpp(llama_cpp, merged)):
        np.testing.assert_allclose(runner.logits(ids), expected, atol=2e-3)
        runner.close()


def test_a_file_of_llama_cpps_quantizer_loads_as_it_is(trainer, llama_cpp, model, tmp_path):
    """In 8 bits the weights of a Q8_0 file are used as they are: as from the same numbers in F32."""
    skip_windows(model)
    f32 = export(trainer, model, tmp_path / "f32.gguf", "--type", "f32")
    q8_0 = quantize(llama_cpp, f32, tmp_path / "q8_0.gguf", llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0)
    dense = export(trainer, q8_0, tmp_path / "dense.gguf", "--type", "f32")
    ids = rows()
    expected = logits(trainer, dense, ids, tmp_path)
    assert_near(logits(trainer, q8_0, ids, tmp_path, bits=8), expected)
    assert np.abs(expected[0] - logits(trainer, f32, ids, tmp_path)[0]).max() > 1e-3, "8 bits round"
    runner = LlamaCpp(llama_cpp, dense)
    np.testing.assert_allclose(runner.logits(ids[0]), expected[0], atol=2e-3)
    runner.close()


def test_chat_templates_and_tokens_are_those_of_transformers(trainer, model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model)
    answer = {"role": "assistant", "content": "It is 42, naïve\u0301."}
    conversations = [
        [{"role": "user", "content": "What is it?"}, answer],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  1234 don't we'LL\n\n"}, answer],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}, answer],
    ]
    if TEMPLATES["qwen3"] == tokenizer.chat_template:
        conversations.append([{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"}])
        # Before the last question the template leaves an empty thought out, so each turn is an example of its own.
        conversations.pop(2)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))
    settings = {"base_model": model, "dataset_path": data, "val_set_size": 0}
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    found = trainer("inspect-data", "--json", "--rows", len(conversations), *sets).json_lines()
    for messages, row in zip(conversations, found, strict=True):
        assert row["ids"] == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"], messages
        learned = [row["ids"][at] for start, end in row["learned"] for at in range(start, end)]
        # Qwen's tokenizers compose characters (NFC).
        said, wanted = (unicodedata.normalize("NFC", text) for text in (tokenizer.decode(learned), messages[-1]["content"]))
        assert said.rstrip().endswith(wanted.split("\n")[-1] + "<|im_end|>")
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=True, return_dict=True, add_generation_prompt=True)["input_ids"]
        assert row["ids"][: len(prompt)] == prompt and row["learned"][-1][0] == len(prompt)


def test_the_exported_tokenizer_cuts_texts_as_the_folders_does(trainer, llama_cpp, model, tmp_path):
    texts = [*PROMPTS, "١٢٣ ½ e\u0301 ﬁ", "a\r\nb  c\t\td", "<|im_start|>user\nHi<|im_end|>\n"]
    file, ids = tmp_path / "texts.json", tmp_path / "ids.json"
    file.write_text(json.dumps(texts))
    tokenizer = AutoTokenizer.from_pretrained(model)
    trainer("tokenize", "--model", model, "--texts", file, "--output", ids)
    assert json.loads(ids.read_text()) == [tokenizer(text).input_ids for text in texts]
    skip_windows(model)
    gguf = export(trainer, model, tmp_path / "model.gguf")
    runner = LlamaCpp(llama_cpp, gguf)
    trainer("tokenize", "--model", gguf, "--texts", file, "--output", ids)
    # llama.cpp has no NFC, and neither has a model that is read from its file.
    assert json.loads(ids.read_text()) == [runner.tokens(text) for text in texts]
    runner.close()


# --- refusals


def changed(folder, smollm2, family, **keys):
    write_model(folder, family, {}, smollm2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))
    return folder


def test_an_unknown_family_is_refused_with_those_that_are_known(trainer, smollm2, tmp_path):
    folder = changed(tmp_path / "model", smollm2, "llama", model_type="gpt2")
    trainer.fails("plan", "--set", f"base_model={folder}", saying=["gpt2", *{family for family, _ in FAMILIES.values()}, "how-to-add-a-family.md"])


def test_a_window_is_not_dropped_in_a_gguf_file(trainer, smollm2, tmp_path):
    folder = write_model(tmp_path / "model", "mistral", dict(sliding_window=12), smollm2)
    output = tmp_path / "model.gguf"
    trainer.fails("export-gguf", "--model", folder, "--output", output,
                  saying=["sliding window of 12 tokens", '"max_position_embeddings": 12'])
    assert not output.exists()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 12}))
    export(trainer, folder, output)
