//! A whole training on a GPU, or on a software driver where there is none.

use device::Backend;
use tests::program::run;
use tests::runs::lines;

/// Also without a GPU, one pass over the examples has to be short enough for CI.
#[test]
fn one_epoch_on_wgpu_reaches_90_percent_exact_match() {
    match device::select(Backend::Wgpu) {
        Ok(selected) => println!("{}", selected.name),
        Err(error) if std::env::var_os("LORA_REQUIRE_WGPU").is_none() => {
            return println!("skipped: {error}");
        }
        Err(error) => panic!("LORA_REQUIRE_WGPU is set: {error}"),
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let output = folder.path().join("run");
    let output = output.to_str().expect("UTF-8");
    let arguments = ["train", "--backend=wgpu", "--output-dir", output];
    let settings = [
        "--set=num_epochs=1",
        "--set=target_modules=all-linear",
        "--set=eval_steps=75",
    ];
    run(&[&arguments[..], &settings].concat()).succeeded();
    let lines = lines(output.as_ref());
    let best = lines
        .iter()
        .filter_map(|line| line["val_row_accuracy"].as_f64())
        .fold(0.0, f64::max);
    let steps = lines.iter().filter_map(|line| line["step_s"].as_f64());
    println!(
        "exact match {:.1} %; {:.0} s in steps",
        100.0 * best,
        steps.sum::<f64>()
    );
    assert!(best >= 0.9, "exact match {:.1} %", 100.0 * best);
}
