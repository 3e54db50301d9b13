//! What was measured, as tables.

use super::protocol::Floors;
use super::results::{Measured, Results, ScenarioResult};
use super::statistics::{Ratio, Spread, median};
use super::table::Table;
use crate::human;

/// Where a number could not be measured.
const NONE: &str = "–";

/// Every table, in the order in which they are read.
pub(super) fn tables(results: &Results) -> Vec<Table> {
    let mut tables = vec![floors(&results.floors, &results.device.name)];
    let (scaling, others): (Vec<_>, Vec<_>) = results
        .scenarios
        .iter()
        .partition(|result| result.name == "scaling");
    for result in others {
        tables.push(speed(result));
        tables.push(phases(result));
        tables.push(losses(result));
        let ratios = ratios(result);
        if !ratios.rows.is_empty() {
            tables.push(ratios);
        }
    }
    if !scaling.is_empty() {
        tables.push(self::scaling(&scaling));
    }
    if !results.goals.is_empty() {
        tables.push(goals(results));
    }
    tables
}

fn floors(floors: &Floors, device: &str) -> Table {
    let mut table = Table::new(
        format!("Floors: what {device} does at most (median, smallest, largest)"),
        &["", "size", "median", "min", "max", "unit"],
    );
    table.words = vec![1, 5];
    for rate in &floors.products {
        let [m, k, n] = rate.product.shape;
        let spread = Spread::of(&rate.gflops);
        table.rows.push(floor(
            format!("{} product, {}", rate.dtype, rate.product.name),
            format!("{m}×{k}×{n}"),
            spread,
            "GFLOP/s",
        ));
    }
    for bandwidth in &floors.bandwidths {
        table.rows.push(floor(
            format!("memory, {}", bandwidth.name),
            human::bytes(bandwidth.bytes as u64),
            Spread::of(&bandwidth.gb_per_s),
            "GB/s",
        ));
    }
    table
}

fn floor(name: String, size: String, spread: Option<Spread>, unit: &str) -> Vec<String> {
    let number =
        |of: fn(Spread) -> f64| spread.map_or_else(|| NONE.into(), |it| human::rate(of(it)));
    vec![
        name,
        size,
        number(|spread| spread.median),
        number(|spread| spread.min),
        number(|spread| spread.max),
        unit.into(),
    ]
}

fn speed(result: &ScenarioResult) -> Table {
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
            "utilised",
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
        "tokens/s: useful tokens, the rows' own, each counted in full; median of the rounds. computed: tokens that \
         went through the layers by useful ones. utilised: {} per useful token, by the square product's rate in the \
         same type. loaded: the peak until the model was loaded.",
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

/// `0.53 GFLOP`.
fn flop(operations: f64) -> String {
    match operations {
        operations if operations >= 1e9 => format!("{:.2} GFLOP", operations / 1e9),
        operations => format!("{:.2} MFLOP", operations / 1e6),
    }
}

fn phases(result: &ScenarioResult) -> Table {
    let mut table = Table::new(
        "Where a step's time goes, in milliseconds (mean over the rounds)",
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
        "loss: final norm, head, cross entropy and, with ours, their backward pass; PEFT's and Burn's heads run \
         within forward."
            .into(),
    );
    table
}

fn losses(result: &ScenarioResult) -> Table {
    let mut table = Table::new(
        "Losses, to see that it is the same training",
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
        "Relative, over all steps, from ours with the same weights: quantized, or not. Same rows, batches, initial \
         adapter and learning rate; AdamW without decay, clipping or warm-up."
            .into(),
    );
    table
}

fn ratios(result: &ScenarioResult) -> Table {
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

/// Cost over row lengths and over models, with what makes it more or less than linear.
fn scaling(results: &[&ScenarioResult]) -> Table {
    let mut table = Table::new(
        "scaling: cost of a token as rows and models grow, ours f32",
        &[
            "",
            "tokens/s",
            "ms/token",
            "per token",
            "ms/GFLOP",
            "utilised",
            "peak memory",
        ],
    );
    for result in results {
        let Some(ours) = result.contenders.first() else {
            continue;
        };
        let cost = ours.speed().map(|speed| 1e3 / speed);
        table.rows.push(vec![
            result.title.clone(),
            ours.speed().map_or_else(none, human::rate),
            cost.map_or_else(none, human::number),
            flop(result.flops_per_token),
            cost.map_or_else(none, |it| human::number(it * 1e9 / result.flops_per_token)),
            ours.utilisation.map_or_else(none, human::percent),
            ours.memory().map_or_else(none, human::bytes),
        ]);
    }
    table.notes.push(
        "per token: operations, which grow with a row's length by attention's share alone and with a model by its \
         weights. What ms/GFLOP then still changes is not arithmetic: few rows a product and fixed costs a step \
         where it falls towards longer rows and larger models, memory traffic of scores where it rises."
            .into(),
    );
    table
}

fn goals(results: &Results) -> Table {
    let mut table = Table::new("What has to hold", &["", "asked for", "measured", ""]);
    table.words = vec![3];
    for goal in &results.goals {
        let holds = match goal.holds {
            Some(true) => "yes",
            Some(false) => "NO",
            None => "n/a",
        };
        table.rows.push(vec![
            goal.what.clone(),
            goal.asked.clone(),
            goal.shown.clone(),
            holds.into(),
        ]);
    }
    table
}

/// The machine and the program in a line.
pub(super) fn heading(results: &Results) -> String {
    let machine = &results.machine;
    let memory = machine
        .memory
        .map_or_else(String::new, |bytes| format!(", {}", human::bytes(bytes)));
    let vectors = match machine.vectors.is_empty() {
        true => String::new(),
        false => format!(", {}", machine.vectors.join(" ")),
    };
    format!(
        "{}, {}{vectors}{memory}, {}; {}; trainer {}",
        machine.processor,
        human::counted(machine.threads as u64, "thread"),
        machine.system,
        results.device.name,
        results.version,
    )
}

/// Everything, to be pasted into BENCHMARKS.md.
pub(super) fn markdown(results: &Results) -> String {
    let mut text = format!("## Measured\n\nMachine: {}.\n", heading(results));
    for table in tables(results) {
        text += &format!("\n{}", table.markdown());
    }
    for result in results
        .scenarios
        .iter()
        .filter(|result| result.name != "scaling")
    {
        text += &format!("\nContenders of {} ({}):\n\n", result.name, result.title);
        for measured in &result.contenders {
            text += &format!("- {}: {}\n", measured.name, measured.description);
        }
    }
    text += &format!("\n{}\n", results.flops_counted);
    text
}

fn none() -> String {
    NONE.into()
}

/// The fastest first, for the plot.
pub(super) fn by_speed(result: &ScenarioResult) -> Vec<&Measured> {
    let mut all: Vec<&Measured> = result.contenders.iter().collect();
    let speed = |it: &Measured| median(&it.speeds()).unwrap_or(0.0);
    all.sort_by(|a, b| speed(b).total_cmp(&speed(a)));
    all
}
