//! GGUF files for llama.cpp: models, merged models and adapters.
//!
//! | file | what it holds |
//! | --- | --- |
//! | `export` | the command `export-gguf` |
//! | `adapter` | an adapter in llama.cpp's layout |
//! | `error` | why a file cannot be written |

mod adapter;
mod error;
mod export;

pub use error::ExportGgufError;
pub use export::{ExportGgufArgs, run};
