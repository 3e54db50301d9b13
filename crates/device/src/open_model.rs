//! Opening a model, in the order in which a mistake costs least: the device starts, it is compared with the CPU, and
//! only then are weights read.
//!
//! Training, inference, the benchmark and the parity tool open models here. A caller that does not want a step leaves
//! its call out: the parity tool has started its device already and brings it to [`ModelOptions::load`]; a benchmark
//! of random weights takes [`ModelLoader::load_options`] instead of [`ModelLoader::load`].

use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device, FloatDType};
use llama_burn::{InitialAdapters, Llama, LlamaConfig, LoadError, LoadOptions, TensorReport};
use lora_core::{LoraConfig, Quantization};

use super::{
    Backend, CheckOptions, DeviceError, Selected, check_device, compute_dtype, prepare, select,
    verdict,
};

/// How a model is stored and computed with.
#[derive(Debug, Clone, Copy)]
pub struct ModelOptions {
    /// The type of products; the device's best where `None`, as [`compute_dtype`] describes.
    pub compute_dtype: Option<FloatDType>,
    /// How the linear layers are stored.
    pub quantization: Quantization,
    /// Whether the output layer is quantized as well.
    pub quantize_lm_head: bool,
    /// Whether the tensors are on the device's autodiff graph, as adapters that train need it.
    pub autodiff: bool,
}

impl Default for ModelOptions {
    /// 8 bits, the device's best type, for inference.
    fn default() -> Self {
        Self {
            compute_dtype: None,
            quantization: Quantization::Bits8,
            quantize_lm_head: false,
            autodiff: false,
        }
    }
}

impl ModelOptions {
    /// Reads the weights of `folder`, or of a GGUF file, onto a device that has started and whose tensors are of type
    /// `dtype`. The model is frozen and has no adapters. `report` is called after each tensor.
    ///
    /// # Errors
    ///
    /// A missing, unexpected, ill-shaped or damaged tensor, by name.
    pub fn load(
        &self,
        folder: &Path,
        config: &LlamaConfig,
        device: &Device,
        dtype: FloatDType,
        report: impl FnMut(&TensorReport),
    ) -> Result<Llama, LoadError> {
        self.load_with(folder, config, device, dtype, None, None, report)
    }

    /// As [`load`](Self::load). Weights that `lora` trains themselves are not quantized; adapters are taken out of the
    /// weights that `initial` selects.
    ///
    /// # Errors
    ///
    /// As [`load`](Self::load); a weight that cannot be decomposed.
    #[allow(clippy::too_many_arguments)]
    pub fn load_with(
        &self,
        folder: &Path,
        config: &LlamaConfig,
        device: &Device,
        dtype: FloatDType,
        lora: Option<&LoraConfig>,
        initial: Option<&mut InitialAdapters>,
        report: impl FnMut(&TensorReport),
    ) -> Result<Llama, LoadError> {
        let (device, options) = (self.on_graph(device), self.load_options(dtype));
        llama_burn::load_with(folder, config, options, &device, lora, initial, report)
    }

    fn load_options(&self, dtype: FloatDType) -> LoadOptions {
        LoadOptions {
            quantization: self.quantization,
            quantize_lm_head: self.quantize_lm_head,
            dtype: DType::from(dtype),
        }
    }

    fn on_graph(&self, device: &Device) -> Device {
        if self.autodiff {
            device.clone().autodiff()
        } else {
            device.clone()
        }
    }
}

/// A model whose device has started and whose weights have not been read.
#[derive(Debug, Clone)]
pub struct ModelLoader {
    /// The model's folder, or its GGUF file.
    pub folder: PathBuf,
    /// Its shape.
    pub config: LlamaConfig,
    /// Its device.
    pub selected: Selected,
    /// The type of products.
    pub compute_dtype: FloatDType,
    /// The type of tensors. It differs from `compute_dtype` as [`prepare`] describes.
    pub dtype: FloatDType,
    options: ModelOptions,
}

impl ModelLoader {
    /// Selects and starts a device for the model of `folder`, and sets it up to compute in the type of `options`.
    ///
    /// # Errors
    ///
    /// As [`select`], [`compute_dtype`] and [`prepare`].
    pub fn new(
        folder: &Path,
        config: LlamaConfig,
        backend: Backend,
        options: ModelOptions,
    ) -> Result<Self, DeviceError> {
        Self::on(folder, config, select(backend)?, options)
    }

    /// As [`new`](Self::new), on a device that has started.
    ///
    /// # Errors
    ///
    /// As [`compute_dtype`] and [`prepare`].
    pub fn on(
        folder: &Path,
        config: LlamaConfig,
        selected: Selected,
        options: ModelOptions,
    ) -> Result<Self, DeviceError> {
        let compute_dtype = compute_dtype(&selected, options.compute_dtype)?;
        Ok(Self {
            dtype: prepare(&selected, compute_dtype)?,
            folder: folder.into(),
            config,
            selected,
            compute_dtype,
            options,
        })
    }

    /// Compares the device with the CPU on a layer of the model's shapes, with adapters of `lora` and a sequence of up
    /// to `longest` tokens. On the CPU there is nothing to compare.
    ///
    /// # Errors
    ///
    /// As [`check_device`] and [`verdict`].
    pub fn check(&self, lora: &LoraConfig, longest: usize) -> Result<(), DeviceError> {
        let checks = check_device(
            &self.selected,
            &CheckOptions {
                model: &self.config,
                quantization: self.options.quantization,
                dtype: self.dtype,
                lora,
                longest_row: longest,
            },
        )?;
        for check in &checks {
            log::debug!("{check:?}");
        }
        verdict(&self.selected, &checks)
    }

    /// Tensors that [`load`](Self::load) reads.
    pub fn tensors(&self) -> usize {
        self.config.tensor_shapes().len()
    }

    /// Reads the weights. `report` is called after each of the [`tensors`](Self::tensors).
    ///
    /// # Errors
    ///
    /// As [`ModelOptions::load`].
    pub fn load(&self, report: impl FnMut(&TensorReport)) -> Result<Llama, LoadError> {
        self.load_with(None, None, report)
    }

    /// As [`load`](Self::load). Weights that `lora` trains themselves are not quantized; adapters are taken out of the
    /// weights that `initial` selects.
    ///
    /// # Errors
    ///
    /// As [`ModelOptions::load_with`].
    pub fn load_with(
        &self,
        lora: Option<&LoraConfig>,
        initial: Option<&mut InitialAdapters>,
        report: impl FnMut(&TensorReport),
    ) -> Result<Llama, LoadError> {
        let (config, device) = (&self.config, &self.selected.device);
        self.options.load_with(
            &self.folder,
            config,
            device,
            self.dtype,
            lora,
            initial,
            report,
        )
    }

    /// How [`load`](Self::load) stores weights.
    pub fn load_options(&self) -> LoadOptions {
        self.options.load_options(self.dtype)
    }

    /// Where [`load`](Self::load) puts weights: the device, on the autodiff graph where `options` ask for it.
    pub fn device(&self) -> Device {
        self.options.on_graph(&self.selected.device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The embedded model.
    fn folder() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/model")
    }

    fn loader(options: ModelOptions) -> Result<ModelLoader, DeviceError> {
        let config = LlamaConfig::from_file(&folder()).unwrap();
        ModelLoader::new(&folder(), config, Backend::Cpu, options)
    }

    #[test]
    fn a_model_opens_in_three_steps_and_reports_every_tensor() {
        let loader = loader(ModelOptions::default()).unwrap();
        assert_eq!(loader.dtype, FloatDType::F32);
        loader.check(&LoraConfig::default(), 16).unwrap();
        let mut done = Vec::new();
        let model = loader.load(|tensor| done.push(tensor.done)).unwrap();
        assert_eq!(done, (1..=loader.tensors()).collect::<Vec<_>>());
        let linears = model.linears().count();
        assert_eq!(linears, 7 * loader.config.num_hidden_layers);
        assert_eq!(loader.device(), loader.selected.device);
    }

    #[test]
    fn options_decide_how_weights_are_stored_and_where() {
        let dense = ModelOptions {
            quantization: Quantization::None,
            autodiff: true,
            ..ModelOptions::default()
        };
        let loader = loader(dense).unwrap();
        assert_eq!(loader.load_options().quantization, Quantization::None);
        assert_eq!(loader.device(), loader.selected.device.clone().autodiff());
        let model = loader.load(|_| {}).unwrap();
        let (_, linear) = model.linears().next().unwrap();
        assert_eq!(linear.weight.base().dtype(), DType::F32);
    }

    #[test]
    fn a_type_that_the_device_lacks_is_refused_before_weights_are_read() {
        let tf32 = ModelOptions {
            compute_dtype: Some(crate::TF32),
            ..ModelOptions::default()
        };
        let error = loader(tf32).unwrap_err();
        assert!(matches!(error, DeviceError::Precision { .. }), "{error}");
    }
}
