"""Adapters between this project and PEFT, both ways: what one writes, the other loads, and the logits are the same.

Everything is float32 with unquantized weights on both sides, so that only the adapters are compared. The truth is always
PEFT's own `PeftModel.from_pretrained` of the folder: what PEFT makes of its file, not what was in memory when it wrote it.
"""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

# Two implementations of the same f32 arithmetic, in another order, on logits of size 1 to 30. A scale, a bias, or a layer
# that is left out changes them by 0.01 and more, as `agree` checks.
TOLERANCE = 1e-4
EXACT = ("--quant-bits", "16", "--compute-dtype", "f32", "--backend", "cpu")

# Every form of every field that PEFT's LoraConfig has for a Llama and that is honoured here.
MATRIX = {
    "names": dict(target_modules=["q_proj", "k_proj", "v_proj"]),
    "one name": dict(target_modules=["down_proj"]),
    "ends of paths": dict(target_modules=["self_attn.o_proj", "mlp.up_proj"]),
    "full names": dict(target_modules=["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]),
    "expression": dict(target_modules=r".*\.layers\.[12]\..*\.(q|v)_proj"),
    "expression with look-around": dict(target_modules=r"(?!.*layers\.0\.).*(?<!k)_proj"),
    "all-linear": dict(target_modules="all-linear"),
    "PEFT's default for a Llama": dict(target_modules=None),
    "rank and alpha": dict(r=3, lora_alpha=7),
    "rslora": dict(use_rslora=True, r=4, lora_alpha=3),
    "rank_pattern": dict(target_modules="all-linear", rank_pattern={"q_proj": 2, r"layers\.1\..*up_proj": 7, r"^model\.layers\.0\.mlp\.down_proj": 1}),
    "alpha_pattern": dict(target_modules=["q_proj", "v_proj"], alpha_pattern={r"layers\.0\..*": 30, "v_proj": 2}),
    "patterns with rslora": dict(use_rslora=True, rank_pattern={"q_proj": 8}, alpha_pattern={"q_proj": 5}),
    "layers_to_transform": dict(layers_to_transform=[0, 2]),
    "one layer": dict(layers_to_transform=1),
    "layers_pattern": dict(layers_to_transform=[1], layers_pattern="layers"),
    "exclude_modules": dict(target_modules="all-linear", exclude_modules=["k_proj", "mlp.gate_proj"]),
    "exclude_modules as an expression": dict(target_modules=["q_proj", "v_proj"], exclude_modules=r".*layers\.1\..*"),
    "fan_in_fan_out": dict(fan_in_fan_out=True),
    "dropout": dict(lora_dropout=0.3),
    "gaussian": dict(init_lora_weights="gaussian"),
    "orthogonal": dict(init_lora_weights="orthogonal"),
    "mica": dict(init_lora_weights="mica"),
    "no initialisation": dict(init_lora_weights=False),
    "DoRA": dict(use_dora=True, target_modules="all-linear"),
    "DoRA with rslora and patterns": dict(use_dora=True, use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}),
    "DoRA in one layer": dict(use_dora=True, layers_to_transform=[1], target_modules=["down_proj"]),
    "VeRA": dict(peft_type="VERA"),
    "VeRA on all linear modules": dict(peft_type="VERA", r=16, target_modules="all-linear", projection_prng_key=3),
    "VeRA without projections": dict(peft_type="VERA", target_modules=["q_proj", "down_proj"], save_projection=False, projection_prng_key=2**32 + 5),
    "VeRA with dropout in one layer": dict(peft_type="VERA", vera_dropout=0.3, layers_to_transform=[1]),
    "VeRA and modules_to_save": dict(peft_type="VERA", modules_to_save=["norm"]),
    "lora_bias": dict(lora_bias=True, target_modules=["q_proj", "down_proj"]),
    "lm_head": dict(target_modules=["q_proj", "lm_head"]),
    "lm_head alone": dict(target_modules=["lm_head"]),
    "DoRA on lm_head": dict(use_dora=True, target_modules=["v_proj", "lm_head"]),
    "embedding": dict(target_modules=["q_proj", "embed_tokens"]),
    "DoRA on the embedding": dict(use_dora=True, target_modules=["embed_tokens", "k_proj"]),
    "embedding and lm_head": dict(target_modules=["embed_tokens", "lm_head"]),
    "modules_to_save: lm_head": dict(modules_to_save=["lm_head"]),
    "modules_to_save: embed_tokens": dict(modules_to_save=["embed_tokens"]),
    "modules_to_save: both": dict(modules_to_save=["embed_tokens", "lm_head"]),
    "modules_to_save: norms": dict(modules_to_save=["input_layernorm", "model.norm"]),
    "modules_to_save: a block": dict(target_modules="all-linear", modules_to_save=["layers.1.mlp", "layers.0.self_attn.q_proj"]),
    "modules_to_save and rank_pattern": dict(modules_to_save=["norm"], rank_pattern={"v_proj": 9}),
    "ensure_weight_tying": dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "ensure_weight_tying with adapters": dict(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True),
}
BIASES = {
    "bias: all": dict(bias="all"),
    "bias: lora_only": dict(bias="lora_only", target_modules=["q_proj", "down_proj"]),
    "bias: all, with DoRA": dict(bias="all", use_dora=True, target_modules=["q_proj", "o_proj", "down_proj"]),
    "bias: all, with lora_bias": dict(bias="all", lora_bias=True, target_modules=["k_proj"]),
    "DoRA beside biases": dict(use_dora=True, target_modules="all-linear"),
    "lora_bias beside biases": dict(lora_bias=True, target_modules=["v_proj", "up_proj"]),
    "modules_to_save with biases": dict(modules_to_save=["self_attn.k_proj"], bias="lora_only"),
    "bias: vera_only": dict(peft_type="VERA", bias="vera_only"),
    "untied embedding and head": dict(target_modules=["embed_tokens", "lm_head"], modules_to_save=["norm"]),
    "untied DoRA head": dict(target_modules=["lm_head"], use_dora=True),
}


def base(folder):
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="session")
def random_model(tmp_path_factory, embedded_model):
    """A small untied Llama with biases in attention and feed-forward."""
    torch.manual_seed(5)
    # The vocabulary of the embedded model, whose tokenizer it gets: a folder without one is no model here.
    config = LlamaConfig(vocab_size=1280, hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
                         num_key_value_heads=2, attention_bias=True, mlp_bias=True, tie_word_embeddings=False, initializer_range=0.2)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.normal_(0, 0.2)
        elif name.endswith("norm.weight"):
            parameter.data.uniform_(0.5, 1.5)
    folder = tmp_path_factory.mktemp("random")
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(embedded_model / name, folder)
    return folder


def adapter(model_folder, folder, settings, size=0.05, seed=0, **saving):
    """An adapter that PEFT makes and saves, every number that training would change changed."""
    torch.manual_seed(seed)
    settings = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"], **settings}
    if settings.pop("peft_type", None) == "VERA":
        config = VeraConfig(**settings)
    else:
        config = LoraConfig(**{"lora_alpha": 12, **settings})
    model = get_peft_model(base(model_folder), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.add_(torch.empty_like(parameter).normal_(0, size))
            elif "vera_lambda_b" in name:
                parameter.normal_(0, 8 * size)
            elif "vera_lambda_d" in name:
                parameter.uniform_(0.2, 1)
            elif "lora_magnitude_vector" in name:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.9, 1.1))
            elif parameter.requires_grad and "lora_" not in name:
                parameter.add_(torch.empty_like(parameter).normal_(0, size))
            elif settings.get("init_lora_weights") == "mica" and "lora_A" in name:
                parameter.normal_(0, size)
    model.save_pretrained(folder, **saving)
    return folder


def rows(model_folder, count=3, seed=1):
    """Rows of random tokens of different lengths."""
    vocabulary = json.loads((model_folder / "config.json").read_text())["vocab_size"]
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocabulary, (7 + 5 * i,), generator=generator).tolist() for i in range(count)]


def theirs(model, ids):
    """transformers' or PEFT's logits, a tensor a row."""
    with torch.no_grad():
        return [model(input_ids=torch.tensor([row])).logits[0] for row in ids]


def ours(trainer, folder, model_folder, ids, *arguments):
    """Our logits of the same rows."""
    tokens, output = folder / "tokens.json", folder / "logits.safetensors"
    tokens.write_text(json.dumps(ids))
    trainer("logits", "--model", model_folder, "--tokens", tokens, "--output", output, *EXACT, *arguments)
    tensors = load_file(output)
    return [tensors[f"row.{i}"] for i in range(len(ids))]


def difference(a, b):
    """The largest difference of two lists of logits."""
    assert [x.shape for x in a] == [x.shape for x in b]
    return max((x - y).abs().max().item() for x, y in zip(a, b))


def agree(trainer, tmp_path, model_folder, folder):
    """Our logits with the adapter beside the weights and merged into them are PEFT's; gives how far it is from the base."""
    ids = rows(model_folder)
    plain = theirs(base(model_folder), ids)
    expected = theirs(PeftModel.from_pretrained(base(model_folder), folder).eval(), ids)
    beside = difference(ours(trainer, tmp_path, model_folder, ids, "--adapter", folder), expected)
    merged = difference(ours(trainer, tmp_path, model_folder, ids, "--adapter", folder, "--merge"), expected)
    print(f"{beside:.1e} beside the weights, {merged:.1e} merged")
    assert beside < TOLERANCE and merged < TOLERANCE, f"{beside:.1e} beside the weights, {merged:.1e} merged"
    effect = difference(plain, expected)
    # Otherwise the test would pass without an adapter.
    assert effect > 100 * TOLERANCE, f"the adapter changes the logits by {effect:.1e} only"


@pytest.mark.parametrize("case", MATRIX)
def test_an_adapter_of_peft_gives_pefts_logits_on_the_embedded_model(trainer, embedded_model, tmp_path, case):
    agree(trainer, tmp_path, embedded_model, adapter(embedded_model, tmp_path / "adapter", MATRIX[case]))


@pytest.mark.parametrize("case", MATRIX)
def test_an_adapter_of_peft_gives_pefts_logits_on_stories260k(trainer, stories260k, tmp_path, case):
    agree(trainer, tmp_path, stories260k, adapter(stories260k, tmp_path / "adapter", MATRIX[case], size=0.1))


@pytest.mark.parametrize("case", BIASES)
def test_an_adapter_of_peft_gives_pefts_logits_on_an_untied_model_with_biases(trainer, random_model, tmp_path, case):
    agree(trainer, tmp_path, random_model, adapter(random_model, tmp_path / "adapter", BIASES[case], size=0.1))


@pytest.mark.parametrize("case", ["names", "all-linear", "DoRA"])
def test_an_adapter_of_peft_gives_pefts_logits_on_smollm2(trainer, smollm2, tmp_path, case):
    """Thirty layers and logits up to 38: there float32 itself is no sharper than 1e-4. transformers' and PEFT's float32
    logits are up to 2.5e-4 from their own float64 (1e-5 to 3e-5 in the root mean square), with an adapter or without. So
    ours are compared with PEFT's float64: in the root mean square to 1e-4 (seen: up to 5.7e-5), the worst of a million to
    1e-3 (seen: up to 5.8e-4); and the logits that the adapter is compared with are as far from the truth as ours."""
    folder = adapter(smollm2, tmp_path / "adapter", MATRIX[case])
    ids = rows(smollm2)
    double = PeftModel.from_pretrained(base(smollm2).double(), folder, autocast_adapter_dtype=False).eval().double()
    truth = theirs(double, ids)
    del double
    single = spread(theirs(PeftModel.from_pretrained(base(smollm2), folder).eval(), ids), truth)
    beside = ours(trainer, tmp_path, smollm2, ids, "--adapter", folder)
    merged = ours(trainer, tmp_path, smollm2, ids, "--adapter", folder, "--merge")
    for what, logits in [("beside the weights", beside), ("merged", merged)]:
        rms, worst = spread(logits, truth), difference(logits, truth)
        print(f"{what}: {rms:.1e}, at worst {worst:.1e}; PEFT's float32 {single:.1e}")
        assert rms < TOLERANCE and worst < 10 * TOLERANCE, f"{what}: {rms:.1e}, at worst {worst:.1e}"
    plain = theirs(base(smollm2), ids)
    assert difference(plain, truth) > 1000 * TOLERANCE, "the adapter changes nothing"


def spread(a, b):
    """The root mean square of the differences of two lists of logits."""
    differences = torch.cat([(x.double() - y.double()).flatten() for x, y in zip(a, b)])
    return differences.square().mean().sqrt().item()


def test_an_adapter_in_half_precision_is_widened(trainer, embedded_model, tmp_path):
    for dtype in (torch.float16, torch.bfloat16):
        folder = adapter(embedded_model, tmp_path / str(dtype), MATRIX["DoRA"])
        file = folder / "adapter_model.safetensors"
        from safetensors.torch import save_file
        save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
        agree(trainer, tmp_path, embedded_model, folder)


def test_embeddings_that_were_saved_beside_the_adapter_are_read(trainer, embedded_model, tmp_path):
    folder = adapter(embedded_model, tmp_path / "adapter", {}, save_embedding_layers=True)
    agree(trainer, tmp_path, embedded_model, folder)


def test_a_pissa_adapter_counts_once_peft_has_made_it_a_plain_one(trainer, embedded_model, tmp_path):
    torch.manual_seed(3)
    model = get_peft_model(base(embedded_model), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.05))
    model.save_pretrained(tmp_path / "pissa")
    message = trainer.fails("logits", "--model", embedded_model, "--adapter", tmp_path / "pissa", "--tokens", tokens(tmp_path),
                            "--output", tmp_path / "x", saying=["init_lora_weights", "pissa"])
    assert "path_initial_model_for_weight_conversion" in message
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    agree(trainer, tmp_path, embedded_model, tmp_path / "plain")


def tokens(folder):
    file = folder / "tokens.json"
    file.write_text("[[5, 6, 7]]")
    return file


@pytest.mark.parametrize("field, value", [
    ("target_parameters", ["mlp.gate_proj.weight"]),
    ("layer_replication", [[0, 2], [1, 4]]),
    ("alora_invocation_tokens", [5, 6]),
    ("use_qalora", True),
    ("use_bdlora", {"nblocks": 2}),
    ("velora_config", {"rank": 4}),
    ("monteclora_config", {"num_samples": 4}),
    ("kasa_config", {"beta": 1e-4}),
    ("arrow_config", {"top_k": 2}),
    ("megatron_config", {"tensor_model_parallel_size": 2}),
    ("init_lora_weights", "olora"),
    ("init_lora_weights", "loftq"),
    ("peft_type", "LOHA"),
    ("task_type", "SEQ_CLS"),
    ("something_of_next_year", "on"),
])
def test_what_is_not_honoured_is_refused_by_the_fields_name(trainer, embedded_model, tmp_path, field, value):
    folder = adapter(embedded_model, tmp_path / "adapter", {})
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    trainer.fails("logits", "--model", embedded_model, "--adapter", folder, "--tokens", tokens(tmp_path), "--output", tmp_path / "x",
                  saying=[field, "adapter_config.json"])


def test_an_adapter_for_another_model_is_refused_by_the_tensors_name(trainer, embedded_model, random_model, tmp_path):
    folder = adapter(random_model, tmp_path / "adapter", {})
    trainer.fails("logits", "--model", embedded_model, "--adapter", folder, "--tokens", tokens(tmp_path), "--output", tmp_path / "x",
                  saying=["lora_A.weight", "shape"])


# What our configuration asks for, and what PEFT must find in the adapter's.
TRAINED = {
    "LoRA": ({}, dict(use_dora=False)),
    "DoRA": (dict(peft_use_dora="true", target_modules='"all-linear"'), dict(use_dora=True)),
    "DoRA with dropout": (dict(peft_use_dora="true", lora_dropout="0.2"), dict(use_dora=True, lora_dropout=0.2)),
    "VeRA": (dict(peft_type='"vera"', lora_r=16, target_modules='"all-linear"', learning_rate=0.05), dict(peft_type="VERA", r=16, save_projection=True)),
    "VeRA without projections, with dropout": (dict(peft_type='"vera"', save_projection="false", projection_prng_key=11, lora_dropout="0.2", learning_rate=0.05),
                                               dict(save_projection=False, projection_prng_key=11, vera_dropout=0.2)),
    "patterns": (dict(rank_pattern="{ q_proj = 2, 'layers\\.1\\..*v_proj' = 3 }", alpha_pattern="{ v_proj = 5.5 }", peft_use_rslora="true"),
                 dict(rank_pattern={"q_proj": 2, r"layers\.1\..*v_proj": 3}, alpha_pattern={"v_proj": 5.5}, use_rslora=True)),
    "exclusion": (dict(target_modules='"all-linear"', exclude_modules="['k_proj', 'mlp.up_proj']"), {}),
    "expression": (dict(target_modules=r"'.*\.layers\.[02]\..*_proj'"), {}),
    "LoRA+": (dict(loraplus_lr_ratio=4), {}),
    "PiSSA": (dict(init_lora_weights='"pissa"', lora_r=4), dict(r=8, init_lora_weights=True)),
    "PiSSA by iteration, with dropout": (dict(init_lora_weights='"pissa_niter_4"', lora_r=4, lora_dropout="0.2"), dict(r=8)),
    "OLoRA with patterns": (dict(init_lora_weights='"olora"', lora_r=4, rank_pattern="{ q_proj = 2 }", alpha_pattern="{ v_proj = 5.5 }", peft_use_rslora="true"),
                            dict(r=8, rank_pattern={"q_proj": 4}, use_rslora=True)),
    "lm_head": (dict(target_modules="['v_proj', 'lm_head']", rank_pattern="{ lm_head = 3 }"), dict(rank_pattern={"lm_head": 3})),
    "a bias of B": (dict(lora_bias="true"), dict(lora_bias=True)),
    "a whole embedding": (dict(modules_to_save="['embed_tokens']"), dict(modules_to_save=["embed_tokens"])),
    "a whole head": (dict(modules_to_save="['lm_head']"), dict(modules_to_save=["lm_head"])),
    "whole embedding and head": (dict(modules_to_save="['embed_tokens', 'lm_head']"), {}),
    "norms": (dict(modules_to_save="['norm']", target_modules="['down_proj']"), dict(modules_to_save=["norm"])),
    "whole linear layers": (dict(modules_to_save="['o_proj', 'layers.1.mlp']", lora_dropout="0.1"), {}),
}
# The same on the model with biases.
TRAINED_BIASES = {
    "all": (dict(bias='"all"', target_modules="['q_proj', 'down_proj']"), dict(bias="all")),
    "of adapted modules and of B": (dict(bias='"lora_only"', lora_bias="true"), dict(bias="lora_only", lora_bias=True)),
    "of whole layers": (dict(bias='"lora_only"', modules_to_save="['k_proj', 'lm_head']"), dict(bias="lora_only")),
}


@pytest.fixture(scope="session")
def run(trainer, embedded_model, tmp_path_factory):
    """`run(folder, **keys)`: a short training on a few rows with unquantized weights; gives the adapter's folder."""
    rows = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = (embedded_model.parent / "data/sentiment_train.jsonl").read_text().splitlines(keepends=True)
    rows.write_text("".join(lines[:24]))

    def train(folder, run=trainer, **keys):
        settings = dict(base_model=f'"{embedded_model}"', dataset_path=f'"{rows}"', val_set_size=0, quant_bits=16, max_steps=6,
                        learning_rate=0.01) | keys
        file = rows.parent / f"{folder.parent.name}-{folder.name}.toml"
        file.write_text("".join(f"{key} = {value}\n" for key, value in settings.items()))
        run("train", "--backend", "cpu", "--config", file, "--output-dir", folder)
        return folder / "adapter"

    return train


@pytest.mark.parametrize("case", TRAINED)
def test_an_adapter_that_we_train_loads_in_peft_unchanged_with_our_logits(trainer, run, embedded_model, tmp_path, case):
    keys, fields = TRAINED[case]
    folder = run(tmp_path / "run", **keys)
    model = PeftModel.from_pretrained(base(embedded_model), folder).eval()
    # PEFT warns of a missing tensor and goes on with random numbers.
    assert own_names(get_peft_model_state_dict(model)) == own_names(load_file(folder / "adapter_model.safetensors"))
    for field, value in fields.items():
        assert getattr(model.peft_config["default"], field) == value
    agree(trainer, tmp_path, embedded_model, folder)


def test_the_projections_of_ours_are_pefts_bit_for_bit(run, embedded_model, tmp_path):
    folder = run(tmp_path / "run", peft_type='"vera"', lora_r=24, target_modules="['k_proj', 'down_proj']", projection_prng_key=11, max_steps=1)
    ours = load_file(folder / "adapter_model.safetensors")
    config = VeraConfig(task_type="CAUSAL_LM", r=24, target_modules=["k_proj", "down_proj"], projection_prng_key=11)
    theirs = get_peft_model_state_dict(get_peft_model(base(embedded_model), config))
    for name in ("base_model.vera_A", "base_model.vera_B"):
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("case", TRAINED_BIASES)
def test_biases_that_we_train_load_in_peft_with_our_logits(trainer, run, random_model, tmp_path, case):
    keys, fields = TRAINED_BIASES[case]
    folder = run(tmp_path / "run", base_model=f'"{random_model}"', prompt_template='"raw"', **keys)
    model = PeftModel.from_pretrained(base(random_model), folder).eval()
    assert own_names(get_peft_model_state_dict(model)) == own_names(load_file(folder / "adapter_model.safetensors"))
    for field, value in fields.items():
        assert getattr(model.peft_config["default"], field) == value
    agree(trainer, tmp_path, random_model, folder)


def test_whole_modules_of_an_8_bit_model_start_from_the_unquantized_weights(run, embedded_model, tmp_path):
    modules = ["embed_tokens", "o_proj", "input_layernorm"]
    folder = run(tmp_path / "run", quant_bits=8, modules_to_save=f"{modules}", max_steps=1, learning_rate=1e-30)
    weights = base(embedded_model).state_dict()
    whole = {name: tensor for name, tensor in load_file(folder / "adapter_model.safetensors").items() if "lora_" not in name}
    layers = json.loads((embedded_model / "config.json").read_text())["num_hidden_layers"]
    assert len(whole) == 1 + 2 * layers
    for name, tensor in whole.items():
        assert torch.equal(tensor, weights[name.removeprefix("base_model.model.")]), name


def test_a_dora_of_ours_on_8_bit_weights_has_the_norms_of_those_weights(run, embedded_model, tmp_path):
    folder = run(tmp_path / "run", quant_bits=8, peft_use_dora="true", max_steps=1, learning_rate=1e-12)
    tensors = load_file(folder / "adapter_model.safetensors")
    weights = base(embedded_model).state_dict()
    for name, magnitude in tensors.items():
        if name.endswith("lora_magnitude_vector"):
            weight = weights[name.removeprefix("base_model.model.").replace("lora_magnitude_vector", "weight")]
            norms = weight.norm(dim=1)
            relative = ((magnitude - norms).abs() / norms).max().item()
            # 8 bits in blocks of 32 are within 1/127 of a block's largest weight: norms differ, and by less than a hundredth.
            assert 0 < relative < 0.01, f"{name}: {relative}"


@pytest.mark.parametrize("case", ["names", "DoRA", "VeRA", "VeRA without projections", "rank_pattern", "alpha_pattern", "expression with look-around", "exclude_modules", "layers_pattern", "lm_head",
                                  "lora_bias", "modules_to_save: lm_head", "modules_to_save: both", "modules_to_save: norms", "modules_to_save: a block"])
def test_training_goes_on_from_an_adapter_of_pefts(trainer, run, embedded_model, tmp_path, case):
    start = adapter(embedded_model, tmp_path / "start", MATRIX[case])
    # A learning rate that moves nothing shows that the run starts where the adapter is.
    same = run(tmp_path / "same", init_adapter=f'"{start}"', max_steps=2, learning_rate=1e-30)
    before, after = load_file(start / "adapter_model.safetensors"), load_file(same / "adapter_model.safetensors")
    assert own_names(before) == own_names(after)
    for name in own_names(before):
        assert torch.equal(before[name], after[name]), name
    moved = run(tmp_path / "moved", init_adapter=f'"{start}"', max_steps=2)
    after = load_file(moved / "adapter_model.safetensors")
    trained = {name for name in own_names(before) if not name.startswith("base_model.vera_")}
    assert all(not torch.equal(before[name], after[name]) for name in trained)
    agree(trainer, tmp_path, embedded_model, moved)


def own_names(tensors):
    """What an adapter holds, without the base model's table that PEFT saves beside an adapted head."""
    return {name for name in tensors if not name.endswith("base_layer.weight")}


def test_keys_that_contradict_the_adapter_and_adapters_that_cannot_be_trained_on_are_refused(trainer, run, embedded_model, tmp_path):
    start = adapter(embedded_model, tmp_path / "start", {})

    def refused(start, saying, **keys):
        run(tmp_path / "run", run=lambda *words: trainer.fails(*words, saying=saying), init_adapter=f'"{start}"', **keys)

    refused(start, ["lora_r", "peft_use_dora", "init_adapter"], lora_r=16, peft_use_dora="true")
    for field, settings in [
        ("ensure_weight_tying", MATRIX["ensure_weight_tying"]),
        ("lm_head", MATRIX["DoRA on lm_head"]),
        ("embed_tokens", MATRIX["embedding"]),
        ("lm_head", dict(peft_type="VERA", target_modules=["q_proj", "lm_head"])),
    ]:
        refused(adapter(embedded_model, tmp_path / f"{field}-{settings.get('peft_type')}", settings), [field])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("combination, settings", [
    ("cat", ({}, dict(r=2, lora_alpha=5, target_modules=["v_proj", "down_proj"], use_rslora=True), dict(rank_pattern={"q_proj": 3}))),
    ("linear", ({}, dict(lora_alpha=5, target_modules=["v_proj", "down_proj"]))),
    ("svd", (dict(r=5), dict(r=2, target_modules=["q_proj", "k_proj"]))),
])
def test_combined_adapters_are_what_peft_combines(trainer, embedded_model, tmp_path, combination, settings):
    weights = (0.7, -0.4, 1.2)[:len(settings)]
    folders = [adapter(embedded_model, tmp_path / f"a{i}", one, seed=i) for i, one in enumerate(settings)]
    shares = [word for folder, weight in zip(folders, weights) for word in ("--adapter", f"{folder}={weight}")]
    output = tmp_path / "combined"
    trainer("combine", *shares, "--type", combination, "--output", output)
    trainer.fails("combine", *shares, "--output", output, saying=["--overwrite"])

    model = PeftModel.from_pretrained(base(embedded_model), folders[0], adapter_name="a0")
    for i, folder in enumerate(folders[1:], 1):
        model.load_adapter(folder, adapter_name=f"a{i}")
    # PEFT takes use_rslora of the first adapter for the sum, which here has none.
    model.add_weighted_adapter([f"a{i}" for i in range(len(folders))], list(weights), "sum", combination_type=combination)
    model.set_adapter("sum")
    ids = rows(embedded_model)
    expected = theirs(model.eval(), ids)
    assert difference(ours(trainer, tmp_path, embedded_model, ids, "--adapter", output), expected) < TOLERANCE
    agree(trainer, tmp_path, embedded_model, output)


def test_adapters_that_have_no_weighted_sum_are_refused_by_name(trainer, embedded_model, tmp_path):
    plain = adapter(embedded_model, tmp_path / "plain", {})
    for field, case in [("use_dora", "DoRA"), ("peft_type", "VeRA"), ("lora_bias", "lora_bias"), ("modules_to_save", "modules_to_save: norms")]:
        other = adapter(embedded_model, tmp_path / field, MATRIX[case])
        trainer.fails("combine", "--adapter", f"{plain}=1", "--adapter", f"{other}=1", "--output", tmp_path / "x", saying=[field, str(other)])
    assert not (tmp_path / "x").exists()
