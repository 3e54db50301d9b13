//! Forward and backward through the model, layer by layer, without a tape.
//!
//! The forward pass keeps what each layer's backward pass reads ([`llama_burn::LayerPass`]), or with
//! gradient checkpointing (Chen et al., 2016, <https://arxiv.org/abs/1604.06174>) each layer's input
//! only: the backward pass then runs the layer again. Layers below the lowest adapter have no backward
//! pass at all, and the last layer goes on only with the tokens that predict something.

use std::collections::BTreeMap;

use std::time::Instant;

use burn::module::{Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{DType, IndexingUpdateOp, Int, Tensor};
use llama_burn::{Activations, DecoderLayer, LayerPass, Llama, PackedContext};
use lora_core::CounterRng;

use crate::data::Batch;
use crate::loss::{self, LossSums};

/// Gradients of the adapters, added up over micro-batches: of the summed loss, not of its mean.
#[derive(Debug, Default, Clone)]
pub struct AdapterGradients {
    sums: BTreeMap<ParamId, Tensor<2>>,
    /// The parameters as the passes came to them. Their ids are random: sums in the ids' order would
    /// differ in the last bits from process to process.
    order: Vec<ParamId>,
    /// Losses and tokens of the micro-batches so far.
    pub totals: LossSums,
    /// Where the time went. On a GPU, which works on while the program goes ahead, only the sum means
    /// something.
    pub times: PhaseTimes,
}

/// Seconds by phase.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
pub struct PhaseTimes {
    /// Embedding and layers.
    pub forward_s: f64,
    /// Final norm, head and loss, forward and backward.
    pub loss_s: f64,
    /// The layers' backward passes, and what checkpointing runs again.
    pub backward_s: f64,
}

impl AdapterGradients {
    /// The summed gradient of a parameter.
    pub fn get(&self, id: ParamId) -> Option<&Tensor<2>> {
        self.sums.get(&id)
    }

    fn add(&mut self, param: &Param<Tensor<2>>, gradient: Tensor<2>) {
        let sum = match self.sums.remove(&param.id) {
            Some(sum) => sum + gradient,
            None => {
                self.order.push(param.id);
                gradient
            }
        };
        self.sums.insert(param.id, sum);
    }

    /// Turns sums into the gradient of the mean loss a token, clipped to a global norm as
    /// `torch.nn.utils.clip_grad_norm_` does, and gives the norm before clipping.
    ///
    /// A `max_norm` of 0 does not clip.
    pub fn into_mean(self, max_norm: f64) -> (GradientsParams, f64) {
        let in_order = self.order.iter().filter_map(|id| self.sums.get(id));
        let squares = in_order.map(|sum| sum.clone().cast(DType::F32).square().sum());
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
    let started = Instant::now();
    let passes = Passes::new(model, batch, Some(options.dropout_seed));
    let lowest = lowest_adapted(model);
    let mut hidden = model.embed(&batch.tokens).inner();
    let mut kept: Vec<(Tensor<2>, Option<Activations>)> = Vec::new();
    for index in 0..model.layers.len() {
        let (output, activations) = passes.layer(index).forward(&hidden);
        if index >= lowest {
            let activations = (!options.gradient_checkpointing).then_some(activations);
            kept.push((hidden, activations));
        }
        hidden = output;
    }
    let hidden = passes.supervised(hidden);
    let forward = started.elapsed();

    let mut collect = |param: &Param<Tensor<2>>, gradient| into.add(param, gradient);
    let (sums, gradient) = loss::loss_and_gradient(model, hidden, batch, &mut collect);
    let mut gradient = passes.spread(gradient, batch.tokens.ids.len());
    into.totals.add(sums);
    let loss = started.elapsed();

    for index in (lowest..model.layers.len()).rev() {
        let Some((input, activations)) = kept.pop() else {
            break;
        };
        let pass = passes.layer(index);
        let activations = activations.unwrap_or_else(|| pass.forward(&input).1);
        let mut collect = |param: &Param<Tensor<2>>, gradient| into.add(param, gradient);
        let below = pass.backward(&input, activations, gradient, index > lowest, &mut collect);
        match below {
            Some(below) => gradient = below,
            None => break,
        }
    }
    into.times.forward_s += forward.as_secs_f64();
    into.times.loss_s += (loss - forward).as_secs_f64();
    into.times.backward_s += (started.elapsed() - loss).as_secs_f64();
}

/// As [`accumulate`], the plain way: the whole model on Burn's tape. What the written-out passes are
/// compared with.
pub fn accumulate_on_tape(
    model: &Llama,
    batch: &Batch,
    dropout_seed: u64,
    into: &mut AdapterGradients,
) {
    let seeds = CounterRng::new(dropout_seed);
    let context = model.context(&batch.tokens);
    let mut hidden = model.embed(&batch.tokens).autodiff();
    for (index, layer) in model.layers.iter().enumerate() {
        let seed = seeds.fork(index as u64).next_u64();
        hidden = layer.forward(hidden, &context, Some(seed));
    }
    let positions = loss::token_ids(&batch.target_positions, &hidden.device().without_autodiff());
    let (sums, loss) = loss::loss_on_tape(model, hidden.select(0, positions), batch);
    into.totals.add(sums);
    let mut gradients = loss.backward();
    for param in model.trainable().flat_map(|(_, params)| params) {
        if let Some(gradient) = param.val().grad_remove(&mut gradients) {
            into.add(param, gradient);
        }
    }
}

/// Loss of a batch without a backward pass and without dropout.
pub fn evaluate(model: &Llama, batch: &Batch) -> LossSums {
    let passes = Passes::new(model, batch, None);
    let mut hidden = model.embed(&batch.tokens).inner();
    for index in 0..model.layers.len() {
        hidden = passes.layer(index).forward(&hidden).0;
    }
    loss::loss(model, passes.supervised(hidden), batch)
}

/// The passes of a batch through the layers.
struct Passes<'a> {
    model: &'a Llama,
    context: PackedContext,
    /// The positions that predict something.
    supervised: Tensor<1, Int>,
    dropout_seeds: Option<CounterRng>,
}

impl<'a> Passes<'a> {
    fn new(model: &'a Llama, batch: &Batch, dropout_seed: Option<u64>) -> Self {
        let device = model.device().without_autodiff();
        Self {
            model,
            context: model.pass_context(&batch.tokens),
            supervised: loss::token_ids(&batch.target_positions, &device),
            dropout_seeds: dropout_seed.map(CounterRng::new),
        }
    }

    fn layer(&self, index: usize) -> LayerPass<'_> {
        let seeds = self.dropout_seeds.as_ref();
        LayerPass {
            layer: &self.model.layers[index],
            context: &self.context,
            dropout_seed: seeds.map(|seeds| seeds.fork(index as u64).next_u64()),
            wanted: self.narrows(index).then_some(&self.supervised),
        }
    }

    /// Whether this layer goes on with the supervised tokens only: the last one does, unless dropout
    /// draws masks for all tokens.
    fn narrows(&self, index: usize) -> bool {
        let Some(layer) = self.model.layers.get(index) else {
            return false;
        };
        let linears = layer.linears();
        let drops = linears.iter().any(|(_, linear)| linear.dropout.prob > 0.0);
        index + 1 == self.model.layers.len() && !(drops && self.dropout_seeds.is_some())
    }

    /// The output of the last layer at the supervised tokens.
    fn supervised(&self, hidden: Tensor<2>) -> Tensor<2> {
        match self.narrows(self.model.layers.len().saturating_sub(1)) {
            true => hidden,
            false => hidden.select(0, self.supervised.clone()),
        }
    }

    /// The gradient of the last layer's output from that at the supervised tokens; `n` tokens.
    fn spread(&self, gradient: Tensor<2>, n: usize) -> Tensor<2> {
        if self.narrows(self.model.layers.len().saturating_sub(1)) {
            return gradient;
        }
        let shape = [n, gradient.dims()[1]];
        let nothing = Tensor::zeros(shape, (&gradient.device(), gradient.dtype()));
        let positions = self.supervised.clone();
        nothing.select_assign(0, positions, gradient, IndexingUpdateOp::Add)
    }
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
