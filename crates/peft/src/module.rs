//! Adapters of any Burn module, in PEFT's format: those that [`lora_core::adapt`] makes.
//!
//! A module's names are the paths of its fields, as [`lora_core::linear_layers`] lists them. PEFT loads the folder on a
//! torch module whose layers have the same names.

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::nn::Linear;
use burn::tensor::{DType, Tensor, TensorData};
use lora_core::{
    LoraConfig, LoraLinear, ModulePath, ModuleSelector, attached_parameters, linear_layer_dims,
    linear_layers, map_linear_weights,
};

use super::model::{in_module, read};
use super::{
    AdapterConfig, AdapterError, AdapterPair, AdapterTensors, Shared, WholeTensor, read_adapter,
    tensor_names, write_adapter,
};

/// Writes the adapters of a module to `folder`, and the parameters that `config` trains as a whole (`modules_to_save`,
/// `bias`).
///
/// # Errors
///
/// As [`write_adapter`]; [`AdapterError::Unreadable`] for a tensor that cannot be read from the device.
pub fn save_module<M: Module>(
    module: &M,
    config: &AdapterConfig,
    folder: &Path,
) -> Result<(), AdapterError> {
    write_adapter(folder, config, &of_module(module, &config.lora)?)
}

/// Reads an adapter from `folder` and puts it on the linear layers of a module. Parameters that were trained as a whole
/// replace those of the module. Everything else is frozen.
///
/// # Errors
///
/// As [`read_adapter`]. [`AdapterError::Unexpected`] for a layer or a tensor that the module does not have; a shape that
/// does not fit; a layer that has an adapter.
pub fn load_module<M: Module>(
    module: M,
    folder: &Path,
) -> Result<(M, AdapterConfig), AdapterError> {
    let (config, tensors) = read_adapter(folder)?;
    let module = put_on(&tensors, module, &config.lora)?;
    Ok((module, config))
}

/// The adapters and trained parameters of a module.
fn of_module<M: Module>(module: &M, lora: &LoraConfig) -> Result<AdapterTensors, AdapterError> {
    let mut tensors = AdapterTensors::default();
    let dims: BTreeMap<String, [usize; 2]> = linear_layer_dims(module).into_iter().collect();
    for attached in attached_parameters(module) {
        let find = |name: &str| {
            let mut all = attached.parameters.iter();
            all.find(|(other, _)| other == name)
                .map(|(_, tensor)| tensor)
        };
        let [a_name, b_name] = tensor_names(&attached.layer);
        let mut pair = match (find("a"), find("b")) {
            (Some(a), Some(b)) => {
                let ([d_in, r], [_, d_out]) = (a.dims(), b.dims());
                let (a, b) = (read(&a_name, a.clone())?, read(&b_name, b.clone())?);
                AdapterPair::new(d_in, r, d_out, a, b)
            }
            _ if lora.method.facts().shared.is_some() => {
                let layer = dims.get(&attached.layer).copied();
                let [_, d_out] = layer.unwrap_or_default();
                AdapterPair::of_vectors(lora.r, d_out, BTreeMap::new())
            }
            _ => return Err(AdapterError::Unexpected { name: a_name }),
        };
        // The parameters that are not A or B are the method's vectors, in the method's order.
        let names = lora.method.facts().vectors.iter().map(|vector| vector.name);
        let others = attached.parameters.iter();
        let others = others.filter(|(name, _)| name != "a" && name != "b");
        for (name, (_, vector)) in names.zip(others) {
            pair.vectors.insert(name, read(name, vector.clone())?);
        }
        tensors.modules.insert(attached.layer.clone(), pair);
    }
    let adapted = tensors
        .modules
        .keys()
        .filter_map(|name| dims.get(name).copied());
    tensors.shared = Shared::of_seed(lora, adapted);
    let mut whole = Whole {
        path: ModulePath::default(),
        selector: lora.selector()?,
        found: BTreeMap::new(),
        error: None,
    };
    module.visit(&mut whole);
    match whole.error {
        Some(error) => Err(error),
        None => {
            tensors.whole = whole.found;
            Ok(tensors)
        }
    }
}

fn put_on<M: Module>(
    tensors: &AdapterTensors,
    module: M,
    lora: &LoraConfig,
) -> Result<M, AdapterError> {
    let layers = linear_layers(&module);
    let unknown = tensors.modules.keys().find(|name| !layers.contains(name));
    if let Some(name) = unknown {
        let [name, _] = tensor_names(name);
        return Err(AdapterError::Unexpected { name });
    }
    if let Some(attached) = attached_parameters(&module).first() {
        let error = lora_core::LoraError::AlreadyAdapted(attached.layer.as_str().into());
        return Err(in_module(error, &attached.layer));
    }
    if let Some(name) = tensors.modules.keys().next().filter(|_| lora.lora_bias) {
        return Err(in_module(lora_core::LoraError::BiasInLinear, name));
    }
    let mut put = Put {
        path: ModulePath::default(),
        left: tensors.whole.clone(),
        error: None,
    };
    let module = module.map(&mut put);
    if let Some(error) = put.error {
        return Err(error);
    }
    if let Some(name) = put.left.into_keys().next() {
        return Err(AdapterError::Unexpected { name });
    }
    let selector: ModuleSelector = lora.selector()?;
    let shared = shared_for(tensors, &module, lora)?;
    // Placed once, for all layers.
    let device = module.devices().into_iter().next().unwrap_or_default();
    let shared = shared.map(|shared| shared.factors.on(&device));
    map_linear_weights(module, |name, weight| {
        let Some(pair) = tensors.modules.get(name) else {
            return Ok(weight);
        };
        let device = weight.lazy_device();
        let layer = LoraLinear::frozen(Linear { weight, bias: None });
        let scale = selector.scale(name);
        let adapted = pair.put_on(layer, lora.method, scale, &device, shared.as_ref());
        Ok(adapted.map_err(|error| in_module(error, name))?.weight)
    })
}

/// The matrices that the adapted layers share, which the settings make.
///
/// A module does not tell the matrices of its adapters, so that [`save_module`] has to make them again. Those of the file
/// must therefore be the same, up to the rounding of another processor.
fn shared_for<M: Module>(
    tensors: &AdapterTensors,
    module: &M,
    lora: &LoraConfig,
) -> Result<Option<Shared>, AdapterError> {
    let dims = linear_layer_dims(module).into_iter();
    let adapted = dims.filter(|(name, _)| tensors.modules.contains_key(name));
    let Some(made) = Shared::of_seed(lora, adapted.map(|(_, dims)| dims)) else {
        return Ok(None);
    };
    match &tensors.shared {
        Some(saved) if !saved.is_near(&made) => Err(AdapterError::Config {
            field: "projection_prng_key".into(),
            got: lora.projection_prng_key.to_string(),
            expected: format!(
                "the seed that makes the file's {}",
                made.names.join(" and ")
            ),
        }),
        saved => Ok(Some(saved.clone().unwrap_or(made))),
    }
}

/// The name of the parameter at this place; `None` for one that is attached to another.
fn name_at(path: &ModulePath) -> Option<String> {
    if path.is_attached() {
        return None;
    }
    let (module, parameter) = path.split();
    Some(match module.as_str() {
        "" => parameter.into(),
        module => format!("{module}.{parameter}"),
    })
}

/// Reads the parameters that are trained as a whole.
struct Whole {
    path: ModulePath,
    selector: ModuleSelector,
    found: BTreeMap<String, WholeTensor>,
    error: Option<AdapterError>,
}

impl ModuleVisitor for Whole {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.leave();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(name) = name_at(&self.path) else {
            return;
        };
        let (module, parameter) = self.path.split();
        if !self.selector.trains(&module, parameter) || self.error.is_some() {
            return;
        }
        let tensor = param.base();
        let tensor = if self.path.is_weight_of_linear() {
            tensor.transpose()
        } else {
            tensor
        };
        let shape = tensor.dims().to_vec();
        let data = tensor.into_data().convert::<f32>();
        match data.try_to_vec() {
            Ok(values) => {
                self.found.insert(name, WholeTensor { shape, values });
            }
            Err(error) => {
                let reason = format!("{error:?}");
                self.error = Some(AdapterError::Unreadable { name, reason });
            }
        }
    }
}

/// Replaces parameters that were trained as a whole, and freezes the others.
struct Put {
    path: ModulePath,
    /// Those that are not placed yet.
    left: BTreeMap<String, WholeTensor>,
    error: Option<AdapterError>,
}

impl ModuleMapper for Put {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.leave();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let name = name_at(&self.path);
        let found = name.and_then(|name| Some((self.left.remove(&name)?, name)));
        let Some((whole, name)) = found else {
            return param.set_require_grad(false);
        };
        let linear = self.path.is_weight_of_linear();
        let mut expected = param.lazy_shape().to_vec();
        if linear {
            expected.reverse();
        }
        if whole.shape != expected {
            let error = AdapterError::shape(name, &expected, &whole.shape);
            self.error.get_or_insert(error);
            return param;
        }
        let param = param.map(|old| {
            let data = TensorData::new(whole.values, whole.shape);
            let tensor = Tensor::<D>::from_data(data, (&old.device(), DType::F32));
            if linear { tensor.transpose() } else { tensor }
        });
        param.set_require_grad(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::nn::LinearConfig;
    use burn::nn::conv::{Conv2d, Conv2dConfig};
    use burn::tensor::Device;
    use lora_core::{Method, TargetModules, adapt};
    use std::path::PathBuf;

    #[derive(Module, Debug)]
    struct Net {
        fc1: Linear,
        fc2: Linear,
        head: Linear,
    }

    impl Net {
        fn new(device: &Device) -> Self {
            Self {
                fc1: LinearConfig::new(6, 8).init(device),
                fc2: LinearConfig::new(8, 8).init(device),
                head: LinearConfig::new(8, 3).init(device),
            }
        }

        fn forward(&self, x: Tensor<2>) -> Tensor<2> {
            let x = burn::tensor::activation::relu(self.fc1.forward(x));
            let x = burn::tensor::activation::relu(self.fc2.forward(x));
            self.head.forward(x)
        }
    }

    fn values<const D: usize>(x: Tensor<D>) -> Vec<f32> {
        x.into_data().convert::<f32>().try_to_vec().unwrap()
    }

    fn config() -> AdapterConfig {
        AdapterConfig {
            lora: LoraConfig {
                r: 2,
                lora_alpha: 6.0,
                target_modules: TargetModules::Names(vec!["fc1".into(), "fc2".into()]),
                rank_pattern: vec![("fc2".into(), 3)],
                modules_to_save: vec!["head".into()],
                ..LoraConfig::default()
            },
            base_model_name_or_path: None,
        }
    }

    fn fixture(file: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../../tests/fixtures/module")
            .join(file)
    }

    /// The tensors of a safetensors file.
    fn tensors(file: &str) -> BTreeMap<String, WholeTensor> {
        let bytes = std::fs::read(fixture(file)).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let read = |(name, view): (&str, safetensors::tensor::TensorView)| {
            let values = crate::read_floats(view.dtype(), view.data()).unwrap();
            let shape = view.shape().to_vec();
            (name.to_owned(), WholeTensor { shape, values })
        };
        file.iter().map(read).collect()
    }

    /// A module with the base weights that PEFT had.
    fn base(device: &Device) -> Net {
        let net = Net::new(device);
        let mut put = Put {
            path: ModulePath::default(),
            left: tensors("base.safetensors"),
            error: None,
        };
        let net = net.map(&mut put);
        assert!(put.error.is_none() && put.left.is_empty());
        net
    }

    #[test]
    fn an_adapter_of_peft_computes_what_peft_computed_and_is_written_unchanged() {
        let device = Device::flex();
        let reference = tensors("reference.safetensors");
        let of = |name: &str| {
            let WholeTensor { shape, values } = reference[name].clone();
            Tensor::<2>::from_data(TensorData::new(values, shape), &device)
        };
        let folder = fixture("adapter");
        let (net, config) = load_module(base(&device), &folder).unwrap();
        for (logits, expected) in [
            (base(&device).forward(of("x")), of("base_logits")),
            (net.forward(of("x")), of("logits")),
            (net.clone().materialize().forward(of("x")), of("logits")),
        ] {
            for (got, expected) in values(logits).iter().zip(values(expected)) {
                // f32 sums of at most 8 products in another order.
                assert!((got - expected).abs() < 1e-5, "{got} {expected}");
            }
        }
        let written = tempfile::tempdir().unwrap();
        save_module(&net, &config, written.path()).unwrap();
        assert_eq!(
            read_adapter(written.path()).unwrap(),
            read_adapter(&folder).unwrap()
        );
    }

    #[test]
    fn an_adapter_that_was_saved_loads_on_another_module() {
        let device = Device::flex().autodiff();
        for method in Method::ALL {
            let mut config = config();
            config.lora.method = method;
            if !method.facts().has("lora_alpha") {
                config.lora.lora_alpha = LoraConfig::default().lora_alpha;
                config.lora.rank_pattern = Vec::new();
            }
            check_saved_and_loaded(&Net::new(&device), &config, &device);
        }
    }

    #[test]
    fn shared_matrices_are_drawn_again_and_those_of_another_seed_are_refused() {
        let device = Device::flex();
        let mut config = config();
        config.lora = LoraConfig {
            method: Method::Vera,
            r: 2,
            projection_prng_key: 5,
            // Large enough that the outputs change visibly.
            d_initial: 2.0,
            save_projection: false,
            target_modules: TargetModules::Names(vec!["fc1".into(), "fc2".into()]),
            ..LoraConfig::default()
        };
        let graph = Device::flex().autodiff();
        check_saved_and_loaded(&Net::new(&graph), &config, &graph);
        config.lora.save_projection = true;
        let adapted = adapt(Net::new(&device), &config.lora).unwrap();
        let folder = tempfile::tempdir().unwrap();
        save_module(&adapted, &config, folder.path()).unwrap();
        load_module(Net::new(&device), folder.path()).unwrap();
        let (mut read, tensors) = read_adapter(folder.path()).unwrap();
        read.lora.projection_prng_key = 6;
        write_adapter(folder.path(), &read, &tensors).unwrap();
        let error = load_module(Net::new(&device), folder.path()).unwrap_err();
        assert!(error.to_string().contains("projection_prng_key"), "{error}");
    }

    fn check_saved_and_loaded(net: &Net, config: &AdapterConfig, device: &Device) {
        let adapted = adapt(net.clone(), &config.lora).unwrap();
        // B is zero at first: something has to differ.
        let adapted = map_attached(adapted);
        let folder = tempfile::tempdir().unwrap();
        save_module(&adapted, config, folder.path()).unwrap();
        let (loaded, read) = load_module(net.clone(), folder.path()).unwrap();
        assert_eq!(read, *config);
        let x = Tensor::<2>::ones([2, 6], device);
        let outputs = [net, &adapted, &loaded].map(|net| values(net.forward(x.clone())));
        for (saved, loaded) in outputs[1].iter().zip(&outputs[2]) {
            // The head's weight is a transposed view: f32 sums in another order.
            assert!((saved - loaded).abs() < 1e-6, "{saved} {loaded}");
        }
        let changed = outputs[0].iter().zip(&outputs[1]);
        assert!(changed.into_iter().any(|(a, b)| (a - b).abs() > 1e-2));
        // A module that was put in inference mode has the same adapter.
        let again = tempfile::tempdir().unwrap();
        save_module(&adapted.valid(), config, again.path()).unwrap();
        assert_eq!(
            read_adapter(again.path()).unwrap(),
            read_adapter(folder.path()).unwrap()
        );
    }

    /// Adds 0.1 to every parameter.
    fn map_attached<M: Module>(module: M) -> M {
        struct Add;
        impl ModuleMapper for Add {
            fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
                if !param.is_require_grad() {
                    return param;
                }
                param.map(|x| {
                    let data = (x.clone().without_autodiff() + 0.1).into_data();
                    Tensor::from_data(data, &x.device()).require_grad()
                })
            }
        }
        module.map(&mut Add)
    }

    #[test]
    fn a_folder_that_does_not_fit_is_an_error_that_names_what() {
        #[derive(Module, Debug)]
        struct Other {
            fc1: Linear,
            convolution: Conv2d,
        }
        let device = Device::flex();
        let folder = fixture("adapter");
        let other = Other {
            fc1: LinearConfig::new(6, 8).init(&device),
            convolution: Conv2dConfig::new([1, 1], [3, 3]).init(&device),
        };
        let error = load_module(other, &folder).unwrap_err().to_string();
        assert!(error.contains("fc2"), "{error}");
        let mut wide = Net::new(&device);
        wide.fc1 = LinearConfig::new(7, 8).init(&device);
        let error = load_module(wide, &folder).unwrap_err().to_string();
        assert!(error.contains("fc1") && error.contains('7'), "{error}");
        let mut head = Net::new(&device);
        head.head = LinearConfig::new(8, 4).init(&device);
        let error = load_module(head, &folder).unwrap_err().to_string();
        assert!(error.contains("head"), "{error}");
        let (adapted, _) = load_module(base(&device), &folder).unwrap();
        assert!(load_module(adapted, &folder).is_err());
    }
}
