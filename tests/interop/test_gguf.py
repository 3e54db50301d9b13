"""GGUF both ways: llama.cpp runs what we write, we run what llama.cpp and its Python package write."""

import ctypes
import gc
import json
import re

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

TOKENS = 48
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "Water boils at",
]
# A text that SmolLM2 goes on with by rote: its best score is 1.5 above the next all the way.
SURE = ["The cat sat on the mat. " * 6]
STORIES = [
    "Once upon a time, there was a little girl named Lily.",
    "Tom had a big red ball.",
]
# Texts in which tokenizers differ: digits, spaces, contractions, scripts, control tokens.
HARD = [
    "1234567890 12 3.14159 1,000,000", "  two  spaces   three\n\n\nlines\t\ttabs  ", "don't we'LL I'm they'd it's",
    "Ünïcödé naïve façade — “quotes” … 日本語のテキスト 한국어 العربية हिन्दी", "🙂👩‍👩‍👧‍👦 emoji ✨", "snake_case camelCase kebab-case",
    "a\r\nb\rc", "<|im_start|>user\nHi<|im_end|>\n", "x=1;y+=2;//z\n\treturn(f[0]);", "٣٤٥ ①②③ Ⅷ ½", "", " ", "\n",
]


def ours(trainer, model, prompts, folder, *arguments, tokens=TOKENS, bits=16):
    questions, answers = folder / "prompts.jsonl", folder / "answers.jsonl"
    questions.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
    trainer(
        "generate", "--backend", "cpu", "--model", model, "--quant-bits", bits, "--template", "raw",
        "--max-new-tokens", tokens, "--prompts", questions, "--output", answers, *arguments,
    )
    return [json.loads(line)["tokens"] for line in answers.read_text(encoding="utf-8").splitlines()]


class LlamaCpp:
    """llama.cpp with a file: greedy, on one thread, with an f32 cache, so that only its products' roundings are left."""

    def __init__(self, module, path, lora=None):
        f32 = module.GGML_TYPE_F32
        self.llama = module.Llama(
            str(path), n_ctx=512, n_gpu_layers=0, n_threads=1, n_threads_batch=1, verbose=False, logits_all=True,
            lora_path=str(lora) if lora else None, type_k=f32, type_v=f32, flash_attn=False,
        )

    def tokens(self, text):
        """As a text that follows the model's own begin token, if it has one."""
        add_bos = self.llama.metadata.get("tokenizer.ggml.add_bos_token") == "true"
        return self.llama.tokenize(text.encode("utf-8"), add_bos=add_bos, special=True)

    def greedy(self, prompt, count=TOKENS):
        self.llama.reset()
        new = []
        for token in self.llama.generate(self.tokens(prompt), temp=0.0, top_k=1, repeat_penalty=1.0):
            if token == self.llama.token_eos() or len(new) == count:
                break
            new.append(token)
        return new

    def logits(self, ids):
        self.llama.reset()
        self.llama.eval(ids)
        return np.array(self.llama.scores[: len(ids)])

    def close(self):
        self.llama.close()
        gc.collect()


def margin(runner, prompt, new):
    """The smallest distance of the two best scores on the way."""
    ids = runner.tokens(prompt)
    scores = runner.logits(ids + new)[len(ids) - 1 : -1]
    best = np.sort(scores, axis=1)[:, -2:]
    return float((best[:, 1] - best[:, 0]).min())


def assert_same_text(trainer, runner, model, prompts, folder, *arguments, bits=16):
    """Our tokens and llama.cpp's, all of them; at least one prompt goes on for 32."""
    answers = ours(trainer, model, prompts, folder, *arguments, bits=bits)
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = runner.greedy(prompt)
        assert answer == expected, f"{prompt!r}, margin {margin(runner, prompt, expected):.3g}"
    assert max(map(len, answers)) >= 32


def export(trainer, model, output, *arguments):
    trainer("export-gguf", "--model", model, "--output", output, *arguments)
    return output


ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def adapter(new_adapter, smollm2):
    return new_adapter(smollm2, seed=7, size=0.02, r=8, lora_alpha=20, target_modules=ADAPTED)


@pytest.fixture(scope="module")
def base_f32(trainer, smollm2, tmp_path_factory):
    return export(trainer, smollm2, tmp_path_factory.mktemp("f32") / "base.gguf", "--type", "f32")


# --- what we write


def test_llama_cpp_runs_our_lora_file(trainer, llama_cpp, smollm2, base_f32, adapter, tmp_path):
    file = export(trainer, smollm2, tmp_path / "lora.gguf", "--adapter", adapter, "--lora")
    plain, adapted = LlamaCpp(llama_cpp, base_f32), LlamaCpp(llama_cpp, base_f32, lora=file)
    assert plain.greedy(PROMPTS[0]) != adapted.greedy(PROMPTS[0]), "the adapter changes the text"
    assert_same_text(trainer, adapted, smollm2, PROMPTS, tmp_path, "--adapter", adapter)
    plain.close()
    adapted.close()


def test_llama_cpp_scales_our_rslora_file_as_peft_does(trainer, llama_cpp, stories260k, new_adapter, tmp_path):
    adapter = new_adapter(stories260k, seed=5, size=0.2, r=4, lora_alpha=6, use_rslora=True, target_modules=ADAPTED)
    base = export(trainer, stories260k, tmp_path / "base.gguf", "--type", "f32")
    file = export(trainer, stories260k, tmp_path / "lora.gguf", "--adapter", adapter, "--lora")
    runner = LlamaCpp(llama_cpp, base, lora=file)
    assert_same_text(trainer, runner, stories260k, STORIES, tmp_path, "--adapter", adapter)
    runner.close()


def test_llama_cpp_runs_our_merged_f16_file(trainer, llama_cpp, smollm2, adapter, tmp_path):
    file = export(trainer, smollm2, tmp_path / "merged.gguf", "--adapter", adapter)
    runner = LlamaCpp(llama_cpp, file)
    # The same weights: we read the file that llama.cpp reads.
    assert_same_text(trainer, runner, file, PROMPTS, tmp_path)
    runner.close()


def test_llama_cpp_runs_our_merged_q8_0_file(trainer, llama_cpp, smollm2, adapter, tmp_path):
    file = export(trainer, smollm2, tmp_path / "merged.gguf", "--adapter", adapter, "--type", "q8_0")
    runner = LlamaCpp(llama_cpp, file)
    # llama.cpp rounds activations to 8 bits before it multiplies them with Q8_0, which moves scores by up to 1.4
    # (0.3 on average); we do not. Texts are the same where the model is that sure of them.
    assert_same_text(trainer, runner, file, SURE, tmp_path, bits=8)
    runner.close()
    # Without that rounding, from the very same weights in F32, they are the same anywhere.
    dense = export(trainer, file, tmp_path / "dense.gguf", "--type", "f32")
    runner = LlamaCpp(llama_cpp, dense)
    assert_same_text(trainer, runner, file, PROMPTS, tmp_path, bits=8)
    runner.close()


def test_an_exported_model_scores_as_transformers_do(trainer, llama_cpp, smollm2, base_f32, reference):
    model, tokenizer = reference(smollm2)
    ids = tokenizer("The quick brown fox jumps over the lazy dog. 12345")["input_ids"]
    runner = LlamaCpp(llama_cpp, base_f32)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    # Scores of up to 30 from f32 sums in another order, through 30 layers.
    np.testing.assert_allclose(runner.logits(ids), expected, atol=5e-3)
    runner.close()


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "scaling", [LLAMA3, {"rope_type": "linear", "factor": 3.0}, YARN, {**YARN, "attention_factor": 0.8}],
    ids=["llama3", "linear", "yarn", "yarn's attention factor"],
)
def test_llama_cpp_runs_the_embedded_model_and_its_scaling(trainer, llama_cpp, embedded_model, tmp_path, scaling):
    scaled = tmp_path / "scaled"
    scaled.mkdir()
    for file in embedded_model.iterdir():
        (scaled / file.name).write_bytes(file.read_bytes())
    config = json.loads((scaled / "config.json").read_text())
    config["rope_scaling"] = scaling
    (scaled / "config.json").write_text(json.dumps(config))
    texts = []
    for model in (embedded_model, scaled):
        file = export(trainer, model, tmp_path / f"{model.name}.gguf", "--type", "f32")
        runner = LlamaCpp(llama_cpp, file)
        prompts = ["The company said that its profit in the third quarter"]
        answers = [runner.greedy(prompt) for prompt in prompts]
        assert ours(trainer, model, prompts, tmp_path) == answers
        # The file says all that the folder says.
        assert ours(trainer, file, prompts, tmp_path) == answers
        ids = runner.tokens(prompts[0])
        texts.append((answers, runner.logits(ids)))
        runner.close()
    assert not np.allclose(texts[0][1], texts[1][1], atol=1e-3), "the scaling changes the scores"
    scores = texts[1][1]
    tokens = tmp_path / "tokens.json"
    tokens.write_text(json.dumps([ids]))
    for model in (scaled, file):
        output = tmp_path / "logits.safetensors"
        trainer("logits", "--backend", "cpu", "--model", model, "--quant-bits", "16", "--tokens", tokens, "--output", output)
        ours_scores = load_file(output)["row.0"].reshape(scores.shape)
        # f32 sums in another order, and a cache of f32.
        np.testing.assert_allclose(ours_scores, scores, atol=5e-3)


@pytest.mark.parametrize(
    "scaling, reason",
    [({"rope_type": "dynamic", "factor": 2.0}, "dynamic"), ({**YARN, "beta_fast": 16}, "beta_fast"),
     ({**YARN, "truncate": False}, "truncate")],
)
def test_a_scaling_that_llama_cpp_does_not_compute_is_refused(trainer, embedded_model, tmp_path, scaling, reason):
    for file in embedded_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "rope_scaling": scaling}))
    output = tmp_path / "model.gguf"
    run = trainer.run("export-gguf", "--model", tmp_path, "--output", output)
    assert run.code != 0 and reason in run.stderr and not output.exists(), run.stderr


# --- what they write


def quantize(llama_cpp, source, target, file_type):
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = file_type
    parameters.nthread = 2
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters))
    assert code == 0
    return target


def dequantized_folder(file, like, folder):
    """The weights of a GGUF file as a Hugging Face folder, by llama.cpp's own package; the rest as in `like`."""
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

    config = json.loads((like / "config.json").read_text())
    modules = {
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }
    outside = {
        "token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors, kinds = {}, set()
    for tensor in GGUFReader(file).tensors:
        kinds.add(tensor.tensor_type.name)
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        values = values.reshape([int(size) for size in reversed(tensor.shape)])
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        name = outside.get(tensor.name) or f"model.layers.{layer[1]}.{modules[layer[2]]}.weight"
        if layer and layer[2] in heads:
            rows, columns = values.shape
            pairs = values.reshape(heads[layer[2]], -1, 2, columns)
            values = pairs.swapaxes(1, 2).reshape(rows, columns)
        tensors[name] = np.ascontiguousarray(values)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        if (like / name).is_file():
            (folder / name).write_bytes((like / name).read_bytes())
    return folder, kinds


def greedy(model, tokenizer, prompt):
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    new = output[0, inputs.input_ids.shape[1] :].tolist()
    ends = model.generation_config.eos_token_id
    return new[:-1] if new and new[-1] in (ends if isinstance(ends, list) else [ends]) else new


def check_base(trainer, reference, file, like, tmp_path, prompts, bits):
    """We write from the file what transformers write from the weights that llama.cpp's package finds in it."""
    folder, kinds = dequantized_folder(file, like, tmp_path / "dequantized")
    model, tokenizer = reference(folder)
    answers = ours(trainer, file, prompts, tmp_path, bits=bits)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer == greedy(model, tokenizer, prompt), prompt
    assert max(map(len, answers)) >= 32
    return kinds


def test_the_publishers_file_loads_as_it_is(trainer, reference, smollm2_gguf, smollm2, tmp_path):
    kinds = check_base(trainer, reference, smollm2_gguf, smollm2, tmp_path, PROMPTS, bits=16)
    assert "Q4_1" in kinds


# llama.cpp's own quantizer; Q4_K and Q6_K need rows of 256, which no width of SmolLM2 or stories260k but
# SmolLM2's 1,536 has, so these files hold several kinds. In 8 bits the kinds without offsets are exact.
@pytest.mark.parametrize(
    "name, bits, wanted",
    [
        ("Q8_0", 8, {"Q8_0"}),
        ("Q4_0", 8, {"Q4_0"}),
        ("Q6_K", 8, {"Q6_K"}),
        ("Q4_K_M", 16, {"Q4_K"}),
        ("BF16", 16, {"BF16"}),
    ],
)
def test_files_of_llama_cpps_quantizer_load_as_they_are(
    trainer, llama_cpp, reference, base_f32, smollm2, tmp_path, name, bits, wanted
):
    file_type = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    file = quantize(llama_cpp, base_f32, tmp_path / f"{name}.gguf", file_type)
    kinds = check_base(trainer, reference, file, smollm2, tmp_path, PROMPTS[:2], bits)
    assert wanted <= kinds, kinds


# --- text to tokens


def real_texts(data, count=3000):
    texts = []
    for name in ("fpb_train.jsonl", "tfns_train.jsonl"):
        for line in (data / name).read_text(encoding="utf-8").strip().split("\n"):
            row = json.loads(line)
            texts.append(row["context"] + str(row["target"]))
    return texts[:: max(1, len(texts) // count)][:count]


def our_ids(trainer, model, texts, folder):
    """What our tokenizer makes of texts, begin token included."""
    file, output = folder / "texts.json", folder / "ids.json"
    file.write_text(json.dumps(texts), encoding="utf-8")
    trainer("tokenize", "--model", model, "--texts", file, "--output", output)
    return json.loads(output.read_text(encoding="utf-8"))


def test_the_tokenizer_of_a_gguf_file_is_transformers_tokenizer(trainer, smollm2_gguf, smollm2, reference, data, tmp_path):
    tokenizer = reference(smollm2)[1]
    texts = real_texts(data) + HARD
    assert len(texts) > 3000
    for text, ids in zip(texts, our_ids(trainer, smollm2_gguf, texts, tmp_path), strict=True):
        assert ids == tokenizer(text)["input_ids"], text


@pytest.mark.parametrize("model", ["smollm2", "stories260k", "embedded_model"])
def test_llama_cpp_cuts_texts_as_the_exported_tokenizer_did(trainer, llama_cpp, request, model, data, tmp_path):
    folder = request.getfixturevalue(model)
    file = export(trainer, folder, tmp_path / "model.gguf")
    runner = LlamaCpp(llama_cpp, file)
    texts = real_texts(data, 300) + HARD
    if model == "stories260k":
        # llama.cpp puts a space before an empty text as well, transformers do not.
        texts = [text for text in texts if text]
    from_folder, from_file = (our_ids(trainer, source, texts, tmp_path) for source in (folder, file))
    for text, one, other in zip(texts, from_folder, from_file, strict=True):
        assert one == other, text
        assert one == runner.tokens(text), text
    runner.close()


def vocabulary_file(path, tokenizer_json, pre):
    """A GGUF file that is little but a byte-level vocabulary, written by llama.cpp's own package."""
    from gguf import GGUFWriter, TokenType

    tokenizer = json.loads(tokenizer_json.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.get)
    control = {added["content"] for added in tokenizer["added_tokens"]}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    writer = GGUFWriter(path, "llama")
    for key, value in (("context_length", 64), ("embedding_length", 32), ("block_count", 1), ("feed_forward_length", 32)):
        writer.add_uint32(f"llama.{key}", value)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token in control else TokenType.NORMAL for token in tokens])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


PRE_TOKENIZERS = ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "default"]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_each_way_to_cut_a_text_is_llama_cpps(trainer, llama_cpp, smollm2, data, tmp_path, pre):
    file = vocabulary_file(tmp_path / "vocabulary.gguf", smollm2 / "tokenizer.json", pre)
    texts = real_texts(data, 300) + HARD
    vocabulary = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    for text, ids in zip(texts, our_ids(trainer, file, texts, tmp_path), strict=True):
        assert ids == vocabulary.tokenize(text.encode("utf-8"), add_bos=False, special=True), text
    vocabulary.close()


def test_an_unknown_way_to_cut_is_refused(trainer, smollm2, tmp_path):
    file = vocabulary_file(tmp_path / "vocabulary.gguf", smollm2 / "tokenizer.json", "deepseek-llm")
    trainer.fails(
        "tokenize", "--model", file, "--texts", file, "--output", tmp_path / "ids.json",
        saying=["tokenizer.ggml.pre", "deepseek-llm", "llama-bpe"],
    )
