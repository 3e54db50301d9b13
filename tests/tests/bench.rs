//! The benchmark as a user runs it, on the embedded model. No assertion depends on the speed of the
//! machine.

use serde_json::Value;
use tests::program::Program::Bench;

fn numbers(value: &Value) -> Vec<f64> {
    let values = value.as_array().expect("a list");
    let number = |value: &Value| value.as_f64().expect("a number");
    values.iter().map(number).collect()
}

#[test]
fn the_contenders_train_the_same_and_every_result_is_written() {
    let folder = tempfile::tempdir().expect("a folder");
    let output = folder.path().display().to_string();
    let arguments = [
        "--device", "cpu", "--quick", "--rounds", "2", "--output", &output,
    ];
    let text = Bench.run(&arguments).succeeded();
    assert!(text.contains("PEFT float32: n/a: no --peft"), "{text}");

    let json = std::fs::read_to_string(folder.path().join("results.json")).expect("results.json");
    let results: Value = serde_json::from_str(&json).expect("JSON");
    let scenario = &results["scenarios"][0];
    assert_eq!(scenario["name"], "main");
    let contenders = scenario["contenders"].as_array().expect("contenders");
    let losses = |id: &str| {
        let found = contenders.iter().find(|contender| contender["id"] == id);
        let found = found.unwrap_or_else(|| panic!("{id} is missing in\n{text}"));
        let losses = numbers(&found["losses"]);
        assert_eq!(losses.len(), 6, "a warm-up and two rounds of two steps");
        assert_eq!(found["rounds"].as_array().map(Vec::len), Some(2));
        for round in found["rounds"].as_array().into_iter().flatten() {
            assert!(round["seconds"].as_f64() > Some(0.0));
            assert!(round["useful_tokens"].as_u64() > Some(0));
        }
        losses
    };
    let ours = losses("ours");
    assert!(ours.last() < ours.first(), "it learns: {ours:?}");
    for id in ["ours-plain", "ours-checkpointed", "burn"] {
        for (other, ours) in losses(id).iter().zip(&ours) {
            assert!(
                (other - ours).abs() <= 1e-4 * ours,
                "{id}: {other} and {ours}"
            );
        }
    }
    // Another base, quantized in ours: close, but not the same.
    let dense = losses("ours-dense");
    assert!(
        (dense[0] - ours[0]).abs() < 0.05 * ours[0],
        "{} and {}",
        dense[0],
        ours[0]
    );
    assert_ne!(dense, ours);

    for file in ["results.md", "speed.svg"] {
        let written = std::fs::read_to_string(folder.path().join(file)).expect(file);
        assert!(written.contains("Burn apply_qlora"), "{file}: {written}");
    }
}

#[test]
fn what_is_wrong_with_the_arguments_is_said_before_anything_is_measured() {
    let folder = tempfile::tempdir().expect("a folder");
    let missing = folder.path().join("no-model").display().to_string();
    let output = folder.path().join("out").display().to_string();
    let cases: [(&[&str], &str); 4] = [
        (&["--model", &missing], "hf download"),
        (&["--quick", "--only", "speed"], "accumulation"),
        (&["--quick", "--contenders", "torch"], "peft-f32"),
        (&["--quick", "--rounds", "0"], "at least 1"),
    ];
    for (arguments, expected) in cases {
        let outcome = Bench.run(&[&["--output", &output], arguments].concat());
        assert!(
            !outcome.text.contains("measuring"),
            "{arguments:?}: {}",
            outcome.text
        );
        outcome.failed_saying(&[expected]);
    }
}

#[test]
fn a_python_that_is_none_leaves_peft_out_with_its_reason() {
    let folder = tempfile::tempdir().expect("a folder");
    let output = folder.path().display().to_string();
    let only = [
        "--contenders",
        "ours,peft-f32",
        "--rounds",
        "1",
        "--steps",
        "1",
    ];
    let python = ["--device", "cpu", "--quick", "--output", &output, "--peft"];
    let nowhere = folder.path().join("no-python").display().to_string();
    let text = Bench
        .run(&[&python, &[nowhere.as_str()][..], &only].concat())
        .succeeded();
    assert!(text.contains("PEFT float32: n/a: cannot start"), "{text}");
}
