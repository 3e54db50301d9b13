//! Files that survive a crash or a power cut: synced to the disk before they get their name.
//!
//! | module | what it holds |
//! | --- | --- |
//! | files | writing, renaming, removing, with the syncs that make them last |
//! | atomic | a file replaced as a whole or not at all |
//! | lock | one process per folder |
//! | [`faults`] | faults on demand, for tests |

mod atomic;
mod cache;
pub mod faults;
mod files;
mod lock;

pub use atomic::{WriteError, write_atomically, write_atomically_by};
pub use cache::cache_folder;
pub use files::{
    is_full, remove_folder, rename, sync_folder, tensors_header, write, write_tensors,
};
pub use lock::{Lock, LockError};
