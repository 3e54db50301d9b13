"""Merged folders in transformers: the same logits as PEFT's model, the same text as ours unmerged."""

import json
import os
import resource
import shutil
import signal
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEXT = "The quick brown fox jumps over the lazy dog. Quarterly profit rose to EUR 13.1 mn from EUR 8.7 mn."


@pytest.fixture(scope="module")
def adapter(new_adapter, smollm2):
    return new_adapter(smollm2, seed=7, size=0.02, r=8, lora_alpha=24, target_modules=ALL_LINEAR)


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, attn_implementation="eager").eval()


def with_adapter(folder, adapter):
    from peft import PeftModel

    return PeftModel.from_pretrained(load(folder), str(adapter)).eval()


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits[0].float()


def merged_weights(folder):
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def merge(trainer, base, adapter, output, *arguments):
    trainer("merge", "--model", base, "--adapter", adapter, "--output", output, *arguments)
    return output


def test_a_model_merged_in_f32_gives_pefts_logits(trainer, smollm2, adapter, tmp_path):
    merged = merge(trainer, smollm2, adapter, tmp_path / "merged", "--dtype", "f32")
    tokenizer = AutoTokenizer.from_pretrained(merged)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    # In f64, so that the order of torch's sums, which depends on the processor, plays no part. What is left is that merged
    # weights are rounded to f32.
    expected = logits(with_adapter(smollm2, adapter).double(), ids)
    got = logits(load(merged).double(), ids)
    difference = (got - expected).abs().max()
    print(f"largest difference of logits: {difference:.2e}, of {expected.abs().max():.1f}")
    assert difference < 1e-4
    assert (expected - logits(load(smollm2).double(), ids)).abs().max() > 1, "the adapter has no effect"
    assert AutoConfig.from_pretrained(merged).dtype == torch.float32


def test_merged_weights_are_those_of_pefts_merge_and_unload(trainer, smollm2, adapter, tmp_path):
    merged = merge(trainer, smollm2, adapter, tmp_path / "merged", "--dtype", "f32")
    expected = with_adapter(smollm2, adapter).merge_and_unload().state_dict()
    got = merged_weights(merged)
    expected.pop("lm_head.weight")  # Tied.
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        # A rounding of a sum of magnitude below 4.
        assert (tensor - expected[name]).abs().max() < 5e-7, name


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_sixteen_bits_are_the_f32_sum_rounded_once(trainer, smollm2, adapter, tmp_path, dtype, torch_dtype):
    merged = merge(trainer, smollm2, adapter, tmp_path / "merged", "--dtype", dtype, "--max-shard-size", "60MB")
    expected = merged_weights(merge(trainer, smollm2, adapter, tmp_path / "f32", "--dtype", "f32"))
    assert len(list(merged.glob("model-*-of-*.safetensors"))) >= 4
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(2 * tensor.numel() for tensor in expected.values())
    for file in merged.glob("*.safetensors"):
        tensors = load_file(file)
        assert all(index["weight_map"][name] == file.name for name in tensors)
        for name, tensor in tensors.items():
            assert torch.equal(tensor, expected[name].to(torch_dtype)), name
    config = json.loads((merged / "config.json").read_text())
    assert config["torch_dtype"] == {"f16": "float16", "bf16": "bfloat16"}[dtype]
    # transformers reads all of it without a complaint, in the type that the configuration names.
    model = AutoModelForCausalLM.from_pretrained(merged, dtype="auto")
    assert model.dtype == torch_dtype


def test_the_folder_is_complete(trainer, smollm2, adapter, tmp_path, reference):
    merged = merge(trainer, smollm2, adapter, tmp_path / "merged")
    model, tokenizer = reference(smollm2)
    ours = AutoTokenizer.from_pretrained(merged)
    messages = [{"role": "user", "content": TEXT}]
    assert ours.apply_chat_template(messages, tokenize=False) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert ours(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert GenerationConfig.from_pretrained(merged).eos_token_id == model.generation_config.eos_token_id
    # Without --dtype each tensor keeps its own.
    assert all(tensor.dtype == torch.float16 for tensor in merged_weights(merged).values())
    assert not [name for name in os.listdir(tmp_path) if name != "merged"], "a temporary folder is left"


def test_merged_writes_what_unmerged_writes(trainer, smollm2, adapter, tmp_path):
    """In f32, from the same 16-bit base: the second path and the merged folder give the same greedy text."""
    merged = merge(trainer, smollm2, adapter, tmp_path / "merged", "--dtype", "f32")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The capital of France is\nOnce upon a time\nProfit rose to\n")

    def text(*arguments):
        run = trainer("generate", "--backend", "cpu", "--quant-bits", 16, "--template", "raw", "--max-new-tokens", 48,
                      "--prompts", prompts, *arguments)
        return [line["tokens"] for line in run.json_lines()]

    beside = text("--model", smollm2, "--adapter", adapter)
    assert text("--model", merged) == beside
    assert text("--model", smollm2, "--adapter", adapter, "--merge") == beside
    assert text("--model", smollm2) != beside


def test_stories260k_merges_with_a_large_and_a_regex_adapter(trainer, stories260k, new_adapter, tmp_path):
    adapter = new_adapter(stories260k, seed=1, size=0.3, r=3, lora_alpha=5, use_rslora=True,
                          target_modules=r".*\.layers\.[13]\..*(q_proj|down_proj)")
    merged = merge(trainer, stories260k, adapter, tmp_path / "merged", "--dtype", "f32")
    tokenizer = AutoTokenizer.from_pretrained(merged)
    ids = tokenizer("Once upon a time, there was a little girl", return_tensors="pt").input_ids
    expected = logits(with_adapter(stories260k, adapter), ids)
    assert (logits(load(merged), ids) - expected).abs().max() < 1e-4


def test_unmerge_gives_the_base_back_from_f32_exactly(trainer, smollm2, adapter, tmp_path):
    merged = merge(trainer, smollm2, adapter, tmp_path / "merged", "--dtype", "f32")
    run = trainer("unmerge", "--model", merged, "--adapter", adapter, "--output", tmp_path / "restored")
    restored, base = merged_weights(tmp_path / "restored"), merged_weights(smollm2)
    assert restored.keys() == base.keys()
    exact = [name for name in base if torch.equal(restored[name], base[name])]
    assert restored[exact[0]].dtype == torch.float16
    assert len(exact) == len(base), f"{len(base) - len(exact)} tensors differ"
    assert "all equal to the base model's, bit for bit" in run.stdout


def test_unmerge_from_f16_is_within_what_it_says(trainer, smollm2, adapter, tmp_path):
    merged = merge(trainer, smollm2, adapter, tmp_path / "merged", "--dtype", "f16")
    run = trainer("unmerge", "--model", merged, "--adapter", adapter, "--output", tmp_path / "restored")
    bound = float(run.stdout.split("within ")[1].split()[0])
    restored, base = merged_weights(tmp_path / "restored"), merged_weights(smollm2)
    worst = max((restored[name].float() - base[name].float()).abs().max().item() for name in base)
    print(f"unmerged from f16: largest difference {worst:.2e}, said {bound:.1e}")
    assert 0 < worst <= bound * 1.05  # Printed with two digits.
    ids = torch.tensor([[504, 3575, 282, 4649, 314]])
    assert (logits(load(tmp_path / "restored"), ids) - logits(load(smollm2), ids)).abs().max() < 0.2


def test_unmerge_refuses_what_it_cannot_know(trainer, smollm2, adapter, new_adapter, tmp_path):
    merged = merge(trainer, smollm2, adapter, tmp_path / "merged")
    unmerge = ["unmerge", "--model", merged, "--output", tmp_path / "restored"]
    other = new_adapter(smollm2, seed=8, size=0.02, r=8, lora_alpha=24, target_modules=ALL_LINEAR)
    trainer.fails(*unmerge, "--adapter", other, saying=[other.name, adapter.name, "--force"])

    weights = merged_weights(merged)
    weights["model.layers.3.mlp.up_proj.weight"][5, 7] += 0.5
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    trainer.fails(*unmerge, "--adapter", adapter, saying=["model.layers.3.mlp.up_proj.weight", "--force"])
    (merged / "lora_merge.json").unlink()
    trainer.fails(*unmerge, "--adapter", adapter, saying=["lora_merge.json", "--force"])
    assert sorted(os.listdir(tmp_path)) == ["merged"]
    trainer(*unmerge, "--adapter", adapter, "--force")


def test_what_eight_bits_lose_is_measured_and_too_much_is_refused(trainer, smollm2, adapter, new_adapter, tmp_path):
    check = ["merge", "--model", smollm2, "--check-bits", 8]
    run = trainer(*check, "--adapter", adapter)
    assert len([line for line in run.stdout.splitlines() if line.split()[:1] == ["29"]]) == 1, "a line a layer"
    faint = new_adapter(smollm2, seed=7, size=0.0002, r=8, lora_alpha=24, target_modules=ALL_LINEAR)
    trainer.fails(*check, "--adapter", faint, "--output", tmp_path / "out", saying=["8 bits", "cosine", "--force"])
    assert not (tmp_path / "out").exists()
    trainer(*check, "--adapter", faint, "--output", tmp_path / "out", "--force")
    generate = ["generate", "--backend", "cpu", "--model", smollm2, "--adapter", faint, "--merge", "--prompt", "a",
                "--max-new-tokens", 2]
    trainer.fails(*generate, saying=["8 bits", "cosine", "--force"])
    trainer(*generate, "--force")
    trainer(*generate, "--quant-bits", 16)


def test_the_survival_that_is_printed_is_the_one_torch_computes(trainer, smollm2, adapter):
    run = trainer("merge", "--model", smollm2, "--adapter", adapter, "--check-bits", 8)
    base, tensors = load_file(smollm2 / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")

    def rounded(weight):
        blocks = weight.reshape(-1, 32, weight.shape[1])
        scale = blocks.abs().amax(1, keepdim=True) / 127
        return ((blocks / scale).round() * scale).reshape(weight.shape)

    for module, column in [("self_attn.k_proj", "k_proj"), ("mlp.down_proj", "down_proj")]:
        name = f"model.layers.4.{module}"
        a, b = (tensors[f"base_model.model.{name}.lora_{half}.weight"] for half in "AB")
        delta = b @ a * (24 / 8)
        weight = rounded(base[f"{name}.weight"].float())
        actual = rounded(weight + delta) - weight
        expected = float(torch.cosine_similarity(delta.flatten(), actual.flatten(), dim=0))
        title = next(line.split() for line in run.stdout.splitlines() if line.split()[:1] == ["layer"])
        line = next(line.split() for line in run.stdout.splitlines() if line.split()[:1] == ["4"])
        # Four digits, and a few elements that fall to the other side of a half.
        assert abs(float(line[title.index(column)]) - expected) < 2e-4


def copy_of(folder, to, leave_out=()):
    to.mkdir()
    for file in folder.iterdir():
        if file.name not in leave_out:
            (to / file.name).symlink_to(file)
    return to


def test_broken_input_gives_a_clear_message_and_no_folder(trainer, smollm2, stories260k, adapter, tmp_path):
    output = tmp_path / "out"
    arguments = ["--output", output]

    def fails(model, adapter, saying):
        trainer.fails("merge", "--model", model, "--adapter", adapter, *arguments, saying=saying)
        assert not output.exists() and not [name for name in os.listdir(tmp_path) if "incomplete" in name]

    fails(stories260k, adapter, [str(adapter), "model.layers.10"])
    fails(tmp_path / "none", adapter, ["none"])
    fails(copy_of(smollm2, tmp_path / "no-tokenizer", ["tokenizer.json"]), adapter, ["no tokenizer", "tokenizer.json"])

    pickle = copy_of(smollm2, tmp_path / "pickle", ["model.safetensors"])
    (pickle / "pytorch_model.bin").write_bytes(b"\x80\x02")
    fails(pickle, adapter, ["pytorch_model.bin", "save_pretrained"])

    cut = copy_of(smollm2, tmp_path / "cut", ["model.safetensors"])
    with open(smollm2 / "model.safetensors", "rb") as file:
        (cut / "model.safetensors").write_bytes(file.read(100_000_000))
    fails(cut, adapter, ["model.safetensors", "cut off"])

    quantized = copy_of(smollm2, tmp_path / "quantized", ["config.json"])
    config = json.loads((smollm2 / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (quantized / "config.json").write_text(json.dumps(config))
    fails(quantized, adapter, ["quantization_config"])

    broken = tmp_path / "broken"
    shutil.copytree(adapter, broken)
    settings = json.loads((broken / "adapter_config.json").read_text())
    settings["layer_replication"] = [[0, 4], [2, 5]]
    (broken / "adapter_config.json").write_text(json.dumps(settings))
    fails(smollm2, broken, ["layer_replication"])
    shutil.copy(adapter / "adapter_config.json", broken)
    tensors = load_file(broken / "adapter_model.safetensors")
    name = "base_model.model.model.layers.2.mlp.up_proj.lora_B.weight"
    save_file({**tensors, name: tensors[name][:-1].clone()}, broken / "adapter_model.safetensors")
    fails(smollm2, broken, ["layers.2.mlp.up_proj", "shape"])

    output.mkdir()
    (output / "mine.txt").write_text("keep")
    trainer.fails("merge", "--model", smollm2, "--adapter", adapter, *arguments, saying=["--overwrite"])
    assert os.listdir(output) == ["mine.txt"]


def test_a_file_system_without_room_leaves_nothing_that_looks_whole(trainer, smollm2, adapter, tmp_path):
    """The kernel refuses bytes past 100 MB a file, in the middle of the weights; as a full disk does."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000_000, 100_000_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    command = [trainer.binary, "merge", "--model", smollm2, "--adapter", adapter, "--output", tmp_path / "out"]
    run = subprocess.run(list(map(str, command)), preexec_fn=limit, capture_output=True, encoding="utf-8", check=False)
    assert run.returncode == 1, run.stderr
    assert "cannot write" in run.stderr and "model.safetensors" in run.stderr and "panicked" not in run.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_leaves_nothing_that_looks_whole(trainer, smollm2, adapter, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=150m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine lets nobody mount a tmpfs")
    try:
        trainer.fails("merge", "--model", smollm2, "--adapter", adapter, "--output", disk / "out",
                      saying=["cannot write", "No space left"])
        assert os.listdir(disk) == []
    finally:
        subprocess.run(["umount", str(disk)], check=False)
