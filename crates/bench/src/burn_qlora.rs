//! The same training as a Burn user writes it: [`BurnLlama`] with Burn's `apply_qlora`, trained
//! through one autodiff graph.

use std::collections::HashMap;
use std::time::Instant;

use burn::module::{Lora, Module, ModuleMapper, Param, ParamGroup, ParamId, QLora, Quantizer};
use burn::optim::{GradientsAccumulator, GradientsParams, ModuleOptimizer};
use burn::tensor::activation::log_softmax;
use burn::tensor::quantization::{Calibration, QuantScheme, QuantValue, ScaleDtype};
use burn::tensor::{Device, FloatDType, Int, Tensor, TensorData};
use llama_burn::LlamaConfig;
use lora_core::{LoraConfig, Quantization};

use super::burn_llama::BurnLlama;
use super::error::BenchError;
use super::ours::{StepReport, peak_memory, sync};
use super::protocol::{Loaded, PeakMemory, Phases, Row, WorkerSpec};
use super::random_model;
use device::{ModelLoader, ModelOptions, Selected};
use peft::{AdapterTensors, read_adapter};
use train_step::optimizer::AdamW;

/// A model in training, as in Burn's documentation.
pub(super) struct BurnQlora {
    model: BurnLlama,
    optimizer: ModuleOptimizer,
    rows: Vec<Row>,
    learning_rate: f64,
    device: Device,
}

impl BurnQlora {
    /// Loads the model, quantizes it with Burn's quantizer and applies the initial adapter.
    ///
    /// # Errors
    ///
    /// An error of the model's files or the adapter.
    pub fn load(spec: &WorkerSpec, selected: &Selected) -> Result<(Self, Loaded), BenchError> {
        let started = Instant::now();
        let config = LlamaConfig::from_file(&spec.model)?;
        let (adapter_config, adapter) = read_adapter(&spec.adapter)?;
        let options = ModelOptions {
            compute_dtype: Some(FloatDType::F32),
            quantization: Quantization::None,
            autodiff: true,
            ..ModelOptions::default()
        };
        let loader = ModelLoader::on(&spec.model, config, selected.clone(), options)?;
        let (model, device) = (random_model::load(spec, &loader)?, loader.device());
        let model = BurnLlama::new(model, &loader.config);
        let model = with_adapters(model, &adapter_config.lora, &adapter, &device)?;
        let burn = Self {
            model,
            optimizer: AdamW::default().init(),
            rows: spec.rows.clone(),
            learning_rate: spec.learning_rate,
            device,
        };
        sync(&burn.device)?;
        let loaded = Loaded {
            description:
                "8-bit base in blocks of 32, f32, one autodiff graph, logits at every position"
                    .into(),
            seconds: started.elapsed().as_secs_f64(),
            memory: burn.memory(),
        };
        Ok((burn, loaded))
    }

    /// Trains on one step's micro-batches.
    ///
    /// # Errors
    ///
    /// If the device fails.
    pub fn step(mut self, micro_batches: &[Vec<usize>]) -> Result<(Self, StepReport), BenchError> {
        let mut phases = Phases::default();
        let mut gradients = GradientsAccumulator::new();
        let rows = micro_batches.iter().flatten();
        let targets: usize = rows.map(|row| supervised(&self.rows[*row])).sum();
        let (mut loss_sum, mut computed_tokens) = (0.0, 0);
        for indices in micro_batches {
            let started = Instant::now();
            let batch = Padded::new(indices.iter().map(|index| &self.rows[*index]), &self.device);
            let padded = Instant::now();
            computed_tokens += batch.ids.shape().num_elements() as u64;
            let logits = self.model.forward(batch.ids.clone());
            let scored = Instant::now();
            let loss = batch.loss_sum(logits) / targets as f64;
            loss_sum += loss.clone().into_scalar::<f32>() as f64;
            let known = Instant::now();
            let graph = loss.backward();
            gradients.accumulate(&self.model, GradientsParams::from_grads(graph, &self.model));
            sync(&self.device)?;
            phases.add(Phases {
                data: (padded - started).as_secs_f64(),
                pass: padded.elapsed().as_secs_f64(),
                forward: Some((scored - padded).as_secs_f64()),
                loss: Some((known - scored).as_secs_f64()),
                backward: Some(known.elapsed().as_secs_f64()),
                optimizer: 0.0,
            });
        }
        let started = Instant::now();
        self.model = self
            .optimizer
            .step(self.learning_rate, self.model, gradients.grads());
        sync(&self.device)?;
        phases.optimizer = started.elapsed().as_secs_f64();
        let report = StepReport {
            loss: loss_sum,
            computed_tokens,
            phases,
        };
        Ok((self, report))
    }

    /// The process's memory and the device's.
    pub fn memory(&self) -> PeakMemory {
        peak_memory(&self.device.clone().without_autodiff())
    }
}

/// Quantizes the layers' linear weights and adapts those that `lora` selects, with the factors of `adapter`.
fn with_adapters(
    model: BurnLlama,
    lora: &LoraConfig,
    adapter: &AdapterTensors,
    device: &Device,
) -> Result<BurnLlama, BenchError> {
    let scheme = QuantScheme::default()
        .with_value(QuantValue::Q8S)
        .per_block([lora_core::BLOCK as u8], ScaleDtype::F32);
    let mut quantizer = Quantizer::new(Calibration::MinMax, scheme);
    let (mut linears, mut adapted) = (Vec::new(), Vec::new());
    for (index, layer) in model.layers.iter().enumerate() {
        for (name, _) in BurnLlama::linears(layer) {
            let module = format!("layers.{index}.{name}");
            if adapter.modules.contains_key(&format!("model.{module}")) {
                adapted.push(format!("{module}.weight"));
            }
            linears.push(format!("{module}.weight"));
        }
    }
    quantizer.set_param_group(ParamGroup::from_paths(linears));
    // Burn's scale is alpha over the rank.
    let burns = Lora::new(lora.r, lora.scale() * lora.r as f64)
        .set_param_group(ParamGroup::from_paths(adapted));
    let model = model.apply_qlora(QLora::new(burns, quantizer));

    let mut factors = HashMap::new();
    for (index, layer) in model.layers.iter().enumerate() {
        for (name, linear) in BurnLlama::linears(layer) {
            let module = format!("model.layers.{index}.{name}");
            let Some(pair) = adapter.modules.get(&module) else {
                continue;
            };
            let Some(made) = linear.weight.adapter() else {
                return Err(BenchError::NoAdapter { module });
            };
            let place = |values: &[f32], shape: [usize; 2]| {
                Tensor::<2>::from_data(TensorData::new(values.to_vec(), shape), device)
            };
            factors.insert(made.a.id, place(&pair.a, [pair.d_in, pair.r]));
            factors.insert(made.b.id, place(&pair.b, [pair.r, pair.d_out]));
        }
    }
    Ok(model.map(&mut Replace(factors)))
}

/// Sets parameters to other values.
struct Replace(HashMap<ParamId, Tensor<2>>);

impl ModuleMapper for Replace {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        match self.0.remove(&param.id) {
            Some(value) => param.map(|old| value.reshape(old.shape()).require_grad()),
            None => param,
        }
    }
}

/// Padded examples with their labels.
struct Padded {
    /// `[rows, length]`.
    ids: Tensor<2, Int>,
    /// The next token at each position, `[rows · length, 1]`.
    targets: Tensor<2, Int>,
    /// 1 for positions in the loss, else 0.
    mask: Tensor<2>,
}

impl Padded {
    fn new<'a>(rows: impl Iterator<Item = &'a Row> + Clone, device: &Device) -> Self {
        let count = rows.clone().count();
        let length = rows.clone().map(|row| row.ids.len()).max().unwrap_or(0);
        let mut ids = vec![0i32; count * length];
        let mut targets = vec![0i32; count * length];
        let mut mask = vec![0f32; count * length];
        for (index, row) in rows.enumerate() {
            for (position, id) in row.ids.iter().enumerate() {
                let place = index * length + position;
                ids[place] = *id as i32;
                if position >= row.prompt_tokens {
                    targets[place - 1] = *id as i32;
                    mask[place - 1] = 1.0;
                }
            }
        }
        let column = [count * length, 1];
        Self {
            ids: Tensor::from_data(TensorData::new(ids, [count, length]), device),
            targets: Tensor::from_data(TensorData::new(targets, column), device),
            mask: Tensor::from_data(TensorData::new(mask, column), device),
        }
    }

    /// The sum of the cross entropies of the positions in the loss.
    fn loss_sum(&self, logits: Tensor<3>) -> Tensor<1> {
        let [rows, length, vocabulary] = logits.dims();
        let log_probabilities = log_softmax(logits.reshape([rows * length, vocabulary]), 1);
        let chosen = log_probabilities.gather(1, self.targets.clone());
        (chosen * self.mask.clone()).sum().neg()
    }
}

fn supervised(row: &Row) -> usize {
    row.ids.len() - row.prompt_tokens
}
