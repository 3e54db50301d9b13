//! One scenario's tables.

use super::results::{Measured, ScenarioResult};
use terminal::Table;
use terminal::human;
use terminal::statistics::{Ratio, median};

pub(super) fn speed(result: &ScenarioResult) -> Table {
    let mut table = Table::new(
        format!(
            "{}: {} ({} of {})",
            result.name,
            result.title,
            human::counted(result.rounds as u64, "round"),
            human::counted(result.steps_per_round as u64, "step"),
        ),
        &[
            "",
            "tokens/s",
            "min–max",
            "s/step",
            "computed",
            "of peak",
            "peak memory",
            "loaded",
        ],
    );
    for measured in &result.contenders {
        let spread = measured.useful_tokens_per_s;
        let loaded = measured.loaded_memory;
        table.rows.push(vec![
            measured.name.into(),
            measured.speed().map_or_else(none, human::rate),
            spread.map_or_else(none, |it| {
                format!("{}–{}", human::rate(it.min), human::rate(it.max))
            }),
            measured
                .seconds_per_step()
                .map_or_else(none, |seconds| format!("{seconds:.3}")),
            format!("{:.2}", measured.computed_share()),
            measured.utilisation.map_or_else(none, human::percent),
            measured.memory().map_or_else(none, human::bytes),
            loaded
                .device
                .or(loaded.resident)
                .map_or_else(none, human::bytes),
        ]);
    }
    table.notes.push(format!(
        "tokens/s: useful tokens, those of the examples without padding, each counted in full; median of the rounds. computed: tokens that \
         went through the layers per useful token. of peak: {} per useful token, relative to the square product's rate in the \
         same type; above 100 % if prefixes are shared. loaded: the peak until the model was loaded.",
        flop(result.flops_per_token)
    ));
    for absent in &result.absent {
        table.notes.push(format!(
            "{}: n/a: {}.",
            absent.name,
            absent.reason.trim_end_matches('.')
        ));
    }
    table
}

pub(super) fn phases(result: &ScenarioResult) -> Table {
    let mut table = Table::new(
        "Time of a step by part, in milliseconds (mean over the rounds)",
        &[
            "",
            "data",
            "forward",
            "loss",
            "backward",
            "all three",
            "optimizer",
            "rest",
        ],
    );
    let ms = |seconds: f64| format!("{:.1}", seconds * 1e3);
    for measured in &result.contenders {
        let phases = measured.phases();
        let optional = |seconds: Option<f64>| seconds.map_or_else(none, ms);
        let rounds = measured.rounds.iter();
        let seconds: f64 = rounds.map(|round| round.seconds).sum();
        let steps: usize = measured.rounds.iter().map(|round| round.losses.len()).sum();
        let known = phases.data + phases.pass + phases.optimizer;
        table.rows.push(vec![
            measured.name.into(),
            ms(phases.data),
            optional(phases.forward),
            optional(phases.loss),
            optional(phases.backward),
            ms(phases.pass),
            ms(phases.optimizer),
            ms((seconds / steps.max(1) as f64 - known).max(0.0)),
        ]);
    }
    table.notes.push(
        "loss: final norm, head, cross entropy and, for this trainer, their backward pass; the heads of PEFT and Burn run \
         in forward."
            .into(),
    );
    table
}

pub(super) fn losses(result: &ScenarioResult) -> Table {
    let mut table = Table::new(
        "Losses, to check that the training is the same",
        &[
            "",
            "first step",
            "last step",
            "steps",
            "largest difference",
            "from",
        ],
    );
    table.words = vec![5];
    let loss = |loss: Option<&f64>| loss.map_or_else(none, |loss| format!("{loss:.6}"));
    for measured in &result.contenders {
        let reference = result.contender(measured.same_weights_as);
        let from = match (measured.grouped, reference) {
            (true, _) => "other batches: grouped by length".into(),
            (false, Some(reference)) if reference.id != measured.id => reference.name.to_string(),
            _ => String::new(),
        };
        table.rows.push(vec![
            measured.name.into(),
            loss(measured.losses.first()),
            loss(measured.losses.last()),
            measured.losses.len().to_string(),
            result
                .loss_difference(measured)
                .map_or_else(none, |it| format!("{it:.1e}")),
            from,
        ]);
    }
    table.notes.push(
        "Relative, over all steps, from this trainer with the same weights: quantized, or not. Same examples, batches, initial \
         adapter and learning rate; AdamW without decay, clipping or warm-up."
            .into(),
    );
    table
}

pub(super) fn ratios(result: &ScenarioResult) -> Table {
    let mut table = Table::new(
        "Ratios",
        &["", "speed: medians", "median of rounds", "memory"],
    );
    let ours = result
        .contenders
        .iter()
        .filter(|it| ["ours", "ours-bf16"].contains(&it.id));
    for ours in ours {
        let others = result.contenders.iter().filter(|it| it.id != ours.id);
        for other in others.filter(|other| other.dtype == ours.dtype) {
            let Some(ratio) = Ratio::of(&ours.speeds(), &other.speeds()) else {
                continue;
            };
            let memory = ours.memory().zip(other.memory());
            table.rows.push(vec![
                format!("{} by {}", ours.name, other.name),
                format!("{:.2}", ratio.of_medians),
                format!("{:.2}", ratio.median_of_rounds),
                memory.map_or_else(none, |(a, b)| format!("{:.2}", a as f64 / b as f64)),
            ]);
        }
    }
    table
}

/// For example `0.53 GFLOP`.
pub(super) fn flop(operations: f64) -> String {
    match operations {
        operations if operations >= 1e9 => format!("{:.2} GFLOP", operations / 1e9),
        operations => format!("{:.2} MFLOP", operations / 1e6),
    }
}

/// The fastest first, for the plot.
pub(super) fn by_speed(result: &ScenarioResult) -> Vec<&Measured> {
    let mut all: Vec<&Measured> = result.contenders.iter().collect();
    let speed = |it: &Measured| median(&it.speeds()).unwrap_or(0.0);
    all.sort_by(|a, b| speed(b).total_cmp(&speed(a)));
    all
}

/// The text for a number that could not be measured.
pub(super) fn none() -> String {
    "–".into()
}
