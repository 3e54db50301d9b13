//! Forward and backward through the model, layer by layer, without a tape.
//!
//! The forward pass keeps what each layer's backward pass reads ([`llama_burn::LayerPass`]), or with
//! gradient checkpointing (Chen et al., 2016, <https://arxiv.org/abs/1604.06174>) each layer's input
//! only: the backward pass then runs the layer again. Layers below the lowest adapter have no backward
//! pass at all, and the last layer goes on only with the tokens that predict something.

use std::time::Instant;

use burn::module::{Param, ParamId};
use burn::tensor::{IndexingUpdateOp, Int, Shape, Tensor};
use llama_burn::{Activations, DecoderLayer, LayerPass, Llama, PackedContext};
use lora_core::CounterRng;

use crate::flat::{self, FlatGradients, joined};
use crate::loss::{self, Loss, LossOnDevice, LossSums};
use data::Batch;

/// Gradients of the adapters, added up over micro-batches: of the summed loss, not of its mean, and times the loss scale.
///
/// On a GPU nothing of it comes to the host before [`into_mean`](Self::into_mean), which reads once.
#[derive(Debug, Default, Clone)]
pub struct AdapterGradients {
    /// The parameters as the passes came to them. Their ids are random: sums in the ids' order would
    /// differ in the last bits from process to process.
    ids: Vec<ParamId>,
    shapes: Vec<Shape>,
    sum: Option<Tensor<1>>,
    /// The loss scale of the micro-batches so far.
    scale: Option<f64>,
    /// Losses and tokens of the micro-batches so far, but for those in `on_device`.
    totals: LossSums,
    on_device: Vec<LossOnDevice>,
    /// Where the time went. On a GPU, which works on while the program goes ahead, only the sum means
    /// something.
    pub times: PhaseTimes,
}

/// The gradient of a step's mean loss a token.
#[derive(Debug, Clone)]
pub struct MeanGradients {
    /// Clipped.
    pub gradients: FlatGradients,
    /// Their norm before clipping.
    pub norm: f64,
    /// Losses and tokens.
    pub totals: LossSums,
    shapes: Vec<Shape>,
}

impl MeanGradients {
    /// The gradient of a parameter.
    pub fn get(&self, id: ParamId) -> Option<Tensor<2>> {
        part(
            &self.gradients.ids,
            &self.shapes,
            self.gradients.values.as_ref()?,
            id,
        )
    }
}

/// The part of `values` that belongs to the parameter `id`.
fn part(ids: &[ParamId], shapes: &[Shape], values: &Tensor<1>, id: ParamId) -> Option<Tensor<2>> {
    let index = ids.iter().position(|other| *other == id)?;
    let place = flat::places(shapes).swap_remove(index);
    let part = values.clone().narrow(0, place.start, place.len());
    Some(part.reshape(shapes[index].dims::<2>()))
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
    pub fn get(&self, id: ParamId) -> Option<Tensor<2>> {
        let sum = part(&self.ids, &self.shapes, self.sum.as_ref()?, id)?;
        Some(match self.scale {
            Some(scale) if scale != 1.0 => sum.div_scalar(scale),
            _ => sum,
        })
    }

    /// Losses and tokens of the micro-batches so far. On a GPU it waits for them.
    ///
    /// # Panics
    ///
    /// If the device does not return them.
    pub fn totals(&mut self) -> LossSums {
        let on_device = std::mem::take(&mut self.on_device);
        if let Some((_, sums)) = loss::read(None, on_device) {
            self.totals.add(sums);
        }
        self.totals
    }

    /// Adds a micro-batch's gradients.
    fn add(&mut self, gradients: Vec<(ParamId, Tensor<2>)>) {
        if gradients.is_empty() {
            return;
        }
        let (ids, gradients): (Vec<_>, Vec<_>) = gradients.into_iter().unzip();
        let shapes = gradients.iter().map(|gradient| gradient.shape()).collect();
        let flat = gradients.into_iter().map(|gradient| {
            let count = gradient.shape().num_elements();
            gradient.reshape([count])
        });
        let flat = joined(flat.collect());
        match self.sum.take() {
            Some(sum) => {
                assert_eq!(
                    self.ids, ids,
                    "micro-batches come to the same parameters in the same order"
                );
                self.sum = Some(sum + flat);
            }
            None => {
                (self.ids, self.shapes) = (ids, shapes);
                self.sum = Some(flat);
            }
        }
    }

    /// Turns sums into the gradient of the mean loss a token, clipped to a global norm as
    /// `torch.nn.utils.clip_grad_norm_` does. A `max_norm` of 0 does not clip.
    ///
    /// It reads once from the device: norm, losses and hits of all micro-batches together.
    ///
    /// # Panics
    ///
    /// If the device does not return them.
    pub fn into_mean(mut self, max_norm: f64) -> MeanGradients {
        let squares = self.sum.clone().map(|sum| sum.square().sum());
        let read = loss::read(squares, std::mem::take(&mut self.on_device));
        let (squares, sums) = read.unwrap_or_default();
        self.totals.add(sums);
        let scale = self.scale.unwrap_or(1.0);
        let divisor = scale * self.totals.tokens.max(1) as f64;
        let norm = squares.sqrt() / divisor;
        let clip = if max_norm > 0.0 {
            (max_norm / (norm + 1e-6)).min(1.0)
        } else {
            1.0
        };
        MeanGradients {
            gradients: FlatGradients {
                ids: self.ids,
                values: self.sum.map(|sum| sum.mul_scalar(clip / divisor)),
            },
            norm,
            totals: self.totals,
            shapes: self.shapes,
        }
    }
}

/// How the forward pass of a batch is run.
#[derive(Debug, Clone, Copy)]
pub struct PassOptions {
    /// Keep layer inputs only and run each layer again in the backward pass.
    pub gradient_checkpointing: bool,
    /// Fixes the dropout masks of this micro-batch.
    pub dropout_seed: u64,
    /// What the loss is multiplied by on the way back, so that gradients in f16 stay in its range; 1 for other types.
    pub loss_scale: f64,
}

impl Default for PassOptions {
    /// Everything is kept, seed 0, no loss scale.
    fn default() -> Self {
        Self {
            gradient_checkpointing: false,
            dropout_seed: 0,
            loss_scale: 1.0,
        }
    }
}

/// Runs a micro-batch forward and backward and adds its loss and gradients to `into`.
///
/// The result does not depend on `gradient_checkpointing`; memory and time do.
///
/// # Panics
///
/// If a micro-batch before it had another loss scale; and as the device does.
pub fn accumulate(model: &Llama, batch: &Batch, options: PassOptions, into: &mut AdapterGradients) {
    let scale = *into.scale.get_or_insert(options.loss_scale);
    assert_eq!(scale, options.loss_scale, "one loss scale for a step");
    let started = Instant::now();
    let mut passes = Passes::new(model, batch, Some(options.dropout_seed));
    let lowest = lowest_adapted(model);
    let mut hidden = passes.take_embedded();
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

    let mut gradients = Vec::new();
    let mut add =
        |param: &Param<Tensor<2>>, gradient| add_gradient(&mut gradients, param, gradient);
    let (sums, gradient) =
        loss::loss_and_gradient(model, hidden, batch, &passes.targets, scale, &mut add);
    let mut gradient = Some(passes.spread(gradient, batch.tokens.ids.len()));
    match sums {
        Loss::Known(sums) => into.totals.add(sums),
        Loss::OnDevice(loss) => into.on_device.push(loss),
    }
    let loss = started.elapsed();

    for index in (lowest..model.layers.len()).rev() {
        let (Some((input, activations)), Some(above)) = (kept.pop(), gradient.take()) else {
            break;
        };
        let pass = passes.layer(index);
        let activations = activations.unwrap_or_else(|| pass.forward(&input).1);
        let mut add =
            |param: &Param<Tensor<2>>, gradient| add_gradient(&mut gradients, param, gradient);
        let needed = index > lowest || model.embed_rows.is_some();
        gradient = pass.backward(&input, activations, above, needed, &mut add);
    }
    if let (Some(rows), Some(gradient)) = (&model.embed_rows, gradient) {
        let mut add =
            |param: &Param<Tensor<2>>, gradient| add_gradient(&mut gradients, param, gradient);
        rows.embeddings_backward(&batch.tokens.ids, gradient, &mut add);
    }
    into.add(gradients);
    into.times.forward_s += forward.as_secs_f64();
    into.times.loss_s += (loss - forward).as_secs_f64();
    into.times.backward_s += (started.elapsed() - loss).as_secs_f64();
}

/// Takes a gradient; of a parameter that came before, as the head's adapter does with every piece of the loss, it
/// is added.
fn add_gradient(
    all: &mut Vec<(ParamId, Tensor<2>)>,
    param: &Param<Tensor<2>>,
    gradient: Tensor<2>,
) {
    match all.iter().position(|(id, _)| *id == param.id) {
        Some(index) => {
            let sum = &mut all[index].1;
            *sum = sum.clone() + gradient;
        }
        None => all.push((param.id, gradient)),
    }
}

/// As [`accumulate`], the plain way: the whole model on Burn's tape. What the written-out passes are
/// compared with.
pub fn accumulate_in_graph(
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
    let (sums, loss) = loss::loss_in_graph(model, hidden.select(0, positions), batch);
    into.totals.add(sums);
    let mut of_loss = loss.backward();
    let params = model.trainable().flat_map(|(_, params)| params);
    let gradients = params.filter_map(|param| {
        let gradient = param.val().grad_remove(&mut of_loss)?;
        Some((param.id, gradient))
    });
    into.add(gradients.collect());
}

/// Loss of a batch without a backward pass and without dropout.
pub fn evaluate(model: &Llama, batch: &Batch) -> LossSums {
    let mut passes = Passes::new(model, batch, None);
    let mut hidden = passes.take_embedded();
    for index in 0..model.layers.len() {
        hidden = passes.layer(index).forward(&hidden).0;
    }
    loss::loss(model, passes.supervised(hidden), batch, &passes.targets).sums()
}

/// The passes of a batch through the layers.
struct Passes<'a> {
    model: &'a Llama,
    context: PackedContext,
    embedded: Option<Tensor<2>>,
    /// The positions that predict something.
    supervised: Tensor<1, Int>,
    /// The tokens that they predict.
    targets: Tensor<1, Int>,
    dropout_seeds: Option<CounterRng>,
}

impl<'a> Passes<'a> {
    fn new(model: &'a Llama, batch: &Batch, dropout_seed: Option<u64>) -> Self {
        let lists = [&batch.target_positions[..], &batch.target_ids];
        let inputs = model.manual_inputs(&batch.tokens, lists);
        let [supervised, targets] = inputs.indices;
        Self {
            model,
            context: inputs.context,
            embedded: Some(inputs.hidden),
            supervised,
            targets,
            dropout_seeds: dropout_seed.map(CounterRng::new),
        }
    }

    /// The embeddings, which the first layer gets.
    fn take_embedded(&mut self) -> Tensor<2> {
        match self.embedded.take() {
            Some(embedded) => embedded,
            None => unreachable!("a batch is embedded once"),
        }
    }

    fn layer(&self, index: usize) -> LayerPass<'_> {
        let seeds = self.dropout_seeds.as_ref();
        LayerPass {
            layer: &self.model.layers[index],
            context: &self.context,
            dropout_seed: seeds.map(|seeds| seeds.fork(index as u64).next_u64()),
            output_positions: self.narrows(index).then_some(&self.supervised),
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
        if self.narrows(self.model.layers.len().saturating_sub(1)) {
            hidden
        } else {
            hidden.select(0, self.supervised.clone())
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

/// The first layer with an adapter; nothing below it needs a gradient. Trained embeddings are below all.
fn lowest_adapted(model: &Llama) -> usize {
    if model.embed_rows.is_some() {
        return 0;
    }
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
