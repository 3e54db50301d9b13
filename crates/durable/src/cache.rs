//! The folder for files that can be recreated.

use std::path::PathBuf;

/// The user's cache folder: `XDG_CACHE_HOME`, or the system's default. `None` if neither is an
/// absolute path; the XDG specification asks to ignore relative ones.
pub fn cache_folder() -> Option<PathBuf> {
    let folder = |variable: &str| {
        let path = std::env::var_os(variable).map(PathBuf::from);
        path.filter(|path| path.is_absolute())
    };
    let of_the_system = if cfg!(windows) {
        folder("LOCALAPPDATA")
    } else if cfg!(target_os = "macos") {
        folder("HOME").map(|home| home.join("Library/Caches"))
    } else {
        folder("HOME").map(|home| home.join(".cache"))
    };
    folder("XDG_CACHE_HOME").or(of_the_system)
}
