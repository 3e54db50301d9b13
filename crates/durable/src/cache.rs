//! Where files go that can be made again.

use std::path::PathBuf;

/// The user's folder for files that can be made again; relative paths are ignored, as the XDG
/// specification asks.
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
