//! The training state on the host: every trainable parameter and AdamW's moments, bit for bit.
//!
//! Parameters are identified by their path in the module
//! (`layers.0.self_attn.q_proj.weight.lora.a`), so every trainable parameter is saved, not only
//! adapters.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::Path;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Device, Tensor, TensorData};
use llama_burn::Llama;
use safetensors::{Dtype, SafeTensors};

use super::CheckpointError;
use peft::Floats;
use train_step::optimizer::{Moments, Optimizer, to_host};

/// A run's trainable parameters with their moments.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TrainingTensors {
    parameters: BTreeMap<String, Parameter>,
}

#[derive(Debug, Clone, PartialEq)]
struct Parameter {
    shape: Vec<usize>,
    values: Vec<f32>,
    moments: Option<Moments>,
}

const FIRST: &str = "moment_1";
const SECOND: &str = "moment_2";
const UPDATES: &str = "updates";

impl TrainingTensors {
    /// Reads everything from the device.
    ///
    /// # Panics
    ///
    /// If the device does not return a tensor.
    pub fn take(model: &Llama, optimizer: &Optimizer) -> Self {
        let mut take = Take {
            path: Vec::new(),
            optimizer,
            taken: Self::default(),
        };
        model.visit(&mut take);
        take.taken
    }

    /// Loads everything into a model with the same trainable parameters, and into its new
    /// optimizer.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::Parameter`] names a parameter that only one of the two has, or that has
    /// another shape.
    pub fn put(self, model: Llama, optimizer: &mut Optimizer) -> Result<Llama, CheckpointError> {
        let mut put = Put {
            path: Vec::new(),
            device: model.device(),
            optimizer,
            left: self.parameters,
            error: None,
        };
        let model = model.map(&mut put);
        match (put.error, put.left.into_keys().next()) {
            (Some(error), _) => Err(error),
            (None, Some(name)) => Err(CheckpointError::Parameter {
                name,
                problem: "is not trainable in this configuration".into(),
            }),
            (None, None) => Ok(model),
        }
    }

    /// Writes a safetensors file and syncs it.
    ///
    /// # Errors
    ///
    /// The system's error, or a value that the format cannot hold.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let mut tensors: Vec<(String, Floats)> = Vec::new();
        let mut updates = HashMap::new();
        for (name, parameter) in &self.parameters {
            let mut push = |name: String, values| {
                tensors.push((name, Floats::new(values, parameter.shape.clone())));
            };
            push(name.clone(), &parameter.values);
            if let Some(moments) = &parameter.moments {
                push(format!("{name}.{FIRST}"), &moments.first);
                push(format!("{name}.{SECOND}"), &moments.second);
                updates.insert(format!("{name}.{UPDATES}"), moments.updates.to_string());
            }
        }
        durable::write_tensors(path, tensors, updates)
    }

    /// Reads the bytes that [`write`](Self::write) writes.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::Tensors`] with the reason.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, CheckpointError> {
        let file = SafeTensors::deserialize(bytes).map_err(unreadable)?;
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(unreadable)?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let floats = |name: &str, shape: &[usize]| {
            let view = file.tensor(name).map_err(unreadable)?;
            if view.dtype() != Dtype::F32 || view.shape() != shape {
                return Err(unreadable(format!(
                    "{name} is {:?} {:?}, expected F32 {shape:?}",
                    view.dtype(),
                    view.shape()
                )));
            }
            let numbers = view.data().chunks_exact(4);
            let numbers = numbers.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            Ok(numbers.collect::<Vec<f32>>())
        };
        let mut parameters = BTreeMap::new();
        for (name, view) in file.iter() {
            let is_moment = [FIRST, SECOND]
                .iter()
                .any(|moment| name.ends_with(&format!(".{moment}")));
            if is_moment {
                continue;
            }
            let shape = view.shape();
            let moments = match metadata.get(&format!("{name}.{UPDATES}")) {
                None => None,
                Some(updates) => Some(Moments {
                    updates: updates.parse().map_err(|_| {
                        unreadable(format!(
                            "{name}.{UPDATES} is {updates:?}, which is not a number"
                        ))
                    })?,
                    first: floats(&format!("{name}.{FIRST}"), shape)?,
                    second: floats(&format!("{name}.{SECOND}"), shape)?,
                }),
            };
            let parameter = Parameter {
                shape: shape.to_vec(),
                values: floats(name, shape)?,
                moments,
            };
            parameters.insert(name.to_string(), parameter);
        }
        Ok(Self { parameters })
    }
}

fn unreadable(reason: impl ToString) -> CheckpointError {
    CheckpointError::Tensors {
        reason: reason.to_string(),
    }
}

struct Take<'a> {
    path: Vec<String>,
    optimizer: &'a Optimizer,
    taken: TrainingTensors,
}

impl ModuleVisitor for Take<'_> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if !param.is_require_grad() {
            return;
        }
        let tensor = param.val().inner();
        let parameter = Parameter {
            shape: tensor.dims().to_vec(),
            values: to_host(tensor),
            moments: self.optimizer.moments(param.id),
        };
        self.taken.parameters.insert(self.path.join("."), parameter);
    }
}

struct Put<'a> {
    path: Vec<String>,
    device: Device,
    optimizer: &'a mut Optimizer,
    left: BTreeMap<String, Parameter>,
    error: Option<CheckpointError>,
}

impl Put<'_> {
    fn place<const D: usize>(
        &mut self,
        param: Param<Tensor<D>>,
        name: &str,
    ) -> Result<Param<Tensor<D>>, CheckpointError> {
        let problem = |problem| CheckpointError::Parameter {
            name: name.into(),
            problem,
        };
        let Some(parameter) = self.left.remove(name) else {
            return Err(problem("is not in the checkpoint".into()));
        };
        let shape = param.val().dims();
        if parameter.shape != shape {
            let got = parameter.shape;
            return Err(problem(format!(
                "has the shape {got:?} in the checkpoint and {shape:?} in this configuration"
            )));
        }
        if let Some(moments) = parameter.moments {
            self.optimizer.set_moments(param.id, moments, &self.device);
        }
        let data = TensorData::new(parameter.values, shape);
        Ok(param.map(|tensor| {
            let options = (&self.device, tensor.dtype());
            Tensor::from_data(data, options).set_require_grad(tensor.is_require_grad())
        }))
    }
}

impl ModuleMapper for Put<'_> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if !param.is_require_grad() || self.error.is_some() {
            return param;
        }
        let name = self.path.join(".");
        match self.place(param.clone(), &name) {
            Ok(placed) => placed,
            Err(error) => {
                self.error = Some(error);
                param
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use llama_burn::LlamaConfig;
    use lora_core::{LoraConfig, TargetModules};
    use train_step::FlatGradients;
    use train_step::optimizer::AdamW;

    fn model(r: usize, modules: &[&str]) -> Llama {
        let json = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 8, "hidden_size": 8,
            "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "max_position_embeddings": 16, "rms_norm_eps": 1e-5,
        });
        let config = LlamaConfig::from_json(json.as_object().unwrap()).unwrap();
        let lora = LoraConfig {
            r,
            target_modules: TargetModules::Names(
                modules.iter().map(|name| (*name).into()).collect(),
            ),
            ..LoraConfig::default()
        };
        let model = Llama::random(&config, 3, &Device::flex().autodiff());
        model.with_lora(&lora, 5).unwrap()
    }

    /// A model after two updates of its first adapter, with its optimizer.
    fn trained() -> (Llama, Optimizer) {
        let mut model = model(2, &["q_proj"]);
        let mut optimizer = AdamW::default().resumable();
        for step in 0..2 {
            let (_, linear) = model.linears().next().unwrap();
            let [a, b] = linear.trainable()[..] else {
                panic!("A and B");
            };
            let params = [a, b];
            let count = params.map(|param| param.lazy_shape().num_elements());
            let ones = Tensor::<1>::ones([count.iter().sum::<usize>()], &Device::flex());
            let gradients = FlatGradients {
                ids: params.map(|param| param.id).to_vec(),
                values: Some(ones.mul_scalar(0.1 + f64::from(step))),
                factor: 1.0,
            };
            model = optimizer.step(0.01, model, gradients);
        }
        (model, optimizer)
    }

    #[test]
    fn what_is_trained_comes_back_bit_for_bit_onto_another_model() {
        let (model_before, optimizer_before) = trained();
        let taken = TrainingTensors::take(&model_before, &optimizer_before);
        // Two matrices in two layers; only those of the first were updated.
        assert_eq!(taken.parameters.len(), 4);
        let updates = |tensors: &TrainingTensors| {
            let moments = tensors
                .parameters
                .values()
                .filter_map(|p| p.moments.as_ref());
            moments.map(|moments| moments.updates).collect::<Vec<_>>()
        };
        assert_eq!(updates(&taken), [2, 2]);
        let read = TrainingTensors::from_bytes(&bytes(&taken)).unwrap();
        assert_eq!(read, taken);

        let mut optimizer = AdamW::default().resumable();
        let restored = read.put(model(2, &["q_proj"]), &mut optimizer).unwrap();
        assert_eq!(TrainingTensors::take(&restored, &optimizer), taken);
    }

    /// The contents of the file.
    fn bytes(tensors: &TrainingTensors) -> Vec<u8> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tensors");
        tensors.write(&path).unwrap();
        std::fs::read(path).unwrap()
    }

    #[test]
    fn a_parameter_that_does_not_fit_is_named() {
        let (model_before, optimizer) = trained();
        let taken = TrainingTensors::take(&model_before, &optimizer);
        let put = |onto: Llama| {
            let mut optimizer = AdamW::default().resumable();
            let error = taken.clone().put(onto, &mut optimizer).unwrap_err();
            error.to_string()
        };
        let error = put(model(3, &["q_proj"]));
        assert!(
            error.contains("layers.0.self_attn.q_proj.weight.lora.a")
                && error.contains("[8, 2] in the checkpoint and [8, 3]"),
            "{error}"
        );
        let error = put(model(2, &["q_proj", "k_proj"]));
        assert!(
            error.contains("k_proj") && error.contains("is not in the checkpoint"),
            "{error}"
        );
        let error = put(model(2, &["v_proj"]));
        assert!(error.contains("v_proj"), "{error}");
    }

    #[test]
    fn bytes_that_are_no_training_tensors_are_an_error() {
        let (model, optimizer) = trained();
        let bytes = bytes(&TrainingTensors::take(&model, &optimizer));
        for end in [0, 7, 8, 100, bytes.len() - 1] {
            let error = TrainingTensors::from_bytes(&bytes[..end]).unwrap_err();
            assert!(matches!(error, CheckpointError::Tensors { .. }), "{error}");
        }
        // The header lists a moment; its tensor has another name.
        let name = FIRST.as_bytes();
        let place = bytes.windows(name.len()).position(|part| part == name);
        let place = place.unwrap();
        let mut renamed = bytes.clone();
        renamed[place] = b'x';
        assert!(TrainingTensors::from_bytes(&renamed).is_err());
    }
}
