//! AdamW (Loshchilov and Hutter, 2019, <https://arxiv.org/abs/1711.05101>): Burn's, with every
//! hyper-parameter given, because Burn's defaults are not PyTorch's.
//!
//! All parameters are updated together, as one long tensor: on a GPU a step is a handful of kernel launches, not a few
//! for each of several hundred small tensors. The parameters in the model are parts of that tensor.

use std::collections::HashMap;
use std::ops::Range;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::optim::{AdamWConfig, AdaptiveMomentumState, ModuleOptimizer};
use burn::tensor::{DType, Device, Tensor, TensorData};

use crate::flat::{FlatGradients, joined};

/// AdamW's hyper-parameters, but for the learning rate, which the schedule gives.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Decay of the mean of gradients.
    pub beta_1: f64,
    /// Decay of the mean of squared gradients.
    pub beta_2: f64,
    /// Keeps the division away from zero.
    pub epsilon: f64,
    /// Decoupled weight decay, times the learning rate.
    pub weight_decay: f64,
}

impl Default for AdamW {
    /// PyTorch's, without weight decay: β 0.9 and 0.999, ε 1e-8.
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
    /// An optimizer without state. Clipping is not its affair: Burn clips each tensor by itself, PyTorch
    /// all together ([`AdapterGradients::into_mean`](crate::gradients::AdapterGradients::into_mean)).
    pub fn init(&self) -> ModuleOptimizer {
        self.config().init()
    }

    /// As [`init`](Self::init), with a state that can be taken to the host and put back: what a run that
    /// can be resumed needs. Burn's own record of it is keyed by numbers that each process draws anew, and
    /// loads onto whichever device is the build's first.
    pub fn resumable(&self) -> Optimizer {
        Optimizer {
            adamw: self.config().build(),
            together: None,
            apart: HashMap::new(),
            since_sweep: 0,
        }
    }

    fn config(&self) -> AdamWConfig {
        AdamWConfig::new()
            .with_beta_1(self.beta_1 as f32)
            .with_beta_2(self.beta_2 as f32)
            .with_epsilon(self.epsilon as f32)
            .with_weight_decay(self.weight_decay as f32)
            .with_cautious_weight_decay(false)
            .with_amsgrad(false)
            .with_grad_clipping(None)
    }
}

/// Burn's AdamW over all parameters at once, with each parameter's state in reach. A step's arithmetic is
/// [`ModuleOptimizer`]'s, element for element.
///
/// It keeps the parameters' values: between two steps nothing else may change them.
pub struct Optimizer {
    adamw: burn::optim::AdamW,
    /// The parameters of the last step.
    together: Option<Together>,
    /// What is remembered of parameters that the last step did not update, as before the first step of a run that
    /// goes on.
    apart: HashMap<ParamId, AdaptiveMomentumState<1>>,
    /// Steps since the tape was rid of parameters that are gone.
    since_sweep: usize,
}

/// Parameters that are updated together, one after the other.
struct Together {
    ids: Vec<ParamId>,
    places: HashMap<ParamId, Range<usize>>,
    values: Tensor<1>,
    state: Option<AdaptiveMomentumState<1>>,
}

/// Steps between two sweeps.
const SWEEP: usize = 16;

/// What AdamW remembers of a parameter, on the host.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    /// Updates that the parameter has had.
    pub updates: usize,
    /// Decayed mean of its gradients.
    pub first: Vec<f32>,
    /// Decayed mean of their squares.
    pub second: Vec<f32>,
}

impl Optimizer {
    /// Updates the parameters of `module` that have a gradient.
    ///
    /// # Panics
    ///
    /// If a gradient is not of the module's parameters.
    pub fn step<M: Module>(
        &mut self,
        learning_rate: f64,
        module: M,
        gradients: FlatGradients,
    ) -> M {
        let Some(values) = gradients.values else {
            return module;
        };
        let mut together = match self.together.take() {
            Some(together) if together.ids == gradients.ids => together,
            other => {
                self.take_apart(other);
                self.put_together(&module, gradients.ids)
            }
        };
        let state = together.state.take();
        let (updated, state) =
            kernels::adamw(&self.adamw, learning_rate, together.values, values, state);
        together.state = state;
        let module = module.map(&mut Place {
            places: &together.places,
            values: &updated,
        });
        together.values = updated;
        self.together = Some(together);
        self.since_sweep += 1;
        if self.since_sweep >= SWEEP {
            self.since_sweep = 0;
            sweep(&module);
        }
        module
    }

    /// What is remembered of each parameter by itself.
    fn take_apart(&mut self, together: Option<Together>) {
        let Some((together, state)) = together.and_then(|mut together| {
            let state = together.state.take()?;
            Some((together, state))
        }) else {
            return;
        };
        for (id, place) in together.places {
            let part = |x: &Tensor<1>| x.clone().narrow(0, place.start, place.len());
            let of_parameter = AdaptiveMomentumState::new(
                state.time,
                part(&state.moment_1),
                part(&state.moment_2),
            );
            self.apart.insert(id, of_parameter);
        }
    }

    /// The parameters with these ids, with what is remembered of them.
    fn put_together<M: Module>(&mut self, module: &M, ids: Vec<ParamId>) -> Together {
        let mut values = Values {
            wanted: ids.iter().map(|id| (*id, None)).collect(),
        };
        module.visit(&mut values);
        let mut start = 0;
        let mut places = HashMap::new();
        let values: Vec<Tensor<1>> = ids
            .iter()
            .map(|id| match values.wanted.remove(id).flatten() {
                Some(value) => {
                    let length = value.dims()[0];
                    places.insert(*id, start..start + length);
                    start += length;
                    value
                }
                None => panic!("the model has no parameter {id} that its gradient is of"),
            })
            .collect();
        let states: Vec<_> = ids.iter().map(|id| self.apart.remove(id)).collect();
        let state = match states.iter().flatten().map(|state| state.time).max() {
            None => None,
            Some(time) => {
                let all = states.into_iter().map(|state| match state {
                    Some(state) => {
                        assert_eq!(
                            state.time, time,
                            "parameters that are updated together have had the same number of updates"
                        );
                        (state.moment_1, state.moment_2)
                    }
                    None => panic!("a parameter joins others that have had updates"),
                });
                let (first, second): (Vec<_>, Vec<_>) = all.unzip();
                Some(AdaptiveMomentumState::new(
                    time,
                    joined(first),
                    joined(second),
                ))
            }
        };
        Together {
            ids,
            places,
            values: joined(values),
            state,
        }
    }

    /// What is remembered of a parameter; `None` before its first update.
    ///
    /// # Panics
    ///
    /// If the device does not give it back.
    pub fn moments(&self, id: ParamId) -> Option<Moments> {
        let together = self.together.as_ref();
        let here = together
            .and_then(|together| Some((together.places.get(&id)?, together.state.as_ref()?)));
        let (updates, first, second) = match here {
            Some((place, state)) => {
                let part = |x: &Tensor<1>| x.clone().narrow(0, place.start, place.len());
                (state.time, part(&state.moment_1), part(&state.moment_2))
            }
            None => {
                let state = self.apart.get(&id)?;
                (state.time, state.moment_1.clone(), state.moment_2.clone())
            }
        };
        Some(Moments {
            updates,
            first: to_host(first),
            second: to_host(second),
        })
    }

    /// Puts back what [`moments`](Self::moments) returned, of a parameter whose value is set as well.
    pub fn set_moments(&mut self, id: ParamId, moments: Moments, device: &Device) {
        let together = self.together.take();
        self.take_apart(together);
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
        self.apart.insert(id, momentum);
    }
}

/// Has Burn's tape forget parameters that have been replaced.
///
/// It takes note of every tensor that requires a gradient, about a kilobyte each, and forgets those that are
/// gone only when something is differentiated. Training here differentiates nothing on the tape, so a run
/// would grow by that for every parameter and step.
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
/// If the device does not give them back.
pub fn to_host<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    let data = tensor.into_data().convert::<f32>();
    let values = data.try_to_vec();
    values.unwrap_or_else(|error| panic!("a tensor cannot be read from the device: {error:?}"))
}

/// Finds the values of parameters.
struct Values {
    wanted: HashMap<ParamId, Option<Tensor<1>>>,
}

impl ModuleVisitor for Values {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(value) = self.wanted.get_mut(&param.id) {
            let tensor = param.val().without_autodiff();
            let count = tensor.shape().num_elements();
            *value = Some(tensor.reshape([count]));
        }
    }
}

/// Makes parameters the parts of a long tensor.
struct Place<'a> {
    places: &'a HashMap<ParamId, Range<usize>>,
    values: &'a Tensor<1>,
}

impl ModuleMapper for Place<'_> {
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

    /// Those of the weight and the bias as one tensor.
    fn flat(linear: &Linear, mut gradients: GradientsParams) -> FlatGradients {
        let bias = linear.bias.as_ref().unwrap().id;
        let weight = gradients.remove::<2>(linear.weight.id).unwrap();
        let parts = vec![weight.reshape([12]), gradients.remove::<1>(bias).unwrap()];
        FlatGradients {
            ids: vec![linear.weight.id, bias],
            values: Some(joined(parts)),
        }
    }

    fn values(linear: &Linear) -> Vec<f32> {
        let bias = linear.bias.as_ref().map(|bias| to_host(bias.val()));
        [to_host(linear.weight.val()), bias.unwrap_or_default()].concat()
    }

    #[test]
    fn a_step_is_burn_s_bit_for_bit_and_goes_on_from_moments_that_were_on_the_host() {
        let adamw = AdamW {
            weight_decay: 0.1,
            ..AdamW::default()
        };
        let device = Device::flex().autodiff();
        let mut theirs = LinearConfig::new(3, 4).init(&device);
        let mut ours = theirs.clone();
        let (mut burn, mut optimizer) = (adamw.init(), adamw.resumable());
        for step in 0..6 {
            let scale = 1.0 - 0.1 * f64::from(step);
            let update = gradients(&theirs, scale);
            theirs = burn.step(0.01, theirs, update);
            let update = flat(&ours, gradients(&ours, scale));
            ours = optimizer.step(0.01, ours, update);
            assert_eq!(values(&theirs), values(&ours));
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
