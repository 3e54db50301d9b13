//! Files that survive a crash or a power cut: they are synced to the disk before they get their final name.
//!
//! | module | what it holds |
//! | --- | --- |
//! | files | writing, renaming and removing, with the syncs that make the result permanent |
//! | atomic | replacing a file as a whole or not at all |
//! | cache | the folder for files that can be recreated |
//! | lock | one process per folder |
//! | [`faults`] | fault injection, for tests |

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
