//! FinLoRA's files in a folder.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use super::tasks::{SuiteTask, TASKS, of_name};
use run_config::nearest;

/// If more files than this belong to no task, the rest is counted, not named.
const MOST_NAMED: usize = 20;

/// The first bytes of the files that git leaves in place of large ones.
const LFS_POINTER: &[u8] = b"version https://git-lfs";

/// Why a folder cannot be evaluated.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // Each variant carries what was looked for and where.
pub enum FolderError {
    #[error("--data-dir {}: there is no such folder; it is the one with FinLoRA's test files (data/test)", .0.display())]
    Missing(PathBuf),
    #[error(
        "--data-dir {} is a file; give the folder that holds FinLoRA's test files, and --tasks to choose among them",
        .0.display()
    )]
    NotAFolder(PathBuf),
    #[error("cannot read {}: {source}", path.display())]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error(
        "--tasks: FinLoRA has no task {name:?}{}; its tasks are {}",
        meant(name),
        task_names()
    )]
    UnknownTask { name: String },
    #[error("--tasks names {name}, but its file {file} is not in {}", dir.display())]
    TaskWithoutFile {
        name: &'static str,
        file: &'static str,
        dir: PathBuf,
    },
    #[error("{} holds none of FinLoRA's test files; looked for {files}", dir.display())]
    Empty { dir: PathBuf, files: String },
    #[error(
        "{} is a pointer of Git LFS, not the file itself; run `git lfs pull` in the clone of FinLoRA",
        .0.display()
    )]
    Pointer(PathBuf),
}

/// The contents of a folder.
#[derive(Debug, PartialEq, Eq)]
pub struct Folder {
    /// The tasks to evaluate, in FinLoRA's order, with their files.
    pub tasks: Vec<(&'static SuiteTask, PathBuf)>,
    /// Files of tasks that are missing.
    pub missing: Vec<&'static str>,
    /// Other files in the folder, sorted.
    pub ignored: Vec<String>,
}

impl Folder {
    /// Looks for the files of the named tasks, or of all tasks without names.
    ///
    /// # Errors
    ///
    /// [`FolderError`].
    pub fn read(dir: &Path, names: &[String]) -> Result<Self, FolderError> {
        let wanted = wanted(names)?;
        let failed = |path: &Path| {
            let path = path.to_path_buf();
            move |source| FolderError::Read { path, source }
        };
        match fs::metadata(dir) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(FolderError::Missing(dir.into()));
            }
            Err(source) => return Err(failed(dir)(source)),
            Ok(metadata) if !metadata.is_dir() => return Err(FolderError::NotAFolder(dir.into())),
            Ok(_) => {}
        }
        let mut ignored = Vec::new();
        for entry in fs::read_dir(dir).map_err(failed(dir))? {
            let entry = entry.map_err(failed(dir))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if !TASKS.iter().any(|task| task.file == name) {
                ignored.push(if entry.path().is_dir() {
                    name + "/"
                } else {
                    name
                });
            }
        }
        ignored.sort_unstable();
        let mut folder = Self {
            tasks: Vec::new(),
            missing: Vec::new(),
            ignored,
        };
        for task in wanted {
            let path = dir.join(task.file);
            match path.exists() {
                true => {
                    if is_pointer(&path).map_err(failed(&path))? {
                        return Err(FolderError::Pointer(path));
                    }
                    folder.tasks.push((task, path));
                }
                false if !names.is_empty() => {
                    return Err(FolderError::TaskWithoutFile {
                        name: task.name,
                        file: task.file,
                        dir: dir.into(),
                    });
                }
                false => folder.missing.push(task.file),
            }
        }
        if folder.tasks.is_empty() {
            Err(FolderError::Empty {
                dir: dir.into(),
                files: folder.missing.join(", "),
            })
        } else {
            Ok(folder)
        }
    }

    /// Notes to the user about tasks and files that are not evaluated.
    pub fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        if !self.missing.is_empty() {
            notes.push(format!(
                "missing files, whose tasks are skipped: {}",
                self.missing.join(", ")
            ));
        }
        if !self.ignored.is_empty() {
            let named = &self.ignored[..self.ignored.len().min(MOST_NAMED)];
            let more = match self.ignored.len() - named.len() {
                0 => String::new(),
                more => format!(" and {more} more"),
            };
            notes.push(format!(
                "ignored, because FinLoRA has no test file of this name: {}{more}",
                named.join(", ")
            ));
        }
        notes
    }
}

fn wanted(names: &[String]) -> Result<Vec<&'static SuiteTask>, FolderError> {
    for name in names.iter().map(|name| name.trim()) {
        if of_name(name).is_none() {
            return Err(FolderError::UnknownTask { name: name.into() });
        }
    }
    let is_named = |task: &&SuiteTask| names.iter().any(|name| name.trim() == task.name);
    let all = TASKS.iter();
    Ok(if names.is_empty() {
        all.collect()
    } else {
        all.filter(is_named).collect()
    })
}

fn is_pointer(path: &Path) -> std::io::Result<bool> {
    if !fs::metadata(path)?.is_file() {
        return Ok(false);
    }
    let mut beginning = Vec::new();
    let file = File::open(path)?;
    { file.take(LFS_POINTER.len() as u64) }.read_to_end(&mut beginning)?;
    Ok(beginning == LFS_POINTER)
}

fn task_names() -> String {
    let names: Vec<&str> = TASKS.iter().map(|task| task.name).collect();
    names.join(", ")
}

fn meant(name: &str) -> String {
    let by_file = TASKS
        .iter()
        .find(|task| task.file == name || task.file.strip_suffix(".jsonl") == Some(name));
    let known = TASKS.iter().map(|task| task.name);
    let ends_so = || {
        known
            .clone()
            .find(|known| known.ends_with(name) && !name.is_empty())
    };
    let nearest = by_file.map(|task| task.name).or_else(ends_so);
    match nearest.or_else(|| nearest_of(name)) {
        Some(known) => format!(" (did you mean {known}?)"),
        None => String::new(),
    }
}

fn nearest_of(name: &str) -> Option<&'static str> {
    nearest(name, TASKS.iter().map(|task| task.name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for file in files {
            std::fs::write(folder.path().join(file), "x").unwrap();
        }
        folder
    }

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| name.to_string()).collect()
    }

    fn error(dir: &Path, tasks: &[&str]) -> String {
        Folder::read(dir, &names(tasks)).unwrap_err().to_string()
    }

    #[test]
    fn what_is_there_is_taken_in_finloras_order_and_the_rest_is_named() {
        let dir = folder(&["tfns_test.jsonl", "fpb_test.jsonl", "finer_test.jsonl"]);
        std::fs::create_dir(dir.path().join("old")).unwrap();
        let read = Folder::read(dir.path(), &[]).unwrap();
        let tasks: Vec<&str> = read.tasks.iter().map(|(task, _)| task.name).collect();
        assert_eq!(tasks, ["fpb", "tfns"]);
        assert_eq!(read.missing.len(), TASKS.len() - 2);
        assert_eq!(read.ignored, ["finer_test.jsonl", "old/"]);
        let notes = read.notes();
        assert!(notes[0].contains("financebench_test.jsonl"), "{notes:?}");
        assert!(notes[1].contains("finer_test.jsonl, old/"), "{notes:?}");
    }

    #[test]
    fn tasks_that_are_chosen_are_the_only_ones_looked_for() {
        let dir = folder(&["tfns_test.jsonl", "fpb_test.jsonl"]);
        let read = Folder::read(dir.path(), &names(&["tfns", " tfns "])).unwrap();
        assert_eq!(read.tasks.len(), 1);
        assert_eq!((read.missing.len(), read.ignored.len()), (0, 0));
        assert!(read.notes().is_empty());
        let error_of = |task| error(dir.path(), &[task]);
        assert!(error_of("ner").contains("ner_test.jsonl"));
        assert!(error_of("finer").contains("did you mean xbrl_finer?"));
        assert!(error_of("fpb_test.jsonl").contains("did you mean fpb?"));
        assert!(error_of("headlines").contains("did you mean headline?"));
        assert!(error_of("").contains("its tasks are fpb, fiqa"));
    }

    #[test]
    fn a_folder_without_tasks_is_an_error_that_names_the_files() {
        let dir = folder(&["fpb.jsonl"]);
        assert!(error(dir.path(), &[]).contains("fpb_test.jsonl, fiqa_test.jsonl"));
        assert!(error(&dir.path().join("fpb.jsonl"), &[]).contains("is a file"));
        assert!(error(&dir.path().join("none"), &[]).contains("no such folder"));
        let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\n";
        std::fs::write(dir.path().join("ner_test.jsonl"), pointer).unwrap();
        assert!(error(dir.path(), &[]).contains("git lfs pull"));
    }
}
