//! Determines the device and its roofline in a process of its own.

use std::path::Path;

use llama_burn::{LinearSpec, LlamaConfig};

use super::child::Child;
use super::error::BenchError;
use super::options::BenchOptions;
use super::protocol::{
    Answer, Command, Contender, DeviceDescription, Floors, OursSettings, Product, WorkerSpec,
};

/// The device, and its roofline with this model's products.
///
/// # Errors
///
/// If the device does not start or fails.
pub(super) fn device_and_floors(
    options: &BenchOptions,
    model: &Path,
    folder: &Path,
) -> Result<(DeviceDescription, Floors), BenchError> {
    let config = LlamaConfig::from_file(model)?;
    let spec = WorkerSpec {
        contender: Contender::Ours(OursSettings {
            quant_bits: 8,
            compute_dtype: "auto".into(),
            gradient_checkpointing: None,
            share_prefixes: true,
            in_graph: false,
        }),
        device: options.device.name().into(),
        model: model.into(),
        random_weights: false,
        adapter: folder.join("adapter"),
        learning_rate: 0.0,
        rows: Vec::new(),
        steps: Vec::new(),
    };
    let mut child = Child::start("the device", "floors", &spec, folder, None)?;
    let device = match child.ask(&Command::Describe)? {
        Answer::Device(device) => device,
        other => return Err(child.unexpected(&other)),
    };
    let command = Command::Floors {
        products: products(&config, options.quick, device.on_gpu),
        buffer_bytes: if options.quick { 32 << 20 } else { 1 << 30 },
        repeats: if options.quick { 3 } else { 7 },
    };
    match child.ask(&command)? {
        Answer::Floors(floors) => Ok((device, floors)),
        other => Err(child.unexpected(&other)),
    }
}

/// A large square product, and the model's products with as many rows as a batch has tokens.
fn products(config: &LlamaConfig, quick: bool, on_gpu: bool) -> Vec<Product> {
    const TOKENS: usize = 512;
    let square = match (quick, on_gpu) {
        (true, _) => 256,
        (false, true) => 4096,
        (false, false) => 2048,
    };
    let mut products = vec![Product {
        name: "square".into(),
        shape: [square; 3],
    }];
    for LinearSpec {
        name, d_in, d_out, ..
    } in config.layer_linears()
    {
        let shape = [TOKENS, d_in, d_out];
        let name = name.split('.').next_back().unwrap_or(name);
        match products.iter_mut().find(|product| product.shape == shape) {
            Some(same) => same.name += &format!(", {name}"),
            None => products.push(Product {
                name: name.into(),
                shape,
            }),
        }
    }
    products
}
