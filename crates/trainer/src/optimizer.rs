//! AdamW (Loshchilov and Hutter, 2019, <https://arxiv.org/abs/1711.05101>): Burn's, with every
//! hyper-parameter given, because Burn's defaults are not PyTorch's.

use std::collections::HashMap;

use burn::module::{Module, ModuleMapper, Param, ParamId};
use burn::optim::{
    AdamWConfig, AdamWState, AdaptiveMomentumState, DynState, GradientsParams, ModuleOptimizer,
    Optimizer as _,
};
use burn::tensor::{DType, Device, Tensor, TensorData};

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
            states: HashMap::new(),
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

/// Burn's AdamW with each parameter's state in reach. A step's arithmetic is [`ModuleOptimizer`]'s.
pub struct Optimizer {
    adamw: burn::optim::AdamW,
    states: HashMap<ParamId, DynState>,
    /// Steps since the tape was rid of parameters that are gone.
    since_sweep: usize,
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
    pub fn step<M: Module>(
        &mut self,
        learning_rate: f64,
        module: M,
        gradients: GradientsParams,
    ) -> M {
        let module = module.map(&mut Update {
            optimizer: self,
            learning_rate,
            gradients,
        });
        self.since_sweep += 1;
        if self.since_sweep >= SWEEP {
            self.since_sweep = 0;
            sweep(&module);
        }
        module
    }

    /// What is remembered of a parameter of rank `D`; `None` before its first update.
    ///
    /// # Panics
    ///
    /// If the device does not give it back.
    pub fn moments<const D: usize>(&self, id: ParamId) -> Option<Moments> {
        let state = self.states.get(&id)?.downcast_ref::<AdamWState<D>>();
        Some(Moments {
            updates: state.momentum.time,
            first: to_host(state.momentum.moment_1.clone()),
            second: to_host(state.momentum.moment_2.clone()),
        })
    }

    /// Puts back what [`moments`](Self::moments) gave.
    ///
    /// # Panics
    ///
    /// If the lengths are not those of `shape`.
    pub fn set_moments<const D: usize>(
        &mut self,
        id: ParamId,
        moments: Moments,
        shape: [usize; D],
        device: &Device,
    ) {
        let device = device.clone().without_autodiff();
        let place = |values: Vec<f32>| {
            Tensor::<D>::from_data(TensorData::new(values, shape), (&device, DType::F32))
        };
        let momentum = AdaptiveMomentumState::new(
            moments.updates,
            place(moments.first),
            place(moments.second),
        );
        let state = DynState::create(AdamWState::new(momentum), D);
        self.states.insert(id, state);
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
pub(crate) fn to_host<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    let data = tensor.into_data().convert::<f32>();
    let values = data.try_to_vec();
    values.unwrap_or_else(|error| panic!("a tensor cannot be read from the device: {error:?}"))
}

struct Update<'a> {
    optimizer: &'a mut Optimizer,
    learning_rate: f64,
    gradients: GradientsParams,
}

impl ModuleMapper for Update<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (id, tensor, mapper) = param.consume();
        let Some(gradient) = self.gradients.remove::<D>(id) else {
            return Param::from_mapped_value(id, tensor, mapper);
        };
        let strategy = tensor.gradient_checkpointing_strategy();
        let is_trained = tensor.is_require_grad();
        let state = self.optimizer.states.remove(&id).map(DynState::downcast);
        let adamw = &self.optimizer.adamw;
        let (updated, state) = adamw.step(self.learning_rate, tensor.inner(), gradient, state);
        if let Some(state) = state {
            let state = DynState::create::<AdamWState<D>>(state, D);
            self.optimizer.states.insert(id, state);
        }
        let mut updated = updated;
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

    fn gradients(linear: &Linear, scale: f64) -> GradientsParams {
        let device = linear.weight.device();
        let x = Tensor::<2>::from_data([[0.5, -1.0, 2.0], [1.5, 0.25, -0.5]], &device);
        let loss = linear.forward(x).mul_scalar(scale).powf_scalar(2.0).sum();
        GradientsParams::from_grads(loss.backward(), linear)
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
            let update = gradients(&ours, scale);
            ours = optimizer.step(0.01, ours, update);
            assert_eq!(values(&theirs), values(&ours));

            let mut fresh = adamw.resumable();
            let bias = ours.bias.as_ref().unwrap();
            let moments = optimizer.moments::<2>(ours.weight.id).unwrap();
            assert_eq!(moments.updates, step as usize + 1);
            fresh.set_moments(ours.weight.id, moments, [3, 4], &device);
            let moments = optimizer.moments::<1>(bias.id).unwrap();
            fresh.set_moments(bias.id, moments, [4], &device);
            optimizer = fresh;
        }
        assert!(optimizer.moments::<2>(ParamId::new()).is_none());
    }
}
