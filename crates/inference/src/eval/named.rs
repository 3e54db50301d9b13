//! Adapters on the command line: `DIR`, or `NAME=DIR`.

use std::path::{Path, PathBuf};

/// The name of the base model in tables.
pub const BASE: &str = "base";

/// An adapter and its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedAdapter {
    /// The name in tables and files.
    pub name: String,
    /// The folder, or a name on the Hub, as given.
    pub folder: PathBuf,
}

/// Why adapters cannot be distinguished.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[allow(missing_docs)] // Each variant carries the argument that is wrong.
pub enum NameError {
    #[error(
        "--adapter {0}: expected DIR or NAME=DIR, as in --adapter fpb=runs/fpb/adapter; the part {1} the = is empty"
    )]
    Empty(String, &'static str),
    #[error("--adapter {0}: the name holds a line break or another control character")]
    Control(String),
    #[error(
        "--adapter {BASE}={}: \"{BASE}\" is the name of the model without an adapter; choose another name",
        .0.display()
    )]
    Reserved(PathBuf),
    #[error(
        "two adapters are called {name:?}: {} and {}; write NAME=DIR with a different name for each",
        first.display(), second.display()
    )]
    Twice {
        name: String,
        first: PathBuf,
        second: PathBuf,
    },
    #[error("the adapter {} is given twice; leave one out, or write NAME=DIR for each", .0.display())]
    SameFolder(PathBuf),
}

/// The adapters of the arguments, in their order, each with a name of its own.
///
/// An adapter without a name gets that of its folder, or of the run if training wrote it, or its
/// whole path if another adapter has that name. A path that exists is a path, whatever characters
/// it has.
///
/// # Errors
///
/// [`NameError`].
pub fn named(arguments: &[PathBuf]) -> Result<Vec<NamedAdapter>, NameError> {
    let parsed = arguments.iter().map(|argument| parse(argument));
    let parsed: Vec<(Option<String>, PathBuf)> = parsed.collect::<Result<_, _>>()?;
    let chosen = parsed.iter().map(|(name, folder)| match name {
        Some(name) => name.clone(),
        None => short(folder),
    });
    let chosen: Vec<String> = chosen.collect();
    let is_unique =
        |name: &String| name != BASE && chosen.iter().filter(|other| *other == name).count() == 1;
    let mut adapters: Vec<NamedAdapter> = Vec::new();
    for ((given, folder), chosen) in parsed.iter().zip(&chosen) {
        let name = if given.is_some() || is_unique(chosen) {
            chosen.clone()
        } else {
            folder.display().to_string()
        };
        if let Some(first) = adapters.iter().find(|first| first.name == name) {
            return Err(if given.is_none() && first.folder == *folder {
                NameError::SameFolder(folder.clone())
            } else {
                NameError::Twice {
                    name,
                    first: first.folder.clone(),
                    second: folder.clone(),
                }
            });
        }
        adapters.push(NamedAdapter {
            name,
            folder: folder.clone(),
        });
    }
    Ok(adapters)
}

fn parse(argument: &Path) -> Result<(Option<String>, PathBuf), NameError> {
    let split = argument.to_str().and_then(|text| text.split_once('='));
    let Some((name, folder)) = split.filter(|_| !argument.exists()) else {
        return Ok((None, argument.into()));
    };
    let written = argument.display().to_string();
    match (name.trim(), folder) {
        ("", _) => Err(NameError::Empty(written, "before")),
        (_, "") => Err(NameError::Empty(written, "after")),
        (BASE, folder) => Err(NameError::Reserved(folder.into())),
        (name, _) if name.contains(char::is_control) => {
            Err(NameError::Control(written.escape_debug().to_string()))
        }
        (name, folder) => Ok((Some(name.into()), folder.into())),
    }
}

/// The folder's own name; for the folder `adapter` in a run, the run's name.
fn short(folder: &Path) -> String {
    let name = |path: &Path| {
        path.file_name()
            .map(|name| name.to_string_lossy().into_owned())
    };
    match (name(folder), folder.parent().and_then(name)) {
        (Some(last), Some(run)) if last == "adapter" => run,
        (Some(last), _) => last,
        (None, _) => folder.display().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(arguments: &[&str]) -> Result<Vec<String>, String> {
        let arguments: Vec<PathBuf> = arguments.iter().map(PathBuf::from).collect();
        let adapters = named(&arguments).map_err(|error| error.to_string())?;
        Ok(adapters.into_iter().map(|adapter| adapter.name).collect())
    }

    #[test]
    fn contenders_have_names_that_tell_them_apart() {
        assert_eq!(
            names(&["runs/one/adapter", "peft/two"]).unwrap(),
            ["one", "two"]
        );
        assert_eq!(names(&["a/x", "b/x"]).unwrap(), ["a/x", "b/x"]);
        assert_eq!(names(&["runs/base"]).unwrap(), ["runs/base"]);
        assert_eq!(names(&["x=a/y", "b/x"]).unwrap(), ["x", "b/x"]);
        let adapters = named(&["fpb=runs/a=b".into()]).unwrap();
        assert_eq!(
            (adapters[0].name.as_str(), adapters[0].folder.as_path()),
            ("fpb", Path::new("runs/a=b"))
        );
    }

    #[test]
    fn a_folder_that_exists_is_no_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lr=2e-4");
        std::fs::create_dir(&path).unwrap();
        assert_eq!(named(std::slice::from_ref(&path)).unwrap()[0].folder, path);
    }

    #[test]
    fn names_that_cannot_be_are_refused_with_the_argument() {
        for (wrong, parts) in [
            (&["=runs/a"][..], ["--adapter =runs/a", "before the ="]),
            (&["a="], ["--adapter a=", "after the ="]),
            (&["base=runs/a"], ["base=runs/a", "another name"]),
            (&["a\nb=runs/a"], ["a\\nb", "control character"]),
            (&["a=runs/a", "a=runs/b"], ["\"a\"", "runs/a and runs/b"]),
            (&["runs/a", "runs/a"], ["runs/a", "given twice"]),
        ] {
            let error = names(wrong).unwrap_err();
            for part in parts {
                assert!(error.contains(part), "{error}");
            }
        }
    }
}
