//! The measurements as tables.

use super::comparison::{flop, losses, none, phases, ratios, speed};
use super::protocol::Floors;
use super::results::{Results, ScenarioResult};
use terminal::Table;
use terminal::human;
use terminal::statistics::Spread;

/// All tables, in the order of reading.
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
        format!("Roofline of {device} (median, smallest, largest)"),
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
    let number = |of: fn(Spread) -> f64| spread.map_or_else(none, |it| human::rate(of(it)));
    vec![
        name,
        size,
        number(|spread| spread.median),
        number(|spread| spread.min),
        number(|spread| spread.max),
        unit.into(),
    ]
}

/// Cost by example length and by model, with the causes of growth that is not linear.
fn scaling(results: &[&ScenarioResult]) -> Table {
    let mut table = Table::new(
        "scaling: cost per token by example length and by model, ours f32",
        &[
            "",
            "tokens/s",
            "ms/token",
            "per token",
            "ms/GFLOP",
            "of peak",
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
        "per token: operations, which grow with the length of an example by attention's share alone and with a model by its \
         weights. What ms/GFLOP then still changes is not arithmetic: few rows per matrix product and fixed costs per step \
         where it falls towards longer examples and larger models, memory traffic of scores where it rises."
            .into(),
    );
    table
}

fn goals(results: &Results) -> Table {
    let mut table = Table::new("Goals", &["", "goal", "measured", "reached"]);
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
    let vectors = if machine.vectors.is_empty() {
        String::new()
    } else {
        format!(", {}", machine.vectors.join(" "))
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

/// All results, to be copied into BENCHMARKS.md.
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
