"""What the interop tests share: the program under test, models, data, and the programs that we did not write.

`cargo xtask interop` makes the environment, builds the program and runs these tests. By hand:

    TRAINER_BIN=target/release/trainer "$(tests/interop/setup | tail -n 1)" -m pytest tests/interop -k NAME

What is not on this machine (stories260k, the data, llama.cpp) skips the tests that need it, with its name in the
closing lines; with CI=true in the environment only what cannot be had from package registries may be missing.
"""

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

# Nothing here may reach for the Hub, and two threads are what CI has.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(int(os.environ.get("LORA_INTEROP_THREADS", "2")))

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
CACHE = Path(os.environ.get("LORA_INTEROP_CACHE") or Path.home() / ".cache/lora-trainer-interop")
IN_CI = os.environ.get("CI") in ("true", "1")


def missing(what, remedy, allowed_in_ci=False):
    """Skips the test, or fails it where the piece has to be there."""
    if IN_CI and not allowed_in_ci:
        pytest.fail(f"{what} is not there, and CI has to have it: {remedy}")
    pytest.skip(f"{what} is not there: {remedy}")


@dataclass
class Run:
    """What a run of the program printed and how it ended."""

    code: int
    stdout: str
    stderr: str

    def json_lines(self):
        """Standard output, a JSON value a line."""
        return [json.loads(line) for line in self.stdout.splitlines() if line.strip()]


class Trainer:
    """The program, run as a user runs it, on the CPU unless the arguments say otherwise."""

    def __init__(self, binary):
        self.binary = binary

    def run(self, *arguments, input=None, timeout=600, environment=None):
        """A run, however it ends. A panic is a failure of the test."""
        command = [self.binary, *map(str, arguments)]
        env = {**os.environ, "NO_COLOR": "1", **(environment or {})}
        done = subprocess.run(
            command, input=input, capture_output=True, encoding="utf-8", timeout=timeout, env=env, check=False
        )
        assert "panicked" not in done.stderr, f"{arguments}\n{done.stderr}"
        return Run(done.returncode, done.stdout, done.stderr)

    def __call__(self, *arguments, **options):
        """A run that has to succeed."""
        run = self.run(*arguments, **options)
        assert run.code == 0, f"{arguments}: exit code {run.code}\n{run.stdout}\n{run.stderr}"
        return run

    def fails(self, *arguments, saying, **options):
        """A run that has to fail with a message that holds all of `saying`; gives the message."""
        run = self.run(*arguments, **options)
        assert run.code not in (0, 101) and run.code > 0, f"{arguments}: exit code {run.code}\n{run.stdout}"
        for words in saying:
            assert words in run.stderr, f"the message lacks {words!r}:\n{run.stderr}"
        return run.stderr


@pytest.fixture(scope="session")
def trainer():
    """The program under test: `TRAINER_BIN`, else the workspace's release build."""
    binary = Path(os.environ.get("TRAINER_BIN") or REPOSITORY / "target/release/trainer")
    if not binary.is_file():
        pytest.exit(f"{binary} is not there: `cargo xtask interop` builds it", returncode=2)
    return Trainer(str(binary))


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct, a Hugging Face folder (`LORA_INTEROP_SMOLLM2`, else from the setup script)."""
    folder = Path(os.environ.get("LORA_INTEROP_SMOLLM2") or CACHE / "SmolLM2-135M-Instruct")
    if not (folder / "model.safetensors").is_file():
        missing(folder, "run tests/interop/setup")
    return folder


@pytest.fixture(scope="session")
def smollm2_gguf():
    """The same model as its publisher's GGUF file, in Q4_1."""
    file = CACHE / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not file.is_file():
        missing(file, "run tests/interop/setup")
    return file


@pytest.fixture(scope="session")
def stories260k():
    """The stories260k model, a Hugging Face folder beside the repository (`LORA_INTEROP_STORIES260K`)."""
    named = os.environ.get("LORA_INTEROP_STORIES260K")
    folder = Path(named or REPOSITORY.parent / "shared/models/stories260k")
    if not (folder / "model.safetensors").is_file():
        missing(folder, "no package registry has it; set LORA_INTEROP_STORIES260K", allowed_in_ci=True)
    return folder


@pytest.fixture(scope="session")
def data():
    """The folder of FinLoRA's data beside the repository (`LORA_INTEROP_DATA`)."""
    folder = Path(os.environ.get("LORA_INTEROP_DATA") or REPOSITORY.parent / "shared/data")
    if not folder.is_dir():
        missing(folder, "no package registry has it; set LORA_INTEROP_DATA", allowed_in_ci=True)
    return folder


@pytest.fixture(scope="session")
def embedded_model():
    """The repository's own small model, a Hugging Face folder."""
    return REPOSITORY / "assets/model"


@pytest.fixture(scope="session")
def llama_cpp():
    """The module llama_cpp."""
    try:
        import llama_cpp
    except ImportError:
        missing("llama-cpp-python", "run tests/interop/setup")
    return llama_cpp


@pytest.fixture(scope="session")
def reference():
    """`reference(folder)`: transformers' model of a folder in float32 and its tokenizer; read once a session."""
    loaded = {}

    def load(folder):
        folder = str(folder)
        if folder not in loaded:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
            loaded[folder] = (model.eval(), AutoTokenizer.from_pretrained(folder))
        return loaded[folder]

    return load


@pytest.fixture(scope="session")
def new_adapter(tmp_path_factory):
    """`new_adapter(model_folder, seed=0, size=0.05, **LoraConfig's arguments)`: a folder with an adapter that PEFT
    made and wrote, with a B that is not zero; `size` is the spread of B's (and trained copies') numbers."""
    from peft import LoraConfig, get_peft_model

    def make(model_folder, seed=0, size=0.05, **settings):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(str(model_folder), dtype=torch.float32)
        settings = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"], **settings}
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name or "lora_embedding_A" in name:
                    parameter.normal_(0.0, size)
        folder = tmp_path_factory.mktemp("adapter")
        model.save_pretrained(folder)
        return folder

    return make


def pytest_terminal_summary(terminalreporter):
    """What was left out, and the totals as libtest writes them: xtask adds both up."""
    counts = {key: len(reports) for key, reports in terminalreporter.stats.items()}
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = sorted({report.longrepr[2] for report in skipped if isinstance(report.longrepr, tuple)})
    for reason in reasons:
        terminalreporter.write_line(f"NOT TESTED: {reason}")
    failed = counts.get("failed", 0) + counts.get("error", 0)
    verdict = "FAILED" if failed else "ok"
    terminalreporter.write_line(
        f"test result: {verdict}. {counts.get('passed', 0)} passed; {failed} failed; {len(skipped)} ignored;"
    )
