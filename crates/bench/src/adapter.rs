//! The adapter that every contender starts from.

use std::path::Path;

use llama_burn::LlamaConfig;
use lora_core::{CounterRng, LoraConfig};

use super::error::BenchError;
use peft::{AdapterConfig, AdapterPair, AdapterTensors, write_adapter};

/// Writes a fresh adapter for a model of this shape into `folder`, in PEFT's layout: `A` uniform in
/// ±1/√d_in as in PEFT, `B` zero. It depends on `seed` only.
///
/// # Errors
///
/// If `lora` is invalid, or the folder cannot be written.
pub(super) fn write_initial(
    folder: &Path,
    model: &LlamaConfig,
    lora: &LoraConfig,
    seed: u64,
) -> Result<(), BenchError> {
    let selector = lora.selector()?;
    let root = CounterRng::new(seed);
    let mut tensors = AdapterTensors::default();
    let layers = 0..model.num_hidden_layers;
    let names = layers.flat_map(|layer| {
        let linears = model.layer_linears().into_iter();
        linears.map(move |linear| {
            let name = format!("model.layers.{layer}.{}", linear.name);
            (name, linear.d_in, linear.d_out)
        })
    });
    for (index, (module, d_in, d_out)) in names.enumerate() {
        if !selector.matches(&module) {
            continue;
        }
        let mut rng = root.fork(index as u64);
        let bound = 1.0 / (d_in as f64).sqrt();
        let a = (0..d_in * lora.r).map(|_| (bound * (2.0 * rng.uniform() - 1.0)) as f32);
        let b = vec![0.0; lora.r * d_out];
        let pair = AdapterPair::new(d_in, lora.r, d_out, a.collect(), b);
        tensors.modules.insert(module, pair);
    }
    let config = AdapterConfig {
        lora: lora.clone(),
        base_model_name_or_path: None,
    };
    Ok(write_adapter(folder, &config, &tensors)?)
}
