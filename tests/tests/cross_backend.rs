//! The same quantized LoRA model on every pair of backends that this build and this machine have.

use parity::between_devices;
use tests::devices;

#[test]
fn every_pair_of_backends_agrees_on_logits_gradients_and_a_loss_curve() {
    let devices = devices();
    let report = between_devices(&devices).unwrap_or_else(|error| panic!("{error}"));
    println!("{report}");
    if devices.len() < 2 {
        println!(
            "skipped: {} alone has nothing to be compared with",
            devices[0].0
        );
        return;
    }
    let pairs = devices.len() * (devices.len() - 1) / 2;
    assert_eq!(report.sections.len(), pairs);
    assert!(
        report
            .sections
            .iter()
            .all(|section| section.checks.len() >= 4),
        "{report}"
    );
    // The tolerances stand in the report, with their reasons in the crate `parity`.
    assert!(report.passed(), "{report}");
}
