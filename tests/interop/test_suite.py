"""`eval --suite finlora` against scikit-learn, on the answers that it wrote; pandas reads the files as FinLoRA does."""

import json
import os
import shlex
import stat
import subprocess
import sys

import pandas
import pytest
from sklearn.metrics import accuracy_score, f1_score

# Sums of a few dozen 64-bit floats, added in another order.
EXACT = 1e-12

SENTIMENT = "Instruction: What is the sentiment? Choose from {{negative/neutral/positive}}.\nInput: {}\nAnswer: "
NEWS = ["Profit rose.", "Sales fell.", "It has offices.", "A loss was made.", "Margins grew.", "It is in Oslo."]
TAGS = "Tags: Debt,Revenues,Assets. Give the tags, separated by commas.\n1. {}\n2. {}\nAnswer:"

FILES = {
    "fpb_test.jsonl": [
        (SENTIMENT.format(text), target)
        for text, target in zip(NEWS, ["positive", "negative", "neutral", "negative", "positive", "neutral"])
    ],
    # Targets that begin others, that are a part of others, and that differ in case only.
    "headline_test.jsonl": [
        (SENTIMENT.format(text), target) for text, target in zip(NEWS, ["a", "A", "as", "the", "the ", "s"])
    ],
    "finer_test_batched.jsonl": [
        (TAGS.format("notes", "sales"), "Debt,Revenues"),
        (TAGS.format("land", "a loan"), " Assets , Debt\n"),
        (TAGS.format("cash", "fees"), "Assets"),
        (TAGS.format("x", "y"), "Debt,,Revenues,Assets,"),
    ],
    # All numbers, some with a fraction: "3" is 3.0 to FinLoRA, and "0.50" is 0.5.
    "formula_test.jsonl": [("How much is %s? Answer:" % text, text) for text in ["3", "0.50", "1e3", "12.25"]],
    "xbrl_term_test.jsonl": [
        ("Explain this term: Debt. Answer:", "What is owed\nto others."),
        ("Explain this term: Assets. Answer:", "What is owned."),
    ],
}


def write(folder, files):
    folder.mkdir()
    for name, rows in files.items():
        lines = [json.dumps({"context": context, "target": target}) for context, target in rows]
        (folder / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return folder


def evaluate(trainer, model, data, output, *arguments):
    run = trainer("eval", "--suite", "finlora", "--backend", "cpu", "--model", model, "--data-dir", data,
                  "--output", output, *arguments)
    return run, json.loads((output / "results.json").read_text(encoding="utf-8"))


def answers(output, task, contender):
    lines = (output / "answers" / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
    return [answer for answer in map(json.loads, lines) if answer["contender"] == contender]


def right_by_first_label(answer, target, labels):
    """FinLoRA's rule in other words: cut what was written off before each position in turn; the first position at
    which it goes on with a label decides. Of labels that begin alike there, the longest."""
    answer = answer.lower()
    for start in range(len(answer) + 1):
        here = [label.lower() for label in labels if answer.startswith(label.lower(), start)]
        if here:
            return max(here, key=len) == target.lower()
    return False


def references(rows, lists):
    """Targets as `str` of what pandas reads, lists cut into items."""
    import io

    text = "".join(json.dumps({"target": target}) + "\n" for _, target in rows)
    column = pandas.read_json(io.StringIO(text), lines=True)["target"]
    # pandas 2, which FinLoRA runs, makes integers of floats that are all whole; pandas 3 does not of texts.
    targets = [str(target) for target in column.tolist()]
    if not lists:
        return targets
    return [item.strip().replace("\n", "") for target in targets for item in target.split(",")]


def compare(scores, targets, answers, is_right):
    responses = [target if right else answer for target, answer, right in zip(targets, answers, is_right, strict=True)]
    accuracy = accuracy_score(is_right, [True] * len(is_right))
    f1 = f1_score(targets, responses, average="weighted", zero_division=0)
    assert abs(scores["accuracy"] - accuracy) <= EXACT
    assert abs(scores["weighted_f1"] - f1) <= EXACT
    assert scores["answers"] == len(targets)
    return accuracy, f1


def check_contender(output, results, contender, files):
    """Every task's scores of a contender; the number of answers that were right by FinLoRA's rule."""
    of_file = {task["file"]: task["task"] for task in results["tasks"]}
    [found] = [it for it in results["contenders"] if it["name"] == contender]
    scores = {it["task"]: it for it in found["tasks"]}
    accuracies, right = [], 0
    for file, rows in files.items():
        task = of_file[file]
        written = answers(output, task, contender)
        targets = references(rows, "batched" in file)
        assert [answer["finlora_target"] for answer in written] == targets
        given = [answer["answer"] for answer in written]
        if task in ("xbrl_term", "financebench"):
            assert "finlora" not in scores[task]
            continue
        by_rule = [right_by_first_label(answer, target, targets) for answer, target in zip(given, targets)]
        accuracies.append(compare(scores[task]["finlora"], targets, given, by_rule)[0])
        right += sum(by_rule)
        exact = [answer["target"].strip() for answer in written], [answer["written"].strip() for answer in written]
        compare(scores[task]["strict"], *exact, [target == text for target, text in zip(*exact)])
    assert abs(found["average"]["overall"] - sum(accuracies) / len(accuracies)) <= EXACT
    return right


@pytest.fixture(scope="module")
def adapter(new_adapter, embedded_model):
    """Enough to change what the model writes."""
    return new_adapter(embedded_model, seed=6, size=0.3)


@pytest.fixture(scope="module")
def embedded_run(trainer, embedded_model, adapter, tmp_path_factory):
    """The suite on the small model: base and an adapter."""
    folder = tmp_path_factory.mktemp("suite")
    data = write(folder / "data", FILES)
    run, results = evaluate(trainer, embedded_model, data, folder / "out", "--adapter", f"made={adapter}")
    return run, results, folder / "out"


def test_scores_are_scikit_learns_on_the_same_answers(embedded_run):
    _, results, output = embedded_run
    for contender in ["base", "made"]:
        check_contender(output, results, contender, FILES)
    texts = [[answer["answer"] for answer in answers(output, "fpb", name)] for name in ["base", "made"]]
    assert texts[0] != texts[1], "the adapter has no effect"


def test_scores_of_a_model_that_can_read_are_too(trainer, smollm2, tmp_path):
    files = {name: FILES[name] for name in ["fpb_test.jsonl", "headline_test.jsonl", "finer_test_batched.jsonl"]}
    data = write(tmp_path / "data", files)
    _, results = evaluate(trainer, smollm2, data, tmp_path / "out", "--template", "raw")
    # Some are right, or the comparison of F1 would be one of zeros.
    assert check_contender(tmp_path / "out", results, "base", files) > 2


def test_tasks_lengths_and_cut_are_finloras(embedded_run):
    _, results, output = embedded_run
    lengths = {task["task"]: task["max_new_tokens"] for task in results["tasks"]}
    assert lengths == {"fpb": 10, "headline": 10, "xbrl_finer": 100, "xbrl_term": 50, "formula": 50}
    assert [task["task"] for task in results["tasks"]] == ["fpb", "headline", "xbrl_finer", "xbrl_term", "formula"]
    for answer in answers(output, "fpb", "base"):
        assert answer["answer"] == answer["written"].split("Answer:")[-1].strip()
    assert "fiqa_test.jsonl" in results["missing"] and results["ignored"] == []
    assert (output / "results.md").read_text(encoding="utf-8").count("| made | ") == 2


def test_answers_are_those_of_transformers(trainer, smollm2, reference, tmp_path):
    """Prompt, length, end and cut as in FinLoRA's own loop, greedy, over a base of 16 bits."""
    rows = FILES["fpb_test.jsonl"][:3]
    data = write(tmp_path / "data", {"fpb_test.jsonl": rows})
    evaluate(trainer, smollm2, data, tmp_path / "out", "--template", "raw", "--quant-bits", 16, "--batch-size", 2)
    model, tokenizer = reference(smollm2)
    for (context, _), answer in zip(rows, answers(tmp_path / "out", "fpb", "base"), strict=True):
        inputs = tokenizer(context, return_tensors="pt", return_token_type_ids=False)
        output = model.generate(**inputs, max_new_tokens=10, do_sample=False)
        text = tokenizer.decode(output[0], skip_special_tokens=True)
        assert answer["answer"] == text.split("Answer:")[-1].strip()


def test_files_for_bert_score_have_a_line_for_each_row(embedded_run):
    """Read as the program reads them: `[line.strip() for line in f]`."""
    run, results, output = embedded_run
    commands = [it["bert_score_command"] for contender in results["contenders"] for it in contender["tasks"]
                if "bert_score_command" in it]
    assert len(commands) == 2
    for command, contender in zip(commands, ["base", "made"]):
        assert f"  {command}\n" in run.stdout
        program, *arguments = shlex.split(command)
        assert program == "bert-score"
        pairs = dict(zip(arguments[::2], arguments[1::2], strict=True))
        assert (pairs["--lang"], pairs["-m"]) == ("en", "ProsusAI/finbert")
        with open(pairs["-r"], encoding="utf-8") as references, open(pairs["-c"], encoding="utf-8") as candidates:
            assert [line.strip() for line in references] == ["What is owed to others.", "What is owned."]
            lines = [line.strip() for line in candidates]
        texts = [answer["answer"] for answer in answers(output, "xbrl_term", contender)]
        assert [line.split() for line in lines] == [text.split() for text in texts]


def stand_in(folder, body):
    """A program in the place of Python with the package bert-score."""
    script = folder / "python"
    script.write_text(f"#!{sys.executable}\nimport sys\narguments = sys.argv[1:]\n{body}\n", encoding="utf-8")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script


def test_bert_score_is_run_and_comes_into_the_table(trainer, embedded_model, tmp_path):
    files = {name: FILES[name] for name in ["fpb_test.jsonl", "xbrl_term_test.jsonl"]}
    data = write(tmp_path / "my data", files)
    python = stand_in(tmp_path, """
if arguments[0] == "-c":
    sys.exit()
assert arguments[:2] == ["-m", "bert_score_cli.score"], arguments
pairs = dict(zip(arguments[2::2], arguments[3::2]))
lines = [len(open(pairs[key], encoding="utf-8").readlines()) for key in ("-r", "-c")]
print("a warning")
print(f"model_L10 P: 0.250000 R: 0.5{lines[0]}0000 F1: 0.4{lines[1]}5000")""")
    run, results = evaluate(trainer, embedded_model, data, tmp_path / "my out", "--bertscore", python)
    fpb, term = results["contenders"][0]["tasks"]
    assert term["bert_score"] == {"precision": 0.25, "recall": 0.52, "f1": 0.425}
    average = (fpb["finlora"]["accuracy"] + 0.425) / 2
    assert abs(results["contenders"][0]["average"]["overall"] - average) <= EXACT
    assert "- / 0.425" in run.stdout and "- / 0.425" in (tmp_path / "my out/results.md").read_text(encoding="utf-8")
    assert "pip install" not in run.stdout


def test_bert_score_that_cannot_run_is_told(trainer, embedded_model, tmp_path):
    data = write(tmp_path / "data", {"xbrl_term_test.jsonl": FILES["xbrl_term_test.jsonl"]})
    command = ["eval", "--suite", "finlora", "--backend", "cpu", "--model", embedded_model, "--data-dir", data,
               "--output", tmp_path / "out", "--bertscore"]
    trainer.fails(*command, tmp_path / "none", saying=["none", "cannot be started", "Python interpreter"])
    lacks = stand_in(tmp_path, "sys.exit('ModuleNotFoundError: no bert_score')")
    trainer.fails(*command, lacks, saying=["cannot import bert_score", "no bert_score", "pip install bert-score"])
    assert not (tmp_path / "out").exists(), "nothing was asked"
    fails = stand_in(tmp_path, "if arguments[0] != '-c': sys.exit('no such model')")
    trainer.fails(*command, fails, saying=["bert_score_cli.score", "no such model", "the answers and all other scores are in"])
    assert (tmp_path / "out/results.json").is_file()
    silent = stand_in(tmp_path, "print('done')")
    trainer.fails(*command, silent, saying=["P: … R: … F1: …", "done"])


def test_the_program_bert_score_takes_the_command(embedded_run):
    """Its models come from the Hub, so only its arguments and how it reads the files."""
    _, results, _ = embedded_run
    command = next(it["bert_score_command"] for it in results["contenders"][0]["tasks"] if "bert_score_command" in it)
    script = (
        "import sys, bert_score\n"
        "def score(cands, refs, **settings):\n"
        "    print(len(cands), refs, settings['model_type'], settings['lang'])\n"
        "    raise SystemExit\n"
        "bert_score.score = score\n"
        "from bert_score_cli.score import main\n"
        "main()"
    )
    run = subprocess.run([sys.executable, "-c", script, *shlex.split(command)[1:]], capture_output=True, text=True,
                         env={**os.environ, "PYTHONUTF8": "1"}, check=True)
    assert run.stdout.startswith("2 [('What is owed to others.',), ('What is owned.',)] ProsusAI/finbert en")


def test_files_that_cannot_be_meant_are_told(trainer, embedded_model, adapter, smollm2, new_adapter, tmp_path):
    suite = ["eval", "--suite", "finlora", "--backend", "cpu", "--output", tmp_path / "out"]
    model = ["--model", embedded_model]
    data = tmp_path / "data"
    data.mkdir()
    file = data / "fpb_test.jsonl"
    trainer.fails(*suite, *model, "--data-dir", data, saying=["data", "fpb_test.jsonl", "cpa_reg_test.jsonl"])
    trainer.fails(*suite, *model, "--data-dir", tmp_path / "no", saying=["no such folder"])
    for content, parts in [
        ("", ["fpb_test.jsonl has no examples"]),
        ('{"context": "a", "target": "b"}\n{"context": "c"}\n', ["fpb_test.jsonl:2", '"target" is missing']),
        ('{"text": "a"}\n', ["fpb_test.jsonl:1", '"context" is missing']),
        ("version https://git-lfs.github.com/spec/v1\n", ["git lfs pull"]),
    ]:
        file.write_text(content, encoding="utf-8")
        trainer.fails(*suite, *model, "--data-dir", data, saying=parts)
    trainer.fails(*suite, *model, "--data-dir", file, saying=["fpb_test.jsonl is a file", "the folder"])
    # A byte order mark and lines that end as on Windows are no part of a row.
    rows = [json.dumps({"context": context, "target": target}) for context, target in FILES["fpb_test.jsonl"]]
    file.write_bytes(("\ufeff" + "\r\n".join(rows) + "\r\n").encode())
    (data / "finer_test.jsonl").write_text("x")
    run, results = evaluate(trainer, embedded_model, data, tmp_path / "out")
    assert results["tasks"][0]["rows"] == 6 and results["ignored"] == ["finer_test.jsonl"]
    assert "finer_test.jsonl" in run.stdout and "fiqa_test.jsonl" in run.stdout
    twice = ["--adapter", f"a={adapter}", "--adapter", f"a={tmp_path}"]
    trainer.fails(*suite, *model, "--data-dir", data, *twice, saying=["two adapters are called \"a\"", str(adapter)])
    trainer.fails(*suite, *model, "--data-dir", data, "--tasks", "finer", saying=["did you mean xbrl_finer?"])
    other = new_adapter(smollm2, seed=1)
    trainer.fails(*suite, *model, "--data-dir", data, "--adapter", f"other={other}",
                  saying=["--adapter other", "trained on another model"])
    # Without --model the base is the one that the adapters name, which must be one.
    trainer.fails(*suite, "--data-dir", data, "--adapter", f"a={adapter}", f"b={other}",
                  saying=["a was trained on", "b on", "--model"])


def test_the_base_model_is_the_one_that_the_adapters_name(trainer, smollm2, new_adapter, tmp_path):
    data = write(tmp_path / "data", {"fpb_test.jsonl": FILES["fpb_test.jsonl"][:1]})
    run = trainer("eval", "--suite", "finlora", "--backend", "cpu", "--data-dir", data, "--output", tmp_path / "out",
                  "--adapter", f"one={new_adapter(smollm2, seed=2)}", "--no-base", "--template", "raw")
    results = json.loads((tmp_path / "out/results.json").read_text(encoding="utf-8"))
    assert results["model"] == str(smollm2) and "base model:" in run.stdout
    assert [it["name"] for it in results["contenders"]] == ["one"]
