"""PEFT's side of `cargo xtask bench`: the same rows, adapter and steps through PyTorch.

Started as `python peft_worker.py --spec FILE`; reads a command a line and answers a line, in JSON, as
protocol.rs says. Needs torch, transformers and peft; bitsandbytes for a base of 8 bits.
"""

import argparse
import json
import os
import sys
import time
import traceback

# Libraries print what they like; the real standard output carries answers only.
answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)


def answer(kind, **fields):
    print(json.dumps({"answer": kind, **fields}), file=answers, flush=True)


def peak_resident():
    """Bytes: Linux's VmHWM. None elsewhere."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


class Trainee:
    """A PEFT model in training."""

    def __init__(self, spec):
        started = time.perf_counter()
        import peft
        import torch
        import transformers

        self.torch = torch
        self.spec = spec
        settings = spec["contender"]
        self.device = "cpu" if spec["device"] == "cpu" else "cuda"
        if self.device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("this PyTorch finds no CUDA device")
        dtype = getattr(torch, settings["dtype"])
        if spec["random_weights"]:
            base = self.random(transformers, dtype, settings["bits"])
        else:
            base = self.pretrained(transformers, dtype, settings["bits"])
        base.config.use_cache = False
        self.model = peft.PeftModel.from_pretrained(base, spec["adapter"], is_trainable=True)
        self.model.train()
        # As the adapter was made: float32, whatever the base is.
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=spec["learning_rate"], weight_decay=0.0)
        self.sync()
        description = (
            f"base {settings['dtype'] if settings['bits'] == 16 else 'int8 (bitsandbytes)'}, adapter "
            f"{str(trained[0].dtype).removeprefix('torch.')}, sdpa, {torch.get_num_threads()} threads, "
            f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
        )
        answer(
            "loaded",
            description=description,
            seconds=time.perf_counter() - started,
            memory=self.memory(),
        )

    def pretrained(self, transformers, dtype, bits):
        more = {}
        if bits == 8:
            more["quantization_config"] = transformers.BitsAndBytesConfig(load_in_8bit=True)
            more["device_map"] = self.device
        model = transformers.AutoModelForCausalLM.from_pretrained(
            self.spec["model"], dtype=dtype, attn_implementation="sdpa", **more
        )
        return model if bits == 8 else model.to(self.device)

    def random(self, transformers, dtype, bits):
        """The shape without its weights; losses then say nothing."""
        torch = self.torch
        config = transformers.AutoConfig.from_pretrained(self.spec["model"])
        with torch.device(self.device):
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation="sdpa"
            )
        if bits == 8:
            quantize(torch, model.model, self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return model

    def batch(self, indices):
        """Ids, labels and mask, padded to the longest row."""
        rows = [self.spec["rows"][index] for index in indices]
        width = max(len(row["ids"]) for row in rows)
        ids, labels, mask = [], [], []
        for row in rows:
            tokens, prompt = row["ids"], row["prompt_tokens"]
            padding = width - len(tokens)
            ids.append(tokens + [0] * padding)
            labels.append([-100] * prompt + tokens[prompt:] + [-100] * padding)
            mask.append([1] * len(tokens) + [0] * padding)
        return [self.torch.tensor(x, device=self.device) for x in (ids, labels, mask)]

    def step(self, micro_batches, phases):
        """One optimizer step; its loss a supervised token, useful and computed tokens."""
        rows = [self.spec["rows"][index] for indices in micro_batches for index in indices]
        supervised = sum(len(row["ids"]) - row["prompt_tokens"] for row in rows)
        loss_of_step, computed = 0.0, 0
        for indices in micro_batches:
            started = time.perf_counter()
            ids, labels, mask = self.batch(indices)
            computed += ids.numel()
            padded = time.perf_counter()
            # The divisor is the step's, not the micro-batch's, as in transformers' Trainer.
            output = self.model(
                input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=supervised
            )
            loss_of_step += output.loss.item()
            forward = time.perf_counter()
            output.loss.backward()
            self.sync()
            backward = time.perf_counter()
            phases["data"] += padded - started
            phases["forward"] += forward - padded
            phases["backward"] += backward - forward
            phases["pass"] += backward - padded
        started = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.sync()
        phases["optimizer"] += time.perf_counter() - started
        return loss_of_step, sum(len(row["ids"]) for row in rows), computed

    def round(self, first_step, steps):
        phases = {"data": 0.0, "pass": 0.0, "forward": 0.0, "loss": None, "backward": 0.0, "optimizer": 0.0}
        losses, useful, computed = [], 0, 0
        if first_step + steps > len(self.spec["steps"]):
            raise ValueError(f"the specification has {len(self.spec['steps'])} steps, not {first_step + steps}")
        started = time.perf_counter()
        for micro_batches in self.spec["steps"][first_step : first_step + steps]:
            loss, tokens, through = self.step(micro_batches, phases)
            losses.append(loss)
            useful += tokens
            computed += through
        answer(
            "round",
            seconds=time.perf_counter() - started,
            useful_tokens=useful,
            computed_tokens=computed,
            losses=losses,
            phases=phases,
            memory=self.memory(),
        )

    def sync(self):
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def memory(self):
        device = None
        if self.device == "cuda":
            device = self.torch.cuda.max_memory_reserved()
        return {"resident": peak_resident(), "device": device}


def quantize(torch, module, device):
    """Puts bitsandbytes' 8-bit layers in the place of linear ones, as from_pretrained does."""
    import bitsandbytes

    for name, child in module.named_children():
        if not isinstance(child, torch.nn.Linear):
            quantize(torch, child, device)
            continue
        with torch.device("meta"):
            layer = bitsandbytes.nn.Linear8bitLt(
                child.in_features, child.out_features, child.bias is not None, has_fp16_weights=False
            )
        weight = child.weight.data.to("cpu", torch.float16)
        layer.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        layer.bias = child.bias
        setattr(module, name, layer.to(device))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--spec", required=True)
    with open(parser.parse_args().spec, encoding="utf-8") as file:
        spec = json.load(file)
    trainee = None
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if command["command"] == "load":
                trainee = Trainee(spec)
            elif command["command"] == "round":
                trainee.round(command["first_step"], command["steps"])
            else:
                return
        except Exception as error:  # Whatever it is, the benchmark says it and goes on without PEFT.
            traceback.print_exc()
            answer("error", message=f"{type(error).__name__}: {error}".splitlines()[0])
            return


main()
