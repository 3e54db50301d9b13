//! LoRA in any Burn module, by the names of its layers: no layer needs another type.
//!
//! The adapter is attached to the weight of a [`burn::nn::Linear`], as Burn's `apply_lora` does, but with PEFT's settings:
//! targets by name, ranks and alphas per module, PEFT's initialization, modules that are trained as a whole, and an
//! 8-bit base.
//!
//! Burn's `Linear` builds the weight `W₀ + γ·A·B` for each forward pass. Memory and time for one dense weight are
//! therefore needed, also over a quantized base. [`LoraLinear`] never builds it: where memory matters, use it in place of
//! `Linear`. [`adapt`] puts adapters on both.

use std::any::Any;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::nn::Linear;
use burn::tensor::Tensor;
use kernels::{CounterRng, Quantization};

use crate::count::selection;
use crate::selector::kinds;
use crate::{LoraConfig, LoraError, LoraLinear, ModuleSelector};

/// Freezes `module` and puts new adapters on the linear layers that `config` selects. See [`Adapt`] for a seed and an
/// 8-bit base.
///
/// ```
/// use burn::module::Module;
/// use burn::nn::transformer::TransformerEncoderConfig;
/// use burn::tensor::Device;
/// use lora_core::{LoraConfig, TargetModules, adapt};
///
/// let model = TransformerEncoderConfig::new(16, 32, 2, 1).init(&Device::flex().autodiff());
/// let targets = TargetModules::Names(vec!["query".into(), "value".into()]);
/// let config = LoraConfig { r: 2, target_modules: targets, ..LoraConfig::default() };
/// let frozen = model.num_params();
/// let model = adapt(model, &config)?;
/// assert_eq!(model.num_params(), frozen + 2 * (16 * 2 + 2 * 16));
/// # Ok::<(), lora_core::LoraError>(())
/// ```
///
/// # Errors
///
/// As [`Adapt::apply`].
pub fn adapt<M: Module>(module: M, config: &LoraConfig) -> Result<M, LoraError> {
    Adapt::new(config).apply(module)
}

/// How [`apply`](Self::apply) adapts a module.
#[derive(Debug, Clone)]
pub struct Adapt<'a> {
    config: &'a LoraConfig,
    seed: u64,
    quantization: Option<Quantization>,
}

impl<'a> Adapt<'a> {
    /// With these settings, the seed 0 and the base as it is.
    pub fn new(config: &'a LoraConfig) -> Self {
        Self {
            config,
            seed: 0,
            quantization: None,
        }
    }

    /// Uses this seed for the factors A. Layers get different ones.
    pub fn with_seed(self, seed: u64) -> Self {
        Self { seed, ..self }
    }

    /// Quantizes the weights of all linear layers, with or without an adapter. A weight that cannot be packed, because its
    /// number of outputs is no multiple of 4, stays as it is.
    pub fn with_quantized_base(self, quantization: Quantization) -> Self {
        Self {
            quantization: Some(quantization),
            ..self
        }
    }

    /// Freezes `module` and puts new adapters on the linear layers ([`linear_layers`]) that the settings select. B is
    /// zero: over a base that is not quantized, the module's output does not change.
    ///
    /// Modules in `modules_to_save` are trained as a whole; the setting `bias` selects the biases that are trained.
    ///
    /// # Errors
    ///
    /// Invalid settings; settings that select no layer or name one that does not exist; a layer that has an adapter;
    /// dropout of the adapter's input, which a plain `Linear` cannot compute; an initialization that changes the weights,
    /// so that a saved adapter would not fit the original module.
    pub fn apply<M: Module>(&self, module: M) -> Result<M, LoraError> {
        let config = self.config;
        config.validate()?;
        if config.lora_dropout > 0.0 {
            return Err(LoraError::DropoutInLinear);
        }
        if config.lora_bias {
            return Err(LoraError::BiasInLinear);
        }
        if config.init.changes_weights() {
            return Err(LoraError::InitOfModule(config.init));
        }
        let selector = config.selector()?;
        let layers = Layers::of(&module);
        if let Some(name) = layers.adapted.first() {
            return Err(LoraError::AlreadyAdapted(name.as_str().into()));
        }
        let names: Vec<&str> = layers.names.iter().map(String::as_str).collect();
        selector.check(config, &names)?;
        if !names.iter().any(|name| selector.matches(name)) {
            return Err(LoraError::NothingSelected {
                targets: selection(config),
                available: kinds(names.iter().copied()).join(", "),
            });
        }
        let shared = shared_matrices(&module, config, &selector);
        let module = module.map(&mut Freeze {
            selector: &selector,
            path: ModulePath::default(),
        });
        let mut index = 0;
        map_linear_weights(module, |name, weight| {
            index += 1;
            if selector.saves(name) {
                return Ok(weight);
            }
            self.weight(weight, &selector, name, index - 1, shared.as_ref())
        })
    }

    /// A linear layer's weight, frozen, with an adapter if the settings select the layer.
    fn weight(
        &self,
        weight: Param<Tensor<2>>,
        selector: &ModuleSelector,
        name: &str,
        index: usize,
        shared: Option<&[Tensor<2>; 2]>,
    ) -> Result<Param<Tensor<2>>, LoraError> {
        let mut layer = LoraLinear::frozen(Linear { weight, bias: None });
        if selector.matches(name) {
            let config = self.config.of_module(selector, name);
            let seed = CounterRng::new(self.seed).fork(index as u64).next_u64();
            layer = layer.with_new_adapter_sharing(&config, seed, shared)?;
        }
        if let Some(quantization) = self.quantization {
            layer = layer.quantize(quantization)?;
        }
        Ok(layer.weight)
    }
}

/// The matrices that the adapters of a module's selected layers share; `None` if each has its own.
fn shared_matrices<M: Module>(
    module: &M,
    config: &LoraConfig,
    selector: &ModuleSelector,
) -> Option<[Tensor<2>; 2]> {
    let layers = linear_layer_dims(module);
    let device = module.devices().into_iter().next()?;
    let selected = layers
        .into_iter()
        .filter(|(name, _)| selector.matches(name));
    config.shared_matrices(selected.map(|(_, dims)| dims), &device)
}

/// The names of a module's linear layers, in order: those of type [`Linear`] and [`LoraLinear`]. A layer's name is the
/// path of its fields, such as `layers.0.mha.query`; it is the name that `target_modules` selects.
pub fn linear_layers<M: Module>(module: &M) -> Vec<String> {
    Layers::of(module).names
}

/// As [`linear_layers`], with `[d_in, d_out]` of each layer.
pub fn linear_layer_dims<M: Module>(module: &M) -> Vec<(String, [usize; 2])> {
    let Layers { names, dims, .. } = Layers::of(module);
    names.into_iter().zip(dims).collect()
}

/// Where a walk through a module is, for visitors and mappers.
#[derive(Debug, Default)]
pub struct ModulePath {
    /// The fields, and the types that they are in.
    fields: Vec<(String, String)>,
}

impl ModulePath {
    /// Enters a field, as `enter_module`.
    pub fn enter(&mut self, name: &str, container: &str) {
        self.fields.push((name.into(), container.into()));
    }

    /// Leaves a field, as `exit_module`.
    pub fn leave(&mut self) {
        self.fields.pop();
    }

    /// The name of the module that the current parameter is in, and the parameter's own.
    pub fn split(&self) -> (String, &str) {
        let Some(((parameter, _), module)) = self.fields.split_last() else {
            return (String::new(), "");
        };
        let module: Vec<&str> = module.iter().map(|(name, _)| name.as_str()).collect();
        (module.join("."), parameter)
    }

    /// Whether the current parameter is the weight `[d_in, d_out]` of a linear layer ([`linear_layers`]).
    pub fn is_weight_of_linear(&self) -> bool {
        self.fields.last().is_some_and(is_weight_of_linear)
    }

    /// Whether the current parameter belongs to something that is attached to another, such as an adapter.
    pub fn is_attached(&self) -> bool {
        let mut containers = self.fields.iter().map(|(_, container)| container);
        containers.any(|container| container == "Reparameterization")
    }

    /// The name of the linear layer to whose weight something is attached, if the walk has just entered that.
    fn attached_to(&self) -> Option<String> {
        let [module @ .., weight, (_, container)] = &self.fields[..] else {
            return None;
        };
        let module = module.iter().map(|(name, _)| name.as_str());
        (container == "Reparameterization" && is_weight_of_linear(weight))
            .then(|| module.collect::<Vec<_>>().join("."))
    }
}

fn is_weight_of_linear((name, container): &(String, String)) -> bool {
    name == "weight" && ["Struct:Linear", "Struct:LoraLinear"].contains(&container.as_str())
}

/// The linear layers of a module.
#[derive(Default)]
struct Layers {
    path: ModulePath,
    names: Vec<String>,
    dims: Vec<[usize; 2]>,
    /// Those that have an adapter.
    adapted: Vec<String>,
}

impl Layers {
    fn of<M: Module>(module: &M) -> Self {
        let mut layers = Self::default();
        module.visit(&mut layers);
        layers
    }
}

impl ModuleVisitor for Layers {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
        self.adapted.extend(self.path.attached_to());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.leave();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.path.is_weight_of_linear() {
            let shape = param.lazy_shape();
            self.names.push(self.path.split().0);
            self.dims.push([shape[0], shape[1]]);
        }
    }
}

/// Freezes every parameter that is not trained itself.
struct Freeze<'a> {
    selector: &'a ModuleSelector,
    path: ModulePath,
}

impl ModuleMapper for Freeze<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.leave();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (module, parameter) = self.path.split();
        param.set_require_grad(self.selector.trains(&module, parameter))
    }
}

/// Replaces the weight `[d_in, d_out]` of every linear layer ([`linear_layers`]), given the layer's name. What is attached
/// to a weight stays, and `change` gets the weight without it.
///
/// # Errors
///
/// The first error of `change`.
pub fn map_linear_weights<M: Module, E>(
    module: M,
    change: impl FnMut(&str, Param<Tensor<2>>) -> Result<Param<Tensor<2>>, E>,
) -> Result<M, E> {
    let mut weights = Weights {
        change,
        path: ModulePath::default(),
        error: None,
    };
    let module = module.map(&mut weights);
    match weights.error {
        Some(error) => Err(error),
        None => Ok(module),
    }
}

struct Weights<C, E> {
    change: C,
    path: ModulePath,
    /// The first error: a mapper cannot return one.
    error: Option<E>,
}

impl<C, E> ModuleMapper for Weights<C, E>
where
    C: FnMut(&str, Param<Tensor<2>>) -> Result<Param<Tensor<2>>, E>,
{
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.leave();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if !self.path.is_weight_of_linear() || self.error.is_some() {
            return param;
        }
        let (name, _) = self.path.split();
        let changed = with_rank_2(param.clone(), |weight| (self.change)(&name, weight));
        match changed {
            Some(Ok(weight)) => weight,
            Some(Err(error)) => {
                self.error = Some(error);
                param
            }
            None => param,
        }
    }
}

/// The parameters that are attached to a linear layer's weight.
#[derive(Debug, Clone)]
pub struct Attached {
    /// The layer's name, as in [`linear_layers`].
    pub layer: String,
    /// Their names, of a LoRA `a` and `b`, and their values.
    pub parameters: Vec<(String, Tensor<2>)>,
}

/// The parameters of all adapters of a module, in the order of its layers.
pub fn attached_parameters<M: Module>(module: &M) -> Vec<Attached> {
    let mut parameters = Parameters::default();
    module.visit(&mut parameters);
    parameters.found
}

#[derive(Default)]
struct Parameters {
    path: ModulePath,
    found: Vec<Attached>,
}

impl ModuleVisitor for Parameters {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
        if let Some(layer) = self.path.attached_to() {
            let parameters = Vec::new();
            self.found.push(Attached { layer, parameters });
        }
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.leave();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if !self.path.is_attached() {
            return;
        }
        let name = self.path.split().1.to_owned();
        let param: Box<dyn Any> = Box::new(param.clone());
        if let (Some(layer), Ok(param)) =
            (self.found.last_mut(), param.downcast::<Param<Tensor<2>>>())
        {
            layer.parameters.push((name, param.val()));
        }
    }
}

/// Applies `change` to a parameter of two dimensions; `None` for any other.
fn with_rank_2<const D: usize, E>(
    param: Param<Tensor<D>>,
    change: impl FnOnce(Param<Tensor<2>>) -> Result<Param<Tensor<2>>, E>,
) -> Option<Result<Param<Tensor<D>>, E>> {
    let param: Box<dyn Any> = Box::new(param);
    let changed = change(*param.downcast::<Param<Tensor<2>>>().ok()?);
    changed
        .map(|param| {
            let param: Box<dyn Any> = Box::new(param);
            Some(*param.downcast::<Param<Tensor<D>>>().ok()?)
        })
        .transpose()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linear::tests::values;
    use crate::{ExcludeModules, Method, TargetModules};
    use burn::nn::transformer::{
        TransformerEncoder, TransformerEncoderConfig, TransformerEncoderInput,
    };
    use burn::nn::{Embedding, EmbeddingConfig, LinearConfig};
    use burn::optim::{AdamWConfig, GradientsParams};
    use burn::tensor::{Device, Int};
    use std::collections::BTreeMap;

    /// A classifier of token sequences, as a user of Burn writes it.
    #[derive(Module, Debug)]
    struct Classifier {
        embedding: Embedding,
        encoder: TransformerEncoder,
        head: Linear,
    }

    impl Classifier {
        fn new(device: &Device) -> Self {
            Self {
                embedding: EmbeddingConfig::new(16, 32).init(device),
                encoder: TransformerEncoderConfig::new(32, 64, 2, 2)
                    .with_dropout(0.0)
                    .init(device),
                head: LinearConfig::new(32, 3).init(device),
            }
        }

        fn forward(&self, device: &Device) -> Tensor<2> {
            let tokens = Tensor::<2, Int>::from_data([[1, 5, 2, 9], [3, 3, 0, 15]], device);
            let input = TransformerEncoderInput::new(self.embedding.forward(tokens));
            let encoded = self.encoder.forward(input);
            self.head.forward(encoded.mean_dim(1).reshape([2, 32]))
        }
    }

    fn config(targets: &[&str]) -> LoraConfig {
        LoraConfig {
            r: 4,
            target_modules: TargetModules::Names(
                targets.iter().map(|name| name.to_string()).collect(),
            ),
            ..LoraConfig::default()
        }
    }

    /// The parameters by their paths: their values, and whether they are trained.
    fn parameters<M: Module>(module: &M) -> BTreeMap<String, (Vec<f32>, bool)> {
        #[derive(Default)]
        struct All(ModulePath, BTreeMap<String, (Vec<f32>, bool)>);
        impl ModuleVisitor for All {
            fn enter_module(&mut self, name: &str, container: &str) {
                self.0.enter(name, container);
            }
            fn exit_module(&mut self, _name: &str, _container: &str) {
                self.0.leave();
            }
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                let (module, name) = self.0.split();
                let name = format!("{module}.{name}");
                let tensor = param.base();
                let values = if tensor.dtype().is_float() {
                    values(&tensor)
                } else {
                    values(&tensor.clone().dequantize())
                };
                self.1.insert(name, (values, tensor.is_require_grad()));
            }
        }
        let mut all = All::default();
        module.visit(&mut all);
        all.1
    }

    #[test]
    fn a_transformer_gets_adapters_by_name_and_computes_what_it_did() {
        let device = Device::flex().autodiff();
        let model = Classifier::new(&device);
        assert_eq!(
            linear_layers(&model)[..3],
            [
                "encoder.layers.0.mha.query",
                "encoder.layers.0.mha.key",
                "encoder.layers.0.mha.value"
            ]
        );
        let before = values(&model.forward(&device));
        let adapted = adapt(model.clone(), &config(&["query", "value"])).unwrap();
        assert_eq!(values(&adapted.forward(&device)), before);
        let all = parameters(&adapted);
        let trained: Vec<&str> = all
            .iter()
            .filter(|(_, (_, trained))| *trained)
            .map(|(name, _)| name.as_str())
            .collect();
        let expected = [
            "layers.0.mha.query",
            "layers.0.mha.value",
            "layers.1.mha.query",
            "layers.1.mha.value",
        ];
        let expected = expected
            .map(|name| ["a", "b"].map(|factor| format!("encoder.{name}.weight.lora.{factor}")));
        assert_eq!(trained, expected.concat());
        // Every layer has its own random factor.
        let [first, second] =
            [0, 1].map(|layer| &all[&format!("encoder.layers.{layer}.mha.query.weight.lora.a")].0);
        assert_ne!(first, second);
        // Another seed, other factors; the same seed, the same.
        let [again, other] = [0, 7].map(|seed| {
            let config = config(&["query", "value"]);
            parameters(
                &Adapt::new(&config)
                    .with_seed(seed)
                    .apply(model.clone())
                    .unwrap(),
            )
        });
        assert_eq!(again, all);
        assert_ne!(other, all);
    }

    #[test]
    fn training_changes_the_adapters_only_and_merging_keeps_the_outputs() {
        let device = Device::flex().autodiff();
        let model = Classifier::new(&device);
        let before = parameters(&model);
        // Names of weights with a dot: what is attached to them comes behind it.
        let layers = linear_layers(&model).into_iter();
        let layers: Vec<String> = layers.map(|name| format!("{name}.weight.")).collect();
        let bases = [None, Some(Quantization::Bits8)];
        let cases = Method::ALL.into_iter();
        let cases = cases.flat_map(|method| bases.map(|quantization| (method, quantization)));
        for (method, quantization) in cases {
            let mut config = LoraConfig {
                target_modules: TargetModules::AllLinear,
                modules_to_save: vec!["head".into()],
                method,
                ..config(&[])
            };
            let facts = method.facts();
            let excluded = facts.has("exclude_modules");
            if facts.has("rank_pattern") {
                config.rank_pattern = vec![("mha.key".into(), 2)];
                config.alpha_pattern = vec![("mha.key".into(), 1.0)];
            } else {
                config.lora_alpha = LoraConfig::default().lora_alpha;
            }
            if excluded {
                let names = ExcludeModules::Names(vec!["linear_inner".into()]);
                config.exclude_modules = Some(names);
            }
            let adapt = Adapt {
                quantization,
                ..Adapt::new(&config)
            };
            let mut adapted = adapt.apply(model.clone()).unwrap();
            let start = parameters(&adapted);
            let mut optimizer = AdamWConfig::new().init();
            for _ in 0..3 {
                let loss = adapted.forward(&device).powf_scalar(2.0).sum();
                let gradients = GradientsParams::from_grads(loss.backward(), &adapted);
                adapted = optimizer.step(0.05, adapted, gradients);
            }
            let end = parameters(&adapted);
            for (name, (values, trained)) in &start {
                assert_eq!(*values != end[name].0, *trained, "{name}");
                let attached = |layer: &str| name.starts_with(layer) && name.len() > layer.len();
                let expected = layers.iter().any(|layer| attached(layer));
                let expected = expected || name.starts_with("head.");
                assert_eq!(*trained, expected, "{name}");
            }
            let all = attached_parameters(&adapted);
            let key = all.iter().find(|layer| layer.layer.ends_with("0.mha.key"));
            if facts.shared.is_none() {
                let (name, a) = &key.unwrap().parameters[0];
                assert_eq!((name.as_str(), a.dims()), ("a", [32, 2]));
            }
            let mut names = all.iter().map(|layer| &layer.layer);
            assert_ne!(names.any(|name| name.ends_with("linear_inner")), excluded);
            // A record holds base, factors and the trained head.
            let record = adapted.clone().into_record();
            let loaded = adapt.apply(model.clone()).unwrap().load_record(record);
            assert_eq!(parameters(&loaded), end);
            let valid = adapted.valid();
            let outputs = values(&valid.forward(&Device::flex()));
            let merged = valid.materialize();
            assert!(Layers::of(&merged).adapted.is_empty());
            assert_eq!(parameters(&merged).len(), before.len());
            for (merged, output) in values(&merged.forward(&Device::flex()))
                .iter()
                .zip(&outputs)
            {
                // The same weights, built once instead of in each forward pass.
                assert!((merged - output).abs() < 1e-6, "{merged} {output}");
            }
        }
    }

    #[test]
    fn what_cannot_be_adapted_is_an_error_that_names_it() {
        let device = Device::flex();
        let model = Classifier::new(&device);
        let error = |config: &LoraConfig| adapt(model.clone(), config).unwrap_err().to_string();
        let unknown = error(&config(&["query", "quarry"]));
        assert!(
            unknown.contains("\"quarry\"") && unknown.contains("query"),
            "{unknown}"
        );
        // An embedding is no linear layer.
        assert!(error(&config(&["embedding"])).contains("embedding"));
        let dropout = LoraConfig {
            lora_dropout: 0.1,
            ..config(&["query"])
        };
        assert!(error(&dropout).contains("LoraLinear"));
        let pissa = LoraConfig {
            init: crate::Init::Pissa,
            ..config(&["query"])
        };
        assert!(error(&pissa).contains("pissa"));
        let adapted = adapt(model.clone(), &config(&["query"])).unwrap();
        let twice = adapt(adapted, &config(&["value"])).unwrap_err().to_string();
        assert!(twice.contains("encoder.layers.0.mha.query"), "{twice}");
    }

    #[test]
    fn a_lora_linear_in_a_module_gets_its_adapter_by_name_too() {
        #[derive(Module, Debug)]
        struct Two {
            first: LoraLinear,
            second: Linear,
        }
        let device = Device::flex().autodiff();
        let linear = || LinearConfig::new(8, 8).init(&device);
        let module = Two {
            first: LoraLinear::frozen(linear()),
            second: linear(),
        };
        let adapted = adapt(module, &config(&["first", "second"])).unwrap();
        let [first, second] = [&adapted.first.weight, &adapted.second.weight]
            .map(|weight| weight.adapter().is_some());
        assert!(first && second);
        let x = Tensor::<2>::ones([2, 8], &device);
        let gradients = adapted.first.forward(x).sum().backward();
        let factors = adapted
            .first
            .weight
            .adapter()
            .map(|adapter| adapter.b.val())
            .unwrap();
        assert!(factors.grad(&gradients).is_some());
    }
}
