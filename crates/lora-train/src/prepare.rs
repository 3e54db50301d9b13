//! The first act of a run: files, data, device, memory, folder, and last the model.
//!
//! Mistakes of the user are found here, by the cheapest checks first. No weight is read before all checks have passed,
//! and nothing in the folder of a resumed run changes until its model is loaded.

use std::path::Path;

use burn::tensor::{DType, FloatDType};
use llama_burn::{InitialAdapters, LlamaConfig};
use lora_core::Quantization;

use crate::callback::TrainingCallback;
use crate::checkpoint::{Checkpoint, Fingerprint, Keeper, Progress, Resume, Resumed, run_folder};
use crate::continued;
use crate::error::TrainError;
use crate::files::RunFiles;
use crate::fit::{self, Fit};
use crate::model_card;
use crate::output::OutputFolder;
use crate::session::Learner;
use crate::train::Request;
use data::{Data, Order};
use device::{Backend, KeptKernels, ModelLoader, ModelOptions, Selected};
use durable::faults::{self, Kernels};
use peft::AdapterTensors;
use run_config::{ComputeDtype, Config};
use terminal::human;
use train_step::loss_scale::LossScale;
use train_step::optimizer::AdamW;
use train_step::{loraplus_rates, undecayed};

/// A run that is ready to load its model.
pub struct Prepared {
    /// The parts that do not change.
    pub setup: Setup,
    /// How examples are divided into micro-batches; smaller ones after the device ran out of memory.
    pub fit: Fit,
    /// The progress of the run.
    pub progress: Progress,
    /// Writes checkpoints and the adapter.
    pub keeper: Keeper,
}

/// The parts of a run that do not change while it trains.
pub struct Setup {
    /// The settings, with those of an adapter that training continues.
    pub config: Config,
    /// The backend as selected with `--backend`.
    pub backend: Backend,
    /// The examples.
    pub data: Data,
    /// The base model and its device.
    pub loader: ModelLoader,
    /// Where the run writes.
    pub folder: OutputFolder,
    /// The order of the examples, in the first micro-batches.
    pub order: Order,
    /// Optimizer steps of the whole run.
    pub total_steps: usize,
    /// The command of the run's first start.
    pub command: Vec<String>,
    /// The checkpoint that the run resumes from.
    pub resumed: Option<Resumed>,
    /// Whether a resumed run divides its examples differently, because less memory is free.
    pub divided_anew: bool,
    /// The compiled kernels that were on disk when the program started.
    pub kept_kernels: Option<KeptKernels>,
}

/// The inputs that are read before a device starts.
struct Inputs {
    files: RunFiles,
    fingerprint: Fingerprint,
    model: LlamaConfig,
    config: Config,
    data: Data,
}

impl Prepared {
    /// Checks everything that needs no weights.
    ///
    /// # Errors
    ///
    /// Whatever is wrong with the files, the data, the device or the output folder, in this order.
    pub fn new(request: &Request, callback: &mut dyn TrainingCallback) -> Result<Self, TrainError> {
        faults::init(Kernels {
            operations: &lora_core::spoil::OPERATIONS,
            spoil: lora_core::spoil::spoil,
        })?;
        // A resumed run locks its folder from here on.
        let (locked, mut resumed) = match &request.resume {
            Some(resume) => open_checkpoint(resume, &request.config.output_dir)?,
            None => (None, None),
        };
        let Inputs {
            files,
            fingerprint,
            model,
            config,
            data,
        } = Inputs::read(request, resumed.as_mut())?;
        let options = model_options(&config);
        let loader = ModelLoader::new(&files.model, model, request.backend, options)?;
        let (fit, divided_anew) = plan(&config, &loader, &data, resumed.as_ref())?;
        let order = order(&config, &data, &fit);
        let total_steps = order.total_steps(config.num_epochs, config.max_steps);
        let kept_kernels = device::kept_kernels();
        compare_with_the_cpu(&config, &loader, &data, callback)?;
        let folder = match locked {
            Some(folder) => folder,
            None => OutputFolder::prepare(&config.output_dir, request.existing)?,
        };
        let checkpoint = resumed.as_ref().map(|resumed| &resumed.checkpoint);
        let steps_per_epoch = order.steps_per_epoch();
        let stored = checkpoint.map(|from| &from.state.command[..]);
        let command = model_card::command(stored, &folder.config());
        Ok(Self {
            keeper: Keeper::new(&config, &folder, fingerprint, checkpoint, steps_per_epoch)?,
            progress: checkpoint.map_or_else(Progress::start, |from| from.state.progress.clone()),
            fit,
            setup: Setup {
                backend: request.backend,
                config,
                data,
                loader,
                folder,
                order,
                total_steps,
                command,
                resumed,
                divided_anew,
                kept_kernels,
            },
        })
    }

    /// Whether the run that is resumed is complete already.
    pub fn is_over(&self) -> bool {
        self.progress.is_over(self.setup.total_steps)
    }

    /// Loads the weights, which are quantized one at a time as they are read, then the adapters, fresh or from the
    /// checkpoint. Then writes the run's `config.toml`.
    ///
    /// # Errors
    ///
    /// A tensor that is missing or damaged, an adapter or checkpoint that does not fit, a folder that cannot be written
    /// to.
    pub fn load(&mut self, callback: &mut dyn TrainingCallback) -> Result<Learner, TrainError> {
        let learner = self.setup.load(callback)?;
        let dtype = DType::from(self.setup.loader.dtype);
        // A run may be resumed in another type.
        self.progress.loss_scale = LossScale::of_run(dtype, self.progress.loss_scale);
        Ok(learner)
    }
}

impl Inputs {
    /// Reads the files, the model's shape and the examples. In a resumed run they must be unchanged.
    fn read(request: &Request, resumed: Option<&mut Resumed>) -> Result<Self, TrainError> {
        let files = RunFiles::find(&request.config)?;
        let fingerprint = Fingerprint::of(&files)?;
        let model = LlamaConfig::from_file(&files.model)?;
        let config = continued::continued(&request.config, &model)?;
        let mut time = None;
        if let (Some(resumed), Some(resume)) = (resumed, &request.resume) {
            resumed.check(&config, &fingerprint, resume.force)?;
            time = resumed.checkpoint.state.chat_template_time;
        }
        let data = files.data(&config, &model, time)?;
        if let Some(path) = fingerprint.changed_data().into_iter().next() {
            return Err(TrainError::DataChanged { path });
        }
        Ok(Self {
            files,
            fingerprint,
            model,
            config,
            data,
        })
    }
}

impl Setup {
    /// The device.
    pub fn selected(&self) -> &Selected {
        &self.loader.selected
    }

    /// The checkpoint that the run resumes from.
    pub fn checkpoint(&self) -> Option<&Checkpoint> {
        self.resumed.as_ref().map(|resumed| &resumed.checkpoint)
    }

    fn load(&self, callback: &mut dyn TrainingCallback) -> Result<Learner, TrainError> {
        let total = self.loader.tensors();
        callback.on_loading(0, total);
        let config = &self.config;
        let lora = config.lora_config();
        let mut initial = match &config.init_adapter {
            None => InitialAdapters::new(&lora, &self.loader.config, config.seed)?,
            Some(_) => None,
        };
        let model = self
            .loader
            .load_with(Some(&lora), initial.as_mut(), |tensor| {
                callback.on_loading(tensor.done, total);
                if let Some(error) = tensor.quantization {
                    log::debug!(
                        "{}: quantized, relative error {:.3e}, largest {:.3e}",
                        tensor.name,
                        error.relative,
                        error.max_abs
                    );
                }
            })?;
        let initial = initial.map(|initial| AdapterTensors::from_factors(initial.factors));
        let mut model = continued::start(model, config, initial.as_ref())?;
        let mut optimizer = AdamW {
            beta_1: config.adam_beta1,
            beta_2: config.adam_beta2,
            epsilon: config.adam_epsilon,
            weight_decay: config.weight_decay,
        }
        .resumable()
        .with_undecayed(undecayed(&model));
        if let Some(ratio) = config.loraplus_lr_ratio {
            optimizer = optimizer.with_rates(loraplus_rates(&model, ratio));
        }
        if let Some(checkpoint) = self.checkpoint() {
            model = checkpoint.tensors()?.put(model, &mut optimizer)?;
        }
        callback.on_loaded();
        durable::write_atomically(&self.folder.config(), config.to_toml().as_bytes())?;
        Ok(Learner {
            model,
            optimizer,
            initial,
        })
    }
}

/// How the model of a configuration is stored and in which type it is computed, for training.
pub fn model_options(config: &Config) -> ModelOptions {
    ModelOptions {
        compute_dtype: match config.compute_dtype {
            ComputeDtype::Auto => None,
            ComputeDtype::F32 => Some(FloatDType::F32),
            ComputeDtype::Bf16 => Some(FloatDType::BF16),
            ComputeDtype::F16 => Some(FloatDType::F16),
            ComputeDtype::Tf32 => Some(device::TF32),
        },
        quantization: quantization(config),
        quantize_lm_head: config.quantize_lm_head,
        autodiff: true,
    }
}

/// How a configuration stores frozen weights.
pub fn quantization(config: &Config) -> Quantization {
    // Validation let only 4, 8 and 16 through.
    Quantization::from_bits(config.quant_bits).unwrap_or(Quantization::None)
}

/// The order of a run's examples.
pub(crate) fn order(config: &Config, data: &Data, fit: &Fit) -> Order {
    Order::new(
        config.seed,
        &data.train,
        fit.batch_size,
        fit.gradient_accumulation_steps,
        config.max_batch_tokens,
    )
}

/// The settings that fit the device, and whether a resumed run is divided differently.
fn plan(
    config: &Config,
    loader: &ModelLoader,
    data: &Data,
    resumed: Option<&Resumed>,
) -> Result<(Fit, bool), TrainError> {
    let (model, selected, dtype) = (&loader.config, &loader.selected, loader.dtype);
    let planned = match resumed.map(Resumed::division) {
        Some(before) => fit::refit(config, model, selected, dtype, data, before)?,
        None => (fit::fit(config, model, selected, dtype, data)?, false),
    };
    let needed = planned.0.plan.counts.adapter_bytes;
    match device::largest_buffer(selected) {
        Some(limit) if needed > limit && config.lora_config().trains_whole() => {
            Err(TrainError::TrainedTooLarge {
                needed: human::bytes(needed),
                limit: human::bytes(limit),
            })
        }
        _ => Ok(planned),
    }
}

fn compare_with_the_cpu(
    config: &Config,
    loader: &ModelLoader,
    data: &Data,
    callback: &mut dyn TrainingCallback,
) -> Result<(), TrainError> {
    if loader.selected.backend != Backend::Cpu {
        callback.on_preparing("comparing the device with the CPU");
    }
    let longest = data.train.lengths().max().unwrap_or(1);
    let checked = loader.check(&config.lora_config(), longest);
    callback.on_prepared();
    Ok(checked?)
}

/// Opens the checkpoint that a run resumes from, and locks the run's folder if the run stays in it.
fn open_checkpoint(
    resume: &Resume,
    output_dir: &Path,
) -> Result<(Option<OutputFolder>, Option<Resumed>), TrainError> {
    let absolute = |path: &Path| path.canonicalize().ok();
    let from = absolute(&run_folder(&resume.from));
    if from.is_none() || from != absolute(output_dir) {
        return Ok((None, resume.open(false)?));
    }
    let folder = OutputFolder::reopen(output_dir)?;
    let resumed = resume.open(true)?;
    Ok((resumed.is_some().then_some(folder), resumed))
}
