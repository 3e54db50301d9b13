//! Checkpoints and copies of a run, what is saved when the device fails, and how the run is resumed.

use std::time::Instant;

use llama_burn::Llama;

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
    /// A failure of the device; what the disk does not take is no error.
    pub fn save(&mut self, learner: &Learner) -> Result<(), TrainError> {
        let synced = self.metrics.sync();
        let bytes = *synced.as_ref().unwrap_or(&self.metrics.bytes());
        self.tell(synced.map(|_| ()));
        let taken = self.guard.run(|| self.snapshot_at(learner, bytes));
        match taken {
            Ok(snapshot) => self.keeper.write(&snapshot?, self.callback),
            Err(fault) => return Err(self.rescue(fault, None)),
        }
        Ok(())
    }

    /// On a GPU, takes a copy on the host now and then: a device that is lost gives nothing back.
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

    /// What was planned, and what the device says.
    pub(super) fn memory(&self) -> String {
        let device = &self.setup.selected().device;
        let used = match device::memory_in_use(device) {
            Some(bytes) => format!(", the device has {} in use", human::bytes(bytes)),
            None => String::new(),
        };
        let plan = human::bytes(self.fit.plan.resident_peak());
        format!("This was planned to need {plan}{used}")
    }

    /// Saves what can be saved after a failure of the device, and says what happened. `live` is given where
    /// what is on the device was not being changed.
    pub(super) fn rescue(&mut self, fault: DeviceFault, live: Option<&Learner>) -> TrainError {
        let step = self.progress.next();
        let newer = Some(self.progress.step) > self.keeper.newest();
        if let Some(learner) = live.filter(|_| newer && self.progress.step > 0) {
            // The device may still give its tensors back; if not, there is the last copy.
            let metrics_bytes = self.metrics.bytes();
            let taken = self.guard.run(|| self.snapshot_at(learner, metrics_bytes));
            if let Ok(Ok(snapshot)) = taken {
                self.keeper.write(&snapshot, self.callback);
            }
        }
        self.keeper.rescue(self.callback);
        let advice = match fault.kind {
            FaultKind::OutOfMemory => format!(
                "{}. A smaller batch_size with more gradient_accumulation_steps, gradient_checkpointing = \"on\" or a \
                 smaller max_seq_len needs less",
                self.memory()
            ),
            FaultKind::TooLargeTensor => self.too_large(),
            FaultKind::Lost => "This is the driver's doing, or the machine's: another program, \
                                overheating, sleep"
                .to_string(),
            FaultKind::KernelCompilation => {
                "Another backend or dtype compiles other kernels; RUST_LOG=debug prints more"
                    .to_string()
            }
            FaultKind::Other => {
                "This is probably an error in the trainer; RUST_LOG=debug prints more".to_string()
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

    /// What to do about a tensor that the device has no buffer for.
    fn too_large(&self) -> String {
        let limit = match device::largest_buffer(self.setup.selected()) {
            Some(bytes) => format!(
                "The largest buffer of this device is {}",
                human::bytes(bytes)
            ),
            None => "The device limits its buffers".into(),
        };
        format!(
            "{limit}, whatever memory is free. A smaller batch_size with more gradient_accumulation_steps, or a \
             smaller max_seq_len, makes the activations smaller; for a weight of that size take another backend, as \
             in --backend cpu"
        )
    }

    /// What to type to go on, in words.
    pub(super) fn how_to_resume(&self) -> String {
        match self.keeper.newest() {
            Some(step) => format!(
                "Step {step} is saved; this goes on from there:\n  {}",
                self.resume_command()
            ),
            None => "No checkpoint was written yet".into(),
        }
    }

    /// Everything that the run needs to go on, on the host.
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
                files: self.keeper.files().clone(),
                chat_template_time: self.setup.data.prompt.chat_template_time,
            },
            tensors: TrainingTensors::take(&learner.model, &learner.optimizer),
            adapter: self.adapter(&learner.model)?,
        })
    }

    /// The adapter on the host.
    pub(super) fn adapter(
        &self,
        model: &Llama,
    ) -> Result<(AdapterConfig, AdapterTensors), AdapterError> {
        let config = AdapterConfig {
            lora: self.setup.config.lora_config(),
            base_model_name_or_path: Some(self.setup.config.base_model.clone()),
        };
        Ok((config, AdapterTensors::from_model(model)?))
    }

    /// What to do after an interruption, and the command.
    pub fn how_to_go_on(&self) -> (String, String) {
        match self.keeper.newest() {
            Some(step) => (format!("go on after step {step}"), self.resume_command()),
            None => (
                "nothing is saved yet".into(),
                "start the run again with the same command".into(),
            ),
        }
    }

    /// The command that goes on with this run.
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
