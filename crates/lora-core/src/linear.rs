//! A linear layer with a frozen weight and a trainable LoRA adapter: the module and its construction.

use burn::module::{LoraAdapter, Module, Param};
use burn::nn::Linear;
use burn::tensor::{DType, Tensor, TensorData};

use kernels::{CounterRng, Quantization, kaiming_uniform, normal, quantize};

use crate::method::{adapter_of, attached};
use crate::{AdapterDropout, Init, LoraConfig, LoraError};

/// A linear layer whose weight is frozen, with or without a LoRA adapter:
/// `h = x·W₀ + b + γ·(x·A)·B`.
///
/// The adapter's term is computed from its factors; `W₀ + γ·A·B` is never built. The adapter is stored as in Burn
/// (a [`Reparameterization`](burn::module::Reparameterization) on the weight's [`Param`]), so records, `valid()`, `materialize()`, module visitors and optimizer
/// groups work as for Burn's LoRA. Only the forward and the backward pass differ.
#[derive(Module, Debug)]
pub struct LoraLinear {
    /// The frozen weight W₀, `[d_in, d_out]`, float or quantized, with the adapter:
    /// [`base`](Param::base) is W₀ alone, [`val`](Param::val) would build `W₀ + γ·A·B`.
    pub weight: Param<Tensor<2>>,
    /// The bias, `[d_out]`, frozen unless it requires a gradient.
    pub bias: Option<Param<Tensor<1>>>,
    /// The trained bias of B (PEFT's `lora_bias`), `[d_out]`: it adds γ times its value to the output.
    pub lora_bias: Option<Param<Tensor<1>>>,
    /// Dropout of the adapter's input in training.
    pub dropout: AdapterDropout,
}

impl LoraLinear {
    /// Freezes `linear`, without an adapter.
    pub fn frozen(linear: Linear) -> Self {
        Self {
            weight: linear.weight.set_require_grad(false),
            bias: linear.bias.map(|bias| bias.set_require_grad(false)),
            lora_bias: None,
            dropout: AdapterDropout::new(0.0),
        }
    }

    /// Freezes `linear` and adds an adapter. Its `A` depends on `seed` only and its `B` is zero: until `B` is trained,
    /// the output is that of `linear`, bit for bit. With [`Init::changes_weights`] the adapter is a part of the weight
    /// instead, which the frozen weight lacks; the output is that of `linear` up to rounding.
    ///
    /// # Errors
    ///
    /// If `config` is invalid. Its `target_modules` are not used here: they select layers by name
    /// ([`LoraConfig::selector`]), and a layer does not know its name.
    pub fn new(linear: Linear, config: &LoraConfig, seed: u64) -> Result<Self, LoraError> {
        Self::frozen(linear).with_new_adapter(config, seed)
    }

    /// Adds a new adapter as [`new`](Self::new) does.
    ///
    /// # Errors
    ///
    /// If `config` is invalid or the layer has an adapter. If the adapter is to be taken out of the weight, as
    /// [`LoraConfig::take_out_of`], and for a quantized weight.
    pub fn with_new_adapter(self, config: &LoraConfig, seed: u64) -> Result<Self, LoraError> {
        let device = self.weight.lazy_device();
        let shared = config.shared_matrices([self.dims()], &device);
        self.with_new_adapter_sharing(config, seed, shared.as_ref())
    }

    /// Adds a new adapter that shares these matrices with those of other layers. Without them, as
    /// [`with_new_adapter`](Self::with_new_adapter). They are those of [`LoraConfig::shared_matrices`].
    ///
    /// # Errors
    ///
    /// As [`with_new_adapter`](Self::with_new_adapter), and if the matrices are smaller than the layer.
    pub fn with_new_adapter_sharing(
        self,
        config: &LoraConfig,
        seed: u64,
        shared: Option<&[Tensor<2>; 2]>,
    ) -> Result<Self, LoraError> {
        config.validate()?;
        if config.init.changes_weights() {
            return self.with_part_of_the_weight(config, seed);
        }
        let [d_in, d_out] = self.weight.lazy_shape().dims();
        let device = self.weight.lazy_device();
        if let Some(shared) = shared {
            let vectors = config.method.initial_vectors(config, d_out, &device);
            let scale = config.scale();
            let mut layer = self.with_adapter_of(config.method, shared.clone(), scale, vectors)?;
            layer.dropout = AdapterDropout::new(config.lora_dropout);
            return Ok(layer);
        }
        // Burn keeps persistent allocations, such as parameters, in separate memory pools.
        let (a, b) = device.memory_persistent_allocations((), |_| {
            let mut rng = CounterRng::new(seed);
            let a = match config.init {
                Init::Gaussian => {
                    normal([d_in, config.r], 1.0 / config.r as f64, &mut rng, &device)
                }
                _ => kaiming_uniform(d_in, config.r, &mut rng, &device),
            };
            let options = (&device, a.dtype());
            (a, Tensor::zeros([config.r, d_out], options))
        });
        let mut layer = self.with_adapter(a, b, config.scale())?;
        layer.dropout = AdapterDropout::new(config.lora_dropout);
        if config.lora_bias {
            layer = layer.with_lora_bias(Tensor::zeros([d_out], (&device, DType::F32)));
        }
        layer.with_method(config.method, None)
    }

    /// Adds an adapter that is subtracted from the frozen weight.
    fn with_part_of_the_weight(
        mut self,
        config: &LoraConfig,
        seed: u64,
    ) -> Result<Self, LoraError> {
        if self.adapter().is_some() {
            return Err(LoraError::Already("has an adapter; merge it first"));
        }
        let base = self.weight.base();
        if matches!(base.dtype(), DType::QFloat(_)) {
            return Err(LoraError::Already(
                "has a quantized weight, and this initialization decomposes the original one; add the adapter first, then quantize",
            ));
        }
        let [d_in, d_out] = self.dims();
        let options = (&base.device(), base.dtype());
        let data = base.without_autodiff().into_data().convert::<f32>();
        let mut values: Vec<f32> = data.try_to_vec().map_err(|_| LoraError::NotDecomposed)?;
        let Some(factors) = config.take_out_of(&mut values, [d_in, d_out], seed)? else {
            return Err(LoraError::NotDecomposed);
        };
        let rest = Tensor::from_data(TensorData::new(values, [d_in, d_out]), options);
        let (id, _, mapper) = self.weight.consume();
        self.weight = Param::from_mapped_value(id, rest, mapper).set_require_grad(false);
        let place = |values: Vec<f32>, shape: [usize; 2]| {
            Tensor::from_data(TensorData::new(values, shape), (options.0, DType::F32))
        };
        let a = place(factors.a, [d_in, config.r]);
        let b = place(factors.b, [config.r, d_out]);
        let mut layer = self.with_adapter(a, b, config.scale())?;
        layer.dropout = AdapterDropout::new(config.lora_dropout);
        Ok(layer)
    }

    /// Adds an adapter with these factors and the scale γ.
    ///
    /// # Shapes
    ///
    /// - `a`: `[d_in, r]`
    /// - `b`: `[r, d_out]`
    ///
    /// # Errors
    ///
    /// If the shapes do not fit the weight, or the layer has an adapter.
    pub fn with_adapter(
        mut self,
        a: Tensor<2>,
        b: Tensor<2>,
        scale: f64,
    ) -> Result<Self, LoraError> {
        if self.adapter().is_some() {
            return Err(LoraError::Already("has an adapter; merge it first"));
        }
        let [d_in, d_out] = self.weight.lazy_shape().dims();
        let r = a.dims()[1];
        check_shape("lora_A (transposed)", &a, [d_in, r])?;
        check_shape("lora_B (transposed)", &b, [r, d_out])?;
        if r == 0 {
            return Err(LoraError::ZeroRank);
        }
        let adapter = LoraAdapter {
            a: Param::from_tensor(a),
            b: Param::from_tensor(b),
            scale,
        };
        self.weight = attached(self.weight, adapter);
        Ok(self)
    }

    /// Computes once what does not change while the layer is not trained. Training it afterwards would use old values.
    pub fn for_inference(mut self) -> Self {
        if self.lora_bias.is_some() {
            let added = self.added_bias(DType::F32).map(Param::from_tensor);
            self.bias = added.map(|bias| bias.set_require_grad(false));
            self.lora_bias = None;
        }
        if let Some(adapter) = self.adapter() {
            self.weight = adapter.attach_for_inference(self.bare_weight());
        }
        self
    }

    /// The adapter's trainable tensors in a fixed order: A `[d_in, r]` and B `[r, d_out]`, if they are trained, and the
    /// method's vectors, `[1, width]` each. Empty without an adapter.
    pub fn trainable(&self) -> Vec<&Param<Tensor<2>>> {
        self.adapter()
            .map_or_else(Vec::new, |adapter| adapter.trainable())
    }

    /// Replaces the frozen weight by its quantized form; the adapter stays.
    ///
    /// # Errors
    ///
    /// If the weight is quantized already.
    pub fn quantize(mut self, quantization: Quantization) -> Result<Self, LoraError> {
        let base = quantize(self.weight.base(), quantization)?;
        let base = if self.weight.base().is_autodiff() {
            base.autodiff()
        } else {
            base
        };
        let before = self.weight.clone();
        let (id, _, mapper) = self.weight.consume();
        self.weight = Param::from_mapped_value(id, base, mapper).set_require_grad(false);
        if let Some(adapter) = adapter_of(&before) {
            self.weight = adapter.attach_to(self.weight.clone(), &|| self.dense_base());
        }
        Ok(self)
    }

    /// The layer without its adapter.
    pub fn without_adapter(mut self) -> Self {
        self.weight = self.bare_weight();
        self.lora_bias = None;
        self
    }

    /// The frozen weight without the adapter.
    pub(crate) fn bare_weight(&self) -> Param<Tensor<2>> {
        let base = self.weight.base();
        let (id, _, mapper) = self.weight.clone().consume();
        Param::from_mapped_value(id, base, mapper).set_require_grad(false)
    }

    /// `[d_in, d_out]`.
    pub fn dims(&self) -> [usize; 2] {
        self.weight.lazy_shape().dims()
    }
}

pub(crate) fn check_shape(
    name: &'static str,
    tensor: &Tensor<2>,
    expected: [usize; 2],
) -> Result<(), LoraError> {
    if tensor.dims() == expected {
        Ok(())
    } else {
        Err(LoraError::Shape {
            name,
            expected: expected.to_vec(),
            got: tensor.dims().to_vec(),
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use burn::module::{ModuleVisitor, ParamId};
    use burn::nn::LinearConfig;
    use burn::optim::AdamWConfig;
    use burn::tensor::{Device, Tolerance};

    pub(crate) fn values<const D: usize>(x: &Tensor<D>) -> Vec<f32> {
        x.clone().into_data().try_to_vec().unwrap()
    }

    pub(crate) fn random(shape: [usize; 2], seed: u64, device: &Device) -> Tensor<2> {
        normal(shape, 0.3, &mut CounterRng::new(seed), device)
    }

    fn config(r: usize) -> LoraConfig {
        LoraConfig {
            r,
            ..LoraConfig::default()
        }
    }

    /// A layer with B ≠ 0, γ = 4, and its dense weight, factors and bias.
    pub(crate) fn adapted(device: &Device, quantization: Quantization) -> LoraLinear {
        let linear = LinearConfig::new(64, 96).init(device);
        LoraLinear::frozen(linear)
            .with_adapter(random([64, 4], 1, device), random([4, 96], 2, device), 4.0)
            .unwrap()
            .quantize(quantization)
            .unwrap()
    }

    #[test]
    fn a_new_adapter_leaves_the_output_unchanged_bit_for_bit() {
        let device = Device::flex();
        for quantization in [Quantization::None, Quantization::Bits8, Quantization::Bits4] {
            let linear = LinearConfig::new(64, 96).init(&device);
            let base = LoraLinear::frozen(linear).quantize(quantization).unwrap();
            let x = random([9, 64], 3, &device);
            let before = values(&base.forward(x.clone()));
            let after = values(&base.with_new_adapter(&config(8), 5).unwrap().forward(x));
            let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&before), bits(&after));
        }
    }

    #[test]
    fn an_adapter_that_is_a_part_of_the_weight_leaves_the_output_and_trains() {
        let device = Device::flex().autodiff();
        for init in [Init::Pissa, Init::PissaNiter(4), Init::Olora] {
            let linear = LinearConfig::new(64, 96).init(&device);
            let x = random([9, 64], 3, &device);
            let before = linear.forward(x.clone()).inner();
            let config = LoraConfig { init, ..config(8) };
            let layer = LoraLinear::new(linear.clone(), &config, 5).unwrap();
            let after = layer.forward(x.clone());
            after
                .clone()
                .inner()
                .into_data()
                .assert_approx_eq::<f32>(&before.into_data(), Tolerance::absolute(2e-6));
            let gradients = after.powf_scalar(2.0).sum().backward();
            let [a, _] = layer.adapter().unwrap().factors();
            assert!(a.grad(&gradients).is_some());
            assert!(!layer.weight.base().is_require_grad());
            let rest = values(&layer.weight.base().inner());
            assert_ne!(rest, values(&linear.weight.val().inner()));
            let packed = LoraLinear::frozen(linear)
                .quantize(Quantization::Bits8)
                .unwrap();
            let error = packed.with_new_adapter(&config, 5).unwrap_err();
            assert!(matches!(error, LoraError::Already(_)), "{error}");
        }
    }

    #[test]
    fn records_keep_weight_bias_and_adapter() {
        let device = Device::flex();
        let layer = adapted(&device, Quantization::None);
        let other =
            LoraLinear::new(LinearConfig::new(64, 96).init(&device), &config(4), 9).unwrap();
        let x = random([5, 64], 3, &device);
        let mut loaded = other.load_record(layer.clone().into_record());
        // The scale is configuration, not a tensor: Burn's records leave it to the module.
        assert_eq!(loaded.adapter().unwrap().scale(), 4.0);
        assert_eq!(
            values(&layer.forward(x.clone())),
            values(&loaded.forward(x))
        );
        loaded = loaded.without_adapter();
        assert!(loaded.adapter().is_none());
    }

    #[test]
    fn valid_keeps_the_packed_weight_and_train_restores_only_the_factors() {
        let device = Device::flex().autodiff();
        let layer = adapted(&device, Quantization::Bits8);
        let valid = layer.valid();
        assert!(matches!(valid.weight.base().dtype(), DType::QFloat(_)));
        assert!(!valid.weight.base().is_autodiff());
        let x = random([5, 64], 3, &Device::flex());
        let y = valid.forward(x.clone());
        assert_eq!(values(&layer.forward(x.autodiff()).inner()), values(&y));
        let restored = valid.train();
        let factors = restored.adapter().unwrap().factors();
        assert!(factors.iter().all(Tensor::is_require_grad));
        assert!(!restored.weight.base().is_require_grad());
    }

    #[test]
    fn burns_materialize_returns_the_merged_weight() {
        let device = Device::flex();
        let layer = adapted(&device, Quantization::None);
        let x = random([5, 64], 3, &device);
        let expected = layer.forward(x.clone());
        let merged = layer.materialize();
        assert!(merged.adapter().is_none());
        let tolerance = Tolerance::absolute(2e-5);
        merged
            .forward(x)
            .into_data()
            .assert_approx_eq::<f32>(&expected.into_data(), tolerance);
    }

    #[test]
    fn visitors_and_optimizers_see_the_factors() {
        #[derive(Default)]
        struct Trainable(Vec<ParamId>);
        impl ModuleVisitor for Trainable {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                if param.is_require_grad() {
                    self.0.push(param.id);
                }
            }
        }
        let device = Device::flex().autodiff();
        let layer = adapted(&device, Quantization::Bits8);
        let mut trainable = Trainable::default();
        layer.visit(&mut trainable);
        let ids: Vec<ParamId> = layer.trainable().iter().map(|param| param.id).collect();
        assert_eq!(trainable.0, ids);
        let b = |layer: &LoraLinear| values(&layer.trainable()[1].val());

        let x = random([5, 64], 3, &device);
        let gradients = layer.forward(x).powf_scalar(2.0).sum().backward();
        let gradients = burn::optim::GradientsParams::from_grads(gradients, &layer);
        let before = b(&layer);
        let mut optimizer = AdamWConfig::new().init();
        let trained = optimizer.step(0.01, layer.clone(), gradients);
        assert_ne!(b(&trained), before);
        assert_eq!(
            trained.weight.base().into_data().as_bytes(),
            layer.weight.base().into_data().as_bytes()
        );
    }

    #[test]
    fn what_does_not_fit_is_a_typed_error() {
        let device = Device::flex();
        let layer = || LoraLinear::frozen(LinearConfig::new(8, 16).init(&device));
        let zeros =
            |rows, cols| Tensor::<2>::from_data(TensorData::zeros::<f32, _>([rows, cols]), &device);
        assert!(matches!(
            layer().with_adapter(zeros(9, 2), zeros(2, 16), 1.0).unwrap_err(),
            LoraError::Shape { expected, got, .. } if expected == [8, 2] && got == [9, 2]
        ));
        assert!(matches!(
            layer()
                .with_adapter(zeros(8, 2), zeros(3, 16), 1.0)
                .unwrap_err(),
            LoraError::Shape { .. }
        ));
        let adapted = layer()
            .with_adapter(zeros(8, 2), zeros(2, 16), 1.0)
            .unwrap();
        assert!(matches!(
            adapted.with_new_adapter(&config(2), 0).unwrap_err(),
            LoraError::Already(_)
        ));
    }
}
