//! The forward and backward pass of a micro-batch, layer by layer, outside an autodiff graph.
//!
//! The forward pass saves what each layer's backward pass reads ([`llama_burn::LayerPass`]). With gradient
//! checkpointing (Chen et al., 2016, <https://arxiv.org/abs/1604.06174>) it saves each layer's input only, and the
//! backward pass runs the layer again. Layers before the first one that is trained have no backward pass, and the last
//! layer computes its output for the loss positions only.
//!
//! The loss is computed in chunks of positions, so that the logits of a large vocabulary are never all in memory and
//! no buffer is larger than a graphics driver binds. Unlike chunks of the vocabulary, chunks of positions need no
//! second pass over the logits.

use std::ops::Range;
use std::time::Instant;

use burn::module::{Param, ParamId};
use burn::tensor::{IndexingUpdateOp, Int, Tensor};
use data::Batch;
use kernels::{CrossEntropy, LossTerms, Targets, logits_bytes};
use llama_burn::{Activations, DecoderLayer, HiddenGradient, LayerPass, Llama, PackedContext};
use lora_core::CounterRng;

use crate::gradients::AdapterGradients;
use crate::loss::{Loss, LossOnDevice, LossSums, counted, positions_at_once};

/// How the passes of a batch run.
#[derive(Debug, Clone, Copy)]
pub struct PassOptions {
    /// Save layer inputs only and run each layer again in the backward pass.
    pub gradient_checkpointing: bool,
    /// Fixes the dropout masks of this micro-batch.
    pub dropout_seed: u64,
    /// Factor on the loss in the backward pass, so that gradients in f16 stay in its range; 1 for other types.
    pub loss_scale: f64,
}

impl Default for PassOptions {
    /// No gradient checkpointing, seed 0, no loss scale.
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
/// If an earlier micro-batch had another loss scale, or the device fails.
pub fn accumulate(model: &Llama, batch: &Batch, options: PassOptions, into: &mut AdapterGradients) {
    let scale = *into.scale.get_or_insert(options.loss_scale);
    assert_eq!(scale, options.loss_scale, "one loss scale per step");
    let started = Instant::now();
    let mut passes = Passes::new(model, batch, Some(options.dropout_seed));
    let lowest = lowest_trained(model);
    let mut hidden = passes.take_embedded();
    let mut saved: Vec<(Tensor<2>, Option<Activations>)> = Vec::new();
    for index in 0..model.layers.len() {
        let (output, activations) = passes.layer(index).forward(&hidden);
        if index >= lowest {
            let activations = (!options.gradient_checkpointing).then_some(activations);
            saved.push((hidden, activations));
        }
        hidden = output;
    }
    let hidden = passes.at_loss_positions(hidden);
    let forward = started.elapsed();

    let mut gradients = Vec::new();
    let mut add =
        |param: &Param<Tensor<2>>, gradient| add_gradient(&mut gradients, param, gradient);
    let (sums, d_hidden) =
        loss_and_gradient(model, hidden, batch, &passes.targets, scale, &mut add);
    let d_output = passes.scatter(d_hidden, batch.tokens.ids.len());
    let mut d_output = Some(HiddenGradient::from(d_output));
    match sums {
        Loss::Known(sums) => into.totals.add(sums),
        Loss::OnDevice(loss) => into.on_device.push(loss),
    }
    let loss = started.elapsed();

    for index in (lowest..model.layers.len()).rev() {
        let (Some((input, activations)), Some(gradient)) = (saved.pop(), d_output.take()) else {
            break;
        };
        let pass = passes.layer(index);
        let activations = activations.unwrap_or_else(|| pass.forward(&input).1);
        let mut add =
            |param: &Param<Tensor<2>>, gradient| add_gradient(&mut gradients, param, gradient);
        let needed = index > lowest || trains_embedding(model);
        d_output = pass.backward(&input, activations, gradient, needed, &mut add);
    }
    if let Some(d_embeddings) = d_output.filter(|_| trains_embedding(model)) {
        let mut add =
            |param: &Param<Tensor<2>>, gradient| add_gradient(&mut gradients, param, gradient);
        let ids = &batch.tokens.ids;
        let table = &model.embed_tokens;
        table.gradient_of_rows(ids, &d_embeddings.whole, &mut add);
        if let Some(rows) = &model.embed_rows {
            rows.embeddings_backward(ids, d_embeddings.whole, &mut add);
        }
    }
    into.add(gradients);
    into.times.forward_s += forward.as_secs_f64();
    into.times.loss_s += (loss - forward).as_secs_f64();
    into.times.backward_s += (started.elapsed() - loss).as_secs_f64();
}

/// Adds a parameter's gradient to `all`. What the output layer trains gets one gradient per chunk of the loss.
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

/// Loss of a batch without a backward pass and without dropout.
pub fn evaluate(model: &Llama, batch: &Batch) -> LossSums {
    let mut passes = Passes::new(model, batch, None);
    let mut hidden = passes.take_embedded();
    for index in 0..model.layers.len() {
        hidden = passes.layer(index).forward(&hidden).0;
    }
    loss(
        model,
        passes.at_loss_positions(hidden),
        batch,
        &passes.targets,
    )
    .sums()
}

/// The passes of a batch through the layers.
struct Passes<'a> {
    model: &'a Llama,
    context: PackedContext,
    embedded: Option<Tensor<2>>,
    /// The positions whose next token is in the loss.
    loss_positions: Tensor<1, Int>,
    /// Those next tokens.
    targets: Tensor<1, Int>,
    dropout_seeds: Option<CounterRng>,
}

impl<'a> Passes<'a> {
    fn new(model: &'a Llama, batch: &Batch, dropout_seed: Option<u64>) -> Self {
        let lists = [&batch.target_positions[..], &batch.target_ids];
        let inputs = model.manual_inputs(&batch.tokens, lists);
        let [loss_positions, targets] = inputs.indices;
        Self {
            model,
            context: inputs.context,
            embedded: Some(inputs.hidden),
            loss_positions,
            targets,
            dropout_seeds: dropout_seed.map(CounterRng::new),
        }
    }

    /// The embeddings: the first layer's input.
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
            output_positions: self.narrows(index).then_some(&self.loss_positions),
        }
    }

    /// Whether this layer computes its output for the loss positions only. The last layer does, unless dropout draws
    /// masks for all tokens.
    fn narrows(&self, index: usize) -> bool {
        let Some(layer) = self.model.layers.get(index) else {
            return false;
        };
        let linears = layer.linears();
        let drops = linears.iter().any(|(_, linear)| linear.dropout.prob > 0.0);
        index + 1 == self.model.layers.len() && !(drops && self.dropout_seeds.is_some())
    }

    /// The output of the last layer at the loss positions.
    fn at_loss_positions(&self, hidden: Tensor<2>) -> Tensor<2> {
        if self.narrows(self.model.layers.len().saturating_sub(1)) {
            hidden
        } else {
            hidden.select(0, self.loss_positions.clone())
        }
    }

    /// The gradient of the last layer's output from its gradient at the loss positions; `n` tokens.
    fn scatter(&self, gradient: Tensor<2>, n: usize) -> Tensor<2> {
        if self.narrows(self.model.layers.len().saturating_sub(1)) {
            return gradient;
        }
        let shape = [n, gradient.dims()[1]];
        let zeros = Tensor::zeros(shape, (&gradient.device(), gradient.dtype()));
        let positions = self.loss_positions.clone();
        zeros.select_assign(0, positions, gradient, IndexingUpdateOp::Add)
    }
}

/// The first layer that is trained; no layer before it needs a gradient. Trained embeddings come before all layers.
fn lowest_trained(model: &Llama) -> usize {
    if trains_embedding(model) {
        return 0;
    }
    let mut layers = model.layers.iter();
    let lowest = layers.position(DecoderLayer::trains);
    lowest.unwrap_or(model.layers.len())
}

fn trains_embedding(model: &Llama) -> bool {
    model.embed_rows.is_some() || model.embed_tokens.trains()
}

/// Cross entropy over the loss positions.
///
/// # Shapes
///
/// - `hidden`: `[m, hidden]`, the last layer's output at the loss positions
/// - `targets`: `[m]`, the token that follows each of them
pub fn loss(model: &Llama, hidden: Tensor<2>, batch: &Batch, targets: &Tensor<1, Int>) -> Loss {
    let mut sums = ChunkSums::default();
    for chunk in chunks(model, batch) {
        let hidden = hidden.clone().narrow(0, chunk.start, chunk.len());
        logits_gradient(model, &hidden, batch, targets, chunk, 1.0, &mut sums);
    }
    sums.into_loss(batch)
}

/// As [`loss()`]. Also returns the gradient of the summed loss with respect to `hidden`, times `scale`. The gradients
/// of what the output layer trains go to `accumulate`, once per chunk.
pub fn loss_and_gradient(
    model: &Llama,
    hidden: Tensor<2>,
    batch: &Batch,
    targets: &Tensor<1, Int>,
    scale: f64,
    accumulate: &mut dyn FnMut(&Param<Tensor<2>>, Tensor<2>),
) -> (Loss, Tensor<2>) {
    let mut sums = ChunkSums::default();
    let mut gradients = Vec::new();
    for chunk in chunks(model, batch) {
        let hidden = hidden.clone().narrow(0, chunk.start, chunk.len());
        let gradient = logits_gradient(model, &hidden, batch, targets, chunk, scale, &mut sums);
        gradients.push(model.manual_logits_backward(&hidden, gradient, accumulate));
    }
    let gradient = match gradients.len() {
        1 => gradients.remove(0),
        _ => Tensor::cat(gradients, 0),
    };
    (sums.into_loss(batch), gradient)
}

/// Ranges of positions whose logits are in memory together.
fn chunks(model: &Llama, batch: &Batch) -> impl Iterator<Item = Range<usize>> + use<> {
    let at_once = positions_at_once(model.config.vocab_size, logits_bytes(&model.device()));
    let count = batch.target_ids.len();
    (0..count)
        .step_by(at_once)
        .map(move |start| start..count.min(start + at_once))
}

/// Losses and hits of the chunks so far.
#[derive(Default)]
struct ChunkSums {
    loss: f64,
    hits: Vec<bool>,
    on_device: Option<(Vec<Tensor<1>>, Vec<Tensor<1>>)>,
}

impl ChunkSums {
    fn into_loss(self, batch: &Batch) -> Loss {
        match self.on_device {
            None => Loss::Known(counted(self.loss, &self.hits, &batch.targets_per_example)),
            Some((losses, hits)) => Loss::OnDevice(LossOnDevice {
                losses,
                hits,
                targets_per_example: batch.targets_per_example.clone(),
            }),
        }
    }
}

/// The gradient of a chunk's logits, `[m, vocab]`, times `scale`, in the type of the products that read it. Adds the
/// chunk's loss to `sums`.
fn logits_gradient(
    model: &Llama,
    hidden: &Tensor<2>,
    batch: &Batch,
    targets: &Tensor<1, Int>,
    chunk: Range<usize>,
    scale: f64,
    sums: &mut ChunkSums,
) -> Tensor<2> {
    let (m, logits) = (chunk.len(), model.manual_logits(hidden));
    let targets = Targets {
        on_device: targets.clone().narrow(0, chunk.start, m),
        ids: &batch.target_ids[chunk],
    };
    let CrossEntropy { gradient, terms } =
        kernels::cross_entropy(logits, targets, scale, model.dtype());
    match terms {
        LossTerms::OnHost { loss, hits } => {
            sums.loss += loss;
            sums.hits.extend(hits);
        }
        LossTerms::OnDevice { loss, hits } => {
            let (losses, all_hits) = sums.on_device.get_or_insert_default();
            losses.push(loss);
            all_hits.push(hits);
        }
    }
    gradient
}
