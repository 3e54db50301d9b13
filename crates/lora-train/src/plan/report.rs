//! A plan as text.

use llama_burn::LlamaConfig;
use lora_core::{LoraError, Quantization};

use super::{Part, Plan, PlanOptions};
use device::{Backend, DeviceMemory, Known};
use terminal::human;

impl Plan {
    /// The plan as a table: parameters and memory by part, then the peak. The micro-batch is described as
    /// [`Workload::largest`](super::Workload::largest) assumes it.
    pub fn lines(&self, model: &LlamaConfig, options: &PlanOptions) -> Vec<String> {
        let row = |part: &Part| {
            let parameters = part.parameters.map_or(String::new(), human::count);
            vec![
                format!("  {}", part.name),
                parameters,
                human::bytes(part.bytes),
            ]
        };
        let total = |name: &str, parameters: Option<u64>, bytes: u64| {
            let parameters = parameters.map_or(String::new(), human::count);
            vec![name.to_string(), parameters, human::bytes(bytes)]
        };
        let heading = |texts: [&str; 3]| texts.map(String::from).to_vec();
        let sum = |parts: &[Part]| parts.iter().map(|part| part.bytes).sum();

        let mut rows = vec![heading(["", "parameters", "memory"])];
        rows.push(total(
            "base model, frozen",
            Some(self.counts.frozen),
            self.base_bytes(),
        ));
        rows.extend(self.base.iter().map(row));
        rows.push(total(
            "training",
            Some(self.counts.trainable),
            sum(&self.adapters),
        ));
        rows.extend(self.adapters.iter().map(row));
        let step = format!("peak of a step, in {}", self.phase);
        rows.push(total(&step, None, sum(&self.step)));
        rows.extend(self.step.iter().map(row));
        if self.program > 0 {
            rows.push(total("program and tokenizer", None, self.program));
        }
        rows.push(total("predicted peak", None, self.peak()));

        let mut lines = vec![shape(model), String::new()];
        lines.extend(human::columns(&rows, &[1, 2]));
        lines.push(String::new());
        lines.push(format!(
            "trainable: {} parameters in {}; {} frozen (1 : {})",
            human::count(self.counts.trainable),
            human::counted(self.counts.adapted_modules as u64, "module"),
            human::count(self.counts.frozen),
            ratio(self.counts.ratio()),
        ));
        let workload = options.workload;
        lines.push(format!(
            "assumed micro-batch: {}, each of {} (the longest that max_seq_len and the model allow), all in the loss; \
             the data is not read",
            human::counted(workload.rows as u64, "example"),
            human::counted(workload.longest_row as u64, "token"),
        ));
        if !options.on_gpu {
            for (part, peak) in [
                (&self.loading, self.loading_peak()),
                (&self.saving, self.saving_peak()),
            ] {
                lines.push(format!(
                    "{}: {} including the base model",
                    part.name,
                    human::bytes(peak)
                ));
            }
        }
        lines
    }

    /// Whether the run fits a device with so many bytes of memory, as a sentence.
    pub fn against(&self, device_memory: u64, on_gpu: bool) -> String {
        let backend = if on_gpu { Backend::Auto } else { Backend::Cpu };
        let known = Known::Stated;
        let memory = DeviceMemory {
            bytes: device_memory,
            known,
        };
        let (needed, usable) = (self.resident_peak(), memory.usable(backend));
        format!(
            "device_memory = {}, of which a run may use {}: this run {}",
            human::bytes(device_memory),
            human::bytes(usable),
            if needed <= usable {
                "fits"
            } else {
                "does not fit"
            }
        )
    }
}

/// The predicted peak under other settings: a table by number of bits, with gradient checkpointing
/// on and off.
///
/// # Errors
///
/// As [`Plan::new`].
pub fn alternatives(model: &LlamaConfig, options: &PlanOptions) -> Result<Vec<String>, LoraError> {
    let peak = |quantization, gradient_checkpointing| {
        let options = PlanOptions {
            quantization,
            gradient_checkpointing,
            ..options.clone()
        };
        Plan::new(model, &options).map(|plan| human::bytes(plan.peak()))
    };
    let heading = ["predicted peak, gradient checkpointing", "on", "off"];
    let mut rows = vec![heading.map(String::from).to_vec()];
    for (bits, quantization) in [
        (4, Quantization::Bits4),
        (8, Quantization::Bits8),
        (16, Quantization::None),
    ] {
        let name = format!("  quant_bits = {bits}");
        rows.push(vec![
            name,
            peak(quantization, true)?,
            peak(quantization, false)?,
        ]);
    }
    Ok(human::columns(&rows, &[1, 2]))
}

/// The model's shape in a line.
pub fn shape(model: &LlamaConfig) -> String {
    format!(
        "{} layers, hidden {}, feed-forward {}, {} query and {} key heads of {}, vocabulary {}{}",
        model.num_hidden_layers,
        human::count(model.hidden_size as u64),
        human::count(model.intermediate_size as u64),
        model.num_attention_heads,
        model.num_key_value_heads,
        model.head_dim,
        human::count(model.vocab_size as u64),
        if model.tie_word_embeddings {
            ", tied"
        } else {
            ""
        },
    )
}

/// With one decimal and thousands separators: `6,332.7`.
fn ratio(ratio: f64) -> String {
    let tenths = (ratio * 10.0).round() as u64;
    format!("{}.{}", human::count(tenths / 10), tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{llama, options, smollm2};
    use super::*;

    #[test]
    fn the_table_has_every_number_with_separators_in_columns() {
        let model = llama([128_256, 8192, 28_672, 80], [64, 8], false);
        let options = options(4);
        let lines = Plan::new(&model, &options).unwrap().lines(&model, &options);
        let text = lines.join("\n");
        for part in [
            "80 layers, hidden 8,192",
            "70,553,706,496",
            "11,141,120",
            "(1 : 6,332.7)",
            "240 modules",
            "adapters: q_proj, k_proj, v_proj, r 4, f32",
            "predicted peak",
        ] {
            assert!(text.contains(part), "{part:?} in\n{text}");
        }
        let start = lines
            .iter()
            .position(|line| line.contains("memory"))
            .unwrap();
        let rows = lines[start..].iter().take_while(|line| !line.is_empty());
        let ends: Vec<usize> = rows.map(|row| console::measure_text_width(row)).collect();
        assert!(
            ends.iter().all(|end| *end == ends[0] && *end <= 100),
            "{text}"
        );
    }

    #[test]
    fn alternatives_rise_with_bits_and_without_checkpointing() {
        let lines = alternatives(&smollm2(), &options(8)).unwrap();
        assert_eq!(lines.len(), 4);
        assert!(lines[3].contains("quant_bits = 16"));
        let plan = |quantization, gradient_checkpointing| {
            let options = PlanOptions {
                quantization,
                gradient_checkpointing,
                ..options(8)
            };
            Plan::new(&smollm2(), &options).unwrap().peak()
        };
        assert!(plan(Quantization::None, true) > plan(Quantization::Bits8, true));
        assert!(plan(Quantization::Bits8, false) > plan(Quantization::Bits8, true));
    }
}
