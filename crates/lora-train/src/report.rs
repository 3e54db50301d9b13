//! The third act of a run: its results.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::callback::TrainingCallback;
use crate::checkpoint::Progress;
use crate::error::TrainError;
use crate::fit::Fit;
use crate::interrupt::Interrupt;
use crate::model_card::ModelCard;
use crate::output::OutputFolder;
use crate::plan;
use crate::prepare::{Prepared, Setup};
use crate::run::Run;
use crate::screen::{RunResult, precision};
use crate::session::Session;
use crate::train::Ended;
use device::process_memory as memory;
use run_config::Config;

/// Writes the files of a complete adapter, and reports how the run ended.
///
/// # Errors
///
/// An adapter for which the disk has no room.
pub fn report(run: Run) -> Result<Ended, TrainError> {
    let Run {
        session,
        prompt_written,
        ..
    } = run;
    let setup = session.setup;
    let is_over = session.progress.is_over(setup.total_steps);
    if is_over {
        session.keeper.finish(session.interrupt, session.callback)?;
        if !prompt_written && !write_prompt(setup) {
            log::warn!("{} could not be written", data::PROMPT_FILE);
        }
        write_card(setup, session.fit, session.progress);
    }
    let result = result(&session, is_over);
    session.callback.on_finish(&result);
    let folder = setup.folder.clone();
    Ok(if is_over {
        Ended::Done(folder)
    } else {
        Ended::Interrupted(folder)
    })
}

/// Finishes a run that is resumed after its last step: writes the files that the stopped run may not have written.
///
/// # Errors
///
/// As [`report`].
pub fn already_done(
    mut prepared: Prepared,
    interrupt: &Interrupt,
    callback: &mut dyn TrainingCallback,
) -> Result<Ended, TrainError> {
    prepared.keeper.finish(interrupt, callback)?;
    let setup = prepared.setup;
    write_prompt(&setup);
    write_card(&setup, &prepared.fit, &prepared.progress);
    callback.on_already_done(&setup.folder, setup.total_steps);
    Ok(Ended::Done(setup.folder))
}

/// Writes the file with the prompt format into the adapter's folder. Returns whether that worked.
pub(crate) fn write_prompt(setup: &Setup) -> bool {
    let adapter = setup.folder.adapter();
    adapter.join(peft::WEIGHTS_FILE).exists() && setup.data.prompt.write(&adapter).is_ok()
}

fn write_card(setup: &Setup, fit: &Fit, progress: &Progress) {
    let config = &setup.config;
    let precision = precision(config, setup.loader.compute_dtype, fit);
    let card = ModelCard {
        config,
        shape: plan::shape(&setup.loader.config),
        trainable: fit.plan.counts.trainable,
        train_rows: setup.data.train.len(),
        validation_rows: setup.data.validation.len(),
        step: progress.kept.unwrap_or(setup.total_steps),
        total_steps: setup.total_steps,
        device: format!("{}, {precision}", setup.selected().name),
        base: progress.base,
        adapter: progress.kept_scores,
        command: setup.command.clone(),
    };
    card.write_or_warn(&setup.folder.adapter());
}

fn result(session: &Session, is_over: bool) -> RunResult {
    let (setup, progress) = (session.setup, &session.progress);
    RunResult {
        steps: progress.step,
        tokens: progress.tokens,
        elapsed: Duration::from_secs_f64(session.seconds()),
        peak_memory: memory::peak(),
        device_memory: device::memory_reserved(&setup.selected().device),
        base: progress.base,
        kept: progress.kept.zip(progress.kept_scores),
        stopped: (!is_over).then(|| "interrupted".into()),
        written: written(session, is_over),
        next: if is_over {
            next_commands(&setup.config, &setup.folder)
        } else {
            vec![session.next_command()]
        },
    }
}

/// The files and folders that a run has written so far.
fn written(session: &Session, is_over: bool) -> Vec<(String, PathBuf)> {
    let folder = &session.setup.folder;
    let mut written = Vec::new();
    if is_over || session.progress.kept.is_some() {
        written.push(("adapter".into(), folder.adapter()));
    }
    written.push(("configuration".into(), folder.config()));
    written.push(("metrics".into(), folder.metrics()));
    if session.keeper.newest().is_some() {
        let checkpoints = folder.checkpoints().folder().to_path_buf();
        written.push(("checkpoints".into(), checkpoints));
    }
    written
}

fn next_commands(config: &Config, folder: &OutputFolder) -> Vec<(String, String)> {
    let mut next = vec![(
        "load it in PEFT".to_string(),
        format!(
            "PeftModel.from_pretrained(model, {:?})",
            folder.adapter().display().to_string()
        ),
    )];
    if config.embedded_model() {
        let command = "cargo xtask train --config configs/smollm2-135m-fpb.toml";
        next.push(("train a real model".into(), command.into()));
    } else {
        let again = format!("cargo xtask train --config {}", shown(&folder.config()));
        next.push(("run it again".into(), again));
    }
    next
}

/// A path, quoted for a shell if it has spaces.
pub(crate) fn shown(path: &Path) -> String {
    match path.to_string_lossy() {
        text if text.contains(' ') => format!("\"{text}\""),
        text => text.into_owned(),
    }
}
