//! Scores compared with those of scikit-learn, scipy and FinLoRA, and the eval command as a user
//! runs it.

use inference::eval::suite::{finlora_scores, strict_scores};
use inference::eval::{
    Answer, Answers, Scorer, Verdict, correct, items, mcnemar, of_items, score_labels,
};
use serde::Deserialize;
use serde_json::Value;
use tests::fixture;
use tests::program::{Outcome, run};
use tests::workspace::Workspace;

fn scores_fixture<T: serde::de::DeserializeOwned>(name: &str) -> Vec<T> {
    let path = fixture("scores").join(name);
    let text = std::fs::read_to_string(&path).expect("the fixture can be read");
    serde_json::from_str(&text).expect("the fixture is valid")
}

/// Sums of at most 3,000 64-bit floats, added in another order.
const EXACT: f64 = 1e-12;

fn assert_close(what: &str, ours: f64, theirs: f64) {
    assert!(
        (ours - theirs).abs() <= EXACT * theirs.abs().max(1.0),
        "{what}: {ours} {theirs}"
    );
}

#[derive(Deserialize)]
struct Case {
    labels: Vec<String>,
    targets: Vec<usize>,
    first: Vec<Option<usize>>,
    second: Vec<Option<usize>>,
    scores_first: Expected,
    scores_second: Expected,
    significance: Significance,
}

#[derive(Deserialize)]
struct Expected {
    accuracy: f64,
    interval: [f64; 2],
    macro_f1: f64,
    weighted_f1: f64,
    precision: Vec<f64>,
    recall: Vec<f64>,
    f1: Vec<f64>,
    support: Vec<usize>,
    confusion: Vec<Vec<usize>>,
}

#[derive(Deserialize)]
struct Significance {
    only_first: usize,
    only_second: usize,
    p_value: f64,
}

#[test]
fn scores_are_scikit_learns() {
    for case in scores_fixture::<Case>("scores.json") {
        for (answers, expected) in [
            (&case.first, &case.scores_first),
            (&case.second, &case.scores_second),
        ] {
            let scores = score_labels(&case.targets, answers, &case.labels);
            assert_close("accuracy", scores.accuracy, expected.accuracy);
            // scipy prints its interval with about 15 digits.
            for (ours, theirs) in scores.interval.iter().zip(&expected.interval) {
                assert_close("interval", *ours, *theirs);
            }
            let silent = answers.iter().filter(|answer| answer.is_none()).count();
            assert_eq!(scores.no_label, silent);
            let labels = scores.labels.expect("the task has labels");
            assert_close("macro F1", labels.macro_f1, expected.macro_f1);
            assert_close("weighted F1", labels.weighted_f1, expected.weighted_f1);
            assert_eq!(labels.confusion, expected.confusion);
            for (index, label) in labels.each.iter().enumerate() {
                assert_close("precision", label.precision, expected.precision[index]);
                assert_close("recall", label.recall, expected.recall[index]);
                assert_close("F1", label.f1, expected.f1[index]);
                assert_eq!(label.support, expected.support[index]);
            }
        }
    }
}

#[test]
fn the_significance_of_a_difference_is_scipys() {
    let cases = scores_fixture::<Case>("scores.json");
    assert!(cases.iter().any(|case| case.significance.p_value < 1e-20));
    for case in cases {
        let right = |answers: &[Option<usize>]| correct(&case.targets, answers);
        let test = mcnemar(&right(&case.first), &right(&case.second));
        let expected = &case.significance;
        assert_eq!(
            (test.only_first, test.only_second),
            (expected.only_first, expected.only_second)
        );
        // Relative: 1,530 terms of logarithms that are accurate to 16 digits.
        let error = (test.p_value - expected.p_value).abs() / expected.p_value;
        assert!(error < 1e-10, "{} {}", test.p_value, expected.p_value);
    }
}

#[derive(Deserialize)]
struct Finlora {
    lists: bool,
    targets: Vec<String>,
    written: Vec<String>,
    accuracy: f64,
    weighted_f1: f64,
}

#[test]
fn the_finlora_scorer_gives_finloras_numbers() {
    for case in scores_fixture::<Finlora>("finlora.json") {
        let mut targets = Vec::new();
        let mut answers = Vec::new();
        for (target, written) in case.targets.iter().zip(&case.written) {
            let answer = Answer {
                written: written.clone(),
                finlora: written.clone(),
                ..Answer::default()
            };
            let of_row = items(target, case.lists);
            if case.lists {
                answers.extend(of_items(&answer, of_row.len()))
            } else {
                answers.push(answer)
            }
            targets.extend(of_row);
        }
        let all = Answers::of_targets(targets.iter().map(String::as_str));
        let right = targets.iter().map(|target| all.exact(target));
        let right: Vec<usize> = right
            .map(|target| target.expect("a target is an answer"))
            .collect();
        let verdict = Verdict::new(Scorer::Finlora, &all, &right, &answers);
        assert_close("accuracy", verdict.scores.accuracy, case.accuracy);
        let f1 = verdict
            .finlora_weighted_f1
            .expect("FinLoRA's scorer has it");
        assert_close("weighted F1", f1, case.weighted_f1);
        // The strict rule differs: a label within a sentence does not count. Lists are split into
        // plain items.
        let strict = Verdict::new(Scorer::Strict, &all, &right, &answers);
        let same = strict.scores.accuracy == verdict.scores.accuracy;
        assert!(strict.scores.accuracy <= verdict.scores.accuracy && same == case.lists);
    }
}

#[test]
fn a_suites_scores_are_finloras_numbers_too() {
    for case in scores_fixture::<Finlora>("finlora.json") {
        let mut targets = Vec::new();
        let mut answers = Vec::new();
        for (target, written) in case.targets.iter().zip(&case.written) {
            let of_row = items(target, case.lists);
            let mut of_answer = items(written, case.lists);
            of_answer.resize(of_row.len(), String::new());
            targets.extend(of_row);
            answers.extend(of_answer);
        }
        let targets: Vec<&str> = targets.iter().map(String::as_str).collect();
        let answers: Vec<&str> = answers.iter().map(String::as_str).collect();
        let scores = finlora_scores(&targets, &answers);
        assert_close("accuracy", scores.accuracy, case.accuracy);
        assert_close("weighted F1", scores.weighted_f1, case.weighted_f1);
        let strict = strict_scores(&targets, &answers);
        assert_eq!(strict.accuracy < scores.accuracy, !case.lists);
    }
}

// The command.

fn eval(workspace: &Workspace, more: &[&str]) -> Outcome {
    let path = |name: &str| workspace.path(name).display().to_string();
    let (model, data, output) = (path("model"), path("rows.jsonl"), path("eval"));
    let fixed = [
        "eval",
        "--backend",
        "cpu",
        "--model",
        &model,
        "--data",
        &data,
        "--output",
        &output,
    ];
    run(&[&fixed, more].concat())
}

fn results(workspace: &Workspace) -> Value {
    let text = std::fs::read_to_string(workspace.path("eval/results.json"));
    serde_json::from_str(&text.expect("the results are there")).expect("the results are JSON")
}

fn trained(template: &str) -> Workspace {
    let workspace = Workspace::new();
    let template = format!("prompt_template={template}");
    // Enough for a random model to memorize its twenty examples.
    let settings = [
        "num_epochs=40",
        "learning_rate=3e-2",
        "target_modules=all-linear",
        &template,
    ];
    workspace.train(&settings).succeeded();
    workspace
}

#[test]
fn base_and_adapter_stand_side_by_side_with_every_scorer() {
    let workspace = trained("raw");
    let adapter = workspace.path("out/adapter").display().to_string();
    let text = eval(&workspace, &["--adapter", &adapter]).succeeded();
    for part in [
        "always w50",
        "finlora",
        "strict",
        "likelihood",
        "→ no label",
        "McNemar",
    ] {
        assert!(text.contains(part), "{part:?} in\n{text}");
    }
    let results = results(&workspace);
    let file = &results["files"][0];
    assert_eq!(file["labels"], serde_json::json!(["w50", "w51"]));
    assert_eq!(
        (&file["rows"], &file["majority"]["accuracy"]),
        (&24.into(), &0.5.into())
    );
    let [base, adapter] = [0, 1].map(|index| &file["contenders"][index]);
    assert_eq!(
        (&base["name"], &adapter["name"]),
        (&"base".into(), &"out".into())
    );
    for scorer in ["finlora", "strict", "likelihood"] {
        let accuracy = |contender: &Value| contender["scores"][scorer]["accuracy"].as_f64();
        // The examples are the training data: the adapter has learned them, the random base has
        // not.
        assert!(accuracy(adapter) > Some(0.9), "{scorer}\n{text}");
        assert!(accuracy(base) < Some(0.7), "{scorer}\n{text}");
    }
    assert_eq!(file["differences"].as_array().map(Vec::len), Some(3));
    let markdown = std::fs::read_to_string(workspace.path("eval/results.md"));
    assert!(
        markdown
            .expect("the table is there")
            .contains("| out | likelihood |")
    );
    let answers = std::fs::read_to_string(workspace.path("eval/answers.jsonl"));
    let answers = answers.expect("the answers are there");
    assert_eq!(answers.lines().count(), 2 * 24);
    let last: Value = serde_json::from_str(answers.lines().last().expect("a line")).expect("JSON");
    assert_eq!(
        (&last["contender"], &last["written"]),
        (&"out".into(), &last["target"])
    );
}

#[test]
fn an_adapter_is_evaluated_with_its_own_template_and_another_needs_force() {
    let workspace = trained("inst");
    let adapter = workspace.path("out/adapter").display().to_string();
    let adapter = [
        "--adapter",
        adapter.as_str(),
        "--scorer",
        "strict",
        "--no-base",
    ];
    let text = eval(&workspace, &adapter).succeeded();
    assert!(text.contains("prompt template inst"), "{text}");
    let other = [&adapter[..], &["--template", "raw"]].concat();
    eval(&workspace, &other).failed_saying(&["\"inst\"", "\"raw\"", "--force"]);
    eval(&workspace, &[&other[..], &["--force"]].concat()).succeeded();
    // An adapter saved by PEFT has no record of its prompts.
    let file = workspace.path("out/adapter/training_prompt.json");
    std::fs::remove_file(file).expect("the file is there");
    let text = eval(&workspace, &adapter).succeeded();
    assert!(
        text.contains("training_prompt.json") && text.contains("raw is used"),
        "{text}"
    );
}

#[test]
fn held_out_rows_are_those_that_training_kept_aside() {
    let workspace = Workspace::new();
    let text = eval(&workspace, &["--held-out", "4", "--scorer", "likelihood"]).succeeded();
    assert!(text.contains("4 examples"), "{text}");
    let lines = |text: String| -> Vec<u64> {
        let lines = text.lines();
        let line = |line| serde_json::from_str::<Value>(line).expect("JSON")["line"].as_u64();
        lines.map(|text| line(text).expect("a line")).collect()
    };
    let held_out = std::fs::read_to_string(workspace.path("eval/answers.jsonl")).expect("answers");
    let held_out = lines(held_out);
    let config = workspace.path("config.toml").display().to_string();
    let inspect = [
        "inspect-data",
        "--config",
        &config,
        "--json",
        "--rows",
        "99",
    ];
    let trained_on = lines(run(&inspect).succeeded());
    assert_eq!((held_out.len(), trained_on.len()), (4, 20));
    assert!(held_out.iter().all(|line| !trained_on.contains(line)));
    // Another sample, of all examples.
    eval(&workspace, &["--rows", "7", "--scorer", "strict"]).succeeded();
    assert_eq!(results(&workspace)["files"][0]["rows"], 7);
}

#[test]
fn what_cannot_be_evaluated_says_why() {
    let workspace = Workspace::new();
    eval(&workspace, &["--adapter", "no/such"]).failed_saying(&["no/such"]);
    eval(&workspace, &["--labels", "w50,w52"]).failed_saying(&[
        "rows.jsonl:2",
        "\"w51\"",
        "w50, w52",
    ]);
    eval(&workspace, &["--held-out", "24"]).failed_saying(&["--held-out 24", "rows.jsonl"]);
    eval(&workspace, &["--template", "nonsense"]).failed_saying(&["inst"]);
    eval(&workspace, &["--max-new-tokens", "5000"]).failed_saying(&["too long", "positions"]);
    workspace.write("rows.jsonl", "{\"text\": \"w10 w11\"}\n");
    eval(&workspace, &[]).failed_saying(&["rows.jsonl", "plain texts"]);
    workspace.write(
        "rows.jsonl",
        "{\"context\": \"w10\", \"target\": \"w11\"}\n",
    );
    eval(&workspace, &["--scorer", "likelihood"]).failed_saying(&["--labels", "free text"]);
    workspace.write("rows.jsonl", "{\"context\": \"w10\"}\n");
    eval(&workspace, &[]).failed_saying(&["rows.jsonl:1", "\"target\" is missing"]);
}

#[test]
fn free_text_and_lists_are_scored_too() {
    let workspace = Workspace::new();
    let row = |context: &str, target: &str| {
        format!(
            "{}\n",
            serde_json::json!({"context": context, "target": target})
        )
    };
    let texts = ["w20 w21", "w22", "w23 w24 w25"].map(|target| row("w10", target));
    workspace.write("rows.jsonl", &texts.concat());
    let text = eval(&workspace, &[]).succeeded();
    assert!(text.contains("free text"), "{text}");
    assert_eq!(
        results(&workspace)["files"][0]["contenders"][0]["scores"]["likelihood"],
        Value::Null
    );
    let lists = ["w20, w21", "w21, w20, w20"].map(|target| row("w10", target));
    workspace.write("rows.jsonl", &lists.concat());
    eval(&workspace, &["--lists"]).succeeded();
    let file = &results(&workspace)["files"][0];
    assert_eq!((&file["rows"], &file["answers"]), (&2.into(), &5.into()));
    assert_eq!(file["labels"], serde_json::json!(["w20", "w21"]));
}

#[test]
fn a_suite_puts_base_and_adapters_into_one_table() {
    let workspace = trained("inst");
    let path = |name: &str| workspace.path(name).display().to_string();
    let (data, model, output) = (path("tests"), path("model"), path("eval"));
    std::fs::create_dir(&data).expect("a temporary folder is writable");
    let rows = std::fs::read_to_string(workspace.path("rows.jsonl")).expect("the rows are there");
    workspace.write("tests/fpb_test.jsonl", &rows);
    let list = "{\"context\": \"w10 w20 w30\", \"target\": \"w50,w51\"}\n";
    workspace.write("tests/finer_test_batched.jsonl", list);
    // Longer than the model's positions, as XBRL files are for small models.
    let long = format!(
        "{{\"context\": \"{}\", \"target\": \"w50\"}}\n",
        "w10 ".repeat(600)
    );
    workspace.write("tests/ner_test.jsonl", &long);
    let adapter = format!("fpb={}", path("out/adapter"));
    let suite = ["eval", "--suite", "finlora", "--backend", "cpu"];
    let fixed = ["--data-dir", &data, "--output", &output];
    let more = ["--model", &model, "--adapter", &adapter, "--rows", "20"];
    let text = run(&[&suite[..], &fixed, &more].concat()).succeeded();
    for part in [
        "--template raw --force",
        "ner is skipped",
        "fiqa_test.jsonl",
    ] {
        assert!(text.contains(part), "{part:?} in\n{text}");
    }
    let results = results(&workspace);
    let [base, fpb] = [0, 1].map(|index| &results["contenders"][index]);
    assert_eq!(
        (&base["name"], &fpb["name"]),
        (&"base".into(), &"fpb".into())
    );
    let accuracy = |contender: &Value, rule: &str| contender["tasks"][0][rule]["accuracy"].as_f64();
    for rule in ["finlora", "strict"] {
        assert!(accuracy(fpb, rule) > Some(0.9), "{rule}\n{text}");
        assert!(accuracy(base, rule) < Some(0.7), "{rule}\n{text}");
    }
    assert_eq!(results["tasks"][0]["rows"], 20);
    assert_eq!(results["tasks"][1]["answers"], 2);
    let answers = std::fs::read_to_string(workspace.path("eval/answers/fpb.jsonl"));
    assert_eq!(answers.expect("the answers are there").lines().count(), 40);
    let markdown = std::fs::read_to_string(workspace.path("eval/results.md")).expect("the table");
    assert!(markdown.contains("| fpb | strict |"), "{markdown}");
    // The model that the adapter names is found without --model.
    let more = [
        "--adapter",
        &adapter,
        "--no-base",
        "--tasks",
        "fpb",
        "--rows",
        "2",
    ];
    let text = run(&[&suite[..], &fixed, &more].concat()).succeeded();
    assert!(text.contains("named by the adapters"), "{text}");
}
