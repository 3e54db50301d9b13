//! Checkpoints and copies of a run, saving after a failure of the device, and the resume command.

use std::time::Instant;

use super::{Learner, Session};
use crate::checkpoint::{Division, FORMAT, Snapshot, State, TrainingTensors};
use crate::error::TrainError;
use crate::guard::{DeviceFault, FaultKind};
use crate::report::shown;
use device::Backend;
use peft::{AdapterConfig, AdapterError, AdapterTensors};
use terminal::human;

impl Session<'_> {
    /// Writes a checkpoint.
    ///
    /// # Errors
    ///
    /// A failure of the device. A failed write is reported but is not an error.
    pub fn save(&mut self, learner: &Learner) -> Result<(), TrainError> {
        let synced = self.metrics.sync();
        let bytes = *synced.as_ref().unwrap_or(&self.metrics.bytes());
        self.report_write(synced.map(|_| ()));
        let taken = self.guard.run(|| self.snapshot_at(learner, bytes));
        match taken {
            Ok(snapshot) => self.keeper.write(&snapshot?, self.callback),
            Err(fault) => return Err(self.rescue(fault, None)),
        }
        Ok(())
    }

    /// On a GPU, copies the run to the host from time to time: a lost device returns no tensors.
    ///
    /// # Errors
    ///
    /// A failure of the device.
    pub fn copy(&mut self, learner: &Learner) -> Result<(), TrainError> {
        if self.setup.selected().backend == Backend::Cpu || !self.keeper.wants_copy() {
            return Ok(());
        }
        let bytes = self.metrics.bytes();
        let started = Instant::now();
        let taken = self.guard.run(|| self.snapshot_at(learner, bytes));
        match taken {
            Ok(snapshot) => {
                self.keeper.copy(snapshot?, started.elapsed());
                Ok(())
            }
            Err(fault) => Err(self.rescue(fault, None)),
        }
    }

    /// The planned memory, and the memory that the device reports.
    pub(super) fn memory(&self) -> String {
        let device = &self.setup.selected().device;
        let used = match device::memory_in_use(device) {
            Some(bytes) => format!(", the device has {} in use", human::bytes(bytes)),
            None => String::new(),
        };
        let plan = human::bytes(self.fit.plan.resident_peak());
        format!("This was planned to need {plan}{used}")
    }

    /// Saves as much as possible after a failure of the device, and returns the error that describes it. `live`
    /// is the model, if the failed work was not changing it.
    pub(super) fn rescue(&mut self, fault: DeviceFault, live: Option<&Learner>) -> TrainError {
        let step = self.progress.next();
        let newer = Some(self.progress.step) > self.keeper.newest();
        if let Some(learner) = live.filter(|_| newer && self.progress.step > 0) {
            // The device may still return its tensors. If not, the last copy is used.
            let metrics_bytes = self.metrics.bytes();
            let taken = self.guard.run(|| self.snapshot_at(learner, metrics_bytes));
            if let Ok(Ok(snapshot)) = taken {
                self.keeper.write(&snapshot, self.callback);
            }
        }
        self.keeper.rescue(self.callback);
        let advice = match fault.kind {
            FaultKind::OutOfMemory => format!(
                "{}. A smaller batch_size with more gradient_accumulation_steps, gradient_checkpointing = \"on\" or a smaller max_seq_len needs less memory",
                self.memory()
            ),
            FaultKind::TooLargeTensor => self.too_large(),
            FaultKind::Lost => "The cause is in the driver or the machine: another program, \
                                overheating, sleep"
                .to_string(),
            FaultKind::KernelCompilation => {
                "Another backend or dtype compiles other kernels; RUST_LOG=debug prints more"
                    .to_string()
            }
            FaultKind::Other => {
                "This is probably a bug in the trainer: run again with RUST_LOG=debug and report the output"
                    .to_string()
            }
        };
        TrainError::Fault {
            fault,
            step,
            advice,
            resume: self.how_to_resume(),
            resumable: self.keeper.newest().is_some(),
        }
    }

    /// What to do about a tensor that is larger than the device's largest buffer.
    fn too_large(&self) -> String {
        let limit = match device::largest_buffer(self.setup.selected()) {
            Some(bytes) => format!(
                "The largest buffer of this device is {}",
                human::bytes(bytes)
            ),
            None => "The device limits its buffers".into(),
        };
        format!(
            "{limit}, however much memory is free. A smaller batch_size with more gradient_accumulation_steps, or a \
             smaller max_seq_len, makes the activations smaller; a weight of that size needs another backend, such \
             as --backend cpu"
        )
    }

    /// How to resume, as a sentence.
    pub(super) fn how_to_resume(&self) -> String {
        match self.keeper.newest() {
            Some(step) => format!(
                "Step {step} is saved; resume from there with:\n  {}",
                self.resume_command()
            ),
            None => "No checkpoint was written yet".into(),
        }
    }

    /// Everything that is needed to resume the run, on the host.
    fn snapshot_at(&self, learner: &Learner, metrics_bytes: u64) -> Result<Snapshot, AdapterError> {
        let mut progress = self.progress.clone();
        progress.seconds = self.seconds();
        Ok(Snapshot {
            state: State {
                format: FORMAT,
                program: concat!("trainer ", env!("CARGO_PKG_VERSION")).into(),
                device: self.setup.selected().name.clone(),
                total_steps: self.setup.total_steps,
                progress,
                division: Division::of(self.fit),
                metrics_bytes,
                command: self.setup.command.clone(),
                files: self.keeper.files().clone(),
                chat_template_time: self.setup.data.prompt.chat_template_time,
            },
            tensors: TrainingTensors::take(&learner.model, &learner.optimizer),
            adapter: self.adapter(learner)?,
        })
    }

    /// The adapter on the host, as one of the base model: what was taken out of the base model's weights is converted.
    pub(super) fn adapter(
        &self,
        learner: &Learner,
    ) -> Result<(AdapterConfig, AdapterTensors), AdapterError> {
        let config = AdapterConfig {
            lora: self.setup.config.lora_config(),
            base_model_name_or_path: Some(self.setup.config.base_model.clone()),
        };
        let tensors = AdapterTensors::from_model(&learner.model)?;
        Ok(match &learner.initial {
            None => (config, tensors),
            Some(initial) => (config.for_base_model(), tensors.for_base_model(initial)),
        })
    }

    /// What to do after an interruption, and the command.
    pub fn next_command(&self) -> (String, String) {
        match self.keeper.newest() {
            Some(step) => (format!("resume after step {step}"), self.resume_command()),
            None => (
                "nothing is saved yet".into(),
                "start the run again with the same command".into(),
            ),
        }
    }

    /// The command that resumes this run.
    fn resume_command(&self) -> String {
        let folder = shown(self.setup.folder.path());
        let device = match self.setup.backend {
            Backend::Auto => String::new(),
            backend => format!("--backend {backend} "),
        };
        let switches = device::switches();
        let switches: String = switches.iter().map(|name| format!("{name} ")).collect();
        format!("cargo xtask train {device}{switches}--resume {folder}")
    }
}
