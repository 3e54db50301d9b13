//! The report as Markdown.

use super::finding::{Group, Rate, StepFinding, Training};
use super::report::Report;
use terminal::Table;
use terminal::human;

/// The whole report.
pub fn markdown(report: &Report) -> String {
    let mut text = format!("# GPU report\n\n{}\n", heading(report));
    let mut tables = vec![sections(report), checks(report)];
    tables.extend(training(&report.training));
    tables.extend(rates(report));
    tables.extend(report.counts.as_ref().map(counts));
    for table in tables {
        text += &format!("\n{}", table.markdown());
    }
    text += &list(
        "Failed",
        report
            .failures
            .iter()
            .map(|failed| (&failed.what, &failed.message)),
    );
    let left_out = report.left_out.iter();
    text += &list(
        "Skipped",
        left_out.map(|left_out| (&left_out.what, &left_out.why)),
    );
    if let Some(device) = &report.device {
        let limits = device.limits.iter();
        text += "\n### Properties reported by the device\n\n";
        text += &limits
            .map(|(name, value)| format!("- {name}: {value}\n"))
            .collect::<String>();
        text += &format!("- kernels are compiled for: {}\n", device.target);
        let words = [
            ("types", &device.types),
            ("matrix units", &device.matrix_units),
            ("features", &device.features),
        ];
        for (name, values) in words {
            let values = if values.is_empty() {
                "none".into()
            } else {
                values.join(", ")
            };
            text += &format!("- {name}: {values}\n");
        }
    }
    text
}

fn heading(report: &Report) -> String {
    let device = match &report.device {
        Some(device) => format!(
            "Device: {} (driver: {}), backend {}, memory {}.",
            device.name,
            device.driver,
            device.backend,
            device.memory_bytes.map_or("unknown".into(), human::bytes)
        ),
        None => "Device: none, it did not start.".into(),
    };
    let machine = &report.machine;
    let checks = &report.checks;
    let failing = checks.iter().filter(|check| !check.ok).count();
    let verdict = match (checks.len(), failing) {
        (0, _) => "Nothing was compared with the CPU.".into(),
        (all, 0) => format!("All {all} comparisons with the CPU are within their tolerance."),
        (all, failing) => format!("{failing} of {all} comparisons with the CPU FAIL."),
    };
    let quick = if report.quick {
        " Quick report with small sizes: speeds are not meaningful."
    } else {
        ""
    };
    format!(
        "{device}\nMachine: {}, {}, {}; trainer {}, `{}`, {:.0} s.{quick}\n\n{verdict}",
        machine.processor,
        human::counted(machine.threads as u64, "thread"),
        machine.system,
        report.version,
        report.command,
        report.seconds,
    )
}

fn sections(report: &Report) -> Table {
    let mut table = Table::new("Sections", &["", "seconds", "ended"]);
    table.words = vec![2];
    let rows = report.sections.iter();
    let rows = rows.map(|run| {
        vec![
            run.section.clone(),
            format!("{:.1}", run.seconds),
            run.ended.clone(),
        ]
    });
    table.rows = rows.collect();
    table
}

fn checks(report: &Report) -> Table {
    let header = ["", "difference", "tolerance", "", ""];
    let mut table = Table::new("Comparison with the CPU", &header);
    table.words = vec![3, 4];
    let rows = report.checks.iter().map(|check| {
        vec![
            check.name.clone(),
            check
                .difference
                .map_or("not a number".into(), |it| format!("{it:.1e}")),
            format!("{:.1e}", check.tolerance),
            if check.ok { "ok" } else { "FAIL" }.into(),
            check.note.clone(),
        ]
    });
    table.rows = rows.collect();
    table
}

fn training(measured: &[Training]) -> Option<Table> {
    if measured.is_empty() {
        return None;
    }
    let header = [
        "",
        "program",
        "type",
        "tokens",
        "examples",
        "tokens/s",
        "s/step",
        "peak memory",
        "warm-up",
    ];
    let mut table = Table::new("Training, 8-bit base (PEFT: in the type shown)", &header);
    table.words = vec![1, 2];
    let rows = measured.iter().map(|it| {
        let recomputed = if it.gradient_checkpointing {
            ", gradient checkpointing"
        } else {
            ""
        };
        vec![
            it.shape.clone(),
            format!("{}{recomputed}", it.program),
            it.dtype.clone(),
            human::count(it.tokens_per_example as u64),
            it.examples_per_step.to_string(),
            human::rate(it.tokens_per_s),
            human::number(it.seconds_per_step[0]),
            it.peak_mib
                .map_or("–".into(), |mib| format!("{mib:.0} MiB")),
            it.warm_up_s
                .map_or("–".into(), |seconds| format!("{seconds:.1} s")),
        ]
    });
    table.rows = rows.collect();
    table.notes = vec![
        "tokens/s: useful tokens per second of the median step. warm-up: creating the model, compiling and tuning kernels. \
         Default adapters (q, k, v, rank 8); the second half of each example is in the loss."
            .into(),
    ];
    Some(table)
}

fn rates(report: &Report) -> Option<Table> {
    if report.rates.is_empty() {
        return None;
    }
    let header = ["", "type", "size", "ms", "TFLOP/s", "GB/s", "of peak"];
    let mut table = Table::new("Speed", &header);
    table.words = vec![1, 2];
    let number = |value: Option<f64>| value.map_or(String::new(), human::number);
    let rows = report.rates.iter().map(|rate| {
        vec![
            rate.what.clone(),
            rate.dtype.clone(),
            rate.size.clone(),
            format!("{:.3}", rate.milliseconds[0]),
            number(rate.tflops),
            number(rate.gbs),
            of_the_peak(rate, report).map_or(String::new(), human::percent),
        ]
    });
    table.rows = rows.collect();
    table.notes = vec![
        "Peak: the largest product of the same type, or the copy. Attention: operations on the keys that a query \
         attends to, in a layer whose width is cut to 64. Element-wise chains: each tensor read or written once."
            .into(),
    ];
    Some(table)
}

/// The share of the device's peak that a speed reaches.
fn of_the_peak(rate: &Rate, report: &Report) -> Option<f64> {
    if matches!(rate.group, Group::PeakProduct | Group::PeakCopy) {
        return None;
    }
    match (rate.tflops, rate.gbs) {
        (Some(tflops), _) => Some(tflops / report.peak_tflops_by_type.get(&rate.dtype)?),
        (None, Some(gbs)) => Some(gbs / report.peak_gbs?),
        (None, None) => None,
    }
}

/// A step's counts by kind.
pub fn counts(step: &StepFinding) -> Table {
    let title = format!(
        "A step of {}, one example of {} tokens, {}, counted",
        step.shape,
        human::count(step.tokens as u64),
        step.dtype
    );
    let mut table = Table::new(title, &["", "launches", "GB", "TFLOP"]);
    let row = |name: &str, launches: u64, bytes: u64, flops: u64| {
        vec![
            name.to_owned(),
            human::count(launches),
            format!("{:.3}", bytes as f64 / 1e9),
            format!("{:.3}", flops as f64 / 1e12),
        ]
    };
    let kinds = step.kinds.iter();
    table.rows = kinds
        .map(|it| row(&it.kind, it.launches, it.bytes, it.flops))
        .collect();
    table.rows.push(row(
        "all",
        step.launches_per_step,
        step.kinds.iter().map(|it| it.bytes).sum(),
        step.flops_per_step,
    ));
    table.notes = vec![
        format!(
            "{} launches per layer, forward and backward; {} and {} per step.",
            step.launches_per_layer,
            human::counted(step.uploads_per_step, "upload"),
            human::counted(step.reads_per_step, "blocking read"),
        ),
        format!(
            "The same step in 16 bits with fused operations: {:.1} GB.",
            step.bytes_per_step as f64 / 1e9
        ),
        step.rule.clone(),
    ];
    table
}

fn list<'a>(title: &str, items: impl Iterator<Item = (&'a String, &'a String)>) -> String {
    let items: Vec<String> = items
        .map(|(what, why)| format!("- {what}: {why}\n"))
        .collect();
    if items.is_empty() {
        String::new()
    } else {
        format!("\n### {title}\n\n{}", items.concat())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::report;

    #[test]
    fn a_rate_is_compared_with_the_peak_of_its_own_type() {
        let report = report();
        let shares: Vec<Option<f64>> = report
            .rates
            .iter()
            .map(|rate| of_the_peak(rate, &report))
            .collect();
        assert_eq!(shares, [None, None, Some(0.5), None, Some(0.5)]);
    }

    #[test]
    fn the_text_says_what_was_found_and_what_was_not() {
        let text = markdown(&report());
        for part in [
            "it did not start",
            "All 1 comparisons",
            "| product, f32 | 1.0e-6 | 1.0e-5 | ok | relative |",
            "training Llama-3.1-8B: no time left",
            "150 launches per layer",
            "12 uploads and 1 blocking read per step",
            "| embedded | ours | f32 | 256 | 8 |",
        ] {
            assert!(text.contains(part), "{part:?} is missing in\n{text}");
        }
    }
}
