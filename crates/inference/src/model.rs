//! A model that is used rather than trained: its files, its weights, an adapter.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::{FloatDType, Tensor};
use clap::Args;
use llama_burn::{ConfigError, Llama, LlamaConfig, LoadError};
use lora_core::{LoraConfig, LoraError, LoraLinear, Quantization};

use data::{DataError, ModelFiles};
use device::{Backend, DeviceError, KernelArgs, ModelLoader, ModelOptions, Selected};
use export::merge::{Survival, SurvivalReport};
use hub::{self, HubError, Need};
use peft::{AdapterConfig, AdapterError, read_adapter};
use run_config::EMBEDDED;
use run_config::embedded::{self, EmbeddedError};
use terminal::Screen;

/// What to load and where to run it.
#[derive(Debug, Clone, Args)]
pub struct ModelArgs {
    /// A Hugging Face model folder, a GGUF file, a name on the Hub (ORG/NAME or ORG/NAME@REVISION), or
    /// `embedded`
    #[arg(long, value_name = "MODEL", default_value = EMBEDDED)]
    pub model: String,
    /// The backend that the model runs on.
    #[arg(long, default_value = "auto", help = Backend::help())]
    pub backend: Backend,
    /// Bits of the base model's linear layers: 8, 4, or 16 to keep the file's type
    #[arg(long, value_name = "BITS", default_value_t = 8)]
    pub quant_bits: u8,
    /// f32, bf16, f16 or tf32 [default: the best for the device]
    #[arg(long, value_name = "TYPE", value_parser = compute_dtype)]
    pub compute_dtype: Option<FloatDType>,
    /// Switches of the GPU's kernels.
    #[command(flatten)]
    pub kernels: KernelArgs,
}

fn compute_dtype(word: &str) -> Result<FloatDType, String> {
    match word {
        "f32" => Ok(FloatDType::F32),
        "bf16" => Ok(FloatDType::BF16),
        "f16" => Ok(FloatDType::F16),
        "tf32" => Ok(device::TF32),
        _ => Err("expected f32, bf16, f16 or tf32".into()),
    }
}

/// Tokens of a prompt, for the comparison of a device with the CPU.
const PROMPT: usize = 64;

/// Why a model cannot be used.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // Each variant carries the error of the part that failed.
pub enum InferenceError {
    #[error("--quant-bits {0}: expected 8, 4 or 16")]
    QuantBits(u8),
    #[error(transparent)]
    Embedded(#[from] EmbeddedError),
    #[error(transparent)]
    Hub(#[from] HubError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Lora(#[from] LoraError),
    #[error("the device does not return a weight: {0}")]
    Unreadable(String),
    #[error("the adapter in {}: {source}", folder.display())]
    Adapter {
        folder: PathBuf,
        source: AdapterError,
    },
}

/// A base model on its device.
#[derive(Debug)]
pub struct Inference {
    /// Where its files are.
    pub folder: PathBuf,
    /// Its shape.
    pub config: LlamaConfig,
    /// Its tokenizer and templates.
    pub files: ModelFiles,
    /// The device.
    pub selected: Selected,
    /// What it computes in.
    pub dtype: FloatDType,
    /// How the linear layers are stored.
    pub quantization: Quantization,
    /// The model without an adapter.
    pub base: Llama,
}

impl Inference {
    /// Loads a model. The device is compared with the CPU on a layer of it first, as before training.
    ///
    /// # Errors
    ///
    /// What is wrong with the files or the device.
    pub fn load(args: &ModelArgs, screen: &Screen) -> Result<Self, InferenceError> {
        let quantization = Quantization::from_bits(args.quant_bits)
            .ok_or(InferenceError::QuantBits(args.quant_bits))?;
        let folder = if args.model == EMBEDDED {
            embedded::materialise()?.model_dir
        } else {
            hub::model_folder(&args.model, Need::Model)?
        };
        let config = LlamaConfig::from_file(&folder)?;
        let files = ModelFiles::read(&folder)?;
        let options = ModelOptions {
            compute_dtype: args.compute_dtype,
            quantization,
            ..ModelOptions::default()
        };
        let loader = ModelLoader::new(&folder, config, args.backend, options)?;
        loader.check(&LoraConfig::default(), PROMPT)?;
        let switches = device::switches();
        if !switches.is_empty() {
            // Standard output belongs to the answers.
            log::warn!("running with {}", switches.join(", "));
        }
        let task = screen.task("loading weights", loader.tensors());
        let base = loader.load(|tensor| task.at(tensor.done))?;
        drop(task);
        Ok(Self {
            folder,
            config: loader.config,
            files,
            selected: loader.selected,
            dtype: loader.compute_dtype,
            quantization,
            base,
        })
    }

    /// The model with the adapter of a folder as a second path beside the frozen weights.
    ///
    /// # Errors
    ///
    /// An adapter that cannot be read, or that is not for this model.
    pub fn with_adapter(&self, folder: &Path) -> Result<(AdapterConfig, Llama), InferenceError> {
        let folder = &hub::adapter_folder(folder)?;
        let adapter = |source| InferenceError::Adapter {
            folder: folder.into(),
            source,
        };
        let (config, tensors) = read_adapter(folder).map_err(adapter)?;
        let model = tensors.put_on(self.base.clone(), &config.lora);
        Ok((config, model.map_err(adapter)?.for_inference()))
    }

    /// `model` with its adapters merged into the weights, quantized again as the base was.
    ///
    /// # Errors
    ///
    /// If the merged weights cannot be quantized.
    pub fn merged(&self, model: Llama) -> Result<Llama, InferenceError> {
        let mut model = model
            .with_merged_head()
            .and_then(Llama::with_merged_rows)
            .map_err(InferenceError::Unreadable)?;
        for (_, linear) in model.linears_mut() {
            if linear.adapter().is_none() {
                continue;
            }
            let merged = LoraLinear::frozen(linear.merge());
            *linear = match self.quantization {
                Quantization::None => merged,
                quantization => merged.quantize(quantization)?,
            };
        }
        Ok(model)
    }

    /// How much of `adapted`'s adapters is in `merged`, which [`merged`](Self::merged) made of it; none where
    /// the weights are not quantized, so that nothing is rounded away.
    ///
    /// # Errors
    ///
    /// A device that does not give the weights back.
    pub fn survival(
        &self,
        adapted: &Llama,
        merged: &Llama,
    ) -> Result<Option<SurvivalReport>, InferenceError> {
        let bits = match self.quantization {
            Quantization::None => return Ok(None),
            Quantization::Bits8 => 8,
            Quantization::Bits4 => 4,
        };
        let read = |tensor: Tensor<2>| {
            let values = tensor.into_data().convert::<f32>().try_to_vec::<f32>();
            values.map_err(|error| InferenceError::Unreadable(format!("{error:?}")))
        };
        let mut modules = BTreeMap::new();
        for ((name, adapted), (_, merged)) in adapted.linears().zip(merged.linears()) {
            if let Some(delta) = adapted.adapter_delta() {
                let actual = merged.dense_base() - adapted.dense_base();
                modules.insert(name, Survival::of(&read(delta)?, &read(actual)?));
            }
        }
        Ok(Some(SurvivalReport { bits, modules }))
    }

    /// Every token that ends a text: those of `generation_config.json`, else of `config.json`, and the
    /// tokenizer's own, which training puts behind each target.
    ///
    /// # Errors
    ///
    /// A file that is not valid.
    pub fn end_tokens(&self, tokenizer_end: u32) -> Result<Vec<u32>, InferenceError> {
        let mut ids = self.files.generation_end_tokens()?;
        if ids.is_empty() {
            ids.clone_from(&self.config.eos_token_ids);
        }
        if !ids.contains(&tokenizer_end) {
            ids.push(tokenizer_end);
        }
        Ok(ids)
    }
}
