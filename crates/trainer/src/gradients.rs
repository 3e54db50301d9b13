//! Forward and backward through the model, layer by layer.
//!
//! burn-autodiff keeps everything that an operation of the forward pass leaves behind until the
//! backward pass is over. Here the forward pass keeps each layer's input only; the backward pass
//! runs a layer again, takes its gradients and drops what it left (gradient checkpointing, Chen et
//! al., 2016, <https://arxiv.org/abs/1604.06174>). Layers below the lowest adapter have no backward
//! pass at all.

use std::collections::BTreeMap;

use burn::module::{Module, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{DType, Gradients, Tensor};
use llama_burn::{DecoderLayer, Llama, PackedContext};
use lora_core::CounterRng;

use crate::data::Batch;
use crate::loss::{self, LossSums};

/// Gradients of the adapters, added up over micro-batches: of the summed loss, not of its mean.
#[derive(Debug, Default, Clone)]
pub struct AdapterGradients {
    sums: BTreeMap<ParamId, Tensor<2>>,
    /// Losses and tokens of the micro-batches so far.
    pub totals: LossSums,
}

impl AdapterGradients {
    /// The summed gradient of a parameter.
    pub fn get(&self, id: ParamId) -> Option<&Tensor<2>> {
        self.sums.get(&id)
    }

    fn collect(&mut self, layer: &DecoderLayer, gradients: &mut Gradients) {
        let adapters = layer
            .linears()
            .into_iter()
            .filter_map(|(_, linear)| linear.adapter());
        for param in adapters.flat_map(|adapter| [&adapter.a, &adapter.b]) {
            self.add(param, gradients);
        }
    }

    fn add(&mut self, param: &Param<Tensor<2>>, gradients: &mut Gradients) {
        if let Some(gradient) = param.val().grad_remove(gradients) {
            let sum = match self.sums.remove(&param.id) {
                Some(sum) => sum + gradient,
                None => gradient,
            };
            self.sums.insert(param.id, sum);
        }
    }

    /// Turns sums into the gradient of the mean loss a token, clipped to a global norm as
    /// `torch.nn.utils.clip_grad_norm_` does, and gives the norm before clipping.
    ///
    /// A `max_norm` of 0 does not clip.
    pub fn into_mean(self, max_norm: f64) -> (GradientsParams, f64) {
        let squares = self
            .sums
            .values()
            .map(|sum| sum.clone().cast(DType::F32).square().sum());
        let squares: Vec<Tensor<1>> = squares.collect();
        // One number is read from the device, not one a tensor.
        let sum = match squares.is_empty() {
            true => 0.0,
            false => Tensor::cat(squares, 0).sum().into_scalar::<f32>() as f64,
        };
        let tokens = self.totals.tokens.max(1) as f64;
        let norm = sum.sqrt() / tokens;
        let clip = match max_norm > 0.0 {
            true => (max_norm / (norm + 1e-6)).min(1.0),
            false => 1.0,
        };
        let mut mean = GradientsParams::new();
        for (id, sum) in self.sums {
            mean.register(id, sum.mul_scalar(clip / tokens));
        }
        (mean, norm)
    }
}

/// How the forward pass of a batch is run.
#[derive(Debug, Clone, Copy)]
pub struct PassOptions {
    /// Keep layer inputs only and run each layer again in the backward pass.
    pub gradient_checkpointing: bool,
    /// Fixes the dropout masks of this micro-batch.
    pub dropout_seed: u64,
}

/// Runs a micro-batch forward and backward and adds its loss and gradients to `into`.
///
/// The result does not depend on `gradient_checkpointing`; memory and time do.
pub fn accumulate(model: &Llama, batch: &Batch, options: PassOptions, into: &mut AdapterGradients) {
    let context = model.context(&batch.tokens);
    let lowest = lowest_adapted(model);
    let seeds = CounterRng::new(options.dropout_seed);
    let seed = |index: usize| Some(seeds.fork(index as u64).next_u64());

    let mut hidden = model.embed(&batch.tokens).inner();
    let mut kept = Vec::new();
    for (index, layer) in model.layers.iter().enumerate() {
        if index < lowest {
            hidden = forward_plain(layer, hidden, &context, None);
            continue;
        }
        // No tape is made that would be thrown away: burn-autodiff frees one only in a later backward pass.
        if options.gradient_checkpointing {
            kept.push((index, hidden.clone(), None));
            hidden = forward_plain(layer, hidden, &context, seed(index));
            continue;
        }
        let input = hidden.autodiff().require_grad();
        let output = layer.forward(input.clone(), &context, seed(index));
        hidden = output.clone().inner();
        kept.push((index, input, Some(output)));
    }

    let positions = loss::token_ids(&batch.target_positions, &hidden.device().without_autodiff());
    let supervised = hidden.clone().select(0, positions.clone());
    let (sums, gradient) = loss::loss_and_gradient(model, supervised, batch);
    into.totals.add(sums);
    let nowhere = hidden.zeros_like();
    let mut gradient =
        nowhere.select_assign(0, positions, gradient, burn::tensor::IndexingUpdateOp::Add);

    while let Some((index, input, output)) = kept.pop() {
        let layer = &model.layers[index];
        let (input, output) = match output {
            Some(output) => (input, output),
            None => {
                let input = input.autodiff().require_grad();
                let output = layer.forward(input.clone(), &context, seed(index));
                (input, output)
            }
        };
        // The derivative of sum(output · gradient) by the output is the gradient, exactly.
        let mut gradients = (output * gradient.clone().autodiff()).sum().backward();
        into.collect(layer, &mut gradients);
        if let Some(below) = input.grad(&gradients) {
            gradient = below;
        }
    }
}

/// Loss of a batch without a tape and without dropout.
pub fn evaluate(model: &Llama, batch: &Batch) -> LossSums {
    let context = model.context(&batch.tokens);
    let mut hidden = model.embed(&batch.tokens).inner();
    for layer in &model.layers {
        hidden = forward_plain(layer, hidden, &context, None);
    }
    let positions = loss::token_ids(&batch.target_positions, &hidden.device());
    loss::loss(model, hidden.select(0, positions), batch)
}

/// The first layer with an adapter; nothing below it needs a gradient.
fn lowest_adapted(model: &Llama) -> usize {
    let adapted = |layer: &DecoderLayer| {
        let linears = layer.linears();
        linears.iter().any(|(_, linear)| linear.adapter().is_some())
    };
    model
        .layers
        .iter()
        .position(adapted)
        .unwrap_or(model.layers.len())
}

/// A layer without a tape; with dropout where a seed is given.
fn forward_plain(
    layer: &DecoderLayer,
    hidden: Tensor<2>,
    context: &PackedContext,
    dropout_seed: Option<u64>,
) -> Tensor<2> {
    // One layer at a time: a snapshot of the whole model would hold all block scales twice.
    layer.valid().forward(hidden, context, dropout_seed)
}
