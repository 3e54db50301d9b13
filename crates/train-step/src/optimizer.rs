//! Burn's AdamW (Loshchilov and Hutter, 2019, <https://arxiv.org/abs/1711.05101>). Every hyper-parameter is set
//! explicitly, because Burn's defaults differ from PyTorch's.
//!
//! All parameters are updated together as one flat tensor. On a GPU a step is then a few kernel launches, instead of a
//! few per tensor for several hundred small tensors. The parameters in the model are views of the flat tensor. With
//! groups, such as learning rates of their own (LoRA+), there is one flat tensor, and one launch, per group.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::optim::{AdaptiveMomentumState, ModuleOptimizer};
use burn::tensor::{DType, Device, Tensor, TensorData};

use kernels::AdamWSettings;

use crate::flat::{FlatGradients, joined};
use crate::gradients::AdapterGradients;
use crate::groups::{Group, Groups};

/// AdamW's hyper-parameters except the learning rate, which comes from the schedule.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Decay of the first moment, the mean of gradients.
    pub beta_1: f64,
    /// Decay of the second moment, the mean of squared gradients.
    pub beta_2: f64,
    /// Added to the denominator, so that it is not zero.
    pub epsilon: f64,
    /// Decoupled weight decay, times the learning rate.
    pub weight_decay: f64,
}

impl Default for AdamW {
    /// PyTorch's defaults, but without weight decay: β 0.9 and 0.999, ε 1e-8.
    fn default() -> Self {
        Self {
            beta_1: 0.9,
            beta_2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.0,
        }
    }
}

impl AdamW {
    /// Burn's optimizer, without state and without clipping: Burn clips each tensor separately, PyTorch by the global
    /// norm ([`AdapterGradients::into_mean`](crate::gradients::AdapterGradients::into_mean)).
    pub fn init(&self) -> ModuleOptimizer {
        self.settings().config().init()
    }

    /// As [`init`](Self::init), with a state that can be copied to the host and restored, so that a run can be resumed.
    /// Burn's record of the state is keyed by ids that each process draws anew, and loads onto the build's first
    /// device.
    pub fn resumable(&self) -> Optimizer {
        Optimizer {
            settings: self.settings(),
            groups: Arc::default(),
            flat: Vec::new(),
            separate: HashMap::new(),
            since_sweep: 0,
        }
    }

    fn settings(&self) -> AdamWSettings {
        AdamWSettings {
            beta_1: self.beta_1 as f32,
            beta_2: self.beta_2 as f32,
            epsilon: self.epsilon as f32,
            weight_decay: self.weight_decay as f32,
        }
    }
}

/// Burn's AdamW over all parameters at once, with access to each parameter's state. A step computes the same as
/// [`ModuleOptimizer`], element by element.
///
/// The optimizer keeps the parameters' values: nothing else may change them between two steps.
pub struct Optimizer {
    settings: AdamWSettings,
    /// What differs from the step's settings.
    groups: Arc<Groups>,
    /// The parameters of the last step, in the order of its gradients: one entry per group.
    flat: Vec<Flat>,
    /// The state of parameters that the last step did not update, for example before the first step of a resumed run.
    separate: HashMap<ParamId, AdaptiveMomentumState<1>>,
    /// Steps since the last [`sweep`].
    since_sweep: usize,
}

/// Parameters that are updated together, joined into one tensor.
struct Flat {
    ids: Vec<ParamId>,
    group: Group,
    places: HashMap<ParamId, Range<usize>>,
    values: Tensor<1>,
    state: Option<AdaptiveMomentumState<1>>,
}

/// Steps between two sweeps.
const SWEEP: usize = 16;

/// AdamW's state of a parameter, on the host.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    /// The number of updates so far.
    pub updates: usize,
    /// The first moment: the decayed mean of gradients.
    pub first: Vec<f32>,
    /// The second moment: the decayed mean of squared gradients.
    pub second: Vec<f32>,
}

impl Optimizer {
    /// The same optimizer with learning rates that differ from the step's, as multiples of it. Set them before the
    /// first step. The gradients should come from [`sums`](Self::sums): an update is one launch per run of
    /// parameters of the same group.
    pub fn with_rates(mut self, rates: HashMap<ParamId, f64>) -> Self {
        Arc::make_mut(&mut self.groups).rates = rates;
        self
    }

    /// The same optimizer without weight decay of these parameters. As [`with_rates`](Self::with_rates).
    pub fn with_undecayed(mut self, undecayed: HashSet<ParamId>) -> Self {
        // Without weight decay there is nothing to distinguish.
        if self.settings.weight_decay != 0.0 {
            Arc::make_mut(&mut self.groups).undecayed = undecayed;
        }
        self
    }

    /// Empty sums of gradients, which will have the parameters of each group side by side.
    pub fn sums(&self) -> AdapterGradients {
        AdapterGradients::ordered(Arc::clone(&self.groups))
    }

    /// Updates the parameters of `module` that have a gradient.
    ///
    /// # Panics
    ///
    /// If a gradient does not belong to a parameter of the module.
    pub fn step<M: Module>(
        &mut self,
        learning_rate: f64,
        mut module: M,
        gradients: FlatGradients,
    ) -> M {
        let Some(values) = gradients.values else {
            return module;
        };
        let mut parts = std::mem::take(&mut self.flat);
        if !parts.iter().flat_map(|part| &part.ids).eq(&gradients.ids) {
            self.split(parts);
            let runs = gradients
                .ids
                .chunk_by(|a, b| self.groups.of(*a) == self.groups.of(*b));
            let runs: Vec<_> = runs.map(<[ParamId]>::to_vec).collect();
            parts = runs
                .into_iter()
                .map(|ids| self.join(&module, ids))
                .collect();
        }
        let of_parts = match parts.len() {
            // All of them, whose memory the update may reuse.
            1 => vec![values],
            _ => {
                let counts = parts.iter().map(|part| part.values.dims()[0]);
                let of_parts = counts.scan(0, |start, count| {
                    *start += count;
                    Some(values.clone().narrow(0, *start - count, count))
                });
                of_parts.collect()
            }
        };
        for (mut part, gradients_of_part) in parts.into_iter().zip(of_parts) {
            let mut settings = self.settings;
            if !part.group.decays {
                settings.weight_decay = 0.0;
            }
            let (updated, state) = kernels::adamw(
                settings,
                learning_rate * part.group.rate,
                gradients.factor,
                part.values,
                gradients_of_part,
                part.state.take(),
            );
            part.state = state;
            module = module.map(&mut Views {
                places: &part.places,
                values: &updated,
            });
            part.values = updated;
            self.flat.push(part);
        }
        self.since_sweep += 1;
        if self.since_sweep >= SWEEP {
            self.since_sweep = 0;
            sweep(&module);
        }
        module
    }

    /// Splits the states of flat tensors into one state per parameter.
    fn split(&mut self, parts: Vec<Flat>) {
        for Flat { places, state, .. } in parts {
            let Some(state) = state else {
                continue;
            };
            for (id, place) in places {
                let part = |x: &Tensor<1>| x.clone().narrow(0, place.start, place.len());
                let of_parameter = AdaptiveMomentumState::new(
                    state.time,
                    part(&state.moment_1),
                    part(&state.moment_2),
                );
                self.separate.insert(id, of_parameter);
            }
        }
    }

    /// Joins the parameters with these ids and their states.
    fn join<M: Module>(&mut self, module: &M, ids: Vec<ParamId>) -> Flat {
        let mut values = Values {
            found: ids.iter().map(|id| (*id, None)).collect(),
        };
        module.visit(&mut values);
        let mut start = 0;
        let mut places = HashMap::new();
        let values: Vec<Tensor<1>> = ids
            .iter()
            .map(|id| match values.found.remove(id).flatten() {
                Some(value) => {
                    let length = value.dims()[0];
                    places.insert(*id, start..start + length);
                    start += length;
                    value
                }
                None => {
                    panic!("a gradient belongs to parameter {id}, which the model does not have")
                }
            })
            .collect();
        let states: Vec<_> = ids.iter().map(|id| self.separate.remove(id)).collect();
        let state = match states.iter().flatten().map(|state| state.time).max() {
            None => None,
            Some(time) => {
                let all = states.into_iter().map(|state| match state {
                    Some(state) => {
                        assert_eq!(
                            state.time, time,
                            "parameters that are updated together have the same number of updates"
                        );
                        (state.moment_1, state.moment_2)
                    }
                    None => panic!("a new parameter cannot join parameters that have been updated"),
                });
                let (first, second): (Vec<_>, Vec<_>) = all.unzip();
                Some(AdaptiveMomentumState::new(
                    time,
                    joined(first),
                    joined(second),
                ))
            }
        };
        Flat {
            group: ids
                .first()
                .map_or_else(Group::default, |id| self.groups.of(*id)),
            ids,
            places,
            values: joined(values),
            state,
        }
    }

    /// The state of a parameter; `None` before its first update.
    ///
    /// # Panics
    ///
    /// If it cannot be read from the device.
    pub fn moments(&self, id: ParamId) -> Option<Moments> {
        let mut parts = self.flat.iter();
        let here = parts.find_map(|part| Some((part.places.get(&id)?, part.state.as_ref()?)));
        let (updates, first, second) = match here {
            Some((place, state)) => {
                let part = |x: &Tensor<1>| x.clone().narrow(0, place.start, place.len());
                (state.time, part(&state.moment_1), part(&state.moment_2))
            }
            None => {
                let state = self.separate.get(&id)?;
                (state.time, state.moment_1.clone(), state.moment_2.clone())
            }
        };
        Some(Moments {
            updates,
            first: to_host(first),
            second: to_host(second),
        })
    }

    /// Restores the result of [`moments`](Self::moments), for a parameter whose value is restored too.
    pub fn set_moments(&mut self, id: ParamId, moments: Moments, device: &Device) {
        let parts = std::mem::take(&mut self.flat);
        self.split(parts);
        let device = device.clone().without_autodiff();
        let place = |values: Vec<f32>| {
            let count = values.len();
            Tensor::<1>::from_data(TensorData::new(values, [count]), (&device, DType::F32))
        };
        let momentum = AdaptiveMomentumState::new(
            moments.updates,
            place(moments.first),
            place(moments.second),
        );
        self.separate.insert(id, momentum);
    }
}

/// Makes Burn's autodiff graph drop parameters that have been replaced.
///
/// Burn registers every tensor that requires a gradient, about a kilobyte each, and drops those that no longer exist
/// only in a backward pass. The manual passes run no backward pass in a graph, so that memory would grow with every
/// parameter and step.
fn sweep<M: Module>(module: &M) {
    if let Some(device) = module.devices().into_iter().next() {
        let one = Tensor::<1>::ones([1], &device.autodiff()).require_grad();
        drop((one * 2.0).backward());
    }
}

/// A tensor's values in f32.
///
/// # Panics
///
/// If they cannot be read from the device.
pub fn to_host<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    let data = tensor.into_data().convert::<f32>();
    let values = data.try_to_vec();
    values.unwrap_or_else(|error| panic!("a tensor cannot be read from the device: {error:?}"))
}

/// Finds the values of parameters by their ids.
struct Values {
    found: HashMap<ParamId, Option<Tensor<1>>>,
}

impl ModuleVisitor for Values {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(value) = self.found.get_mut(&param.id) {
            let tensor = param.val().without_autodiff();
            let count = tensor.shape().num_elements();
            *value = Some(tensor.reshape([count]));
        }
    }
}

/// Replaces parameters by views of the flat tensor.
struct Views<'a> {
    places: &'a HashMap<ParamId, Range<usize>>,
    values: &'a Tensor<1>,
}

impl ModuleMapper for Views<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (id, tensor, mapper) = param.consume();
        let Some(place) = self.places.get(&id) else {
            return Param::from_mapped_value(id, tensor, mapper);
        };
        let strategy = tensor.gradient_checkpointing_strategy();
        let is_trained = tensor.is_require_grad();
        let part = self.values.clone().narrow(0, place.start, place.len());
        let mut updated = part.reshape(tensor.dims());
        if let Some(strategy) = strategy {
            updated = updated
                .autodiff()
                .with_gradient_checkpointing_strategy(strategy);
        }
        Param::from_mapped_value(id, updated.set_require_grad(is_trained), mapper)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::nn::{Linear, LinearConfig};
    use burn::optim::GradientsParams;

    fn gradients(linear: &Linear, scale: f64) -> GradientsParams {
        let device = linear.weight.device();
        let x = Tensor::<2>::from_data([[0.5, -1.0, 2.0], [1.5, 0.25, -0.5]], &device);
        let loss = linear.forward(x).mul_scalar(scale).powf_scalar(2.0).sum();
        GradientsParams::from_grads(loss.backward(), linear)
    }

    /// The gradients of weight and bias as one tensor.
    fn flat(linear: &Linear, mut gradients: GradientsParams) -> FlatGradients {
        let bias = linear.bias.as_ref().unwrap().id;
        let weight = gradients.remove::<2>(linear.weight.id).unwrap();
        let parts = vec![weight.reshape([12]), gradients.remove::<1>(bias).unwrap()];
        FlatGradients {
            ids: vec![linear.weight.id, bias],
            values: Some(joined(parts)),
            factor: 1.0,
        }
    }

    fn values(linear: &Linear) -> Vec<f32> {
        let bias = linear.bias.as_ref().map(|bias| to_host(bias.val()));
        [to_host(linear.weight.val()), bias.unwrap_or_default()].concat()
    }

    #[test]
    fn a_step_equals_burns_bit_for_bit_and_continues_from_restored_moments() {
        let adamw = AdamW {
            weight_decay: 0.1,
            ..AdamW::default()
        };
        let device = Device::flex().autodiff();
        let mut reference = LinearConfig::new(3, 4).init(&device);
        let mut ours = reference.clone();
        let (mut burn, mut optimizer) = (adamw.init(), adamw.resumable());
        for step in 0..6 {
            let scale = 1.0 - 0.1 * f64::from(step);
            let update = gradients(&reference, scale);
            reference = burn.step(0.01, reference, update);
            let update = flat(&ours, gradients(&ours, scale));
            ours = optimizer.step(0.01, ours, update);
            assert_eq!(values(&reference), values(&ours));
            if step % 2 == 0 {
                continue;
            }
            let mut fresh = adamw.resumable();
            for id in [ours.weight.id, ours.bias.as_ref().unwrap().id] {
                let moments = optimizer.moments(id).unwrap();
                assert_eq!(moments.updates, step as usize + 1);
                fresh.set_moments(id, moments, &device);
            }
            optimizer = fresh;
        }
        assert!(optimizer.moments(ParamId::new()).is_none());
    }
}
