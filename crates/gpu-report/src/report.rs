//! The report: the findings of all sections, and its files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::counting::bytes_at_2048;
use super::finding::{Check, Failed, Finding, Group, LeftOut, Rate, StepFinding, Training};
use super::markdown;
use device::Hardware;
use device::Machine;

/// All findings.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// This program's version.
    pub version: &'static str,
    /// The command line.
    pub command: String,
    /// Whether only small sizes were used; speeds are then not meaningful.
    pub quick: bool,
    /// The machine around the device.
    pub machine: Machine,
    /// The device; `None` if it did not start.
    pub device: Option<Hardware>,
    /// Comparisons with the CPU.
    pub checks: Vec<Check>,
    /// Training steps.
    pub training: Vec<Training>,
    /// The fastest product in any type, 10¹² operations per second.
    pub peak_tflops: Option<f64>,
    /// The fastest product of each type.
    pub peak_tflops_by_type: BTreeMap<String, f64>,
    /// A large copy, 10⁹ bytes per second, reads and writes added.
    pub peak_gbs: Option<f64>,
    /// The speed of a layer's parts.
    pub rates: Vec<Rate>,
    /// Kernel launches of a decoder layer of the 8B shape, forward and backward.
    pub launches_per_layer: Option<u64>,
    /// Tensors copied to the device per step.
    pub uploads_per_step: Option<u64>,
    /// How often a step waits for numbers from the device.
    pub reads_per_step: Option<u64>,
    /// Bytes that a step of the 8B shape reads and writes at 2,048 tokens.
    pub bytes_per_step_8b_2048: Option<u64>,
    /// The rule by which that number was scaled.
    pub bytes_per_step_8b_2048_rule: Option<String>,
    /// The complete counts of the step.
    pub counts: Option<StepFinding>,
    /// The sections that ran.
    pub sections: Vec<SectionRun>,
    /// Skipped measurements, with the reasons.
    pub left_out: Vec<LeftOut>,
    /// Failures.
    pub failures: Vec<Failed>,
    /// Seconds that the report took.
    pub seconds: f64,
}

/// A section that ran.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SectionRun {
    /// Its name.
    pub section: String,
    /// Seconds.
    pub seconds: f64,
    /// `done`, `stopped at its time limit`, or how its process ended.
    pub ended: String,
}

impl Report {
    /// A report without findings.
    pub fn new(command: String, quick: bool) -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION"),
            command,
            quick,
            machine: Machine::this(),
            device: None,
            checks: Vec::new(),
            training: Vec::new(),
            peak_tflops: None,
            peak_tflops_by_type: BTreeMap::new(),
            peak_gbs: None,
            rates: Vec::new(),
            launches_per_layer: None,
            uploads_per_step: None,
            reads_per_step: None,
            bytes_per_step_8b_2048: None,
            bytes_per_step_8b_2048_rule: None,
            counts: None,
            sections: Vec::new(),
            left_out: Vec::new(),
            failures: Vec::new(),
            seconds: 0.0,
        }
    }

    /// Adds a finding.
    pub fn add(&mut self, finding: Finding) {
        match finding {
            Finding::Device(device) => self.device = Some(*device),
            Finding::Check(check) => self.checks.push(check),
            Finding::Training(training) => self.training.push(training),
            Finding::LeftOut(left_out) => self.left_out.push(left_out),
            Finding::Failed(failed) => self.failures.push(failed),
            Finding::Rate(rate) => {
                self.peaks(&rate);
                self.rates.push(rate);
            }
            Finding::Counts(counts) => {
                let (bytes, rule) = bytes_at_2048(&counts);
                self.launches_per_layer = Some(counts.launches_per_layer);
                self.uploads_per_step = Some(counts.uploads_per_step);
                self.reads_per_step = Some(counts.reads_per_step);
                self.bytes_per_step_8b_2048 = Some(bytes);
                self.bytes_per_step_8b_2048_rule = Some(rule);
                self.counts = Some(*counts);
            }
            Finding::Done => {}
        }
    }

    fn peaks(&mut self, rate: &Rate) {
        match (rate.group, rate.tflops, rate.gbs) {
            (Group::PeakProduct, Some(tflops), _) => {
                let of_type = self
                    .peak_tflops_by_type
                    .entry(rate.dtype.clone())
                    .or_default();
                *of_type = tflops.max(*of_type);
                self.peak_tflops = Some(tflops.max(self.peak_tflops.unwrap_or(0.0)));
            }
            (Group::PeakCopy, _, Some(gbs)) => {
                self.peak_gbs = Some(gbs.max(self.peak_gbs.unwrap_or(0.0)));
            }
            _ => {}
        }
    }

    /// Whether at least one comparison was made, and every comparison passes.
    pub fn passed(&self) -> bool {
        !self.checks.is_empty() && self.checks.iter().all(|check| check.ok)
    }

    /// Writes `report.json` and `report.md`. Called after every finding, so that nothing is lost
    /// when the report ends early.
    ///
    /// # Errors
    ///
    /// If they cannot be written.
    pub fn write(&self, folder: &Path) -> Result<[PathBuf; 2], durable::WriteError> {
        let (json, text) = (folder.join("report.json"), folder.join("report.md"));
        // All keys of the report are strings, so serialization cannot fail.
        let lines = serde_json::to_string_pretty(self).unwrap_or_default();
        durable::write_atomically(&json, lines.as_bytes())?;
        durable::write_atomically(&text, markdown::markdown(self).as_bytes())?;
        Ok([json, text])
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::finding::KindFinding;

    pub(crate) fn report() -> Report {
        let mut report = Report::new("gpu-report --quick".into(), true);
        let rate = |group, dtype: &str, tflops, gbs| {
            Finding::Rate(Rate {
                what: "largest product".into(),
                group,
                dtype: dtype.into(),
                size: "4×4".into(),
                tflops,
                gbs,
                milliseconds: [1.0, 0.5, 2.0],
            })
        };
        report.add(rate(Group::PeakProduct, "f32", Some(10.0), None));
        report.add(rate(Group::PeakProduct, "f16", Some(40.0), None));
        report.add(rate(Group::Product, "f16", Some(20.0), None));
        report.add(rate(Group::PeakCopy, "f32", None, Some(500.0)));
        report.add(rate(Group::ElementWise, "f16", None, Some(250.0)));
        report.add(Finding::Check(Check::new(
            "product, f32".into(),
            1e-6,
            1e-5,
            "relative",
        )));
        report.add(Finding::Counts(Box::new(StepFinding {
            shape: "Llama-3.1-8B".into(),
            dtype: "f32".into(),
            tokens: 2048,
            launches_per_layer: 150,
            launches_per_step: 5000,
            uploads_per_step: 12,
            reads_per_step: 1,
            bytes_per_step: 250_000_000_000,
            flops_per_step: 65_000_000_000_000,
            rule: "as it was counted".into(),
            kinds: vec![KindFinding {
                kind: "matrix products".into(),
                launches: 900,
                bytes: 1_000_000,
                flops: 65_000_000_000_000,
            }],
        })));
        report.add(Finding::Training(Training {
            program: "ours".into(),
            shape: "embedded".into(),
            dtype: "f32".into(),
            bits: 8,
            tokens_per_example: 256,
            examples_per_step: 8,
            tokens_per_s: 1234.5,
            seconds_per_step: [0.1, 0.09, 0.2],
            steps: 5,
            peak_mib: Some(77.0),
            gradient_checkpointing: false,
            losses: Some([5.0, 4.0]),
            warm_up_s: Some(3.0),
        }));
        report.add(Finding::LeftOut(LeftOut {
            what: "training Llama-3.1-8B".into(),
            why: "no time left".into(),
        }));
        report
    }

    #[test]
    fn peaks_are_the_largest_and_counts_fill_the_keys_that_others_read() {
        let report = report();
        assert_eq!(
            (report.peak_tflops, report.peak_gbs),
            (Some(40.0), Some(500.0))
        );
        assert_eq!(report.peak_tflops_by_type["f32"], 10.0);
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["bytes_per_step_8b_2048"], 250_000_000_000u64);
        for key in ["launches_per_layer", "uploads_per_step", "reads_per_step"] {
            assert!(json[key].is_u64(), "{key}");
        }
        let check = &json["checks"][0];
        assert_eq!(
            (&check["name"], &check["ok"]),
            (&"product, f32".into(), &true.into())
        );
        let training = &json["training"][0];
        assert_eq!(training["type"], "f32");
        assert!(training["peak_mib"].is_number() && training["tokens_per_s"].is_number());
    }

    #[test]
    fn a_report_that_compared_nothing_or_found_a_difference_does_not_pass() {
        assert!(!Report::new(String::new(), false).passed());
        let mut report = report();
        assert!(report.passed());
        report.add(Finding::Check(Check::new("b".into(), f64::NAN, 1.0, "")));
        assert!(!report.passed());
    }
}
