//! Gradients of the adapters, summed over micro-batches and then averaged.
//!
//! [`accumulate`] computes them with the manual passes, [`accumulate_in_graph`] in Burn's autodiff graph.

use std::sync::Arc;

use burn::module::ParamId;
use burn::tensor::{Shape, Tensor};

pub use crate::autodiff::accumulate_in_graph;
use crate::flat::{self, FlatGradients, joined};
use crate::groups::Groups;
use crate::loss::{self, LossOnDevice, LossSums};
pub use crate::manual::{PassOptions, accumulate, evaluate};

/// Gradients of the adapters, summed over micro-batches: of the summed loss, not of its mean, and times the loss scale.
///
/// On a GPU nothing is copied to the host before [`into_mean`](Self::into_mean), which reads once.
#[derive(Debug, Default, Clone)]
pub struct AdapterGradients {
    /// The parameters in the order in which the passes reach them. Ids are random: sums in the order of ids would
    /// differ in the last bits from process to process.
    ids: Vec<ParamId>,
    shapes: Vec<Shape>,
    sum: Option<Tensor<1>>,
    /// What the optimizer does differently. Parameters of a group are next to each other in `ids`.
    groups: Arc<Groups>,
    /// The loss scale of the micro-batches so far.
    pub(crate) scale: Option<f64>,
    /// Losses and tokens of the micro-batches so far, without those in `on_device`.
    pub(crate) totals: LossSums,
    /// Losses that a GPU is still computing.
    pub(crate) on_device: Vec<LossOnDevice>,
    /// Time per phase. On a GPU, which computes asynchronously, only the sum is meaningful.
    pub times: PhaseTimes,
}

/// The gradient of a step's mean loss per token.
#[derive(Debug, Clone)]
pub struct MeanGradients {
    /// With the factor that divides and clips them.
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
        let FlatGradients {
            ids,
            values,
            factor,
        } = &self.gradients;
        let part = part(ids, &self.shapes, values.as_ref()?, id)?;
        Some(part.mul_scalar(*factor))
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
    /// The layers' backward passes, and the forward passes that checkpointing repeats.
    pub backward_s: f64,
}

impl AdapterGradients {
    /// Sums for an optimizer with these groups.
    pub(crate) fn ordered(groups: Arc<Groups>) -> Self {
        Self {
            groups,
            ..Self::default()
        }
    }

    /// The summed gradient of a parameter.
    pub fn get(&self, id: ParamId) -> Option<Tensor<2>> {
        let sum = part(&self.ids, &self.shapes, self.sum.as_ref()?, id)?;
        Some(match self.scale {
            Some(scale) if scale != 1.0 => sum.div_scalar(scale),
            _ => sum,
        })
    }

    /// Losses and tokens of the micro-batches so far. On a GPU this waits for them.
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
    pub(crate) fn add(&mut self, mut gradients: Vec<(ParamId, Tensor<2>)>) {
        if gradients.is_empty() {
            return;
        }
        // Stable: within a group the order is that of the passes.
        let group = |id: &ParamId| self.groups.of(*id);
        gradients.sort_by(|(a, _), (b, _)| group(a).order(&group(b)));
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
                    "micro-batches reach the same parameters in the same order"
                );
                self.sum = Some(sum + flat);
            }
            None => {
                (self.ids, self.shapes) = (ids, shapes);
                self.sum = Some(flat);
            }
        }
    }

    /// Divides the sums to the gradient of the mean loss per token, clipped to a global norm as
    /// `torch.nn.utils.clip_grad_norm_` does. A `max_norm` of 0 does not clip.
    ///
    /// Reads once from the device: norm, losses and hits of all micro-batches together.
    ///
    /// # Panics
    ///
    /// If the device does not return them.
    pub fn into_mean(mut self, max_norm: f64) -> MeanGradients {
        let squares = self.sum.as_ref().map(kernels::sums_of_squares);
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
                values: self.sum,
                factor: clip / divisor,
            },
            norm,
            totals: self.totals,
            shapes: self.shapes,
        }
    }
}
